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


def _again(folder: Path, factor: str) -> subprocess.CompletedProcess[str]:
    (folder / "kernel.py").write_text(f"FACTOR = {factor}\n{WRONG}")
    script = [sys.executable, "bug.py"]
    return subprocess.run(script, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("law", ["columns_of_v_do_not_mix", "negated_values_negate_the_output"])
def test_the_script_of_a_law_compares_its_calls_and_says_0_once_the_function_is_mended(
    tmp_path: Path, effattn_command: Command, law: str
) -> None:
    wrong = {
        "columns_of_v_do_not_mix": "__import__('torch').linspace(1.0, 2.0, 16)",
        "negated_values_negate_the_output": "type('Size', (), {'__rmul__': lambda self, x: x.abs()})()",
    }
    done = _script(tmp_path, effattn_command, wrong[law], "--law", law)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "; expected " in done.stdout
    assert "allowed 0.0" in done.stdout
    text = (tmp_path / "bug.py").read_text()
    assert "expected = outs[" in text  # the other call's, not a number that another kernel need not meet
    done = _again(tmp_path, "1.0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_nan_of_a_masked_tile_is_compared_with_the_answer_without_it(
    tmp_path: Path, effattn_command: Command
) -> None:
    kernel, out, law = tmp_path / "kernel.py", tmp_path / "bug.py", "future_keys_have_no_influence"
    hidden = "(q.shape[-1] ** -0.5 if scale is None else scale)\n"
    masked = (
        "    if causal:\n        q_len, kv_len = scores.shape[-2:]\n"
        "        scores = scores.where(scores.new_ones(q_len, kv_len).tril(kv_len - q_len) > 0, float('-inf'))\n"
    )
    kernel.write_text("FACTOR = 1.0\n" + WRONG.replace(hidden, hidden + masked))
    case = replace(CASE, causal="bottom-right", kv_len=5, seed=0).to_json()
    code, text, _ = effattn_command(
        "replay", case, f"{kernel}:attention", "--law", law, "--no-isolation", "--export", out
    )
    assert code == 1
    assert "0 * NaN" in text
    assert "nan_safe=False" in text
    done = subprocess.run(
        [sys.executable, str(out)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "is nan; expected " in done.stdout


def test_a_law_about_no_element_is_not_exported(tmp_path: Path, effattn_command: Command) -> None:
    kernel, out = tmp_path / "kernel.py", tmp_path / "bug.py"
    kernel.write_text(f"FACTOR = 1.0\n{WRONG.replace('return (', 'q.mul_(2.0); return (')}")
    law = "inputs_and_what_surrounds_them_are_not_written"
    code, _, err = effattn_command(
        "replay", CASE.to_json(), f"{kernel}:attention", "--law", law, "--no-isolation", "--export", out
    )
    assert code == 2
    assert "no element of an output" in err
    assert not out.exists()


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


GRADIENT = """
import torch

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * FACTOR

def attention(q, k, v, *, causal=False, scale=None):
    q = Twice.apply(q)
    s = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (s.softmax(-1) @ v.float()).to(q.dtype), s.logsumexp(-1)
"""


def test_the_script_of_a_gradient_asks_autograd_for_it(tmp_path: Path, effattn_command: Command) -> None:
    kernel, out = tmp_path / "kernel.py", tmp_path / "bug.py"
    case = replace(CASE, backward=True, kv_heads=CASE.heads, causal="none", dtype="fp32")
    kernel.write_text(f"FACTOR = 2.0\n{GRADIENT}")
    code, said, err = effattn_command(
        "replay", case.to_json(), f"{kernel}:attention", "--no-isolation", "--export", out
    )
    assert code == 1, said + err
    assert len(out.read_text().splitlines()) <= 40
    script = [sys.executable, "bug.py"]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("dq[")
    kernel.write_text(f"FACTOR = 1.0\n{GRADIENT}")
    assert subprocess.run(script, cwd=tmp_path, capture_output=True, check=False).returncode == 0


def test_laws_of_gradients_are_not_exported(tmp_path: Path, effattn_command: Command) -> None:
    out = tmp_path / "bug.py"
    case = replace(CASE, backward=True).to_json()
    options = ("--law", "dq_and_dk_agree", "--no-isolation", "--export", out)
    code, _, err = effattn_command("replay", case, "effattn.zoo:dq_not_scaled", *options)
    assert code == 2
    assert "the law is one of gradients" in err
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
