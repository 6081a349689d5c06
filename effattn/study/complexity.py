"""`effattn study complexity`: CPU time and peak memory against the sequence length, and their exponents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effattn.errors import RequestError
from effattn.study import probe
from effattn.study.engine import Job, Point, Row, by_point
from effattn.study.intervals import Interval, median_interval, slope

if TYPE_CHECKING:
    from effattn.study.problems import Problem

HEAD_DIM = 64
#: slots of Linformer, features of Performer
SIZE = 256
#: the longest sequence whose error is measured, since the reference is quadratic
ERROR_N = 4096


#: how to read the table
NOTES = (
    f"One head, d = {HEAD_DIM}, entries N(0, 1), float32, one thread: all scores written out (standard), this project's Triton"
    f" kernel on the CPU (flash), averages to k = {SIZE} slots (linformer), m = {SIZE} positive features (performer).",
    "Exponents: time and memory grow as n to this power, with intervals over draws. Fixed costs lower it where n is small.",
    f"error: |O' - O| / |O| against exact attention in float64, at the largest n up to {ERROR_N}.",
)


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Lengths and how often."""

    n: tuple[int, ...]
    longest: Mapping[str, int]  #: where a method would take too long or too much memory
    draws: int


PROFILES = {
    "smoke": Profile(n=(512, 1024, 2048), longest={}, draws=2),
    "full": Profile(
        n=(2048, 4096, 8192, 16384, 32768, 65536), longest={"standard": 16384, "flash": 16384}, draws=3
    ),
}


def jobs(name: str) -> list[Job]:
    """All jobs of a profile."""
    if name not in PROFILES:
        raise RequestError(f"unknown profile {name!r}; expected one of {', '.join(PROFILES)}")
    chosen = PROFILES[name]
    return [
        Job(point=Point(part="cost", n=n, head_dim=HEAD_DIM, method=method, size=SIZE), draw=draw)
        for draw in range(chosen.draws)
        for method in probe.METHODS
        for n in chosen.n
        if n <= chosen.longest.get(method, n)
    ]


def measure(job: Job, *, profile: str) -> Mapping[str, float]:
    """Time and memory in a process of its own; the error against float64 up to ERROR_N tokens."""
    point = job.point
    lengths = tuple(n for n in PROFILES[profile].n if n <= PROFILES[profile].longest.get(point.method, n))
    found = dict(_costs(point.method, lengths, job.draw)[point.n])
    if point.n <= ERROR_N:
        found["error"] = _error(job)
    return found


@lru_cache(maxsize=1)
def _costs(method: str, lengths: tuple[int, ...], draw: int) -> dict[int, Mapping[str, float]]:
    """All lengths of one method in one process, which takes seconds to start; `draw` asks for a new one."""
    costs = probe.measure(method=method, n=lengths, head_dim=HEAD_DIM, size=SIZE)
    return dict(zip(lengths, costs, strict=True))


def _error(job: Job) -> float:
    from effattn.study.measures import output_errors
    from effattn.study.problems import problem

    point = job.point
    causal = point.method == "performer, causal"
    # The same inputs for all methods: only the mask differs.
    data: Problem = problem(
        Job(point=Point(n=point.n, head_dim=point.head_dim, causal=causal, method=""), draw=job.draw), seed=1
    )
    out = probe.attention(point.method, point.head_dim, point.size, point.n)(data.q, data.k, data.v)
    return output_errors(out, data.exact)["error"]


class Line(NamedTuple):
    """What is known of one method."""

    method: str
    time_exponent: Interval
    memory_exponent: Interval
    seconds: dict[int, Interval]
    memory: dict[int, Interval]
    error: dict[int, Interval]


def lines(rows: Sequence[Row]) -> list[Line]:
    """Exponents and medians of each method."""
    groups = by_point(rows)
    found = []
    for method in probe.METHODS:
        points = sorted((p for p in groups if p.method == method), key=lambda p: p.n)
        if not points:
            continue
        samples = {
            name: {p.n: [row.measures[name] for row in groups[p] if name in row.measures] for p in points}
            for name in ("seconds", "bytes", "error")
        }
        medians = {
            name: {n: median_interval(sample) for n, sample in by_n.items() if sample}
            for name, by_n in samples.items()
        }

        def exponent(name: str, samples: dict[str, dict[int, list[float]]] = samples) -> Interval:
            count = min(map(len, samples[name].values()))
            return slope(list(samples[name]), [sample[:count] for sample in samples[name].values()])

        found.append(
            Line(
                method,
                exponent("seconds"),
                exponent("bytes"),
                medians["seconds"],
                medians["bytes"],
                medians["error"],
            )
        )
    return found


def table(found: Sequence[Line]) -> list[str]:
    """Exponents and what the longest sequence costs, as Markdown."""
    from effattn.report import text
    from effattn.study.results import cell

    out = [
        "| method | time exponent | memory exponent | longest n | CPU time there | memory there | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in found:
        n = max(line.seconds)
        error = cell(line.error[max(line.error)]) if line.error else text.MISSING
        out.append(
            f"| {line.method} | {cell(line.time_exponent)} | {cell(line.memory_exponent)} | {n} |"
            f" {text.seconds(line.seconds[n].median)} | {line.memory[n].median / 2**20:.0f} MB | {error} |"
        )
    return out


def write(found: Sequence[Line], folder: Path) -> list[Path]:
    """summary.md and two charts, if matplotlib is there."""
    from effattn.study import charts

    drawn = []
    if charts.available():
        for name, label in (("seconds", "CPU time, s"), ("memory", "peak memory, bytes")):
            curves = []
            for line in found:
                by_n: dict[int, Interval] = getattr(line, name)
                got = list(by_n.values())
                curves.append(
                    charts.Curve(
                        label=line.method, x=list(by_n), y=[g.median for g in got], low=[g.low for g in got],
                        high=[g.high for g in got],
                    )
                )  # fmt: skip
            chart = charts.Chart(
                name=f"complexity-{name}", title=f"one head, d = {HEAD_DIM}, k = m = {SIZE}, float32",
                x_label="sequence length n", y_label=label, curves=curves,
            )  # fmt: skip
            drawn.append(charts.draw(chart, folder))
    lines = [
        "# Study complexity",
        "",
        *(f"![{path.stem}]({path.name})" for path in drawn),
        "",
        *table(found),
        "",
    ]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")
    return drawn
