"""Errors of single scores and sums over whole rows, with every option: what envelopes of problems with options rest on.

Beside the errors of a product (`sums.ScoreErrors`), all relative to the unit roundoff u of the accumulators:

- softcap c tanh(t / c): tanh is 1-Lipschitz, so errors of t pass at most as they are, and with the derivative as noise;
  its own error is `Numerics.tanh_error` u at most, absolute or relative, times c;
- bias and ALiBi: a constant, its product with the distance, log2(e) folded in, one addition each.

A sink is a key without a value: it enters the normaliser, nothing else. Dropout's factor is one more product.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from effattn.tolerances.sums import flushed

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from effattn.exact.scores import Block, Options
    from effattn.tolerances.numerics import Numerics
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
    scores = block.scores.masked_fill(~block.visible, 0.0)
    if block.added is not None:
        size = size + block.added
        bound.add_(size, alpha=errors.rounded + 2.0 * u)
        variance.add_(block.added.square() + scores.square(), alpha=2.0 * one)
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
    return bound, errors.gap * (3.0 * block.sink.square() + gap.square()) + errors.exp


def collect_with_options(
    block: Block,
    lse: torch.Tensor,
    equal: EqualKeys | None,
    *,
    numerics: Numerics,
    errors: ScoreErrors,
    options: Options,
) -> dict[str, Floats]:
    """The sums over the keys that `sums.collect` gives, of a block of whole rows; lse (P, m, 1).

    Weights that multiply values have dropout's factor, those that make the normaliser have not.
    """
    found = pair_errors(block, lse, numerics=numerics, errors=errors, options=options)
    w = block.weights(lse)
    sink_w = block.sink_weight(lse)
    sink_b, sink_var = sink_errors(block, lse, numerics, errors)
    count = block.visible.sum(-1, keepdim=True).double()
    if block.sink is not None:
        count = count + 1.0
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
    total = {
        "w_abs": torch.bmm(x, v_abs),
        "w2_v2": torch.bmm(x2, v2),
        "w2": w2.sum(-1, keepdim=True) + sink_w.square(),
        "ws_v": torch.bmm(s, v),
        "ws": (w * block.product * slope).sum(-1, keepdim=True),
        "low": -found.most,
        "high": found.most,
        "largest": (top.clamp(min=1e-300).log() + lse.clamp(min=-1e300)).abs(),
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
        total["same_keys"], total["same_pairs"] = block.read(equal.keys), block.read(equal.pairs)
    return {name: y.cpu().numpy() for name, y in total.items()}


def _kv_heads(block: Block, equal: EqualKeys) -> torch.Tensor:
    """The place among batch * kv_heads of each pair of the block."""
    heads, kv_heads = equal.keys.shape[1], equal.summed.shape[1]
    index = torch.arange(block.pairs.start, block.pairs.stop, device=block.q.device)
    return index // (heads // kv_heads)
