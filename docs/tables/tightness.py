"""How near the errors of `flash` come to their bounds, and how large they are beside the noise, from its baseline."""

from __future__ import annotations

import tomllib
from pathlib import Path

from cpu_coverage import markdown

BASELINE = Path(__file__).resolve().parents[2] / "tolerances" / "baselines" / "flash.toml"
#: quantity of the baseline -> what pages call it
TITLES = {"out": "out", "lse": "LSE", "dq": "dQ", "dk": "dK", "dv": "dV"}
DTYPES = ("fp16", "bf16", "fp32")


def render() -> str:
    """A row for each quantity, with both medians in each dtype."""
    (run,) = (
        r for r in tomllib.loads(BASELINE.read_text(encoding="utf-8"))["run"] if r["profile"] == "smoke"
    )
    found = {(row["quantity"], row["dtype"]): row for row in run["row"] if row["option"] == "all"}
    middle = 1  # 25 %, median, ...
    rows = [
        [
            title,
            *(f"{found[name, dtype]['fraction'][middle]:.3f}" for dtype in DTYPES),
            *(f"{found[name, dtype]['z_rms'][middle]:.2f}" for dtype in DTYPES),
        ]
        for name, title in TITLES.items()
    ]
    head = ["", *(f"error/bound, {dtype}" for dtype in DTYPES), *(f"z rms, {dtype}" for dtype in DTYPES)]
    return markdown(head, rows)
