"""What the tables about runs have in common: the record that benchmarks/runs.py wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MEASUREMENT = Path(__file__).resolve().parent.parent / "measurements" / "runs.json"


def section(name: str, measurement: Path) -> tuple[dict[str, Any], str]:
    """The figures of a section, and a sentence about where and when they were measured."""
    found = json.loads(measurement.read_text(encoding="utf-8"))["sections"][name]
    machine = found["machine"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, shared with other programs: load average"
        f" {found['load_before']:.1f} before it began; {found['date'][:10]}, commit {found['effattn']['commit'][:10]}."
    )
    return found["figures"], where
