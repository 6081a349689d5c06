"""Runs cases one after the other in this process.

Verdicts come in the order of the cases, one at a time, so that a caller can record and show each as it comes.
Whatever a method does becomes a verdict. What is effattn's own fault is not caught.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.judge import Verdict
    from effattn.methods.base import Method


def run(cases: Iterable[Case], method: Method, *, device: str = "cpu") -> Iterator[Verdict]:
    """Judge each case in turn; the verdicts in the same order."""
    from effattn.judge import judge

    for case in cases:
        yield judge(case, method, device=device)
