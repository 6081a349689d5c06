"""What each law finds, from what benchmarks/power.py recorded."""

from __future__ import annotations

import json
from pathlib import Path

from effattn.properties.catalogue import KEPT, all_laws

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "power.json"


def found(measurement: Path = MEASUREMENT) -> dict[str, dict[str, list[str]]]:
    """law -> the kernels that it finds: "all", those that the comparison with exact attention misses, those of no other law."""
    kernels = json.loads(measurement.read_text(encoding="utf-8"))["kernels"]
    rows: dict[str, dict[str, list[str]]] = {
        name: {"all": [], "unseen": [], "alone": []} for name in all_laws()
    }
    for kernel, row in kernels.items():
        laws = {*row["smoke"], *row.get("ci", ())}
        for law in laws:
            rows[law]["all"].append(kernel)
            if not row["accuracy"]:
                rows[law]["unseen"].append(kernel)
            if len(laws) == 1:
                rows[law]["alone"].append(kernel)
    return rows


def render(measurement: Path = MEASUREMENT) -> str:
    """A row for each law."""
    rows = found(measurement)
    unseen = sum(bool(row["unseen"]) for row in rows.values())
    lines = [
        f"{unseen} of {len(rows)} laws find a kernel that the comparison with exact attention misses;"
        f" {sum(bool(row['alone']) for row in rows.values())} find one that no other law finds.",
        "",
        "| law | kernels | missed by accuracy | found by this law alone | else, why it is kept |",
        "|---|---|---|---|---|",
    ]
    for law, row in rows.items():
        lines.append(
            f"| `{law}` | {len(row['all'])} | {_some(row['unseen'])} | {_some(row['alone'])} | {KEPT.get(law, '')} |"
        )
    return "\n".join(lines)


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
