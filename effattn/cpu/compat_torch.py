"""What `torch.cuda` and its neighbours answer while a GPU is emulated."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from effattn.cpu.compat_gpus import GPUS
from effattn.cpu.compat_tensor import (
    DEVICE,
    CudaTensor,
    Patch,
    device_generator,
    is_cuda_device,
    seed_device,
    state,
)
from effattn.errors import NotSupported


def device_name(capability: tuple[int, int]) -> str:
    return f"{GPUS[capability].name} (emulated on the CPU)"


class Stream:
    """A stream on which everything has happened already."""

    cuda_stream = 0
    stream_id = 0
    device_index = 0
    priority = 0
    device = DEVICE
    device_type = 1

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.priority = priority

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def is_capturing(self) -> bool:
        return False

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return hash(("effattn stream", 0))


class Event:
    """A moment of the host's clock: kernels have ended when a launch returns."""

    device = DEVICE
    cuda_event = 0

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any
    ) -> None:
        self.at: float | None = None

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds between two recorded events."""
        if self.at is None or end_event.at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return max((end_event.at - self.at) * 1e3, 1e-6)


class _Context:
    """`torch.cuda.device(...)` and its like: there is one device, so nothing changes."""

    def __init__(self, device: Any = None) -> None:
        if device is not None and not isinstance(device, torch.Tensor) and device != -1:
            is_cuda_device(device)
        self.idx = 0
        self.prev_idx = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> bool:
        return False


class _Runtime:
    """`torch.cuda.cudart()`: profiling marks and registrations, which do nothing and succeed."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("cudaProfiler", "cudaHost")):
            return lambda *_, **__: 0
        raise AttributeError(f"{name} of the CUDA runtime is not emulated on the CPU")


def _for_devices(original: Any, emulated: Any) -> Any:
    """`torch.Stream` or `torch.Event`, where a device that is emulated gets the emulation's."""

    class _Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, (original, emulated))

        def __call__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
            # The accelerator's, where none is named.
            if device is None or is_cuda_device(device):
                return emulated(*args, **kwargs)
            return original(device, *args, **kwargs)

    return _Meta(original.__name__, (), {"__doc__": original.__doc__})


def _tensor_type(name: str, dtype: torch.dtype) -> Any:
    """`torch.cuda.FloatTensor` and its like: it makes tensors, and is what a tensor of that dtype is an instance of."""

    class _Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, CudaTensor) and instance.is_cuda and instance.dtype == dtype

        def __call__(cls, *args: Any) -> torch.Tensor:
            if args and all(isinstance(x, int) for x in args):
                return torch.empty(args, dtype=dtype, device="cuda")
            return torch.tensor(args[0] if args else [], dtype=dtype, device="cuda")

    return _Meta(name, (), {"dtype": dtype, "is_cuda": True, "__module__": "torch.cuda"})


def _host_only(original: Any) -> Any:
    """The profiler's constructor without the activities of a GPU, of which there is nothing to record."""
    from torch.profiler import ProfilerActivity

    def __init__(self: Any, *, activities: Any = None, **kwargs: Any) -> None:
        if activities is not None:
            activities = [a for a in activities if a != ProfilerActivity.CUDA] or [ProfilerActivity.CPU]
        original(self, activities=activities, **kwargs)

    return __init__


_TENSOR_TYPES = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "CharTensor": torch.int8,
    "ShortTensor": torch.int16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "BoolTensor": torch.bool,
}


def _set_default_tensor_type(original: Any) -> Any:
    def set_default_tensor_type(t: Any) -> None:
        name = t if isinstance(t, str) else f"{t.__module__}.{t.__name__}"
        if name.startswith("torch.cuda."):
            torch.set_default_dtype(_TENSOR_TYPES[name.removeprefix("torch.cuda.")])
            torch.set_default_device("cuda")
        else:
            original(t)
            torch.set_default_device(None)

    return set_default_tensor_type


