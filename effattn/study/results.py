"""What a study finds: medians with intervals, slopes and comparisons, as tables and charts of each setting."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from effattn.report import text
from effattn.study import charts, words
from effattn.study.engine import Point, Row, by_point
from effattn.study.intervals import Interval, constant, mean_interval, median_interval, sign_test, slope

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
#: part -> (the second measure of its table, what its two rows are called)
SECOND = {
    "spectrum": ("row_p50", ("share of the sum of all", "error of the best matrix of rank k")),
    "lemma": ("row_p50", ("bound |x.y|, as printed", "bound |x| |y|")),
}
#: Relative errors below it are exact but for rounding. They are left off the axis of a chart, which they would stretch to
#: 1e-15, and out of slopes, which they would make those of a fall to 0.
LEAST_DRAWN = 1e-6
BELOW_THE_AXIS = f"Errors under {LEAST_DRAWN:g} are below the axis."


def values_slug(values: str) -> str:
    """The name of a distribution for a file's name."""
    return values.replace("real:", "").replace("/", "-")


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
        if self.part == "lemma":
            return f"n = k = {self.n}"
        if self.part == "moments":
            return f"d = {self.head_dim}, {self.dtype}"
        causal = ", causal" if self.causal else ""
        scale = f" x {self.input_scale:g}" if self.input_scale != 1 else ""
        return f"n = {self.n}, d = {self.head_dim}, {self.values}{scale}, {self.dtype}{causal}"

    def slug(self) -> str:
        """For a file's name."""
        return (
            f"{self.part}-n{self.n}-d{self.head_dim}-{values_slug(self.values)}-x{self.input_scale:g}-{self.dtype}"
            + ("-causal" if self.causal else "")
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
        """Of log(error) against log(size), without errors below LEAST_DRAWN and sizes where the median isn't finite."""
        kept = [i for i, got in enumerate(self.intervals) if LEAST_DRAWN <= got.median < math.inf]
        return (
            slope([self.sizes[i] for i in kept], [self.samples[i] for i in kept]) if kept else slope([], [[]])
        )

    @property
    def exact(self) -> list[int]:
        """The sizes that the slope leaves out because nothing but rounding is left there."""
        return [
            n for n, got in zip(self.sizes, self.intervals, strict=True) if n and got.median < LEAST_DRAWN
        ]


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
    parts = list(words.PARTS)
    for (where, method), sizes in sorted(
        found.items(),
        key=lambda item: (
            parts.index(item[0][0].part) if item[0][0].part in parts else len(parts), item[0][0], order.index(item[0][1]),
        ),
    ):  # fmt: skip
        count = min(map(len, sizes.values()))
        samples = [sizes[size][:count] for size in sorted(sizes)]
        intervals = [_interval(sizes[size], where.part) for size in sorted(sizes)]
        result.setdefault(where, []).append(Curve(where, method, sorted(sizes), intervals, samples))
    return result


def _interval(sample: Sequence[float], part: str) -> Interval:
    if part == "moments" and len(sample) > 1:
        return mean_interval(sample)
    return constant(sample[0]) if len(sample) == 1 else median_interval(sample)


def with_second(rows: Sequence[Row], where: Setting, of_setting: Sequence[Curve]) -> list[Curve]:
    """The curves of a setting's table: with the second measure of its part as one more, if it has one."""
    if where.part not in SECOND:
        return list(of_setting)
    measure, names = SECOND[where.part]
    both = [*of_setting, *curves(rows, measure)[where]]
    return [curve._replace(method=name) for curve, name in zip(both, names, strict=True)]


def legend(rows: Sequence[Row], *, size: str) -> list[str]:
    """How to read the tables of a study: its names, intervals, slopes and tests, as far as they occur."""
    every = [curve for of_setting in curves(rows).values() for curve in of_setting]
    lines = words.explained(dict.fromkeys(curve.method for curve in every), size=size)
    if any(curve.setting.input_scale != 1 for curve in every):
        lines.append("x 0.5 and its like, after the name of the inputs: q and k are multiplied by it")
    if any(curve.intervals[0].draws > 1 for curve in every):
        lines.append(words.INTERVALS)
    if any(curve.setting.part == "error" and len(curve.sizes) > 1 for curve in every):
        lines.append(f"slope: of log(error) against log({size}); at -0.5, four times as many halve the error")
    if any(map(_pairs, curves(rows).values())):
        lines.append(words.SIGN_TEST)
    return lines


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
                label=words.label(curve.method), x=x, y=[p.median for p in points], low=[p.low for p in points],
                high=[p.high for p in points], style=STYLES.get(curve.method, "method"),
            )
        )  # fmt: skip
    errors = where.part in ("error", "construction")
    return charts.Chart(
        name=where.slug(), title=where.words(), x_label=words.size_of(where.part, size),
        y_label=MEASURES[where.part], curves=drawn, least=LEAST_DRAWN if errors else 0.0, below=BELOW_THE_AXIS,
    )  # fmt: skip


