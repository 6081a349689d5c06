"""How long gates take, from what benchmarks/speed.py recorded."""

from __future__ import annotations

import json
from pathlib import Path

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "gate-speed.json"


def render(measurement: Path = MEASUREMENT) -> str:
    """A row for each gate, and the rate of the laws."""
    record = json.loads(measurement.read_text(encoding="utf-8"))
    figures, machine = record["figures"], record["machine"]
    gates = [*figures["gates"], *figures.get("ci", [])]
    lines = ["| gate | cache of kernels | time | kernels compiled | cases |", "|---|---|---|---|---|"]
    for row in gates:
        empty = row["state"] != "warm"
        lines.append(
            f"| `{row['command']}` | {'empty' if empty else 'filled'} | {row['seconds']:.0f} s |"
            f" {row['kernels'] if empty else 0} | {row['cases']} |"
        )
    rates = ", ".join(f"{row['cases'] / row['seconds']:.0f} in {row['dtype']}" for row in figures["laws"])
    return "\n".join(
        [
            *lines,
            "",
            f"Cases a second in the forward laws, up to 128 queries and keys, in {figures['laws'][0]['processes']} processes:"
            f" {rates}. {machine['cpu']}, {machine['cores']} cores.",
        ]
    )
