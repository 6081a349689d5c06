"""What a recorded verdict must hold, so that all who read records agree on which are damaged.

`fault` finds what `Verdict.from_dict` would refuse, and what would have another type in a table, in a tenth of the time:
nothing is built, and a case is looked at once for all seeds.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from effattn.case import Case

_REQUIRED = frozenset(("case", "method", "outcome", "message", "quantities", "findings", "seconds", "replay"))
_OPTIONAL = frozenset(("law", "evidence", "accuracy", "notes"))
#: Not asked of the class, whose module brings scipy, a second.
_FINDING = frozenset(("name", "statistic", "p_value", "threshold"))
_EVIDENCE = frozenset(("name", "mean", "rows", "bets"))
#: Numbers that JSON has not are texts.
_NO_JSON = frozenset(("inf", "-inf", "nan"))
_MOST = 2**63

#: case as text, without its seed -> what is wrong with it
_cases: dict[str, str | None] = {}
_MOST_CASES = 10_000


def fault(verdict: Mapping[str, Any]) -> str | None:
    """What is wrong with a verdict as data, in words; None where nothing is."""
    if not (_REQUIRED <= verdict.keys() <= _REQUIRED | _OPTIONAL):
        return _of_fields(verdict, _REQUIRED, _OPTIONAL)
    for name in ("method", "outcome", "message", "replay"):
        if type(verdict[name]) is not str:
            return f"{name} is no text"
    if verdict["outcome"] not in _outcomes():
        return f"outcome {verdict['outcome'][:40]!r} is none of those that there are"
    if (law := verdict.get("law")) is not None and type(law) is not str:
        return "law is no text"
    seconds = verdict["seconds"]
    if type(seconds) is not dict:
        return "seconds is no object"
    if not all(map(_is_number, seconds.values())):
        return "seconds: a number is none"
    for name, look in (("quantities", _quantity), ("findings", _finding), ("evidence", _evidence)):
        if (wrong := _of_list(name, verdict.get(name, ()), look)) is not None:
            return wrong
    notes = verdict.get("notes", ())
    if not isinstance(notes, (list, tuple)) or not all(type(note) is str for note in notes):
        return "notes is no list of texts"
    accuracy = verdict.get("accuracy")
    if accuracy is not None and not (
        type(accuracy) is list and len(accuracy) == 2 and all(map(_is_number, accuracy))
    ):
        return "accuracy is no pair of numbers"
    return _of_case(verdict["case"])


def _of_list(name: str, found: object, look: Callable[[dict[str, Any]], str | None]) -> str | None:
    if not isinstance(found, (list, tuple)):
        return f"{name} is no list"
    for item in found:
        if type(item) is not dict:
            return f"{name} is no list of objects"
        if (wrong := look(item)) is not None:
            return f"{name}: {wrong}"
    return None


def _quantity(told: dict[str, Any]) -> str | None:
    if not (told.keys() <= _QUANTITY.keys() and "name" in told and "count" in told):
        return _of_fields(told, frozenset(("name", "count")), frozenset(_QUANTITY))
    for name, x in told.items():
        if not _QUANTITY[name](x):
            return f"{name} {_short(x)} is not what it should be"
    return None


def _finding(told: dict[str, Any]) -> str | None:
    return _of_numbers(told, _FINDING)


def _evidence(told: dict[str, Any]) -> str | None:
    bets = told.get("bets")
    if type(bets) is not list or not all(map(_is_number, bets)):
        return "bets is no list of numbers"
    return _of_numbers(told, _EVIDENCE)


def _of_numbers(told: dict[str, Any], names: frozenset[str]) -> str | None:
    """An object with a name, numbers and possibly bets, which are looked at elsewhere."""
    if told.keys() != names:
        return _of_fields(told, names, frozenset())
    if type(told["name"]) is not str:
        return "name is no text"
    for name in names - {"name", "bets"}:
        if not _is_number_or_none(told[name]):
            return f"{name} {_short(told[name])} is no number"
    return None


def _of_case(case: object) -> str | None:
    if type(case) is not dict:
        return "its case is none"
    # The seed is what differs from case to case of a sweep; recorded activations alone have but one.
    seed = case.get("seed", 0)
    told = case
    if type(seed) is int and 0 <= seed < _MOST and not str(case.get("values", "")).startswith("real:"):
        told = {**case, "seed": 0}
    text = repr(told)  # with the types: 1 and True are equal
    if text not in _cases:
        if len(_cases) >= _MOST_CASES:
            _cases.clear()
        try:
            Case.from_dict(told)
            _cases[text] = None
        except (
            TypeError,
            ValueError,
            AttributeError,
            OverflowError,
            RecursionError,
        ) as error:  # RequestError too
            _cases[text] = f"its case: {error}"
    return _cases[text]


def _of_fields(told: Mapping[str, Any], required: frozenset[str], optional: frozenset[str]) -> str:
    """In words, which fields are missing or unknown."""
    if unknown := sorted(name for name in told if name not in required | optional):
        return f"unknown field {', '.join(_short(name) for name in unknown[:5])}"
    return f"it has no {', '.join(sorted(required - told.keys()))}"


def _is_number(x: object) -> bool:
    if type(x) is float:
        return math.isfinite(x)
    return x in _NO_JSON if type(x) is str else type(x) is int and -_MOST < x < _MOST


def _is_number_or_none(x: object) -> bool:
    return x is None or _is_number(x)


def _is_text(x: object) -> bool:
    return type(x) is str


def _is_count(x: object) -> bool:
    return type(x) is int and 0 <= x < _MOST


def _is_place(x: object) -> bool:
    """Indices along the axes of an output; None where there is no place."""
    return x is None or (type(x) is list and all(type(i) is int and 0 <= i < 2**31 for i in x))


_QUANTITY: dict[str, Callable[[object], bool]] = {
    "name": _is_text,
    "count": _is_count,
    "set_aside": _is_count,
    "worst": _is_place,
    **dict.fromkeys(
        (
            "fraction",
            "bit_equal",
            "ulp_p50",
            "ulp_p99",
            "ulp_max",
            "z_rms",
            "z_max",
            "z_mean",
            "got",
            "exact",
            "allowed",
        ),
        _is_number_or_none,
    ),
}


def _short(x: object) -> str:
    text = repr(x) if type(x) is not int or abs(x) < _MOST else "beyond 64 bits"
    return text if len(text) <= 40 else f"{text[:40]}..."


@functools.cache
def _outcomes() -> frozenset[str]:
    from effattn.verdict import Outcome

    return frozenset(map(str, Outcome))