def _refuse(what: str) -> Any:
    class Refused:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise NotSupported(f"{what} are not emulated on the CPU: run the code without them")

    Refused.__name__ = what
    return Refused


def _host_memory() -> tuple[int, int]:
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _properties(capability: tuple[int, int]) -> SimpleNamespace:
    gpu = GPUS[capability]
    return SimpleNamespace(
        name=device_name(capability),
        major=capability[0],
        minor=capability[1],
        total_memory=_host_memory()[1],
        multi_processor_count=gpu.multiprocessors,
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=gpu.threads_multiprocessor,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=48 << 10,
        shared_memory_per_block_optin=gpu.shared_memory,
        shared_memory_per_multiprocessor=gpu.shared_memory_multiprocessor,
        L2_cache_size=gpu.l2_cache,
        is_integrated=0,
        is_multi_gpu_board=0,
        gcnArchName="",
        uuid="00000000-0000-0000-0000-000000000000",
        pci_bus_id=0,
        pci_device_id=0,
        pci_domain_id=0,
        clock_rate=gpu.clock * 1000,
        memory_clock_rate=gpu.memory_clock,
        memory_bus_width=gpu.bus_width,
    )


def _answers(capability: tuple[int, int], seed: int) -> dict[str, Any]:
    """Names of `torch.cuda` and what stands there during the emulation."""
    generator = state.generator = device_generator(seed)
    initial = [seed]
    stream = Stream()
    properties = _properties(capability)

    def nothing(*_: Any, **__: Any) -> None:
        pass

    def zero(*_: Any, **__: Any) -> int:
        return 0

    def manual_seed(value: int) -> None:
        initial[0] = int(value)
        seed_device(generator, int(value))

    def seed_all() -> None:
        manual_seed(int.from_bytes(os.urandom(7), "little"))

    def set_rng_state(new: torch.Tensor, device: Any = "cuda") -> None:
        generator.set_state(new)

    def get_device_capability(device: Any = None) -> tuple[int, int]:
        is_cuda_device(device)
        return capability

    def get_device_properties(device: Any = None) -> SimpleNamespace:
        is_cuda_device(device)
        return properties

    def get_device_name(device: Any = None) -> str:
        is_cuda_device(device)
        return properties.name

    def set_device(device: Any) -> None:
        is_cuda_device(device)

    @contextmanager
    def stream_context(_stream: Any = None) -> Iterator[None]:
        yield

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "is_bf16_supported": lambda including_emulation=True: including_emulation or capability >= (8, 0),
        "is_tf32_supported": lambda: capability >= (8, 0),
        "_is_compiled": lambda: True,
        "_lazy_init": nothing,
        "_exchange_device": zero,
        "_maybe_exchange_device": zero,
        "init": nothing,
        "device_count": lambda: 1,
        "current_device": zero,
        "set_device": set_device,
        "device": _Context,
        "device_of": _Context,
        "_DeviceGuard": _Context,
        "get_device_capability": get_device_capability,
        "get_device_properties": get_device_properties,
        "get_device_name": get_device_name,
        "get_arch_list": lambda: [f"sm_{capability[0]}{capability[1]}"],
        "cudart": _Runtime,
        "check_error": nothing,
        "can_device_access_peer": lambda *_: False,
        "synchronize": nothing,
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": nothing,
        "stream": stream_context,
        "Stream": Stream,
        "ExternalStream": Stream,
        "StreamContext": stream_context,
        "Event": Event,
        "CUDAGraph": _refuse("CUDA graphs"),
        "graph": _refuse("CUDA graphs"),
        "make_graphed_callables": _refuse("CUDA graphs"),
        "graph_pool_handle": _refuse("CUDA graphs"),
        "_compile_kernel": _refuse("kernels in CUDA C++"),
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "reset_peak_memory_stats": nothing,
        "reset_accumulated_memory_stats": nothing,
        "reset_max_memory_allocated": nothing,
        "reset_max_memory_cached": nothing,
        "set_per_process_memory_fraction": nothing,
        "mem_get_info": lambda device=None: _host_memory(),
        "memory_allocated": zero,
        "max_memory_allocated": zero,
        "memory_reserved": zero,
        "max_memory_reserved": zero,
        "memory_cached": zero,
        "max_memory_cached": zero,
        "device_memory_used": zero,
        "memory_stats": lambda device=None: {},
        "memory_snapshot": lambda *_, **__: [],
        "memory_summary": lambda *_, **__: "no memory statistics: the GPU is emulated on the CPU",
        "utilization": zero,
        "temperature": zero,
        "power_draw": zero,
        "clock_rate": lambda device=None: GPUS[capability].clock,
        "default_generators": (generator,),
        "manual_seed": manual_seed,
        "manual_seed_all": manual_seed,
        "seed": seed_all,
        "seed_all": seed_all,
        "initial_seed": lambda: initial[0],
        "get_rng_state": lambda device="cuda": generator.get_state(),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state": set_rng_state,
        "set_rng_state_all": lambda states: generator.set_state(states[0]),
    }


