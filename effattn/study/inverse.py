"""The inverse question: which k or m gives a wanted error, and what does it cost?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from effattn.errors import RequestError
from effattn.study.intervals import Interval, median_interval
from effattn.study.results import LEAST_DRAWN, Curve

#: unit roundoff of what the output is rounded to
_ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24, "fp64": 2.0**-53}


class Answer(NamedTuple):
    """What one method needs."""

    method: str
    #: size with its interval over draws; None where no size up to the largest suffices
    smallest: Interval | None
    #: whether a smaller size, which was not tried, may suffice too: the smallest that was tried does
    open_below: bool
    limit: int  #: the largest size that was looked at
    at_limit: Interval  #: the error there
    reached: (
        int  #: the draws that get there at some size; `smallest` is None unless more than half of them do
    )
    #: the size below `smallest` that was tried and is too few, where the answer was exact and nothing lies between
    too_few: int | None


def check_target(target: float, dtypes: Sequence[str] = ()) -> None:
    """RequestError for a target that isn't an error, or that rounding to one of the dtypes alone exceeds."""
    if not 0 < target < math.inf:
        raise RequestError(f"--target-error {target:g}: expected a positive number, such as 0.05")
    for dtype in dtypes:
        if target < _ROUNDOFF[dtype]:
            raise RequestError(
                f"--target-error {target:g} is below {_ROUNDOFF[dtype]:.1g}, the unit roundoff of {dtype}: rounding"
                " alone is more. Take a larger target or a wider dtype"
            )


def sizes_up_to(n: int, *, pairs: bool) -> tuple[int, ...]:
    """Powers of two and n; even ones where features come in pairs."""
    least = 2 if pairs else 1
    last = max(least, n - n % least)
    return (*(2**i for i in range(least - 1, 30) if 2**i < last), last)


#: sizes this near to each other are not told apart
NEAR = 1.125


def between(curve: Curve, target: float) -> tuple[int, int] | None:
    """Where a curve first gets to the target: the last size whose median misses it and a size halfway, by ratio, from there
    to the next. None where that is near enough, or there is no such size."""
    medians = [got.median for got in curve.intervals]
    first = next((i for i, median in enumerate(medians) if median <= target), 0)
    if first == 0:
        return None
    below, above = curve.sizes[first - 1], curve.sizes[first]
    # Features of these come in pairs.
    step = 2 if curve.method.startswith(("trigonometric", "hyperbolic")) else 1
    middle = round(math.sqrt(below * above) / step) * step
    if above <= NEAR * below or not below < middle < above:
        return None
    return below, middle


def answer(curve: Curve, target: float) -> Answer:
    """The smallest size with an error of at most `target`, for each draw between two sizes by interpolation of the
    logarithms, then median and interval over draws. A draw that never gets there counts as infinite. Towards a size
    where a method is exact, such as k = n, nothing is interpolated: the error falls there, not on the way."""
    found = [_crossing(curve.sizes, errors, target) for errors in zip(*curve.samples, strict=True)]
    interval = median_interval(found)
    smallest = interval if math.isfinite(interval.median) else None
    open_below = smallest is not None and smallest.median <= curve.sizes[0] and curve.sizes[0] > 1
    too_few = None
    if smallest is not None and smallest.median in curve.exact and smallest.median > curve.sizes[0]:
        too_few = curve.sizes[curve.sizes.index(int(smallest.median)) - 1]
    reached = sum(math.isfinite(size) for size in found)
    return Answer(curve.method, smallest, open_below, curve.sizes[-1], curve.intervals[-1], reached, too_few)


def _crossing(sizes: Sequence[int], errors: Sequence[float], target: float) -> float:
    best = np.minimum.accumulate(np.where(np.isnan(errors), np.inf, np.asarray(errors, np.float64)))
    reached = np.flatnonzero(best <= target)
    if reached.size == 0:
        return math.inf
    i = int(reached[0])
    if i == 0 or not math.isfinite(best[i - 1]) or best[i] < LEAST_DRAWN <= target:
        return float(sizes[i])
    share = math.log(best[i - 1] / target) / math.log(best[i - 1] / max(best[i], 1e-300))
    return float(
        math.ceil(math.exp(math.log(sizes[i - 1]) + share * math.log(sizes[i] / sizes[i - 1])) - 1e-9)
    )
