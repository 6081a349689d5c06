"""The charts, as Vega-Lite specifications made with Altair (extra `report`).

Each names its data instead of holding it: the page has the rows once, and its filters change what the charts see.
`static` puts the rows in, for pictures.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effattn.errors import RequestError
from effattn.report import axes, compared, drawing, gather, studies, summary, text
from effattn.report.axes import Chart
from effattn.report.gather import Material
from effattn.run import catalog
from effattn.study import results


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
    drawn = axes.domain([point["drawn"] for point in points], around=1.0)
    colour = axes.colour(alt, material.dtypes)
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
            domain = axes.domain([p[name] for p in points]) if log else None
            found.append(_against(alt, colour, name, title, axis, drawn, domain))
    reference, pairs = gather.pairs(material)
    if pairs:
        found.append(compared.pairs(alt, colour, reference, pairs))
    if material.difference is not None and (changes := compared.changes(material)):
        found.append(compared.difference(alt, changes))
    if material.history:
        found.append(compared.history(alt, material))
    if material.beside is not None and material.beside.lines:
        found.append(compared.baseline(alt, material.beside.points))
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


#: A long label without its middle: the dtype stands at its end. Shorter where the window is narrow; a picture has none.
_SHORT = (
    "length(datum.label) <= {0} ? datum.label : "
    "substring(datum.label, 0, {1}) + '…' + substring(datum.label, length(datum.label) - {2})"
)
_LABEL = f"(containerSize()[0] || 640) < 480 ? ({_SHORT.format(20, 6, 13)}) : ({_SHORT.format(34, 14, 19)})"
_TOOLTIP = ("case:N", "method:N", "outcome:N", "fraction:Q", "z_rms:Q", "ulp_p99:Q", "id:N")


def _overview(alt: Any, colour: Any, material: Material, domain: list[float]) -> Chart:
    order = [" · ".join(map(text.one_line, row.label)) for row in material.rows]
    words = (
        "Every judged case that has an error as a mark, in a row for each method and dtype, the row with most failures first. "
        f"Right of 1 fails.{_not_seen(material)}"
    )
    base = (
        alt.Chart(alt.NamedData(name=axes.CASES))
        .transform_filter("isValid(datum.drawn)")
        .transform_calculate(line="datum.method + ' · ' + datum.dtype")
    )
    marks = base.mark_tick(thickness=1.5, size=16, opacity=0.6).encode(
        x=alt.X("drawn:Q", scale=axes.log(alt, domain), title=axes.FRACTION),
        y=alt.Y("line:N", sort=order, title=None, axis=alt.Axis(labelLimit=220, labelExpr=_LABEL)),
        color=colour,
        tooltip=list(_TOOLTIP),
    )
    return Chart(
        "overview",
        "Error as a fraction of what is allowed",
        words,
        axes.spec(alt.layer(marks, axes.limit(alt)), max(90, 28 * len(order) + 50), words),
    )


def _not_seen(material: Material) -> str:
    """What a chart of errors shows at its edge, or not at all, in sentences."""
    compared = [v for v in material.verdicts if v.law is None and str(v.outcome) not in summary.SET_ASIDE]
    fractions = [(str(v.outcome), catalog.fraction(v)) for v in compared]
    least = sum(fraction is not None and fraction <= gather.SMALLEST for _, fraction in fractions)
    missing = Counter(outcome for outcome, fraction in fractions if fraction is None)
    words = ""
    if least:
        words += f" At the left edge, with an error of 0 or next to nothing: {least}."
    if missing:
        words += f" With no error to show: {missing.total()} of {len(compared)} ({text.counts(missing)})."
    return words


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
        alt.Chart(alt.NamedData(name=axes.CASES))
        .transform_filter("isValid(datum.ulp_p99)")
        .transform_calculate(ulps="log(max(datum.ulp_p99, 0.5)) / LN2")
        .mark_bar(opacity=0.75)
        .encode(
            x=alt.X(
                "ulps:Q",
                bin=_bins(alt, 1.0, [math.log2(max(x, 0.5)) for x in known]),
                title="log2 of the 99th percentile in ulp",
            ),
            y=alt.Y("count():Q", title="cases", stack=True, axis=alt.Axis(tickMinStep=1, format="d")),
            color=colour,
            tooltip=["dtype:N", "count():Q"],
        )
    )
    return Chart("ulps", "Distance in ulp", words, axes.spec(chart, description=words))


def _z(alt: Any, colour: Any, known: Sequence[float]) -> Chart:
    words = (
        "Errors divided by the rounding noise expected there, root mean square of each case. A correct kernel is near "
        "or below 1; a dtype whose bars lie right of it has lost accuracy, perhaps without breaking a bound."
    )
    title = "z rms (5 stands for more)" if max(known) > 5 else "z rms"
    chart = (
        alt.Chart(alt.NamedData(name=axes.CASES))
        .transform_filter("isValid(datum.z_rms)")
        .transform_calculate(z="min(datum.z_rms, 5)")
        .mark_bar(opacity=0.75)
        .encode(
            x=alt.X("z:Q", bin=_bins(alt, 0.1, [min(x, 5.0) for x in known]), title=title),
            y=alt.Y("count():Q", title="cases", stack=True, axis=alt.Axis(tickMinStep=1, format="d")),
            color=colour,
            tooltip=["dtype:N", "count():Q"],
        )
    )
    return Chart("z", "Size of the errors against rounding noise", words, axes.spec(chart, description=words))


def _against(
    alt: Any, colour: Any, name: str, title: str, axis: str, drawn: list[float], domain: list[float] | None
) -> Chart:
    """error/bound against a field of the case; on a logarithmic axis where a domain is given."""
    words = f"Each case by its {axis}. A slope says that the error grows with it faster than what is allowed does."
    scale = axes.log(alt, domain, base=2) if domain else alt.Scale(zero=False)
    ticks = alt.Axis() if domain else alt.Axis(format=".3~g", tickCount=6)
    chart = (
        alt.Chart(alt.NamedData(name=axes.CASES))
        .transform_filter(f"isValid(datum.drawn) && datum.{name} > 0" if domain else "isValid(datum.drawn)")
        .mark_point(filled=True, size=28, opacity=0.6)
        .encode(
            x=alt.X(f"{name}:Q", scale=scale, title=axis, axis=ticks),
            y=alt.Y("drawn:Q", scale=axes.log(alt, drawn), title=axes.FRACTION),
            color=colour,
            tooltip=list(_TOOLTIP),
        )
    )
    return Chart(name, title, words, axes.spec(alt.layer(chart, axes.limit(alt, "y")), description=words))


def _places(alt: Any, material: Material) -> Chart:
    words = (
        "Where in the output the largest error of each case sits, from the first query to the last and from the first "
        "dimension to the last. An even map is what rounding makes; an edge or a block that has far more cases than the rest is "
        "a tile that is not masked right, perhaps."
    )
    found = gather.places(material)
    edges = [cell / gather.CELLS for cell in range(gather.CELLS + 1)]
    # Cells without a case are cells too: left out, they would look like holes in the picture.
    empty = [
        {"query": y, "query_end": y_end, "dimension": x, "dimension_end": x_end, "cases": 0, "fraction": None}
        for y, y_end in itertools.pairwise(edges)
        for x, x_end in itertools.pairwise(edges)
    ]
    chart = (
        alt.Chart(alt.NamedData(name="places"))
        .mark_rect()
        .encode(
            x=alt.X("dimension:Q", title="place in v_dim", axis=alt.Axis(format="%", tickCount=4)),
            x2="dimension_end:Q",
            y=alt.Y("query:Q", title="place in q_len", axis=alt.Axis(format="%", tickCount=4),
                    scale=alt.Scale(reverse=True)),
            y2="query_end:Q",
            # Over all dtypes: drawn one by one, the last would cover the others. The page has the colours of its theme.
            color=alt.Color("sum(cases):Q", scale=alt.Scale(range="heatmap", domainMin=0), title="cases",
                            legend=alt.Legend(tickMinStep=1, format="d")),
            tooltip=[alt.Tooltip("sum(cases):Q", title="cases"),
                     alt.Tooltip("max(fraction):Q", title="largest error / bound")],
        )
    )  # fmt: skip
    return Chart(
        "places", "Where the largest errors sit", words, axes.spec(chart, 260, words), [*found, *empty]
    )


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
    sizes = axes.domain([point["size"] for point in table.points])
    # Intervals reach far where errors have heavy tails: the axis is for the medians.
    errors = axes.domain(drawn)
    kinds = {point["method"]: point["kind"] for point in table.points}
    methods = list(kinds)
    looks = axes.looks(kinds)
    # Below the chart, in as many columns as fit: beside it, it would leave a narrow window no chart. The three scales have
    # one title and one order, so that there is one legend, whose symbols have colour, dashes and shape.
    legend = alt.Legend(
        symbolOpacity=1, symbolSize=90, symbolStrokeWidth=2, labelLimit=240, orient="bottom",
        columns={"expr": axes.COLUMNS},
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
    made = axes.spec(alt.layer(bands, lines, dots), 340, words)
    return Chart(table.name, table.heading, words, made, table.points, "approximations")


def static(chart: Chart, cases: list[dict[str, Any]], *, width: int = 640) -> dict[str, Any]:
    """The specification with its rows in it and a fixed width, for a picture."""
    name = axes.CASES if chart.rows is None else chart.name
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
