"""Accuracy over time: each method and dtype of each run of a folder, with the first bad one marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from effattn.errors import RequestError
from effattn.report import origin, summary, together
from effattn.run import catalog, store
from effattn.run.records import Damage
from effattn.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One method in one dtype at one commit."""

    started: str
    run: str
    commit: str
    method: str
    dtype: str
    #: verdicts that passed or failed, and those that failed, with those under laws
    judged: int
    failed: int
    fraction: float | None
    z_rms: float | None
    #: whether its cases speak against the method together
    together: bool = False
    #: whether the tree was as committed; None where that is not known
    clean: bool | None = None
    #: the first of its line that fails after one that did not
    first_bad: bool = False
    #: the first of its line, which fails
    from_first: bool = False

    @property
    def bad(self) -> bool:
        """Whether the method failed, by single cases or by all of them together."""
        return bool(self.failed) or self.together

    @property
    def state(self) -> str:
        """What to say of it, in words."""
        words = "first bad" if self.first_bad else "failed" if self.bad else "passed"
        words = "bad from its first run" if self.from_first else words
        if self.together and not self.failed:
            words += ", by its cases together"
        return f"{words}, with uncommitted changes" if self.clean is False else words


def moments(
    folder: Path, damaged: list[Damage] | None = None, notes: list[str] | None = None
) -> list[Moment]:
    """Each method and dtype of each run in a folder, in the order in which the runs were started.

    The first bad one of each line is marked: it fails after one that did not. A run with uncommitted changes says nothing
    of a commit that a run without them judged. A run that is there twice, as a link or a copy, is read once.

    Args:
        folder: has the run folders.
        damaged: takes what cannot be read, runs and lines, which is left out; without it, a run that cannot be read is an
            error.
        notes: takes a sentence for each run that is there twice.

    Raises:
        RequestError: there is no such folder, or no run in it.
    """
    runs, same = origin.distinct(catalog.runs_in(folder, damaged))
    if notes is not None:
        notes += same
    if not runs:
        raise RequestError(f"there is no run in {str(folder)!r}; --history takes a folder of run folders")
    found: list[Moment] = []
    for run in runs:
        provenance = origin.provenance(run, [] if damaged is None else damaged)
        where = provenance.get("working_directory") or {}
        verdicts = list(store.read_verdicts(run, [] if damaged is None else damaged))
        lines: dict[tuple[str, str], list[Verdict]] = {}
        for verdict in verdicts:
            lines.setdefault((verdict.method, verdict.case.dtype), []).append(verdict)
        said = together.statements(provenance)
        blamed = together.method(provenance, list(dict.fromkeys(method for method, _ in lines)))
        clean = where.get("clean")
        for (method, dtype), members in lines.items():
            row = summary.row((method, dtype), [v for v in members if v.law is None])
            found.append(
                Moment(
                    started=provenance.get("started") or "",
                    run=run.name,
                    commit=str(where.get("commit") or "")[:10],
                    method=method,
                    dtype=dtype,
                    judged=sum(str(v.outcome) not in summary.SET_ASIDE for v in members),
                    failed=sum(summary.failed(v.outcome) for v in members),
                    fraction=row.fraction,
                    z_rms=row.z_rms,
                    together=method == blamed and any(statement.concerns(dtype) for statement in said),
                    clean=clean if isinstance(clean, bool) else None,
                )
            )
    return _marked(found)


def _marked(found: Sequence[Moment]) -> list[Moment]:
    """The moments with the first bad one of each line marked."""
    known = {(m.method, m.dtype, m.commit) for m in found if m.judged and m.commit and m.clean is not False}
    good: dict[tuple[str, str], bool] = {}
    marked: list[Moment] = []
    for moment in found:
        line = (moment.method, moment.dtype)
        changed = moment.clean is False and (*line, moment.commit) in known
        said = moment.bad and not changed
        marked.append(
            replace(moment, first_bad=said and good.get(line, False), from_first=said and line not in good)
        )
        if moment.judged and not changed:
            good[line] = not moment.bad
    return marked
