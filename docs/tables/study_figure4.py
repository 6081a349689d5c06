"""Errors at figure 4's sizes for four scales of the inputs, with the slopes."""

from __future__ import annotations

from pathlib import Path

from effattn.study import recorded, results

DATA = Path(__file__).parent.parent / "measurements" / "study-figure4.json"


def render() -> str:
    """One table for each scale."""
    data = recorded.load(DATA)
    parts = [f"`{data['command']}`: medians of 15 draws, 95 % intervals of the medians."]
    for scale in sorted({p["input_scale"] for p in data["points"]}):
        z2 = 2 * scale**2 * 4
        parts += [
            f"Entries N(0, {scale:g}^2), so that |z|^2 has the mean {z2:g}:",
            recorded.table(data, size="m", input_scale=scale),
        ]
        slopes = [s for s in data["slopes"] if s["input_scale"] == scale]
        cells = [f"{s['method']} {results.cell(recorded.interval(s['slope']))}" for s in slopes]
        parts.append(f"Slopes in m: {'; '.join(cells)}.")
    return "\n\n".join(parts)
