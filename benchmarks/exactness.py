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
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

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


def record(file: str, path: Path) -> None:
    """Run one test file, which writes its rows to `path`. SystemExit where a comparison failed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"tests/{file}"],
        cwd=ROOT, env={**os.environ, "EFFATTN_RECORD_EXACTNESS": str(path)}, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{file}: pytest exited with {done.returncode}: nothing was written")


def merged(paths: Sequence[Path]) -> dict[str, Any]:
    """The rows of several runs as one measurement; what several compared is added up."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    versions: dict[str, str] = {}
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        if versions and found["versions"] != versions:
            raise SystemExit(f"{path} was measured with {found['versions']}, the others with {versions}")
        versions = found["versions"]
        for row in found["rows"]:
            key = row["operation"], row["types"], row["reference"]
            before = rows.setdefault(key, {**row, "values": 0})
            before["values"] += row["values"]
            before["ulp"] = max(before["ulp"], row["ulp"])
    machine = {
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
    }
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, **machine, "versions": versions, "rows": [rows[key] for key in sorted(rows)]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="where to write the measurement (JSON)")
    parser.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="run nothing: put recorded files (EFFATTN_RECORD_EXACTNESS) together",
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = given.merge
        if not paths:
            paths = [Path(folder) / f"{file}.json" for file in FILES]
            for file, path in zip(FILES, paths, strict=True):
                record(file, path)
        out = merged(paths)
    given.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
    print(f"{len(out['rows'])} rows written to {given.out}")


if __name__ == "__main__":
    main()
