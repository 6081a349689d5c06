"""What a judgement says, as data that goes to JSON and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError
from effattn.tolerances.evidence import Evidence

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.tolerances.statistics import Finding


class Outcome(StrEnum):
    """What a verdict says."""

    #: within the bound, and the errors look like rounding
    PASS = "pass"
    #: an error above the bound of a correct kernel
    INACCURATE = "inaccurate"
    #: within the bound, but too large on the whole, of one sign, or in proportion to something
    BIASED = "biased"
    #: NaN, or an infinity where the exact value is a finite number of the dtype
    NON_FINITE = "non-finite"
    #: no tensor, or one of the wrong shape, dtype or device
    WRONG_SHAPE = "wrong shape or dtype"
    #: a property that every correct method has does not hold
    LAW_BROKEN = "law broken"
    #: the method does not offer what the case asks for
    NOT_SUPPORTED = "not supported"
    #: rounding in this dtype may do anything, so there is nothing to hold the method to
    NOT_JUDGED = "not judged"
    #: the method raised, or its process died
    CRASHED = "crashed"
    #: an instrument of `--check` found that a kernel does what it must not: accesses outside of a tensor, races, ...
    FAULTY = "faulty"
    #: the method was not done within the time limit of a case
    TIMED_OUT = "timed out"


#: Characters of a message or note at most: an exception's text may be megabytes, and every record would have it.
MOST_CHARACTERS = 8000
_KEPT_END = 2000
_KEPT_START = MOST_CHARACTERS - _KEPT_END - 60


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """The errors of one output, "out" or "lse", in numbers. None where there is no element to count."""

    name: str
    #: elements judged; elements set aside because their row is ill-conditioned
    count: int
    set_aside: int = 0
    #: largest error / bound
    fraction: float | None = None
    #: share of elements equal to the correctly rounded exact value
    bit_equal: float | None = None
    #: distance from the correctly rounded exact value in units in the last place: quantiles and largest
    ulp_p50: float | None = None
    ulp_p99: float | None = None
    ulp_max: float | None = None
    #: error / expected deviation: root mean square, the largest in magnitude with its sign, mean; of elements that have one
    z_rms: float | None = None
    z_max: float | None = None
    z_mean: float | None = None
    #: where error / bound is largest, and what is there
    worst: tuple[int, ...] | None = None
    got: float | None = None
    exact: float | None = None
    allowed: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What came out of one case."""

    case: Case
    #: the method's name
    method: str
    outcome: Outcome
    #: what, where, got, expected, allowed and why; one line for a pass
    message: str
    quantities: tuple[Quantity, ...] = ()
    #: the statistical tests that failed
    findings: tuple[Finding, ...] = ()
    #: what the case adds to the evidence of a run; only of a pass, and only where it was asked for
    evidence: tuple[Evidence, ...] = ()
    #: root mean square distance of out from exact attention on the inputs before they were quantised, relative to that of the
    #: latter: of what came, and of exact attention on what the codes stand for; None where nothing is quantised
    accuracy: tuple[float, float] | None = None
    #: the law that was tried; None where the output was compared with exact attention
    law: str | None = None
    #: what the method did to its process: each change of global state, which was set back, and that it printed
    notes: tuple[str, ...] = ()
    #: seconds by stage: inputs, method, exact, envelope, verdict
    seconds: dict[str, float] = field(default_factory=dict)
    #: the command line that judges the case again
    replay: str

    def __post_init__(self) -> None:
        # What a method says may be anything: a record is UTF-8, and some kilobytes of it suffice.
        object.__setattr__(self, "message", _kept(self.message))
        if self.notes:
            object.__setattr__(self, "notes", tuple(map(_kept, self.notes)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinities and NaN become the strings "inf", "-inf" and "nan"."""
        return {
            "case": self.case.to_dict(),
            "method": self.method,
            **({} if self.law is None else {"law": self.law}),
            "outcome": str(self.outcome),
            "message": self.message,
            "quantities": [_plain(q) for q in self.quantities],
            "findings": [_plain(f) for f in self.findings],
            **({"evidence": [_plain(e) for e in self.evidence]} if self.evidence else {}),
            **({} if self.accuracy is None else {"accuracy": list(self.accuracy)}),
            **({"notes": list(self.notes)} if self.notes else {}),
            "seconds": {name: round(s, 6) for name, s in self.seconds.items()},
            "replay": self.replay,
        }

    @classmethod
    def from_dict(cls, data: object) -> Verdict:
        """The verdict that `to_dict` described; RequestError for anything else."""
        from effattn.case import Case

        if not isinstance(data, dict):
            raise RequestError(f"a verdict given as {type(data).__name__}: expected a JSON object.")
        expected = [f.name for f in fields(cls)]
        if sorted({*data, "law", "evidence", "accuracy", "notes"}) != sorted(expected):
            raise RequestError(
                f"a verdict with the fields {', '.join(sorted(map(str, data)))}: expected {', '.join(expected)}."
                " Was it written by another version of effattn?"
            )
        try:
            return cls(
                case=Case.from_dict(data["case"]),
                method=_text(data["method"]),
                outcome=Outcome(data["outcome"]),
                message=_text(data["message"]),
                law=None if data.get("law") is None else _text(data["law"]),
                quantities=tuple(_rebuild(Quantity, q) for q in data["quantities"]),
                findings=_findings(data["findings"]),
                evidence=tuple(_rebuild(Evidence, e) for e in data.get("evidence", ())),
                accuracy=_pair(data.get("accuracy")),
                notes=tuple(map(_text, data.get("notes", ()))),
                seconds={_text(name): float(s) for name, s in data["seconds"].items()},
                replay=_text(data["replay"]),
            )
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"a verdict that cannot be read: {error}.") from None


def _kept(text: str) -> str:
    """The text as it is recorded: without what UTF-8 has not, cut in its middle where it is long."""
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    if len(text) <= MOST_CHARACTERS:
        return text
    left_out = len(text) - _KEPT_START - _KEPT_END
    return f"{text[:_KEPT_START]}\n[{left_out} characters left out]\n{text[-_KEPT_END:]}"


def _findings(data: list[Any]) -> tuple[Finding, ...]:
    if not data:
        return ()
    # Only where there is one: this import brings scipy, a second.
    from effattn.tolerances.statistics import Finding

    return tuple(_rebuild(Finding, finding) for finding in data)


def _plain(item: Any) -> dict[str, Any]:
    # Not `dataclasses.asdict`, which copies deeply: every verdict of a sweep comes through here.
    data = dict(vars(item))
    for name, x in data.items():
        if type(x) is float:
            if not math.isfinite(x):
                data[name] = str(x)
        elif type(x) is tuple:
            data[name] = list(x)
    return data


def _pair(data: Any) -> tuple[float, float] | None:
    if data is None:
        return None
    first, second = data
    return float(first), float(second)


def _text(x: object) -> str:
    if not isinstance(x, str):
        raise ValueError(f"{x!r} where a text is expected")
    return x


def _rebuild(cls: type, data: dict[str, Any]) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{data!r} where an object is expected")
    unknown = set(data) - {f.name for f in fields(cls)}
    if unknown:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {}
    for name, x in data.items():
        if name == "name":
            values[name] = _text(x)
        elif name == "worst":
            values[name] = None if x is None else tuple(int(i) for i in x)
        elif name == "bets":
            values[name] = tuple(float(b) for b in x)
        elif name in ("count", "set_aside"):
            values[name] = int(x)
            if not 0 <= values[name] < 2**63:
                raise ValueError(f"{name} out of range")
        else:
            values[name] = None if x is None else float(x)
    return cls(**values)
