"""Committed baselines: how large a method's errors were, so that a change that makes them larger is seen.

A baseline is a TOML file that people read and review. For each kind of run (where it ran, by which dot model, on which
profile) it has, for each dtype, option and quantity, the order statistics of two numbers of every case:

    fraction    largest error / bound
    z_rms       root mean square of error / expected deviation

Comparison. If nothing has changed, the values of the m cases of a run and the n of the baseline are exchangeable. Then
the number K of new values above the baseline's r-th smallest has

    P(K >= k) = P(X >= k),   X hypergeometric: n - r + k drawn of n + m, m of them new

whatever the distribution (exceedances; E. J. Gumbel, H. von Schelling, Ann. Math. Stat. 21, 1950, 247). Ties count for the
method. All tests of one comparison together alarm with a probability of at most `ALARM`.
"""

from __future__ import annotations

import math
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.case import DTYPES
from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.verdict import Verdict

#: version of the file's form
SCHEMA = 1
#: the probability that a comparison calls a method worse, or better, that is the same
ALARM = 1e-6
#: the numbers of a case that are kept
STATISTICS = ("fraction", "z_rms")
#: the shares of cases that lie at or below the order statistics that are kept
QUANTILES = (0.25, 0.5, 0.75, 0.9, 1.0)
#: a row of this name has all cases of its dtype, one of the other name those without options
ALL, PLAIN = "all", "plain"
#: more cases than any run has; tests of so many would be of numbers that nobody can hold
MOST_CASES = 10**9
#: a quantile that grows by no more than this is not looser: another machine's exp may do as much
SAME = 0.02


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What makes runs comparable."""

    device: str
    dot_model: str
    profile: str

    def __str__(self) -> str:
        return f"{self.device}, dot model {self.dot_model}, profile {self.profile}"


@dataclass(frozen=True)
class Key:
    """One row."""

    dtype: str
    option: str
    quantity: str

    def __str__(self) -> str:
        return f"{self.dtype} {self.option} {self.quantity}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of one row: how many cases, and of each statistic its values at `QUANTILES`."""

    cases: int
    values: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Section:
    """All rows of one kind of run, and where they come from."""

    kind: Kind
    #: machine, versions, commit, date, reason
    origin: Mapping[str, str]
    rows: Mapping[Key, Row]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A file."""

    method: str
    sections: tuple[Section, ...]

    def section(self, kind: Kind) -> Section | None:
        """That of a kind of run."""
        return next((section for section in self.sections if section.kind == kind), None)


@dataclass(frozen=True, kw_only=True)
class Change:
    """A statistic of one row that changed."""

    key: Key
    statistic: str
    #: the quantile at which it is most significant, before and now
    quantile: float
    before: float
    now: float
    #: cases beyond the former value, of all
    beyond: int
    cases: int
    p_value: float
    threshold: float

    def __str__(self) -> str:
        side = "above" if self.now > self.before else "below"
        return (
            f"{self.key}: {self.statistic} {self.now:.3g}, was {self.before:.3g} ({_name(self.quantile)}); {self.beyond} of "
            f"{self.cases} cases are {side} that (p {self.p_value:.1e}, alarm below {self.threshold:.1e})"
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run beside a baseline."""

    worse: tuple[Change, ...] = ()
    better: tuple[Change, ...] = ()
    #: rows of the baseline that the run has no case of, and rows that the baseline does not have
    gone: tuple[Key, ...] = ()
    new: tuple[Key, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing is worse and nothing is judged no more."""
        return not self.worse and not self.gone


@dataclass
class _Values:
    fraction: list[float] = field(default_factory=list)
    z_rms: list[float] = field(default_factory=list)


def collect(verdicts: Iterable[Verdict]) -> dict[Key, dict[str, list[float]]]:
    """The statistics of all verdicts that have some, by row: one row for all cases, one for each option."""
    from effattn.properties.regimes import options_of

    found: dict[Key, _Values] = {}
    for verdict in verdicts:
        if verdict.law is not None:
            continue
        options = options_of(verdict.case) or (PLAIN,)
        for quantity in verdict.quantities:
            if not quantity.count or quantity.fraction is None:
                continue
            for option in (ALL, *options):
                values = found.setdefault(Key(verdict.case.dtype, option, quantity.name), _Values())
                values.fraction.append(_short(quantity.fraction))
                # None: all roundings are known, and none is off by more than that.
                values.z_rms.append(_short(quantity.z_rms or 0.0))
    return {key: vars(values) for key, values in found.items()}


def _short(x: float) -> float:
    """With the digits that the file has, so that equal values stay equal."""
    return float(f"{x:.6g}")


def rank(quantile: float, cases: int) -> int:
    """Which of the sorted values is kept, from 1 on."""
    return max(1, math.ceil(quantile * cases))


def summarise(values: Mapping[Key, Mapping[str, Sequence[float]]]) -> dict[Key, Row]:
    """Rows from the values of single cases."""
    rows = {}
    for key, by_statistic in values.items():
        cases = len(by_statistic[STATISTICS[0]])
        kept = {
            name: tuple(sorted(given)[rank(quantile, cases) - 1] for quantile in QUANTILES)
            for name, given in by_statistic.items()
        }
        rows[key] = Row(cases=cases, values=kept)
    return rows


def compare(section: Section, verdicts: Iterable[Verdict], *, alarm: float = ALARM) -> Comparison:
    """A run's verdicts beside the rows of the same kind. Dtypes that the run did not ask for are left alone.

    A dtype of which nothing is judged any more, since the method refuses it, has all its rows gone. `alarm` is the
    probability that something is called worse or better where nothing has changed.
    """
    verdicts = list(verdicts)
    values = collect(verdicts)
    dtypes = {verdict.case.dtype for verdict in verdicts if verdict.law is None}
    before = {key: row for key, row in section.rows.items() if key.dtype in dtypes}
    both = [key for key in before if key in values]
    # Two sides, each quantile but the largest value, which only a bound can hold.
    tests = max(1, 2 * len(both) * len(STATISTICS) * (len(QUANTILES) - 1))
    worse: list[Change] = []
    better: list[Change] = []
    for key in both:
        for statistic in STATISTICS:
            for side, changes in ((1.0, worse), (-1.0, better)):
                found = _change(key, statistic, before[key], values[key][statistic], side, alarm / tests)
                if found is not None:
                    changes.append(found)
    return Comparison(
        worse=tuple(worse),
        better=tuple(better),
        gone=tuple(key for key in before if key not in values),
        new=tuple(key for key in values if key not in before),
    )


def _change(
    key: Key, statistic: str, row: Row, values: Sequence[float], side: float, threshold: float
) -> Change | None:
    """The most significant quantile on one side (1 larger, -1 smaller), if it is significant."""
    from scipy.stats import hypergeom

    n, m = row.cases, len(values)
    best: Change | None = None
    now = sorted(values)
    for quantile, before in zip(QUANTILES[:-1], row.values[statistic], strict=False):
        beyond = sum(side * x > side * before for x in values)
        r = rank(quantile, n)
        others = n - r if side > 0.0 else r - 1
        p = float(hypergeom.sf(beyond - 1, n + m, m, others + beyond)) if beyond else 1.0
        if p < threshold and (best is None or p < best.p_value):
            best = Change(
                key=key,
                statistic=statistic,
                quantile=quantile,
                before=before,
                now=now[rank(quantile, m) - 1],
                beyond=beyond,
                cases=m,
                p_value=p,
                threshold=threshold,
            )
    return best


def looser(before: Section | None, rows: Mapping[Key, Row]) -> list[str]:
    """What a new record would allow that the old one did not: larger values, rows that are gone."""
    if before is None:
        return []
    found = []
    dtypes = {key.dtype for key in rows}
    for key, row in before.rows.items():
        if key.dtype not in dtypes:
            continue
        if key not in rows:
            found.append(f"{key} is judged no more")
            continue
        for statistic in STATISTICS:
            for quantile, old, new in zip(
                QUANTILES, row.values[statistic], rows[key].values[statistic], strict=True
            ):
                if new > old * (1.0 + SAME):
                    found.append(f"{key}: {statistic} ({_name(quantile)}) {old:.3g} -> {new:.3g}")
    return found


def updated(
    baseline: Baseline | None,
    *,
    method: str,
    kind: Kind,
    verdicts: Iterable[Verdict],
    origin: Mapping[str, str],
) -> Baseline:
    """The file with this run's rows in place of those of the same kind and dtypes; `origin` needs a reason if looser.

    RequestError for another method, for a run without verdicts, and where an entry becomes looser without a reason.
    """
    if baseline is not None and baseline.method != method:
        raise RequestError(
            f"the baseline is of {baseline.method!r}, the run of {method!r}: give the file of {method!r}, or a new one."
        )
    rows = summarise(collect(verdicts))
    if not rows:
        raise RequestError("the run has no verdict with errors in it: there is nothing to record.")
    before = None if baseline is None else baseline.section(kind)
    loose = looser(before, rows)
    if loose and not origin.get("reason"):
        shown = "\n".join(f"  {line}" for line in loose[:10])
        more = f"\n  and {len(loose) - 10} more" if len(loose) > 10 else ""
        raise RequestError(
            f"{len(loose)} entries would become looser; give --reason with why that is right:\n{shown}{more}"
        )
    dtypes = {key.dtype for key in rows}
    kept = {} if before is None else {key: row for key, row in before.rows.items() if key.dtype not in dtypes}
    section = Section(kind=kind, origin={"reason": "first record", **origin}, rows={**kept, **rows})
    others = () if baseline is None else tuple(s for s in baseline.sections if s.kind != kind)
    return Baseline(method=method, sections=(*others, section))


def render(baseline: Baseline) -> str:
    """The file's text."""
    lines = [
        "# Errors of a method, as they were. Written by `effattn baseline`; see docs/baselines.md.",
        f"# Of each statistic: {', '.join(map(_name, QUANTILES))}.",
        f"schema = {SCHEMA}",
        f"method = {_quoted(baseline.method)}",
    ]
    for section in baseline.sections:
        lines += ["", "[[run]]"]
        lines += [f"{name} = {_quoted(value)}" for name, value in vars(section.kind).items()]
        lines += ["", "[run.origin]"]
        lines += [f"{name} = {_quoted(value)}" for name, value in sorted(section.origin.items())]
        for key in sorted(
            section.rows, key=lambda key: (key.dtype, key.option != ALL, key.option, key.quantity)
        ):
            row = section.rows[key]
            lines += ["", "[[run.row]]"]
            lines += [f"{name} = {_quoted(value)}" for name, value in vars(key).items()]
            lines.append(f"cases = {row.cases}")
            lines += [f"{name} = [{', '.join(map(repr, row.values[name]))}]" for name in STATISTICS]
    return "\n".join(lines) + "\n"


def load(path: Path) -> Baseline:
    """Read a file. RequestError, with the place, for anything that `render` would not write."""
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except FileNotFoundError:
        raise RequestError(
            f"baseline {path}: there is no such file; `effattn baseline RUN --file {path}` writes one."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"baseline {path}: cannot be read ({error}).") from None
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"baseline {path}: no TOML ({error}).") from None
    try:
        return _read(data)
    except _Invalid as error:
        raise RequestError(f"baseline {path}: {error}.") from None


