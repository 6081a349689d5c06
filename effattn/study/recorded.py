"""Studies that were run once and recorded: medians, intervals and provenance of a folder as one JSON file.

`docs/record_study.py` writes them, the tables of the pages are made of them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effattn.errors import RequestError
from effattn.study import axes, results, words
from effattn.study.engine import STUDY, Row, Store, by_point
from effattn.study.intervals import Interval, mean_interval, median_interval

SCHEMA = 1


def rows_of(folder: Path, columns: Sequence[str]) -> list[Row]:
    """All rows of a study's folder. RequestError where some are damaged: running the study again mends that."""
    asked = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    request = {name: value for name, value in asked.items() if name not in ("kind", "schema")}
    store = Store(folder, request, columns)
    if store.damaged:
        raise RequestError(f"{store.damaged[0]}; run the study again, which measures what is damaged anew")
    return list(store.rows.values())


def record(folder: Path, columns: Sequence[str], *, command: str) -> dict[str, Any]:
    """The recorded form: one entry for each point and measure."""
    rows = rows_of(folder, columns)
    entries = []
    for point, of_point in by_point(rows).items():
        entry: dict[str, Any] = {**vars(point), "draws": len(of_point)}
        for name in columns:
            sample = [row.measures[name] for row in of_point if name in row.measures]
            if sample:
                entry[name] = [_short(x) for x in median_interval(sample)[:3]]
            if point.part == "moments" and name == "error" and len(sample) > 1:
                entry["mean"] = [_short(x) for x in mean_interval(sample)[:3]]
        entries.append(entry)
    slopes = [
        {**where._asdict(), "method": curve.method, "slope": [_short(x) for x in curve.slope[:3]]}
        for where, of_setting in results.curves(rows).items()
        for curve in of_setting
        if len(curve.sizes) > 1
    ]
    origin = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    # Where somebody ran it is nobody's business.
    del origin["working_directory"], origin["environment"]
    along = [
        {"axis": line.axis, "size": line.size, **line.where._asdict(), "method": curve.method,
         "slope": [_short(x) for x in curve.slope[:3]]}
        for line in axes.along(results.curves(rows))
        for curve in line.curves
    ]  # fmt: skip
    made = {"schema": SCHEMA, "command": command, **origin, "points": entries, "slopes": slopes}
    return made | ({"along": along} if along else {})


def _short(x: float) -> float | None:
    return float(f"{x:.5g}") if math.isfinite(x) else None


def load(path: Path) -> dict[str, Any]:
    """A recorded study."""
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["schema"] == SCHEMA, f"{path} has another schema"
    return data


def interval(values: Sequence[float | None] | None) -> Interval | None:
    """An entry as an interval; what isn't finite was recorded as null."""
    if values is None:
        return None
    median, low, high = (math.inf if x is None else x for x in values)
    return Interval(median, low, high, 0.95, 2)


def find(data: Mapping[str, Any], **fields: Any) -> list[dict[str, Any]]:
    """The points with these fields."""
    return [p for p in data["points"] if all(p[name] == value for name, value in fields.items())]


def curves(data: Mapping[str, Any]) -> dict[results.Setting, list[results.Curve]]:
    """The curves of each setting, without their draws, in the order in which they were recorded."""
    found: dict[tuple[results.Setting, str], list[tuple[int, Interval]]] = {}
    for point in data["points"]:
        got = interval(point.get("error"))
        if got is not None:
            where = results.Setting(*(point[name] for name in results.Setting._fields))
            found.setdefault((where, point["method"]), []).append((point["size"], got))
    made: dict[results.Setting, list[results.Curve]] = {}
    for (where, method), points in found.items():
        sizes, intervals = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        made.setdefault(where, []).append(results.Curve(where, method, list(sizes), list(intervals), []))
    return made


def exponents(data: Mapping[str, Any], method: str) -> tuple[Interval, Interval]:
    """Of a method's time and memory in the length, from a recorded study of complexity."""
    time, memory = (interval(data["exponents"][method][name]) for name in ("seconds", "bytes"))
    assert time is not None
    assert memory is not None
    return time, memory


def table(data: Mapping[str, Any], *, size: str, measure: str = "error", **fields: Any) -> str:
    """Methods by sizes as Markdown, for the points with these fields."""
    points = find(data, **fields)
    sizes = sorted({p["size"] for p in points if p["size"]})
    lines = [f"| method | {' | '.join(f'{size} = {n}' for n in sizes)} |", "|---|" + "---|" * len(sizes)]
    for method in _order(points):
        known = {p["size"]: interval(p.get(measure)) for p in points if p["method"] == method}
        cells = [results.cell(known.get(n) or known.get(0)) for n in sizes]
        lines.append(f"| {words.label(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _order(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """Methods first, then baselines and controls; each by name."""
    last = ("theory", "truncated SVD", "Nystroemformer", "top-k", "uniform", "shuffled V", "zero")
    methods = sorted({p["method"] for p in points})
    return [m for m in methods if m not in last] + [m for m in last if m in methods]