def _accelerator(answers: dict[str, Any]) -> dict[str, Any]:
    """The same machine through `torch.accelerator`."""
    same = {
        name: answers[name]
        for name in (
            "is_available", "device_count", "synchronize", "current_stream", "set_stream", "empty_cache",
            "memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_stats",
            "reset_peak_memory_stats", "reset_accumulated_memory_stats", "get_device_capability",
        )
    }  # fmt: skip
    return same | {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "current_device_index": answers["current_device"],
        "current_device_idx": answers["current_device"],
        "set_device_index": answers["set_device"],
        "set_device_idx": answers["set_device"],
        "get_memory_info": answers["mem_get_info"],
    }


def _eager(model: Any = None, **_: Any) -> Any:
    """torch.compile that compiles nothing: what it would generate is code for a GPU."""
    return (lambda fn: fn) if model is None else model


def install(patch: Patch, capability: tuple[int, int]) -> None:
    """Patch `torch.cuda`, `torch.accelerator`, the declared versions and torch.compile."""
    answers = _answers(capability, torch.initial_seed())
    for name, value in answers.items():
        patch(torch.cuda, name, value)
    for module in (torch.cuda.random, torch.cuda.memory, torch.cuda.streams):
        for name in answers.keys() & vars(module).keys():
            patch(module, name, answers[name])
    if hasattr(torch, "accelerator"):
        for name, value in _accelerator(answers).items():
            patch(torch.accelerator, name, value)
    for name in ("range_push", "range_pop", "mark", "range_start", "range_end"):
        patch(torch.cuda.nvtx, name, lambda *_, **__: 0)
    # Missing from a torch that was built without CUDA, and imported by name where is_available() says yes.
    patch(torch._C, "_cuda_getCurrentRawStream", lambda device=0: 0)
    patch(torch.version, "cuda", "12.8")
    patch(torch.backends.cuda, "is_built", lambda: True)
    # Recurrent layers ask before they use it, and take torch's own path.
    patch(torch.backends.cudnn, "is_acceptable", lambda tensor: False)
    # A choice of kernel that only a GPU has must leave one that can run.
    patch(torch._C, "_set_sdp_use_math", lambda enabled: None)
    kineto = torch.profiler.profiler._KinetoProfile
    patch(kineto, "__init__", _host_only(kineto.__init__))
    for name, dtype in _TENSOR_TYPES.items():
        patch(torch.cuda, name, _tensor_type(name, dtype))
    patch(torch, "set_default_tensor_type", _set_default_tensor_type(torch.set_default_tensor_type))
    patch(torch, "Stream", _for_devices(torch.Stream, Stream))
    patch(torch, "Event", _for_devices(torch.Event, Event))
    patch(torch, "compile", _eager)
