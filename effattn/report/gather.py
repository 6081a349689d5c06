"""What a report is about: runs, read and added up, in a form that charts and templates take.

Runs of any size: what is drawn point by point is limited (`MOST_POINTS`, the worst cases and an even choice of the
rest), what is added up counts everything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from effattn.case import Case
from effattn.errors import RequestError
from effattn.report import beside, origin, summary, text, together
from effattn.report.history import Moment, moments
from effattn.report.studies import Study
from effattn.report.studies import read as read_study
from effattn.run import catalog, store
from effattn.run.records import Damage, Key
from effattn.verdict import Quantity, Verdict

_Item = TypeVar("_Item")

#: Cases that are drawn as points and listed in the table of cases.
MOST_POINTS = 3000
#: Cases whose whole message and replay line are shown.
MOST_WORST = 10
#: Of these, cases that a page has open at its top.
FOREMOST = 3
#: What a provenance has that a report shows in a place of its own.
APART = ("evidence", "smallest")
#: error/bound below which it doesn't matter how small it is.
SMALLEST = 1e-4
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
class Smallest:
    """What a failure was made small to."""

    words: str
    #: as JSON
    recipe: str
    #: the line that judges it again; empty where the run doesn't have it
    replay: str


@dataclass(kw_only=True)
class Material:
    """Everything that a report shows."""

    runs: list[tuple[Path, dict[str, Any]]]
    verdicts: list[Verdict]
    #: of each verdict, the place of its run in `runs`
    origins: list[int]
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
    #: what to know of the runs before reading on: which are the same, and how many cases are in several
    notes: list[str] = field(default_factory=list)

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
    def by_laws(self) -> int:
        """Of these, tries of laws, which `rows` does not count."""
        return self.judged - sum(row.judged for row in self.rows)

    @property
    def failed(self) -> int:
        """Verdicts against the methods."""
        return sum(1 for v in self.verdicts if summary.failed(v.outcome))

    @property
    def evidence(self) -> list[dict[str, Any]]:
        """What cases of a run say together, of each run that failed by it; as `effattn.run.evidence` has it as data."""
        return [facts["evidence"] for _, facts in self.runs if _speaks(facts)]

    @property
    def unfinished(self) -> list[origin.Unfinished]:
        """The runs that are not at their end."""
        counts = Counter(self.origins)
        every = (origin.unfinished(folder, facts, counts[i]) for i, (folder, facts) in enumerate(self.runs))
        return [found for found in every if found is not None]

    @property
    def foremost(self) -> list[Verdict]:
        """The first of the worst, which are of as many kinds as there are."""
        return self.worst[:FOREMOST]

    @property
    def others(self) -> list[Verdict]:
        """The worst but the `foremost`."""
        return self.worst[FOREMOST:]

    @property
    def smallest(self) -> list[Smallest]:
        """The smallest cases that were found to fail, each with the line of its run that judges it again."""
        lines: dict[str, list[str]] = {}
        for _, facts in self.runs:
            for small in facts.get("smallest") or ():
                if isinstance(small, dict):
                    lines.setdefault(str(small.get("case")), []).append(str(small.get("replay", "")))
        return [
            Smallest(words=Case.from_json(recipe).describe(), recipe=recipe, replay=line)
            for name, recipe in self.shrunk.items()
            for line in lines.get(name, [""])
        ]

    @property
    def passed(self) -> bool:
        """Whether something was judged, nothing speaks against any method, and every run is at its end."""
        return bool(self.judged) and not self.failed and not self.evidence and not self.unfinished

    @property
    def state(self) -> str:
        """Whether it is a pass ("good"), speaks against a method ("bad"), or says too little ("none")."""
        return "good" if self.passed else "bad" if self.failed or self.evidence else "none"

    @property
    def broken_laws(self) -> list[str]:
        """The laws that are broken, each with the number of its cases, the one with most broken cases first."""
        rows = [
            summary.row((row.value,), [v for v in self.verdicts if v.law == row.value]) for row in self.laws
        ]
        found = [(row, sum(row.failed.values())) for row in rows if row.failed]
        found.sort(key=lambda pair: -pair[1])
        return [f"{row.label[0].replace('_', ' ')} ({n} of {row.judged} cases)" for row, n in found]

    @property
    def sentence(self) -> str:
        """The result in words: how many methods failed, of how many, in how many cases, and which laws they break."""
        said = self._result
        if laws := self.broken_laws:
            subject = "It breaks" if len(self.methods) == 1 else "Broken:"
            said += f" {subject} {len(laws)} {'law' if len(laws) == 1 else 'laws'}: {text.some(laws)}."
        if unfinished := self.unfinished:
            n, of = len(unfinished), len(self.runs)
            subject = "The run is" if of == 1 else f"{n} of {of} runs {'is' if n == 1 else 'are'}"
            end = f"its end ({unfinished[0].share})" if n == 1 else "their end"
            said += f" {subject} not at {end}: what passed so far is not a pass."
        return said

    @property
    def _result(self) -> str:
        """`sentence` without laws and what is to come."""
        if not self.judged:
            return f"Nothing was judged of {_subject(self.methods)}: that is not a pass."
        judged = {v.method for v in self.verdicts if str(v.outcome) not in summary.SET_ASIDE}
        wrong = {v.method for v in self.verdicts if summary.failed(v.outcome)}
        if wrong:
            subject = self._some_of(wrong, judged)
            return f"{subject} failed {self.failed} of {self.judged} judged cases.{self._unjudged(judged)}"
        speaking = [number for number, (_, facts) in enumerate(self.runs) if _speaks(facts)]
        against = {v.method for v, of in zip(self.verdicts, self.origins, strict=True) if of in speaking}
        if any(found.get("alarms") for found in self.evidence):
            result = f"passed each of {self.judged} judged cases, and failed all of them together."
        elif self.evidence:
            result = f"passed all {self.judged} judged cases, but not when some were judged again."
        else:
            subject = _subject([method for method in self.methods if method in judged])
            so_far = "cases judged so far" if self.unfinished else "judged cases"
            return f"{subject} passed all {self.judged} {so_far}.{self._unjudged(judged)}"
        return f"{self._some_of(against, judged)} {result}{self._unjudged(judged)}"

    def _some_of(self, these: set[str], judged: set[str]) -> str:
        """Methods as a subject: a single one by name, some of several with their names, or all."""
        if len(judged) == 1:
            return next(iter(judged))
        if len(these) == len(judged):
            return f"All {len(judged)} methods"
        names = text.some([method for method in self.methods if method in these])
        return f"{len(these)} of {len(judged)} methods ({names})"

    def _unjudged(self, judged: set[str]) -> str:
        missing = [method for method in self.methods if method not in judged]
        return f" Nothing was judged of {text.some(missing)}: that is not a pass." if missing else ""


def _speaks(facts: dict[str, Any]) -> bool:
    """Whether the cases of a run say together what none says alone."""
    return bool(together.statements(facts))


def _subject(methods: Sequence[str]) -> str:
    return methods[0] if len(methods) == 1 else f"{len(methods)} methods"


def gather(
    folders: Sequence[Path],
    *,
    against: Path | None = None,
    history: Path | None = None,
    baseline: Path | None = None,
    studies: Sequence[Path] = (),
    in_common: bool = True,
) -> Material:
    """Read the runs.

    Args:
        folders: the runs to report on.
        against: a run to compare with.
        history: a folder of runs, for accuracy per commit.
        baseline: a committed baseline to put the gates of its method beside.
        studies: folders of studies, whose error against rank or features is shown too.
        in_common: whether a run to compare with that has no case in common is an error.

    Raises:
        RequestError: a folder is no run, or none of them has a verdict; what is to be compared with does not fit.
    """
    damaged: list[Damage] = []
    folders, notes = origin.distinct(folders)
    found: list[tuple[int, Key, Verdict]] = []
    for number, folder in enumerate(folders):
        found += [(number, key, verdict) for key, verdict in store.read_judged(folder, damaged)]
    if not found:
        names = ", ".join(str(folder) for folder in folders)
        raise RequestError(f"there is no verdict in {names}; a report needs at least one")
    found = _apart(found)
    # The worse verdict on a case that several runs have stands for it where one verdict must.
    worse: dict[Key, tuple[int, Verdict]] = {}
    for number, key, verdict in found:
        if key not in worse or _badness(verdict) > _badness(worse[key][1]):
            worse[key] = (number, verdict)
    notes += _repeated(found)
    verdicts = [verdict for _, _, verdict in found]
    compared = [verdict for verdict in verdicts if verdict.law is None]
    rows = summary.rows(compared, by=lambda v: (v.method, v.case.dtype))
    rows.sort(key=lambda row: (-sum(row.failed.values()), -summary.size(row.fraction)))
    material = Material(
        runs=[(folder, origin.facts(folder, damaged)) for folder in folders],
        verdicts=verdicts,
        origins=[number for number, _, _ in found],
        rows=rows,
        options=_options(compared),
        laws=_groups("law", [v for v in verdicts if v.law is not None], lambda v: v.law or ""),
        worst=_worst(verdicts),
        shrunk=_shrunk(folders, {v.case.id for v in verdicts}, damaged),
        damaged=damaged,
        notes=notes,
    )
    if against is not None:
        material.difference = catalog.compare(
            catalog.verdicts_by_case(against, damaged), {key: verdict for key, (_, verdict) in worse.items()}
        )
        material.against = str(against)
        if in_common and not material.difference.both:
            raise RequestError(
                f"the run {str(against)!r} has no case in common with the others; nothing to compare"
            )
    if history is not None:
        material.history = moments(history, damaged, material.notes)
    if baseline is not None:
        members = [[verdict for of, verdict in worse.values() if of == i] for i in range(len(folders))]
        facts = [facts for _, facts in material.runs]
        material.beside = beside.compare(baseline, list(zip(facts, members, strict=True)))
    material.studies = [read_study(folder, number) for number, folder in enumerate(studies)]
    damaged += [damage for study in material.studies for damage in study.damaged]
    material.damaged = list(dict.fromkeys(damaged))  # a run may be reported on and part of the history
    return material


def _apart(found: list[tuple[int, Key, Verdict]]) -> list[tuple[int, Key, Verdict]]:
    """With methods of one name, from files of one name in two folders, named as the command line names them."""
    specs: dict[str, set[str]] = {}
    for _, key, verdict in found:
        specs.setdefault(verdict.method, set()).add(key.spec)
    return [
        (number, key, verdict if len(specs[verdict.method]) == 1 else replace(verdict, method=key.spec))
        for number, key, verdict in found
    ]


def _repeated(found: Sequence[tuple[int, Key, Verdict]]) -> list[str]:
    """A sentence where several runs have verdicts on the same case and method."""
    runs: dict[tuple[str, str, str, str], set[int]] = {}
    for number, key, verdict in found:
        runs.setdefault((key.case_id, key.device, key.law, verdict.method), set()).add(number)
    several = sum(len(of) > 1 for of in runs.values())
    if not several:
        return []
    cases, are = ("case", "is") if several == 1 else ("cases", "are")
    return [f"{several} {cases} of a method {are} in more than one run; the verdict of each run counts."]


#: What tells kinds of failures apart, the coarsest first.
_KINDS: tuple[Callable[[Verdict], tuple[str, ...]], ...] = (
    lambda v: (str(v.outcome),),
    lambda v: (str(v.outcome), v.law or ""),
    lambda v: (v.method, str(v.outcome), v.law or ""),
    lambda v: (v.method, str(v.outcome), v.law or "", v.case.dtype),
)


def _worst(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The worst of each kind first, then others: so one crash of many doesn't hide the rest."""
    order = sorted(verdicts, key=_badness, reverse=True)
    chosen: dict[int, Verdict] = {}
    for kind in _KINDS:
        seen = {kind(verdict) for verdict in chosen.values()}
        for verdict in order:
            if summary.failed(verdict.outcome) and kind(verdict) not in seen:
                seen.add(kind(verdict))
                chosen[id(verdict)] = verdict
    rest = (verdict for verdict in order if id(verdict) not in chosen)
    return [*chosen.values(), *rest][:MOST_WORST]


