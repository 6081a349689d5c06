"""Checks of whole processes: `effattn cpu --check bounds -- pytest tests/`.

The program and every process that it starts find the names of the checks, and a folder, in an environment variable. Each
writes what it finds into a file of its own there, as soon as it is found: a process that ends without a word has said it
by then. The command reads the folder when the program has ended.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from multiprocessing import util
from pathlib import Path
from typing import Any

from effattn.cpu.sanitizer import Checks, Finding, Report, Traffic, parse

#: environment variable with the names of the checks and the folder, as JSON
VARIABLE = "EFFATTN_CPU_CHECKS"


class _Process(Checks):
    """The checks of this process, for good."""

    def __init__(self, *instruments: str, folder: str) -> None:
        super().__init__(*instruments)
        self.folder = folder
        self._file: int | None = None
        self._ended = False

    def record(self, found: list[Finding]) -> None:
        """Take the findings of one launch, and write them down."""
        traffic = [[*key, asdict(t)] for key, t in self.report.traffic.items()]
        self.report.traffic.clear()
        self.write({"launches": 1, "traffic": traffic, "findings": [asdict(f) for f in found]})
        super().record(found)

    def write(self, entry: dict[str, Any]) -> None:
        """Append to this process's file."""
        if self._file is None:
            path = Path(self.folder, f"{os.getpid()}.jsonl")
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(self._file, (json.dumps(entry) + "\n").encode())

    def last_words(self) -> None:
        """What is only known when the process ends."""
        if self._ended:
            return
        self._ended = True
        self.write({"findings": [asdict(f) for f in self.end()]})

    def forget(self) -> None:
        """In a forked child: what was written before is the parent's."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def in_worker(self) -> None:
        """In a process of `multiprocessing`, which ends without what `atexit` is told."""
        util.Finalize(None, self.last_words, exitpriority=0)


def begin_from_environment() -> None:
    """Begin the checks that VARIABLE describes, until the process ends; nothing where it is not set."""
    given = os.environ.get(VARIABLE)
    if not given:
        return
    names, folder = json.loads(given)
    checks = _Process(*names, folder=folder)
    checks.begin()
    atexit.register(checks.last_words)
    os.register_at_fork(after_in_child=checks.forget)
    util.register_after_fork(checks, _Process.in_worker)


def run(command: Sequence[str], env: Mapping[str, str], checks: Sequence[str]) -> int:
    """Run a program under checks and print what they found to the standard error.

    Returns its exit code (128 + n where signal n ended it), or 1 where it is 0 and something was found.
    """
    names = parse(",".join(checks))
    with tempfile.TemporaryDirectory(prefix="effattn-checks-") as folder:
        process = subprocess.Popen(list(command), env={**env, VARIABLE: json.dumps([names, folder])})
        # Ctrl-C is for the program, which stands in the same group; what it has found by then is still printed.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            code = process.wait()
        finally:
            signal.signal(signal.SIGINT, before)
        report = collect(Path(folder), names)
    sys.stdout.flush()
    print(report.summary(), file=sys.stderr)
    if code < 0:
        return 128 - code
    return code or int(bool(report.findings))


def collect(folder: Path, names: tuple[str, ...]) -> Report:
    """Everything that the processes have written, as one report; a finding that several have is one."""
    report = Report(names)
    found: dict[Finding, None] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            report.launches += entry.get("launches", 0)
            for kernel, argument, counts in entry.get("traffic", ()):
                whole = report.traffic.setdefault((kernel, argument), Traffic())
                for field in fields(Traffic):
                    setattr(whole, field.name, getattr(whole, field.name) + counts[field.name])
            for data in entry.get("findings", ()):
                values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
                found[Finding(**values)] = None
    report.findings = list(found)
    return report
