"""What bound and noise cost: from what benchmarks/bounds.py recorded."""

from __future__ import annotations

import json
from pathlib import Path

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "bounds.json"


def render(measurement: Path = MEASUREMENT) -> str:
    """A row for each shape, columns for the dtypes."""
    found = json.loads(measurement.read_text(encoding="utf-8"))
    dtypes = list(dict.fromkeys(row["dtype"] for row in found["rows"]))
    shapes = dict.fromkeys((row["heads"], row["length"], row["head_dim"]) for row in found["rows"])
    by_place = {(row["heads"], row["length"], row["head_dim"], row["dtype"]): row for row in found["rows"]}
    kinds = ("output", "gradients")
    titles = [f"{kind}, {dtype}" for kind in kinds for dtype in dtypes]
    lines = [
        f"| heads x length x head_dim | {' | '.join(titles)} |",
        f"|---|{'---|' * len(titles)}",
    ]
    for shape in shapes:
        cells = [f"{by_place[(*shape, dtype)][kind]['ratio']:.1f}" for kind in kinds for dtype in dtypes]
        lines.append(f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |")
    machine = found["machine"]
    lines += [
        "",
        f"Processor time over that of the exact pass on one thread; {machine['cpu']}, {machine['cores']} cores, shared with"
        f" other programs; {found['date'][:10]}, commit {found['effattn']['commit'][:10]}.",
    ]
    return "\n".join(lines)
