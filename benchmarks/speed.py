"""Speed of a verdict and of whole commands; benchmarks/cpu_backend.py has that of kernels.

    python benchmarks/speed.py [--only judge,commands,gates,laws,ci] [--out FILE]
    python benchmarks/speed.py --only gates,laws,ci --out docs/measurements/gate-speed.json

Medians are printed; nothing is asserted. `--out` writes the figures as JSON with versions and machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import DTYPES


def judge(rounds: int) -> list[dict[str, Any]]:
    """One judged small case, warm: tensors, kernel, reference, envelope, verdict."""
    from effattn import methods
    from effattn.case import Case
    from effattn.judge import judge as judge_case

    print("A judged case: 2 heads, 64 x 64, d = 32, causal; kernel, reference and verdict together, warm")
    method = methods.get("flash")
    rows = []
    for dtype in DTYPES:
        case = Case(heads=2, q_len=64, kv_len=64, head_dim=32, dtype=dtype, causal="bottom-right")
        for _ in range(3):
            judge_case(case, method)
        times, parts = [], []
        for _ in range(rounds * 5):
            start = time.perf_counter()
            verdict = judge_case(case, method)
            times.append(time.perf_counter() - start)
            parts.append(verdict.seconds)
        split = {key: statistics.median(p[key] for p in parts) * 1e3 for key in parts[0]}
        row = {"dtype": dtype, "ms": statistics.median(times) * 1e3, "parts_ms": split}
        rows.append(row)
        print(
            f"  {dtype:5} {row['ms']:.2f} ms   " + "   ".join(f"{k} {v:.2f}" for k, v in split.items()),
            flush=True,
        )
    return rows


def commands(rounds: int) -> list[dict[str, Any]]:
    """Whole commands, as a user starts them: cold means an empty kernel cache."""
    program = [sys.executable, "-c", "import sys; from effattn.cli import main; sys.exit(main())"]
    rows = []

    def timed(label: str, arguments: list[str], cache: str, repeat: int) -> None:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            subprocess.run([*program, *arguments], env=env, capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        row = {
            "command": "effattn " + " ".join(arguments[:4]),
            "state": label,
            "seconds": statistics.median(times),
        }
        rows.append(row)
        print(f"  {row['command']:45} {label:14} {row['seconds']:6.2f} s", flush=True)

    print("Whole commands")
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as out:
        timed("", ["--help"], cache, max(3, rounds // 2))
        gate = ["gate", "flash", "--profile", "smoke", "--out", str(Path(out, "run")), "--overwrite"]
        timed("empty cache", gate, cache, 1)
        timed("warm", gate, cache, 3)
    return rows


def gates(rounds: int, *, ci: bool = False) -> list[dict[str, Any]]:
    """Gates of `flash` with all laws: with an empty cache of kernels and again; `ci` in one dtype instead."""
    program = [sys.executable, "-c", "import sys; from effattn.cli import main; sys.exit(main())"]
    rows = []
    print("Gates")
    for dtypes in ("fp16",) if ci else ("fp16", "fp16,bf16,fp32"):
        with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as out:
            asked = ["gate", "flash", "--profile", "ci" if ci else "smoke", "--dtype", dtypes]
            for state in ("empty cache", "warm")[: 1 if ci else 2]:
                load = os.getloadavg()[0]
                start = time.perf_counter()
                subprocess.run(
                    [*program, *asked, "--out", str(Path(out, "run")), "--overwrite"],
                    env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, check=True,
                )  # fmt: skip
                seconds = time.perf_counter() - start
                verdicts = [
                    json.loads(line)
                    for file in sorted(Path(out, "run").rglob("*.jsonl"))
                    for line in file.read_text(encoding="utf-8").splitlines()
                ]
                row = {
                    "command": "effattn " + " ".join(asked),
                    "state": state,
                    "seconds": seconds,
                    "kernels": len(list(Path(cache).rglob("*_kernel.so"))),
                    "cases": len(verdicts),
                    "load_before": load,
                }
                rows.append(row)
                print(f"  {row['command']:60} {state:12} {seconds:6.1f} s  {row['kernels']} kernels, {row['cases']} cases",
                      flush=True)  # fmt: skip
    return rows


def laws(rounds: int) -> list[dict[str, Any]]:
    """Cases a second that forward laws are judged on, up to 128 queries and keys, in the processes of a gate, warm."""
    from effattn.gate import Question, Request, collect
    from effattn.laws import choose
    from effattn.run.isolation import Isolated

    print("Forward laws, up to 128 x 128")
    rows = []
    names = tuple(law.name for law in choose() if not law.gradients)
    for dtype in DTYPES:
        with Isolated("flash") as judge:
            asked = collect(Request(judge=judge, dtypes=(dtype,), profile="smoke", laws=names))
            small = [q for q in asked if q.law and max(q.case.q_len, q.case.kv_len) <= 128]
            questions: list[Question] = small * 4
            start = time.perf_counter()
            # Processes are new and kernels are compiled in the first half.
            for done, _ in enumerate(judge.judge_all(questions), 1):
                if done == len(questions) // 2:
                    start = time.perf_counter()
            seconds = time.perf_counter() - start
            row = {
                "dtype": dtype, "laws": len(names), "cases": len(questions) - len(questions) // 2, "seconds": seconds,
                "processes": judge.jobs, "load_before": os.getloadavg()[0],
            }  # fmt: skip
        rows.append(row)
        print(
            f"  {dtype:5} {row['cases'] / seconds:.0f} cases a second in {row['processes']} processes",
            flush=True,
        )
    return rows


def ci(rounds: int) -> list[dict[str, Any]]:
    """A gate of the profile `ci` in one dtype, with an empty cache."""
    return gates(rounds, ci=True)


SECTIONS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "judge": judge,
    "commands": commands,
    "gates": gates,
    "laws": laws,
    "ci": ci,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--rounds", type=int, default=11, help="pairs timed (11)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    unknown = [name for name in options.only.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    figures = {name: SECTIONS[name](options.rounds) for name in options.only.split(",")}
    if options.out is not None:
        from effattn.run import provenance

        record = {
            "schema": 1,
            "date": provenance.now(),
            **provenance.collect(device="cpu"),
            "figures": figures,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n")
        print(f"written to {options.out}")


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    raise TypeError(f"cannot write {type(value)}")


if __name__ == "__main__":
    main()
