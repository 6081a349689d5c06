"""Errors of single scores and sums over whole rows, with every option: what envelopes of problems with options rest on.

Beside the errors of a product (`sums.ScoreErrors`), all relative to the unit roundoff u of the accumulators:

- softcap c tanh(t / c): tanh is 1-Lipschitz, so errors of t pass at most as they are, and with the derivative as noise;
  its own error is `Numerics.tanh_error` u at most, absolute or relative, times c;
- bias and ALiBi: a constant, its product with the distance, log2(e) folded in, one addition each;
- where scores are kept in a narrower format, each of these steps may round to it: after the product, the softcap, the bias,
  ALiBi. The first is part of `sums.ScoreErrors`.

A sink is a key without a value: it enters the normaliser, nothing else. Dropout's factor is one more product.

Two things only methods of 8 bits have. Where P is rounded to fewer bits than bf16 has, its subnormal numbers matter, and the
error of each weight is taken alone (`narrow_sums`). Where two codes of an entry are right (`quantise.Radius`), what this does to
a score is part of its bound, and what it does to an output is added up with its full size, for it is the same in all rows
(`shared_sums`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from effattn.tolerances.sums import ROUNDING_VARIANCE, flushed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from effattn.exact.scores import Block, Options
    from effattn.tolerances.numerics import Numerics
    from effattn.tolerances.quantise import Radius
    from effattn.tolerances.sums import EqualKeys, ScoreErrors

    Floats = NDArray


class PairErrors(NamedTuple):
    """Of each score of a block, (P, m, n), 0 for hidden pairs; exp's own error is not in `bound`."""

    #: largest error
    bound: torch.Tensor
    #: its variance, that of exp's relative error included
    variance: torch.Tensor
    #: largest |scale q.k| + |bias| + |ALiBi| of each row, that of the sink included, (P, m, 1)
    most: torch.Tensor


def pair_errors(
    block: Block, lse: torch.Tensor, *, numerics: Numerics, errors: ScoreErrors, options: Options
) -> PairErrors:
    """Errors of the scores of a block; lse (P, m, 1)."""
    u, one = numerics.format("acc").unit_roundoff, errors.gap
    q = block.q * options.scale_for(block.q.shape[-1])
    size = block.product.abs()
    bound = torch.bmm(q.abs(), block.k.abs().mT)
    bound.mul_(0.5 * errors.dot + errors.factors).add_(size, alpha=0.5 * errors.dot + errors.rounded)
    variance = torch.bmm(q.square(), block.k.square().mT)
    variance.mul_(errors.terms).add_(size.square(), alpha=errors.each)
    if block.slope is not None:
        assert options.softcap is not None
        # tanh^2 is 1 - slope.
        square = 1.0 - block.slope if numerics.tanh_of == "tanh" else torch.ones_like(block.slope)
        bound.add_(square.sqrt(), alpha=options.softcap * numerics.tanh_error * u)
        variance.mul_(block.slope.square()).add_(square, alpha=one * numerics.tanh_error * options.softcap**2)
        if errors.kept:
            capped = (1.0 - block.slope).clamp(min=0.0)
            bound.add_(capped.sqrt(), alpha=options.softcap * errors.kept)
            variance.add_(capped, alpha=ROUNDING_VARIANCE * (options.softcap * errors.kept) ** 2)
    scores = block.scores.masked_fill(~block.visible, 0.0)
    if block.added is not None:
        size = size + block.added
        steps = (options.bias is not None) + (options.alibi_slopes is not None)
        bound.add_(size, alpha=errors.rounded + 2.0 * u + (steps - 1) * errors.kept)
        variance.add_(block.added.square() + scores.square(), alpha=2.0 * one)
        if errors.kept:
            # The first of two sums is at most as large as both summands.
            variance.add_(scores.square(), alpha=ROUNDING_VARIANCE * errors.kept**2)
            variance.add_(size.square(), alpha=(steps - 1) * ROUNDING_VARIANCE * errors.kept**2)
    gap = (scores - torch.where(lse == -math.inf, 0.0, lse)).abs()
    bound.add_(gap, alpha=errors.shifted)
    variance.add_(gap.square(), alpha=one).add_(errors.exp)
    hidden = ~block.visible
    most = size.masked_fill(hidden, 0.0).amax(-1, keepdim=True) if size.shape[-1] else torch.zeros_like(lse)
    if block.sink is not None:
        most = torch.maximum(most, block.sink.abs())
    return PairErrors(bound.masked_fill_(hidden, 0.0), variance.masked_fill_(hidden, 0.0), most)


