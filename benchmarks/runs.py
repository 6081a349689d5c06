"""What recording, sweeping, compacting, asking and reporting take.

    python benchmarks/runs.py --only sweep,store --out docs/measurements/runs.json
    python benchmarks/runs.py --only report --run effattn-runs/ci --out docs/measurements/runs.json

`sweep` runs tiny cases in two local workers: the share of the workers' time that cases take, of the time they are busy and of
all the time from the start to the end. `store` records verdicts, compacts them and asks about them, each in a process of its
own. `report` writes the report on a recorded run. A section that is not asked for keeps its figures in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effattn.verdict import Quantity, Verdict

METHOD = """
import torch

def attention(q, k, v):
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).to(q.dtype)
"""
#: The smallest cases that have something to judge.
SPEC = {
    "methods": ["mine.py:attention"],
    "dtypes": ["fp16", "fp32"],
    "shapes": [{"q_len": 3, "kv_len": 5, "head_dim": 8}],
}
MEBI = 1024.0  # of the kibibytes that the system counts memory in
#: An aggregate over a part of the verdicts, as a question of a user has it.
QUESTION = (
    "SELECT dtype, max(fraction), avg(z_rms) FROM verdicts WHERE kv_len > 1000 GROUP BY dtype ORDER BY dtype"
)
ASKED = 11
#: Of a quantity, what differs from case to case.
NUMBERS = ("fraction", "bit_equal", "ulp_p50", "ulp_p99", "ulp_max", "z_rms", "z_max", "z_mean")


def sweep(options: argparse.Namespace) -> dict[str, Any]:
    """A sweep of tiny cases in two workers."""
    from effattn.run import spec
    from effattn.run.isolation import IsolatedExecutor
    from effattn.run.sweep import Sweep

    wanted = spec.parse({**SPEC, "seeds": {"count": options.cases // 2}})
    load = os.getloadavg()[0]
    there = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "mine.py").write_text(METHOD)
        os.chdir(folder)
        try:
            start = time.perf_counter()
            with IsolatedExecutor(options.jobs, quiet=True) as pool, Sweep(Path("run"), wanted) as taken:
                result = taken.run(pool, parallel=options.jobs)
            seconds = time.perf_counter() - start
            size = sum(file.stat().st_size for file in Path("run").glob("verdicts*.jsonl"))
        finally:
            os.chdir(there)
    if result.added != wanted.count or result.exit_code:
        raise SystemExit(f"{result.added} of {wanted.count} cases, exit code {result.exit_code}")
    figures = {
        "cases": wanted.count,
        "jobs": options.jobs,
        "seconds": round(seconds, 1),
        "in_cases_of_busy": round(result.judging / result.busy, 4),
        "in_cases_of_all": round(result.judging / (options.jobs * seconds), 4),
        "megabytes": round(size / 1e6, 1),
        "supervisor_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBI, 0),
        "load_before": load,
    }
    print(figures, flush=True)
    return figures


def record(folder: Path, count: int) -> dict[str, Any]:
    """Record verdicts: microseconds of processor time for each."""
    from dataclasses import replace

    from effattn.case import Case
    from effattn.judge import judge
    from effattn.methods import get
    from effattn.run import records, store

    shapes = [(64, 64), (1, 1024), (128, 2048), (7, 4096)]
    cases = [
        Case(q_len=q, kv_len=k, head_dim=32, dtype=dtype)
        for dtype in ("fp16", "bf16", "fp32")
        for q, k in shapes
    ]
    judged = [judge(case, get("torch")) for case in cases]
    # Each with numbers of its own: copies would take no room in a table.
    chance = random.Random(0)

    def other(verdict: Verdict, seed: int) -> Verdict:
        def varied(quantity: Quantity) -> Quantity:
            known = {name: getattr(quantity, name) for name in NUMBERS}
            return replace(
                quantity, **{name: x * chance.uniform(0.5, 1.5) for name, x in known.items() if x is not None}
            )

        return replace(
            verdict,
            case=replace(verdict.case, seed=seed),
            quantities=tuple(varied(quantity) for quantity in verdict.quantities),
            seconds={name: x * chance.uniform(0.5, 1.5) for name, x in verdict.seconds.items()},
        )

    verdicts = [other(judged[n % len(judged)], n) for n in range(count)]
    folder.mkdir()
    appender = records.Appender(folder / "verdicts-one.jsonl")
    for verdict in verdicts:
        _ = verdict.case.id  # found out before a case runs
    start = time.process_time()
    for verdict in verdicts:
        appender.append(records.encode(verdict, spec="torch", device="cpu"))
    seconds = time.process_time() - start
    appender.close()
    provenance = {"kind": store.KIND, "schema": store.migrate.SCHEMA, "kind_of_run": "sweep", "started": ""}
    (folder / "provenance.json").write_text(store.to_json(provenance))
    return {"verdicts": count, "record_us": round(seconds / count * 1e6, 1)}


def compact(folder: Path, _: int) -> dict[str, Any]:
    """Compact the run."""
    from effattn.run import tables

    start = time.perf_counter()
    made = tables.compact(folder)
    seconds = time.perf_counter() - start
    return {"rows": made.rows, "compact_seconds": round(seconds, 2), "parquet_megabytes": round(made.size / 1e6, 1),
            "compact_peak_megabytes": _peak()}  # fmt: skip


def ask(folder: Path, _: int) -> dict[str, Any]:
    """Filter and add up, again and again; the median. Opening the connection is beside it, as the command does it."""
    from effattn.run import tables

    start = time.perf_counter()
    with tables.opened([folder]) as connection:
        opened = time.perf_counter() - start
        times, rows = [], []
        for _again in range(ASKED):
            start = time.perf_counter()
            rows = connection.execute(QUESTION).fetchall()
            times.append(time.perf_counter() - start)
    if len(rows) != 3:
        raise SystemExit(f"the query has {len(rows)} rows, expected one for each dtype")
    return {"open_seconds": round(opened, 3), "query_seconds": round(statistics.median(times), 4)}


def report(folder: Path, _: int) -> dict[str, Any]:
    """Write the report on a recorded run."""
    from effattn import cli_report
    from effattn.report import gather, html

    start = time.perf_counter()
    material = gather.gather([folder])
    with tempfile.TemporaryDirectory() as out:
        target = Path(out, "report.html")
        cli_report.write(target, html.render(material))
        seconds = time.perf_counter() - start
        size = target.stat().st_size
    return {
        "methods": material.methods,
        "profile": material.runs[0][1].get("profile"),
        "verdicts": len(material.verdicts),
        "seconds": round(seconds, 1),
        "megabytes": round(size / 1e6, 2),
        "peak_megabytes": _peak(),
    }


def _peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MEBI)


STEPS = {step.__name__: step for step in (record, compact, ask, report)}


def apart(step: str, folder: Path, count: int) -> dict[str, Any]:
    """One step in a process of its own, whose memory is that of the step alone."""
    done = subprocess.run(
        [sys.executable, __file__, "--step", step, "--run", str(folder), "--verdicts", str(count)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    print(step, done.stdout.strip(), flush=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="sweep,store")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verdicts", type=int, default=200_000)
    parser.add_argument("--run", type=Path, help="the run that `report` is about")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.step:
        print(json.dumps(STEPS[options.step](options.run, options.verdicts)))
        return
    from effattn.run import provenance

    found: dict[str, Any] = {}
    for section in options.only.split(","):
        origin = {"date": provenance.now(), "load_before": os.getloadavg()[0]}
        if section == "sweep":
            figures = sweep(options)
        elif section == "store":
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place, "run")
                figures = {}
                for step in ("record", "compact", "ask"):
                    figures |= apart(step, folder, options.verdicts)
        elif section == "report" and options.run is not None:
            figures = apart("report", options.run, 0)
        else:
            parser.error(f"section {section!r}; there are sweep, store, and report with --run")
        found[section] = {**origin, **provenance.collect(device="cpu"), "figures": figures}
    if options.out is not None:
        before = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
        written = {"schema": 1, "sections": {**before.get("sections", {}), **found}}
        options.out.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
