"""What a correct kernel of declared numerics may do to each gradient: a hard bound, and the noise to expect.

Notation as in `effattn.exact.backward`: w weights, r dropout's factors, g = dO, dP = r g.v, D = dP - delta, dS = w D,
dT = slope dS. What is computed, to the letter (u of the accumulators):

1. P^ = w (1 + t)(1 + h), |t| <= T = e^b - 1, |h| <= H = e^l - 1: b the error of the score and of exp, l that of the stored
   log-sum-exp, which all keys of a row have in common.
2. dP^ = dP + e, |e| <= E: a product of v_dim terms, and its rounding to the format of dP.
3. delta^ = delta + f, |f| <= F: from the output within its own bound, or from sum P dP; common to a row too.
4. dS^ = P^ (dP^ - delta^)(1 + k), |k| <= K: three roundings, and that to the format of dS.

Hence, for each pair, exactly, with M = T + K + T K,

    dS^ - dS = h dS - (1 + h) f w + r,    |r| <= (1 + H) w [ |D| M + (1 + M) E + M F ] =: R,
    |dS^ - dS| <= H |dS| + (1 + H) F w + R =: Z,

and |r P^ cast - r w| <= r w (N + u_p + N u_p) =: Y in dV, N = e^(b + l) - 1. In dQ the sum over the keys is taken before
absolute values of what is common to a row: H |dQ| + (1 + H) F |scale sum w k| + |scale| sum R |k|. With the derivative of the
softcap, known to within an absolute C, Z becomes Z (slope + C) + |dS| C. Underflow adds half of the smallest number of the
format cast to. A gradient is a sum of such terms times Q, K or dO, so its error is at most the sum of Z |.|, the error of the
sum itself (n u of half the terms' sizes and half their sum, any order), and the rounding to the dtype of the input.

The noise replaces each rounding by its variance, as in `envelope`. Roundings of P and dS are those of known numbers, so
their variance is that of their spacing, ulp^2 / 12. Errors of the log-sum-exp and of delta are common to a row: they add
up over the keys, in dQ, and are independent from row to row, in dK and dV; there they are in all keys at once, so
`common` says which part of the variance they are.

The file is a little long: bound and noise of a gradient are made from the same sums, and read side by side.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn.exact.backward import HeadSums, score_gradient
from effattn.exact.scores import Block, Options, score_blocks
from effattn.tolerances import dots
from effattn.tolerances.envelope import LARGEST_WEIGHT_ERROR, running_sum
from effattn.tolerances.pairs import pair_errors, sink_errors
from effattn.tolerances.sums import ROUNDING_VARIANCE, ScoreErrors, gamma
from effattn.tolerances.typical import rounded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from effattn.exact import Exact, Gradients
    from effattn.tolerances.envelope import Envelope
    from effattn.tolerances.formats import Format
    from effattn.tolerances.numerics import Numerics

    Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class GradientEnvelope:
    """Per element of one gradient, in numpy, all of its shape."""

    #: largest |got - exact| of a correct kernel, the rounding of the gradient included
    bound: Floats
    #: the same before it is rounded
    reach: Floats
    #: standard deviation of got - exact that is granted, the rounding included
    sigma: Floats
    #: the one to expect of most kernels, see `tolerances.typical`
    typical: Floats
    #: the part of the variance that is common to all keys of a head (dK, dV), or 0
    common: Floats
    #: the part of the variance that errors of delta are: as likely up as down, but in `common` those of all keys at once
    delta: Floats
    #: the variance that comes from the accumulators' format alone, and from rounding P and dS
    inner: Floats
    cast: Floats
    #: bool: False where a row that is not judged takes part
    judged: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Unit roundoffs and what follows from them, of one problem."""

    numerics: Numerics
    u: float
    one: float
    u_p: float
    u_ds: float
    u_dp: float
    u_operand: float
    #: largest error of a product of v_dim terms: of its sum, relative to the terms of one sign, and of the terms, relative to
    #: the sum of their sizes; of its variance, T and S^2
    dot: float
    dot_each: float
    dot_terms: float
    dot_sum: float
    dropout: bool

    @classmethod
    def of(cls, numerics: Numerics, v_dim: int, *, dropout: bool) -> _Sizes:
        acc = numerics.format("acc")
        u, operand = acc.unit_roundoff, numerics.operand_format
        one = ROUNDING_VARIANCE * u * u
        u_operand = 0.0 if operand is None else 2.0 * operand.unit_roundoff
        inexact = 0.0 if numerics.exact_products else 1.0
        dp = numerics.format("dp")
        worst = max(gamma(v_dim, u), dots.dot_bound(numerics.dot_block, float(v_dim)))
        aligned = dots.dot_sigma(numerics.dot_block, float(v_dim)) ** 2  # one-sided, see `dots`
        return cls(
            numerics=numerics,
            u=u,
            one=one,
            u_p=numerics.format("p").unit_roundoff if numerics.rounds_p else 0.0,
            u_ds=numerics.format("ds").unit_roundoff if numerics.rounds_ds else 0.0,
            u_dp=dp.unit_roundoff if dp.precision < acc.precision else 0.0,
            u_operand=u_operand,
            dot=worst * (1.0 + 2.0 * worst),
            dot_each=2.0 * u * inexact + 2.0 * u_operand + u_operand**2,
            dot_terms=one * ((v_dim + 1) / 6.0 + inexact) + 2.0 * ROUNDING_VARIANCE * u_operand**2 + aligned,
            dot_sum=one * (v_dim + 1) / 3.0 + aligned,
            dropout=dropout,
        )


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Of each pair of a block, (P, m, n), or of each row, (P, m, 1)."""

    w: torch.Tensor
    d_s: torch.Tensor
    d_t: torch.Tensor
    #: bounds: of P^ cast - r w, of dS, of dT as it is multiplied, and that without what is common to a row
    y: torch.Tensor
    z_bias: torch.Tensor
    z: torch.Tensor
    z_own: torch.Tensor
    #: variances by pair: of P^ cast, of dS, of dT as multiplied; of the accumulators' format alone: of P^, of dT
    y_var: torch.Tensor
    s_var: torch.Tensor
    z_var: torch.Tensor
    y_inner: torch.Tensor
    z_inner: torch.Tensor
    #: by row: variance and bound of the errors of the log-sum-exp and of delta
    l_var: torch.Tensor
    f_var: torch.Tensor
    l_most: torch.Tensor
    f_most: torch.Tensor
    #: by row: how much less than `l_var` and `f_var` is to be expected of most kernels
    l_less: torch.Tensor
    f_less: torch.Tensor
    #: w slope: what an error of delta is multiplied by
    carried: torch.Tensor


@torch.no_grad()
def gradient_envelopes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    *,
    numerics: Numerics,
    exact: Exact,
    gradients: Gradients,
    forward: Envelope,
    options: Options,
    d_lse: torch.Tensor | None = None,
    bias_format: Format | None = None,
) -> dict[str, GradientEnvelope]:
    """Bound and noise of each gradient by its name: "q", "k", "v", and "bias" and "sinks" where there are such.

    Shapes as in `exact.gradients`; `forward` is the envelope of the forward pass, `bias_format` the format of the
    gradient of the bias. O(N d) memory.
    """
    scale = options.scale_for(q.shape[3])
    size = _Sizes.of(numerics, v.shape[3], dropout=options.keep is not None)
    errors = ScoreErrors.of(numerics, q, k)
    sums = HeadSums(q, options)
    heads_shape = (q.shape[0] * q.shape[1], k.shape[2])
    for name, dim in (("k", k.shape[3]), ("v", v.shape[3])):
        for what in ("abs", "reach", "var", "common", "delta", "inner", "less", "terms", "sum"):
            sums.per_key[f"{name} {what}"] = q.new_zeros((*heads_shape, dim), dtype=torch.float64)
    sums.per_key["rows"] = q.new_zeros((*heads_shape, 1), dtype=torch.float64)
    per_query = {
        name: q.new_zeros(q.shape, dtype=torch.float64) for name in ("reach", "var", "delta", "inner", "less")
    }
    per_sink = {
        name: q.new_zeros((q.shape[0] * q.shape[1],), dtype=torch.float64)
        for name in ("reach", "var", "less")
    }
    rows_judged = torch.from_numpy(forward.judged).to(q.device)
    for block in score_blocks(q, k, v, options):
        lse, g = block.read(exact.lse), block.read(d_out).double()
        change = None if d_lse is None else block.read(d_lse).double()
        x = _pairs(block, lse, g, change, size, errors, options, exact, forward)
        g_abs, g2, keys, keys2, rows, rows2 = (
            g.abs(), g.square(), block.k.abs(), block.k.square(), block.q.abs(), block.q.square()
        )  # fmt: skip
        n = block.visible.sum(-1, keepdim=True).double()
        d_t = x.d_t * scale
        d_abs, d2 = d_t.abs(), d_t.square()
        # dQ: the sum over n keys, and the scale.
        exact_dq = torch.bmm(d_t, block.k)
        of_row = torch.expm1(x.l_most)
        mean_key = scale * torch.bmm(x.carried, block.k)
        reach = (
            torch.bmm(x.z_own, keys) + of_row * exact_dq.abs() + (1.0 + of_row) * x.f_most * mean_key.abs()
        )
        sizes = torch.bmm(d_abs + x.z, keys)
        reach = reach + sizes * (4.0 * size.u + 2.0 * size.u_operand)
        reach = reach + 0.5 * (sizes + exact_dq.abs() + reach) * _sum_error(n, size)
        terms = torch.bmm(d2, keys2)
        per_term, per_sum = (
            torch.from_numpy(c) for c in running_sum(n.cpu().numpy().clip(1.0), numerics.product_block)
        )
        accumulated = size.one * (per_term * terms + (per_sum + 2.0) * exact_dq.square())
        accumulated += 2.0 * ROUNDING_VARIANCE * size.u_operand**2 * terms
        accumulated += _one_sided(n, torch.bmm(d_abs, keys), exact_dq, numerics)
        more, more_noise = _stored(
            numerics.stored_queries,
            n,
            1,
            k.shape[2],
            options.mask is None,
            sizes,
            exact_dq,
            terms,
            numerics.format("input"),
        )
        reach, accumulated = reach + more, accumulated + more_noise
        of_delta = x.f_var * mean_key.square()
        in_row = x.l_var * exact_dq.square() + of_delta
        block.write(per_query["reach"], reach)
        block.write(per_query["var"], torch.bmm(x.z_var, keys2) + accumulated + in_row)
        block.write(per_query["delta"], of_delta)
        block.write(per_query["less"], x.l_less * exact_dq.square() + x.f_less * mean_key.square())
        block.write(per_query["inner"], torch.bmm(x.z_inner, keys2) + accumulated + in_row)
        # dK and dV: sums over the queries that see a key.
        sums.add("rows", block, block.visible.sum(1).double().unsqueeze(-1))
        of_delta = x.f_var * (scale * x.carried).square()
        common = x.l_var * d2 + of_delta
        less = x.l_less * d2 + x.f_less * (scale * x.carried).square()
        weights = block.weighted(x.w)
        weights2 = weights.square()
        for name, what, value in (
            ("k", "abs", torch.bmm((d_abs + x.z).mT, rows)),
            ("k", "reach", torch.bmm(x.z.mT, rows)),
            ("k", "var", torch.bmm((x.z_var + common).mT, rows2)),
            ("k", "common", torch.bmm(common.mT, rows2)),
            ("k", "delta", torch.bmm(of_delta.mT, rows2)),
            ("k", "inner", torch.bmm((x.z_inner + common).mT, rows2)),
            ("k", "less", torch.bmm(less.mT, rows2)),
            ("k", "terms", torch.bmm(d2.mT, rows2)),
            ("k", "sum", torch.bmm(d_t.mT, block.q)),
            ("v", "abs", torch.bmm((weights + x.y).mT, g_abs)),
            ("v", "reach", torch.bmm(x.y.mT, g_abs)),
            ("v", "var", torch.bmm((x.y_var + weights2 * x.l_var).mT, g2)),
            ("v", "common", torch.bmm((weights2 * x.l_var).mT, g2)),
            ("v", "inner", torch.bmm((x.y_inner + weights2 * x.l_var).mT, g2)),
            ("v", "less", torch.bmm((weights2 * x.l_less).mT, g2)),
            ("v", "terms", torch.bmm(weights2.mT, g2)),
            ("v", "sum", torch.bmm(weights.mT, g)),
        ):
            sums.add(f"{name} {what}", block, value)
        if options.bias is not None:
            seen = block.visible.double()
            d_s2, w2 = x.d_s.square(), x.w.square()
            shared, less = x.s_var + x.l_var * d_s2 + x.f_var * w2, x.l_less * d_s2 + x.f_less * w2
            for what, value in (
                ("reach", x.z_bias), ("abs", x.d_s.abs() + x.z_bias), ("var", shared), ("less", less),
                ("terms", d_s2), ("n", seen),
            ):  # fmt: skip
                sums.add_bias(what, block, value)
        if block.sink is not None:
            p, (b, sink_var) = block.sink_weight(lse), sink_errors(block, lse, numerics, errors)
            away = -(g * block.read(exact.out)).sum(-1, keepdim=True)
            away = away if change is None else away + change
            t = torch.expm1(b + x.l_most + 2.0 * numerics.exp_ulps * size.u)
            most = p * (away.abs() * (t + 4.0 * size.u) + (1.0 + t) * x.f_most)
            most += p * away.abs() * (q.shape[0] * q.shape[2] * size.u)
            per_sink["reach"][block.pairs] += most.sum((1, 2))
            moved = p.square() * (away.square() * (sink_var + x.l_var + 2.0 * size.one) + x.f_var)
            per_sink["var"][block.pairs] += moved.sum((1, 2))
            fewer = p.square() * (away.square() * x.l_less + x.f_less)
            per_sink["less"][block.pairs] += fewer.sum((1, 2))
    out: dict[str, GradientEnvelope] = {}
    input_ = numerics.format("input")
    x = per_query
    out["q"] = _rounded(
        gradients.q,
        input_,
        x["reach"],
        x["var"],
        x["inner"],
        rows_judged[..., None],
        less=x["less"],
        delta=x["delta"],
        cast=x["var"] - x["inner"],
    )
    group = q.shape[1] // k.shape[1]
    heads_judged = rows_judged.all(-1).unflatten(1, (k.shape[1], group)).all(-1)[..., None, None]
    for name, of in (("k", gradients.k), ("v", gradients.v)):
        out[name] = _of_keys(
            name, of, sums, size, group, heads_judged, q_len=q.shape[2], contiguous=options.mask is None
        )
    everything = rows_judged.all()
    if gradients.bias is not None and bias_format is not None and sums.bias:
        x, b = sums.bias, gradients.bias
        reach = x["reach"] + x["abs"] * ((x["n"] + 2.0) * size.u)
        terms, total = (
            torch.from_numpy(np.asarray(c)) for c in running_sum(x["n"].cpu().numpy().clip(1.0), None)
        )
        noise = x["var"] + size.one * (terms * x["terms"] + total * b.square())
        out["bias"] = _rounded(b, bias_format, reach, noise, noise, everything, less=x["less"])
    if gradients.sinks is not None:
        heads = {name: x.unflatten(0, q.shape[:2]).sum(0) for name, x in per_sink.items()}
        n = float(q.shape[0] * q.shape[2])
        # Any order is granted; most are trees.
        square = size.one * gradients.sinks.square()
        noise, less = heads["var"] + ((n + 1.0) / 3.0) * square, heads["less"]
        less = less + max(0.0, (n + 1.0) / 3.0 - math.log2(max(n, 1.0)) - 1.0) * square
        out["sinks"] = _rounded(
            gradients.sinks, numerics.format("lse"), heads["reach"], noise, noise, everything, less=less
        )
    return out


def _pairs(
    block: Block,
    lse: torch.Tensor,
    g: torch.Tensor,
    d_lse: torch.Tensor | None,
    size: _Sizes,
    errors: ScoreErrors,
    options: Options,
    exact: Exact,
    forward: Envelope,
) -> _Pairs:
    """Every rounding between the scores and the last three products."""
    numerics, u, one = size.numerics, size.u, size.one
    scale = options.scale_for(block.q.shape[-1])
    found = pair_errors(block, lse, numerics=numerics, errors=errors, options=options)
    w, _ = block.normalised(lse)
    d_s, difference = score_gradient(block, w, g, d_lse)
    factor = 1.0 if block.factor is None else block.factor
    o, finite_lse = block.read(exact.out), torch.where(lse == -math.inf, 0.0, lse)

    def of(x: Floats) -> torch.Tensor:
        return block.read(torch.from_numpy(x).to(g.device))

    # The log-sum-exp as it was stored, times log2(e).
    l_most = of(forward.lse_bound) + 3.0 * u * finite_lse.abs()
    l_var = of(forward.lse_noise) + one * finite_lse.square()
    exp = 2.0 * numerics.exp_ulps * u
    n = block.visible.sum(-1, keepdim=True).double()
    rescales = torch.ceil(n / numerics.smallest_block) + 2.0

    def grown(b: torch.Tensor) -> torch.Tensor:
        return torch.expm1(b.clamp(max=LARGEST_WEIGHT_ERROR))

    t, with_lse = grown(found.bound + exp), grown(found.bound + exp + l_most)
    # Of the forward pass: no log-sum-exp, but rescaling, as in `envelope`.
    before = grown(found.bound + exp * rescales + 6.0 * u * found.most)

    # dP, and delta from the output or from dP.
    g_abs, v_abs, g2 = g.abs(), block.v.abs(), g.square()
    product = torch.bmm(g, block.v.mT)
    d_p = factor * product
    sizes = torch.bmm(g_abs, v_abs.mT)
    e = 0.5 * size.dot * (sizes + product.abs()) + size.dot_each * sizes
    e = factor * (e + (3.0 * u if size.dropout else 0.0) * product.abs()) + size.u_dp * d_p.abs()
    e_var = torch.bmm(g2, block.v.square().mT).mul_(size.dot_terms).add_(product.square(), alpha=size.dot_sum)
    e_var = factor * factor * e_var + (one + ROUNDING_VARIANCE * size.u_dp**2) * d_p.square()
    delta = (g * o).sum(-1, keepdim=True)
    dim = g.shape[-1]
    output = numerics.format("output")
    rounds_out = numerics.delta_of != "unrounded"
    away = (d_p - delta).masked_fill(~block.visible, 0.0)
    # What `envelope` says of the output, multiplied by g before absolute values are taken. Errors of l are common to a row.
    adds = (n + rescales + 3.0) * u
    g_o = (g_abs * o.abs()).sum(-1, keepdim=True)
    every = before.amax(-1, keepdim=True) if t.shape[-1] else torch.zeros_like(lse)
    every = (every + adds).clamp(max=LARGEST_WEIGHT_ERROR)
    growth = (1.0 + every) * (1.0 + size.u_p) / (1.0 - every - every * every).clamp(min=0.1)
    f = (w * (before * away.abs() + (1.0 + before) * size.u_p * d_p.abs())).sum(-1, keepdim=True)
    f += (w * factor * sizes).sum(-1, keepdim=True) * (6.0 * u + size.u_operand)
    f += (g_abs * of(forward.out_steady)).sum(-1, keepdim=True) - adds * (g_o - delta.abs())
    if numerics.sum_of == "rounded":
        f += size.u_p * delta.abs()
    f *= growth
    if rounds_out:
        f += 0.5 * (g_abs * output.ulp(o.abs() + of(forward.out_reach).clamp(max=1e300))).sum(
            -1, keepdim=True
        )
    f += 0.5 * gamma(dim, u) * (g_o + delta.abs()) + 2.0 * u * g_o + gamma(dim + 1, u) * f
    if numerics.delta_of == "any":
        of_row = grown(l_most)
        summed = (w * d_p.abs()).sum(-1, keepdim=True) + delta.abs()
        own = (w * (t * d_p.abs() + (1.0 + t) * e)).sum(-1, keepdim=True) + 0.5 * adds * summed * growth
        f = torch.maximum(f, of_row * delta.abs() + (1.0 + of_row) * own)
    f += 2.0 * u * (delta.abs() + (0.0 if d_lse is None else d_lse.abs()))
    f_var = (g2 * of(forward.out_inner)).sum(-1, keepdim=True)
    if rounds_out:
        f_var += (g2 * output.ulp(o).square()).sum(-1, keepdim=True) / 12.0
    cast = ROUNDING_VARIANCE * size.u_p**2
    w2 = w.square()
    f_var += (w2 * (away.square() * found.variance + cast * d_p.square())).sum(-1, keepdim=True)
    of_product = one * (
        (dim + 1) / 6.0 * (g2 * o.square()).sum(-1, keepdim=True) + ((dim + 1) / 3.0 + 1.0) * delta.square()
    )
    f_var += of_product
    # What is to be expected: the errors of the output as they are, and of the log-sum-exp.
    f_less = f_var - of_product - (g2 * of(forward.out_typical).square()).sum(-1, keepdim=True)
    l_less = of(forward.lse_noise) - of(forward.lse_typical).square()

    # dS, then its cast; either may be scaled before the other.
    floor = numerics.format("acc").smallest_normal
    e = e + 2.0 * u * (d_p.abs() + delta.abs())
    m = t + 3.0 * u + t * (3.0 * u)
    of_row = grown(l_most)
    z_own = (1.0 + of_row) * w * (difference.abs() * m + (1.0 + m) * e + m * f) + floor * block.visible
    z_bias = z_own + of_row * d_s.abs() + (1.0 + of_row) * w * f
    s_var = w2 * (difference.square() * (found.variance + 3.0 * one) + e_var)
    # Weights of subnormal size, where there are some.
    tiny = bool(((w < 1e-30) & block.visible).any())
    if tiny:
        s_var += difference.square() * _lost(w, numerics) + _lost(d_s, numerics)
    d_t, z, t_var, carried = d_s, z_bias, s_var, w
    if block.slope is not None:
        # 1 - tanh^2, of a tanh that is off by tanh_error u and whose argument is rounded.
        tanh2 = 1.0 - block.slope
        of_tanh = tanh2 if numerics.tanh_of == "tanh" else torch.ones_like(tanh2)
        off = (2.0 * numerics.tanh_error * of_tanh + 4.0) * u
        z = z * (block.slope + off) + d_s.abs() * off
        z_own = z_own * block.slope + (z_bias + d_s.abs()) * off
        t_var = s_var * block.slope.square()
        t_var = t_var + d_s.square() * one * (4.0 * tanh2 * of_tanh * numerics.tanh_error + 2.0)
        d_t, carried = d_s * block.slope, w * block.slope
    z, z_own, z_inner = z * abs(scale), z_own * abs(scale), t_var * scale**2
    cast = size.u_ds * ((d_t * scale).abs() + z)
    z, z_own = z + cast, z_own + cast
    z_var = z_inner
    if size.u_ds:
        fmt = numerics.format("ds")
        lost = 0.5 * fmt.smallest_subnormal * max(1.0, abs(scale)) * block.visible
        z, z_own = z + lost, z_own + lost
        z_var = z_inner + _cast_variance(d_t, fmt) * scale**2

    # P as dV takes it.
    weights = block.weighted(w)
    more = 3.0 * u if size.dropout else 0.0
    y = (
        weights * (with_lse + size.u_p + with_lse * size.u_p + more * (1.0 + with_lse))
        + floor * block.visible
    )
    y_inner = weights.square() * (found.variance + (one if size.dropout else 0.0))
    if tiny:
        y_inner += _lost(weights, numerics)
    y_var = y_inner
    if size.u_p:
        fmt = numerics.format("p")
        y = y + 0.5 * fmt.smallest_subnormal * block.visible
        y_var = y_inner + _cast_variance(weights, fmt)
    return _Pairs(
        w=w, d_s=d_s, d_t=d_t, y=y, z_bias=z_bias, z=z, z_own=z_own, y_var=y_var, s_var=s_var, z_var=z_var, y_inner=y_inner,
        z_inner=z_inner, l_var=l_var, f_var=f_var, l_most=l_most, f_most=f, carried=carried,
        l_less=l_less.clamp(min=0.0), f_less=f_less.clamp(min=0.0),
    )  # fmt: skip


def _lost(x: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """The variance of numbers of subnormal size in the accumulators: all of it may be flushed, or rounded away."""
    acc = numerics.format("acc")
    lost = x.square() if numerics.flush else torch.full_like(x, acc.smallest_subnormal**2 / 12.0)
    return torch.where(x.abs() < acc.smallest_normal, lost, 0.0)


def _cast_variance(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Of rounding these numbers: ulp^2 / 12, and no more than what is lost when all of x is."""
    return torch.minimum(fmt.ulp(x).square_().div_(12.0), x.square())


