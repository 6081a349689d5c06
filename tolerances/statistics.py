"""Tests on the errors of one output: are they what rounding makes, in size and in direction?

Every test has a false-alarm probability, `ALARM` a verdict in all, shared equally between the tests. No test takes
errors for normal or the elements of a row for independent; this is what is used instead.

Rows. All v_dim errors of a row share the roundings of its P and its l, and may be correlated at will. Different rows
round different numbers. Rows whose exact outputs lie closer together than `CELL` deviations may not (equal weights, a
scale near 0), nor may rows whose scores differ by less than `CELL` roundings (the same query twice). They are put into
one cell, and what is in a cell may be correlated at will too.

Size. For errors with the tail of a normal distribution of the predicted deviation, E exp(y z^2) <= (1 - 2 y)^(-1/2);
the mean over a cell keeps that by Jensen's inequality. So the mean square S over R rows in independent cells of m_c rows
has, for every t < R / (2 max m_c), ln P(S > x) <= -t x - sum_c ln(1 - 2 t m_c / R) / 2 (Chernoff's bound for a weighted
sum of chi-squared numbers); the best t is taken. Without cells that is -R (x - 1 - ln x) / 2.

Direction. For a direction c of each row, y = e.c. Roundings to nearest are as likely up as down, so the y of
different cells are symmetric and independent, whatever their sizes. Given |y|, their signs are fair coins, and by
Hoeffding's inequality P(sum y > t sqrt(sum y^2)) <= exp(-t^2 / 2) (B. Efron, J. Am. Stat. Assoc. 64, 1969). This
uses no predicted deviation at all. It can alarm from about 50 rows on. The directions:

    mean        1, ..., 1              errors of one sign
    v-mean      mean of V              a bias of P shows along what all keys have in common
    output      o                      the output times a factor near 1
    top key     w (v - o) of the key of largest weight: P right for exact ones only
    scale       sum w s (v - o)        what a wrong scale, or a wrong log2(e), does

Largest. An error needs a deviation of |e| - (half a spacing of the output) before the output was rounded. Weighted
sums of roundings are sub-Gaussian with variance at most 1.85 times the predicted (uniform error, the unluckiest
mantissa, u^2 / 3 against 0.18 u^2), so P(any > x) <= 2 N exp(-x^2 / 3.7) over N elements.

The log-sum-exp is held to its bound only. It is fp32, its bound a few hundred roundings, and what goes wrong with it
goes wrong by more; its errors are those of one score, which the average over keys does not make random.

Harmless one-sided errors. A folded constant is rounded once for all, exp errs to one side, sums of similar terms round
alike, weights are lost to underflow. These are errors of the accumulators' format, so of the size of
`Envelope.out_inner`, and `Envelope.out_lost`: their full size, with all elements of a row aligned and all rows of one
sign, is taken off before the direction is tested.

Two errors are not random given the inputs: that of rounding the output (known, if the kernel's own error is small
beside it), and that of rounding P (known, if the maximum is found first). Where many weights lie closer together
than P's spacing, or many outputs than the output's, they have one sign in a correct kernel. So nothing is an alarm
until it still is one with these known errors taken out, for each of several orders of the keys (`predicted`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from effattn.tolerances import evidence
from effattn.tolerances.evidence import LEAN, Evidence, Lean, Size

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from effattn.tolerances.formats import Format

    Floats = NDArray[np.float64]

#: probability that a verdict on a correct kernel is `biased`
ALARM = 1e-9

#: the most tests that one verdict runs: size, largest and five directions
TESTS = 7

#: ratio of the largest variance of a rounding to its variance for log-uniform mantissas
UNLUCKY = (1.0 / 3.0) / (0.125 / math.log(2.0))

#: rows closer than so many deviations may round alike
CELL = 8.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A test that failed."""

    name: str
    #: size: rms of error / expected deviation; direction: t; largest: deviations
    statistic: float
    #: an upper limit of the probability that a correct kernel shows as much
    p_value: float
    #: it is an alarm below this
    threshold: float


class Prediction(NamedTuple):
    """What rounding P does for one order of the keys, (rows, v_dim): known from the inputs alone."""

    #: the error before the output is rounded
    error: Floats
    #: its variance if every rounding had its own spacing and a random place in it
    variance: Floats


