"""Exponents of time and memory, and what one head costs."""

from __future__ import annotations

from pathlib import Path

from effattn.report import text
from effattn.study import recorded, results

DATA = Path(__file__).parent.parent / "measurements" / "study-complexity.json"


def render() -> str:
    """One row a method."""
    data = recorded.load(DATA)
    lines = [
        f"`{data['command']}`, one head of 64, k = m = 256, float32, one thread:",
        "",
        "| method | n from | to | time exponent | memory exponent | CPU time at n = 16384 | memory there |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in ("standard", "flash", "linformer", "performer", "performer, causal"):
        points = recorded.find(data, method=method)
        (at,) = recorded.find(data, method=method, n=16384)
        time, memory = recorded.exponents(data, method)
        lines.append(
            f"| {method} | {min(p['n'] for p in points)} | {max(p['n'] for p in points)} | {results.cell(time)} |"
            f" {results.cell(memory)} | {text.seconds(at['seconds'][0])} | {at['bytes'][0] / 2**20:.1f} MB |"
        )
    return "\n".join(lines)
