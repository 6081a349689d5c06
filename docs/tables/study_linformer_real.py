"""Errors on Q, K and V of a real model."""

from __future__ import annotations

from pathlib import Path

from effattn.study import recorded

DATA = Path(__file__).parent.parent / "measurements" / "study-linformer-real.json"


def render() -> str:
    """Methods by sizes."""
    data = recorded.load(DATA)
    words = "medians of 3 draws with their range; one number where nothing is random"
    return f"`{data['command']}`: {words}.\n\n" + recorded.table(data, size="k", part="error")