def kind_of(facts: Mapping[str, Any]) -> Kind:
    """What a run is compared by, from its provenance."""
    return Kind(
        device=facts["device"], dot_model=facts.get("dot_model") or "hardware", profile=facts["profile"]
    )


def section_for(baseline: Baseline, kind: Kind, *, file: Path, own_values: bool) -> Section:
    """The rows that a run of this kind is compared with. RequestError where there are none.

    `own_values` says that the run's values were not those of its profile.
    """
    if own_values:
        raise RequestError("a baseline is for a profile's own values; leave --values out.")
    section = baseline.section(kind)
    if section is None:
        there = "; ".join(str(section.kind) for section in baseline.sections) or "nothing"
        raise RequestError(
            f"baseline {file}: it has nothing for {kind}, only for {there}. Run without --baseline, then add it by "
            f"`effattn baseline RUN --file {shlex.quote(str(file))}`."
        )
    return section


class _Invalid(Exception):
    pass


def _read(data: dict[str, Any]) -> Baseline:
    if not data:
        raise _Invalid(
            "it is empty; `effattn baseline RUN --file FILE` writes a new one where there is no file"
        )
    schema = data.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise _Invalid(
            f"schema {schema!r}; this effattn reads schema {SCHEMA}. Record it again, or use the effattn that wrote it"
        )
    _only(data, ("schema", "method", "run"), "the file")
    sections = tuple(_read_section(section) for section in _tables(data.get("run"), "run"))
    kinds = [section.kind for section in sections]
    if len(set(kinds)) < len(kinds):
        raise _Invalid("two [[run]] of the same kind; leave one")
    return Baseline(method=_text(data.get("method"), "method"), sections=sections)