@dataclass(frozen=True, kw_only=True)
class Errors:
    """The errors of the output and what is expected of them; rows by columns, without rows that see no key."""

    error: Floats
    exact: Floats
    #: Envelope.out_sigma, out_noise, out_inner, out_steady, out_lost
    sigma: Floats
    noise: Floats
    inner: Floats
    steady: Floats
    lost: Floats
    format: Format
    #: name -> direction for each row, or one for all
    directions: dict[str, Floats]
    #: orders of the keys, each with what it rounds; only looked at if there may be an alarm
    predictions: Callable[[], Iterator[Prediction]]
    #: (rows, any number): rows this close together in units of 1 may round alike; likewise
    places: Callable[[], Floats]

    @cached_property
    def spread(self) -> Floats:
        """Expected variance of each row, over its elements."""
        return np.einsum("ij,ij->i", self.sigma, self.sigma) / self.sigma.shape[1]


class Explained:
    """The errors with everything taken off that a correct kernel may do: known roundings, rows that round alike."""

    def __init__(self, errors: Errors) -> None:
        self.cells = _cells(errors)
        self.known = list(errors.predictions())
        self._errors = errors

    @cached_property
    def variants(self) -> list[Floats]:
        """The errors as they are, and with what is known taken out, in each way that may be that of a correct kernel."""
        errors = self._errors
        rounding = errors.format.round(errors.exact) - errors.exact
        variants = [errors.error, errors.error - rounding]
        for p in self.known:
            variants.append(errors.error - p.error)
            variants.append(errors.exact + errors.error - errors.format.round(errors.exact + p.error))
        return variants

    def slope(self, name: str) -> tuple[float, float]:
        """t and p of a direction: those of the variant that says least; 0 where variants have different signs."""
        errors = self._errors
        results = [_slope(v, errors.directions[name], errors, self.cells) for v in self.variants]
        weakest = max(results, key=lambda r: r[1])
        signs = {math.copysign(1.0, t) for t, _ in results}
        return weakest if len(signs) == 1 else (0.0, 1.0)


def weigh(errors: Errors, *, explained: bool) -> list[Evidence]:
    """What the errors say in `evidence`; without `explained` as they are, which is never less and much quicker."""
    known = Explained(errors) if explained else None
    cells = _cells(errors) if known is None else known.cells
    variants = [errors.error] if known is None else known.variants
    independent = len(errors.error) / cells.largest
    squares = _explained_squares(errors, [] if known is None else known.known)
    sizes = [size_of(*each, independent) for each in (squares if explained else [next(squares)])]
    found = [evidence.of_size("out size", sizes)]
    for name, direction in errors.directions.items():
        allowed, scale = _allowed(direction, errors), cells.counts.astype(np.float64)
        leans = []
        for variant in variants:
            along, weight = _along(variant, direction, errors)
            leans.append(lean_of(along, allowed * weight, cells, scale))
        found.append(evidence.of_direction(f"out {name}", leans))
    return found


def examine(errors: Errors, *, alarm: float = ALARM / TESTS) -> list[Finding]:
    """The tests that fail, each at the false-alarm probability `alarm`. Needs at least one row and finite numbers."""
    findings = []
    z2 = errors.error / errors.sigma
    z2 *= z2
    size = _size(z2, None, alarm)
    largest = _largest(errors.error, errors, alarm)
    slopes = {
        name: _slope(errors.error, direction, errors, None) for name, direction in errors.directions.items()
    }
    if not (size or largest or any(p < alarm for _, p in slopes.values())):
        return findings
    # Something looks wrong. From here on time is no matter.
    explained = Explained(errors)
    if size:
        finding = _size_in_spite(errors, explained, alarm)
        if finding is not None:
            findings.append(finding)
    if largest:
        found = [_largest(errors.error - p.error, errors, alarm) for p in explained.known]
        if all(found):
            findings.append(_weakest([largest, *filter(None, found)]))
    for name, (t, p) in slopes.items():
        if p >= alarm:
            continue
        weakest = explained.slope(name)
        if weakest[1] < alarm and math.copysign(1.0, weakest[0]) == math.copysign(1.0, t):
            findings.append(Finding(name=name, statistic=weakest[0], p_value=weakest[1], threshold=alarm))
    return findings