def _stored(
    block: int | None,
    n: torch.Tensor,
    heads: int,
    length: int,
    contiguous: bool,
    sizes: torch.Tensor,
    total: torch.Tensor,
    terms: torch.Tensor,
    fmt: Format,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound and variance of rounding partial sums of n terms to a format after each `block` positions.

    The terms are those of `heads` heads of `length` positions; `contiguous` where what is seen of a head is one range.
    Blocks begin at multiples of their size, so two terms may lie in two of them. `sizes` is the sum of the terms' sizes,
    `terms` that of their squares. Partial sums as in `envelope.running_sum`.
    """
    if block is None:
        return torch.zeros_like(total), torch.zeros_like(total)
    touched = n.clamp(max=float(heads * -(-length // block)))
    if contiguous:
        # A range of m positions meets at most floor((m - 2) / block) + 2 blocks.
        touched = torch.minimum(touched, torch.floor((n - heads).clamp(min=0.0) / block) + 2.0 * heads)
    # The last one is the rounding of the result.
    stores = touched - 1.0
    u = fmt.unit_roundoff
    most = stores.clamp(min=0.0) * (0.5 * u * (sizes + total.abs()) + 0.5 * fmt.smallest_subnormal)
    share = (block / n.clamp(min=1.0)).clamp(max=1.0)
    one_block = share * (1.0 - share) * terms + share.square() * total.square()
    blocks = stores + 1.0
    squares = (blocks + 1.0) / 6.0 * blocks * one_block + (blocks + 1.0) / 3.0 * total.square()
    return most, torch.where(stores > 0.0, ROUNDING_VARIANCE * u * u * squares, 0.0)


def _sum_error(n: torch.Tensor, size: _Sizes) -> torch.Tensor:
    """Largest error of a sum of n products, relative to the sum of their sizes; a matrix unit may be worse than n u."""
    block = size.numerics.dot_block
    if block is None:
        return n * size.u
    return torch.maximum(n * size.u, torch.from_numpy(dots.dot_bound(block, n.cpu().numpy())).to(n.device))


def _one_sided(n: torch.Tensor, sizes: torch.Tensor, total: torch.Tensor, numerics: Numerics) -> torch.Tensor:
    """The square of what a matrix unit's truncation takes from a sum, see `dots`."""
    if numerics.dot_block is None:
        return torch.zeros_like(total)
    each = torch.from_numpy(dots.dot_sigma(numerics.dot_block, n.cpu().numpy())).to(n.device)
    return (0.5 * each * (sizes + total.abs())).square()


def _rounded(
    exact: torch.Tensor, fmt: Format, reach: torch.Tensor, noise: torch.Tensor, inner: torch.Tensor,
    judged: torch.Tensor, *, less: torch.Tensor, common: torch.Tensor | None = None, delta: torch.Tensor | None = None,
    cast: torch.Tensor | None = None,
) -> GradientEnvelope:  # fmt: skip
    """With the rounding to its format."""
    judged = judged.expand(exact.shape)
    # A gradient that is 0 since nothing takes part has no error, hence no rounding.
    bound = torch.where(reach > 0.0, reach + 0.5 * fmt.ulp(exact.abs() + reach), 0.0)
    sigma = torch.where(reach > 0.0, (noise + _cast_variance(exact, fmt)).sqrt(), 0.0)
    bound = torch.where(judged, bound, math.inf)
    typical = rounded(fmt, exact.cpu().numpy(), (noise - less).clamp(min=0.0).cpu().numpy())
    return GradientEnvelope(
        bound=bound.cpu().numpy(),
        reach=reach.cpu().numpy(),
        sigma=sigma.cpu().numpy(),
        typical=np.minimum(np.sqrt(typical), sigma.cpu().numpy()),
        common=(torch.zeros_like(sigma) if common is None else common).cpu().numpy(),
        delta=(torch.zeros_like(sigma) if delta is None else delta).cpu().numpy(),
        inner=inner.cpu().numpy(),
        cast=(torch.zeros_like(sigma) if cast is None else cast).cpu().numpy(),
        judged=judged.cpu().numpy(),
    )


def _of_keys(
    name: str,
    exact: torch.Tensor,
    sums: HeadSums,
    size: _Sizes,
    group: int,
    judged: torch.Tensor,
    *,
    q_len: int,
    contiguous: bool,
) -> GradientEnvelope:
    """dK or dV: the sum over the queries that see a key, of all heads of a group."""
    numerics = size.numerics
    batch, kv_heads = exact.shape[:2]

    def total(what: str) -> torch.Tensor:
        return sums.grouped(f"{name} {what}", batch, kv_heads)

    n = sums.grouped("rows", batch, kv_heads)
    absolute = total("abs")
    reach = total("reach") + absolute * ((group + 4.0) * size.u + 2.0 * size.u_operand)
    reach = reach + 0.5 * (absolute + exact.abs() + reach) * _sum_error(n, size)
    per_term, per_sum = (
        torch.from_numpy(c).to(n.device)
        for c in running_sum(n.cpu().numpy().clip(1.0), numerics.product_block)
    )
    accumulated = size.one * ((per_term + 1.0) * total("terms") + (per_sum + 2.0) * exact.square())
    accumulated += 2.0 * ROUNDING_VARIANCE * size.u_operand**2 * total("terms")
    cut = _one_sided(n, absolute, exact, numerics)
    accumulated += cut
    noise, inner, common = total("var") + accumulated, total("inner") + accumulated, total("common") + cut
    cast = noise - inner
    input_ = numerics.format("input")
    if group > 1 and numerics.group_sum != "acc":
        per_head = sums.per_key[f"{name} sum"].unflatten(0, (batch, kv_heads, group))
        most = sums.per_key[f"{name} abs"].unflatten(0, (batch, kv_heads, group))
        reach = reach + 0.5 * input_.ulp(torch.minimum(most, per_head.abs() * 1.01 + reach.unsqueeze(2))).sum(
            2
        )
        noise = noise + _cast_variance(per_head, input_).sum(2)
    more, more_noise = _stored(
        numerics.stored_keys, n, group, q_len, contiguous, absolute, exact, total("terms"), input_
    )
    reach, noise = reach + more, noise + more_noise
    return _rounded(
        exact,
        input_,
        reach,
        noise,
        inner,
        judged,
        less=total("less"),
        common=common,
        delta=total("delta"),
        cast=cast,
    )
