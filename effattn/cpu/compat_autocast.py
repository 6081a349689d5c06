"""`torch.autocast("cuda")` with CUDA's own lists of operations, on tensors that live in host memory.

autocast casts in the dispatcher, above autograd, with a list for each kind of device. The tensors of the emulated device
are the CPU's to the dispatcher, whose list is another one (no softmax, exp, layer_norm or sum in it). While autocast is on
for "cuda", the kernels below stand in the CPU's place: they cast what is on the device by CUDA's lists and leave plain
tensors alone. A block of autocast for "cpu" gets the CPU's kernels back.

The lists are those of ATen's autocast_mode.h; a test compares their union with the operations for which the installed
torch has a kernel under the key AutocastCUDA.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from effattn.cpu.compat_tensor import CudaTensor, Patch

_CONVOLUTIONS = """_convolution.deprecated _convolution conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d.input conv_transpose3d.input convolution cudnn_convolution cudnn_convolution_transpose"""

#: operation -> what happens to its floating-point arguments (fp64 is never touched)
LISTS: dict[str, str] = {
    "lower": f"""{_CONVOLUTIONS} prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm
        chain_matmul linalg_multi_dot _thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell
        rnn_relu_cell _scaled_dot_product_flash_attention scaled_dot_product_attention""",
    "fp32": """acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar
        pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm group_norm rms_norm frobenius_norm.dim
        nuclear_norm nuclear_norm.dim cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d
        hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss
        soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits dist pdist cdist renorm
        logsumexp upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d _upsample_nearest_exact2d
        upsample_nearest3d _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa
        upsample_trilinear3d upsample_bicubic2d _upsample_bicubic2d_aa norm.Scalar norm.ScalarOpt_dim""",
    # The same, unless the caller says a dtype.
    "fp32 where no dtype is given": """prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm
        linalg_matrix_norm linalg_matrix_norm.str_ord sum sum.dim_IntList""",
    "widest": "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add",
    "refused": "binary_cross_entropy",
}
POLICY = {name: policy for policy, names in LISTS.items() for name in names.split()}

_KEY = torch._C.DispatchKey.AutocastCPU
_BELOW = torch._C.DispatchKeySet(_KEY)


def operations(key: str) -> list[str]:
    """Names, without "aten::", of the operations that autocast treats under a dispatch key."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    found = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    return [name.removeprefix("aten::") for name in found if has(name, key)]


def _castable(x: Any) -> bool:
    return isinstance(x, CudaTensor) and x.is_floating_point() and x.dtype != torch.float64


def _mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(fn, x) for x in value)
    return fn(value)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return _mapped(lambda x: x.to(dtype) if _castable(x) and x.dtype != dtype else x, values)


def _widest(values: Any) -> torch.dtype:
    found = [torch.get_autocast_dtype("cuda")]
    _mapped(lambda x: found.append(x.dtype) if _castable(x) else None, values)
    return torch.float32 if torch.float32 in found else found[0]


def _kernel(op: Any, policy: str) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]

    def given(args: Any, kwargs: Any) -> dict[str, Any]:
        return dict(zip(names, args, strict=False)) | kwargs

    def run(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        if policy == "lower":
            dtype = torch.get_autocast_dtype("cuda")
        elif policy == "fp32":
            dtype = torch.float32
        elif policy == "widest":
            dtype = _widest(values)
        elif policy == "refused" and any(map(_castable, values)):
            raise RuntimeError(
                "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast. "
                "Use binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss."
            )
        elif policy == "fp32 where no dtype is given" and given(args, kwargs).get("dtype") is None:
            dtype = torch.float32
        else:
            dtype = None
        with torch._C._ExcludeDispatchKeyGuard(_BELOW):
            if dtype is not None:
                args = _cast(args, dtype)
                kwargs = {name: _cast(value, dtype) for name, value in kwargs.items()}
            return op(*args, **kwargs)

    return run


class _Lists:
    """CUDA's kernels in the CPU's place, or not. One set a process, as torch's."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.library: torch.library.Library | None = None

    def use(self, cuda: bool) -> None:
        with self.lock:
            if cuda and self.library is None:
                self.library = self._registered()
            elif not cuda and self.library is not None:
                self.library._destroy()
                self.library = None

    @staticmethod
    def _registered() -> torch.library.Library:
        library = torch.library.Library("aten", "IMPL", "AutocastCPU")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"(?s).*Overriding a previously registered kernel")
            for name in sorted({*operations("AutocastCUDA"), *operations("AutocastCPU")}):
                packet, _, overload = name.partition(".")
                op = getattr(getattr(torch.ops.aten, packet), overload or "default")
                # What only the CPU's lists name falls through: what it is made of is still cast.
                kernel = _kernel(op, POLICY[name]) if name in POLICY else torch.library.fallthrough_kernel
                library.impl(op, kernel, "AutocastCPU")
        return library


def install(patch: Patch) -> Callable[[], None]:
    """Patch autocast's entry and exit, on the class, so that subclasses and names bound before follow. Returns the undoing."""
    from torch.amp.autocast_mode import autocast

    lists = _Lists()
    enter, leave = autocast.__enter__, autocast.__exit__

    def __enter__(self: Any) -> Any:
        entered = enter(self)
        if self.device == "cuda":
            lists.use(True)
            self._effattn_host = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            torch.set_autocast_enabled("cpu", self._enabled)
            torch.set_autocast_dtype("cpu", self.fast_dtype)
        elif self.device == "cpu":
            lists.use(False)
        return entered

    def __exit__(self: Any, *error: Any) -> Any:
        if self.device == "cuda":
            enabled, dtype = self._effattn_host
            torch.set_autocast_enabled("cpu", enabled)
            torch.set_autocast_dtype("cpu", dtype)
        left = leave(self, *error)
        # A block for "cpu" inside one for "cuda" has ended, or the other way round.
        lists.use(torch.is_autocast_enabled("cuda"))
        return left

    patch(autocast, "__enter__", __enter__)
    patch(autocast, "__exit__", __exit__)
    return lambda: lists.use(False)