def sink_errors(
    block: Block, lse: torch.Tensor, numerics: Numerics, errors: ScoreErrors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bound and variance of the error of the sink's logit in each row, (P, m, 1)."""
    if block.sink is None:
        return torch.zeros_like(lse), torch.zeros_like(lse)
    gap = (block.sink - torch.where(lse == -math.inf, 0.0, lse)).abs()
    bound = errors.rounded * block.sink.abs() + errors.shifted * gap
    square = (3.0 * errors.gap + ROUNDING_VARIANCE * errors.kept**2) * block.sink.square()
    return bound, square + errors.gap * gap.square() + errors.exp


def collect_with_options(
    block: Block,
    lse: torch.Tensor,
    equal: EqualKeys | None,
    *,
    numerics: Numerics,
    errors: ScoreErrors,
    options: Options,
    radius: Radius | None = None,
) -> dict[str, Floats]:
    """The sums over the keys that `sums.collect` gives, of a block of whole rows; lse (P, m, 1).

    Weights that multiply values have dropout's factor, those that make the normaliser have not. `radius`: what q, k and v may
    be off by.
    """
    found = pair_errors(block, lse, numerics=numerics, errors=errors, options=options)
    w = block.weights(lse)
    sink_w = block.sink_weight(lse)
    more: dict[str, torch.Tensor] = {}
    if radius is not None:
        off, more = shared_sums(block, w, radius, options)
        found = found._replace(bound=found.bound + off)
    if numerics.narrow_p:
        more |= narrow_sums(block, w, sink_w, numerics, equal)
    sink_b, sink_var = sink_errors(block, lse, numerics, errors)
    count = block.visible.sum(-1, keepdim=True).double()
    if block.sink is not None:
        count = count + 1.0
    if numerics.normalise != "any":
        # The maximum is taken off the scores, the sink's if that is larger, and not the log-sum-exp.
        a = -torch.maximum(w.amax(-1, keepdim=True), sink_w).clamp(min=1e-300).log()
        gap = (block.scores - torch.where(lse == -math.inf, 0.0, lse)).masked_fill(~block.visible, 0.0)
        more_var = (errors.gap * a * (2.0 * gap + a)).masked_fill_(~block.visible, 0.0)
        found = found._replace(variance=found.variance + more_var)
    x = block.weighted(w)
    v, v_abs, v2 = block.v, block.v.abs(), block.v.square()
    slope = 1.0 if block.slope is None else block.slope
    w2, x2 = w.square(), x.square()
    s = x * block.product * slope
    g = x * found.variance
    gap = (block.scores - torch.where(lse == -math.inf, 0.0, lse)).masked_fill(~block.visible, 0.0)
    top, key = w.max(-1, keepdim=True)
    place = key.expand(-1, -1, v.shape[-1])
    kept = torch.gather(x, 2, key) / torch.where(top > 0.0, top, 1.0)
    less = torch.zeros_like(lse)
    if block.added is not None:
        scores = block.scores.masked_fill(~block.visible, 0.0)
        less = (w2 * (block.added.square() + scores.square())).sum(-1, keepdim=True)
    total = {
        "w_abs": torch.bmm(x, v_abs),
        "w2_v2": torch.bmm(x2, v2),
        "w2": w2.sum(-1, keepdim=True) + sink_w.square(),
        "ws_v": torch.bmm(s, v),
        "ws": (w * block.product * slope).sum(-1, keepdim=True),
        "low": -found.most,
        "high": found.most,
        "peak": torch.maximum(top, sink_w).clamp(min=1e-300).log() + lse.clamp(min=-1e300),
        "count": count.clamp(min=1.0),
        "seen": block.visible.any(-1, keepdim=True).double(),
        "top": top,
        "top_v": torch.gather(v, 1, place) * kept,
        "flushed": flushed(w, gap.amin(-1, keepdim=True), numerics, count),
        "b_most": torch.maximum(found.bound.amax(-1, keepdim=True), sink_b),
        "wb_abs": torch.bmm(x * found.bound, v_abs),
        "wb": (w * found.bound).sum(-1, keepdim=True) + sink_w * sink_b,
        # (v - o)^2 with dropout's factor on v alone: r^2 v^2 - 2 r v o + o^2, of all keys
        "g_v2": torch.bmm(x * g, v2),
        "g_v": torch.bmm(w * g, v),
        "g": (w2 * found.variance).sum(-1, keepdim=True) + sink_w.square() * sink_var,
        "w_var": (w * found.variance).sum(-1, keepdim=True) + sink_w * sink_var,
        # What is granted beyond one rounding of a bias and of its sum with the score, and of a sink.
        "g_less": errors.gap * (less + (sink_w * block.sink if block.sink is not None else sink_w).square()),
        "k_most": block.k.square().sum(-1).amax(-1)[:, None, None],
        "v_most": v_abs.amax(1, keepdim=True),
    }
    if equal is not None:
        heads = _kv_heads(block, equal)
        summed, dim = equal.summed.flatten(0, 1)[heads], v.shape[-1]
        sums, size = summed[..., :dim], summed[..., -1:]
        total["equal_w2_v2"] = torch.bmm(x2, sums.square() / size)
        total["equal_g_v2"] = torch.bmm(x * g, sums.square() / size)
        total["equal_g_v"] = torch.bmm(w * g, sums)
        total["equal_g"] = torch.bmm(w2 * found.variance, size)
        # Which keys of a group a row sees depends on the options: only the key itself is known to be at the maximum.
        total["top_sum"], total["top_squares"] = total["top_v"], total["top_v"].square()
        seen = count / v.shape[1]
        total["top_size"] = (torch.gather(size, 1, key) * seen).clamp(min=1.0)
        total["seen_sum"] = torch.gather(sums, 1, place) * seen
        total["same_keys"], total["same_pairs"] = block.read(equal.keys), block.read(equal.pairs)
    collected = {name: y.cpu().numpy() for name, y in (total | more).items()}
    return collected if equal is None else collected | {"alike": np.asarray(equal.share)}


def narrow_sums(
    block: Block, w: torch.Tensor, sink_w: torch.Tensor, numerics: Numerics, equal: EqualKeys | None
) -> dict[str, torch.Tensor]:
    """What rounding P to a narrow format does, key by key; w (P, m, n) the weights, sink_w (P, m, 1) that of the sink.

    p_abs sum e |v|, p_sum sum e        e the largest error of a weight: u_p w, or half a subnormal number, at most w itself
    p_v2 sum var v^2, p_2 sum var       its variance; p_top that of the largest weight; equal_p_v2 of groups of equal keys
    p_lost sum e |v|                    over weights below two subnormal numbers, which are not as likely to grow as to
                                        shrink, and what the mean of all roundings may be: u_p^2 / 2 of every weight
    """
    p = numerics.format("p")
    u, v, v_abs = p.unit_roundoff, block.v, block.v.abs()
    half = torch.full_like(sink_w, 0.5 * p.smallest_subnormal / numerics.p_scale)
    if numerics.normalise == "after":
        # P is 1 at the maximum, that of the sink included, or larger where the maximum is still to grow.
        half = half * torch.maximum(w.amax(-1, keepdim=True), sink_w)

    def errors(weights: torch.Tensor, half: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        error = torch.minimum(weights, torch.maximum(u * weights, half))
        variance = torch.maximum(ROUNDING_VARIANCE * u * u * weights.square(), half.square() / 3.0)
        return error, torch.where(weights < half, weights.square(), variance)

    x = block.weighted(w)
    # Dropout's factor may be multiplied before P is rounded, or after.
    halves = half if block.factor is None else half * block.factor.clamp(min=1.0)
    error, variance = errors(x, halves)
    lost = torch.where(x < 4.0 * halves, error, 0.5 * u * u * x)
    error_of_sum, variance_of_sum = (error, variance) if block.factor is None else errors(w, half)
    top = w.max(-1, keepdim=True).indices
    total = {
        "p_abs": torch.bmm(error, v_abs),
        "p_v2": torch.bmm(variance, v.square()),
        "p_lost": torch.bmm(lost, v_abs),
        "p_top": torch.gather(variance, 2, top),
        "p_sum": error_of_sum.sum(-1, keepdim=True),
        "p_2": variance_of_sum.sum(-1, keepdim=True),
    }
    if equal is not None:
        summed, dim = equal.summed.flatten(0, 1)[_kv_heads(block, equal)], v.shape[-1]
        total["equal_p_v2"] = torch.bmm(variance, summed[..., :dim].square() / summed[..., -1:])
    return total


def shared_sums(
    block: Block, w: torch.Tensor, radius: Radius, options: Options
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What entries with two codes may do: to each score, (P, m, n), and off_abs sum w a |v|, off sum w a, off_v sum w r_v."""
    heads, kv_heads = radius.q.shape[1], radius.k.shape[1]
    of_kv = torch.arange(block.pairs.start, block.pairs.stop, device=w.device) // (heads // kv_heads)
    r_q = block.read(radius.q)
    r_k, r_v = radius.k.flatten(0, 1)[of_kv], radius.v.flatten(0, 1)[of_kv]
    # |q k - (q + r_q)(k + r_k)| <= |q| r_k + r_q (|k| + r_k); a softcap is 1-Lipschitz.
    off = torch.bmm(block.q.abs(), r_k.mT) + torch.bmm(r_q, (block.k.abs() + r_k).mT)
    off = (off * abs(options.scale_for(block.q.shape[-1]))).masked_fill(~block.visible, 0.0)
    x = block.weighted(w)
    return off, {
        "off_abs": torch.bmm(x * off, block.v.abs()),
        "off": (w * off).sum(-1, keepdim=True),
        "off_v": torch.bmm(x, r_v),
    }


def _kv_heads(block: Block, equal: EqualKeys) -> torch.Tensor:
    """The place among batch * kv_heads of each pair of the block."""
    heads, kv_heads = equal.keys.shape[1], equal.summed.shape[1]
    index = torch.arange(block.pairs.start, block.pairs.stop, device=block.q.device)
    return index // (heads // kv_heads)
