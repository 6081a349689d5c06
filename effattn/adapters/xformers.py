"""xformers' memory-efficient attention. On a GPU. Axes (batch, length, heads, dim); heads that share keys are repeated."""

from __future__ import annotations

from typing import Any

import effattn
from effattn.adapters import need


@effattn.method(same_bits=False, nan_safe=False)
def attention(q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None) -> Any:
    """xformers.ops.memory_efficient_attention with its bottom-right mask."""
    ops = need("xformers.ops", "pip install xformers")
    group = q.shape[1] // k.shape[1]
    mask = ops.fmha.attn_bias.LowerTriangularFromBottomRightMask() if causal else None
    turned = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(group, dim=1) for x in (k, v))))
    return ops.memory_efficient_attention(*turned, attn_bias=mask, scale=scale).transpose(1, 2)
