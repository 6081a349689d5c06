"""What a study says in the end: medians with intervals, slopes, comparisons, as CSV, Markdown and charts."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from effattn.report import text
from effattn.study import charts
from effattn.study.engine import Point, Row, by_point
from effattn.study.intervals import Interval, constant, mean_interval, median_interval, sign_test, slope

SUMMARY_CSV = "summary.csv"
SUMMARY_MD = "summary.md"
#: method -> how a chart draws it, if it is none of those that a study is about
STYLES = {
    "theory": "theory",
    "truncated SVD": "floor",
    "zero": "control",
    "uniform": "control",
    "shuffled V": "control",
}
#: part of a study -> what its measure is called
MEASURES = {
    "error": "relative error of the output",
    "construction": "relative error of the output",
    "spectrum": "share of the sum of singular values",
    "lemma": "share of pairs within the bound",
    "moments": "measured / theoretical mean square error",
}
#: Relative errors below it are left off the axis of a chart: exact but for rounding, which would stretch it to 1e-15.
LEAST_DRAWN = 1e-6
BELOW_THE_AXIS = f"Errors under {LEAST_DRAWN:g} are below the axis."


class Setting(NamedTuple):
    """What one chart shows: everything but method and size."""

    part: str
    n: int
    head_dim: int
    values: str
    input_scale: float
    dtype: str
    causal: bool

    def words(self) -> str:
        """For a title."""
        causal = ", causal" if self.causal else ""
        scale = f" x {self.input_scale:g}" if self.input_scale != 1 else ""
        return f"n = {self.n}, d = {self.head_dim}, {self.values}{scale}, {self.dtype}{causal}"

    def slug(self) -> str:
        """For a file's name."""
        values = self.values.replace("real:", "").replace("/", "-")
        return f"{self.part}-n{self.n}-d{self.head_dim}-{values}-x{self.input_scale:g}-{self.dtype}" + (
            "-causal" if self.causal else ""
        )


class Curve(NamedTuple):
    """One method in one setting, for one measure."""

    setting: Setting
    method: str
    sizes: list[int]
    intervals: list[Interval]
    samples: list[list[float]]

    @property
    def slope(self) -> Interval:
        """Of log(median) against log(size)."""
        return slope(self.sizes, self.samples) if len(self.sizes) > 1 else slope([], [[]])


def setting(point: Point) -> Setting:
    """The setting that a point belongs to."""
    return Setting(
        point.part, point.n, point.head_dim, point.values, point.input_scale, point.dtype, point.causal
    )


def curves(rows: Sequence[Row], measure: str = "error") -> dict[Setting, list[Curve]]:
    """The curves of every setting, methods in the order in which they were measured."""
    groups = by_point(rows)
    order = list(dict.fromkeys(row.job.point.method for row in rows))
    found: dict[tuple[Setting, str], dict[int, list[float]]] = {}
    for point, of_point in groups.items():
        sample = [row.measures[measure] for row in of_point if measure in row.measures]
        if sample:
            found.setdefault((setting(point), point.method), {})[point.size] = sample
    result: dict[Setting, list[Curve]] = {}
    for (where, method), sizes in sorted(
        found.items(), key=lambda item: (item[0][0], order.index(item[0][1]))
    ):
        count = min(map(len, sizes.values()))
        samples = [sizes[size][:count] for size in sorted(sizes)]
        intervals = [_interval(sizes[size], where.part) for size in sorted(sizes)]
        result.setdefault(where, []).append(Curve(where, method, sorted(sizes), intervals, samples))
    return result


def _interval(sample: Sequence[float], part: str) -> Interval:
    if part == "moments" and len(sample) > 1:
        return mean_interval(sample)
    return constant(sample[0]) if len(sample) == 1 else median_interval(sample)


def write(
    rows: Sequence[Row],
    folder: Path,
    columns: Sequence[str],
    *,
    title: str,
    size: str,
    lead: Sequence[str] = (),
) -> list[Path]:
    """summary.csv, summary.md and one chart for each setting. Returns the charts; none without matplotlib.

    `lead` are lines of Markdown that stand first in summary.md.
    """
    with (folder / SUMMARY_CSV).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        fields = [*Setting._fields, "method", "size", "measure", "median", "low", "high", "coverage", "draws"]
        writer.writerow(fields)
        for measure in columns:
            for where, of_setting in curves(rows, measure).items():
                for curve in of_setting:
                    for number, got in zip(curve.sizes, curve.intervals, strict=True):
                        writer.writerow([*where, curve.method, number, measure, *got])
    drawn = []
    parts = [f"# {title}", "", *lead]
    for where, of_setting in curves(rows).items():
        parts += [f"## {where.part}: {where.words()}", ""]
        if charts.available() and any(len(curve.sizes) > 1 for curve in of_setting):
            path = charts.draw(chart(where, of_setting, size=size), folder)
            drawn.append(path)
            parts += [f"![{where.words()}]({path.name})", ""]
        parts += [*table(of_setting, size=size), "", *(f"- {line}" for line in comparisons(of_setting)), ""]
    (folder / SUMMARY_MD).write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return drawn


