"""TransformerEngine's DotProductAttention. On a GPU. Axes (batch, length, heads, dim); heads and dim come back as one axis."""

from __future__ import annotations

from typing import Any

import effattn
from effattn.adapters import need


@effattn.method(
    same_bits=False,
    nan_safe=False,
    supports=lambda case: case.dtype != "fp32" or "TransformerEngine takes fp16 and bf16",
)
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
) -> Any:
    """transformer_engine.pytorch.DotProductAttention, made anew in each call."""
    library = need("transformer_engine.pytorch", "pip install transformer_engine[pytorch]")
    kind = "no_mask" if not causal else "causal" if causal_alignment == "top-left" else "causal_bottom_right"
    layer = library.DotProductAttention(
        q.shape[1], (q.shape[3], v.shape[3]), num_gqa_groups=k.shape[1], attention_dropout=0.0, qkv_format="bshd",
        attn_mask_type=kind, softmax_scale=scale,
    )  # fmt: skip
    out = layer(*(x.transpose(1, 2).contiguous() for x in (q, k, v)))
    return out.unflatten(-1, (q.shape[1], v.shape[3])).transpose(1, 2)
