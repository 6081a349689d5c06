"""jax.nn.dot_product_attention, by XLA. Axes (batch, length, heads, dim); forward only, since torch cannot differentiate it."""

from __future__ import annotations

from typing import Any

import effattn
from effattn.adapters import need


@effattn.method(
    causal_alignment="top-left",
    same_bits=False,
    nan_safe=False,
    supports=lambda case: (
        "jax's function is called forward only"
        if case.backward
        else case.head_dim == case.v_dim or "jax's function takes V of the head_dim of K"
    ),
)
def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Any = None,
    mask: Any = None,
) -> Any:
    """The function with its mask and bias."""
    import torch

    jax = need("jax", "pip install jax")
    numpy = need("jax.numpy", "pip install jax")
    kinds = {torch.bfloat16: numpy.bfloat16, torch.float16: numpy.float16, torch.float32: numpy.float32}

    def given(x: Any) -> Any:
        if x is None or x.dtype == torch.bool:
            return None if x is None else numpy.asarray(x.numpy())
        return numpy.asarray(x.detach().float().contiguous().numpy()).astype(kinds[x.dtype])

    if 0 in (q.shape[2], k.shape[2]):
        raise effattn.NotSupported("jax's function takes no empty sequence")
    turned = (given(x.transpose(1, 2)) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        *turned, bias=given(bias), mask=given(mask), scale=scale, is_causal=causal
    )
    import numpy as np

    return torch.from_numpy(np.array(out.astype(numpy.float32))).to(q.dtype).transpose(1, 2)
