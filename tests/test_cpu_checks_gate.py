"""Verdicts under `--check`: a fault of a kernel is an outcome, with the line that repeats it."""

from __future__ import annotations

import re
import shlex
import textwrap

import pytest

from effattn.case import Case
from effattn.cli import main
from effattn.gate import Question, Request, run_gate
from effattn.run.executor import Local
from effattn.run.isolation import Isolated
from effattn.verdict import Outcome

METHODS = """
import torch
import triton
import triton.language as tl


@triton.jit
def touch(x_ptr, n, BLOCK: tl.constexpr, EXTRA: tl.constexpr, PROGRAMS: tl.constexpr):
    at = tl.program_id(0) % PROGRAMS * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n + EXTRA, other=0.0)
    tl.store(x_ptr + at, x, mask=at < n)


def attend(q, k, v):
    scores = q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def run(q, k, v, **how):
    out = attend(q, k, v)
    programs = triton.cdiv(out.numel(), 64)
    touch[(programs * how.get("times", 1),)](
        out, out.numel(), BLOCK=64, EXTRA=how.get("extra", 0), PROGRAMS=programs
    )
    return out


def right(q, k, v):
    return run(q, k, v)


def reads_too_far(q, k, v):
    return run(q, k, v, extra=1)


def races(q, k, v):
    return run(q, k, v, times=2)


def fails_after_a_fault(q, k, v):
    try:
        run(q, k, v, extra=1)
    except Exception as error:
        raise ZeroDivisionError("of no interest") from error
    raise AssertionError("unreachable under checks")


def unwritten(q, k, v):
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    touch[(1,)](out.view(-1)[:1], 0, BLOCK=64, EXTRA=0, PROGRAMS=1)
    return out
"""

CASE = Case(dtype="fp32", q_len=5, kv_len=7, head_dim=9)


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("methods") / "faulty_methods.py"
    path.write_text(textwrap.dedent(METHODS))
    return str(path)


@pytest.mark.parametrize(
    ("function", "checks", "words"),
    [
        (
            "reads_too_far",
            ("bounds",),
            r"bounds: kernel touch, faulty_methods.py:10, program \(0, 0, 0\): load of element 45",
        ),
        (
            "races",
            ("races",),
            r"races: kernel touch, faulty_methods.py:11, program \(1, 0, 0\): store to element 0 of x_ptr",
        ),
        ("fails_after_a_fault", ("bounds",), r"bounds: kernel touch"),
        (
            "unwritten",
            ("poison",),
            r"poison: kernel touch: element \(0, 0, 0, 0\) of x_ptr, .* was never written",
        ),
    ],
)
def test_what_a_check_finds_is_an_outcome_with_its_replay_line(methods, function, checks, words):
    verdict = Local(f"{methods}:{function}", checks=checks).judge(CASE)
    assert verdict.outcome == Outcome.FAULTY, verdict.message
    assert re.search(words, verdict.message), verdict.message
    assert shlex.split(verdict.replay)[-2:] == ["--check", ",".join(checks)]


def test_a_right_kernel_passes_under_all_checks_with_the_numbers_that_it_has_without(methods):
    checked = Local(f"{methods}:right", checks=("bounds", "races", "poison", "order")).judge(CASE)
    plain = Local(f"{methods}:right").judge(CASE)
    assert checked.outcome == plain.outcome == Outcome.PASS, checked.message
    assert checked.quantities == plain.quantities
    assert "--check" not in plain.replay


def test_a_fault_is_found_in_the_worker_process_and_made_small(methods):
    with Isolated(f"{methods}:reads_too_far", checks=("bounds",)) as judge:
        larger = Case(dtype="fp32", batch=2, heads=3, q_len=11, kv_len=7, head_dim=9)
        result = run_gate(
            Request(judge=judge, dtypes=("fp32",), profile="smoke"), [Question(larger), Question(CASE)]
        )
    assert result.exit_code == 1
    (failure,) = result.failures
    assert failure.outcome == "faulty"
    assert failure.shrunk.verdict.outcome == Outcome.FAULTY
    assert failure.shrunk.verdict.case.q_len <= 5
    assert result.rows[0].failed == {"faulty": 2}


def test_the_command_line_says_so_and_the_replay_line_repeats_it(methods, tmp_path, capfd):
    case = tmp_path / "case.json"
    case.write_text(CASE.to_json())
    assert main(["replay", str(case), f"{methods}:reads_too_far", "--no-isolation"]) == 0
    assert (
        main(["replay", str(case), f"{methods}:reads_too_far", "--no-isolation", "--check", "bounds,races"])
        == 1
    )
    out = capfd.readouterr().out
    assert "outcome  faulty" in out
    (again,) = (line for line in out.splitlines() if line.startswith("again") and "--check" in line)
    assert main([*shlex.split(again)[2:], "--no-isolation"]) == 1


def test_a_gate_that_has_nothing_to_check_does_not_pass(tmp_path, capfd):
    given = ["gate", "torch", "--dtype", "fp32", "--no-isolation", "--out", str(tmp_path / "run")]
    assert main([*given, "--check", "bounds"]) == 2
    assert "no Triton kernel ran on the CPU" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--check", "bonds"], "unknown check 'bonds'"),
        (["--check", "traffic"], "says nothing about right or wrong"),
        (["--check", "bounds", "--device", "cuda"], "not on cuda"),
    ],
)
def test_wrong_requests_are_refused(options, words, capfd):
    assert main(["replay", CASE.to_json(), "flash", *options]) == 2
    assert words in capfd.readouterr().err
