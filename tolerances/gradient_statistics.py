"""Tests on the errors of one gradient: are they as large as rounding makes them, and not in proportion to it?

They are those of `statistics`, with one difference. The errors of a row (a query of dQ, a key of dK and dV) may be
correlated at will, and different rows round different numbers; but the errors of the log-sum-exp and of delta belong to
queries, so in dK and dV they are in all keys of a head at once. Let theta be the part of the variance that they are,
on the average. From (a + c)^2 <= (1 + h) a^2 + (1 + 1/h) c^2 with h = sqrt(theta), the mean square is at most

    (1 + h) A + h (1 + h) C,       E A <= 1 and E C <= 1,

A the mean of independent rows, C that of independent heads. Each exceeds its limit with the probability that `statistics`
states, exp(-n (x - 1 - ln x) / 2) for n heads; that is half of what the test may alarm with. Where theta is large, as in
fp32, nothing less than a gross error is found; where P and dS are rounded, theta is near 0 and the limit that of
independent rows.

For the same reason 7 deviations of the common part, with all elements aligned, are taken off before the direction is
tested: more has a probability below 1e-11.

Where a head has the same key, or the same query, more than once, whole rows and columns of P and dS round alike, and
nothing here holds: such gradients are held to their bounds only (`repeated`).

Rows that round the same numbers are put into one cell: keys that are alike in dV, keys and values in dK, queries and
upstream gradients in dQ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from effattn.tolerances import evidence
from effattn.tolerances.evidence import Evidence, Lean, Size
from effattn.tolerances.statistics import ALARM, Cells, Finding, lean_of, log_tail, neighbourhoods, size_of

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from effattn.tolerances.formats import Format

    Floats = NDArray[np.float64]

#: tests of one gradient: size and direction
TESTS = 2

#: deviations of the common part that are allowed in a direction
_COMMON = 7.0

#: the same in `evidence`, where a run has hundreds of cases: more has a probability below 1e-15
SURELY = 8.0

#: the probability of more than the limit of the common part in the size, in `evidence`
RARELY = 1e-15

#: where the common part may be larger than this part of the size, `evidence` takes the errors of a head for one
MOST_SHARED = 0.5


@dataclass(frozen=True, kw_only=True)
class GradientErrors:
    """The errors of one gradient and what is expected of them, rows by columns."""

    #: the gradient's name, for findings
    name: str
    error: Floats
    exact: Floats
    #: GradientEnvelope.sigma, common, delta, inner, cast
    sigma: Floats
    common: Floats
    delta: Floats
    inner: Floats
    cast: Floats
    format: Format
    #: independent heads
    heads: int
    #: (rows,): which of them each row belongs to
    head: NDArray[np.int64]
    #: what rounding P and dS does, for each arrangement; only looked at if there may be an alarm
    known: Callable[[], Iterator[Floats]]
    #: (rows, any number): rows this close together in units of 1 may round alike; likewise
    places: Callable[[], Floats]


def repeated(*tensors: torch.Tensor) -> bool:
    """Whether any of the tensors (batch, heads, length, dim) has two equal rows in a head."""
    for x in tensors:
        rows = x.detach().double().cpu().numpy()
        angles = np.arange(1.0, rows.shape[-1] + 1.0)
        marks = np.sort(np.einsum("bhnd,d->bhn", rows, np.cos(angles * angles)), axis=-1)
        if (marks[..., 1:] == marks[..., :-1]).any():
            return True
    return False


def alarm_each(gradients: int, others: int) -> float:
    """The false-alarm probability of each test where so many gradients, and so many other tests, are looked at."""
    return ALARM / (others + TESTS * gradients)


def examine(errors: GradientErrors, *, alarm: float) -> list[Finding]:
    """The tests that fail, each at the false-alarm probability `alarm`."""
    counts = errors.sigma > 0.0
    if not counts.any():
        return []
    rows = np.asarray(counts.any(axis=1))
    theta = _share(errors)
    alone = np.ones(int(rows.sum()), np.int64)
    size = _size(errors.error**2, errors.sigma**2, rows, alone, errors.heads, theta, alarm)
    slope = _slope(errors.error, errors, None, alarm)
    if size is None and slope is None:
        return []
    explained = Explained(errors)
    findings = []
    if size is not None:
        found = [
            _size(squares, np.maximum(even, known), rows, explained.counts, errors.heads, theta, alarm)
            for squares, even, known in explained.squares()
        ]
        if all(found):
            findings.append(max((f for f in found if f is not None), key=lambda f: f.p_value))
    if slope is not None:
        results = [_slope(v, errors, explained.cells, alarm) for v in explained.variants()]
        same = {math.copysign(1.0, f.statistic) for f in results if f is not None}
        if all(results) and len(same) == 1:
            findings.append(max((f for f in results if f is not None), key=lambda f: f.p_value))
    return [
        Finding(
            name=f"{errors.name} {f.name}", statistic=f.statistic, p_value=f.p_value, threshold=f.threshold
        )
        for f in findings
    ]


class Explained:
    """The errors with everything taken off that a correct kernel may do: known roundings, rows that round alike.

    With `explained` False, the known roundings are left in.
    """

    def __init__(self, errors: GradientErrors, *, explained: bool = True) -> None:
        self.errors = errors
        index = neighbourhoods(errors.places())
        self.cells = Cells(index)
        self._explained = explained
        self._known = list(errors.known()) if explained else []
        rows = np.asarray((errors.sigma > 0.0).any(axis=1))
        #: rows of each cell, of those that have an error at all
        self.counts = np.bincount(index[rows])
        #: so many independent rows at least
        self.independent = float(rows.sum()) / float(self.counts.max())

    def variants(self) -> list[Floats]:
        """The errors as they are, and with what is known taken out, in each way that may be that of a correct kernel."""
        errors = self.errors
        if not self._explained:
            return [errors.error]
        rounding = errors.format.round(errors.exact) - errors.exact
        variants = [errors.error, errors.error - rounding]
        for error in self._known:
            variants.append(errors.error - error)
            variants.append(errors.exact + errors.error - errors.format.round(errors.exact + error))
        return variants

    def squares(self) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Squares of the errors and their variance, as they are and with each known error and its variance taken out.

        The variance comes twice, as in `statistics`: the last rounding spread evenly over its spacing, and as it is known.
        """
        errors = self.errors
        even = errors.format.ulp(errors.exact) ** 2 / 12.0
        before = errors.sigma**2 - even - errors.cast
        for known, cast in ((np.zeros_like(even), errors.cast), *((error, 0.0) for error in self._known)):
            moved = errors.exact + known
            rounding = (errors.format.round(moved) - moved) ** 2
            yield (errors.error - known) ** 2, before + cast + even, before + cast + rounding


