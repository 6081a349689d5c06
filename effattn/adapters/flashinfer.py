"""FlashInfer's prefill of one request at a time. On a GPU. Axes (length, heads, dim), bottom-right masks, LSE to base 2."""

from __future__ import annotations

import math
from typing import Any

import effattn
from effattn.adapters import need


@effattn.method(
    nan_safe=False,
    same_bits=False,
    supports=lambda case: case.dtype != "fp32" or "FlashInfer takes fp16 and bf16",
)
def attention(
    q: Any, k: Any, v: Any, *, causal: bool = False, scale: float | None = None, softcap: float | None = None
) -> Any:
    """flashinfer.single_prefill_with_kv_cache for each entry of the batch."""
    import torch

    library = need("flashinfer", "pip install flashinfer-python")
    found = [
        library.single_prefill_with_kv_cache(
            *(x.transpose(0, 1).contiguous() for x in entry),
            causal=causal, sm_scale=scale, logits_soft_cap=softcap, return_lse=True,
        )
        for entry in zip(q, k, v, strict=True)
    ]  # fmt: skip
    out, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
    return out.transpose(1, 2), lse.transpose(1, 2) * math.log(2.0)
