"""The tests on errors: their false-alarm probability holds, and they find what they are for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from effattn.tolerances import statistics
from effattn.tolerances.formats import FORMATS
from effattn.tolerances.statistics import Errors, Prediction, examine

ROWS, COLUMNS = 96, 8

#: a level that can be checked by simulation; the tests' bounds hold at each level
LEVEL = 1e-2


def errors_of(
    error: np.ndarray,
    exact: np.ndarray,
    *,
    noise: np.ndarray | float = 1e-3,
    inner: float = 1e-12,
    predictions: tuple[Prediction, ...] = (),
    spread: float = 1e3,
) -> Errors:
    """Errors in bf16 with deviation `noise` before the output is rounded; queries `spread` roundings apart."""
    rng = np.random.default_rng(0)
    rows, columns = error.shape
    variance = np.broadcast_to(np.asarray(noise, float) ** 2, error.shape)
    ulp = FORMATS["bf16"].ulp(exact)

    def known() -> Iterator[Prediction]:
        return iter(predictions)

    return Errors(
        error=error,
        exact=exact,
        sigma=np.sqrt(variance + ulp**2 / 12.0),
        noise=variance,
        inner=np.full(error.shape, inner**2),
        steady=np.zeros(error.shape),
        lost=np.zeros(error.shape),
        format=FORMATS["bf16"],
        directions={
            "mean": np.ones((1, columns)),
            "v-mean": np.broadcast_to(np.linspace(0.5, 1.0, columns), error.shape),
            "output": exact,
            "top key": rng.standard_normal(error.shape),
            "scale": rng.standard_normal(error.shape),
        },
        predictions=known,
        places=lambda: spread * rng.standard_normal((rows, 4)),
    )


def rounded(before: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """The error after rounding to bf16."""
    return FORMATS["bf16"].round(exact + before) - exact


Simulation = Callable[[np.random.Generator], Errors]


def independent(rng: np.random.Generator) -> Errors:
    exact = rng.standard_normal((ROWS, COLUMNS))
    return errors_of(rounded(1e-3 * rng.standard_normal(exact.shape), exact), exact)


def one_rounding_a_row(rng: np.random.Generator) -> Errors:
    """All elements of a row share one rounding, uniform: P with one weight that counts."""
    exact = rng.standard_normal((ROWS, COLUMNS))
    uniform = rng.uniform(-1.0, 1.0, (ROWS, 1)) * math.sqrt(3.0)
    return errors_of(rounded(1e-3 * uniform * np.ones(COLUMNS), exact), exact)


def few_keys(rng: np.random.Generator) -> Errors:
    """P of five keys, V of one sign: errors of a row are correlated, and so are their directions."""
    values = rng.uniform(0.5, 1.5, (5, COLUMNS))
    weights = rng.dirichlet(np.ones(5), ROWS)
    roundings = rng.uniform(-1.0, 1.0, (ROWS, 5)) * 2.0**-8
    exact = weights @ values
    noise = np.sqrt((weights**2) @ (values**2) / 3.0) * 2.0**-8
    return errors_of(rounded((weights * roundings) @ values, exact), exact, noise=noise)


def rows_of_any_size(rng: np.random.Generator) -> Errors:
    """A row's errors are symmetric, and of a size that the prediction is above for most rows."""
    exact = rng.standard_normal((ROWS, COLUMNS))
    size = rng.choice([0.01, 0.1, 1.0], (ROWS, 1))
    return errors_of(rounded(1e-3 * size * rng.standard_normal(exact.shape), exact), exact)


def equal_outputs(rng: np.random.Generator) -> Errors:
    """All rows have the same output but for less than its spacing, so all are rounded to the same side."""
    exact = rng.uniform(0.5, 1.0, (1, COLUMNS)) + 1e-5 * rng.standard_normal((ROWS, COLUMNS))
    return errors_of(rounded(1e-6 * rng.standard_normal(exact.shape), exact), exact, noise=1e-6)


