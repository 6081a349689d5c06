"""Kernels as others write them for a GPU, with their wrappers and checks, run by `effattn cpu --` as they are (cuda_code/).

Each file checks itself against float64 in fp16, bf16 and fp32, and with --wrong makes a mistake that its check must find.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("cuda_code").glob("*.py"))


def run(*program: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("effattn")), "cpu", "--", "python", *map(str, program)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_code_for_a_gpu_runs_and_is_right(file: Path) -> None:
    done = run(file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(": ok")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_its_check_finds_a_mistake(file: Path) -> None:
    done = run(file, "--wrong")
    assert done.returncode == 1
    assert "AssertionError" in done.stderr


def test_there_are_files() -> None:
    assert len(FILES) >= 5