def _badness(verdict: Verdict) -> tuple[bool, float]:
    return summary.failed(verdict.outcome), catalog.fraction(verdict) or (
        math.inf if summary.failed(verdict.outcome) else 0.0
    )


def _shrunk(folders: Sequence[Path], judged: set[str], damaged: list[Damage]) -> dict[str, str]:
    """Recipes in the folders of cases that are none of those that were judged: what failures were made small to."""
    return {
        name: case.to_json()
        for folder in folders
        for name, case in store.read_cases(folder, damaged).items()
        if name not in judged
    }


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
            -max(summary.size(cell.fraction) for cell in row.cells.values()),
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
    """The cases as plain rows for charts and for the table of cases: the worst, and an even choice of the rest.

    An error of 0, which a logarithmic axis has no place for, or below `SMALLEST` is drawn at half of the smallest above.
    """
    found = [point(verdict) for verdict in drawn(sorted(material.verdicts, key=_badness, reverse=True))]
    known = [row["drawn"] for row in found if row["drawn"] is not None and row["drawn"] > SMALLEST]
    edge = max(SMALLEST, min(known, default=0.0) / 2)
    return [row if row["drawn"] is None else {**row, "drawn": max(row["drawn"], edge)} for row in found]


def drawn(order: Sequence[_Item]) -> Sequence[_Item]:
    """What is drawn of many, the worst first: the worst third of `MOST_POINTS`, and an even choice of the rest."""
    if len(order) <= MOST_POINTS:
        return order
    worst, rest = order[: MOST_POINTS // 3], order[MOST_POINTS // 3 :]
    step = len(rest) / (MOST_POINTS - len(worst))
    return [*worst, *(rest[int(i * step)] for i in range(MOST_POINTS - len(worst)))]


def point(verdict: Verdict) -> dict[str, Any]:
    """One case as a plain row."""
    case, out = verdict.case, out_of(verdict)
    fraction = catalog.fraction(verdict)
    return {
        "id": case.id,
        "method": text.one_line(verdict.method),
        "dtype": case.dtype,
        "law": None if verdict.law is None else text.one_line(verdict.law),
        "outcome": str(verdict.outcome),
        "failed": summary.failed(verdict.outcome),
        "case": text.one_line(case.describe()),
        "fraction": _finite(fraction),
        "drawn": None if fraction is None else _within(fraction),
        "z_rms": _finite(out.z_rms) if out else None,
        "z_max": _finite(out.z_max) if out else None,
        "ulp_p99": _finite(out.ulp_p99) if out else None,
        "ulp_max": _finite(out.ulp_max) if out else None,
        "kv_len": case.kv_len,
        "q_len": case.q_len,
        "head_dim": case.head_dim,
        "scale": case.softmax_scale,
        "values": text.one_line(case.values),
    }


def _finite(x: float | None) -> float | None:
    if x is None or not math.isfinite(x):
        return None
    short = float(f"{x:.6g}")
    return x if short == 1 else short  # on its side of 1, where an error is allowed or not


def places(material: Material) -> list[dict[str, Any]]:
    """Where in the output the largest error of each case that has one sits, counted in cells of (query, dimension)."""
    counts: dict[tuple[str, int, int], list[float]] = {}
    for verdict in material.verdicts:
        out = out_of(verdict)
        if out is None or out.worst is None or len(out.worst) != 4 or not out.fraction:
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
            "fraction": _finite(max(map(summary.size, fractions))),
        }
        for (dtype, row, column), fractions in counts.items()
    ]


