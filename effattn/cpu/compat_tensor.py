"""Tensors that say they are on a GPU and live in host memory, and the functions that make them.

A tensor made for device "cuda" is a `CudaTensor`: an ordinary CPU tensor whose Python class answers `is_cuda`, `device` and
`get_device` as a GPU's would. What is computed from one is one, in autograd's backward too, since the class takes part in
torch's dispatch. Tensors made for the CPU stay plain tensors and are treated as ever, so code that compares a GPU's
result with the CPU's runs both of its branches.

What differs from a GPU: operations that mix devices are not refused, operations run at once, and the numbers that torch
itself computes (outside of Triton kernels) are those of its CPU code.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DEVICE = torch.device("cuda", 0)

_BASE: Any = torch.Tensor.__mro__[1]  # torch._C.TensorBase, whose properties answer truthfully
_BUILT_IN = frozenset({"aten", "prim", "prims", "quantized", "mkldnn", "mkldnn_prepacked", "sparse"})


class _State:
    """What the patched functions consult. One emulated machine a process."""

    active = False
    #: set by torch.set_default_device("cuda")
    default_device = False
    #: the random numbers of the emulated device: another stream than the CPU's, as on a GPU
    generator: torch.Generator | None = None


state = _State()


def is_cuda_device(device: Any) -> bool:
    """Whether a device argument means the emulated GPU. RuntimeError for a second one."""
    if device is None or isinstance(device, bool):
        return False
    if isinstance(device, int):
        index: int | None = device
    elif isinstance(device, str):
        kind, _, number = device.partition(":")
        if kind != "cuda":
            return False
        index = int(number) if number.isdigit() else None
    elif isinstance(device, torch.device):
        if device.type != "cuda":
            return False
        index = device.index
    else:
        return False
    if index:
        raise RuntimeError(
            f"CUDA error: invalid device ordinal: {device}; the emulated machine has one device, cuda:0"
        )
    return True


class CudaTensor(torch.Tensor):
    """A CPU tensor that says it is on cuda:0. Outside of the emulation it tells the truth."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in _BUILT_IN:
            found = _registered(func)
            if found is not None:
                return func.redispatch(found, *args, **kwargs)
        elif _draws(func) and kwargs.get("generator") is None:
            kwargs = {**kwargs, "generator": state.generator}
        with torch._C._DisableTorchDispatch():
            out = func(*args, **kwargs)
        return _tag_outputs(out, args, kwargs)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE if state.active else _BASE.device.__get__(self)

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return state.active

    @property
    def is_cpu(self) -> bool:  # type: ignore[override]
        return not state.active

    @property
    def _effattn_in_host_memory(self) -> bool:
        """What a launch on the CPU asks a tensor that is not `is_cpu`."""
        return True

    def get_device(self) -> int:  # type: ignore[override]
        return 0 if state.active else -1

    def numpy(self, *, force: bool = False) -> Any:  # type: ignore[override]
        if state.active and not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        return plain(self).numpy() if not self.requires_grad or force else _BASE.numpy(self)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def record_stream(self, stream: Any) -> None:  # type: ignore[override]
        """Nothing: memory is not reused behind a stream's back."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        text = repr(plain(self))
        extra = ", device='cuda:0'" if state.active else ""
        if self.grad_fn is not None:
            extra += f", grad_fn=<{type(self.grad_fn).__name__}>"
        elif self.requires_grad:
            extra += ", requires_grad=True"
        return f"{text[:-1]}{extra})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else repr(self)

    def tolist(self) -> Any:
        return plain(self).tolist()

    def __reduce_ex__(self, proto: Any) -> Any:
        from effattn.cpu import compat_storage

        compat_storage.mark_on_device(self)
        return plain(self).requires_grad_(self.requires_grad).__reduce_ex__(proto)


def plain(x: torch.Tensor) -> torch.Tensor:
    """A plain tensor on the same memory, cut off from autograd."""
    with torch._C._DisableTorchDispatch():
        return x.detach()


def tag(x: torch.Tensor) -> torch.Tensor:
    """A CudaTensor on the same memory; a leaf if `x` is one that requires gradients."""
    if isinstance(x, CudaTensor):
        return x
    return torch.Tensor._make_subclass(CudaTensor, x.detach(), x.requires_grad)


def _tag_outputs(out: Any, args: Any, kwargs: Any) -> Any:
    if isinstance(out, torch.Tensor):
        # An operation in place, or with out=, returns what it was given: that stays where it is.
        if (
            type(out) is not torch.Tensor
            or any(out is x for x in args)
            or any(out is x for x in kwargs.values())
        ):
            return out
        return torch.Tensor._make_subclass(CudaTensor, out)
    if isinstance(out, (tuple, list)):
        return type(out)(_tag_outputs(x, args, kwargs) for x in out)
    return out


@functools.cache
def _draws(func: Any) -> bool:
    """Whether an operation takes a generator of random numbers."""
    return any(a.name == "generator" for a in func._schema.arguments)


@functools.cache
def _registered(func: Any) -> Any:
    """Where a custom operation has its kernel: the GPU's if there is one. Its body sees emulated tensors as well."""
    for key in ("CUDA", "CPU", "CompositeExplicitAutograd"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
            return torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    return None


# ---------------------------------------------------------------------------------- moving between the devices


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, to_cuda: bool) -> torch.Tensor:
        ctx.back = not to_cuda
        return _copied(x, to_cuda)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return moved(grads[0], ctx.back), None


