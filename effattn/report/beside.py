"""A run beside a committed baseline, in a report: each row then and now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effattn.errors import RequestError
from effattn.tolerances import baselines
from effattn.verdict import Verdict

_MEDIAN, _LAST = baselines.QUANTILES.index(0.5), len(baselines.QUANTILES) - 1


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the baseline: cases, and median and largest error/bound and z rms, then and now."""

    key: baselines.Key
    #: "worse", "better" or "", by what is significant
    state: str
    cases: tuple[int, int]
    fraction: tuple[float, float]
    largest: tuple[float, float]
    z_rms: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The comparison and its rows."""

    file: Path
    section: baselines.Section
    comparison: baselines.Comparison
    lines: list[Line]

    @property
    def points(self) -> list[dict[str, Any]]:
        """The rows for a chart with logarithmic axes: median error/bound then and now."""
        least = 1e-5
        return [
            {
                "row": str(line.key),
                "dtype": line.key.dtype,
                "state": line.state or "no significant change",
                "before": max(line.fraction[0], least),
                "now": max(line.fraction[1], least),
                "cases": line.cases[1],
            }
            for line in self.lines
        ]


def compare(file: Path, runs: Sequence[tuple[dict[str, Any], Sequence[Verdict]]]) -> Beside:
    """The gates of the baseline's method and of one kind among the runs, (provenance, verdicts), beside the baseline.

    Raises:
        RequestError: the file is no baseline, no run is of its method, or it has no rows for that kind of run.
    """
    found = baselines.load(file)
    chosen = [
        (facts, verdicts)
        for facts, verdicts in runs
        if facts.get("kind_of_run") == "gate" and (facts.get("method") or {}).get("name") == found.method
    ]
    if not chosen:
        raise RequestError(
            f"baseline {file}: it is of {found.method!r}, and no run given is a gate of that method"
        )
    kinds = {baselines.kind_of(facts) for facts, _ in chosen}
    if len(kinds) > 1:
        raise RequestError(
            f"baseline {file}: the runs are of several kinds ({'; '.join(sorted(map(str, kinds)))}); report on one at a time"
        )
    section = baselines.section_for(
        found, kinds.pop(), file=file, own_values=any(facts.get("values") for facts, _ in chosen)
    )
    verdicts = [verdict for _, some in chosen for verdict in some]
    comparison = baselines.compare(section, verdicts)
    now = baselines.summarise(baselines.collect(verdicts))
    states = {change.key: "better" for change in comparison.better} | {
        change.key: "worse" for change in comparison.worse
    }
    lines = [
        Line(
            key=key,
            state=states.get(key, ""),
            cases=(before.cases, now[key].cases),
            fraction=_pair(before, now[key], "fraction", _MEDIAN),
            largest=_pair(before, now[key], "fraction", _LAST),
            z_rms=_pair(before, now[key], "z_rms", _MEDIAN),
        )
        for key, before in section.rows.items()
        if key in now
    ]
    order = {"worse": 0, "better": 1, "": 2}
    lines.sort(
        key=lambda line: (order[line.state], line.key.dtype, line.key.option != baselines.ALL, str(line.key))
    )
    return Beside(file=file, section=section, comparison=comparison, lines=lines)


def _pair(before: baselines.Row, now: baselines.Row, statistic: str, quantile: int) -> tuple[float, float]:
    return before.values[statistic][quantile], now.values[statistic][quantile]
