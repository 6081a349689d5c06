"""Second moments of kernel estimates over their closed forms."""

from __future__ import annotations

from pathlib import Path

from effattn.study import recorded

DATA = Path(__file__).parent.parent / "measurements" / "study-moments.json"


def render() -> str:
    """Measured / theory, with Student's 99.9 % intervals."""
    data = recorded.load(DATA)
    lines = [
        f"`{data['command']}`: measured / closed form, 99.9 % intervals of the mean over"
        f" {data['points'][0]['draws']} averages of a million draws:",
        "",
        "| features | |z|^2 = 0.5 | 1.0 | 1.5 | 2.0 | intervals that hold 1, of 20 | widest half |".replace(
            "|z|", "\\|z\\|"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(p["method"] for p in data["points"]):
        known = {p["size"]: p["mean"] for p in recorded.find(data, method=method)}
        cells = [
            f"{m:.3f} ({low:.3f} to {high:.3f})"
            for m, low, high in (known[s] for s in (500, 1000, 1500, 2000))
        ]
        held = sum(low <= 1 <= high for _, low, high in known.values())
        widest = max((high - low) / 2 for _, low, high in known.values())
        lines.append(f"| {method} | {' | '.join(cells)} | {held} | {widest:.1%} |")
    return "\n".join(lines)