def _copied(x: torch.Tensor, to_cuda: bool) -> torch.Tensor:
    copy = plain(x).clone()
    return tag(copy) if to_cuda else copy


def moved(x: torch.Tensor, to_cuda: bool) -> torch.Tensor:
    """`x` on the other device, as a copy that autograd follows; `x` itself where it is there already."""
    if isinstance(x, CudaTensor) == to_cuda:
        return x
    if torch.is_grad_enabled() and x.requires_grad:
        return _Move.apply(x, to_cuda)  # type: ignore[return-value]
    return _copied(x, to_cuda)


# ------------------------------------------------------------------------------------------ patched functions


def _noting_outputs(original: Any) -> Any:
    """`autograd.Function.apply` that notes in the graph which outputs are on the device."""

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(cls, *args, **kwargs)
        outputs = out if isinstance(out, tuple) else (out,)
        on_device = [i for i, x in enumerate(outputs) if isinstance(x, CudaTensor)]
        node = next((outputs[i].grad_fn for i in on_device if outputs[i].grad_fn is not None), None)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            node._effattn_on_device = on_device  # pyright: ignore[reportAttributeAccessIssue]
        return out

    return classmethod(apply)


def _with_gradients_on_the_device(original: Any) -> Any:
    """A backward pass is handed zeros that autograd makes for outputs without a gradient: they belong where the output is."""

    def apply(self: Any, *grads: Any) -> Any:
        there = getattr(self, "_effattn_on_device", ())
        placed = (
            tag(g) if i in there and type(g) is torch.Tensor and not g.requires_grad else g
            for i, g in enumerate(grads)
        )
        return original(self, *placed)

    return apply