def pairs(material: Material) -> tuple[str, list[dict[str, Any]]]:
    """Each method beside the reference method on the same cases, and the ratio of their errors.

    The reference is `torch` where the runs have it, an implementation in the same dtype, else the first method; its verdict
    is that of the same run, or else of the first run that has the case. The largest ratio first. Empty where there is one
    method alone.
    """
    if len(material.methods) < 2:
        return "", []
    reference = "torch" if "torch" in material.methods else material.methods[0]
    theirs: dict[str, dict[int, Verdict]] = {}
    for of, verdict in zip(material.origins, material.verdicts, strict=True):
        if verdict.method == reference and verdict.law is None:
            theirs.setdefault(verdict.case.id, {}).setdefault(of, verdict)
    found = []
    for of, verdict in zip(material.origins, material.verdicts, strict=True):
        runs = theirs.get(verdict.case.id, {})
        other = runs.get(of) or next(iter(runs.values()), None)
        if verdict.method == reference or verdict.law is not None or other is None:
            continue
        a, b = catalog.fraction(verdict), catalog.fraction(other)
        if a is None or b is None:
            continue
        a, b = _within(a), _within(b)
        found.append(
            {
                "method": verdict.method,
                "dtype": verdict.case.dtype,
                "case": verdict.case.describe(),
                "fraction": _finite(a),
                "reference": _finite(b),
                "ratio": _finite(a / b),
            }
        )
    found.sort(key=lambda pair: -pair["ratio"])
    return reference, found


def _within(fraction: float) -> float:
    """A fraction as it is drawn: a logarithm has no 0, and what is beyond everything is at the edge."""
    return min(max(fraction, SMALLEST), 1e4)
