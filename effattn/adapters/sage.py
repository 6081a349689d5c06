"""SageAttention: Q and K in int8. Axes (batch, heads, length, dim); forward only; its errors are those of int8."""

from __future__ import annotations

from typing import Any

import effattn
from effattn.adapters import need


@effattn.method(
    nan_safe=False,
    same_bits=False,
    supports=lambda case: (
        "SageAttention takes fp16 and bf16"
        if case.dtype == "fp32"
        else "SageAttention's causal mask is for q_len = kv_len"
        if case.causal != "none" and case.q_len != case.kv_len
        else not case.backward or "SageAttention has no gradients"
    ),
)
def attention(q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None) -> Any:
    """sageattention.sageattn."""
    library = need("sageattention", "pip install sageattention")
    return library.sageattn(q, k, v, tensor_layout="HND", is_causal=causal, sm_scale=scale)
