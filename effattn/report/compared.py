"""Charts of more than one run or method: beside a reference, another run, a baseline, and over time."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from effattn.report import axes, gather
from effattn.report.axes import Chart
from effattn.report.gather import Material
from effattn.report.history import Moment

#: Cases of each kind of change that are drawn.
MOST_CHANGES = gather.MOST_POINTS // 4


def pairs(alt: Any, colour: Any, reference: str, every: list[dict[str, Any]]) -> Chart:
    """The error of each method against that of a reference on the same case. `every` is as `gather.pairs` has it."""
    drawn = list(gather.drawn(every))
    words = (
        f"The same cases by both: the error of a method against the exact value, over that of {reference!r}. Above the "
        "diagonal the method is less accurate; the tooltip has the ratio."
    )
    if len(drawn) < len(every):
        words += f" {len(drawn)} of {len(every)} pairs are drawn: the largest ratios, and an even choice of the rest."
    low = min(min(p["fraction"], p["reference"]) for p in drawn)
    high = max(max(p["fraction"], p["reference"]) for p in drawn)
    scale = axes.log(alt, [low, max(high, low * 10)])
    dots = (
        alt.Chart(alt.NamedData(name="pairs"))
        .mark_circle(size=28, opacity=0.6)
        .encode(
            x=alt.X("reference:Q", scale=scale, title="error / bound of the reference"),
            y=alt.Y("fraction:Q", scale=scale, title=axes.FRACTION),
            color=colour,
            tooltip=["case:N", "method:N", "fraction:Q", "reference:Q", "ratio:Q"],
        )
    )
    diagonal = axes.diagonal(alt, low, max(high, low * 10))
    return Chart(
        "pairs", "Beside a reference in the same dtype", words, axes.spec(dots + diagonal, 300, words), drawn
    )


def changes(material: Material) -> list[dict[str, Any]]:
    """The cases that became worse or better, broke or were mended against the other run, as rows to draw."""
    rows = []
    for kind in ("broken", "worse", "better", "mended"):
        for change in getattr(material.difference, kind)[:MOST_CHANGES]:
            before, after = (gather.point(v) for v in (change.before, change.after))
            if before["drawn"] is not None and after["drawn"] is not None:
                told = {"case": after["case"], "kind": kind, "dtype": after["dtype"]}
                rows.append({**told, "before": before["drawn"], "after": after["drawn"]})
    return rows


def difference(alt: Any, rows: list[dict[str, Any]]) -> Chart:
    """The rows of `changes`, error over bound before and now."""
    words = (
        "Cases that changed against the other run: error over bound before and now. Above the grey diagonal the error has "
        "become larger; above the red line it is more than is allowed now, and right of the other it was before."
    )
    if max(Counter(row["kind"] for row in rows).values()) >= MOST_CHANGES:
        words += f" Of each kind, at most {MOST_CHANGES} are drawn, the worst."
    before, after = (axes.domain([row[name] for row in rows], around=1.0) for name in ("before", "after"))
    kinds = {"broken": "#cc3311", "worse": "#ee7733", "better": "#33bbee", "mended": "#009988"}
    chart = (
        alt.Chart(alt.NamedData(name="difference"))
        .mark_point(filled=True, size=36, opacity=0.7)
        .encode(
            x=alt.X("before:Q", scale=axes.log(alt, before), title="error / bound before"),
            y=alt.Y("after:Q", scale=axes.log(alt, after), title="error / bound now"),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
                title=None,
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["case:N", "kind:N", "before:Q", "after:Q"],
        )
    )
    ends = max(before[0], after[0]), min(before[1], after[1])
    lines = [axes.diagonal(alt, *ends)] if ends[0] < ends[1] else []
    made = alt.layer(*lines, axes.limit(alt, "x"), axes.limit(alt, "y"), chart)
    return Chart("difference", "Against the other run", words, axes.spec(made, 280, words), rows)


def history(alt: Any, material: Material) -> Chart:
    """The largest error over bound of each run, by method and dtype."""
    words = (
        "The largest error over bound of each run, a line for each method and dtype, in the order in which the runs were "
        "started, which need not be that of the commits. A red ring: the first bad one, by single cases or by all together, or "
        "a line that is bad from its first run. A + marks uncommitted changes. What failed without an error to show, by a crash "
        "for example, is at the upper edge."
    )
    known = [m.fraction for m in material.history if m.fraction is not None and not math.isnan(m.fraction)]
    edge = 2 * max(min(x, 1e4) for x in [*known, 1.0])
    rows = [
        {
            "run": moment.run,
            "commit": moment.commit or moment.run,
            "line": f"{moment.method} · {moment.dtype}",
            "dtype": moment.dtype,
            "drawn": _height(moment, edge),
            "failed": moment.failed,
            "method": moment.method,
            "ring": moment.first_bad or moment.from_first,
            "changed": moment.clean is False,
            "state": moment.state,
        }
        for moment in material.history
    ]
    colour = axes.colour(alt, {moment.dtype for moment in material.history})
    labels: dict[str, str] = {}
    for row in rows:
        short = row["commit"][:8] if row["commit"] != row["run"] else row["run"]
        short += "+" if row["changed"] else ""
        same = sum(label.partition(" (")[0] == short for run, label in labels.items() if run != row["run"])
        labels.setdefault(row["run"], f"{short} ({same + 1})" if same else short)
        row["at"] = labels[row["run"]]
    base = alt.Chart(alt.NamedData(name="history")).encode(
        x=alt.X(
            "at:O",
            sort=list(labels.values()),
            title="commit or run, by start of the run",
            axis=alt.Axis(labelAngle=-40, labelLimit=120),
        ),
        y=alt.Y(
            "drawn:Q",
            scale=axes.log(alt, axes.domain([row["drawn"] for row in rows], around=1.0)),
            title=axes.FRACTION,
        ),
        detail="line:N",
    )
    lines = base.mark_line(opacity=0.6).encode(color=colour)
    dots = base.mark_point(filled=True, size=60).encode(
        color=colour, tooltip=["run:N", "commit:N", "line:N", "state:N", "failed:Q"]
    )
    rings = base.mark_point(filled=False, size=260, color="#cc3311", strokeWidth=2).transform_filter(
        "datum.ring"
    )
    kinds = {moment.method: "method" for moment in material.history}
    if len(kinds) > 1:  # the colour is that of the dtype
        words += " Dashes and shapes tell the methods."
        looks = axes.looks(kinds, dashed=True)
        legend = alt.Legend(orient="bottom", columns={"expr": axes.COLUMNS}, labelLimit=240, symbolSize=90)

        def by_method(channel: Any, values: list[Any]) -> Any:
            scale = alt.Scale(domain=list(kinds), range=values)
            return channel("method:N", sort=list(kinds), title=None, scale=scale, legend=legend)

        lines = lines.encode(strokeDash=by_method(alt.StrokeDash, [dashes for dashes, _ in looks]))
        dots = dots.encode(shape=by_method(alt.Shape, [shape for _, shape in looks]))
    return Chart(
        "history",
        "Accuracy per commit",
        words,
        axes.spec(alt.layer(axes.limit(alt, "y"), lines, dots, rings), 260, words),
        rows,
    )


def _height(moment: Moment, edge: float) -> float | None:
    """Where a moment is drawn; None where nothing was judged."""
    if moment.fraction is None:
        return edge if moment.failed else None
    return edge if math.isnan(moment.fraction) else min(max(moment.fraction, gather.SMALLEST), edge)


def baseline(alt: Any, rows: list[dict[str, Any]]) -> Chart:
    """The rows of a committed baseline, then and now."""
    words = (
        "Each row of the baseline (a dtype, an option, a quantity): the median of error over bound then and now. Above "
        "the diagonal errors have become larger; colours say what is more than chance."
    )
    low, high = axes.domain([row[name] for row in rows for name in ("before", "now")])
    scale = axes.log(alt, [low, high])
    states = {"worse": "#cc3311", "better": "#009988", "no significant change": "#888888"}
    dots = (
        alt.Chart(alt.NamedData(name="baseline"))
        .mark_point(filled=True, size=36, opacity=0.7)
        .encode(
            x=alt.X("before:Q", scale=scale, title="median error / bound, baseline"),
            y=alt.Y("now:Q", scale=scale, title="median error / bound, now"),
            color=alt.Color(
                "state:N",
                scale=alt.Scale(domain=list(states), range=list(states.values())),
                title=None,
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["row:N", "state:N", "before:Q", "now:Q", "cases:Q"],
        )
    )
    diagonal = axes.diagonal(alt, low, high)
    return Chart(
        "baseline", "Beside the baseline", words, axes.spec(dots + diagonal, 280, words), rows, "baseline"
    )
