"""Laws judged: a law, a case and a method become a verdict; a suite of laws becomes tests.

effattn.check(my_attention)                      raises AssertionError with everything that is broken

@effattn.parametrize_with_laws(my_attention)     one test for each law and dtype
def test_attention(check):
    check()
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import NotSupported, RequestError, WrongReturn
from effattn.expected import ACCURACY, Expected, expected_failures
from effattn.verdict import Outcome, Verdict

if TYPE_CHECKING:
    import pytest

    from effattn.case import Case
    from effattn.methods.base import Method
    from effattn.properties.law import Difference, Law

#: profile -> cases for each law and dtype
CASES: dict[str, int] = {"brief": 1, "smoke": 4, "ci": 16}


def judge_law(law: Law, case: Case, method: Method, *, device: str = "cpu") -> Verdict:
    """Try the law on the case. Never raises for what the method does, except KeyboardInterrupt.

    The outcome is pass, law broken, not supported, not judged (the case cannot show the law), crashed, or wrong shape
    or dtype. RequestError where the environment is wrong, as for `effattn.judge.judge`.
    """
    return judge_law_and_why(law, case, method, device=device)[0]


def judge_law_and_why(
    law: Law, case: Case, method: Method, *, device: str = "cpu"
) -> tuple[Verdict, Difference | None]:
    """`judge_law`, with the two answers that differ where that broke the law."""
    from effattn import threads
    from effattn.methods import surroundings

    with surroundings.noted() as notes, threads.fitted(case):
        verdict, difference = _judge_law(law, case, method, device)
    return replace(verdict, notes=tuple(notes)) if notes else verdict, difference


def _judge_law(law: Law, case: Case, method: Method, device: str) -> tuple[Verdict, Difference | None]:
    from effattn import judge as judging
    from effattn.properties.law import Broken, Raised, SetAside, check

    def verdict(outcome: Outcome, message: str) -> Verdict:
        return Verdict(
            case=case,
            method=method.name,
            outcome=outcome,
            message=message,
            law=law.name,
            replay=judging.replay_line(case, method.spec, device, law=law.name),
        )

    try:
        check(law, case, method, device=device)
    except Broken as error:
        broken = verdict(Outcome.LAW_BROKEN, f"law broken: {law.sentence}\n{error}\n{law.statement}")
        return broken, error.difference
    except SetAside as error:
        text = str(error)
        kind = Outcome.NOT_SUPPORTED if text.startswith("not supported") else Outcome.NOT_JUDGED
        return verdict(kind, text), None
    except (NotSupported, NotImplementedError) as error:
        return verdict(Outcome.NOT_SUPPORTED, f"not supported: {error or type(error).__name__}"), None
    except WrongReturn as error:
        return verdict(Outcome.WRONG_SHAPE, str(error)), None
    except Raised as error:
        return verdict(Outcome.CRASHED, judging.crash(error.__cause__ or error)), None
    return verdict(Outcome.PASS, f"{law.sentence}: holds"), None


def choose(names: Iterable[str] = ()) -> list[Law]:
    """The laws of these names or families; all of them if there are none. RequestError for an unknown one."""
    from effattn.properties.catalogue import all_laws
    from effattn.properties.law import FAMILIES, get

    laws = all_laws()
    wanted: dict[str, Law] = {}
    for name in names:
        if name in FAMILIES:
            wanted |= {one.name: one for one in laws.values() if one.family == name}
        else:
            wanted[name] = get(name)
    return list((wanted or laws).values())


def cases_of(law: Law, profile: str, dtype: str, method: Method | None = None) -> list[Case]:
    """The cases on which a profile tries a law: the same on every machine.

    Args:
        law, profile, dtype: which law, how many cases, of which dtype.
        method: cases that this method offers and in which the law has something to compare; one that it does not offer
            if there are none. None: those of a method that offers everything.
    """
    count = _count(profile)
    if method is None:
        drawn = [law.draw(law.name, index, dtype) for index in range(count)]
        return [case for case in dict.fromkeys(drawn) if law.holds(case)]
    from effattn.properties import law_cases

    found = list(itertools.islice(law_cases.candidates(law, method, dtype, count), count))
    return found or [law_cases.unasked(law, method, dtype, count)]


def _count(profile: str) -> int:
    if profile not in CASES:
        raise RequestError(f"unknown profile {profile!r}; expected one of {', '.join(CASES)}")
    return CASES[profile]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """What came of one law in one dtype."""

    law: str
    dtype: str
    verdicts: tuple[Verdict, ...]
    #: the failure that is easiest to read, made small, if there is one
    failure: Verdict | None
    #: the first failure that was met
    found: Verdict | None

    @property
    def judged(self) -> int:
        """Verdicts that say something."""
        return sum(map(says_something, self.verdicts))

    @property
    def why_not(self) -> str:
        """Why nothing was judged."""
        return self.verdicts[0].message if self.verdicts else "no case of the profile can show it"


def try_law(law: Law, method: Method, *, dtype: str, profile: str = "smoke", device: str = "cpu") -> Tried:
    """Try a law on the cases of a profile, up to the first failure, which is made small.

    Where the method itself answers that it does not offer a case, another one is drawn in its place.
    """
    from effattn.properties import law_cases
    from effattn.run.shrink import shrink

    count = _count(profile)
    verdicts: list[Verdict] = []
    for case in law_cases.candidates(law, method, dtype, count):
        verdict = judge_law(law, case, method, device=device)
        verdicts.append(verdict)
        if failed(verdict):
            small = shrink(verdict, lambda case: judge_law(law, case, method, device=device)).verdict
            return Tried(law=law.name, dtype=dtype, verdicts=tuple(verdicts), failure=small, found=verdict)
        if sum(map(says_something, verdicts)) == count or len(verdicts) == 3 * count:
            break
    if not verdicts:
        verdicts = [judge_law(law, law_cases.unasked(law, method, dtype, count), method, device=device)]
    return Tried(law=law.name, dtype=dtype, verdicts=tuple(verdicts), failure=None, found=None)


def try_accuracy(
    method: Method, *, dtype: str, profile: str = "smoke", device: str = "cpu", shrinking: bool = True
) -> Tried:
    """Hold the method against exact attention on the cases of a profile, up to the first failure."""
    from effattn import judge as judging
    from effattn.properties import profiles
    from effattn.run.shrink import shrink

    verdicts: list[Verdict] = []
    for case in profiles.cases(profile, dtype=dtype):
        verdict = judging.judge(case, method, device=device)
        verdicts.append(verdict)
        if failed(verdict):
            small = verdict
            if shrinking:
                small = shrink(verdict, lambda case: judging.judge(case, method, device=device)).verdict
            return Tried(law=ACCURACY, dtype=dtype, verdicts=tuple(verdicts), failure=small, found=verdict)
    return Tried(law=ACCURACY, dtype=dtype, verdicts=tuple(verdicts), failure=None, found=None)


def says_something(verdict: Verdict) -> bool:
    """Whether something was judged."""
    return verdict.outcome not in (Outcome.NOT_SUPPORTED, Outcome.NOT_JUDGED)


def failed(verdict: Verdict) -> bool:
    """Whether the verdict is held against the method."""
    return says_something(verdict) and verdict.outcome != Outcome.PASS


def explain(tried: Tried) -> str:
    """A failure in words: the law, where, got and expected, the small case and the one that was found."""
    assert tried.failure is not None
    assert tried.found is not None
    lines = [
        f"{tried.failure.method}, {tried.dtype}: {tried.failure.message}",
        f"smallest case found: {tried.failure.case.describe()}",
        f"    {tried.failure.replay}",
    ]
    if tried.found.case != tried.failure.case:
        lines += [f"first found: {tried.found.case.describe()}", f"    {tried.found.replay}"]
    return "\n".join(lines)


def _method(of: Any) -> Method:
    from effattn import methods
    from effattn.methods.base import Method
    from effattn.methods.user import UserFunction

    if isinstance(of, Method):
        return of
    if isinstance(of, str):
        return methods.get(of)
    if callable(of):
        return UserFunction(of)
    raise RequestError(f"a method given as {type(of).__name__}: expected a function, or the name of a method")


def check(
    method: Any,
    *,
    laws: Sequence[str] = (),
    dtypes: Sequence[str] = ("fp16", "bf16", "fp32"),
    profile: str = "smoke",
    device: str = "cpu",
    accuracy: bool = True,
) -> dict[str, int]:
    """Hold a function to exact attention and to all laws; for a notebook or a test of one line.

    Args:
        method: a function `fn(q, k, v, *, causal=False, scale=None, ...)`, or a method's name.
        laws: names of laws or families; all of them if empty.
        dtypes: fp16, bf16, fp32.
        profile: "smoke" or "ci".
        device: "cpu" or "cuda".
        accuracy: compare with exact attention as well.

    Returns:
        name of the law -> cases judged.

    Raises:
        AssertionError: something is broken; the message has all of it.
        RequestError: nothing was judged, or the request is wrong.
    """
    subject = _method(method)
    tried = [
        *(try_accuracy(subject, dtype=dtype, profile=profile, device=device) for dtype in dtypes if accuracy),
        *(
            try_law(law, subject, dtype=dtype, profile=profile, device=device)
            for law in choose(laws)
            for dtype in dtypes
        ),
    ]
    broken = [one for one in tried if one.failure is not None]
    if broken:
        raise AssertionError("\n\n".join(explain(one) for one in broken))
    judged: dict[str, int] = {}
    for one in tried:
        judged[one.law] = judged.get(one.law, 0) + one.judged
    if not any(judged.values()):
        raise RequestError(f"nothing was judged: {tried[0].why_not if tried else 'no law was named'}")
    return judged


# -- pytest ---------------------------------------------------------------------------------------------------------


class Check:
    """One law, one method, one dtype: call it in a test."""

    def __init__(self, law: str, method: Any, dtype: str, profile: str | None, device: str | None) -> None:
        self.law, self.dtype = law, dtype
        self._method, self._profile, self._device = method, profile, device
        #: what came, after a call
        self.tried: Tried | None = None

    def __repr__(self) -> str:
        return f"{self.law}-{self.dtype}"

    def __call__(self) -> None:
        """Raises AssertionError where the law is broken; skips, with the reason, where nothing was judged."""
        import pytest

        from effattn import pytest_plugin

        settings = pytest_plugin.settings()
        profile = self._profile or settings.profile
        device = self._device or settings.device
        subject = _method(self._method)
        if self.law == ACCURACY:
            tried = try_accuracy(subject, dtype=self.dtype, profile=profile, device=device)
        else:
            tried = try_law(choose([self.law])[0], subject, dtype=self.dtype, profile=profile, device=device)
        self.tried = tried
        pytest_plugin.remember(subject.name, tried)
        if tried.failure is not None:
            raise AssertionError(explain(tried))
        if not tried.judged:
            # Not a pass: nothing was compared. The summary at the end of the run names the law again.
            pytest.skip(f"not judged: {tried.why_not}")


def parametrize_with_laws(
    method: Any,
    *,
    laws: Sequence[str] = (),
    dtypes: Sequence[str] = ("fp16", "bf16", "fp32"),
    profile: str | None = None,
    device: str | None = None,
    accuracy: bool = True,
    expected: str | Path | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A pytest decorator: one test for each law and dtype. The test takes `check` and calls it.

        @effattn.parametrize_with_laws(my_attention)
        def test_attention(check):
            check()

    Args:
        method, laws, dtypes, accuracy: as for `check`.
        profile, device: those of `--effattn-profile` and `--effattn-device` if not given.
        expected: a file of expected failures. A test that is expected to fail and passes, fails.

    Raises:
        RequestError: an unknown law or dtype, or an entry of `expected` that matches no test.
    """
    import pytest

    from effattn.case import DTYPES

    for dtype in dtypes:
        if dtype not in DTYPES:
            raise RequestError(f"unknown dtype {dtype!r}; expected some of {', '.join(DTYPES)}")
    names = [*([ACCURACY] if accuracy else []), *(law.name for law in choose(laws))]
    known = expected_failures(expected) if expected is not None else []
    matched: set[Expected] = set()
    parameters: list[Any] = []
    for name in names:
        for dtype in dtypes:
            marks: list[pytest.MarkDecorator] = []
            for entry in known:
                if entry.covers(name, dtype):
                    matched.add(entry)
                    # The file's reason; strict, so that a law that holds again is told.
                    marks.append(pytest.mark.xfail(reason=entry.reason, strict=True, raises=AssertionError))
            one = Check(name, method, dtype, profile, device)
            parameters.append(pytest.param(one, id=f"{name}-{dtype}", marks=marks))
    for entry in known:
        if entry not in matched:
            raise RequestError(
                f"expected failures {expected}: the entry for {entry.law!r}, dtype {entry.dtype!r} matches no test."
                " Remove it."
            )
    return pytest.mark.parametrize("check", parameters)
