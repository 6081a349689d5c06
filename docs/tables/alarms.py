"""False alarms on the right kernels of the zoo, from what benchmarks/alarms.py recorded."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from cpu_coverage import markdown

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "alarms-zoo.json"


def _row(dtype: str, rows: list[Any]) -> list[str]:
    judged = sum(sum(r["outcomes"].values()) - r["outcomes"].get("not supported", 0) for r in rows)
    rms = [r["z_rms_all_elements"] for r in rows if not r["alarms"]]
    fractions = [r["fraction_max"] for r in rows if not r["alarms"]]
    alarms = sum(len(r["alarms"]) for r in rows)
    return [
        dtype,
        f"{judged:,}",
        str(alarms),
        f"{max(fractions):.2f}",
        f"{min(rms):.2f} to {max(rms):.2f}",
    ]


def render(measurement: Path = MEASUREMENT) -> str:
    """A row for each dtype, and what the alarms are about."""
    found = json.loads(measurement.read_text(encoding="utf-8"))
    results = found["results"]
    dtypes = list(dict.fromkeys(r["dtype"] for r in results))
    rows = [_row(dtype, [r for r in results if r["dtype"] == dtype]) for dtype in dtypes]
    about = Counter(
        (r["method"].partition(":")[2], r["dtype"], a["case"].get("values", "normal"))
        for r in results
        for a in r["alarms"]
    )
    what = "".join(f"\nAlarms: `{m}`, {d}, values `{v}`: {n}.\n" for (m, d, v), n in sorted(about.items()))
    kernels = len({r["method"] for r in results})
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "numpy"))
    head = ["dtype", "verdicts", "alarms", "largest error/bound", "z rms of a kernel"]
    return (
        f"{found['verdicts']:,} verdicts on {kernels} kernels; {versions}, {found['machine']['cpu']}, {found['date'][:10]}, "
        f"commit {found['effattn']['commit'][:10]}.\n\n" + markdown(head, rows) + what
    )