def weigh(errors: GradientErrors, *, explained: bool) -> list[Evidence]:
    """What the errors say in `evidence`; without `explained` as they are, which is never less and much quicker."""
    rows = np.asarray((errors.sigma > 0.0).any(axis=1))
    if not rows.any():
        return []
    found = Explained(errors, explained=explained)
    return [
        evidence.of_size(f"{errors.name} size", _sizes(found, rows)),
        evidence.of_direction(f"{errors.name} output", _leans(found)),
    ]


def _leans(explained: Explained) -> list[Lean]:
    """What each variant gives in proportion to the gradient.

    Errors of delta are as likely up as down, but common to all keys of a head. So in dK all that a head has is one cell, and
    they need not be allowed.
    """
    errors, cells = explained.errors, explained.cells
    weight = _along(errors.error, errors)[1]
    size = np.abs(errors.exact)
    steady = np.sqrt(np.maximum(errors.inner - errors.delta, 0.0))
    steady += SURELY * np.sqrt(np.maximum(errors.common - errors.delta, 0.0))
    allowed = np.einsum("ij,ij->i", size, steady) * weight
    scale = cells.counts.astype(np.float64)
    if errors.common.any() and errors.delta.any():
        alike = scale[cells.index]
        cells = Cells(np.unique(errors.head, return_inverse=True)[1].reshape(-1))
        # Rows of a cell all alike, and what errors of delta do to the elements of a head all aligned.
        together = cells.sum(np.einsum("ij,ij->i", size, np.sqrt(errors.delta)) * weight)
        scale = np.sqrt(cells.sum(alike) + together**2)
    return [lean_of(_along(error, errors)[0], allowed, cells, scale) for error in explained.variants()]


