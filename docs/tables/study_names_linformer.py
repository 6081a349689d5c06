"""What the names of projections in a study of Linformer mean."""

from __future__ import annotations

from effattn.study import linformer, words


def render() -> str:
    """A list."""
    return words.listed(linformer.METHODS, size="k")
