"""What a study leaves in its folder: summary.csv, summary.md and charts."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from effattn.report import text
from effattn.study import axes, charts, results, words
from effattn.study.engine import Row

SUMMARY_CSV = "summary.csv"
SUMMARY_MD = "summary.md"


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
        statistics = ("median", "low", "high", "coverage", "draws")
        writer.writerow([*results.Setting._fields, "method", "size", "measure", *statistics])
        for measure in columns:
            for where, of_setting in results.curves(rows, measure).items():
                for curve in of_setting:
                    for number, got in zip(curve.sizes, curve.intervals, strict=True):
                        writer.writerow([*where, curve.method, number, measure, *got])
    drawn = []
    parts = [f"# {title}", "", *lead]
    for where, of_setting in results.curves(rows).items():
        parts += [
            f"## {words.heading(where.part)}: {where.words()}",
            "",
            words.meaning(where.part, size=size),
            "",
        ]
        if charts.available() and any(len(curve.sizes) > 1 for curve in of_setting):
            path = charts.draw(results.chart(where, of_setting, size=size), folder)
            drawn.append(path)
            parts += [f"![{where.words()}]({path.name})", ""]
        shown = results.with_second(rows, where, of_setting)
        parts += [*results.table(shown, size=size), ""]
        if sentences := results.comparisons(of_setting, size=size):
            parts += [*(f"- {text.markdown(line)}" for line in sentences), ""]
    for line in axes.along(results.curves(rows)):
        parts += [f"## {axes.heading(line)}: {line.title(size)}", ""]
        if charts.available():
            path = charts.draw(axes.chart(line, size=size), folder)
            drawn.append(path)
            parts += [f"![{line.title(size)}]({path.name})", ""]
        parts += [*axes.table(line), ""]
    parts += [
        "## What the names mean",
        "",
        *(f"- {text.markdown(line)}" for line in results.legend(rows, size=size)),
        "",
    ]
    (folder / SUMMARY_MD).write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")
    return drawn
