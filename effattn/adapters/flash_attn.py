"""FlashAttention 2, 3 and 4: `fa2`, `fa3`, `fa4`. On a GPU. Axes (batch, length, heads, dim), bottom-right masks, natural LSE."""

from __future__ import annotations

from typing import Any

import effattn
from effattn.adapters import need


def _halves(case: Any) -> bool | str:
    return case.dtype != "fp32" or "FlashAttention takes fp16 and bf16"


def _turned(*tensors: Any) -> tuple[Any, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


@effattn.method(numerics="fa2", nan_safe=False, supports=_halves)
def fa2(
    q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float | None = None, alibi_slopes: Any = None,
) -> Any:  # fmt: skip
    """flash_attn.flash_attn_func, deterministic in backward."""
    library = need("flash_attn", "pip install flash-attn")
    out, lse, _ = library.flash_attn_func(
        *_turned(q, k, v), softmax_scale=scale, causal=causal, window_size=window or (-1, -1), softcap=softcap or 0.0,
        alibi_slopes=alibi_slopes, deterministic=True, return_attn_probs=True,
    )  # fmt: skip
    return out.transpose(1, 2), lse


@effattn.method(numerics="fa3", nan_safe=False, supports=_halves)
def fa3(
    q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float | None = None,
) -> Any:  # fmt: skip
    """flash_attn_interface.flash_attn_func, deterministic in backward; its versions return out, or out and LSE."""
    library = need("flash_attn_interface", "build the folder hopper/ of github.com/Dao-AILab/flash-attention")
    found = library.flash_attn_func(
        *_turned(q, k, v), softmax_scale=scale, causal=causal, window_size=window or (-1, -1), softcap=softcap or 0.0,
        deterministic=True,
    )  # fmt: skip
    return (found[0].transpose(1, 2), found[1]) if isinstance(found, tuple) else found.transpose(1, 2)


@effattn.method(numerics="fa4", nan_safe=False, supports=_halves)
def fa4(
    q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None,
    window: tuple[int, int] | None = None, softcap: float | None = None,
) -> Any:  # fmt: skip
    """flash_attn.cute.flash_attn_func; None stands for no limit of a window."""
    library = need("flash_attn.cute", "pip install flash-attn-4")
    sides = tuple(None if side < 0 else side for side in window or (-1, -1))
    found = library.flash_attn_func(
        *_turned(q, k, v),
        softmax_scale=scale,
        causal=causal,
        window_size=sides,
        softcap=softcap or 0.0,
        return_lse=True,
    )
    return found[0].transpose(1, 2), found[1]
