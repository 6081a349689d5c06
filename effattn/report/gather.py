"""What a report is about: runs, read and added up, in a form that charts and templates take.

Runs of any size: what is drawn point by point is limited (`MOST_POINTS`, the worst cases and an even choice of the
rest), what is added up counts everything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effattn.errors import RequestError
from effattn.report import beside, summary
from effattn.report.studies import Study
from effattn.report.studies import read as read_study
from effattn.run import catalog, store
from effattn.run.records import Damage, Key
from effattn.verdict import Quantity, Verdict

#: Cases that are drawn as points and listed in the table of cases.
MOST_POINTS = 3000
#: Cases whose whole message and replay line are shown.
MOST_WORST = 10
#: Cells of the map of where errors sit, along each axis.
CELLS = 12


@dataclass(frozen=True, kw_only=True)
class OptionRow:
    """One option of cases, or one distribution, and what came of it in each dtype."""

    name: str
    value: str
    #: dtype -> the sum of its verdicts
    cells: dict[str, summary.Row]


@dataclass(frozen=True, kw_only=True)
class Moment:
    """One method in one dtype at one commit."""

    started: str
    run: str
    commit: str
    method: str
    dtype: str
    judged: int
    failed: int
    fraction: float | None
    z_rms: float | None
    #: the first of its line that fails after one that did not
    first_bad: bool = False


@dataclass(kw_only=True)
class Material:
    """Everything that a report shows."""

    runs: list[tuple[Path, dict[str, Any]]]
    verdicts: list[Verdict]
    keys: list[Key]
    rows: list[summary.Row]
    options: list[OptionRow]
    laws: list[OptionRow]
    worst: list[Verdict]
    shrunk: dict[str, str]
    damaged: list[Damage]
    difference: catalog.Difference | None = None
    against: str = ""
    history: list[Moment] = field(default_factory=list)
    beside: beside.Beside | None = None
    studies: list[Study] = field(default_factory=list)

    @property
    def methods(self) -> list[str]:
        """The names of the methods, in order of appearance."""
        return list(dict.fromkeys(verdict.method for verdict in self.verdicts))

    @property
    def dtypes(self) -> list[str]:
        """The dtypes, in order of appearance."""
        return list(dict.fromkeys(verdict.case.dtype for verdict in self.verdicts))

    @property
    def judged(self) -> int:
        """Verdicts that passed or failed."""
        return sum(1 for v in self.verdicts if str(v.outcome) not in summary.SET_ASIDE)

    @property
    def failed(self) -> int:
        """Verdicts against the methods."""
        return sum(1 for v in self.verdicts if summary.failed(v.outcome))

    @property
    def evidence(self) -> list[dict[str, Any]]:
        """What cases of a run say together, of each run that failed by it; as `effattn.run.evidence` has it as data."""
        return [facts["evidence"] for _, facts in self.runs if isinstance(facts.get("evidence"), dict)]

    @property
    def sentence(self) -> str:
        """The result in a sentence."""
        subject = self.methods[0] if len(self.methods) == 1 else f"{len(self.methods)} methods"
        if not self.judged:
            return f"Nothing was judged of {subject}: that is not a pass."
        if self.failed:
            return f"{subject} failed {self.failed} of {self.judged} judged cases."
        if any(found.get("alarms") for found in self.evidence):
            return f"{subject} passed each of {self.judged} judged cases, and failed all of them together."
        if self.evidence:
            return f"{subject} passed all {self.judged} judged cases, but not when some were judged again."
        return f"{subject} passed all {self.judged} judged cases."


def gather(
    folders: Sequence[Path],
    *,
    against: Path | None = None,
    history: Path | None = None,
    baseline: Path | None = None,
    studies: Sequence[Path] = (),
) -> Material:
    """Read the runs.

    Args:
        folders: the runs to report on.
        against: a run to compare with.
        history: a folder of runs, for accuracy per commit.
        baseline: a committed baseline to put the gates of its method beside.
        studies: folders of studies, whose error against rank or features is shown too.

    Raises:
        RequestError: a folder is no run, or none of them has a verdict; what is to be compared with does not fit.
    """
    damaged: list[Damage] = []
    found: dict[Key, Verdict] = {}
    origins: dict[Key, int] = {}
    for number, folder in enumerate(folders):
        for key, verdict in store.read_judged(folder, damaged):
            found[key] = verdict
            origins[key] = number
    if not found:
        names = ", ".join(str(folder) for folder in folders)
        raise RequestError(f"there is no verdict in {names}; a report needs at least one")
    verdicts = list(found.values())
    compared = [verdict for verdict in verdicts if verdict.law is None]
    rows = summary.rows(compared, by=lambda v: (v.method, v.case.dtype))
    rows.sort(key=lambda row: (-sum(row.failed.values()), -(row.fraction or 0.0)))
    material = Material(
        runs=[(folder, catalog.facts(folder)) for folder in folders],
        verdicts=verdicts,
        keys=list(found),
        rows=rows,
        options=_options(compared),
        laws=_groups("law", [v for v in verdicts if v.law is not None], lambda v: v.law or ""),
        worst=_worst(verdicts),
        shrunk=_shrunk(folders, {v.case.id for v in verdicts}),
        damaged=damaged,
    )
    if against is not None:
        material.difference = catalog.compare(catalog.verdicts_by_case(against, damaged), found)
        material.against = str(against)
        if not material.difference.both:
            raise RequestError(
                f"the run {str(against)!r} has no case in common with the others; nothing to compare"
            )
    if history is not None:
        material.history = moments(history, damaged)
    if baseline is not None:
        members = [[found[key] for key, of in origins.items() if of == i] for i in range(len(folders))]
        facts = [facts for _, facts in material.runs]
        material.beside = beside.compare(baseline, list(zip(facts, members, strict=True)))
    material.studies = [read_study(folder, number) for number, folder in enumerate(studies)]
    damaged += [damage for study in material.studies for damage in study.damaged]
    material.damaged = list(dict.fromkeys(damaged))  # a run may be reported on and part of the history
    return material


def _worst(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The worst of each method, dtype and kind first, so that one crash of many doesn't hide the rest; then others."""
    order = sorted(verdicts, key=_badness, reverse=True)
    first: dict[tuple[str, ...], Verdict] = {}
    for verdict in order:
        if summary.failed(verdict.outcome):
            first.setdefault(
                (verdict.method, verdict.case.dtype, str(verdict.outcome), verdict.law or ""), verdict
            )
    chosen = list(first.values())
    taken = {id(verdict) for verdict in chosen}
    chosen += [verdict for verdict in order if id(verdict) not in taken]
    return sorted(chosen[:MOST_WORST], key=_badness, reverse=True)


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return summary.failed(verdict.outcome), catalog.fraction(verdict) or (
        math.inf if summary.failed(verdict.outcome) else 0.0
    )


