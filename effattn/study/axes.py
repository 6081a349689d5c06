"""Errors of a study against what is not the size: the sequence length, the head dimension, the scale of the inputs.

Made of the settings that differ in that alone, at one size that all of them have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from effattn.report import text
from effattn.study import charts, words
from effattn.study.intervals import Interval
from effattn.study.results import (
    BELOW_THE_AXIS,
    LEAST_DRAWN,
    MEASURES,
    STYLES,
    Curve,
    Setting,
    cell,
    values_slug,
)

#: field of a setting -> its letter in tables, and in words
AXES = {
    "n": ("n", "sequence length n"),
    "head_dim": ("d", "head dimension d"),
    "input_scale": ("x", "factor x of q and k"),
}


class Along(NamedTuple):
    """The curves of all methods along one axis."""

    axis: str  #: one of AXES
    where: Setting  #: of the first value; the field `axis` of it means nothing
    size: int  #: m or k
    curves: list[Curve]  #: whose `sizes` are values of the axis

    def title(self, size: str) -> str:
        """What is the same for all of it."""
        where = self.where
        parts = {
            "n": f"n = {where.n}", "head_dim": f"d = {where.head_dim}", "values": where.values,
            "input_scale": f"x = {where.input_scale:g}", "dtype": where.dtype,
        }  # fmt: skip
        kept = [words for name, words in parts.items() if name != self.axis]
        return ", ".join([f"{size} = {self.size}", *kept, *(["causal"] if where.causal else [])])


def along(curves: Mapping[Setting, Sequence[Curve]]) -> list[Along]:
    """Everything that can be drawn: for each axis the groups of settings that differ in nothing else."""
    found = []
    settings = [where for where in curves if where.part == "error"]
    for axis in AXES:
        groups: dict[Setting, list[Setting]] = {}
        for where in settings:
            groups.setdefault(where._replace(**{axis: 0}), []).append(where)
        for members in groups.values():
            members.sort(key=lambda where: getattr(where, axis))
            size = _common_size([curves[where] for where in members])
            if len(members) > 1 and size is not None:
                found.append(Along(axis, members[0], size, _curves(axis, members, curves, size)))
    return found


def _common_size(settings: Sequence[Sequence[Curve]]) -> int | None:
    """The middle one of the sizes that every setting has; none if there is none."""
    shared = [{n for curve in of_setting for n in curve.sizes if n} for of_setting in settings]
    common = sorted(set.intersection(*shared))
    return common[(len(common) - 1) // 2] if common else None


def _curves(
    axis: str, members: Sequence[Setting], curves: Mapping[Setting, Sequence[Curve]], size: int
) -> list[Curve]:
    """One curve for each method that every setting has, at the size, or at none for what has no size."""
    by_method: dict[str, list[Curve]] = {}
    for where in members:
        for curve in curves[where]:
            if size in curve.sizes or curve.sizes == [0]:
                by_method.setdefault(curve.method, []).append(curve)
    made = []
    for method, of_method in by_method.items():
        if len(of_method) == len(members):
            at = [curve.sizes.index(size) if size in curve.sizes else 0 for curve in of_method]
            # A recorded study has kept no draws.
            samples = [
                curve.samples[i] if curve.samples else [] for curve, i in zip(of_method, at, strict=True)
            ]
            count = min(map(len, samples))
            made.append(
                Curve(
                    members[0], method, [getattr(where, axis) for where in members],
                    [curve.intervals[i] for curve, i in zip(of_method, at, strict=True)],
                    [sample[:count] for sample in samples],
                )
            )  # fmt: skip
    return made


def heading(found: Along) -> str:
    """Of the section of a summary."""
    return f"Error against the {AXES[found.axis][1]}"


def chart(found: Along, *, size: str) -> charts.Chart:
    """Errors against the axis."""
    drawn = [
        charts.Curve(
            label=words.label(curve.method), x=curve.sizes, y=[p.median for p in curve.intervals],
            low=[p.low for p in curve.intervals], high=[p.high for p in curve.intervals],
            style=STYLES.get(curve.method, "method"),
        )
        for curve in found.curves
    ]  # fmt: skip
    where = found.where
    parts = {
        "n": f"n{where.n}", "head_dim": f"d{where.head_dim}", "values": values_slug(where.values),
        "input_scale": f"x{where.input_scale:g}", "dtype": where.dtype,
    }  # fmt: skip
    kept = [part for name, part in parts.items() if name != found.axis]
    name = "-".join(
        [
            "along",
            found.axis.replace("_", "-"),
            f"{size}{found.size}",
            *kept,
            *(["causal"] if where.causal else []),
        ]
    )
    return charts.Chart(
        name=name, title=found.title(size), x_label=AXES[found.axis][1], y_label=MEASURES["error"], curves=drawn,
        least=LEAST_DRAWN, below=BELOW_THE_AXIS,
    )  # fmt: skip


def table(found: Along, slopes: Mapping[str, Interval | None] | None = None) -> list[str]:
    """Medians with intervals as Markdown, with the slope along the axis; `slopes` by method where there are no draws."""
    letter = AXES[found.axis][0]
    values = found.curves[0].sizes
    lines = [f"| method | {' | '.join(f'{letter} = {value:g}' for value in values)} | slope in {letter} |"]
    lines.append("|---" * (len(values) + 2) + "|")
    for curve in found.curves:
        slope = curve.slope if slopes is None else slopes.get(curve.method)
        cells = [*map(cell, curve.intervals), cell(slope)]
        lines.append(f"| {text.markdown(words.label(curve.method))} | {' | '.join(cells)} |")
    return lines
