"""Studies in a report: an approximation's error against its rank or its number of features.

Read from the folder of an `effattn study`, which is left as it is: one that is still running can be shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from effattn.errors import RequestError
from effattn.report import text
from effattn.run.records import Damage
from effattn.study import axes, model, results, words
from effattn.study.engine import DRAWS, SCHEMA, STUDY, Row, read_draws
from effattn.study.intervals import Interval

#: study -> (the measure that is shown, what it is called, what the size is)
SHOWN = {
    "performer": ("error", "relative error of the output", "features m"),
    "linformer": ("error", "relative error of the output", "rank k"),
    "model": ("change", "change that the model shows", "features m or rank k"),
}
#: settings of one study that are shown; the rest is counted
MOST_SETTINGS = 24


@dataclass(frozen=True, kw_only=True)
class Table:
    """One setting: methods in rows, sizes in columns."""

    name: str  #: of its chart
    heading: str
    measure: str
    errors: bool  #: whether the measure is an error of the output, as opposed to a share or a ratio
    size: str
    sizes: Sequence[float]
    #: method and its cells, the last of which is the slope of log(error) against log(size)
    rows: list[tuple[str, list[str]]]
    sentences: list[str]
    #: points of the chart: method, kind, size, median, low, high
    points: list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Study:
    """One folder."""

    folder: Path
    name: str
    tables: list[Table]
    #: settings beyond `MOST_SETTINGS`
    more: int
    #: what the names of methods mean, and how to read the numbers
    legend: list[str]
    #: draws that are left out; running the study again measures them anew
    damaged: list[Damage]


def read(folder: Path, number: int = 0) -> Study:
    """What a study's folder shows against size; `number` distinguishes its charts from those of other studies.

    Raises:
        RequestError: the folder is no study, of another schema, of costs instead of errors, or has no draw.
    """
    try:
        asked = json.loads((folder / STUDY).read_text(encoding="utf-8"))
        schema = asked.get("schema") if isinstance(asked, dict) else None
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA or asked.get("kind") != "effattn study":
            raise RequestError(
                f"{str(folder / STUDY)!r} is of no study that this effattn wrote; run it again"
            )
        draws = read_draws(folder / DRAWS, schema=schema)
    except FileNotFoundError as error:
        raise RequestError(
            f"{str(folder)!r} is no folder of a study: it has no {Path(error.filename).name}; give what"
            " `effattn study ... --out` wrote"
        ) from None
    except RequestError:
        raise
    except (OSError, ValueError) as error:
        raise RequestError(f"the study in {str(folder)!r} cannot be read ({error})") from None
    name = asked.get("study")
    if name not in SHOWN:
        raise RequestError(
            f"the study in {str(folder)!r} is of {name!r}, which has no error against rank or features; a report shows"
            f" {', '.join(SHOWN)}"
        )
    rows = draws.rows
    measure, called, size = SHOWN[name]
    if name == "model":
        rows = _models(rows)
    found = [
        (where, of_setting)
        for where, of_setting in results.curves(rows, measure).items()
        if any(len(curve.sizes) > 1 for curve in of_setting)
    ]
    if not found:
        raise RequestError(f"the study in {str(folder)!r} has no draw of two sizes yet")
    tables = []
    for i, (where, of_setting) in enumerate(found[:MOST_SETTINGS]):
        if name == "model":
            heading = f"{where.part}, {where.n} tokens, {where.values}"
            called = model.SHOWN[_model(where.part)][1]
        else:
            heading = f"{words.heading(where.part)}: {where.words()}"
            called = results.MEASURES[where.part]
        errors = called in (results.MEASURES["error"], *(words for _, words in model.SHOWN.values()))
        tables.append(_table(f"study-{number}-{i}", heading, called, size, of_setting, errors=errors))
    more = len(found) - len(tables)
    if name != "model":
        for line in axes.along(dict(found))[: MOST_SETTINGS - len(tables)]:
            heading = f"{axes.heading(line)}: {line.title(size.split()[-1])}"
            called = results.MEASURES["error"]
            table = _table(
                f"study-{number}-{len(tables)}",
                heading,
                called,
                axes.AXES[line.axis][1],
                line.curves,
                errors=True,
            )
            # What has the smaller error is said above, size by size.
            tables.append(replace(table, sentences=[]))
    return Study(
        folder=folder, name=name, tables=tables, more=more, damaged=draws.damaged,
        legend=results.legend(rows, size=size.split()[-1]),
    )  # fmt: skip


def _models(rows: Sequence[Row]) -> list[Row]:
    """What each model shows as one measure, all layers together, under the model's name."""
    return [
        replace(
            row,
            job=replace(row.job, point=replace(row.job.point, part=model.MODELS[row.job.point.part])),
            measures={"change": row.measures[model.SHOWN[row.job.point.part][0]]},
        )
        for row in rows
        if row.job.point.values == model.ALL and row.job.point.method != "exact"
    ]


def _model(title: str) -> str:
    return next(name for name, called in model.MODELS.items() if called == title)


def _table(
    name: str, heading: str, measure: str, size: str, of_setting: Sequence[results.Curve], *, errors: bool
) -> Table:
    sizes = sorted({n for curve in of_setting for n in curve.sizes if n})
    rows = []
    points: list[dict[str, Any]] = []
    for curve in of_setting:
        known = dict(zip(curve.sizes, curve.intervals, strict=True))
        cells = [results.cell(known.get(n) or known.get(0)) for n in sizes]
        slope = results.cell(curve.slope) if errors else text.MISSING
        rows.append((words.label(curve.method), [*cells, slope]))
        # What has no size is a level: a line from the first size to the last.
        ends = [(n, known[0]) for n in (sizes[0], sizes[-1])] if curve.sizes == [0] else list(known.items())
        kind = results.STYLES.get(curve.method, "method")
        name_of = words.label(curve.method)
        points += [point for n, got in ends if (point := _point(name_of, kind, n, got)) is not None]
    return Table(
        name=name, heading=heading, measure=measure, errors=errors, size=size, sizes=sizes, rows=rows,
        sentences=results.comparisons(of_setting, size=size.split()[-1]), points=points,
    )  # fmt: skip


def _point(method: str, kind: str, size: int, got: Interval) -> dict[str, Any] | None:
    """A point of a chart with logarithmic axes, which have no 0 and no infinity."""
    if not size or not (math.isfinite(got.median) and got.median > 0):
        return None
    low = got.low if math.isfinite(got.low) and got.low > 0 else got.median
    high = got.high if math.isfinite(got.high) else got.median
    return {"method": method, "kind": kind, "size": size, "median": got.median, "low": low, "high": high}
