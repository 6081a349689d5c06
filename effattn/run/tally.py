"""What came out of a sweep: the verdicts, added up."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from effattn.report import summary

if TYPE_CHECKING:
    from effattn.run.records import Damage, Record


@dataclass
class Tally:
    """What is known of one method in one dtype, added up as the verdicts come."""

    outcomes: Counter[str] = field(default_factory=Counter)
    #: the largest error/bound, and on which case
    fraction: float | None = None
    worst: str = ""
    #: a failed case, as the command line names it, and its method: that of the largest error/bound, if one has any
    failing: tuple[str, str] | None = None
    #: outcome -> why the first case with it was set aside
    reasons: dict[str, str] = field(default_factory=dict)
    _failing_fraction: float = -1.0

    def add(self, record: Record) -> None:
        """Add one record."""
        outcome = record.verdict["outcome"]
        self.outcomes[outcome] += 1
        if outcome in summary.SET_ASIDE:
            self.reasons.setdefault(outcome, record.verdict["message"].removeprefix(f"{outcome}: "))
        largest = -1.0
        for quantity in record.verdict["quantities"]:
            given = quantity.get("fraction")
            if given is None:
                continue
            found = float(given)
            found = float("inf") if found != found else found
            largest = max(largest, found)
            if self.fraction is None or found > self.fraction:
                self.fraction, self.worst = found, record.key.case_id
        if summary.failed(record.verdict["outcome"]) and (
            self.failing is None or largest > self._failing_fraction
        ):
            self.failing, self._failing_fraction = (record.key.case_id, record.key.spec), largest

    @property
    def failed(self) -> int:
        """Verdicts against the method."""
        return sum(n for outcome, n in self.outcomes.items() if summary.failed(outcome))

    @property
    def judged(self) -> int:
        """Verdicts that passed or failed."""
        return sum(n for outcome, n in self.outcomes.items() if outcome not in summary.SET_ASIDE)


@dataclass
class Result:
    """What came out of a sweep."""

    folder: Path
    #: (method, dtype) -> what is known
    tallies: dict[tuple[str, str], Tally]
    #: verdicts that were there before, and that this call added
    resumed: int
    added: int
    #: combinations that are the same case as another, which was run once
    same: int
    #: lines that were damaged, whose cases have been run again
    damaged: list[Damage]
    #: seconds in which workers were judging, and in which they were busy
    judging: float
    busy: float

    @property
    def exit_code(self) -> int:
        """0 pass, 1 a method failed, 2 nothing was judged."""
        if any(tally.failed for tally in self.tallies.values()):
            return 1
        return 0 if any(tally.judged for tally in self.tallies.values()) else 2
