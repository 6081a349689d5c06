"""What a test run compared and compiled, for the generated tables of docs/.

    EFFATTN_RECORD_EXACTNESS=FILE pytest ...    operations compared with a reference: how many values, largest error
    EFFATTN_RECORD_COVERAGE=FILE pytest ...     which of Triton's IR operations each test file compiled

Tests call `compared` after their assertion. conftest.py writes the files, and only where every test passed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

EXACTNESS = "EFFATTN_RECORD_EXACTNESS"
COVERAGE = "EFFATTN_RECORD_COVERAGE"

#: (operation, types, reference) -> values compared, largest error in ulp (0 for bit-exact), unit of that error
_compared: dict[tuple[str, str, str], dict[str, Any]] = {}
#: IR operation -> names of the test files that compiled it
_compiled: dict[str, set[str]] = {}
#: (what a kernel was refused for, test file)
_refused: set[tuple[str, str]] = set()
_current = ""


def compared(
    operation: str, types: str, reference: str, values: int, *, ulp: float = 0.0, unit: str = ""
) -> None:
    """Note that `values` results were compared. `ulp`: the largest error; 0 means that every bit was equal."""
    entry = _compared.setdefault((operation, types, reference), {"values": 0, "ulp": 0.0, "unit": unit})
    entry["values"] += int(values)
    entry["ulp"] = max(entry["ulp"], float(ulp))


def many() -> bool:
    """Whether a measurement is being made: tests that draw their values draw more."""
    return EXACTNESS in os.environ


def begin(test_file: str) -> None:
    global _current
    _current = test_file


def watch_compilations() -> None:
    """Note the operations of each kernel's IR, with the test that compiled it; and each refusal."""
    from effattn.cpu import ir, lower, support

    to_c, refusal = lower.to_c, support.refusal

    def noted(mod: Any, metadata: dict[str, Any]) -> Any:
        names: set[str] = set()
        mod.walk(lambda op: names.add(op.get_name()))
        text = to_c(mod, metadata)
        for name in names:
            _compiled.setdefault(name, set()).add(_current)
        return text

    def noted_refusal(function: Any, op: ir.Op, error: Any) -> Any:
        _refused.add((str(error), _current))
        return refusal(function, op, error)

    lower.to_c = noted
    support.refusal = noted_refusal


def write() -> None:
    """Write what the environment asks for."""
    import torch
    import triton

    versions = {"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]}
    if path := os.environ.get(EXACTNESS):
        rows = [
            {"operation": o, "types": t, "reference": r, **entry}
            for (o, t, r), entry in sorted(_compared.items())
        ]
        _write(path, {"versions": versions, "rows": rows})
    if path := os.environ.get(COVERAGE):
        compiled = {name: sorted(files) for name, files in sorted(_compiled.items())}
        _write(path, {"versions": versions, "compiled": compiled, "refused": sorted(map(list, _refused))})


def _write(path: str, value: Any) -> None:
    Path(path).write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
