"""What runs there are, what is in one, and what differs between two."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from effattn.errors import RequestError
from effattn.report import summary
from effattn.run import records, store
from effattn.run.records import Damage, Key
from effattn.verdict import Verdict

#: Factor by which error/bound must change before a difference is worth naming: half as much again.
NOTABLE = 1.5
#: error/bound below which a change is noise: a tenth of what is allowed.
QUIET = 0.1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One run in a list."""

    folder: Path
    #: see `store.content_id`
    id: str
    kind: str
    started: str
    #: verdicts that are recorded, and that the run was to have
    recorded: int
    expected: int | None
    methods: tuple[str, ...]
    outcomes: dict[str, int]
    damaged: tuple[Damage, ...]
    #: whether it came to its end
    ended: bool
    #: whether the verdicts say against the method together what none says alone (`effattn.run.evidence`)
    failed_together: bool

    @property
    def failed(self) -> int:
        """Verdicts against the method."""
        return sum(n for outcome, n in self.outcomes.items() if summary.failed(outcome))


def entry(folder: Path) -> Entry:
    """One run. Raises RequestError where the folder is none."""
    provenance = store.read_provenance(folder, [])
    damaged: list[Damage] = []
    contents: list[str] = []
    outcomes: Counter[str] = Counter()
    methods: dict[str, None] = {}
    for record in store.read_records(folder, damaged):
        contents.append(record.content())
        outcomes[str(record.verdict.get("outcome"))] += 1
        methods[str(record.verdict.get("method"))] = None
    return Entry(
        folder=folder,
        id=records.identity(iter(contents)),
        kind=str(provenance.get("kind_of_run", "")),
        started=str(provenance.get("started", "")),
        recorded=len(contents),
        expected=provenance.get("cases"),
        methods=tuple(methods),
        outcomes=dict(outcomes),
        damaged=tuple(damaged),
        ended="ended" in provenance,
        failed_together=any(provenance.get("evidence", {}).get(name) for name in ("alarms", "unsteady")),
    )


def runs_in(folder: Path, damaged: list[Damage] | None = None) -> list[Path]:
    """The run folders directly inside a folder, the first started first.

    Args:
        folder: the folder.
        damaged: takes the runs that cannot be read, such as those of a newer schema, which are left out; without it, the
            first is an error.

    Raises:
        RequestError: there is no such folder, or a run cannot be read and `damaged` is None.
    """
    if not folder.is_dir():
        raise RequestError(f"there is no folder {str(folder)!r}; expected one that has run folders in it")
    started: dict[Path, str] = {}
    for run in sorted(inner for inner in folder.iterdir() if store.holds_run(inner)):
        try:
            started[run] = str(store.read_provenance(run, []).get("started", ""))
        except RequestError as error:
            if damaged is None:
                raise
            damaged.append(Damage(run / store.PROVENANCE, 0, f"{error}; it is left out"))
    return sorted(started, key=lambda run: (started[run], run.name))


