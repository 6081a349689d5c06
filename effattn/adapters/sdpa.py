"""torch.nn.functional.scaled_dot_product_attention by one of its backends, which must take the case."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import effattn
from effattn.errors import NotSupported

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.tolerances.numerics import Numerics


def _fused(case: Case) -> Numerics:
    from effattn.methods.torch_sdpa import TorchSDPA

    return TorchSDPA().numerics(case)


def _call(backend: str, q: Any, k: Any, v: Any, causal: bool, scale: float | None) -> Any:
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    try:
        with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, backend)):
            warnings.simplefilter("ignore")  # torch warns of each reason why a backend does not take the case
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
    except RuntimeError as error:
        if "No available kernel" in str(error) or "No viable backend" in str(error):
            raise NotSupported(f"torch's {backend} does not take this case here") from None
        raise


@effattn.method(causal_alignment="top-left", same_bits=False, nan_safe=False, numerics="torch-math")
def math(q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None) -> Any:
    """SDPBackend.MATH."""
    return _call("MATH", q, k, v, causal, scale)


@effattn.method(
    causal_alignment="top-left",
    same_bits=False,
    nan_safe=False,
    supports=lambda case: (
        case.scale is None or case.scale > 0 or "torch's fused kernel needs a positive scale"
    ),
)
def flash(q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None) -> Any:
    """SDPBackend.FLASH_ATTENTION."""
    return _call("FLASH_ATTENTION", q, k, v, causal, scale)


@effattn.method(causal_alignment="top-left", same_bits=False, nan_safe=False)
def efficient(q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None) -> Any:
    """SDPBackend.EFFICIENT_ATTENTION; on a GPU."""
    return _call("EFFICIENT_ATTENTION", q, k, v, causal, scale)


@effattn.method(causal_alignment="top-left", same_bits=False, nan_safe=False)
def cudnn(q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None) -> Any:
    """SDPBackend.CUDNN_ATTENTION; on a GPU."""
    return _call("CUDNN_ATTENTION", q, k, v, causal, scale)