def _read_section(data: dict[str, Any]) -> Section:
    _only(data, ("device", "dot_model", "profile", "origin", "row"), "[[run]]")
    kind = Kind(**{name: _text(data.get(name), name) for name in ("device", "dot_model", "profile")})
    origin = data.get("origin", {})
    if not isinstance(origin, dict):
        raise _Invalid("[run.origin] is no table")
    rows = dict(_read_rows(_tables(data.get("row"), "run.row")))
    return Section(kind=kind, origin={name: _text(x, name) for name, x in origin.items()}, rows=rows)


def _read_rows(tables: Iterable[dict[str, Any]]) -> Iterator[tuple[Key, Row]]:
    from effattn.properties import regimes

    known = (ALL, PLAIN, *regimes.OPTIONS)
    seen = set()
    for data in tables:
        names = ("dtype", "option", "quantity")
        _only(data, (*names, "cases", *STATISTICS), "[[run.row]]")
        key = Key(*(_text(data.get(name), name) for name in names))
        if key.dtype not in DTYPES:
            raise _Invalid(f"the row {key} has the dtype {key.dtype!r}; expected {', '.join(DTYPES)}")
        if key.option not in known:
            raise _Invalid(f"the row {key} has the option {key.option!r}; expected {', '.join(known)}")
        if key in seen:
            raise _Invalid(f"the row {key} is there twice")
        seen.add(key)
        cases = data.get("cases")
        if isinstance(cases, bool) or not isinstance(cases, int) or not 1 <= cases <= MOST_CASES:
            raise _Invalid(f"{key}: cases is {cases!r}; expected how many there were, 1 to {MOST_CASES}")
        yield (
            key,
            Row(
                cases=cases, values={name: _numbers(data.get(name), f"{key}: {name}") for name in STATISTICS}
            ),
        )


