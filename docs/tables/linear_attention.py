"""Time of the causal linear attention kernels."""

from __future__ import annotations

import json
from pathlib import Path

from effattn.report import text

DATA = Path(__file__).parent.parent / "measurements" / "linear-attention-cpu.json"


def render() -> str:
    """The CPU backend beside Triton's interpreter."""
    compiled, interpreted = json.loads(DATA.read_text(encoding="utf-8"))["runs"]
    lines = ["| | CPU backend | Triton's interpreter | times faster |", "|---|---|---|---|"]
    for name in ("forward", "backward"):
        a, b = (run[f"{name}_s"] for run in (compiled, interpreted))
        lines.append(f"| {name} | {text.seconds(a)} | {text.seconds(b)} | {b / a:.0f} |")
    return "\n".join(lines)