def _sizes(explained: Explained, rows: NDArray[np.bool_]) -> list[Size]:
    """The sizes that the variants give.

    The common part is held to its limit; where that is large, the errors of a head count as one.
    """
    errors = explained.errors
    h = math.sqrt(_share(errors))
    shared, factor = (h * (1.0 + h) * limit(errors.heads, RARELY) if h else 0.0), 1.0 + h
    independent = explained.independent
    if shared > MOST_SHARED:
        counts = np.bincount(errors.head[rows])
        independent, shared, factor = min(independent, float(rows.sum()) / float(counts.max())), 0.0, 1.0
    found = [
        size_of(squares[rows], even[rows], known[rows], independent)
        for squares, even, known in explained.squares()
    ]
    return [Size(max(0.0, (x.mean - shared) / factor), x.rows) for x in found]


def _share(errors: GradientErrors) -> float:
    """theta: the common part of the variance, on the average."""
    variance = errors.sigma**2
    shares = np.divide(errors.common, variance, out=np.zeros_like(variance), where=variance > 0.0)
    return float(shares[variance > 0.0].mean())


def limit(n: float, probability: float) -> float:
    """The x > 1 with exp(-n (x - 1 - ln x) / 2) = probability."""
    wanted = -2.0 * math.log(probability) / n
    x = 1.0 + wanted + math.sqrt(2.0 * wanted)
    for _ in range(50):  # Newton, from above
        step = (x - 1.0 - math.log(x) - wanted) / (1.0 - 1.0 / x)
        x -= step
        if abs(step) < 1e-12 * x:
            break
    return x


def _size(
    squares: Floats, variance: Floats, rows: NDArray[np.bool_], counts: NDArray[np.int64], heads: int, theta: float,
    alarm: float,
) -> Finding | None:  # fmt: skip
    """Is the mean of error^2 / variance larger than chance explains? `counts`: rows of each cell."""
    x = _mean(squares, variance, rows)
    h = math.sqrt(theta)
    if h == 0.0:
        own, p = x, alarm
    else:
        shared = h * (1.0 + h) * limit(heads, alarm / 2.0)
        own, p = (x - shared) / (1.0 + h), alarm / 2.0
    log_p = log_tail(own, counts)
    if log_p >= math.log(p):
        return None
    return Finding(name="size", statistic=math.sqrt(x), p_value=math.exp(log_p), threshold=alarm)


def _mean(squares: Floats, variance: Floats, rows: NDArray[np.bool_]) -> float:
    return float(np.divide(squares, variance, out=np.zeros_like(squares), where=variance > 0.0)[rows].mean())


def _along(error: Floats, errors: GradientErrors) -> tuple[Floats, Floats]:
    """For each row the error along the gradient in expected deviations, and what it was multiplied by for that."""
    spread = np.einsum("ij,ij,ij->i", errors.sigma, errors.sigma, np.square(errors.exact))
    weight = np.divide(1.0, np.sqrt(spread), out=np.zeros_like(spread), where=spread > 0.0)
    return np.einsum("ij,ij->i", error, errors.exact) * weight, weight


def _allowed(errors: GradientErrors) -> Floats:
    """For each row what is steady along the gradient, with all elements aligned."""
    steady = np.sqrt(errors.inner) + _COMMON * np.sqrt(errors.common)
    return np.einsum("ij,ij->i", np.abs(errors.exact), steady)


def _slope(error: Floats, errors: GradientErrors, cells: Cells | None, alarm: float) -> Finding | None:
    """Are the errors in proportion to the gradient? Hoeffding's inequality for the signs of independent rows."""
    along, weight = _along(error, errors)
    allowed = _allowed(errors) * weight
    total = float(along.sum())
    if cells is None:
        square = float(along @ along)
    else:
        together = np.abs(cells.sum(along)) + cells.sum(allowed)
        square = float(together @ together)
        total = math.copysign(max(0.0, abs(total) - float(allowed.sum())), total)
    if square == 0.0:
        return None
    t = total / math.sqrt(square)
    p = min(1.0, 2.0 * math.exp(-0.5 * t * t))
    return Finding(name="output", statistic=t, p_value=p, threshold=alarm) if p < alarm else None