def half_the_outputs_equal(rng: np.random.Generator) -> Errors:
    exact = rng.standard_normal((ROWS, COLUMNS))
    exact[:, ::2] = rng.uniform(0.5, 1.0, (1, COLUMNS // 2)) + 1e-5 * rng.standard_normal(
        (ROWS, COLUMNS // 2)
    )
    return errors_of(rounded(1e-6 * rng.standard_normal(exact.shape), exact), exact, noise=1e-6)


def equal_queries(rng: np.random.Generator) -> Errors:
    """Rows with the same scores round alike, though a mask gives each another output."""
    exact = rng.standard_normal((ROWS, COLUMNS))
    return errors_of(
        rounded(2e-3 * rng.standard_normal((1, COLUMNS)) * np.ones((ROWS, 1)), exact),
        exact,
        noise=2e-3,
        spread=1e-3,
    )


def one_offset_in_all_rows(rng: np.random.Generator) -> Errors:
    """An entry between two codes, off to one side in all rows; its size is in variance and steady part."""
    exact = rng.standard_normal((ROWS, COLUMNS))
    offset = rng.choice([1e-4, 2e-3, 1e-2]) * rng.choice([-1.0, 1.0], (1, COLUMNS))
    errors = errors_of(rounded(1e-3 * rng.standard_normal(exact.shape) + offset, exact), exact)
    size = np.broadcast_to(np.abs(offset), exact.shape)
    return replace(
        errors,
        noise=errors.noise + size**2,
        sigma=np.sqrt(errors.sigma**2 + size**2),
        steady=errors.steady + size,
        lost=errors.lost + size,
    )


def test_an_offset_that_nobody_allows_for_is_found() -> None:
    errors = one_offset_in_all_rows(np.random.default_rng(1))
    assert not examine(errors, alarm=LEVEL)
    size = errors.lost
    unaware = replace(
        errors,
        noise=errors.noise - size**2,
        sigma=np.sqrt(errors.sigma**2 - size**2),
        steady=size * 0.0,
        lost=size * 0.0,
    )
    assert {finding.name for finding in examine(unaware, alarm=LEVEL)} & {"size", "v-mean", "mean"}


@pytest.mark.parametrize(
    "simulate",
    [
        one_offset_in_all_rows,
        independent,
        one_rounding_a_row,
        few_keys,
        rows_of_any_size,
        equal_outputs,
        half_the_outputs_equal,
        equal_queries,
    ],
)
def test_false_alarms_are_no_more_frequent_than_stated(simulate: Simulation) -> None:
    draws, alarms = 800, Counter()
    for seed in range(draws):
        errors = simulate(np.random.default_rng(seed))
        alarms.update(finding.name for finding in examine(errors, alarm=LEVEL))
    # 4 standard deviations above the stated rate, for each test.
    most = draws * LEVEL + 4.0 * math.sqrt(draws * LEVEL)
    assert all(count <= most for count in alarms.values()), alarms


@pytest.mark.parametrize("n", [1, 3, 20, 128, 4096])
def test_the_limit_for_the_size_is_above_the_chi_squared_tail(n: int) -> None:
    for x in (1.01, 1.1, 1.5, 3.0):
        limit = -0.5 * n * (x - 1.0 - math.log(x))
        assert stats.chi2.logsf(n * x, n) <= limit


@pytest.mark.parametrize("counts", [[1] * 30, [7] * 5, [1] * 40 + [9], [1, 2, 3, 4, 20], [50, 0, 1]])
def test_the_limit_for_cells_of_any_size_holds_where_their_rows_are_all_alike(counts: list[int]) -> None:
    cells = np.array(counts)
    squares = np.random.default_rng(0).standard_normal((20000, len(cells))) ** 2
    mean = squares @ cells / cells.sum()
    for x in (1.2, 1.5, 2.0, 4.0):
        limit = statistics.log_tail(x, cells)
        assert (mean > x).mean() <= math.exp(limit)
        # No worse than as if the largest cell were all of them, nor better than rows without cells.
        largest = cells.sum() / cells.max()
        assert -0.5 * cells.sum() * (x - 1.0 - math.log(x)) - 1e-9 <= limit
        assert limit <= -0.5 * largest * (x - 1.0 - math.log(x)) + 1e-9
    assert statistics.log_tail(0.9, cells) == 0.0


def test_a_single_large_cell_does_not_hide_what_many_rows_show() -> None:
    # Rows and one cell of eight: an eighth of the rows would say nothing.
    cells = np.array([1] * 2000 + [8])
    assert statistics.log_tail(1.3, cells) < math.log(statistics.ALARM / statistics.TESTS)
    assert -0.5 * (2008 / 8) * (0.3 - math.log(1.3)) > math.log(0.005)


def test_signs_of_symmetric_errors_have_the_tail_of_the_limit() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.pareto(1.0, 60) + 0.01  # no mean, let alone a variance
    signs = rng.choice([-1.0, 1.0], (20000, 60))
    t = (signs * sizes).sum(1) / np.sqrt((sizes**2).sum())
    for limit in (1.0, 2.0, 3.0):
        assert (t > limit).mean() <= math.exp(-0.5 * limit * limit)


@pytest.mark.parametrize("direction", ["mean", "v-mean", "output", "top key", "scale"])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_a_bias_below_the_noise_is_found_in_its_direction(direction: str, sign: float) -> None:
    rng = np.random.default_rng(3)
    exact = rng.standard_normal((400, COLUMNS))
    errors = errors_of(np.zeros_like(exact), exact)
    along = np.broadcast_to(errors.directions[direction], exact.shape)
    along = along / np.sqrt((along**2).mean())
    noise = 1e-3 * rng.standard_normal(exact.shape)
    before = errors_of(rounded(noise, exact), exact)
    after = errors_of(rounded(noise + sign * 7e-4 * along, exact), exact)
    assert examine(before) == []
    found = {finding.name: finding for finding in examine(after)}
    assert direction in found, found
    assert math.copysign(1.0, found[direction].statistic) == sign
    assert found[direction].p_value < found[direction].threshold == statistics.ALARM / statistics.TESTS


def test_noise_of_one_and_a_half_times_the_size_is_found() -> None:
    rng = np.random.default_rng(4)
    exact = rng.standard_normal((400, COLUMNS))
    noise = rng.standard_normal(exact.shape)
    assert examine(errors_of(rounded(3e-3 * noise, exact), exact, noise=3e-3)) == []
    (found,) = examine(errors_of(rounded(4.5e-3 * noise, exact), exact, noise=3e-3))
    assert found.name == "size"
    assert 1.2 < found.statistic < 1.5


def test_a_single_error_is_found_beyond_its_last_rounding_only() -> None:
    rng = np.random.default_rng(5)
    exact = rng.standard_normal((50, COLUMNS))
    noise = 1e-4 * rng.standard_normal(exact.shape)
    error = rounded(noise, exact)
    assert examine(errors_of(error, exact, noise=1e-4)) == []
    # Half a spacing of the output says nothing, but 2e-3 more in one element does.
    noise[7, 3] += float(FORMATS["bf16"].ulp(exact[7:8, 3])[0]) + 2e-3
    (found,) = examine(errors_of(rounded(noise, exact), exact, noise=1e-4))
    assert found.name == "largest"
    assert found.statistic > 11.0


def test_a_steady_error_of_the_accumulators_is_no_bias() -> None:
    rng = np.random.default_rng(6)
    exact = 100.0 * rng.standard_normal((400, COLUMNS))
    noise = 1e-3 * rng.standard_normal(exact.shape) + 3e-4
    fp32 = FORMATS["fp32"]
    error = fp32.round(exact + noise) - exact
    quiet = errors_of(error, exact, noise=1e-3, inner=1e-3)
    loud = errors_of(error, exact, noise=1e-3, inner=1e-6)
    for errors in (quiet, loud):
        object.__setattr__(errors, "format", fp32)
    assert examine(quiet) == []
    assert "mean" in {finding.name for finding in examine(loud)}


def test_what_rounding_p_is_known_to_do_is_taken_out_and_nothing_else() -> None:
    rng = np.random.default_rng(7)
    exact = rng.standard_normal((200, COLUMNS))
    known = np.full(exact.shape, 2e-3)  # of one sign in all rows
    error = rounded(known + 1e-4 * rng.standard_normal(exact.shape), exact)
    prediction = Prediction(known, np.full(exact.shape, 1e-8))
    assert {f.name for f in examine(errors_of(error, exact, noise=5e-4))} >= {"mean", "v-mean"}
    assert examine(errors_of(error, exact, noise=5e-4, inner=1e-4, predictions=(prediction,))) == []
    # One order that explains them is enough; one that does not is no excuse.
    other = Prediction(-known, np.full(exact.shape, 1e-8))
    assert examine(errors_of(error, exact, noise=5e-4, inner=1e-4, predictions=(other, prediction))) == []
    assert {f.name for f in examine(errors_of(error, exact, noise=5e-4, predictions=(other,)))} >= {"mean"}
    worse = rounded(known + 2e-3 + 1e-4 * rng.standard_normal(exact.shape), exact)
    assert {f.name for f in examine(errors_of(worse, exact, noise=5e-4, predictions=(prediction,)))} >= {
        "mean"
    }


def test_a_row_too_few_says_nothing_about_direction() -> None:
    # 20 rows with the same sign happen by chance once in a million: not once in ten billion.
    exact = np.random.default_rng(8).standard_normal((20, COLUMNS))
    assert examine(errors_of(np.full(exact.shape, 1e-3), exact, noise=1e-2)) == []