def _shrunk(folders: Sequence[Path], judged: set[str]) -> dict[str, str]:
    """Recipes in the folders of cases that are none of those that were judged: what failures were made small to."""
    found = {}
    for folder in folders:
        for file in sorted((folder / store.CASES).glob("*.json")):
            if file.stem not in judged:
                found[file.stem] = file.read_text(encoding="utf-8", errors="replace").strip()[:2000]
    return found


def _options(verdicts: Sequence[Verdict]) -> list[OptionRow]:
    """Each value of each option that cases of these runs have, worst first within the option."""
    found: list[OptionRow] = []
    for name, of in _OPTIONS.items():
        rows = _groups(name, verdicts, of)
        if len(rows) > 1 or name == "values":
            found += rows
    return found


def _groups(name: str, verdicts: Sequence[Verdict], of: Callable[[Verdict], str]) -> list[OptionRow]:
    groups: dict[str, dict[str, list[Verdict]]] = {}
    for verdict in verdicts:
        groups.setdefault(of(verdict), {}).setdefault(verdict.case.dtype, []).append(verdict)
    rows = [
        OptionRow(
            name=name,
            value=value,
            cells={dtype: summary.row((value, dtype), members) for dtype, members in by_dtype.items()},
        )
        for value, by_dtype in groups.items()
    ]
    rows.sort(
        key=lambda row: (
            -sum(sum(cell.failed.values()) for cell in row.cells.values()),
            -max((cell.fraction or 0.0) for cell in row.cells.values()),
        )
    )
    return rows


