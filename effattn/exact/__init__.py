"""Exact attention and its gradients in float64, the reference. Imports nothing of what is judged."""

from __future__ import annotations

from effattn.exact.backward import Gradients, attention_with, gradients
from effattn.exact.forward import Exact, attention
from effattn.exact.scores import Options

__all__ = ["Exact", "Gradients", "Options", "attention", "attention_with", "gradients"]
