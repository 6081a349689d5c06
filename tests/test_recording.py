"""What a test run records for the tables of docs/ is what its tests did: tests/recording.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def recorded(tmp_path: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], Path, Path]:
    exactness, coverage = tmp_path / "exactness.json", tmp_path / "coverage.json"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "EFFATTN_RECORD_EXACTNESS": str(exactness), "EFFATTN_RECORD_COVERAGE": str(coverage)},
    )  # fmt: skip
    return done, exactness, coverage


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_records_what_it_compared_and_compiled(processes: int, tmp_path: Path) -> None:
    names = ("test_negation_and_abs_touch_the_sign_alone[fp16]", "test_an_exchange_moves_every_bit")
    # pytest-xdist gives each of two processes one of the two tests.
    done, exactness, coverage = recorded(
        tmp_path,
        *(["-n", "2"] if processes == 2 else []),
        *(f"tests/test_cpu_nan.py::{name}" for name in names),
    )
    assert done.returncode == 0, done.stdout
    (row,) = json.loads(exactness.read_text())["rows"]
    assert (row["operation"], row["types"], row["values"], row["ulp"]) == (
        "negation, abs of NaN",
        "fp16",
        512,
        0.0,
    )
    compiled = json.loads(coverage.read_text())["compiled"]
    assert compiled["tt.atomic_rmw"] == ["test_cpu_nan.py"]
    assert compiled["math.absf"] == ["test_cpu_nan.py"]
    assert "tt.dot" not in compiled


def test_what_did_not_pass_is_no_evidence(tmp_path: Path) -> None:
    # In a folder of its own, with this suite's conftest as a plugin.
    failing = tmp_path / "test_cpu_failing.py"
    failing.write_text(
        "import recording, torch, triton, triton.language as tl\n"
        "@triton.jit\ndef kernel(x):\n    tl.store(x, tl.load(x) + 1)\n"
        "def test_wrong():\n    x = torch.zeros(1)\n    kernel[(1,)](x)\n"
        "    recording.compared('+', 'fp32', 'nothing', 1)\n    assert x.item() == 2\n"
    )
    done, exactness, coverage = recorded(
        tmp_path, "-c", "pyproject.toml", "--confcutdir=.", "-p", "conftest", str(failing)
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "assert 1.0 == 2" in done.stdout
    assert not exactness.exists()
    assert json.loads(coverage.read_text())["compiled"] == {}


def test_a_refusal_is_named_and_a_second_run_adds_to_the_first(tmp_path: Path) -> None:
    test = "tests/test_cpu_control.py::test_{}"
    done, _, coverage = recorded(tmp_path, test.format("a_refusal_reaches_the_user_from_a_launch"))
    assert done.returncode == 0, done.stdout
    first = json.loads(coverage.read_text())
    assert first["refused"] == [
        ["the PTX instruction activemask.b32 in inline assembly", "test_cpu_control.py"]
    ]
    assert "scf.while" not in first["compiled"]
    # The second refuses IR that Triton never makes, which is no refusal of a kernel.
    done, _, coverage = recorded(
        tmp_path, test.format("while_loops"), test.format("a_loop_made_of_branches_is_refused")
    )
    assert done.returncode == 0, done.stdout
    second = json.loads(coverage.read_text())
    assert second["refused"] == first["refused"]
    assert {"scf.while", *first["compiled"]} <= set(second["compiled"])


@pytest.fixture
def coverage_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "cpu_coverage", ROOT / "docs" / "tables" / "cpu_coverage.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_recorded_version_supports_what_the_language_needs(coverage_table: ModuleType) -> None:
    for version in coverage_table.VERSIONS:
        found = coverage_table.coverage_of(version)
        if found is None:  # the table says "not run"
            continue
        assert found["versions"]["triton"].startswith(f"{version}.")
        for name in (
            "tt.dot",
            "tt.reduce",
            "tt.scan",
            "scf.for",
            "scf.if",
            "arith.addf",
            "math.exp2",
            "tt.atomic_rmw",
        ):
            assert name in found["compiled"], f"{name} with Triton {version}"
    assert all((ROOT / "tests" / name).exists() for name in coverage_table.ORACLES)
