"""torch's FlexAttention: masks and lengths as its block mask; softcap, ALiBi and bias as its score_mod. Not compiled."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import effattn

if TYPE_CHECKING:
    from effattn.case import Case


def _supports(case: Case) -> bool | str:
    from effattn.methods.torch_sdpa import FLUSHES, flushes_subnormals

    return FLUSHES if flushes_subnormals(case) else True


@effattn.method(same_bits=False, nan_safe=False, supports=_supports)
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Any = None,
    bias: Any = None,
    mask: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
) -> Any:
    """flex_attention; returns out and the natural log-sum-exp."""
    import torch
    from torch.nn.attention import flex_attention as flex

    if 0 in (q.shape[2], k.shape[2]):
        raise effattn.NotSupported("FlexAttention takes no empty sequence")
    if q.device.type == "cpu" and any(x.requires_grad for x in (q, k, v)):
        raise effattn.NotSupported("FlexAttention has no backward on the CPU")
    batch, heads, q_len, kv_len = *q.shape[:3], k.shape[2]
    rows = torch.full((batch,), q_len, device=q.device) if q_lengths is None else q_lengths
    keys = torch.full((batch,), kv_len, device=q.device) if kv_lengths is None else kv_lengths
    shifts = keys - rows if causal_alignment == "bottom-right" else torch.zeros_like(keys)
    left, right = window or (-1, -1)
    right = min(right, 0) if causal and right >= 0 else 0 if causal else right

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = (i < rows[b]) & (j < keys[b])
        if left >= 0:
            seen = seen & (j >= i + shifts[b] - left)
        if right >= 0:
            seen = seen & (j <= i + shifts[b] + right)
        return seen if allowed is None else seen & allowed[b, h, i, j]

    full = (batch, heads, q_len, kv_len)
    allowed = None if mask is None else mask.expand(full)
    added = None if bias is None else bias.expand(full)
    slopes = None if alibi_slopes is None else alibi_slopes.expand(batch, heads)

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if slopes is not None:
            score = score - slopes[b, h] * (i + shifts[b] - j).abs()
        return score if added is None else score + added[b, h, i, j]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unfused implementation.*")
        block_mask = None
        if causal or any(x is not None for x in (window, mask, q_lengths, kv_lengths)):
            apart = (
                batch if mask is not None or kv_lengths is not None else None,
                heads if mask is not None else None,
            )
            block_mask = flex.create_block_mask(mask_mod, *apart, q_len, kv_len, device=q.device)
        wants = getattr(flex, "AuxRequest", None)  # since torch 2.9; before, return_lse
        asked: dict[str, Any] = {"return_lse": True} if wants is None else {"return_aux": wants(lse=True)}
        out, aux = flex.flex_attention(
            q, k, v,
            score_mod=score_mod if any(x is not None for x in (softcap, slopes, added)) else None,
            block_mask=block_mask, scale=scale, enable_gqa=heads != k.shape[1],
            **asked,
        )  # fmt: skip
    return out, getattr(aux, "lse", aux)
