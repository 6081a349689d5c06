"""The property of the forward pass that every method is held to: its verdict is a pass.

Shared by the test suites: judge a drawn case, tell Hypothesis what was reached and how close to the bound it
came, and fail with everything that a person needs to repeat it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from hypothesis import event, target

from effattn.properties import regimes

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.judge import Verdict
    from effattn.methods.base import Method


def output_is_within_what_rounding_explains(case: Case, method: Method, *, device: str = "cpu") -> Verdict:
    """Judge the case inside a Hypothesis test; the verdict, for further assertions.

    Raises:
        AssertionError: the verdict is a failure. The message has the outcome, where, got, expected, allowed
            and the line that repeats it.
    """
    from effattn.judge import judge
    from effattn.report import summary

    for name in regimes.of(case):
        event(f"regime: {name}")
    verdict = judge(case, method, device=device)
    event(f"outcome: {verdict.outcome}")
    for quantity in verdict.quantities:
        # `target` takes finite numbers only; what is not finite has failed below anyway.
        if quantity.fraction is not None and math.isfinite(quantity.fraction):
            target(float(quantity.fraction), label=f"error/bound of {quantity.name}")
    if summary.failed(verdict.outcome):
        raise AssertionError(explain(verdict))
    return verdict


def explain(verdict: Verdict) -> str:
    """A failed verdict as the message of a test."""
    return (
        f"{verdict.method}: {verdict.outcome}\n{verdict.case.describe()}\n{verdict.message}\n{verdict.replay}"
    )
