"""The charts, as Vega-Lite specifications made with Altair (extra `report`).

Each names its data instead of holding it: the page has the rows once, and its filters change what the charts see.
`static` puts the rows in, for pictures.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effattn.errors import RequestError
from effattn.report import drawing, gather, studies, text
from effattn.report.gather import Material
from effattn.study import results

#: The data that the filters of the page change.
CASES = "cases"
#: Distinguishable with any kind of colour vision (Okabe and Ito, https://jfly.uni-koeln.de/color/).
DTYPE_COLOURS = {"fp16": "#0072b2", "bf16": "#d55e00", "fp32": "#009e73"}


#: Cases of each kind of change that are drawn.
MOST_CHANGES = gather.MOST_POINTS // 4


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


def load() -> tuple[Any, Any]:
    """Altair and vl-convert, which a report needs. Raises RequestError where one is missing."""
    try:
        import altair
        import vl_convert
    except ImportError:
        raise RequestError(
            "a report needs Altair and vl-convert, which are not installed; install them with "
            "`pip install 'effattn[report]'`"
        ) from None
    return altair, vl_convert


def charts(material: Material) -> list[Chart]:
    """The charts that the material has something for."""
    alt, _ = load()
    points = gather.points(material)
    drawn = _domain([point["drawn"] for point in points], around=1.0)
    colour = _colour(alt, material.dtypes)
    found: list[Chart] = []
    some_drawn = any(point["drawn"] is not None for point in points)
    if some_drawn:
        found.append(_overview(alt, colour, material, drawn))
    if ulps := [point["ulp_p99"] for point in points if point["ulp_p99"] is not None]:
        found.append(_ulps(alt, colour, ulps))
    if sizes := [point["z_rms"] for point in points if point["z_rms"] is not None]:
        found.append(_z(alt, colour, sizes))
    if gather.places(material):
        found.append(_places(alt, material))
    for name, title, axis, log in (
        ("kv_len", "Error by number of keys", "kv_len (keys)", True),
        ("head_dim", "Error by head dimension", "head_dim", True),
        ("scale", "Error by softmax scale", "scale", False),
    ):
        if some_drawn:
            domain = _domain([p[name] for p in points]) if log else None
            found.append(_against(alt, colour, name, title, axis, drawn, domain))
    reference, pairs = gather.pairs(material)
    if pairs:
        found.append(_pairs(alt, colour, reference, pairs))
    if material.difference is not None and (changes := _changes(material)):
        found.append(_difference(alt, changes))
    if material.history:
        found.append(_history(alt, material))
    if material.beside is not None and material.beside.lines:
        found.append(_baseline(alt, material.beside.points))
    found += [_study(alt, table) for study in material.studies for table in study.tables]
    return [replace(chart, spec=_plain(chart.spec), rows=_plain(chart.rows)) for chart in found]


def _plain(value: Any) -> Any:
    """Data without control characters, which neither an SVG nor an expression of Vega can hold: names come from users."""
    if isinstance(value, str):
        return text.plain(value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value


def _domain(values: Sequence[float | None], *, around: float | None = None) -> list[float]:
    """From the smallest to the largest positive value: axes that stay as they are when the page filters its rows."""
    known = [x for x in [*values, around] if x is not None and x > 0]
    low, high = min(known, default=1.0), max(known, default=2.0)
    return [low / 1.2, high * 1.2]


_FRACTION = "error / bound (over 1 fails)"
#: A long label without its middle: the dtype stands at its end. Shorter where the window is narrow; a picture has none.
_SHORT = (
    "length(datum.label) <= {0} ? datum.label : "
    "substring(datum.label, 0, {1}) + '…' + substring(datum.label, length(datum.label) - {2})"
)
_LABEL = f"(containerSize()[0] || 640) < 480 ? ({_SHORT.format(20, 6, 13)}) : ({_SHORT.format(34, 14, 19)})"
_TOOLTIP = ("case:N", "method:N", "outcome:N", "fraction:Q", "z_rms:Q", "ulp_p99:Q", "id:N")


def _colour(alt: Any, dtypes: Collection[str]) -> Any:
    """Colours by dtype, with a legend of those that there are, above the chart: beside it, it would narrow it."""
    colours = {dtype: colour for dtype, colour in DTYPE_COLOURS.items() if dtype in dtypes}
    scale = alt.Scale(domain=list(colours), range=list(colours.values()))
    return alt.Color("dtype:N", scale=scale, title=None, legend=alt.Legend(orient="top"))


def _log(alt: Any, domain: list[float], **more: Any) -> Any:
    """A logarithmic scale of just this domain: left to itself, it goes on to powers of ten where nothing is."""
    return alt.Scale(type="log", domain=domain, nice=False, **more)


def _limit(alt: Any, channel: str = "x") -> Any:
    """The line at 1: what is allowed."""
    return (
        alt.Chart(alt.InlineData(values=[{"limit": 1}]))
        .mark_rule(strokeDash=[4, 4], color="#cc3311", strokeWidth=1.5)
        .encode(**{channel: alt.X("limit:Q") if channel == "x" else alt.Y("limit:Q")})
    )


def _spec(chart: Any, height: int | None = 220, description: str = "") -> dict[str, Any]:
    made = chart.properties(width="container", description=description)
    if height is not None:
        made = made.properties(height=height)
    spec = made.to_dict()
    # The page has the theme.
    spec.pop("config", None)
    return spec


def _overview(alt: Any, colour: Any, material: Material, domain: list[float]) -> Chart:
    order = [" · ".join(map(text.one_line, row.label)) for row in material.rows]
    words = "Every judged case as a mark, a line for each method and dtype, the worst line first. Right of 1 fails."
    base = (
        alt.Chart(alt.NamedData(name=CASES))
        .transform_filter("isValid(datum.drawn)")
        .transform_calculate(line="datum.method + ' · ' + datum.dtype")
    )
    marks = base.mark_tick(thickness=1.5, size=16, opacity=0.6).encode(
        x=alt.X("drawn:Q", scale=_log(alt, domain), title=_FRACTION),
        y=alt.Y("line:N", sort=order, title=None, axis=alt.Axis(labelLimit=220, labelExpr=_LABEL)),
        color=colour,
        tooltip=list(_TOOLTIP),
    )
    return Chart(
        "overview",
        "Error as a fraction of what is allowed",
        words,
        _spec(alt.layer(marks, _limit(alt)), max(90, 28 * len(order) + 50), words),
    )


def _bins(alt: Any, step: float, known: Sequence[float]) -> Any:
    """Bins that hold all values, a largest one at an edge too: left to itself, its bar is beyond the chart."""
    first, last = (math.floor(x / step + 1e-6) for x in (min(known), max(known)))
    return alt.Bin(step=step, extent=[round(first * step, 6), round((last + 1) * step, 6)])


def _ulps(alt: Any, colour: Any, known: Sequence[float]) -> Chart:
    words = (
        "How far outputs are from the correctly rounded exact value, in units in the last place: cases by the 99th "
        "percentile of their elements."
    )
    chart = (
        alt.Chart(alt.NamedData(name=CASES))
        .transform_filter("isValid(datum.ulp_p99)")
        .transform_calculate(ulps="log(max(datum.ulp_p99, 0.5)) / LN2")
        .mark_bar(opacity=0.75)
        .encode(
            x=alt.X(
                "ulps:Q",
                bin=_bins(alt, 1.0, [math.log2(max(x, 0.5)) for x in known]),
                title="log2 of the 99th percentile in ulp",
            ),
            y=alt.Y("count():Q", title="cases", stack=True),
            color=colour,
            tooltip=["dtype:N", "count():Q"],
        )
    )
    return Chart("ulps", "Distance in ulp", words, _spec(chart, description=words))


def _z(alt: Any, colour: Any, known: Sequence[float]) -> Chart:
    words = (
        "Errors divided by the rounding noise expected there, root mean square of each case. A correct kernel is near "
        "or below 1; a line that lies right of it loses accuracy without breaking a bound."
    )
    chart = (
        alt.Chart(alt.NamedData(name=CASES))
        .transform_filter("isValid(datum.z_rms)")
        .transform_calculate(z="min(datum.z_rms, 5)")
        .mark_bar(opacity=0.75)
        .encode(
            x=alt.X(
                "z:Q", bin=_bins(alt, 0.1, [min(x, 5.0) for x in known]), title="z rms (5 stands for more)"
            ),
            y=alt.Y("count():Q", title="cases", stack=True),
            color=colour,
            tooltip=["dtype:N", "count():Q"],
        )
    )
    return Chart("z", "Size of the errors against rounding noise", words, _spec(chart, description=words))


def _against(
    alt: Any, colour: Any, name: str, title: str, axis: str, drawn: list[float], domain: list[float] | None
) -> Chart:
    """error/bound against a field of the case; on a logarithmic axis where a domain is given."""
    words = f"Each case by its {axis}. A slope says that the error grows with it faster than what is allowed does."
    scale = _log(alt, domain, base=2) if domain else alt.Scale(zero=False)
    ticks = alt.Axis() if domain else alt.Axis(format=".3~g", tickCount=6)
    chart = (
        alt.Chart(alt.NamedData(name=CASES))
        .transform_filter(f"isValid(datum.drawn) && datum.{name} > 0" if domain else "isValid(datum.drawn)")
        .mark_point(filled=True, size=28, opacity=0.6)
        .encode(
            x=alt.X(f"{name}:Q", scale=scale, title=axis, axis=ticks),
            y=alt.Y("drawn:Q", scale=_log(alt, drawn), title=_FRACTION),
            color=colour,
            tooltip=list(_TOOLTIP),
        )
    )
    return Chart(name, title, words, _spec(alt.layer(chart, _limit(alt, "y")), description=words))


def _places(alt: Any, material: Material) -> Chart:
    words = (
        "Where in the output the largest error of each case sits, from the first query to the last and from the first "
        "dimension to the last. An even map is what rounding makes; a dark edge is a tile that is not masked right."
    )
    chart = (
        alt.Chart(alt.NamedData(name="places"))
        .mark_rect()
        .encode(
            x=alt.X("dimension:Q", title="place in v_dim", axis=alt.Axis(format="%", tickCount=4)),
            x2="dimension_end:Q",
            y=alt.Y("query:Q", title="place in q_len", axis=alt.Axis(format="%", tickCount=4),
                    scale=alt.Scale(reverse=True)),
            y2="query_end:Q",
            color=alt.Color("cases:Q", scale=alt.Scale(scheme="viridis"), title="cases"),
            tooltip=["dtype:N", "cases:Q", "fraction:Q"],
        )
    )  # fmt: skip
    return Chart(
        "places", "Where the largest errors sit", words, _spec(chart, 260, words), gather.places(material)
    )


def _pairs(alt: Any, colour: Any, reference: str, every: list[dict[str, Any]]) -> Chart:
    pairs = list(gather.drawn(every))
    words = (
        f"The same cases by both: the error of a method against the exact value, over that of {reference!r}. Above the "
        "diagonal the method is less accurate; the tooltip has the ratio."
    )
    if len(pairs) < len(every):
        words += f" {len(pairs)} of {len(every)} pairs are drawn: the largest ratios, and an even choice of the rest."
    low = min(min(p["fraction"], p["reference"]) for p in pairs)
    high = max(max(p["fraction"], p["reference"]) for p in pairs)
    scale = _log(alt, [low, max(high, low * 10)])
    dots = (
        alt.Chart(alt.NamedData(name="pairs"))
        .mark_circle(size=28, opacity=0.6)
        .encode(
            x=alt.X("reference:Q", scale=scale, title="error / bound of the reference"),
            y=alt.Y("fraction:Q", scale=scale, title=_FRACTION),
            color=colour,
            tooltip=["case:N", "method:N", "fraction:Q", "reference:Q", "ratio:Q"],
        )
    )
    diagonal = (
        alt.Chart(alt.InlineData(values=[{"a": low}, {"a": max(high, low * 10)}]))
        .mark_line(color="#888888", strokeDash=[4, 4])
        .encode(x="a:Q", y="a:Q")
    )
    return Chart(
        "pairs", "Beside a reference in the same dtype", words, _spec(dots + diagonal, 300, words), pairs
    )


def _changes(material: Material) -> list[dict[str, Any]]:
    rows = []
    for kind in ("broken", "worse", "better", "mended"):
        for change in getattr(material.difference, kind)[:MOST_CHANGES]:
            before, after = (gather.point(v) for v in (change.before, change.after))
            if before["drawn"] is not None and after["drawn"] is not None:
                told = {"case": after["case"], "kind": kind, "dtype": after["dtype"]}
                rows.append({**told, "before": before["drawn"], "after": after["drawn"]})
    return rows


def _difference(alt: Any, rows: list[dict[str, Any]]) -> Chart:
    words = "Cases that changed against the other run: error over bound before and now."
    if max(Counter(row["kind"] for row in rows).values()) >= MOST_CHANGES:
        words += f" Of each kind, at most {MOST_CHANGES} are drawn, the worst."
    scales = {
        name: _log(alt, _domain([row[name] for row in rows], around=1.0)) for name in ("before", "after")
    }
    kinds = {"broken": "#cc3311", "worse": "#ee7733", "better": "#33bbee", "mended": "#009988"}
    chart = (
        alt.Chart(alt.NamedData(name="difference"))
        .mark_point(filled=True, size=36, opacity=0.7)
        .encode(
            x=alt.X("before:Q", scale=scales["before"], title="error / bound before"),
            y=alt.Y("after:Q", scale=scales["after"], title="error / bound now"),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
                title=None,
                legend=alt.Legend(orient="top"),
            ),
            tooltip=["case:N", "kind:N", "before:Q", "after:Q"],
        )
    )
    return Chart("difference", "Against the other run", words, _spec(chart, 280, words), rows)


def _history(alt: Any, material: Material) -> Chart:
    words = (
        "The largest error over bound of each run, a line for each method and dtype, in the order in which the runs were "
        "started, which need not be that of the commits. A red diamond: the first bad one, by single cases or by all "
        "together. A + marks uncommitted changes. What failed without an error to show, by a crash for example, is at the upper "
        "edge."
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
            "first_bad": moment.first_bad,
            "changed": moment.clean is False,
            "state": moment.state,
        }
        for moment in material.history
    ]
    colour = _colour(alt, {moment.dtype for moment in material.history})
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
            title="commit, by start of the run",
            axis=alt.Axis(labelAngle=-40, labelLimit=120),
        ),
        y=alt.Y(
            "drawn:Q",
            scale=_log(alt, _domain([row["drawn"] for row in rows], around=1.0)),
            title=_FRACTION,
        ),
        detail="line:N",
    )
    lines = base.mark_line(opacity=0.6).encode(color=colour)
    dots = base.mark_point(filled=True).encode(
        color=alt.condition("datum.first_bad", alt.value("#cc3311"), colour),
        shape=alt.condition("datum.first_bad", alt.value("diamond"), alt.value("circle")),
        size=alt.condition("datum.first_bad", alt.value(200), alt.value(60)),
        tooltip=["run:N", "commit:N", "line:N", "state:N", "failed:Q"],
    )
    return Chart(
        "history",
        "Accuracy per commit",
        words,
        _spec(alt.layer(_limit(alt, "y"), lines, dots), 260, words),
        rows,
    )


def _height(moment: gather.Moment, edge: float) -> float | None:
    """Where a moment is drawn; None where nothing was judged."""
    if moment.fraction is None:
        return edge if moment.failed else None
    return edge if math.isnan(moment.fraction) else min(max(moment.fraction, 1e-4), edge)


def _baseline(alt: Any, rows: list[dict[str, Any]]) -> Chart:
    words = (
        "Each row of the baseline (a dtype, an option, a quantity): the median of error over bound then and now. Above "
        "the diagonal errors have become larger; colours say what is more than chance."
    )
    low, high = _domain([row[name] for row in rows for name in ("before", "now")])
    scale = _log(alt, [low, high])
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
    ends = alt.InlineData(values=[{"a": low}, {"a": high}])
    diagonal = alt.Chart(ends).mark_line(color="#888888", strokeDash=[4, 4]).encode(x="a:Q", y="a:Q")
    return Chart(
        "baseline", "Beside the baseline", words, _spec(dots + diagonal, 280, words), rows, "baseline"
    )


#: Shapes of points, by their names in Vega or as paths in the square from -1 to 1: a cross, a star, an hourglass, a bow.
_SHAPES = (
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
_DASHES: dict[str, tuple[list[int], ...]] = {
    "method": ([1, 0], [9, 2], [9, 2, 2, 2]),
    "theory": ([5, 4],),
    "floor": ([1, 3],),
    "control": ([6, 2, 1, 2], [2, 2], [12, 3], [3, 6]),
}


#: Of the legend. By the container's width, not by that of the chart: that one changes while the chart is fitted, and the
#: height would be the one for the columns before. A picture has no container.
_COLUMNS = "max(1, floor(((containerSize()[0] || 640) - 60) / 260))"


def _looks(kinds: Mapping[str, str]) -> list[tuple[list[int], str]]:
    """Dashes and shape of each method of some kind; what is no method has no points, a short line in the legend."""
    counts: Counter[str] = Counter()
    found = []
    for kind in kinds.values():
        i = counts[kind]
        counts[kind] += 1
        dashes = _DASHES[kind]
        if kind == "method":
            found.append((dashes[i // len(_SHAPES) % len(dashes)], _SHAPES[i % len(_SHAPES)]))
        else:
            found.append((dashes[i % len(dashes)], "stroke"))
    return found


def _study(alt: Any, table: studies.Table) -> Chart:
    words = f"Medians over draws with their intervals, against {table.size}."
    medians = [point["median"] for point in table.points]
    drawn = medians
    if table.errors:
        words += (
            " Without points: theory, which is predicted, floors, and controls that know nothing. A method above uniform"
            " attention is of no use at that size."
        )
        drawn = [median for median in medians if median >= results.LEAST_DRAWN] or medians
        if len(drawn) < len(medians):
            words += f" {results.BELOW_THE_AXIS}"
    sizes = _domain([point["size"] for point in table.points])
    # Intervals reach far where errors have heavy tails: the axis is for the medians.
    errors = _domain(drawn)
    kinds = {point["method"]: point["kind"] for point in table.points}
    methods = list(kinds)
    looks = _looks(kinds)
    # Below the chart, in as many columns as fit: beside it, it would leave a narrow window no chart. The three scales have
    # one title and one order, so that there is one legend, whose symbols have colour, dashes and shape.
    legend = alt.Legend(
        symbolOpacity=1, symbolSize=90, symbolStrokeWidth=2, labelLimit=240, orient="bottom",
        columns={"expr": _COLUMNS},
    )  # fmt: skip

    def by_method(channel: Any, values: list[Any] | None) -> Any:
        scale = (
            alt.Scale(domain=methods, scheme="tableau20")
            if values is None
            else alt.Scale(domain=methods, range=values)
        )
        return channel("method:N", sort=methods, title="method", scale=scale, legend=legend)

    base = alt.Chart(alt.NamedData(name=table.name)).encode(
        x=alt.X("size:Q", scale=alt.Scale(type="log", base=2, domain=sizes), title=table.size),
        color=by_method(alt.Color, None),
    )
    y = alt.Y("median:Q", scale=alt.Scale(type="log", domain=errors), title=table.measure)
    tooltip = ["method:N", "size:Q", "median:Q", "low:Q", "high:Q"]
    lines = base.mark_line(clip=True).encode(
        y=y, strokeDash=by_method(alt.StrokeDash, [dashes for dashes, _ in looks]), tooltip=tooltip
    )
    dots = (
        base.mark_point(clip=True, filled=True, size=55, opacity=1)
        .encode(y=y, shape=by_method(alt.Shape, [shape for _, shape in looks]), tooltip=tooltip)
        .transform_filter("datum.kind == 'method'")
    )
    bands = base.mark_area(opacity=0.12, clip=True).encode(y=alt.Y("low:Q"), y2="high:Q")
    made = _spec(alt.layer(bands, lines, dots), 340, words)
    return Chart(table.name, table.heading, words, made, table.points, "approximations")


def static(chart: Chart, cases: list[dict[str, Any]], *, width: int = 640) -> dict[str, Any]:
    """The specification with its rows in it and a fixed width, for a picture."""
    name = CASES if chart.rows is None else chart.name
    rows = cases if chart.rows is None else chart.rows
    return {
        **chart.spec,
        "width": width,
        "datasets": {**chart.spec.get("datasets", {}), name: rows},
        "title": chart.title,
        "background": "white",
    }


def pictures(drawn: Sequence[Chart], cases: list[dict[str, Any]], files: Sequence[Path]) -> dict[Path, str]:
    """Write charts as pictures, SVG or PNG by the suffix; the files that could not be, each with the reason."""
    load()
    wanted = [
        drawing.Picture(spec=static(chart, cases), file=file)
        for chart, file in zip(drawn, files, strict=True)
    ]
    return drawing.draw(wanted, version=_version())


def _version() -> str:
    """The version of Vega-Lite that Altair writes, as vl-convert names it."""
    altair, _ = load()
    return ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])


def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script. Made once and kept in the cache, since making it takes seconds."""
    import hashlib
    import os
    from importlib import metadata

    _, vl_convert = load()
    made_of = f"vl-convert {metadata.version('vl-convert-python')} vega-lite {_version()}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effattn"
    file = cache / f"vega-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.js"
    try:
        kept = file.read_text(encoding="utf-8")
        if kept.endswith(_checksum(kept.rpartition("\n//")[0])):
            return kept
    except OSError:
        pass
    script = vl_convert.javascript_bundle(vl_version=_version())
    whole = f"{script}\n{_checksum(script)}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(whole, encoding="utf-8")
        temporary.replace(file)
    except OSError:
        pass  # no cache, no harm
    return whole


def _checksum(script: str) -> str:
    import hashlib

    return f"//{hashlib.sha256(script.encode()).hexdigest()}"