def resolve(given: str, among: Path = store.DEFAULT_FOLDER) -> Path:
    """A run folder by its path, by its name in `among`, or by the start of its identity.

    Raises:
        RequestError: none, or more than one, is meant.
    """
    for path in (Path(given), among / given):
        if store.holds_run(path):
            return path
    found: list[Path] = []
    if len(given) >= 4 and all(c in "0123456789abcdef" for c in given) and among.is_dir():
        found = [run for run in runs_in(among, []) if store.content_id(run).startswith(given)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(str(run) for run in found[:5])
        raise RequestError(f"{given!r} is the identity of {len(found)} runs: {names}; name one by its folder")
    raise RequestError(
        f"{given!r} is no run: expected a run folder, the name of one in {among}/, or at least four digits of an "
        "identity that `effattn runs list` shows"
    )


@dataclass(frozen=True, kw_only=True)
class Change:
    """What became of one case between two runs."""

    key: Key
    before: Verdict
    after: Verdict

    @property
    def case(self) -> str:
        """The case in words, after the law that was tried on it."""
        return summary.subject(self.after)

    @property
    def ratio(self) -> float | None:
        """error/bound after over before; None where one of them has none."""
        a, b = fraction(self.before), fraction(self.after)
        if a is None or b is None:
            return None
        return b / a if a else (1.0 if b == 0 else math.inf)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two runs compared, case by case."""

    #: passed before, fail now; worst first
    broken: list[Change] = field(default_factory=list)
    #: set aside before (not supported, not judged), fail now; worst first
    failing: list[Change] = field(default_factory=list)
    #: passed before, set aside now
    unjudged: list[Change] = field(default_factory=list)
    #: failed before, pass now
    mended: list[Change] = field(default_factory=list)
    #: outcome the same, error/bound notably larger, or smaller
    worse: list[Change] = field(default_factory=list)
    better: list[Change] = field(default_factory=list)
    #: another outcome of any other kind
    other: list[Change] = field(default_factory=list)
    #: cases that only one of them has
    only_before: int = 0
    only_after: int = 0
    #: cases that both have
    both: int = 0

    @property
    def regressed(self) -> bool:
        """Whether a case fails now that did not fail before."""
        return bool(self.broken or self.failing)

    @property
    def kinds(self) -> list[Kind]:
        """The changes by kind, the worst kind first; those that there are none of too."""
        return [
            Kind("broken", self.broken, "failing", usual=True),
            Kind("failing and not judged before", self.failing, "failing"),
            Kind("passed and judged no more", self.unjudged, "doubtful"),
            Kind("notably worse", self.worse, "doubtful", usual=True),
            Kind("other outcome", self.other, "doubtful"),
            Kind("mended", self.mended, "good", usual=True),
            Kind("notably better", self.better, "good", usual=True),
        ]

    @property
    def sentence(self) -> str:
        """How many cases were compared and how many changed in which way, and how many only one of the runs has."""
        if not self.both:
            return "The runs have no case in common; nothing was compared."
        words = [f"{len(kind.changes)} {kind.title}" for kind in self.kinds if kind.changes or kind.usual]
        alone = [
            f" {n} {'case is' if n == 1 else 'cases are'} in the {which} run only."
            for n, which in ((self.only_before, "former"), (self.only_after, "new"))
            if n
        ]
        return f"{self.both} cases compared: {', '.join(words)}.{''.join(alone)}"


@dataclass(frozen=True)
class Kind:
    """The changes of one kind."""

    #: in words, for a heading
    title: str
    changes: list[Change]
    #: what they say of the method: that it fails where it did not, that it may be worse, or that it is better
    level: Literal["failing", "doubtful", "good"]
    #: whether it is named where there are none too
    usual: bool = False


def fraction(verdict: Verdict) -> float | None:
    """The largest error/bound of a verdict; NaN counts as infinite."""
    known = [q.fraction for q in verdict.quantities if q.fraction is not None]
    return max((math.inf if math.isnan(x) else x for x in known), default=None)


def verdicts_by_case(folder: Path, damaged: list[Damage] | None = None) -> dict[Key, Verdict]:
    """The verdicts of a run by what was judged; `damaged` takes what cannot be read, which is left out in any case."""
    return dict(store.read_judged(folder, [] if damaged is None else damaged))


def compare(
    before: Mapping[Key, Verdict], after: Mapping[Key, Verdict], *, by_method: bool | None = None
) -> Difference:
    """Compare two runs.

    Args:
        before, after: verdicts by what was judged.
        by_method: match cases of the same method only; if not given, unless each run has one method alone.
    """
    if by_method is None:
        by_method = len({key.spec for key in before}) > 1 or len({key.spec for key in after}) > 1
    if not by_method:
        before = {key._replace(spec=""): verdict for key, verdict in before.items()}
        after = {key._replace(spec=""): verdict for key, verdict in after.items()}
    both = [key for key in before if key in after]
    result = Difference(
        only_before=len(before) - len(both), only_after=len(after) - len(both), both=len(both)
    )
    for key in both:
        change = Change(key=key, before=before[key], after=after[key])
        was, now = str(change.before.outcome), str(change.after.outcome)
        if summary.failed(now) and not summary.failed(was):
            (result.broken if was == summary.PASS else result.failing).append(change)
        elif was == summary.PASS and now != was:
            result.unjudged.append(change)
        elif summary.failed(was) and now == summary.PASS:
            result.mended.append(change)
        elif was != now:
            result.other.append(change)
        else:
            _sort_in(result, change)
    for changes in (result.broken, result.failing, result.worse):
        changes.sort(key=lambda change: -(fraction(change.after) or 0.0))
    for changes in (result.mended, result.better):
        changes.sort(key=lambda change: -(fraction(change.before) or 0.0))
    return result


def _sort_in(result: Difference, change: Change) -> None:
    ratio = change.ratio
    if ratio is None or max(fraction(change.before) or 0.0, fraction(change.after) or 0.0) < QUIET:
        return
    if ratio >= NOTABLE:
        result.worse.append(change)
    elif ratio <= 1 / NOTABLE:
        result.better.append(change)


def facts(folder: Path) -> dict[str, Any]:
    """The provenance of a run with its identity; a damaged one has little more than that."""
    return {"id": store.content_id(folder), **store.read_provenance(folder, [])}
