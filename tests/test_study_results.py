"""What a study says: slopes, comparisons, names, notes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from effattn.report import studies
from effattn.study import inverse, plans, results, summary, words
from effattn.study.engine import SCHEMA, Job, Point, Row, read_draws
from effattn.study.intervals import median_interval


def rows(errors: dict[tuple[str, int], Sequence[float]], **fields: object) -> list[Row]:
    return [
        Row(
            job=Job(point=Point(n=64, head_dim=8, method=method, size=size, **fields), draw=draw),  # type: ignore[arg-type]
            measures={"error": error, "row_p50": 1 - error},
        )
        for (method, size), sample in errors.items()
        for draw, error in enumerate(sample)
    ]


def curves(errors: dict[tuple[str, int], Sequence[float]], **fields: object) -> list[results.Curve]:
    (found,) = results.curves(rows(errors, **fields)).values()
    return found


FALLING = {("a", 16): [0.4, 0.4, 0.4], ("a", 64): [0.2, 0.2, 0.2]}

# -- slopes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [[1e-15, 2e-15, 3e-15], [0.0, 0.0, 0.0]])
def test_what_is_exact_does_not_enter_a_slope_and_is_said(exact: list[float]) -> None:
    (curve,) = curves({**FALLING, ("a", 256): exact})
    assert curve.slope[:3] == pytest.approx((-0.5, -0.5, -0.5))
    assert curve.exact == [256]
    said = results.comparisons([curve], size="k")
    assert said == ["Slopes leave out errors below 1e-06, which are rounding: at k = 256."]
    # A small error that isn't rounding counts; and then nothing is said.
    (curve,) = curves({**FALLING, ("a", 256): [1e-5] * 3})
    assert curve.slope.median < -2
    assert results.comparisons([curve], size="k") == []


def test_a_size_without_a_finite_median_does_not_enter_a_slope() -> None:
    (curve,) = curves({**FALLING, ("a", 256): [math.nan] * 3})
    assert curve.slope[:3] == pytest.approx((-0.5, -0.5, -0.5))
    (curve,) = curves({("a", 16): [1e-9], ("a", 64): [1.0]})
    assert math.isnan(curve.slope.median)
    assert results.table([curve], size="k")[-1].endswith("| 1.000 | - |")


# -- sentences ---------------------------------------------------------------------------------------------


def test_what_is_not_finite_is_said_to_be_so() -> None:
    nan = math.nan
    errors = {
        ("a", 16): [nan, nan, nan], ("a", 64): [0.1, nan, 0.2], ("b", 16): [0.1] * 3, ("b", 64): [math.inf, 0.1, 0.1],
        ("uniform", 0): [0.3] * 3, ("theory", 16): [math.inf] * 3,
    }  # fmt: skip
    assert results.comparisons(curves(errors), size="m") == [
        "NaN or infinite: a at m = 16, 3 of 3 draws; a at m = 64, 1 of 3 draws; b at m = 64, 1 of 3 draws."
    ]


def test_what_is_no_better_than_uniform_is_said_once_for_each_method() -> None:
    errors = {
        ("a", 16): [0.5], ("a", 64): [0.3], ("b", 16): [0.5], ("b", 64): [0.2], ("c", 16): [0.4], ("c", 64): [0.2],
        ("d", 16): [0.1], ("d", 64): [0.1], ("zero", 0): [1.0], ("uniform", 0): [0.3], ("theory", 16): [9.0],
    }  # fmt: skip
    assert results.comparisons(curves(errors), size="k") == [
        "No better than uniform attention (0.30) at any k: a.",
        "No better than uniform attention (0.30) at k = 16: b; c.",
    ]


def test_zeros_are_the_level_where_they_are_nearer_than_the_average() -> None:
    errors = {("a", 16): [1.1], ("a", 64): [1.03], ("zero", 0): [1.0], ("uniform", 0): [1.07]}
    assert results.comparisons(curves(errors), size="m") == [
        "No better than an output of zeros (1.00) at any m: a."
    ]


def test_what_is_exact_is_of_use() -> None:
    """For one token the average is exact attention."""
    found = curves({("a", 1): [0.0], ("b", 1): [0.5], ("uniform", 0): [0.0], ("zero", 0): [1.0]})
    assert results.comparisons(found, size="k") == ["No better than uniform attention (0.00) at k = 1: b."]


def test_comparisons_are_sentences_and_p_is_explained() -> None:
    errors = {
        ("positive, iid", 16): [0.5] * 5, ("positive, iid", 64): [0.5] * 5,
        ("positive, orthogonal", 16): [0.4, 0.4, 0.4, 0.4, 0.6], ("positive, orthogonal", 64): [0.4] * 5,
    }  # fmt: skip
    assert results.comparisons(curves(errors), size="m") == [
        "positive, orthogonal has a smaller error than positive, iid in 4 of 5 draws at m = 16 (p = 0.2), 5 of 5 at 64"
        " (p = 0.03)."
    ]
    assert words.SIGN_TEST in results.legend(rows(errors), size="m")
    assert words.SIGN_TEST not in results.legend(rows(FALLING), size="m")


def test_fewer_than_six_draws_have_no_interval_of_95_percent() -> None:
    """As the words for intervals say."""
    assert "fewer than six" in words.INTERVALS
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]).coverage < 0.95
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).coverage > 0.95


# -- the inverse question ----------------------------------------------------------------------------------


def test_nothing_is_interpolated_towards_a_size_where_a_method_is_exact() -> None:
    """k = 128 has an error of 0.6 and k = n none but rounding: that says nothing of k = 140."""
    (curve,) = curves({("a", 64): [0.7] * 6, ("a", 128): [0.6] * 6, ("a", 256): [3e-7] * 6})
    got = inverse.answer(curve, 0.1)
    assert got.smallest is not None
    assert (got.smallest.median, got.too_few) == (256, 128)
    # Between sizes that are not exact it is.
    got = inverse.answer(curve, 0.65)
    assert got.smallest is not None
    assert 64 < got.smallest.median < 128
    assert got.too_few is None


def test_sizes_between_the_last_that_misses_and_the_first_that_reaches_are_asked_for() -> None:
    (curve,) = curves({("a", 64): [0.7], ("a", 128): [0.6], ("a", 256): [3e-7]})
    assert inverse.between(curve, 0.1) == (128, 181)
    assert inverse.between(curve, 0.65) == (64, 91)
    assert inverse.between(curve, 0.7) is None  # the first size does
    assert inverse.between(curve, 1e-9) is None  # none does
    (near,) = curves({("a", 128): [0.6], ("a", 140): [0.1]})
    assert inverse.between(near, 0.1) is None
    (pairs,) = curves({("trigonometric, iid", 8): [0.6], ("trigonometric, iid", 16): [0.1]})
    assert inverse.between(pairs, 0.1) == (8, 12)  # 11 is odd
    (next_to,) = curves({("a", 1): [0.6], ("a", 2): [0.1]})
    assert inverse.between(next_to, 0.1) is None


def test_a_search_comes_nearer_to_the_smallest_size_and_ends(tmp_path: Path) -> None:
    """Of a method that is exact from size 45 on, and off by its own size below."""
    from effattn.cli import main

    out = tmp_path / "out"
    path = tmp_path / "runs.py"
    path.write_text(
        "def attention(q, k, v, *, size, generator):\n"
        "    import torch\n"
        "    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)\n"
        "    return exact if size >= 45 else 2 * exact\n",
        encoding="utf-8",
    )
    asked = ["study", "linformer", "--method", str(path), "--n", "64", "--values", "normal", "--draws", "2"]
    assert main([*asked, "--target-error", "0.1", "--out", str(out)]) == 0
    sizes = {row.job.point.size for row in read_draws(out / "draws.csv", schema=SCHEMA).rows}
    assert sizes == {1, 2, 4, 8, 16, 32, 64, 45, 38, 41}
    text = (out / summary.SUMMARY_MD).read_text()
    assert "| 45, where it is exact; 41 are too few |" in text
    # Sizes that are asked for are the only ones.
    only = tmp_path / "only"
    assert main([*asked, "--target-error", "0.1", "--size", "32,64", "--out", str(only)]) == 0
    assert {row.job.point.size for row in read_draws(only / "draws.csv", schema=SCHEMA).rows} == {32, 64}


def test_a_size_of_one_method_alone_has_no_column() -> None:
    errors = {(name, m): [0.1] for name in ("a", "b", "c", "d") for m in (8, 16)} | {("a", 11): [0.1]}
    assert results.table(curves(errors), size="m")[0] == "| method | m = 8 | m = 16 | slope |"
    half = errors | {("b", 11): [0.1]}
    assert "m = 11" in results.table(curves(half), size="m")[0]


def test_draws_that_never_get_there_are_counted() -> None:
    (curve,) = curves({("a", 16): [0.5] * 4, ("a", 64): [0.01, 0.01, 0.09, 0.09]})
    got = inverse.answer(curve, 0.055)
    assert (got.smallest, got.reached) == (None, 2)
    assert got.at_limit.median < 0.055, "a median over draws may be below what half of them don't reach"


# -- names -------------------------------------------------------------------------------------------------


def test_every_name_and_part_of_a_profile_is_explained() -> None:
    for study, profiles in plans.PROFILES.items():
        for plan in profiles.values():
            for job in plans.jobs(plan):
                point = job.point
                assert words.meaning(point.part, size="k"), point.part
                if point.part != "error":
                    continue
                known = words.explained([point.method], size="k")
                parts = [point.method] if point.method in words.NAMES else point.method.split(", ")
                assert len(known) == len(parts), (study, point.method)
                assert all("{" not in line for line in known)
    # A name that is somebody else's stands for itself.
    assert words.explained(["mine, fast", "uniform"], size="k") == [
        "uniform: control: the average of all values that a row sees"
    ]


def test_theory_is_said_to_be_a_prediction() -> None:
    errors = {**FALLING, ("theory", 16): [0.5], ("theory", 64): [0.25]}
    found = curves(errors)
    assert results.table(found, size="m")[-1].startswith("| theory (predicted) | 0.500 |")
    assert [curve.label for curve in results.chart(found[0].setting, found, size="m").curves] == [
        "a",
        "theory (predicted)",
    ]
    (line,) = (line for line in results.legend(rows(errors), size="m") if line.startswith("theory"))
    assert "predicted, not measured" in line


def test_parts_have_headings_of_their_own_and_errors_come_first(tmp_path: Path) -> None:
    every = [
        *rows({("R^T R", 64): [0.1, 0.3]}, part="lemma"),
        *rows({("singular values", 1): [0.25], ("singular values", 64): [1.0]}, part="spectrum"),
        *rows(FALLING, input_scale=0.5),
    ]
    summary.write(every, tmp_path, ["error", "row_p50"], title="Study linformer", size="k")
    text = (tmp_path / summary.SUMMARY_MD).read_text()
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [
        "Error of the output: n = 64, d = 8, normal x 0.5, fp32",
        "Singular values of the attention matrix: n = 64, d = 8, normal, fp32",
        "The bound of the paper's lemma: n = k = 64",
        "What the names mean",
    ]
    assert "| bound \\|x.y\\|, as printed | 0.200 (0.100 to 0.300) |" in text
    assert "| bound \\|x\\| \\|y\\| | 0.800 (0.700 to 0.900) |" in text
    assert (
        "| share of the sum of all | 0.250 | 1.000 |\n| error of the best matrix of rank k | 0.750 | 0.000 |"
        in text
    )
    assert "q and k are multiplied by it" in text
    # Only errors have slopes, and each row as many cells as its heading.
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert [("slope" in table) for table in tables] == [True, False, False]
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_moments_stand_against_the_square_of_z() -> None:
    found = curves({("positive", 500): [1.0], ("positive", 1000): [1.0]}, part="moments", dtype="fp64")
    assert results.table(found, size="m")[0] == r"| method | 1000 \|z\|^2 = 500 | 1000 \|z\|^2 = 1000 |"
    assert results.chart(found[0].setting, found, size="m").x_label == "1000 |z|^2"


# -- the command -------------------------------------------------------------------------------------------


def test_a_stranger_can_read_what_is_printed(tmp_path: Path, effattn_command) -> None:
    code, out, err = effattn_command(
        "study", "linformer", "--n", "16", "--head-dim", "4", "--values", "normal", "--size", "4,16", "--draws", "2",
        "--method", "mean pooling", "--out", tmp_path / "s",
    )  # fmt: skip
    assert code == 0, err
    assert "Error of the output: n = 16, d = 4, normal, fp32\nRelative error |O' - O| / |O|" in out
    assert re.search(r"^bound \|x\.y\|, as printed  0\.\d+", out, re.MULTILINE)
    assert re.search(r"^bound \|x\| \|y\|  +\d\.\d+", out, re.MULTILINE)
    assert "What the names mean\n- mean pooling: averages of n/k neighbours\n" in out
    assert "gaussian" not in out
    assert "which are rounding: at k = 16" in out
    # The report says the same.
    assert (
        studies.read(tmp_path / "s").tables[0].heading == "Error of the output: n = 16, d = 4, normal, fp32"
    )


@pytest.mark.parametrize(
    ("dtype", "note"), [("fp32", "in float32, on one"), ("bf16", "in float32, not in bf16, on one")]
)
def test_costs_say_their_dtype(tmp_path: Path, effattn_command, dtype: str, note: str) -> None:
    code, out, err = effattn_command(
        "study", "linformer", "--n", "16", "--head-dim", "4", "--values", "normal", "--dtype", dtype, "--draws", "1",
        "--method", "mean pooling", "--target-error", "2", "--out", tmp_path / "s",
    )  # fmt: skip
    assert code == 0, err
    assert note in out
    assert "k between two sizes that were measured is interpolated" in out
    assert "- mean pooling: averages of n/k neighbours" in out
    assert note in (tmp_path / "s" / "summary.md").read_text()


def test_an_answer_says_in_how_many_draws_and_where_it_is_exact(tmp_path: Path, effattn_command) -> None:
    code, out, err = effattn_command(
        "study", "linformer", "--n", "32", "--head-dim", "4", "--values", "normal", "--draws", "2", "--size", "8,32",
        "--method", "mean pooling", "--target-error", "0.1", "--out", tmp_path / "s",
    )  # fmt: skip
    assert code == 0, err
    assert re.search("^mean pooling  32, where it is exact; 8 are too few  ", out, re.MULTILINE)
    code, out, err = effattn_command(
        "study", "performer", "--n", "64", "--head-dim", "8", "--input-scale", "0.25", "--draws", "4", "--size", "32,64",
        "--method", "positive, orthogonal", "--target-error", "0.05", "--out", tmp_path / "t",
    )  # fmt: skip
    assert code == 0, err
    assert "none up to 64 in 2 of 4 draws, error 0.05" in out


def test_studies_of_costs_say_what_their_columns_are(tmp_path: Path, effattn_command) -> None:
    code, out, err = effattn_command("study", "traffic", "--out", tmp_path / "s")
    assert code == 0, err
    assert "- One head, d = 64, forward. counted: elements that the kernel loads and stores" in out
    assert "elements that the kernel loads and stores" in (tmp_path / "s" / "summary.md").read_text()