def table(of_setting: Sequence[Curve], *, size: str) -> list[str]:
    """Medians with intervals as Markdown, one row a method; slopes where errors fall with the size."""
    part = of_setting[0].setting.part
    size = words.size_of(part, size)
    counts = Counter(n for curve in of_setting for n in curve.sizes if n)
    # One that a search went through, of one method, is left to summary.csv.
    sizes = sorted(n for n, count in counts.items() if 2 * count >= max(counts.values()))
    shown = sizes if len(sizes) <= 5 else sorted({sizes[round(i * (len(sizes) - 1) / 4)] for i in range(5)})
    columns = [f"{text.markdown(size)} = {n}" for n in shown] or ["value"]
    slopes = part == "error" and len(sizes) > 1
    lines = [_line(["method", *columns, *(["slope"] if slopes else [])])]
    lines.append("|---" * (lines[0].count(" | ") + 1) + "|")
    for curve in of_setting:
        known = dict(zip(curve.sizes, curve.intervals, strict=True))
        cells = [cell(known.get(n) or known.get(0)) for n in shown] or [cell(known.get(0))]
        name = text.markdown(words.label(curve.method))
        lines.append(_line([name, *cells, *([cell(curve.slope)] if slopes else [])]))
    return lines


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cell(got: Interval | None) -> str:
    """0.31 (0.28 to 0.35)."""
    if got is None or (math.isnan(got.median) and got.draws == 0):
        return text.MISSING
    middle = text.number(got.median, digits=3)
    if got.low == got.high:
        return middle
    return f"{middle} ({text.number(got.low, digits=3)} to {text.number(got.high, digits=3)})"


#: pairs of which the first is said to have the smaller error
_CLAIMS = (
    ("positive, orthogonal", "positive, iid"),
    ("trigonometric, orthogonal", "trigonometric, iid"),
    ("positive, iid", "trigonometric, iid"),
    ("positive, orthogonal", "trigonometric, orthogonal"),
    ("favor++, orthogonal", "positive, orthogonal"),
)


def _pairs(of_setting: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
    by_method = {curve.method: curve for curve in of_setting}
    return [(by_method[a], by_method[b]) for a, b in _CLAIMS if a in by_method and b in by_method]


def comparisons(of_setting: Sequence[Curve], *, size: str) -> list[str]:
    """Sentences on what has the smaller error over the same draws, what isn't finite, what knows no more than nothing."""
    lines = []
    for better, worse in _pairs(of_setting):
        found = []
        for number in sorted(set(better.sizes) & set(worse.sizes)):
            a, b = (curve.samples[curve.sizes.index(number)] for curve in (better, worse))
            count = min(len(a), len(b))
            below = sum(x < y for x, y in zip(a, b, strict=False))
            where, draws = (f"{number}", "") if found else (f"{size} = {number}", " draws")
            found.append(f"{below} of {count}{draws} at {where} (p = {sign_test(a[:count], b[:count]):.1g})")
        if found:
            lines.append(f"{better.method} has a smaller error than {worse.method} in {', '.join(found)}.")
    lines += _not_finite(of_setting, size) + _useless(of_setting, size)
    exact = {n for curve in of_setting for n in curve.exact if len(curve.sizes) > 1}
    if of_setting[0].setting.part == "error" and exact:
        numbers = ", ".join(map(str, sorted(exact)))
        lines.append(
            f"Slopes leave out errors below {LEAST_DRAWN:g}, which are rounding: at {size} = {numbers}."
        )
    return lines


def _not_finite(of_setting: Sequence[Curve], size: str) -> list[str]:
    found = []
    for curve in of_setting:
        for number, sample in zip(curve.sizes, curve.samples, strict=True):
            count = sum(not math.isfinite(x) for x in sample)
            if count and curve.method != "theory":  # which is infinite where it predicts that
                at = f" at {size} = {number}" if number else ""
                found.append(f"{curve.method}{at}, {count} of {len(sample)} draws")
    return [f"NaN or infinite: {'; '.join(found)}."] if found else []


def _useless(of_setting: Sequence[Curve], size: str) -> list[str]:
    """Methods no better than what knows nothing of q and k, those of the same sizes in one line."""
    levels = {
        curve.intervals[0].median: words
        for curve in of_setting
        for method, words in (("zero", "an output of zeros"), ("uniform", "uniform attention"))
        if curve.method == method
    }
    if not levels:
        return []
    # Where values cancel, zeros are nearer than the average.
    level = min(levels)
    same: dict[tuple[bool, tuple[int, ...]], list[str]] = {}
    for curve in of_setting:
        if STYLES.get(curve.method) is None:
            pairs = [(n, got.median) for n, got in zip(curve.sizes, curve.intervals, strict=True) if n]
            # What is exact is of use, even where the average is exact too.
            worse = tuple(n for n, median in pairs if max(level, LEAST_DRAWN) <= median < math.inf)
            if worse:
                same.setdefault((len(worse) == len(pairs) > 1, worse), []).append(curve.method)
    return [
        f"No better than {levels[level]} ({text.number(level)}) at"
        f" {f'any {size}' if every else f'{size} = ' + ', '.join(map(str, numbers))}: {'; '.join(methods)}."
        for (every, numbers), methods in sorted(same.items(), key=lambda item: -len(item[0][1]))
    ]
