"""Kills sweeps at random moments, resumes them, and counts what is recorded.

    python benchmarks/killing.py --kills 200

Half of the kills hit the supervisor, which is then started again; half hit one of its workers. At the end of each sweep
every case must be recorded exactly once, every line whole, every outcome a pass. Writes what it counted to
docs/measurements/killing.json.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

METHOD = """
import os
import torch

def tells_its_pid(q, k, v):
    with open(os.environ["TOLD"], "w") as told:
        told.write(f"{os.getpid()}\\n")
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).to(q.dtype)
"""
SPEC = """
methods = ["mine.py:tells_its_pid"]
dtypes = ["fp16", "fp32"]
shapes = [{{ q_len = 3, kv_len = 5, head_dim = 8 }}]
seeds = {{ from = 0, count = {seeds} }}
"""
MAIN = "import sys; from effattn.cli import main; sys.exit(main())"
#: Kills of one sweep; then it is let come to its end, and counted.
KILLS_A_SWEEP = 10


def sweep_once(folder: Path, kills: int, chance: random.Random, seeds: int) -> dict[str, int]:
    """One sweep with so many kills. Returns the counts."""
    from effattn.run import records, spec, store

    (folder / "mine.py").write_text(METHOD)
    (folder / "sweep.toml").write_text(SPEC.format(seeds=seeds))
    os.mkfifo(folder / "told")
    told = os.open(folder / "told", os.O_RDWR | os.O_NONBLOCK)
    counted: Counter[str] = Counter()

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", MAIN, "sweep", "sweep.toml", "--out", "run", "--jobs", "2"],
            cwd=folder, env={**os.environ, "TOLD": str(folder / "told")},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    process = start()
    for _ in range(kills):
        # The next case that begins, then a random moment in the time of some cases.
        pid = _next_pid(told, process)
        if pid is None:
            break
        time.sleep(chance.random() * 0.05)
        if chance.random() < 0.5:
            process.kill()
            process.communicate()
            counted["supervisors killed"] += 1
            process = start()
        else:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            counted["workers killed"] += 1
    _drain(told, process)
    _, err = process.communicate()
    os.close(told)
    if process.returncode:
        raise SystemExit(f"the last sweep exited with {process.returncode}: {err.decode()}")
    wanted = {
        records.Key(case.id, method, "cpu") for method, case in spec.load(folder / "sweep.toml").cases()
    }
    found: Counter[records.Key] = Counter()
    for file in store.verdict_files(folder / "run"):
        for line in records.lines(file):
            try:
                record = records.decode(line)
            except ValueError:
                counted["damaged lines"] += 1
                continue
            found[record.key] += 1
            counted[f"outcome {record.verdict['outcome']}"] += 1
    counted["cases"] += len(wanted)
    counted["missing"] += len(wanted - found.keys())
    counted["recorded more than once"] += sum(1 for n in found.values() if n > 1)
    return dict(counted)


def _next_pid(told: int, process: subprocess.Popen[bytes]) -> int | None:
    """The process that begins the next case; None where the sweep is over."""
    import select

    _empty(told)
    while process.poll() is None:
        if select.select([told], [], [], 1.0)[0]:
            lines = os.read(told, 65536).split()
            if lines:
                return int(lines[-1])
    return None


def _drain(told: int, process: subprocess.Popen[bytes]) -> None:
    """Read what is told, so that nobody waits for room in the pipe, until the sweep is over."""
    import select

    while process.poll() is None:
        if select.select([told], [], [], 0.2)[0]:
            _empty(told)


def _empty(told: int) -> None:
    try:
        while os.read(told, 65536):
            pass
    except BlockingIOError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seeds", type=int, default=600, help="seeds of each sweep, which has twice as many cases"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "docs/measurements/killing.json"
    )
    arguments = parser.parse_args()
    from effattn.run import provenance

    chance = random.Random(arguments.seed)
    total: Counter[str] = Counter()
    started = time.monotonic()
    while (done := total["supervisors killed"] + total["workers killed"]) < arguments.kills:
        with tempfile.TemporaryDirectory() as folder:
            total.update(
                sweep_once(Path(folder), min(KILLS_A_SWEEP, arguments.kills - done), chance, arguments.seeds)
            )
        total["sweeps"] += 1
        print(dict(total), flush=True)
    wrong = total["missing"] + total["recorded more than once"] + total["damaged lines"]
    wrong += total["cases"] - total["outcome pass"]
    told = {
        "what": "sweeps killed at random moments and resumed, every record counted at the end",
        "command": f"python benchmarks/killing.py --kills {arguments.kills} --seed {arguments.seed} --seeds {arguments.seeds}",
        "date": provenance.now(),
        "seconds": round(time.monotonic() - started),
        "cpu": provenance.cpu_name(),
        "counts": dict(sorted(total.items())),
        "wrong": wrong,
    }
    arguments.out.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(told, indent=2))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
