"""Runs the tests that compare the CPU backend's numbers with references, on many values, and writes what was compared.

    python benchmarks/exactness.py --out docs/measurements/exactness.json

A row is an operation, its types, what it was compared with, how many values, and the largest error found: 0 for
bit-exact. Nothing is written unless every comparison held. docs/update_tables.py makes docs/cpu-exactness.md of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
#: the test files that record what they compare (tests/recording.py)
FILES = (
    "test_cpu_conversions.py",
    "test_cpu_numbers.py",
    "test_cpu_functions.py",
    "test_cpu_nan.py",
    "test_cpu_tiles.py",
    "test_cpu_interpreter.py",
)


def measured(arguments: list[str]) -> dict[str, object]:
    """The rows of one run of the tests."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", *(f"tests/{name}" for name in FILES), *arguments],
            cwd=ROOT, env={**os.environ, "EFFATTN_RECORD_EXACTNESS": str(path)}, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"pytest exited with {done.returncode}: nothing was written")
        return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where to write the measurement (JSON)")
    parser.add_argument("pytest", nargs="*", help="more arguments for pytest, after --")
    given = parser.parse_args()
    found = measured(given.pytest)
    machine = {
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
    }
    out = {"date": datetime.now(UTC).date().isoformat(), **machine, **found}
    given.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(f"{len(found['rows'])} rows written to {given.out}")  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main()
