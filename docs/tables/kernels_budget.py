"""What the attention kernels take on GPUs, from tests/kernels_budget.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent.parent.parent / "tests" / "kernels_budget.toml"


def render() -> str:
    """A row for each kernel, dtype and compute capability: the most that a configuration takes, over head_dims and options."""
    found = tomllib.loads(FILE.read_text(encoding="utf-8"))
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for name, entry in found["configurations"].items():
        kernel, dtype, _dim, _option, capability = name.split("-")
        groups.setdefault((kernel, dtype, int(capability)), []).append(entry)
    lines = [
        f"Triton {found['triton']}: {len(found['configurations'])} configurations.",
        "",
        "| kernel | dtype | capability | configurations | shared memory, KB | registers | spills | occupancy, % | products |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, dtype, capability), entries in groups.items():
        occupancy = sorted({entry["occupancy"] for entry in entries})
        products = sorted({entry["products"] for entry in entries})
        lines.append(
            f"| {kernel} | {dtype} | {capability / 10:.1f} | {len(entries)}"
            f" | {_span([round(entry['shared'] / 1024) for entry in entries])}"
            f" | {_span([entry['registers'] for entry in entries])} | {max(entry['spills'] for entry in entries)}"
            f" | {_span(occupancy)} | {', '.join(products)} |"
        )
    return "\n".join(lines)


def _span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"
