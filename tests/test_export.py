"""`replay --export`: a failure as a script that needs torch and the function only."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from effattn.case import Case
from effattn.report import export

WRONG = """
def attention(q, k, v, *, causal=False, scale=None):
    scores = q.float() @ k.float().transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v.float() * FACTOR).to(q.dtype)
"""
CASE = Case(q_len=5, kv_len=9, head_dim=16, dtype="fp16", layout="bshd+pad")
Command = Callable[..., tuple[int, str, str]]


def _script(folder: Path, command: Command, factor: str, *options: str) -> subprocess.CompletedProcess[str]:
    kernel = folder / "kernel.py"
    kernel.write_text(f"FACTOR = {factor}\n{WRONG}")
    out = folder / "bug.py"
    code, _, err = command(
        "replay", CASE.to_json(), f"{kernel}:attention", *options, "--no-isolation", "--export", out
    )
    assert code == 1, err
    text = out.read_text()
    assert len(text.splitlines()) <= 40
    assert "import effattn" not in text
    return subprocess.run([sys.executable, str(out)], cwd=folder, capture_output=True, text=True, check=False)


def test_the_script_repeats_an_inaccurate_element_and_exits_with_1(
    tmp_path: Path, effattn_command: Command
) -> None:
    done = _script(tmp_path, effattn_command, "1.5")
    assert done.returncode == 1, done.stderr
    assert "exact is" in done.stdout


def test_the_script_says_0_once_the_function_is_mended(tmp_path: Path, effattn_command: Command) -> None:
    _script(tmp_path, effattn_command, "1.5")
    (tmp_path / "kernel.py").write_text(f"FACTOR = 1.0\n{WRONG}")
    done = subprocess.run(
        [sys.executable, "bug.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_of_a_law_makes_its_calls(tmp_path: Path, effattn_command: Command) -> None:
    done = _script(
        tmp_path,
        effattn_command,
        "__import__('torch').linspace(1.0, 2.0, 16)",
        "--law",
        "columns_of_v_do_not_mix",
    )
    assert done.returncode == 0, done.stderr
    assert "call 0: shape (1, 1, 5, 16)" in done.stdout
    assert "call 1: shape (1, 1, 5, 16)" in done.stdout


def test_what_does_not_fail_is_not_exported(tmp_path: Path, effattn_command: Command) -> None:
    (tmp_path / "kernel.py").write_text(f"FACTOR = 1.0\n{WRONG}")
    out = tmp_path / "bug.py"
    code, _, err = effattn_command(
        "replay", CASE.to_json(), f"{tmp_path / 'kernel.py'}:attention", "--export", out
    )
    assert code == 2
    assert "does not fail" in err
    assert not out.exists()
    code, _, err = effattn_command("replay", CASE.to_json(), "torch", "--no-isolation", "--export", out)
    assert code == 2
    assert "comes with effattn" in err


def test_failures_of_gradients_are_not_exported(tmp_path: Path, effattn_command: Command) -> None:
    out = tmp_path / "bug.py"
    case = replace(CASE, backward=True).to_json()
    for method, options in (
        ("effattn.zoo:dq_not_scaled", ()),
        ("effattn.zoo:dq_not_scaled", ("--law", "dq_and_dk_agree")),
    ):
        code, _, err = effattn_command("replay", case, method, *options, "--no-isolation", "--export", out)
        assert code == 2
        assert "the failure is one of gradients" in err
        assert not out.exists()


def test_tensors_too_large_for_a_report_are_refused(
    tmp_path: Path, effattn_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "MOST_TEXT", 100)
    kernel = tmp_path / "kernel.py"
    kernel.write_text(f"FACTOR = 2.0\n{WRONG}")
    code, _, err = effattn_command(
        "replay", CASE.to_json(), f"{kernel}:attention", "--no-isolation", "--export", tmp_path / "bug.py"
    )
    assert code == 2
    assert "export the smallest case" in err
