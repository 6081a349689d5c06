"""The evidence over the cases of a gate: found by a quick look at all verdicts, and sure only after a second judgement.

What is known of a correct kernel's roundings takes longer to work out than the rest of a verdict. So verdicts come with what
their errors say as they are, an upper limit of what they say with known roundings taken out. Where that suffices for an
alarm, the cases are judged again, in the order of the run, until the evidence suffices or there are no more of them. The
second stage alone is what the probability is stated for; `effattn.tolerances.evidence` has the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effattn.tolerances import evidence
from effattn.tolerances.evidence import Account

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.verdict import Verdict

_QUANTITIES = {"out": "the output", "dq": "dQ", "dk": "dK", "dv": "dV"}
#: test -> along what the errors lean
_DIRECTIONS = {
    "mean": "one sign",
    "v-mean": "the mean of V",
    "output": "{quantity} itself",
    "top key": "the key of the largest weight",
    "scale": "what a wrong scale does",
}


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A test that the cases of a run fail together."""

    dtype: str
    #: quantity and test, such as "out size"
    name: str
    #: cases until it was clear
    cases: int
    #: size: root mean square of error / expected deviation; direction: lean in deviations, with its sign
    value: float
    #: an upper limit of the probability that a correct kernel shows as much, in a run of any length
    p_value: float
    threshold: float
    #: the line that judges the case again that says most
    replay: str

    @property
    def sentence(self) -> str:
        """In words, on one line."""
        quantity, _, test = self.name.partition(" ")
        named = _QUANTITIES[quantity]
        if test == "size":
            what = f"errors of {named} are {self.value:.3g} times as large as rounding makes them, {evidence.SIZE:g} allowed,"
        else:
            along = _DIRECTIONS[test].format(quantity=named)
            what = f"errors of {named} lean along {along} by {self.value:+.2g} deviations, {evidence.LEAN:g} allowed,"
        chance = f"p {max(self.p_value, 1e-300):.1e}, alarm below {self.threshold:.1e}"
        return f"{self.dtype}: {what} over {self.cases} cases together ({chance})"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "sentence": self.sentence}


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """What the cases of a run say together."""

    alarms: tuple[Alarm, ...] = ()
    #: dtype and test where a quick look was suspicious and known roundings explain it
    explained: tuple[str, ...] = ()
    #: cases that passed at first and, judged again, did not
    unsteady: tuple[Verdict, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the method."""
        return not self.alarms and not self.unsteady

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: what a report shows."""
        return {
            "alarms": [alarm.to_dict() for alarm in self.alarms],
            "explained": list(self.explained),
            "unsteady": [unsteady(verdict) for verdict in self.unsteady],
        }


def unsteady(verdict: Verdict) -> str:
    """What to say of a case that passed at first, on one line."""
    return f"{verdict.case.dtype}: a case passed and, judged again, is {verdict.outcome}: {verdict.message.splitlines()[0]}"


def weigh(verdicts: Sequence[Verdict], again: Callable[[Case], Verdict], *, dtypes: Sequence[str]) -> Weighed:
    """Add up what the verdicts of a run say, dtype by dtype.

    Args:
        verdicts: those of the run, in its order, with evidence.
        again: judges a case again, with what is known of its roundings taken out of its evidence.
        dtypes: all that the run has.
    """
    alarms: list[Alarm] = []
    explained: list[str] = []
    unsteady: list[Verdict] = []
    limit = evidence.threshold(len(dtypes))
    for dtype in dtypes:
        counted = _independent(v for v in verdicts if v.case.dtype == dtype and v.evidence)
        suspicious = _suspicious(counted, limit)
        accounts = {name: Account() for name in suspicious}
        strongest: dict[str, list[tuple[tuple[float, ...], str]]] = {name: [] for name in suspicious}
        open_ = set(suspicious)
        for before in counted:
            if not any(e.name in open_ for e in before.evidence):
                continue
            verdict = again(before.case)
            if str(verdict.outcome) != "pass":
                unsteady.append(verdict)
                continue
            for found in verdict.evidence:
                if found.name not in open_:
                    continue
                account = accounts[found.name]
                account.add(found)
                strongest[found.name].append((found.bets, verdict.replay))
                if account.log_e < limit:
                    continue
                open_.remove(found.name)
                replay = max(strongest[found.name], key=lambda each, best=account.best: each[0][best])[1]
                alarms.append(_alarm(dtype, found.name, account, limit, replay))
            if not open_:
                break
        explained += [f"{dtype} {name}" for name in suspicious if name in open_]
    return Weighed(alarms=tuple(alarms), explained=tuple(explained), unsteady=tuple(unsteady))


def _independent(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """The first verdict of each stream of random numbers: cases that share one need not be independent."""
    found: dict[tuple[str, int], Verdict] = {}
    for verdict in verdicts:
        found.setdefault((verdict.case.values, verdict.case.seed), verdict)
    return list(found.values())


def _suspicious(verdicts: Sequence[Verdict], limit: float) -> list[str]:
    """The tests that may alarm, by an upper limit of the evidence after each case."""
    accounts: dict[str, Account] = {}
    found: dict[str, None] = {}
    for verdict in verdicts:
        for each in verdict.evidence:
            account = accounts.setdefault(each.name, Account())
            account.add(each)
            if account.log_e >= limit:
                found[each.name] = None
    return [name for name in evidence.NAMES if name in found]


def _alarm(dtype: str, name: str, account: Account, limit: float, replay: str) -> Alarm:
    return Alarm(
        dtype=dtype,
        name=name,
        cases=account.cases,
        value=math.sqrt(account.mean) if name.endswith(" size") else account.mean,
        p_value=math.exp(-account.log_e),
        threshold=math.exp(-limit),
        replay=replay,
    )
