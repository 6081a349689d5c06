"""Which law finds which wrong kernel, from what benchmarks/power.py recorded."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "power.json"


def render(measurement: Path = MEASUREMENT) -> str:
    """The counts, and a row for each wrong kernel."""
    found = json.loads(measurement.read_text(encoding="utf-8"))
    kernels = {name: row for name, row in found["kernels"].items() if name != "dense"}
    smoke = sum(row["law"] in row["smoke"] for row in kernels.values())
    ci = sum(bool(row["law"] in row["smoke"] or row.get("ci")) for row in kernels.values())
    only = sum(not row["accuracy"] for row in kernels.values())
    small = [row["small"] for row in kernels.values() if "small" in row]
    sizes = [statistics.median(size[name] for size in small) for name in ("heads", "kv_len")]
    within = sum(size["heads"] <= 2 and size["kv_len"] <= 33 for size in small)
    dtype, heads = found["dtype"], "head" if sizes[0] == 1 else "heads"
    lines = [
        f"Of {len(kernels)} wrong kernels the law that each was made for finds {smoke} on its four cases of `smoke` in"
        f" {dtype}, and {ci} on those of `ci` in three dtypes. The comparison with exact attention finds"
        f" {len(kernels) - only} on `smoke` in {dtype}; {only} are found by laws alone. The case made small has in the"
        f" median {sizes[0]:g} {heads} and {sizes[1]:g} keys; at most 2 heads and 33 keys in {within} of {len(small)}.",
        "",
        "| wrong kernel | what is wrong | the law | laws that find it | accuracy | small case |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in kernels.items():
        size = row.get("small")
        shape = f"{size['heads']} x {size['q_len']} x {size['kv_len']}, d {size['head_dim']}" if size else ""
        where = "" if row["law"] in row["smoke"] else f" ({row['dtype']}, ci)"
        what = row["what"].replace("|", "\\|")
        lines.append(
            f"| {name} | {what} | `{row['law']}`{where} | {len(row['smoke']) or ''} |"
            f" {'finds it' if row['accuracy'] else '**no**'} | {shape} |"
        )
    return "\n".join(lines)
