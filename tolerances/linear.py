"""What float32 sums may change in causal linear attention: a hard bound for each element of output and gradients.

A sum of products in which every term passes through at most D roundings has an error of at most gamma_D times the
sum of the terms' absolute values, gamma_D = D u / (1 - D u), in whatever order it is added (Higham, Accuracy and
Stability, chapter 3). So each quantity is bounded by D times u times the same formula on absolute values, written
|.| below, as long as D u is small; quotients by the denominator add its relative error, D u c with c = |den| / den,
which is 1 for features that are not negative.

    out   = num / den                 D u (|num| + |out| |den|) / den              <= D u (1 + c') |num| / den, ...
    g     = d_out / den               relative error D u c
    h     = -(g . out)                |g| . (error of out) + D u (1 + c) |g| . |out|
    dq    = sum_j dA k                sum_j (error of dA) |k| + D u sum_j |dA| |k|; dk and dv likewise

D counts the longest way of any term: `features` additions of a product q . k, a chunk, the chunks, v_dim, and a few.
Where weights or states are stored in the dtype of the inputs, each storing multiplies a term by at most 1 + its unit.
The rounding of the result to its own dtype is added at the end.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class LinearBounds(NamedTuple):
    """The largest error of each element, (batch, heads, n, ...) in float64."""

    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


@torch.no_grad()
def linear_bounds(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    *,
    chunk: int = 64,
    accumulator: float = 2.0**-24,
    roundings: int = 0,
) -> LinearBounds:
    """Bounds for inputs as given (their dtype is that of the results); `accumulator` is the sums' unit roundoff.

    `chunk` is the longest sum over keys that is added term by term; n for any order. `roundings` is how often a term may be
    rounded to the inputs' dtype on its way, where weights or states are stored in it.
    """
    unit = torch.finfo(v.dtype).eps / 2
    tiny = torch.finfo(v.dtype).smallest_normal
    q, k, v, d_out = (x.double() for x in (q, k, v, d_out))
    n, features, width = q.shape[2], q.shape[3], v.shape[3]
    # A value is stored once in the output's dtype before the backward uses it: `out`, by unit.
    depth = features + chunk + -(-n // chunk) + width + 8
    r = depth * accumulator / (1 - depth * accumulator)
    # (1 + r) (1 + unit)^roundings - 1
    r = r + (1 + r) * math.expm1(roundings * math.log1p(unit))

    pairs = (q @ k.mT).tril()
    total = pairs.sum(-1, keepdim=True)
    out = pairs @ v / total
    a_pairs = (q.abs() @ k.abs().mT).tril()
    condition = a_pairs.sum(-1, keepdim=True) / total.abs()
    a_out = a_pairs @ v.abs() / total.abs()
    e_out = r * (a_out + condition * out.abs())
    stored_out = e_out + unit * (out.abs() + e_out)

    g = d_out / total
    a_g = g.abs()
    e_g = 2 * r * condition * a_g
    h = -(g * out).sum(-1, keepdim=True)
    a_h = (a_g * out.abs()).sum(-1, keepdim=True)
    e_h = (e_g * out.abs() + a_g * stored_out).sum(-1, keepdim=True) + r * a_h
    d_pairs = (g @ v.mT + h).tril()
    a_d = (a_g @ v.abs().mT + a_h).tril()
    e_d = (e_g @ v.abs().mT + e_h + r * (a_g @ v.abs().mT + a_h)).tril()

    def stored(error: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
        return error + unit * (exact.abs() + error) + tiny

    e_q = e_d @ k.abs() + r * (a_d @ k.abs())
    e_k = e_d.mT @ q.abs() + r * (a_d.mT @ q.abs())
    e_v = a_pairs.mT @ e_g + r * (a_pairs.mT @ a_g)
    return LinearBounds(
        stored(e_out, out),
        stored(e_q, d_pairs @ k),
        stored(e_k, d_pairs.mT @ q),
        stored(e_v, pairs.mT @ g),
    )