def _weakest(findings: Sequence[Finding]) -> Finding:
    return max(findings, key=lambda f: f.p_value)


def _size(z2: Floats, cells: Cells | None, alarm: float) -> Finding | None:
    """Is the mean of z^2 larger than chance explains?"""
    x = float(z2.mean())
    log_p = log_tail(x, np.ones(len(z2), np.int64) if cells is None else cells.counts)
    if log_p >= math.log(alarm):
        return None
    return Finding(name="size", statistic=math.sqrt(x), p_value=math.exp(log_p), threshold=alarm)


def log_tail(x: float, counts: NDArray[np.int64]) -> float:
    """Limit of ln P(mean square > x) over rows in independent cells of these sizes, rows of a cell correlated at will."""
    counts = counts[counts > 0]
    if x <= 1.0 or not len(counts):
        return 0.0
    sizes, cells = np.unique(counts, return_counts=True)
    shares = sizes / float(counts.sum())
    if len(sizes) == 1:
        return -0.5 * float(cells[0]) * (x - 1.0 - math.log(x))
    # The derivative grows with t, from 1 - x < 0 to infinity. Any t gives a limit, so the last one does.
    low, high = 0.0, 0.5 / float(shares[-1])
    for _ in range(60):
        t = 0.5 * (low + high)
        low, high = (t, high) if float((cells * shares / (1.0 - 2.0 * t * shares)).sum()) < x else (low, t)
    return -low * x - 0.5 * float((cells * np.log1p(-2.0 * low * shares)).sum())


def _size_in_spite(errors: Errors, explained: Explained, alarm: float) -> Finding | None:
    """The size test with cells, and with each known error taken out along with its variance."""
    found = [
        _size(squares / np.maximum(even, known), explained.cells, alarm)
        for squares, even, known in _explained_squares(errors, explained.known)
    ]
    return None if None in found else _weakest([f for f in found if f is not None])


def _explained_squares(
    errors: Errors, known: Sequence[Prediction]
) -> Iterator[tuple[Floats, Floats, Floats]]:
    """Squares of the errors and their variance as they are, with P's roundings at their own spacings, and with them gone.

    Each explains a correct kernel. The variance comes twice: as if the roundings of the output were spread evenly over its
    spacings, and with the squares of the very roundings.
    """
    even = errors.format.ulp(errors.exact)
    even *= even
    even /= 12.0

    def rounding(exact: Floats) -> Floats:
        return (errors.format.round(exact) - exact) ** 2

    as_it_is = rounding(errors.exact)
    squares = errors.error**2
    yield squares, errors.noise + even, errors.noise + as_it_is
    for p in known:
        rest = errors.inner + p.variance
        yield squares, rest + even, rest + as_it_is
        yield (
            (errors.error - p.error) ** 2,
            errors.inner + even,
            errors.inner + rounding(errors.exact + p.error),
        )


def _slope(error: Floats, direction: Floats, errors: Errors, cells: Cells | None) -> tuple[float, float]:
    """t of the errors along a direction, and the limit of its two-sided p.

    Rows are weighted by their expected deviation and the length of the direction. Without cells, a quick look that errs
    towards alarm; with cells, the steady part of the error is taken off.
    """
    along, weight = _along(error, direction, errors)
    total = float(along.sum())
    if cells is None:
        square = float(along @ along)
    else:
        allowed = _allowed(direction, errors) * weight
        together = np.abs(cells.sum(along)) + cells.sum(allowed)
        square = float(together @ together)
        total = math.copysign(max(0.0, abs(total) - float(allowed.sum())), total)
    if square == 0.0:
        return 0.0, 1.0
    t = total / math.sqrt(square)
    return t, min(1.0, 2.0 * math.exp(-0.5 * t * t))


def _along(error: Floats, direction: Floats, errors: Errors) -> tuple[Floats, Floats]:
    """For each row the error along the direction in expected deviations, and what it was multiplied by for that."""
    spread = errors.spread * np.einsum("ij,ij->i", direction, direction)
    weight = 1.0 / np.sqrt(np.maximum(spread, 1e-300))
    along = error @ direction[0] if len(direction) == 1 else np.einsum("ij,ij->i", error, direction)
    along *= weight
    return along, weight


