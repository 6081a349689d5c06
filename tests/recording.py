"""What a test run compared and compiled, for the generated tables of docs/.

    EFFATTN_RECORD_EXACTNESS=FILE pytest ...    operations compared with a reference: how many values, largest error
    EFFATTN_RECORD_COVERAGE=FILE pytest ...     which of Triton's IR operations each test file compiled

Tests call `compared` after their assertion, and conftest.py writes the first file only where every test passed. In the
second file is what tests that passed compiled; a run adds to a file of the same versions, so that a suite can be run in
parts. With `pytest -n`, the processes hand over what they noted (`found`), and the one that started them adds it up (`add`)
and writes.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXACTNESS = "EFFATTN_RECORD_EXACTNESS"
COVERAGE = "EFFATTN_RECORD_COVERAGE"

#: what a process that ended early found
NOTHING: dict[str, Any] = {"rows": [], "compiled": {}, "refused": []}

#: (operation, types, reference) -> values compared, largest error in ulp (0 for bit-exact), unit of that error
_compared: dict[tuple[str, str, str], dict[str, Any]] = {}
#: IR operation -> names of the test files that compiled it
_compiled: dict[str, set[str]] = {}
#: (what a kernel was refused for, test file)
_refused: set[tuple[str, str]] = set()
#: what the running test compiled and saw refused
_now: dict[str, set[str]] = {"compiled": set(), "refused": set()}


def compared(
    operation: str, types: str, reference: str, values: int, *, ulp: float = 0.0, unit: str = ""
) -> None:
    """Note that `values` results were compared. `ulp`: the largest error; 0 means that every bit was equal."""
    _note((operation, types, reference), {"values": int(values), "ulp": float(ulp), "unit": unit})


def _note(row: tuple[str, str, str], new: dict[str, Any]) -> None:
    entry = _compared.setdefault(row, {"values": 0, "ulp": 0.0, "unit": new["unit"]})
    entry["values"] += new["values"]
    entry["ulp"] = max(entry["ulp"], new["ulp"])


def many() -> bool:
    """Whether a measurement is being made: tests that draw their values draw more."""
    return EXACTNESS in os.environ


def begin() -> None:
    """A test begins."""
    for names in _now.values():
        names.clear()


def passed(test_file: str) -> None:
    """The running test passed: what it compiled was right, what it saw refused was to be refused."""
    for name in _now["compiled"]:
        _compiled.setdefault(name, set()).add(test_file)
    _refused.update((reason, test_file) for reason in _now["refused"])


def watch_compilations() -> None:
    """Note the operations of each kernel that is compiled, with the test file, before and after Triton's passes; and each
    refusal. Every kernel is compiled anew: what comes from Triton's cache is not seen."""
    import triton  # noqa: F401, first: it imports the backend's modules itself

    from effattn.cpu import compiler, support

    # In the environment, so that tests can choose a cache of their own as they always do.
    folder = os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="effattn-coverage-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_ttir, make_c = compiler.make_ttir, compiler.make_c
    pending: set[str] = set()

    def names_of(mod: Any) -> set[str]:
        names: set[str] = set()
        mod.walk(lambda op: names.add(op.get_name()))
        return names

    def noted_ttir(mod: Any, *rest: Any, **options: Any) -> Any:
        pending.clear()
        pending.update(names_of(mod))
        with _refusals(support.UnsupportedKernel):
            return make_ttir(mod, *rest, **options)

    def noted_c(mod: Any, *rest: Any, **options: Any) -> Any:
        names = names_of(mod) | pending
        with _refusals(support.UnsupportedKernel):
            text = make_c(mod, *rest, **options)
        _now["compiled"].update(names)
        return text

    compiler.make_ttir, compiler.make_c = noted_ttir, noted_c


@contextmanager
def _refusals(kind: type[Exception]) -> Iterator[None]:
    """Note what a kernel of Triton's is refused for; tests also hand IR to the backend that Triton never makes."""
    try:
        yield
    except kind as error:
        # kernel NAME, FILE:LINE: REASON is not supported by the CPU backend
        reason = str(error).partition(": ")[2].removesuffix(" is not supported by the CPU backend")
        _now["refused"].add(reason)
        raise


def found() -> dict[str, Any]:
    """What this process noted, as JSON: the rows of comparisons, the operations compiled, the refusals."""
    rows = [
        {"operation": o, "types": t, "reference": r, **entry}
        for (o, t, r), entry in sorted(_compared.items())
    ]
    compiled = {name: sorted(files) for name, files in sorted(_compiled.items())}
    return {"rows": rows, "compiled": compiled, "refused": sorted(map(list, _refused))}


def add(other: dict[str, Any]) -> None:
    """Add what another process found."""
    for row in other["rows"]:
        _note((row["operation"], row["types"], row["reference"]), row)
    for name, files in other["compiled"].items():
        _compiled.setdefault(name, set()).update(files)
    _refused.update((reason, file) for reason, file in other["refused"])


def write(all_passed: bool) -> None:
    """Write what the environment asks for."""
    import torch
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]}
    path = os.environ.get(EXACTNESS)
    if path and all_passed:  # what a failed run compared is no evidence
        _write(path, {"versions": versions, "rows": found()["rows"]})
    if path := os.environ.get(COVERAGE):
        before = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else {}
        if before.get("versions") == versions:
            add({**NOTHING, **before})
        noted = found()
        _write(path, {"versions": versions, "compiled": noted["compiled"], "refused": noted["refused"]})


def _write(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