def chart(where: Setting, of_setting: Sequence[Curve], *, size: str) -> charts.Chart:
    """The chart of one setting; what has no size is a horizontal line."""
    sizes = sorted({n for curve in of_setting for n in curve.sizes if n})
    drawn = []
    for curve in of_setting:
        flat = curve.sizes == [0]
        x = [sizes[0], sizes[-1]] if flat else curve.sizes
        points = curve.intervals * 2 if flat else curve.intervals
        drawn.append(
            charts.Curve(
                label=curve.method, x=x, y=[p.median for p in points], low=[p.low for p in points],
                high=[p.high for p in points], style=STYLES.get(curve.method, "method"),
            )
        )  # fmt: skip
    errors = where.part in ("error", "construction")
    return charts.Chart(
        name=where.slug(), title=where.words(), x_label=size, y_label=MEASURES[where.part], curves=drawn,
        least=LEAST_DRAWN if errors else 0.0, below=BELOW_THE_AXIS,
    )  # fmt: skip


def table(of_setting: Sequence[Curve], *, size: str) -> list[str]:
    """Medians with intervals as Markdown, one row a method."""
    sizes = sorted({n for curve in of_setting for n in curve.sizes if n})
    shown = sizes if len(sizes) <= 5 else sorted({sizes[round(i * (len(sizes) - 1) / 4)] for i in range(5)})
    lines = [
        "| method | " + " | ".join(f"{size} = {n}" for n in shown) + " | slope |",
        "|---|" + "---|" * (len(shown) + 1),
    ]
    for curve in of_setting:
        known = dict(zip(curve.sizes, curve.intervals, strict=True))
        cells = [cell(known.get(n) or known.get(0)) for n in shown] or [cell(known.get(0))]
        lines.append(f"| {text.markdown(curve.method)} | " + " | ".join(cells) + f" | {cell(curve.slope)} |")
    if not shown:
        lines[:2] = ["| method | value | slope |", "|---|---|---|"]
    return lines


def cell(got: Interval | None) -> str:
    """0.31 (0.28 to 0.35)."""
    if got is None or (math.isnan(got.median) and got.draws == 0):
        return text.MISSING
    middle = text.number(got.median, digits=3)
    if got.low == got.high:
        return middle
    return f"{middle} ({text.number(got.low, digits=3)} to {text.number(got.high, digits=3)})"


def comparisons(of_setting: Sequence[Curve]) -> list[str]:
    """Sentences on what is below what, over the same draws, and on what is no better than knowing nothing."""
    by_method = {curve.method: curve for curve in of_setting}
    lines = []
    for better, worse in (
        ("positive, orthogonal", "positive, iid"),
        ("trigonometric, orthogonal", "trigonometric, iid"),
        ("positive, iid", "trigonometric, iid"),
        ("positive, orthogonal", "trigonometric, orthogonal"),
        ("favor++, orthogonal", "positive, orthogonal"),
    ):
        if better in by_method and worse in by_method:
            words = []
            for number in sorted(set(by_method[better].sizes) & set(by_method[worse].sizes)):
                a, b = (by_method[m].samples[by_method[m].sizes.index(number)] for m in (better, worse))
                below = sum(x < y for x, y in zip(a, b, strict=False))
                count = min(len(a), len(b))
                words.append(f"{number}: {below}/{count} (p = {sign_test(a[:count], b[:count]):.1g})")
            lines.append(f"{better} below {worse}, draws at each size: {'; '.join(words)}.")
    uniform = by_method.get("uniform")
    if uniform is not None:
        level = uniform.intervals[0].median
        for curve in of_setting:
            useless = [
                number
                for number, got in zip(curve.sizes, curve.intervals, strict=True)
                if number and not got.median < level
            ]
            if useless and STYLES.get(curve.method) is None:
                lines.append(
                    f"{curve.method} is no better than uniform attention ({text.number(level)}) at"
                    f" {', '.join(map(str, useless))}."
                )
    return lines
