"""Adds verdicts up: one row for each dtype, or for each value of another field.

What is added up, and how, so that a reader can tell what a number means:

- error/bound: the largest over all elements of out and LSE of all judged cases;
- z rms: over all elements of out of all judged cases; z max: the largest in magnitude, with its sign;
- bit-equal: share of all elements of out that equal the correctly rounded exact value bit for bit;
- ulp p50, p99: of out, the median over the cases of the case's own quantile; ulp max: over all elements.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.judge import Outcome, Verdict

#: Outcomes that say that the method is wrong, by their text; the rest are a pass or set aside.
SET_ASIDE = ("not supported", "not judged")
PASS = "pass"

#: judged cases from which on a z says something of a method
ENOUGH = 20
#: dtype -> z rms below which something that is declared to be rounded is not. The output is rounded anyway, which leaves 0.63
#: where P is not, in 16 bits, and at least 0.74 where it is, on the right kernels of `effattn.zoo` (alarms-zoo.json); in fp32,
#: which has no such rounding, 0.13 is left of arithmetic in float64, and at least 0.47 of that in fp32.
MUCH_SMALLER = {"fp16": 0.7, "bf16": 0.7, "fp32": 0.3}
#: dtype -> the share of elements that are the exact ones, rounded, from which on the same is so: at most 0.85 of them where P
#: is rounded, at least 0.97 where it is not.
NEARLY_ALL = {"fp16": 0.93, "bf16": 0.93}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The sum of some verdicts. A number is None where no judged case has it."""

    #: What the verdicts have in common, for example ("fp16",) or ("fp16", "normal").
    label: tuple[str, ...]
    #: Verdicts of any outcome.
    cases: int
    #: Verdicts that passed or failed.
    judged: int
    passed: int
    #: outcome -> how many, the failing ones only.
    failed: dict[str, int]
    not_supported: int
    not_judged: int
    fraction: float | None
    z_rms: float | None
    z_max: float | None
    bit_equal: float | None
    ulp_p50: float | None
    ulp_p99: float | None
    ulp_max: float | None
    #: `Verdict.accuracy`, medians over the cases that passed; None where nothing is quantised.
    accuracy: tuple[float, float] | None
    #: Time in seconds of everything: tensors, method, exact attention, envelope.
    seconds: float
    #: Time in seconds of the method alone.
    method_seconds: float


@dataclass(frozen=True, kw_only=True)
class LawRow:
    """What came of the laws in one dtype."""

    dtype: str
    #: laws that were tried and judged something
    judged: int
    #: of these, laws that held in every case
    held: int
    #: names of those that did not
    broken: tuple[str, ...]
    #: laws of which nothing was judged, see `unjudged_laws`: since the method does not support them, and else
    not_supported: int
    not_judged: int
    #: cases that were judged
    cases: int


@dataclass(frozen=True, kw_only=True)
class Unjudged:
    """Laws of which nothing was judged, for the same reason."""

    reason: str
    #: name of the law -> the dtypes of which this is so; empty if it is so of all
    laws: dict[str, tuple[str, ...]]

    #: "not supported", or "not judged": no case of the profile could show them
    outcome: str

    @property
    def names(self) -> list[str]:
        """The laws, with the dtypes where these are not all."""
        return [f"{law}{' ' if dtypes else ''}{', '.join(dtypes)}" for law, dtypes in self.laws.items()]


