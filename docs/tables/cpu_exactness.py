"""What benchmarks/exactness.py measured: operations of the CPU backend, compared with what, on how many values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpu_coverage import markdown

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "exactness.json"


def _result(row: Any) -> str:
    return f"{row['ulp']:.3g} {row['unit']}" if row["unit"] else "bit-exact"


def render() -> str:
    """The table, under the versions and the machine that it was measured with."""
    if not MEASUREMENT.exists():
        return "No measurement is recorded: run the command above, then `python docs/update_tables.py`."
    found = json.loads(MEASUREMENT.read_text(encoding="utf-8"))
    rows = [
        [f"`{r['operation']}`", r["types"], r["reference"], f"{r['values']:,}", _result(r)]
        for r in found["rows"]
    ]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"{versions}, {found['libc']}, {found['machine']}, {found['date']}"
    total = sum(r["values"] for r in found["rows"])
    head = ["operation", "types", "compared with", "values", "result"]
    return f"{where}: {total:,} values in {len(rows)} rows.\n\n" + markdown(head, rows)
