"""What the cases of a run say together against its method, though none says it alone, for the forms that go by dtype.

`effattn.run.evidence` finds it, and a gate that failed by it has it in its provenance.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from effattn.case import DTYPES


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One alarm, or one case that failed when it was judged again."""

    #: empty where the provenance doesn't say of which
    dtype: str
    sentence: str
    #: the line that judges the case again that says most; empty where there is none
    replay: str = ""

    def concerns(self, dtype: str) -> bool:
        """Whether it speaks of cases of this dtype."""
        return self.dtype in (dtype, "")


def statements(facts: Mapping[str, Any]) -> list[Statement]:
    """All that the provenance of a run has; none where the run did not fail by it."""
    found = facts.get("evidence") or {}
    return [
        *(
            _statement(str(alarm.get("sentence", "")), str(alarm.get("replay", "")))
            for alarm in found.get("alarms", ())
        ),
        *(_statement(str(line)) for line in found.get("unsteady", ())),
    ]


def _statement(sentence: str, replay: str = "") -> Statement:
    dtype = sentence.partition(":")[0]
    return Statement(dtype=dtype if dtype in DTYPES else "", sentence=sentence, replay=replay)


def method(facts: Mapping[str, Any], among: Collection[str]) -> str:
    """The method that a run's evidence is about: that of the gate, or else the first of those that it has verdicts on."""
    named = (facts.get("method") or {}).get("name")
    return next((name for name in among if name == named), next(iter(among), ""))
