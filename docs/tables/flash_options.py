"""Worst error/bound of `flash` by option, from what benchmarks/options_accuracy.py recorded."""

from __future__ import annotations

import json
from pathlib import Path

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "flash-options.json"
QUANTITIES = {
    "out": "out",
    "lse": "LSE",
    "dq": "dq",
    "dk": "dk",
    "dv": "dv",
    "dbias": "d bias",
    "dsinks": "d sinks",
}


def render() -> str:
    """A row for each option and dtype."""
    found = json.loads(MEASUREMENT.read_text(encoding="utf-8"))
    (run, *_) = found["runs"]
    versions = ", ".join(f"{name} {version}" for name, version in run["packages"].items())
    profiles = ", ".join(sorted({each["profile"] for each in found["runs"]}))
    total = sum(each["cases"] for each in found["runs"])
    lines = [
        f"{total} cases of the profile {profiles}, {versions}, {run['cpu']}, {found['date']}.",
        "",
        f"| option | dtype | cases | failed | {' | '.join(QUANTITIES.values())} |",
        f"|{'---|' * (4 + len(QUANTITIES))}",
    ]
    order = ["none", *sorted({row["option"] for row in found["rows"]} - {"none"})]
    for row in sorted(found["rows"], key=lambda row: (order.index(row["option"]), row["dtype"])):
        cells = (f"{row['worst'][name]:.2f}" if name in row["worst"] else "" for name in QUANTITIES)
        lines.append(
            f"| {row['option']} | {row['dtype']} | {row['cases']} | {row['failed']} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)
