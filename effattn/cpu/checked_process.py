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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from multiprocessing import util
from pathlib import Path
from typing import Any

from effattn.cpu.sanitizer import Checks, Fault, Finding, Report, Traffic, parse

#: environment variable with the names of the checks and the folder, as JSON
VARIABLE = "EFFATTN_CPU_CHECKS"

#: signals to `effattn cpu --check` that are for the program
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)
#: si_code: SI_USER, and less for other ways of sending; the terminal's is greater
_SENT_BY_A_PROCESS = 0
_GRACE = 0.3  # seconds


class _Process(Checks):
    """The checks of this process, for good."""

    def __init__(self, *instruments: str, folder: str) -> None:
        super().__init__(*instruments)
        self.folder = folder
        self._file: int | None = None
        self._ended = False

    def note(self, found: list[Finding], *, launches: int = 1) -> None:
        """Take findings, and write them down."""
        traffic = [[*key, asdict(t)] for key, t in self.report.traffic.items()]
        self.report.traffic.clear()
        self.write({"launches": launches, "traffic": traffic, "findings": [asdict(f) for f in found]})
        super().note(found, launches=launches)

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
        # A second Ctrl-C waits until they are written.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.write({"findings": [asdict(f) for f in self.end()]})
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def uncaught(self, hook: Callable[..., Any]) -> Callable[..., None]:
        """`sys.excepthook` that notes which findings the traceback has told."""

        def excepthook(kind: Any, error: BaseException, trace: Any) -> None:
            hook(kind, error, trace)
            if isinstance(error, Fault):
                self.write({"told": [asdict(f) for f in error.findings]})

        return excepthook

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
    sys.excepthook = checks.uncaught(sys.excepthook)
    atexit.register(checks.last_words)
    os.register_at_fork(after_in_child=checks.forget)
    util.register_after_fork(checks, _Process.in_worker)


def run(command: Sequence[str], env: Mapping[str, str], checks: Sequence[str]) -> int:
    """Run a program under checks and print what they found to the standard error.

    Returns its exit code (128 + n where signal n ended it), or 1 where it is 0 and something was found. Where SIGINT or
    SIGTERM ended it, this process ends by the same signal, as the program does without checks.
    """
    names = parse(",".join(checks))
    with tempfile.TemporaryDirectory(prefix="effattn-checks-") as folder:
        code = _attended(command, {**env, VARIABLE: json.dumps([names, folder])})
        report = collect(Path(folder), names)
    sys.stdout.flush()
    print(report.summary(), file=sys.stderr, flush=True)
    if -code in _PASSED_ON:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    if code < 0:
        return 128 - code
    return code or int(bool(report.findings))


def _attended(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run a program and pass signals on that were sent to this process alone. Returns Popen's exit code.

    The program stands in the same group of processes: Ctrl-C on a terminal reaches both, and is the program's. `kill PID` by
    a script or a test runner reaches this process, and without checks it would have been the program.
    """
    passed_on = {n for n in _PASSED_ON if signal.getsignal(n) != signal.SIG_IGN}
    # Ignored, it would not say when the program ends.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Blocked, so that they can be waited for, with who sent them. The program has them as they were.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *passed_on})
    try:
        process = subprocess.Popen(
            list(command), env=env, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        )
        interrupted: float | None = None  # when SIGINT is to be passed on
        while process.poll() is None:
            if interrupted is None:
                info = signal.sigwaitinfo({signal.SIGCHLD, *passed_on})
            else:
                left = max(0.0, interrupted - time.monotonic())
                info = signal.sigtimedwait({signal.SIGCHLD, *passed_on}, left)
            if info is None:
                process.send_signal(signal.SIGINT)
                interrupted = None
            elif info.si_signo == signal.SIGTERM:
                process.send_signal(signal.SIGTERM)
            elif (
                info.si_signo == signal.SIGINT and info.si_code <= _SENT_BY_A_PROCESS and interrupted is None
            ):
                # To the whole group, perhaps. A program that has it too ends meanwhile, and is not interrupted in ending.
                interrupted = time.monotonic() + _GRACE
        return process.returncode
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGCHLD, before)


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
            found |= dict.fromkeys(_findings(entry.get("findings", ())))
            report.told |= set(_findings(entry.get("told", ())))
    report.findings = list(found)
    return report


def _findings(written: Iterable[dict[str, Any]]) -> list[Finding]:
    found = []
    for data in written:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        found.append(Finding(**values))
    return found
