"""The gate: draws a profile's cases, judges them all, shrinks what failed, and says what came out.

Read `run_gate` first. Nothing here prints; the command line shows what it returns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from effattn.errors import RequestError
from effattn.expected import ACCURACY, Expected
from effattn.report import summary
from effattn.run.evidence import Weighed
from effattn.verdict import Outcome

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.run.shrink import Shrunk
    from effattn.verdict import Verdict

#: Seconds that making a case small may take where every judgement runs into the time limit.
MOST_SHRINKING = 60.0
#: Cases that time out, after which no more are tried: a method that hangs would take hours to say so of all.
MOST_TIMED_OUT = 3
#: Laws that one process finds the cases of in one go.
_LAWS_AT_ONCE = 12
#: Judgements that making the cases of broken laws small may take, all laws together.
MOST_FOR_LAWS = 1500


T = TypeVar("T")


class Progress(Protocol):
    """Who is told how far a gate is."""

    def judged(self, verdict: Verdict, remaining: int) -> None:
        """A verdict, and how many are still to come."""
        ...

    def stage(self, words: str) -> None:
        """What is done besides: finding cases for laws, making failures small, weighing evidence."""
        ...


class Judge(Protocol):
    """A method and how it is run: `effattn.run.isolation.Isolated` or `effattn.run.executor.Local`."""

    @property
    def name(self) -> str:
        """The method's name."""
        ...

    @property
    def spec(self) -> str:
        """How the command line names it."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What loading it did to its process, see `effattn.methods.surroundings`."""
        ...

    @property
    def device(self) -> str:
        """Where it runs."""
        ...

    @property
    def time_limit(self) -> float | None:
        """Seconds for one case."""
        ...

    def judge(self, case: Case, law: str | None = None, *, weigh: str = "", explain: bool = False) -> Verdict:
        """Compare one case with exact attention, or try a law on it; `weigh` as in `effattn.judge`."""
        ...

    def judge_all(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        """Judge all of them: the number of a question and its verdict, in any order."""
        ...

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of effattn, `module:function`, where the method is loaded."""
        ...

    def call_all(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Call a function of effattn for each tuple of arguments, where the method is loaded: the results, in order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to judge, all of it checked before the first case runs."""

    judge: Judge
    dtypes: tuple[str, ...]
    profile: str
    #: Value distributions in place of the profile's own; empty for those.
    values: tuple[str, ...] = ()
    #: Names of the laws to try; empty for none.
    laws: tuple[str, ...] = ()
    #: Laws that the method is known to break.
    expected: tuple[Expected, ...] = ()

    def known(self, verdict: Verdict) -> Expected | None:
        """The entry that expects this failure."""
        if verdict.law is None or not summary.failed(verdict.outcome):
            return None
        covering = (entry for entry in self.expected if entry.covers(verdict.law, verdict.case.dtype))
        return next(covering, None)


@dataclass(frozen=True)
class Question:
    """One case, to be compared with exact attention or, where a law is named, tried by it."""

    case: Case
    law: str | None = None

    @property
    def weigh(self) -> str:
        """What evidence over cases is asked for, see `effattn.judge.judge`."""
        return "quick" if self.law is None else ""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """All failed cases that have the same outcome: comparisons of one dtype, or cases that broke one law, of any dtype.

    Where a method crashed or timed out under laws, these are one failure.
    """

    #: one, or those of a law with commas
    dtype: str
    outcome: str
    #: that of the worst
    law: str | None
    verdicts: tuple[Verdict, ...]
    #: The worst of them.
    worst: Verdict
    #: What became of the smallest of them.
    shrunk: Shrunk


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came out."""

    request: Request
    verdicts: tuple[Verdict, ...]
    failures: tuple[Failure, ...]
    #: Asked-for dtypes and distributions of which no case was judged, in words.
    nothing_judged: tuple[str, ...]
    #: What the cases say together that none of them says alone; of dtypes without failures.
    weighed: Weighed = field(default_factory=Weighed)
    #: Cases left out after `MOST_TIMED_OUT` that timed out.
    not_tried: int = 0

    @property
    def compared(self) -> list[Verdict]:
        """The verdicts of comparisons with exact attention."""
        return [v for v in self.verdicts if v.law is None]

    @property
    def laws(self) -> list[summary.LawRow]:
        """What came of the laws, one row for each dtype."""
        return summary.law_rows(self.verdicts)

    @property
    def unjudged_laws(self) -> list[summary.Unjudged]:
        """The laws of which nothing was judged, by the reason."""
        return summary.unjudged_laws(self.verdicts)

    @property
    def rows(self) -> list[summary.Row]:
        """One row for each dtype."""
        return summary.rows(self.compared, by=lambda v: (v.case.dtype,))

    @property
    def rows_by_values(self) -> list[summary.Row]:
        """One row for each dtype and value distribution."""
        return summary.rows(
            sorted(
                self.compared,
                key=lambda v: (self.request.dtypes.index(v.case.dtype), *_natural(v.case.values)),
            ),
            by=lambda v: (v.case.dtype, v.case.values),
        )

    @property
    def notes(self) -> dict[str, int]:
        """What the method did to its process: words -> cases; 0 for what happened when its file was imported."""
        return dict.fromkeys(self.request.judge.notes, 0) | summary.notes(self.verdicts)

    @property
    def broken_laws(self) -> list[str]:
        """The laws under which the method failed, other than as expected, in the order of the catalogue."""
        failed = [v for v in self.verdicts if summary.failed(v.outcome) and self.request.known(v) is None]
        return list(dict.fromkeys(v.law for v in failed if v.law))

    @property
    def expected(self) -> dict[Expected, int | None]:
        """How many cases failed as each expected failure says: 0 where the law held, None where it was not judged."""
        happened: dict[Expected, int | None] = dict.fromkeys(self.request.expected)
        for verdict in self.verdicts:
            if str(verdict.outcome) in summary.SET_ASIDE:
                continue
            for entry in happened:
                if entry.covers(verdict.law, verdict.case.dtype):
                    happened[entry] = happened[entry] or 0
            if (entry := self.request.known(verdict)) is not None:
                happened[entry] = (happened[entry] or 0) + 1
        return happened

    @property
    def exit_code(self) -> int:
        """0 pass, 1 the method failed, 2 nothing was judged of something that was asked for."""
        if self.failures or not self.weighed.passed:
            return 1
        return 2 if self.nothing_judged else 0

    @property
    def sentence(self) -> str:
        """The result in a sentence."""
        known = sum(cases or 0 for cases in self.expected.values())
        judged = sum(1 for v in self.verdicts if str(v.outcome) not in summary.SET_ASIDE) - known
        name = self.request.judge.name
        if self.failures:
            wrong = sum(len(failure.verdicts) for failure in self.failures)
            laws = len(self.broken_laws)
            broken = f" It breaks {laws} {'law' if laws == 1 else 'laws'}." if laws else ""
            rest = f" After {MOST_TIMED_OUT} that timed out, {self.not_tried} more were not tried."
            return f"{name} failed {wrong} of {judged} judged cases.{broken}{rest if self.not_tried else ''}"
        if self.weighed.alarms:
            return f"{name} passed each of {judged} judged cases, and failed all of them together."
        if self.weighed.unsteady:
            return f"{name} passed all {judged} judged cases, but not when some were judged again."
        if self.nothing_judged:
            return f"Nothing was judged of {' and '.join(self.nothing_judged)}: that is not a pass."
        return (
            f"{name} passed all {judged} judged cases{f', and failed {known} as expected' if known else ''}."
        )


def collect(request: Request, *, progress: Progress | None = None) -> list[Question]:
    """The cases of a request, dtype by dtype: those that are compared first, then those of the laws.

    Raises:
        RequestError: unknown profile or distribution; the model of a `real:` distribution is not installed.
    """
    from effattn import values
    from effattn.case import Case
    from effattn.properties import profiles
    from effattn.run import work

    generated = [name for name in request.values if not name.startswith("real:")]
    real = [name for name in request.values if name.startswith("real:")]
    for name in generated:
        values.get(name)
    collected: list[Question] = []
    for dtype in request.dtypes:
        drawn = profiles.cases(request.profile, dtype=dtype)
        cases = [] if request.values else list(drawn)
        cases += [*profiles.with_values(drawn, generated), *_real_cases(real, dtype=dtype)]
        collected += [Question(case) for case in cases]
        if request.laws:
            if progress is not None:
                progress.stage(f"finding {dtype} cases for {_count(len(request.laws), 'law')}")
            # Where the method is: which cases a law asks depends on what it offers.
            parts = [
                (request.judge.spec, list(request.laws[at : at + _LAWS_AT_ONCE]), request.profile, dtype)
                for at in range(0, len(request.laws), _LAWS_AT_ONCE)
            ]
            for found in request.judge.call_all(work.law_cases, parts):
                collected += [Question(Case.from_dict(case), law) for law, case in found]
    return collected


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _real_cases(names: Sequence[str], *, dtype: str) -> list[Case]:
    if not names:
        return []
    from effattn import real

    return [case for name in names for case in real.cases(name, dtype)]


def run_gate(
    request: Request,
    questions: Sequence[Question],
    *,
    progress: Progress | None = None,
    record: Callable[[Verdict], None] | None = None,
) -> Result:
    """Judge the cases and shrink one failure of each kind.

    Args:
        request: what to judge.
        questions: the cases, from `collect`.
        progress: called after each verdict.
        record: called with each verdict, before `progress`, to store it.

    Raises:
        RequestError: the environment cannot run the method at all, for example for want of a C compiler.
    """
    for entry in request.expected:
        if entry.law == ACCURACY:
            raise RequestError(
                f"an expected failure of {ACCURACY!r}: the gate compares with exact attention whatever is expected."
                " Remove the entry."
            )
    if not questions:
        raise RequestError("there is no case to judge; name at least one dtype")
    found: dict[int, Verdict] = {}
    verdicts: list[Verdict] = []
    timed_out = 0
    with contextlib.closing(request.judge.judge_all(questions)) as answers:
        for number, verdict in answers:
            found[number] = verdict
            while len(verdicts) in found:  # recorded in the order of the questions, whichever was done first
                verdicts.append(found[len(verdicts)])
                if record is not None:
                    record(verdicts[-1])
            if progress is not None:
                progress.judged(verdict, len(questions) - len(found))
            timed_out += verdict.outcome == Outcome.TIMED_OUT
            if timed_out == MOST_TIMED_OUT:
                break
    for number in sorted(found):  # what was done beyond the first that was not, where the end came early
        if number >= len(verdicts):
            verdicts.append(found[number])
            if record is not None:
                record(found[number])
    return Result(
        request=request,
        verdicts=tuple(verdicts),
        not_tried=len(questions) - len(verdicts),
        failures=tuple(_failures(verdicts, request, progress)),
        nothing_judged=tuple(_nothing_judged(verdicts, request)),
        weighed=_weighed(verdicts, request, progress),
    )


def _weighed(verdicts: Sequence[Verdict], request: Request, progress: Progress | None) -> Weighed:
    from effattn.run import evidence

    again = 0

    def explained(case: Case) -> Verdict:
        nonlocal again
        again += 1
        if progress is not None:
            progress.stage(f"weighing the evidence of all cases: judging one again, number {again}")
        return request.judge.judge(case, weigh="explained")

    compared = [verdict for verdict in verdicts if verdict.law is None]
    # A kernel that failed a case is known to be wrong; what else it may be shows when that is mended.
    wrong = {verdict.case.dtype for verdict in compared if summary.failed(verdict.outcome)}
    return evidence.weigh(
        [verdict for verdict in compared if verdict.case.dtype not in wrong],
        explained,
        dtypes=request.dtypes,
    )


def _failures(verdicts: Sequence[Verdict], request: Request, progress: Progress | None) -> list[Failure]:
    from effattn.run.shrink import Shrunk, shrink

    groups: dict[tuple[str, str, str | None], list[Verdict]] = {}
    for verdict in verdicts:
        if summary.failed(verdict.outcome) and request.known(verdict) is None:
            groups.setdefault(_kind(verdict), []).append(verdict)
    failures = []
    left = MOST_FOR_LAWS
    for (_, outcome, _), members in groups.items():
        # The worst case is the best start: it goes on failing for longest while it gets smaller.
        worst = max(members, key=severity)
        if progress is not None:
            progress.stage(f"making failure {len(failures) + 1} of {len(groups)} small")
        most = _judgements(outcome, request.judge.time_limit)
        if worst.law is not None:
            most = min(most, left)
        shrunk = Shrunk(verdict=worst, judgements=0, finished=False)
        if most > 0:
            shrunk = shrink(
                worst,
                lambda case, law=worst.law: request.judge.judge(case, law),
                most_judgements=most,
            )
        if worst.law is not None:
            left -= shrunk.judgements
        if worst.law is None:
            told = _explained(worst, request)
            if told.message == worst.message:
                # A small case agrees with many questions; it is asked only where the worst has nothing to say.
                shrunk = replace(shrunk, verdict=_explained(shrunk.verdict, request))
            worst = told
        failures.append(
            Failure(
                dtype=", ".join(dict.fromkeys(v.case.dtype for v in members)),
                outcome=outcome,
                law=worst.law,
                verdicts=tuple(members),
                worst=worst,
                shrunk=shrunk,
            )
        )
    return failures


def _explained(verdict: Verdict, request: Request) -> Verdict:
    """The verdict with the most likely cause in its message, or with what became of it the next time."""
    if verdict.outcome != Outcome.INACCURATE:
        return verdict
    again = request.judge.judge(verdict.case, explain=True)
    if again.outcome == verdict.outcome:
        return replace(verdict, message=again.message)
    note = f"judged again it came out as {again.outcome}: the same inputs do not give the same output"
    return replace(verdict, message=f"{verdict.message}\n{note}")


def _kind(verdict: Verdict) -> tuple[str, str, str | None]:
    """What verdicts of one `Failure` have in common."""
    outcome = str(verdict.outcome)
    if verdict.law is None:
        return verdict.case.dtype, outcome, None
    return "", outcome, verdict.law if outcome == "law broken" else ""


def _judgements(outcome: str, time_limit: float | None) -> int:
    """How many judgements making a case small may take: few where each takes the whole time limit."""
    from effattn.run.shrink import MOST_JUDGEMENTS

    if outcome != "timed out" or not time_limit:
        return MOST_JUDGEMENTS
    return min(MOST_JUDGEMENTS, int(MOST_SHRINKING / time_limit))


def severity(verdict: Verdict) -> tuple[float, float]:
    """Worse verdicts have a larger one: by error/bound, then by how unlikely the findings are."""
    fractions = [q.fraction for q in verdict.quantities if q.fraction is not None]
    # NaN is worse than any number.
    worst = max((float("inf") if f != f else f for f in fractions), default=0.0)
    least = min((finding.p_value for finding in verdict.findings), default=1.0)
    if str(verdict.outcome) == "biased":
        return (-least, worst)
    return (worst, -least)


def _natural(name: str) -> tuple[str, int]:
    """Layer 2 before layer 10."""
    front, _, layer = name.rpartition("/")
    return (front, int(layer)) if layer.isdigit() else (name, -1)


def _nothing_judged(verdicts: Sequence[Verdict], request: Request) -> list[str]:
    judged = [v.case for v in verdicts if v.law is None and str(v.outcome) not in summary.SET_ASIDE]
    missing = [dtype for dtype in request.dtypes if all(case.dtype != dtype for case in judged)]
    if len(missing) < len(request.dtypes):
        missing += [
            name
            for name in request.values
            if not any(case.values == name or case.values.startswith(name + "/") for case in judged)
        ]
    # A law whose options the method lacks is not supported, and shown; one that met no case to show it is a hole.
    by_law: dict[str, set[str]] = {}
    for verdict in verdicts:
        if verdict.law is not None:
            by_law.setdefault(verdict.law, set()).add(str(verdict.outcome))
    return [*missing, *(f"the law {law}" for law, outcomes in by_law.items() if outcomes == {"not judged"})]
