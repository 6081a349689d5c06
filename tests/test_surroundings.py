"""A method that changes its process or prints is contained and named: through the gate, through pytest, and in one verdict."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from effattn import laws
from effattn.case import Case
from effattn.judge import judge
from effattn.methods import surroundings
from effattn.methods.user import UserFunction
from effattn.properties.law import get
from effattn.run import store
from effattn.run.isolation import Isolated
from effattn.verdict import Outcome, Verdict

Command = Callable[..., tuple[int, str, str]]
CASE = Case(q_len=5, kv_len=9, head_dim=16, dtype="fp32")
LAW = "the_state_of_torch_is_left_alone"

RIGHT = """
import os, random, signal, sys, warnings
import numpy, torch

def attention(q, k, v, *, causal=False, scale=None):
    SIN
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).to(torch.float32) for x in (k, v))
    scores = q.to(torch.float32) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(scores.shape[-1] - scores.shape[-2] + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num()
    return (weights @ v).to(q.dtype)

attention = __import__("effattn").method(same_bits=False, nan_safe=False)(attention)
"""

#: what a call does -> the start of its note, and whether the law about torch's state speaks of it
SINS: dict[str, tuple[str, bool]] = {
    "torch.set_default_dtype(torch.float64)": ("the default dtype (torch.float32 -> torch.float64)", True),
    "torch.set_default_device('meta')": ("the default device (cpu -> meta)", True),
    "torch.manual_seed(0)": ("torch's random state", True),
    "torch.rand(3)": ("torch's random state", True),
    "numpy.random.seed(0)": ("numpy's random state", True),
    "random.seed(0)": ("Python's random state", True),
    "torch.set_num_threads(torch.get_num_threads() + 1)": ("the number of threads (", True),
    "torch.use_deterministic_algorithms(True)": ("deterministic mode", True),
    "torch.set_grad_enabled(not torch.is_grad_enabled())": ("gradient mode (", True),
    "torch.set_float32_matmul_precision('medium')": (
        "the precision of float32 products (highest -> medium)",
        True,
    ),
    "os.environ['EFFATTN_TEST_SIN'] = '1'": ("the environment (EFFATTN_TEST_SIN)", False),
    "os.chdir('/')": ("the working directory (", True),
    "warnings.filterwarnings('ignore', message='by the test')": ("the filters of warnings", False),
    "signal.signal(signal.SIGUSR1, lambda *_: None)": ("a signal handler (SIGUSR1)", False),
    "sys.stdout = sys.stderr": ("sys.stdout or sys.stderr", False),
}


def sinner(sin: str) -> UserFunction:
    space: dict[str, object] = {"__name__": "tests.made"}
    exec(RIGHT.replace("SIN", sin), space)
    return UserFunction(space["attention"], spec="made:attention")  # type: ignore[arg-type]


def process() -> list[object]:
    return [
        *(thing.read() for thing in surroundings._of_torch()),
        *(thing.read() for thing in surroundings._OF_THE_PROCESS),
        *(thing.read() for thing in surroundings._OF_CALLS),
        *(thing.read() for thing in surroundings.RANDOM),
    ]


@pytest.mark.parametrize("sin", SINS)
def test_what_a_call_changes_of_its_process_is_set_back_and_named(sin: str) -> None:
    named, stated = SINS[sin]
    judge(
        CASE, sinner(sin)
    )  # the first call may import modules, which set variables and filters of their own
    before = process()
    verdicts = [judge(CASE, sinner(sin)), laws.judge_law(get("columns_of_v_do_not_mix"), CASE, sinner(sin))]
    assert process() == before
    for verdict in verdicts:
        assert verdict.notes
        assert verdict.notes[0].startswith(f"it changed {named}"), verdict.notes
        assert len(verdict.notes) == 1
    assert verdicts[0].outcome == Outcome.PASS, verdicts[0].message
    law = laws.judge_law(get(LAW), CASE, sinner(sin))
    assert process() == before
    assert (law.outcome == Outcome.LAW_BROKEN) == stated, law.message
    if stated:
        assert named.partition(" (")[0] in law.message
    assert Verdict.from_dict(verdicts[0].to_dict()).notes == verdicts[0].notes


def test_a_method_that_leaves_its_process_alone_has_no_notes() -> None:
    before = process()
    assert judge(CASE, sinner("pass")).notes == ()
    assert laws.judge_law(get(LAW), CASE, sinner("pass")).outcome == Outcome.PASS
    assert process() == before


def test_random_states_go_on_from_call_to_call_of_one_law() -> None:
    # Set back after each call, a kernel that draws its order of summing would look deterministic.
    noisy = sinner("q = q + torch.rand(()) * 0.1")
    verdict = laws.judge_law(get("the_same_call_twice_gives_the_same_bits"), CASE, noisy)
    assert verdict.outcome == Outcome.LAW_BROKEN


def test_what_a_method_prints_in_this_process_is_named_and_comes_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    verdict = judge(CASE, sinner("print('hello'); print('again')"))
    assert verdict.notes == ("it printed 'hello' ...",)
    assert capsys.readouterr().out == "hello\nagain\n"
    assert judge(CASE, sinner("pass")).notes == ()


def test_what_a_worker_prints_is_kept_from_the_output_of_the_gate_and_named(
    effattn_command: Command, tmp_path: Path
) -> None:
    file = tmp_path / "mine.py"
    sins = (
        "print('a line of mine', flush=True); os.write(2, b'from C\\n'); torch.set_default_dtype(torch.float64);"
        " os.chdir('/'); signal.signal(signal.SIGALRM, signal.SIG_IGN)"
    )
    file.write_text("print('on import')\n" + RIGHT.replace("SIN", sins) + "torch.manual_seed(1)\n")
    names = "one_key_returns_its_value,the_diagonal_is_seen"
    arguments = ("--dtype", "fp32", "--laws", names, "--values", "normal", "--out", tmp_path / "run")
    code, out, err = effattn_command("gate", f"{file}:attention", *arguments)
    assert code == 0, out
    assert "passed all" in out
    for text in (out, err):
        assert not any(
            line.startswith(("a line of mine", "from C", "on import")) for line in text.splitlines()
        )
    notes = [line for line in out.splitlines() if line.startswith("note, mine.py:attention: ")]
    verdicts = list(store.read_verdicts(tmp_path / "run"))
    judged = [v for v in verdicts if laws.says_something(v)]
    assert [note.removeprefix("note, mine.py:attention: ") for note in notes] == [
        "importing it changed torch's random state; set back",
        "importing it printed 'on import'",
        f"it changed the default dtype (torch.float32 -> torch.float64); set back after the call, in {len(judged)} cases",
        f"it changed the working directory ({os.getcwd()} -> /); set back after the call, in {len(judged)} cases",
        f"it changed a signal handler (SIGALRM); set back after the call, in {len(judged)} cases",
        f"it printed 'a line of mine' ..., in {len(judged)} cases",
    ]
    assert "## What the method did to its process" in (tmp_path / "run" / "summary.md").read_text()


def test_the_last_words_of_a_worker_that_dies_are_told() -> None:
    with Isolated(f"{__file__}:dies", quiet=True) as worker:
        verdict = worker.judge(CASE)
    assert verdict.outcome == Outcome.CRASHED
    assert "SIGABRT" in verdict.message
    assert "it printed: the last words" in verdict.message


def dies(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    os.write(2, b"the last words\n")
    os.abort()


def test_pytest_names_what_a_method_did_and_the_next_test_finds_its_process_as_it_was(
    pytester: pytest.Pytester,
) -> None:
    sins = "print('a line of mine'); torch.set_default_dtype(torch.float64); os.environ['SIN'] = '1'"
    pytester.makepyfile(
        kernel=RIGHT.replace("SIN", sins),
        test_kernel="""
            import os
            import torch
            import effattn
            from kernel import attention

            @effattn.parametrize_with_laws(attention, laws=["values"], dtypes=["fp32"], accuracy=False)
            def test_attention(check):
                check()

            def test_after():
                assert torch.get_default_dtype() == torch.float32
                assert "SIN" not in os.environ
        """,
    )
    pytester.syspathinsert()
    result = pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider")
    assert result.parseoutcomes().get("failed", 0) == 0
    result.stdout.fnmatch_lines(
        [
            "*attention, note: it changed the default dtype (torch.float32 -> torch.float64); set back *, in * cases",
            "*attention, note: it changed the environment (SIN); set back after the call, in * cases",
            "*attention, note: it printed 'a line of mine'*, in * cases",
        ]
    )
