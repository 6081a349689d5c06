"""torch's FlexAttention: mask, softcap and ALiBi as its score_mod and block mask. Not compiled."""

from __future__ import annotations

import warnings
from typing import Any

import effattn


@effattn.method(same_bits=False, nan_safe=False)
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
) -> Any:
    """flex_attention; returns out and the natural log-sum-exp."""
    import torch
    from torch.nn.attention import flex_attention as flex

    if 0 in (q.shape[2], k.shape[2]):
        raise effattn.NotSupported("FlexAttention takes no empty sequence")
    shift = k.shape[2] - q.shape[2] if causal_alignment == "bottom-right" else 0
    left, right = window or (-1, -1)

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        seen = j >= 0
        if causal:
            seen = seen & (j <= i + shift)
        if left >= 0:
            seen = seen & (j >= i + shift - left)
        if right >= 0:
            seen = seen & (j <= i + shift + right)
        return seen

    slopes = None if alibi_slopes is None else alibi_slopes.expand(q.shape[0], q.shape[1])

    def score_mod(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return score if slopes is None else score - slopes[b, h] * (i + shift - j).abs()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*unfused implementation.*")
        block_mask = None
        if causal or window is not None:
            block_mask = flex.create_block_mask(mask_mod, None, None, q.shape[2], k.shape[2], device=q.device)
        wants = getattr(flex, "AuxRequest", None)  # since torch 2.9; before, return_lse
        asked: dict[str, Any] = {"return_lse": True} if wants is None else {"return_aux": wants(lse=True)}
        out, aux = flex.flex_attention(
            q, k, v,
            score_mod=score_mod if softcap is not None or slopes is not None else None,
            block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1],
            **asked,
        )  # fmt: skip
    return out, getattr(aux, "lse", aux)
