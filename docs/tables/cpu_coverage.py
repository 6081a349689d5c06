"""Which of Triton's IR operations the tests ran on the CPU backend, by version of Triton: what tests/recording.py recorded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MEASUREMENTS = Path(__file__).resolve().parent.parent / "measurements"
VERSIONS = ("3.6", "3.7", "3.8", "3.9")

#: what each test file compares with: the word of the table, and what it stands for
ORACLES = {
    "test_cpu_numbers.py": ("exact", "integers, fractions and numpy, bit for bit"),
    "test_cpu_conversions.py": ("codes", "integer arithmetic on all codes, bit for bit"),
    "test_cpu_functions.py": ("intervals", "interval arithmetic, within the stated ulp"),
    "test_cpu_nan.py": ("NaN", "bit patterns of NaN by the stated policy"),
    "test_cpu_tiles.py": ("order", "numpy in the documented order of operations, bit for bit"),
    "test_cpu_programs.py": ("numpy", "random programs in numpy, bit for bit"),
    "test_cpu_interpreter.py": (
        "interpreter",
        "random programs in Triton's interpreter where that is right, bit for bit",
    ),
}

#: Operations of Triton's IR that kernels use. First those met in published attention kernels, then the rest of the language.
_OPERATIONS = """
    tt.func tt.return tt.call arith.constant tt.get_program_id tt.get_num_programs tt.addptr tt.splat
    tt.make_range tt.load tt.store tt.broadcast tt.expand_dims tt.trans tt.reshape tt.dot tt.reduce tt.scan
    tt.bitcast tt.fp_to_fp tt.clampf tt.mulhiui tt.gather tt.histogram tt.atomic_rmw tt.extern_elementwise
    tt.elementwise_inline_asm tt.make_tensor_descriptor tt.descriptor_load tt.descriptor_store
    tt.descriptor_reduce arith.addi arith.subi arith.muli arith.divsi arith.divui arith.remsi arith.remui
    arith.andi arith.ori arith.xori arith.shli arith.shrsi arith.shrui arith.maxsi arith.minsi arith.maxui
    arith.minui arith.cmpi arith.cmpf arith.select arith.addf arith.subf arith.mulf arith.divf arith.negf
    arith.maxnumf arith.minnumf arith.extf arith.truncf arith.extsi arith.extui arith.trunci arith.sitofp
    arith.uitofp arith.fptosi arith.fptoui math.exp math.exp2 math.log math.log2 math.sqrt math.absf math.absi
    math.floor math.ceil scf.for scf.if scf.while scf.yield scf.condition cf.br cf.cond_br llvm.intr.assume
    ttg.barrier gpu.barrier tt.join tt.split tt.cat tt.unsplat tt.dot_scaled tt.atomic_cas tt.print tt.assert
    tt.precise_divf tt.precise_sqrt tt.int_to_ptr tt.ptr_to_int tt.map_elementwise arith.maximumf arith.minimumf
    arith.remf math.sin math.cos math.erf math.rsqrt math.fma ub.poison tt.make_tensor_ptr tt.advance
    tt.descriptor_gather tt.descriptor_scatter tt.approx_divf tt.atomic_load tt.atomic_store tt.atomic_poll
    tt.grid_dependency_wait tt.grid_dependency_launch_dependents
"""
OPERATIONS = _OPERATIONS.split()


def coverage_of(version: str) -> Any:
    path = MEASUREMENTS / f"coverage-{version}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _cell(found: Any, name: str) -> str:
    if found is None:
        return "not run"
    if name in found["compiled"]:
        return "yes"
    whole = re.compile(rf"(?<![\w.]){re.escape(name)}(?![\w.])")
    return "refused" if any(whole.search(reason) for reason, _ in found["refused"]) else "-"


def operations() -> str:
    """One row an operation."""
    runs = {version: coverage_of(version) for version in VERSIONS}
    found = [run for run in runs.values() if run is not None]
    seen = {name for run in found for name in run["compiled"]}
    # What a test compiled without being asked for is listed as well: passes make operations of their own.
    names = [*OPERATIONS, *sorted(seen - set(OPERATIONS) - {"builtin.module"})]
    rows = []
    for name in names:
        files = sorted({file for run in found for file in run["compiled"].get(name, ())})
        oracles = [word for file, (word, _) in ORACLES.items() if file in files]
        others = [file.removesuffix(".py") for file in files if file not in ORACLES]
        rows.append([f"`{name}`", *(_cell(runs[v], name) for v in VERSIONS), ", ".join(oracles or others)])
    exact = ", ".join(run["versions"]["triton"] for run in found)
    legend = "".join(f"- *{word}*: {meaning} (`tests/{file}`)\n" for file, (word, meaning) in ORACLES.items())
    return (
        f"Triton {exact}. Tested against:\n\n{legend}- a test file: what its tests expect of the kernels that they run\n\n"
        + markdown(["operation", *VERSIONS, "tested against"], rows)
    )


def refusals() -> str:
    """What the tests saw refused, by version."""
    found = [run for run in map(coverage_of, VERSIONS) if run is not None]
    reasons: dict[str, set[str]] = {}
    for run in found:
        for reason, _ in run["refused"]:
            reasons.setdefault(reason, set()).add(run["versions"]["triton"].rpartition(".")[0])
    return markdown(
        ["what is refused", "with Triton"], [[r, ", ".join(sorted(v))] for r, v in sorted(reasons.items())]
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def render() -> str:
    """The operations, then the refusals."""
    if not any(map(coverage_of, VERSIONS)):
        return "No run is recorded: run the commands above, then `python docs/update_tables.py`."
    return f"{operations()}\n## Refused\n\nEach was met by a test that expects the refusal.\n\n{refusals()}"
