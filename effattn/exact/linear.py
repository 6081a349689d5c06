"""Causal linear attention in float64, all pairs at once: the reference for kernels that sum by prefixes.

    out[i] = sum_{j <= i} (q[i] . k[j]) v[j] / sum_{j <= i} q[i] . k[j]

O(N^2) memory. The gradients are written out, so that no automatic differentiation is shared with what is judged.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Linear(NamedTuple):
    """Output and gradients, (batch, heads, n, ...) in float64."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


@torch.no_grad()
def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor) -> Linear:
    """q, k (batch, heads, n, features), v and d_out (batch, heads, n, v_dim), of any floating dtype."""
    q, k, v, d_out = (x.double() for x in (q, k, v, d_out))
    pairs = (q @ k.mT).tril()
    total = pairs.sum(-1, keepdim=True)
    out = pairs @ v / total
    g = d_out / total
    h = -(g * out).sum(-1, keepdim=True)
    d_pairs = (g @ v.mT + h).tril()
    return Linear(out, d_pairs @ k, d_pairs.mT @ q, pairs.mT @ g)
