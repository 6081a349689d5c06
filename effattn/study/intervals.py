"""Intervals without assumptions about distributions: order statistics and signs.

Errors of random features have heavy tails (their variance grows as exp(|z|^2)), so that means over few draws say
little and normal intervals lie. Everything but `mean_interval` holds for any continuous distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A median and an interval for it."""

    median: float
    low: float
    high: float
    coverage: float  #: the probability that (low, high) holds the true median; 1 for what is deterministic
    draws: int


def median_interval(sample: Sequence[float], *, coverage: float = 0.95) -> Interval:
    """The median and the shortest symmetric pair of order statistics that covers the true one with `coverage`.

    Few draws can't reach it: then the interval is the whole range, with the coverage that this has, 1 - 2^(1-n).
    NaN counts as the largest. ValueError for an empty sample.
    """
    ordered = np.sort(np.asarray(sample, np.float64))
    n = len(ordered)
    if n == 0:
        raise ValueError("an empty sample has no median")
    middle = float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)
    # P(the r smallest all lie above, or the r largest all below) = 2 P(Binomial(n, 1/2) < r)
    tail, r = 2.0**-n, 1
    while r < n // 2 and 1 - 2 * (tail + math.comb(n, r) * 2.0**-n) >= coverage:
        tail += math.comb(n, r) * 2.0**-n
        r += 1
    return Interval(middle, float(ordered[r - 1]), float(ordered[n - r]), max(0.0, 1 - 2 * tail), n)


def constant(value: float) -> Interval:
    """What no draw enters."""
    return Interval(value, value, value, 1.0, 1)


def mean_interval(sample: Sequence[float], *, coverage: float = 0.999) -> Interval:
    """The mean and Student's interval for it: for averages over many draws each, which are normal by themselves.

    `median` holds the mean. ValueError for fewer than two.
    """
    from scipy import stats

    values = np.asarray(sample, np.float64)
    if len(values) < 2:
        raise ValueError("an interval for a mean needs two values")
    half = float(
        stats.t.ppf((1 + coverage) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    )
    mean = float(values.mean())
    return Interval(mean, mean - half, mean + half, coverage, len(values))


def slope(sizes: Sequence[float], errors: Sequence[Sequence[float]]) -> Interval:
    """The slope of log(error) against log(size): least squares for each draw, then median and interval over draws.

    errors[i][r] is that of size i in draw r. Draws with a value that isn't positive and finite are left out;
    NaN everywhere if that leaves none, or fewer than two sizes.
    """
    table = np.asarray(errors, np.float64)
    good = table[:, (np.isfinite(table) & (table > 0)).all(0)]
    if len(sizes) < 2 or good.shape[1] == 0:
        return Interval(math.nan, math.nan, math.nan, 0.0, 0)
    x = np.log(np.asarray(sizes, np.float64))
    x = x - x.mean()
    return median_interval(list(x @ np.log(good) / (x @ x)))


def sign_test(first: Sequence[float], second: Sequence[float]) -> float:
    """P-value of "first isn't below second": the probability of as many pairs with first < second by chance."""
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    below = sum(a < b for a, b in pairs)
    return sum(math.comb(len(pairs), i) for i in range(below, len(pairs) + 1)) / 2.0 ** len(pairs)