def _numbers(given: Any, what: str) -> tuple[float, ...]:
    if not isinstance(given, list) or len(given) != len(QUANTILES):
        raise _Invalid(
            f"{what} is {given!r}; expected {len(QUANTILES)} numbers, {', '.join(map(_name, QUANTILES))}"
        )
    for x in given:
        if isinstance(x, bool) or not isinstance(x, (int, float)) or not 0.0 <= x < math.inf:
            raise _Invalid(f"{what} has {x!r}; expected finite numbers, at least 0")
    numbers = tuple(map(float, given))
    if list(numbers) != sorted(numbers):
        raise _Invalid(f"{what} is {given!r}; expected numbers that do not fall")
    return numbers


def _only(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise _Invalid(
            f"{where} has the unknown key {', '.join(map(repr, unknown))}; expected only {', '.join(known)}"
        )


def _tables(given: Any, name: str) -> list[dict[str, Any]]:
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(x, dict) for x in given):
        raise _Invalid(f"{name} is no list of tables; write [[{name}]]")
    return given


def _text(given: Any, name: str) -> str:
    if not isinstance(given, str) or not given:
        raise _Invalid(f"{name} is {given!r}; expected a text")
    return given


def _name(quantile: float) -> str:
    return {0.5: "median", 1.0: "largest"}.get(quantile, f"{100.0 * quantile:g} %")


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = "".join(
        {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\t": "\\t"}.get(
            c, c if c.isprintable() else f"\\U{ord(c):08x}"
        )
        for c in text
    )
    return f'"{escaped}"'