def _grouping(verdict: Verdict) -> str:
    case = verdict.case
    if case.heads == case.kv_heads:
        return "as many KV heads"
    return "one KV head" if case.kv_heads == 1 else "grouped heads"


def _rectangle(verdict: Verdict) -> str:
    case = verdict.case
    if case.q_len == case.kv_len:
        return "q_len = kv_len"
    return "q_len < kv_len" if case.q_len < case.kv_len else "q_len > kv_len"


def _extra(name: str) -> Callable[[Verdict], str]:
    return lambda verdict: str(getattr(verdict.case, name, None))


_OPTIONS: dict[str, Callable[[Verdict], str]] = {
    "values": lambda v: v.case.values.partition("/")[0],
    "causal": lambda v: v.case.causal,
    "lengths": _rectangle,
    "heads": _grouping,
    "layout": lambda v: v.case.layout.partition("+")[2] or "dense",
    "scale": lambda v: "head_dim ** -0.5" if v.case.scale is None else f"{v.case.scale:.3g}",
    "window": _extra("window"),
    "softcap": _extra("softcap"),
    "bias": _extra("bias"),
    "mask": _extra("mask"),
    "alibi": _extra("alibi"),
    "padding": _extra("lengths"),
    "backward": _extra("backward"),
}


def out_of(verdict: Verdict) -> Quantity | None:
    """The numbers of `out`, where there are any."""
    return next((q for q in verdict.quantities if q.name == "out" and q.count), None)


