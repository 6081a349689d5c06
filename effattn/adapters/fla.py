"""flash-linear-attention's softmax attention, in Triton: causal self-attention. Axes (batch, length, heads, dim)."""

from __future__ import annotations

from typing import Any

import effattn
from effattn.adapters import need


@effattn.method(
    nan_safe=False,
    same_bits=False,
    supports=lambda case: (
        (case.causal != "none" and case.q_len == case.kv_len > 0)
        or "flash-linear-attention's parallel_attn is causal self-attention"
    ),
)
def attention(q: Any, k: Any, v: Any, *, causal: bool = True, scale: float | None = None) -> Any:
    """fla.ops.attn.parallel.parallel_attn."""
    library = need("fla.ops.attn.parallel", "pip install fla-core")
    return library.parallel_attn(*(x.transpose(1, 2).contiguous() for x in (q, k, v)), scale=scale).transpose(
        1, 2
    )
