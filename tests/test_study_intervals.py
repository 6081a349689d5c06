"""Statistics of studies: intervals cover as often as they say, slopes and signs are found."""

from __future__ import annotations

import math

import numpy as np
import pytest

from effattn.study.intervals import mean_interval, median_interval, sign_test, slope


def test_a_median_interval_covers_as_often_as_it_says() -> None:
    """Of Cauchy samples, which have no mean. 95 % stated: of 2,000 between 92 and 99.5 %, for each size."""
    random = np.random.default_rng(0)
    for n in (6, 15, 40):
        intervals = [median_interval(list(random.standard_cauchy(n))) for _ in range(2000)]
        held = np.mean([i.low < 0 < i.high for i in intervals])
        assert intervals[0].coverage - 0.02 < held < intervals[0].coverage + 0.02
        assert 0.95 <= intervals[0].coverage < 1
    assert median_interval([1.0, 2.0, 4.0]).coverage == 0.75  # three draws can't say more


def test_nan_counts_as_the_largest() -> None:
    got = median_interval([3.0, math.nan, 1.0, 2.0, math.nan])
    assert got.median == 3.0
    assert math.isnan(got.high)


def test_slopes_are_found_with_their_intervals() -> None:
    random = np.random.default_rng(1)
    sizes = (16, 64, 256)
    errors = [[3 * m**-0.5 * math.exp(0.05 * random.normal()) for _ in range(15)] for m in sizes]
    got = slope(sizes, errors)
    assert got.low < -0.5 < got.high
    assert got.high - got.low < 0.1
    assert math.isnan(slope((16,), [[1.0]]).median)


def test_the_sign_test_counts() -> None:
    assert sign_test([0.0] * 15, [1.0] * 15) == 2.0**-15
    assert sign_test([1.0, 0.0], [0.0, 1.0]) == 0.75


def test_mean_intervals_are_students() -> None:
    got = mean_interval([1.0, 2.0, 3.0, 4.0], coverage=0.95)
    assert got.median == 2.5
    assert got.high - got.median == pytest.approx(3.182446 * np.std([1, 2, 3, 4], ddof=1) / 2, rel=1e-5)