#: factories that look at data which may be the caller's own memory
_SHARING = ("as_tensor", "asarray")
_LIKE = ("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
_NEW = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty_strided")
_RANDOM = ("rand", "randn", "randint", "randperm", "normal")


def _factory(fn: Any, name: str) -> Any:
    """`fn` with a `device` that may be the emulated one."""
    method = name in _NEW
    follows = method or name in _LIKE  # without a device: where its argument is
    from_data = name == "new_tensor"  # its data, not its argument, goes through torch's dispatch

    @functools.wraps(fn)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is None:
            wanted = isinstance(args[0], CudaTensor) if from_data else state.default_device and not follows
        else:
            wanted = is_cuda_device(device)
        if not wanted:
            pinned = kwargs.pop("pin_memory", False)
            out = fn(*args, **kwargs)
            if pinned:
                from effattn.cpu import compat_storage

                compat_storage.mark_pinned(out)
            if device is not None and isinstance(out, CudaTensor):
                out = moved(out, False)
            return out
        kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        if name in _RANDOM and kwargs.get("generator") is None:
            kwargs["generator"] = state.generator
        out = fn(*args, **kwargs)
        return moved(out, True) if name in _SHARING else tag(out)

    return made


def _to(original: Any) -> Any:
    @functools.wraps(original)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        first = args[0] if args else None
        other = first if isinstance(first, torch.Tensor) else kwargs.get("other")
        if other is not None:
            target, dtype = isinstance(other, CudaTensor), other.dtype
            rest = {k: v for k, v in kwargs.items() if k != "other"}
            return _placed(original(self, dtype, *args[1:], **rest), self, target, rest.get("copy", False))
        if kwargs.get("device") is not None:
            device = kwargs["device"]
        elif isinstance(first, (str, torch.device)) or (
            isinstance(first, int) and not isinstance(first, bool)
        ):
            device, args = first, args[1:]
        else:
            return original(self, *args, **kwargs)
        rest = {k: v for k, v in kwargs.items() if k != "device"}
        target = is_cuda_device(device)
        if not target and torch.device(device).type != "cpu":
            return original(self, device, *args, **rest)
        # What follows the device: dtype=None, non_blocking=False, copy=False. Without a dtype they would be read as one.
        rest |= dict(zip(("dtype", "non_blocking", "copy"), args, strict=False))
        rest.pop("non_blocking", None)
        if rest.get("dtype") is None:
            rest.pop("dtype", None)
        return _placed(original(self, **rest) if rest else self, self, target, rest.get("copy", False))

    return to


def _placed(x: torch.Tensor, given: torch.Tensor, target: bool, copy: bool) -> torch.Tensor:
    return moved(x, target) if not copy or x is not given else moved(x.clone(), target)


def _cuda(
    self: torch.Tensor, device: Any = None, non_blocking: bool = False, memory_format: Any = None
) -> torch.Tensor:
    if device is not None and not is_cuda_device(device):
        raise ValueError(f"Invalid device, must be cuda device: {device}")
    out = moved(self, True)
    return out if memory_format is None else out.contiguous(memory_format=memory_format)


def _cpu(self: torch.Tensor, memory_format: Any = None) -> torch.Tensor:
    out = moved(self, False)
    return out if memory_format is None else out.contiguous(memory_format=memory_format)


def _type(original: Any) -> Any:
    @functools.wraps(original)
    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            name = original(self)
            return name.replace("torch.", "torch.cuda.") if self.is_cuda else name
        name = (
            dtype
            if isinstance(dtype, str)
            else f"{getattr(dtype, '__module__', '')}.{getattr(dtype, '__name__', '')}"
        )
        if name.startswith("torch.cuda."):
            return moved(original(self, name.replace("torch.cuda.", "torch.")), True)
        return original(self, dtype, *args, **kwargs)

    return type_


def _type_as(original: Any) -> Any:
    @functools.wraps(original)
    def type_as(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return moved(original(self, other), isinstance(other, CudaTensor))

    return type_as


def _where_the_first_is(original: Any) -> Any:
    """A function that makes its result past torch's dispatch: the result goes where the first tensor is."""

    @functools.wraps(original)
    def made(first: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(first, *args, **kwargs)
        one = first[0] if isinstance(first, (list, tuple)) and first else first
        return moved(out, True) if isinstance(one, CudaTensor) else out

    return made


def _generator_class() -> Any:
    original: Any = torch.Generator

    class _Meta(type(original)):
        def __instancecheck__(cls, instance: Any) -> bool:  # pyright: ignore[reportSelfClsParameterName]
            return isinstance(instance, original)

    class Generator(original, metaclass=_Meta):
        def __new__(cls, device: Any = "cpu") -> Any:
            return CudaGenerator("cpu") if is_cuda_device(device) else original(device)

    return Generator


class CudaGenerator(torch.Generator):
    """The random numbers of the emulated device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE


def device_generator(seed: int) -> CudaGenerator:
    """A generator for the emulated device. Its numbers differ from the CPU's for the same seed, as a GPU's do."""
    generator = CudaGenerator("cpu")
    seed_device(generator, seed)
    return generator


def seed_device(generator: torch.Generator, seed: int) -> None:
    generator.manual_seed((seed + 0x9E3779B97F4A7C15) % (1 << 63))


Patch = Callable[[Any, str, Any], None]


def install(patch: Patch) -> None:
    """Patch what makes tensors and moves them. `patch(owner, name, value)` remembers what was there."""
    import torch.utils._device as devices
    from torch.jit._builtins import _register_builtin

    constructors = devices._device_constructors()
    wrapped: dict[Any, Any] = {}
    for name in dir(torch):
        fn = getattr(torch, name)
        if callable(fn) and (name in _LIKE or name == "normal" or _hashable_in(fn, constructors)):
            wrapped[fn] = _factory(fn, name)
            # Scripted functions still know it as the operation it is.
            _register_builtin(wrapped[fn], f"aten::{name}")
            patch(torch, name, wrapped[fn])
    for name in _NEW:
        patch(torch.Tensor, name, _factory(getattr(torch.Tensor, name), name))
    patch(torch.Tensor, "to", _to(torch.Tensor.to))
    patch(torch.Tensor, "cuda", _cuda)
    patch(torch.Tensor, "cpu", _cpu)
    patch(torch.Tensor, "type", _type(torch.Tensor.type))
    patch(torch.Tensor, "type_as", _type_as(torch.Tensor.type_as))
    patch(torch.Tensor, "new", _where_the_first_is(torch.Tensor.new))
    patch(torch.nn.utils.rnn, "pad_sequence", _where_the_first_is(torch.nn.utils.rnn.pad_sequence))
    patch(torch, "Generator", _generator_class())
    function = torch.autograd.Function
    patch(function, "apply", _noting_outputs(vars(function)["apply"].__func__))
    node = torch.autograd.function.BackwardCFunction
    patch(node, "apply", _with_gradients_on_the_device(node.apply))

    inside = devices.DeviceContext.__torch_function__

    def in_context(self: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # `with torch.device("cuda"):` sends the factories of torch through here.
        if self.device.type == "cuda" and func in wrapped and (kwargs or {}).get("device") is None:
            return wrapped[func](*args, **{**(kwargs or {}), "device": self.device})
        return inside(self, func, types, args, kwargs)

    patch(devices.DeviceContext, "__torch_function__", in_context)

    set_default, get_default = torch.set_default_device, torch.get_default_device

    def set_default_device(device: Any) -> None:
        state.default_device = is_cuda_device(device)
        set_default(None if state.default_device else device)

    patch(torch, "set_default_device", set_default_device)
    patch(torch, "get_default_device", lambda: DEVICE if state.default_device else get_default())


def _hashable_in(fn: Any, known: Any) -> bool:
    try:
        return fn in known
    except TypeError:
        return False


@contextmanager
def module_moves() -> Iterator[None]:
    """`module.cuda()` must change the class of its parameters: they are swapped, so that references to them stay good."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
