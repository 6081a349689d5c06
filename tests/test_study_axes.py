"""Errors against the sequence length, the head dimension and the scale: what is put together, and what is not."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from effattn.cli import main
from effattn.report.studies import read
from effattn.study import axes, results
from effattn.study.engine import Job, Point, Row


def rows(
    *, n=(64, 128, 256), head_dim=(16,), scale=(1.0,), sizes=(8, 16, 32), methods=("positive, iid",), draws=7
) -> list[Row]:
    """Errors n^0.5 d^-0.25 x^2 m^-0.5, another factor for each draw."""
    made = []
    for method, length, d, x, m, draw in itertools.product(methods, n, head_dim, scale, sizes, range(draws)):
        point = Point(n=length, head_dim=d, input_scale=x, method=method, size=m)
        error = length**0.5 * d**-0.25 * x**2 * max(m, 1) ** -0.5 * 1.1**draw
        made.append(Row(job=Job(point=point, draw=draw), measures={"error": error}))
    return made


@pytest.mark.parametrize(
    ("grid", "axis", "slope"),
    [
        ({"n": (64, 128, 256)}, "n", 0.5),
        ({"n": (64,), "head_dim": (16, 64)}, "head_dim", -0.25),
        ({"n": (64,), "scale": (0.5, 1.0, 2.0)}, "input_scale", 2.0),
    ],
)
def test_one_axis_that_varies_is_shown_with_its_slope(grid: dict, axis: str, slope: float) -> None:
    (found,) = axes.along(results.curves(rows(**grid)))
    assert (found.axis, found.size) == (axis, 16)
    (curve,) = found.curves
    assert list(curve.sizes) == sorted({getattr(row.job.point, axis) for row in rows(**grid)})
    assert curve.slope.median == pytest.approx(slope)
    # A study of one setting has nothing to show.
    assert axes.along(results.curves(rows(n=(64,)))) == []


def test_settings_that_differ_in_more_than_the_axis_are_kept_apart() -> None:
    found = axes.along(results.curves(rows(n=(64, 128), scale=(0.5, 1.0))))
    assert [(line.axis, line.where.n, line.where.input_scale) for line in found] == [
        ("n", 64, 0.5), ("n", 64, 1.0), ("input_scale", 64, 0.5), ("input_scale", 128, 0.5),
    ]  # fmt: skip
    by_scale = [line.curves[0].intervals[0].median for line in found if line.axis == "n"]
    assert by_scale[1] == pytest.approx(4 * by_scale[0])
    assert len({axes.chart(line, size="m").name for line in found}) == 4


def test_the_size_is_one_that_every_setting_has() -> None:
    few = rows(n=(64,), sizes=(4, 8)) + rows(n=(128,), sizes=(8, 16))
    (found,) = axes.along(results.curves(few))
    assert found.size == 8
    assert axes.along(results.curves(rows(n=(64,), sizes=(4,)) + rows(n=(128,), sizes=(8,)))) == []


def test_a_method_that_a_setting_lacks_is_left_out_and_what_has_no_size_stays() -> None:
    more = (
        rows(n=(64, 128))
        + rows(n=(64,), methods=("top-k",))
        + rows(n=(64, 128), sizes=(0,), methods=("uniform",))
    )
    (found,) = axes.along(results.curves(more))
    assert [curve.method for curve in found.curves] == ["positive, iid", "uniform"]
    table = axes.table(found)
    assert table[0] == "| method | n = 64 | n = 128 | slope in n |"
    assert [line.count("|") for line in table] == [5] * 4


def test_the_study_the_summary_and_the_report_have_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    asked = [
        "study",
        "linformer",
        "--method",
        "mean pooling",
        "--n",
        "16,32",
        "--size",
        "4,8",
        "--draws",
        "2",
    ]
    assert main([*asked, "--values", "normal", "--out", str(out)]) == 0
    title = "Error against the sequence length n: k = 4, d = 16, normal, x = 1, fp32"
    assert title in capsys.readouterr().out
    assert f"## {title}" in (out / "summary.md").read_text(encoding="utf-8")
    drawn = out / "along-n-k4-d16-normal-x1-fp32.svg"
    assert "sequence length n" in drawn.read_text(encoding="utf-8")
    assert drawn.name in (out / "summary.md").read_text(encoding="utf-8")
    shown = {table.heading: table for table in read(out).tables}[title]
    assert shown.sizes == [16, 32]
    assert {point["size"] for point in shown.points} == {16, 32}
    assert {"mean pooling", "uniform"} <= {method for method, _ in shown.rows}
