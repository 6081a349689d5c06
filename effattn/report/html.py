"""The report as one HTML file that needs nothing else: no network, no folder beside it.

Everything that comes from users (names, messages, recipes) goes through Jinja's autoescape or into the page as JSON
that the script puts in as text; a content security policy forbids every request.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from effattn.errors import RequestError
from effattn.report import charts, gather, legend, summary, terminal, text
from effattn.report.gather import Material
from effattn.run import catalog

_TEMPLATES = Path(__file__).parent / "templates"
_TABLE = (
    ("outcome", "outcome"), ("fraction", "error/bound"), ("method", "method"), ("dtype", "dtype"), ("case", "case"),
    ("law", "law"), ("z_rms", "z rms"), ("ulp_p99", "ulp p99"), ("id", "id"),
)  # fmt: skip


def load() -> tuple[Any, Any]:
    """Jinja and MarkupSafe, which a page needs. Raises RequestError where they are missing."""
    try:
        import jinja2
        import markupsafe
    except ImportError:
        raise RequestError(
            "a report needs Jinja, which is not installed; install it with `pip install 'effattn[report]'`"
        ) from None
    return jinja2, markupsafe


def render(material: Material) -> str:
    """The page.

    Raises:
        RequestError: Jinja, Altair or vl-convert is not installed.
    """
    import effattn

    jinja2, markupsafe = load()

    drawn = charts.charts(material)
    points = gather.points(material)
    data = {
        "cases": points,
        "columns": [key for key, _ in _TABLE],
        "charts": [{"name": chart.name, "spec": chart.spec, "rows": chart.rows} for chart in drawn],
    }
    # What a reviewer needs who has two minutes comes first.
    sections = [("verdicts", "Verdicts")]
    sections += [("evidence", "Evidence")] if material.evidence else []
    sections += [("against", "Comparison")] if material.difference else []
    sections += [
        ("worst", "Worst cases" if material.failed else "Closest to the limit"),
        ("charts", "Charts"),
    ]
    sections += [("baseline", "Baseline")] if material.beside else []
    sections += [("approximations", "Approximations")] if material.studies else []
    sections += [("history", "History")] if material.history else []
    sections += [("options", "Options")]
    sections += [("laws", "Laws")] if material.laws else []
    sections += [("cases", "Cases"), ("origin", "Provenance")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )

    def ours(name: str) -> Any:
        return markupsafe.Markup((_TEMPLATES / name).read_text(encoding="utf-8"))

    def breakable(name: str) -> Any:
        """The name, which breaks between its words where it doesn't fit."""
        return markupsafe.Markup("<wbr>").join(re.findall(r"[^_.:/-]*[_.:/-]+|[^_.:/-]+", name))

    return environment.get_template("report.html.j2").render(
        title=title(material),
        material=material,
        columns=tuple(legend.COLUMNS),
        legend=legend.COLUMNS,
        kinds=legend.OUTCOMES,
        cell=terminal.cell,
        breakable=breakable,
        number=text.number,
        plain=text.plain,
        one_line=text.one_line,
        when=_when,
        fraction=catalog.fraction,
        ratio=text.fraction,
        bound=lambda verdict: text.fraction(catalog.fraction(verdict)),
        subject=summary.subject,
        apart=gather.APART,
        failed=summary.failed,
        outcomes=sorted({str(verdict.outcome) for verdict in material.verdicts}),
        charts=[chart for chart in drawn if chart.section == "charts"],
        figures={chart.name: chart for chart in drawn},
        sections=sections,
        sampled=len(points) if len(points) < len(material.verdicts) else 0,
        table_columns=_TABLE,
        data=data,
        style=ours("report.css"),
        script=ours("report.js"),
        # A script in a page must not hold what would end it.
        javascript=markupsafe.Markup(charts.javascript().replace("</script", "<\\/script")),
        version=effattn.__version__,
    )


def _when(started: str) -> str:
    """A time in UTC to the minute; anything else as it is."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", started):
        return started
    return started[:16].replace("T", " ")


def title(material: Material) -> str:
    """What the report is called."""
    return f"effattn: {text.one_line(text.some(material.methods))}"
