"""z of `flash` by option and value distribution, from what benchmarks/noise.py recorded."""

from __future__ import annotations

import json
from pathlib import Path

from cpu_coverage import markdown

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "noise.json"
#: quantity -> what pages call it
TITLES = {"out": "out", "lse": "LSE", "dq": "dQ", "dk": "dK", "dv": "dV"}
DTYPES = ("fp16", "bf16", "fp32")


def render(measurement: Path = MEASUREMENT) -> str:
    """A row for all cases, each option and each distribution; in a cell fp16, bf16, fp32."""
    found = json.loads(measurement.read_text(encoding="utf-8"))
    z = {(row["group"], row["dtype"], row["quantity"]): row["z_rms"] for row in found["rows"]}
    groups = sorted({row["group"] for row in found["rows"]}, key=lambda g: (g.split()[0], g))

    def cell(group: str, name: str) -> str:
        values = [z.get((group, dtype, name), "-") for dtype in DTYPES]
        if values == ["-"] * 3:
            return "-"
        return " ".join("known" if v is None else "-" if v == "-" else f"{v:.2f}" for v in values)

    rows = [[group, *(cell(group, name) for name in TITLES)] for group in groups]
    versions = ", ".join(f"{name} {found['packages'][name]}" for name in ("torch", "triton"))
    cases = sum(row["cases"] for row in found["rows"] if row["group"] == "all" and row["quantity"] == "out")
    return (
        f"{cases:,} cases of the profile ci; {versions}, {found['machine']['cpu']}, {found['date'][:10]}, commit"
        f" {found['effattn']['commit'][:10]}.\n\n" + markdown(["", *TITLES.values()], rows)
    )