def notes(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """What a method did to its process, in the words of the first case of each kind, and in how many cases."""
    first: dict[str, str] = {}
    counted: Counter[str] = Counter()
    for verdict in verdicts:
        for note in verdict.notes:
            kind = "it printed" if note.startswith("it printed") else note.partition(" (")[0]
            counted[first.setdefault(kind, note)] += 1
    return dict(counted)


def unjudged_laws(verdicts: Iterable[Verdict]) -> list[Unjudged]:
    """The laws of which nothing was judged, by the reason: the one with the most laws first."""
    tried: dict[tuple[str, str], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.law is not None:
            tried.setdefault((verdict.law, verdict.case.dtype), []).append(verdict)
    asked: dict[str, list[str]] = {}
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (law, dtype), members in tried.items():
        asked.setdefault(law, []).append(dtype)
        if all(str(verdict.outcome) in SET_ASIDE for verdict in members):
            first = next((v for v in members if str(v.outcome) == "not supported"), members[0])
            reason = " ".join(first.message.split()).removeprefix(f"{first.outcome}: ")
            found.setdefault((str(first.outcome), reason), {}).setdefault(law, []).append(dtype)
    groups = [
        Unjudged(
            reason=reason,
            outcome=outcome,
            laws={law: () if dtypes == asked[law] else tuple(dtypes) for law, dtypes in laws.items()},
        )
        for (outcome, reason), laws in found.items()
    ]
    return sorted(groups, key=lambda group: -len(group.laws))


def law_rows(verdicts: Iterable[Verdict]) -> list[LawRow]:
    """One row for each dtype, of the verdicts that tried a law."""
    groups: dict[str, dict[str, list[str]]] = {}
    for verdict in verdicts:
        if verdict.law is not None:
            outcomes = groups.setdefault(verdict.case.dtype, {}).setdefault(verdict.law, [])
            outcomes.append(str(verdict.outcome))
    rows = []
    for dtype, laws in groups.items():
        judged = {
            law: said for law, found in laws.items() if (said := [o for o in found if o not in SET_ASIDE])
        }
        broken = tuple(law for law, said in judged.items() if any(failed(o) for o in said))
        unsupported = sum("not supported" in said for law, said in laws.items() if law not in judged)
        rows.append(
            LawRow(
                dtype=dtype,
                judged=len(judged),
                held=len(judged) - len(broken),
                broken=broken,
                not_supported=unsupported,
                not_judged=len(laws) - len(judged) - unsupported,
                cases=sum(len(said) for said in judged.values()),
            )
        )
    return rows


def understated(rows: Iterable[Row]) -> list[str]:
    """Of rows by dtype, a sentence for each where errors are much smaller than the declared numerics make expected.

    That is no failure, and says where a declaration is out of date: after a change that keeps P in fp32, for example.
    """
    return [
        f"{row.label[0]}: errors of out are {row.z_rms:.2g} of what the declared numerics make expected, in {row.judged} cases:"
        " the method rounds less than it declares, P perhaps. Declare what it does, and smaller faults are found"
        for row in rows
        if row.z_rms is not None and row.judged >= ENOUGH and _rounds_less(row)
    ]


def _rounds_less(row: Row) -> bool:
    assert row.z_rms is not None
    exact = row.bit_equal is not None and row.bit_equal > NEARLY_ALL.get(row.label[0], 1.0)
    return exact or row.z_rms < MUCH_SMALLER.get(row.label[0], 0.0)


def subject(verdict: Verdict) -> str:
    """The case in words, after the law that was tried on it."""
    law = f"{verdict.law.replace('_', ' ')}: " if verdict.law else ""
    return f"{law}{verdict.case.describe()}"


def failed(outcome: Outcome | str) -> bool:
    """True where the outcome is the method's failure."""
    return str(outcome) != PASS and str(outcome) not in SET_ASIDE


def rows(verdicts: Iterable[Verdict], *, by: Callable[[Verdict], tuple[str, ...]]) -> list[Row]:
    """One row for each label, in the order in which the labels first come."""
    groups: dict[tuple[str, ...], list[Verdict]] = {}
    for verdict in verdicts:
        groups.setdefault(by(verdict), []).append(verdict)
    return [row(label, members) for label, members in groups.items()]


def row(label: tuple[str, ...], verdicts: Sequence[Verdict]) -> Row:
    """The sum of the verdicts."""
    outcomes = Counter(str(verdict.outcome) for verdict in verdicts)
    wrong = {outcome: n for outcome, n in outcomes.items() if failed(outcome)}
    judged = [v for v in verdicts if str(v.outcome) not in SET_ASIDE]
    quantities = [quantity for verdict in judged for quantity in verdict.quantities if quantity.count]
    outs = [quantity for quantity in quantities if quantity.name == "out"]
    squares = [(q.count, q.z_rms) for q in outs if q.z_rms is not None and math.isfinite(q.z_rms)]
    return Row(
        label=label,
        cases=len(verdicts),
        judged=len(judged),
        passed=outcomes[PASS],
        failed=wrong,
        not_supported=outcomes["not supported"],
        not_judged=outcomes["not judged"],
        fraction=_largest([q.fraction for q in quantities]),
        z_rms=math.sqrt(sum(n * z * z for n, z in squares) / sum(n for n, _ in squares)) if squares else None,
        z_max=_largest([q.z_max for q in outs], key=abs),
        bit_equal=_mean([(q.count, q.bit_equal) for q in outs]),
        ulp_p50=_median([q.ulp_p50 for q in outs]),
        ulp_p99=_median([q.ulp_p99 for q in outs]),
        ulp_max=_largest([q.ulp_max for q in outs]),
        accuracy=_accuracy([v.accuracy for v in verdicts if str(v.outcome) == PASS]),
        seconds=sum(sum(v.seconds.values()) for v in verdicts),
        method_seconds=sum(v.seconds.get("method", 0.0) for v in verdicts),
    )


def size(fraction: float | None) -> float:
    """error/bound as a number to sort by: NaN, which no bound holds, is as bad as infinity."""
    if fraction is None:
        return 0.0
    return math.inf if math.isnan(fraction) else fraction


def _accuracy(pairs: Sequence[tuple[float, float] | None]) -> tuple[float, float] | None:
    known = [pair for pair in pairs if pair is not None]
    return (statistics.median(p[0] for p in known), statistics.median(p[1] for p in known)) if known else None


def _largest(values: Sequence[float | None], *, key: Callable[[float], float] = float) -> float | None:
    known = [x for x in values if x is not None]
    if any(math.isnan(x) for x in known):
        return math.nan
    return max(known, key=key, default=None)


def _median(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None and not math.isnan(x)]
    return statistics.median(known) if known else None


def _mean(weighted: Sequence[tuple[int, float | None]]) -> float | None:
    known = [(n, x) for n, x in weighted if x is not None and not math.isnan(x)]
    return sum(n * x for n, x in known) / sum(n for n, _ in known) if known else None