def points(material: Material) -> list[dict[str, Any]]:
    """The cases as plain rows for charts and for the table of cases: the worst, and an even choice of the rest."""
    order = sorted(range(len(material.verdicts)), key=lambda i: _badness(material.verdicts[i]), reverse=True)
    if len(order) > MOST_POINTS:
        kept = order[: MOST_POINTS // 3]
        rest = order[MOST_POINTS // 3 :]
        step = len(rest) / (MOST_POINTS - len(kept))
        order = kept + [rest[int(i * step)] for i in range(MOST_POINTS - len(kept))]
    return [point(material.verdicts[i]) for i in order]


def point(verdict: Verdict) -> dict[str, Any]:
    """One case as a plain row."""
    case, out = verdict.case, out_of(verdict)
    fraction = catalog.fraction(verdict)
    return {
        "id": case.id,
        "method": verdict.method,
        "dtype": case.dtype,
        "law": verdict.law,
        "outcome": str(verdict.outcome),
        "failed": summary.failed(verdict.outcome),
        "case": case.describe(),
        "fraction": _finite(fraction),
        # A logarithm has no 0, and what is beyond everything is drawn at the edge.
        "drawn": None if fraction is None else min(max(fraction, 1e-4), 1e4),
        "z_rms": _finite(out.z_rms) if out else None,
        "z_max": _finite(out.z_max) if out else None,
        "ulp_p99": _finite(out.ulp_p99) if out else None,
        "ulp_max": _finite(out.ulp_max) if out else None,
        "kv_len": case.kv_len,
        "q_len": case.q_len,
        "head_dim": case.head_dim,
        "scale": case.softmax_scale,
        "values": case.values,
    }


def _finite(x: float | None) -> float | None:
    return None if x is None or not math.isfinite(x) else float(f"{x:.6g}")


def places(material: Material) -> list[dict[str, Any]]:
    """Where in the output the largest error of each case sits, counted in cells of (query, dimension)."""
    counts: dict[tuple[str, int, int], list[float]] = {}
    for verdict in material.verdicts:
        out = out_of(verdict)
        if out is None or out.worst is None or len(out.worst) != 4 or out.fraction is None:
            continue
        _, _, query, dimension = out.worst
        cell = (
            min(CELLS - 1, query * CELLS // max(1, verdict.case.q_len)),
            min(CELLS - 1, dimension * CELLS // max(1, verdict.case.v_dim)),
        )
        counts.setdefault((verdict.case.dtype, *cell), []).append(out.fraction)
    return [
        {
            "dtype": dtype,
            "query": row / CELLS,
            "query_end": (row + 1) / CELLS,
            "dimension": column / CELLS,
            "dimension_end": (column + 1) / CELLS,
            "cases": len(fractions),
            "fraction": _finite(max(fractions)),
        }
        for (dtype, row, column), fractions in counts.items()
    ]


def pairs(material: Material) -> tuple[str, list[dict[str, Any]]]:
    """Each method beside the reference method on the same cases, and the ratio of their errors.

    The reference is `torch` where the runs have it, an implementation in the same dtype, else the first method.
    Empty where there is one method alone.
    """
    if len(material.methods) < 2:
        return "", []
    reference = "torch" if "torch" in material.methods else material.methods[0]
    theirs = {v.case.id: v for v in material.verdicts if v.method == reference and v.law is None}
    found = []
    for verdict in material.verdicts:
        other = theirs.get(verdict.case.id)
        if verdict.method == reference or verdict.law is not None or other is None:
            continue
        a, b = catalog.fraction(verdict), catalog.fraction(other)
        if a is None or b is None or not math.isfinite(a) or not math.isfinite(b):
            continue
        found.append(
            {
                "method": verdict.method,
                "dtype": verdict.case.dtype,
                "case": verdict.case.describe(),
                "fraction": _finite(max(a, 1e-4)),
                "reference": _finite(max(b, 1e-4)),
                "ratio": _finite(max(a, 1e-4) / max(b, 1e-4)),
            }
        )
    return reference, found[:MOST_POINTS]


def moments(folder: Path, damaged: list[Damage] | None = None) -> list[Moment]:
    """Each method and dtype of each run in a folder, the oldest first, with the first bad one of each line marked. `damaged`
    takes what cannot be read, runs and lines, which is left out; without it, a run that cannot be read is an error.

    Raises:
        RequestError: there is no such folder, or no run in it.
    """
    runs = catalog.runs_in(folder, damaged)
    if not runs:
        raise RequestError(f"there is no run in {str(folder)!r}; --history takes a folder of run folders")
    found: list[Moment] = []
    good: dict[tuple[str, str], bool] = {}
    for run in runs:
        provenance = store.read_provenance(run, [])
        where = provenance.get("working_directory") or {}
        verdicts = list(store.read_verdicts(run, [] if damaged is None else damaged))
        broken = Counter((v.method, v.case.dtype) for v in verdicts if v.law and summary.failed(v.outcome))
        compared = [v for v in verdicts if v.law is None]
        for row in summary.rows(compared, by=lambda v: (v.method, v.case.dtype)):
            line = (row.label[0], row.label[1])
            failed = sum(row.failed.values()) + broken[line]
            found.append(
                Moment(
                    started=str(provenance.get("started", "")),
                    run=run.name,
                    commit=str(where.get("commit") or "")[:10],
                    method=line[0],
                    dtype=line[1],
                    judged=row.judged,
                    failed=failed,
                    fraction=row.fraction,
                    z_rms=row.z_rms,
                    first_bad=bool(failed) and good.get(line, False),
                )
            )
            if row.judged:
                good[line] = not failed
    return found
