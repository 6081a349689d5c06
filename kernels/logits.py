"""From q . k to a logit: scale, softcap, bias, ALiBi, in this order; shared by the forward and the backward kernels.

    logit = cap(scale * q . k) + bias - slope * |i + shift - j|          cap(x) = softcap * tanh(x / softcap)

Everything is in units of log2, since the kernels exponentiate by exp2: the constants that arrive here contain log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from effattn.kernels.mask import tile_of

#: log2(e) and log(2), rounded once from the exact value
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh in fp32, relative error below 4 ulp: what a cap does to small scores is not lost in 1 - 2 / (e^2x + 1).

    Below 0.625 the odd polynomial of Cephes' tanhf (S. Moshier); above, the exponential of a number below 0 cannot
    overflow.
    """
    square = x * x
    series = -5.70498872745e-3 * square + 2.06390887954e-2
    series = series * square - 5.37397155531e-2
    series = series * square + 1.33314422036e-1
    series = series * square - 3.33332819422e-1
    small = x + x * (square * series)
    falling = tl.exp2(tl.abs(x) * (-2.0 * LOG2_E))
    large = (1.0 - falling) / (1.0 + falling)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def logits(
    products, first_row, first_key, r, c, shift, score, bias_at, in_bias,
    HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(logits in units of log2, tanh of what is capped), of the products of queries first_row + r and keys first_key + c.

    score: (scale * log2(e), scale / softcap, softcap * log2(e), the head's slope * log2(e)). bias_at: (the bias at
    query 0 and key 0, or None; its strides). in_bias masks what the bias does not have.
    """
    scale_log2, to_cap, cap_log2, slope_log2 = score
    if HAS_CAP:
        bent = tanh(products * to_cap)
        out = bent * cap_log2
    else:
        bent = products
        out = products * scale_log2
    if bias_at[0] is not None:
        pointers = tile_of(bias_at, first_row, first_key, r, c, WIDE)
        added = tl.load(pointers, mask=in_bias, other=0.0)
        out += added.to(tl.float32) * LOG2_E
    if HAS_ALIBI:
        out -= slope_log2 * tl.abs(first_row + shift - first_key + (r - c)).to(tl.float32)
    return out, bent
