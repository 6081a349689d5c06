"""Elements counted by the CPU backend against the formulas."""

from __future__ import annotations

from pathlib import Path

from effattn.study import recorded

DATA = Path(__file__).parent.parent / "measurements" / "study-traffic.json"


def render() -> str:
    """The longest length and the others' ratios."""
    data = recorded.load(DATA)
    lines = [
        f"`{data['command']}`, one head of 64, forward, float32:",
        "",
        "| n | kernel | rows of a block | elements counted | counted / formula | of standard |",
        "|---|---|---|---|---|---|",
    ]
    for point in sorted(data["points"], key=lambda p: (p["n"], p["method"] == "flash", p["size"])):
        (standard,) = recorded.find(data, method="standard", n=point["n"])
        counted = point["elements"][0]
        lines.append(
            f"| {point['n']} | {point['method']} | {point['size']} | {counted:,.0f} |"
            f" {counted / point['formula'][0]:.4f} | {counted / standard['elements'][0]:.1%} |"
        )
    return "\n".join(lines)
