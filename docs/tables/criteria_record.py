"""What the three tables of published criteria have in common: the record, and which inputs are a project's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent.parent / "measurements" / "criteria.json"
NOT_RECORDED = "No measurement is recorded: run the command above, then `python docs/update_tables.py`."


def load() -> dict[str, Any] | None:
    """The record, or None before the first."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else None


def own(sets: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The set of inputs that a criterion's project uses; effattn has none but the smoke profile."""
    if name == "effattn":
        return None
    return next((found for inputs, found in sets.items() if inputs != "smoke" and name in found), None)
