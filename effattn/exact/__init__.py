"""Exact attention in float64, the reference. Imports nothing of what is judged."""

from __future__ import annotations

from effattn.exact.forward import Exact, attention

__all__ = ["Exact", "attention"]
