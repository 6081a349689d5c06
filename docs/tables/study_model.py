"""What approximations do to two models."""

from __future__ import annotations

from pathlib import Path

from effattn.study import model, recorded, results

DATA = Path(__file__).parent.parent / "measurements" / "study-model.json"


def render() -> str:
    """All layers together, then one at a time."""
    data = recorded.load(DATA)
    parts = [f"`{data['command']}`", ""]
    for part, name, words in (
        ("minilm", "similarity_change", "similarities move by"),
        ("smollm2", "loss_change", "loss grows by"),
    ):
        points = recorded.find(data, part=part)
        if not points:
            continue
        second = "agreement" if part == "smollm2" else "rank_correlation"
        heading = "next token agrees" if part == "smollm2" else "rank correlation"
        parts += [
            f"{model.MODELS[part]}, {points[0]['n']} tokens, all layers:",
            "",
            f"| method | size | {words} | {heading} |",
            "|---|---|---|---|",
        ]
        for point in recorded.find(data, part=part, values=model.ALL):
            cells = [results.cell(recorded.interval(point[key])) for key in (name, second)]
            parts.append(f"| {point['method']} | {point['size'] or '-'} | {' | '.join(cells)} |")
        parts += [
            "",
            "One layer at a time:",
            "",
            f"| method | size | {words}, median layer | worst layer |",
            "|---|---|---|---|",
        ]
        single = [p for p in points if p["values"] != model.ALL]
        for method, size in dict.fromkeys((p["method"], p["size"]) for p in single):
            found = sorted(
                (p[name][0], p["values"]) for p in single if (p["method"], p["size"]) == (method, size)
            )
            parts.append(
                f"| {method} | {size} | {found[len(found) // 2][0]:.3g} | {found[-1][1]}: {found[-1][0]:.3g} |"
            )
        parts.append("")
    return "\n".join(parts)