def _allowed(direction: Floats, errors: Errors) -> Floats:
    """For each row the steady error along the direction, with all elements aligned."""
    steady = np.sqrt(errors.inner) + errors.lost
    return np.einsum("ij,ij->i", np.broadcast_to(np.abs(direction), steady.shape), steady)


def size_of(squares: Floats, even: Floats, known: Floats, independent: float) -> Size:
    """The size of errors whose last rounding is either spread evenly or known, with so many independent rows."""
    ratio = np.divide(known, even, out=np.ones_like(known), where=even > 0.0)
    # What each row may have, in units of what is expected of an even spread.
    rows = np.maximum(1.0, ratio.mean(axis=1))
    expected = float(rows.mean())
    z2 = np.divide(squares, even, out=np.zeros_like(squares), where=even > 0.0)
    return Size(float(z2.mean()) / expected, independent * expected / float(rows.max()))


def lean_of(along: Floats, allowed: Floats, cells: Cells, scale: Floats) -> Lean:
    """Sums over cells, in units of `scale`, of errors in deviations and of what is allowed (both given by row)."""
    mean = cells.sum(along) / scale
    steady = cells.sum(allowed + LEAN) / scale
    together = np.abs(mean) + steady
    return Lean(float(mean.sum()), float(together @ together), float(steady.sum()), len(mean))


def _largest(error: Floats, errors: Errors, alarm: float) -> Finding | None:
    """Is any single error larger than chance explains? `steady` is allowed on top."""
    size = np.abs(error)
    spacing = errors.format.ulp(np.abs(errors.exact) + size)
    spacing *= 0.5
    size -= spacing
    size -= errors.steady
    deviation = np.sqrt(errors.noise)
    x = float(np.divide(size, deviation, out=np.zeros_like(size), where=deviation > 0.0).max())
    log_p = math.log(2.0 * error.size) - x * x / (2.0 * UNLUCKY)
    if x <= 0.0 or log_p >= math.log(alarm):
        return None
    return Finding(name="largest", statistic=x, p_value=math.exp(log_p), threshold=alarm)


class Cells:
    """Rows sorted into cells: `index` the cell of each row."""

    def __init__(self, index: NDArray[np.int64]) -> None:
        self.index = index
        self.counts = np.bincount(index)
        #: rows of the largest cell
        self.largest = int(self.counts.max())

    def sum(self, per_row: Floats) -> Floats:
        """Sums over each cell."""
        return np.bincount(self.index, weights=per_row, minlength=len(self.counts)).astype(np.float64)


def _cells(errors: Errors) -> Cells:
    """Rows in one cell if they are close together in their exact outputs, or in what `places` says."""
    deviation = np.sqrt(np.mean(errors.sigma * errors.sigma, axis=0))
    unit = CELL * np.where(deviation > 0.0, deviation, 1.0)
    near = [neighbourhoods(errors.exact / unit), neighbourhoods(errors.places())]
    # Connected components of the graph that joins each row to its two neighbourhoods.
    rows = len(errors.exact)
    sizes = [int(index.max()) + 1 for index in near]
    to = np.concatenate([near[0], near[1] + sizes[0]]) + rows
    graph = coo_array((np.ones(2 * rows), (np.tile(np.arange(rows), 2), to)), shape=(rows + sum(sizes),) * 2)
    _, label = connected_components(graph, directed=False)
    _, index = np.unique(label[:rows], return_inverse=True)
    return Cells(index.reshape(-1))


def neighbourhoods(places: Floats) -> NDArray[np.int64]:
    """Neighbourhoods: rows in the same square of a grid of width 1 in two fixed directions.

    Two directions tell rows apart that differ anywhere; rows that are the same up to rounding nearly always meet.
    """
    angles = np.arange(1, places.shape[1] + 1) * (math.pi * (math.sqrt(5.0) - 1.0))
    directions = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    directions /= np.maximum(np.sqrt((directions * directions).sum(0)), 1e-300)
    _, index = np.unique(np.floor(places @ directions + 0.5), axis=0, return_inverse=True)
    return index.reshape(-1)
