"""What is known of a correct kernel's errors beyond their expected size, for several orders of the keys.

Rounding P:

A weight is rounded relative to the maximum known at its time: that of all keys, or of the blocks so far. Where the
maximum barely grows, or the weights lie on few values, the roundings of a correct kernel are not random but known, and
may all have one sign. These predictions are what `statistics` takes out before it calls an error a bias.

Everything is float64 except for the one rounding into P's format.

Sums: a running sum rounds its partial sums. Over all orders of the keys these have the mean square that the envelope
expects, but for one order it may be a few times as large. Where all rows have nearly the same weights they share their
partial sums, and that luck does not average out. So the partial sums from the first key and from the last are looked at.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from effattn.exact.backward import HeadSums, score_gradient
from effattn.exact.scores import score_blocks
from effattn.tolerances.statistics import Prediction
from effattn.tolerances.sums import ROUNDING_VARIANCE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from effattn.exact import Exact
    from effattn.exact.scores import Options
    from effattn.tolerances.numerics import Numerics

    Floats = NDArray[np.float64]

#: (keys a step, from the last key): None for a maximum that is known before the first weight
ORDERS: tuple[tuple[int | None, bool], ...] = (
    (None, False),
    (64, False),
    (16, False),
    (32, False),
    (128, False),
    (64, True),
    (32, True),
    (128, True),
)

#: P relative to its sum, and to nothing, and the arrangements (`Numerics.normalise`) in which it may be
_OTHER_ORDERS = (("normalised", ("before", "any")), ("not shifted", ("any",)))

#: keys from one partial sum to the next
_STEP = 16

#: scores at a time
_SCORES = 1 << 20


@torch.no_grad()
def known_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    numerics: Numerics,
    exact: Exact,
    options: Options,
) -> Iterator[Prediction]:
    """For each order: error and variance of the output before it is rounded, (batch * heads * q_len, v_dim) each.

    Where the numerics do not round P, the variance that the sums of this order have, and error 0. Rows that see no key
    have error 0.
    """
    if not numerics.rounds_p:
        for from_last in (False, True):
            yield _partial_sums(q, k, v, from_last, numerics=numerics, exact=exact, options=options)
        return
    orders: list[tuple[int | None, bool] | str] = []
    if numerics.normalise != "before":
        orders += [o for o in ORDERS if o[0] is None or o[0] < k.shape[2]]
    orders += [kind for kind, arrangements in _OTHER_ORDERS if numerics.normalise in arrangements]
    # Dropout's factor may be multiplied before P is rounded, or after.
    for order, before in itertools.product(orders, (False, True) if options.keep is not None else (False,)):
        error = torch.zeros((*q.shape[:3], v.shape[3]), dtype=torch.float64, device=q.device)
        variance = torch.zeros_like(error)
        for block in score_blocks(q, k, v, options, most_scores=_SCORES):
            w, s = block.weights(block.read(exact.lse)), block.scores
            if isinstance(order, str):
                p = w if order == "normalised" else s.exp()
            else:
                top = _maximum(s, *order)
                p = (s - (top if block.sink is None else torch.maximum(top, block.sink))).exp_()
            if before:
                p = block.weighted(p)
            p = p * numerics.p_scale
            # Weights that overflow are another matter, and not explained by rounding.
            p = torch.where(p < math.inf, p, 0.0)
            rounded = numerics.format("p").round(p)
            rounded = torch.where(rounded < math.inf, rounded, p)
            spacing = numerics.format("p").ulp(p).masked_fill_(p == rounded, 0.0)
            share = torch.where(p > 0.0, block.weighted(w) / p, 0.0)
            off, even = (rounded - p) * share, (spacing * share).square_().div_(12.0)
            moved = torch.bmm(off, block.v)
            if numerics.sum_of == "rounded" and options.keep is None:
                moved -= block.read(exact.out) * off.sum(-1, keepdim=True)
            block.write(error, moved)
            block.write(variance, torch.bmm(even, block.v.square()))
        columns = v.shape[3]
        yield Prediction(
            error.reshape(-1, columns).cpu().numpy(), variance.reshape(-1, columns).cpu().numpy()
        )


def _partial_sums(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    from_last: bool,
    *,
    numerics: Numerics,
    exact: Exact,
    options: Options,
) -> Prediction:
    """Variance of the running sums of P V and of l over the keys in their order, or in reverse."""
    variance = torch.zeros((*q.shape[:3], v.shape[3]), dtype=torch.float64, device=q.device)
    for block in score_blocks(q, k, v, options, most_scores=_SCORES):
        # A column of ones has l for its sum.
        columns = torch.nn.functional.pad(block.v, (0, 1), value=1.0)
        w = block.weighted(block.weights(block.read(exact.lse)))
        total = torch.zeros((*w.shape[:2], columns.shape[-1]), dtype=torch.float64, device=q.device)
        squares = torch.zeros_like(total)
        starts = range(0, w.shape[-1], _STEP)
        for start in reversed(starts) if from_last else starts:
            keys = slice(start, min(start + _STEP, w.shape[-1]))
            n = keys.stop - keys.start
            after = total + torch.bmm(w[..., keys], columns[:, keys])
            # From one partial sum to the next in a straight line, give or take what random order inside adds.
            squares += (total.square() + total * after + after.square()) * (n / 3.0)
            squares += torch.bmm(w[..., keys].square(), columns[:, keys].square()) * ((n + 1.0) / 6.0)
            total = after
        sums = squares[..., :-1] + total[..., :-1].square() * squares[..., -1:]
        block.write(variance, sums)
    one = ROUNDING_VARIANCE * numerics.format("acc").unit_roundoff ** 2
    variance = variance.mul_(one).reshape(-1, v.shape[3]).cpu().numpy()
    return Prediction(variance * 0.0, variance)


def _maximum(s: torch.Tensor, block: int | None, from_last: bool) -> torch.Tensor:
    """The maximum that each weight is taken relative to: of all keys, or of the blocks up to its own."""
    n = s.shape[-1]
    if block is None:
        top = s.amax(-1, keepdim=True) if n else s.new_zeros((*s.shape[:2], 1))
        return torch.where(top == -math.inf, 0.0, top)
    padded = torch.nn.functional.pad(s, (0, -n % block), value=-math.inf)
    tops = padded.unflatten(-1, (-1, block)).amax(-1)
    tops = tops.flip(-1).cummax(-1).values.flip(-1) if from_last else tops.cummax(-1).values
    top = tops.repeat_interleave(block, dim=-1)[..., :n]
    # Before the first visible key there is no maximum, and no weight either.
    return torch.where(top == -math.inf, 0.0, top)


@torch.no_grad()
def known_gradient_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    *,
    numerics: Numerics,
    exact: Exact,
    options: Options,
    d_lse: torch.Tensor | None = None,
) -> Iterator[dict[str, Floats]]:
    """What rounding P and dS does to "q", "k" and "v", which is known from the inputs.

    dS is rounded as it is or scaled before, P before dropout's factor is multiplied or after.
    """
    scale = options.scale_for(q.shape[3])
    p, ds = numerics.format("p"), numerics.format("ds")
    for before, dropped in ((1.0, True), (scale or 1.0, False)):
        dq = q.new_zeros(q.shape, dtype=torch.float64)
        sums = HeadSums(q, options)
        for block in score_blocks(q, k, v, options):
            g = block.read(d_out).double()
            w, _ = block.normalised(block.read(exact.lse))
            d_s, _ = score_gradient(block, w, g, None if d_lse is None else block.read(d_lse).double())
            d_t = (d_s if block.slope is None else d_s * block.slope) * before
            off = (ds.round(d_t) - d_t) * (scale / before) if numerics.rounds_ds else torch.zeros_like(d_t)
            weights = block.weighted(w) if dropped else w
            off_p = p.round(weights) - weights if numerics.rounds_p else torch.zeros_like(weights)
            off_p = off_p if dropped else block.weighted(off_p)
            block.write(dq, torch.bmm(off, block.k))
            sums.add("k", block, torch.bmm(off.mT, block.q))
            sums.add("v", block, torch.bmm(off_p.mT, g))
        yield {
            "q": dq.cpu().numpy(),
            "k": sums.grouped("k", *k.shape[:2]).cpu().numpy(),
            "v": sums.grouped("v", *k.shape[:2]).cpu().numpy(),
        }
