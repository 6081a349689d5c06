"""What the charts of a report share: their form, scales, colours, the line at 1, and how methods are told without colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: The data that the filters of the page change.
CASES = "cases"
#: Distinguishable with any kind of colour vision (Okabe and Ito, https://jfly.uni-koeln.de/color/).
DTYPE_COLOURS = {"fp16": "#0072b2", "bf16": "#d55e00", "fp32": "#009e73"}


#: The title of an axis.
FRACTION = "error / bound (over 1 fails)"


@dataclass(frozen=True)
class Chart:
    """One chart of a page."""

    name: str
    title: str
    #: what it shows and how to read it
    words: str
    spec: dict[str, Any]
    #: rows that are its own; the page's cases if None
    rows: list[dict[str, Any]] | None = None
    #: where in the page it stands
    section: str = "charts"


def domain(values: Sequence[float | None], *, around: float | None = None) -> list[float]:
    """From the smallest to the largest positive value: axes that stay as they are when the page filters its rows."""
    known = [x for x in [*values, around] if x is not None and x > 0]
    low, high = min(known, default=1.0), max(known, default=2.0)
    return [low / 1.2, high * 1.2]


def colour(alt: Any, dtypes: Collection[str]) -> Any:
    """Colours by dtype, with a legend of those that there are, above the chart: beside it, it would narrow it."""
    colours = {dtype: colour for dtype, colour in DTYPE_COLOURS.items() if dtype in dtypes}
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color("dtype:N", scale=scale, title=None, legend=alt.Legend(orient="top"))


def log(alt: Any, domain: list[float], **more: Any) -> Any:
    """A logarithmic scale of just this domain: left to itself, it goes on to powers of ten where nothing is."""
    return alt.Scale(type="log", domain=domain, nice=False, **more)


def limit(alt: Any, channel: str = "x") -> Any:
    """The line at 1: what is allowed."""
    return (
        alt.Chart(alt.InlineData(values=[{"limit": 1}]))
        .mark_rule(strokeDash=[4, 4], color="#cc3311", strokeWidth=1.5)
        .encode(**{channel: alt.X("limit:Q") if channel == "x" else alt.Y("limit:Q")})
    )


def diagonal(alt: Any, low: float, high: float) -> Any:
    """The line where both axes say the same."""
    ends = alt.InlineData(values=[{"a": low}, {"a": high}])
    return alt.Chart(ends).mark_line(color="#888888", strokeDash=[4, 4]).encode(x="a:Q", y="a:Q")


def spec(chart: Any, height: int | None = 220, description: str = "") -> dict[str, Any]:
    """The chart as Vega-Lite, as wide as its place in the page, without a theme, which the page has."""
    made = chart.properties(width="container", description=description)
    if height is not None:
        made = made.properties(height=height)
    spec = made.to_dict()
    spec.pop("config", None)
    return spec


#: Shapes of points, by their names in Vega or as paths in the square from -1 to 1: a cross, a star, an hourglass, a bow.
SHAPES = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "triangle-down",
    "triangle-right",
    "triangle-left",
    "M-1,-.6L-.6,-1L0,-.4L.6,-1L1,-.6L.4,0L1,.6L.6,1L0,.4L-.6,1L-1,.6L-.4,0Z",
    "M0,-1L.24,-.32L.95,-.31L.38,.12L.59,.81L0,.4L-.59,.81L-.38,.12L-.95,-.31L-.24,-.32Z",
    "M-.9,-.9L.9,-.9L-.9,.9L.9,.9Z",
    "M-.9,-.9L-.9,.9L.9,-.9L.9,.9Z",
)
#: Of methods, of which the first twelve have full lines; of theory; of floors; of controls. No two look alike without
#: colour, up to 36 methods.
DASHES: dict[str, tuple[list[int], ...]] = {
    "method": ([1, 0], [9, 2], [9, 2, 2, 2]),
    "theory": ([5, 4],),
    "floor": ([1, 3],),
    "control": ([6, 2, 1, 2], [2, 2], [12, 3], [3, 6]),
}


#: Of the legend. By the container's width, not by that of the chart: that one changes while the chart is fitted, and the
#: height would be the one for the columns before. A picture has no container.
COLUMNS = "max(1, floor(((containerSize()[0] || 640) - 60) / 260))"


def looks(kinds: Mapping[str, str], *, dashed: bool = False) -> list[tuple[list[int], str]]:
    """Dashes and shape of each method of some kind; what is no method has no points, a short line in the legend.

    With `dashed`, the next method has the next dashes too, where colours say something else.
    """
    counts: Counter[str] = Counter()
    found = []
    for kind in kinds.values():
        i = counts[kind]
        counts[kind] += 1
        dashes = DASHES[kind]
        if kind == "method":
            turn = i if dashed else i // len(SHAPES)
            found.append((dashes[turn % len(dashes)], SHAPES[i % len(SHAPES)]))
        else:
            found.append((dashes[i % len(dashes)], "stroke"))
    return found
