"""torch.nn.functional.scaled_dot_product_attention by one of its backends, which must take the case.

`is_causal` means top-left; the bottom-right mask of a rectangle is handed over as a boolean mask, and so is a causal mask
next to a mask or a bias, since torch takes one or the other.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import effattn
from effattn.errors import NotSupported

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from effattn.case import Case
    from effattn.tolerances.numerics import Numerics


def _supports(case: Case) -> bool | str:
    """What all backends share."""
    from effattn.methods.torch_sdpa import FLUSHES, WIDENED, flushes_subnormals, widens_bias

    if case.bias.endswith(":fp32"):
        return "torch takes a bias in the dtype of q only"
    if flushes_subnormals(case):
        return FLUSHES
    return WIDENED if widens_bias(case) else True


def _supports_flash(case: Case) -> bool | str:
    if case.scale is not None and case.scale <= 0:
        return "torch's fused kernel needs a positive scale"
    return _supports(case)


def _fused(case: Case) -> Numerics:
    from effattn.methods.torch_sdpa import fused_numerics

    return fused_numerics(case)


def _mask(
    q: torch.Tensor, k: torch.Tensor, causal: bool, alignment: str, mask: Any, bias: Any
) -> torch.Tensor | None:
    """What torch has no option for, as its attn_mask: a boolean one, or one that is added."""
    import torch

    q_len, kv_len = q.shape[2], k.shape[2]
    bottom_right = causal and alignment == "bottom-right" and q_len != kv_len
    if mask is None and bias is None and not bottom_right:
        return None
    seen = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen.tril(kv_len - q_len if alignment == "bottom-right" else 0)
    if mask is not None:
        seen = seen & mask
    return seen if bias is None else torch.where(seen, bias, -torch.inf)


def _by(backend: str, note: str, **declared: Any) -> Callable[..., torch.Tensor]:
    """Attention by one backend, which nothing else may take the place of."""

    def attention(
        q: Any, k: Any, v: Any, *, causal: bool = False, causal_alignment: str = "bottom-right",
        scale: float | None = None, mask: Any = None, bias: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        given = _mask(q, k, causal, causal_alignment, mask, bias)
        try:
            with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, backend)):
                # torch warns of each reason why a backend does not take the case.
                warnings.simplefilter("ignore")
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=given, is_causal=causal and given is None, scale=scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )  # fmt: skip
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise NotSupported(f"torch's {backend} does not take this case here") from None
            raise

    attention.__doc__ = f"SDPBackend.{backend}{note}."
    return effattn.method(same_bits=False, nan_safe=False, **declared)(attention)


math = _by("MATH", "", numerics="torch-math", supports=_supports)
flash = _by(
    "FLASH_ATTENTION", "; with a mask or a bias on a CPU only", numerics=_fused, supports=_supports_flash
)
efficient = _by("EFFICIENT_ATTENTION", "; on a GPU", supports=_supports)
cudnn = _by("CUDNN_ATTENTION", "; on a GPU", supports=_supports)
