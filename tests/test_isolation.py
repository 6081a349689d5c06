"""Whatever a method does to its process is an outcome of one case, and the next case is judged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from effattn.case import Case
from effattn.errors import RequestError
from effattn.methods import surroundings
from effattn.run import isolation, work
from effattn.run.isolation import Isolated, IsolatedExecutor, Worker, WorkerDied, WorkerFault
from effattn.verdict import Outcome

Command = Callable[..., tuple[int, str, str]]

METHODS = """
import ctypes, os, signal, sys, threading, time
import torch


def right(q, k, v):
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


def when_seed_is_one(act):
    # The seed is not known to a method, but the inputs are.
    def method(q, k, v):
        if float(q.flatten()[0]) == MARKED:
            act()
        return right(q, k, v)
    return method


def dereferences_null():
    ctypes.string_at(0)


def calls_abort():
    os.abort()


def exits_at_once():
    os._exit(0)


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def loops_in_python():
    while True:
        pass


def loops_in_c():
    ctypes.CDLL(None).pause()


def blocks_the_signal_of_the_limit():
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
    while True:
        ctypes.CDLL(None).pause()


def takes_all_memory():
    kept = []
    while True:
        kept.append(torch.ones(1 << 26))


def leaves_a_child():
    # A child that holds everything open that it inherits must not keep the gate waiting for an answer.
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)
    os._exit(4)


def forks():
    os.fork()


def interrupts():
    raise KeyboardInterrupt("of the method")


for act in (forks, interrupts, dereferences_null, calls_abort, exits_at_once, is_killed, loops_in_python, loops_in_c,
            blocks_the_signal_of_the_limit, takes_all_memory, leaves_a_child):
    globals()["sometimes_" + act.__name__] = when_seed_is_one(act)
"""

RIGHT, MARKED = (Case(q_len=4, kv_len=6, head_dim=8, dtype="fp32", seed=seed) for seed in (0, 1))


@pytest.fixture
def methods_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(METHODS.replace("MARKED", repr(float(MARKED.tensors().q.flatten()[0]))))
    return path


@pytest.fixture
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started


@pytest.mark.parametrize(
    ("act", "outcome", "words"),
    [
        ("dereferences_null", Outcome.CRASHED, ["SIGSEGV", "string_at", "mine.py", "dereferences_null"]),
        ("calls_abort", Outcome.CRASHED, ["SIGABRT", "calls_abort"]),
        ("exits_at_once", Outcome.CRASHED, ["exited with code 0"]),
        ("is_killed", Outcome.CRASHED, ["SIGKILL", "out of memory"]),
        ("loops_in_python", Outcome.TIMED_OUT, ["1.5 s", "--time-limit", "loops_in_python"]),
        ("loops_in_c", Outcome.TIMED_OUT, ["1.5 s", "loops_in_c"]),
        ("leaves_a_child", Outcome.CRASHED, ["exited with code 4"]),
    ],
)
def test_what_kills_the_process_is_the_outcome_of_one_case(
    methods_file: Path, act: str, outcome: Outcome, words: list[str]
) -> None:
    with Isolated(f"{methods_file}:sometimes_{act}", time_limit=1.5) as judge:
        verdicts = [judge.judge(case) for case in (RIGHT, MARKED, RIGHT)]
    assert [v.outcome for v in verdicts] == [Outcome.PASS, outcome, Outcome.PASS]
    for word in words:
        assert word in verdicts[1].message
    assert "mine.py" in verdicts[1].replay
    assert verdicts[0].quantities == verdicts[2].quantities


def test_a_child_that_comes_back_from_the_method_judges_nothing(methods_file: Path) -> None:
    cases = [MARKED, RIGHT, MARKED, RIGHT, RIGHT]
    with Isolated(f"{methods_file}:sometimes_forks") as judge:
        pid = judge.call("effattn.run.isolation:_own_pid")
        verdicts = [judge.judge(case) for case in cases]
        # An answer of a child would be taken for one to the next question.
        assert [judge.call("effattn.run.isolation:_own_pid") for _ in range(3)] == 3 * [pid]
    assert [v.case for v in verdicts] == cases
    assert {v.outcome for v in verdicts} == {Outcome.PASS}
    assert [v.notes for v in verdicts] == [(surroundings.FORKED,) if case == MARKED else () for case in cases]


def test_a_child_that_comes_back_from_a_function_of_effattn_does_not_answer(
    effattn_command: Command, methods_file: Path
) -> None:
    # Not in the method's call, where it would have been ended: whether it supports a case is asked before.
    methods_file.write_text(
        "import effattn, os, torch\n"
        "@effattn.method(supports=lambda case: os.fork() >= 0)\n"
        "def zeros(q, k, v):\n"
        "    return torch.zeros_like(q)\n"
    )
    with Isolated(f"{methods_file}:zeros") as judge:
        verdicts = [judge.judge(case) for case in (RIGHT, MARKED, RIGHT)]
    assert [v.case for v in verdicts] == [RIGHT, MARKED, RIGHT]
    assert {v.notes for v in verdicts} == {(surroundings.FORKED,)}
    code, out, _ = effattn_command("replay", RIGHT.to_json(), "mine.py:zeros", "--no-isolation")
    assert code == 1
    assert out.count("inaccurate") == 1


def test_an_interruption_that_the_method_raises_in_a_worker_is_a_crash(methods_file: Path) -> None:
    with Isolated(f"{methods_file}:sometimes_interrupts") as judge:
        verdicts = [judge.judge(case) for case in (MARKED, RIGHT)]
        law = judge.judge(MARKED, "columns_of_v_do_not_mix")
    assert [v.outcome for v in verdicts] == [Outcome.CRASHED, Outcome.PASS]
    for verdict in (verdicts[0], law):
        assert verdict.message.startswith("the method raised KeyboardInterrupt: of the method\nat mine.py:")


def test_memory_has_a_limit_that_the_verdict_names(methods_file: Path) -> None:
    with Isolated(f"{methods_file}:sometimes_takes_all_memory", memory_limit=2**29) as judge:
        verdicts = [judge.judge(case) for case in (MARKED, RIGHT)]
    assert [v.outcome for v in verdicts] == [Outcome.CRASHED, Outcome.PASS]
    assert "allocate" in verdicts[0].message
    assert "0.5 GiB" in verdicts[0].message
    assert "--memory-limit" in verdicts[0].message


def test_worker_that_blocks_the_signal_is_killed_from_outside(
    methods_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "GRACE", 0.5)
    with Isolated(f"{methods_file}:sometimes_blocks_the_signal_of_the_limit", time_limit=0.5) as judge:
        verdicts = [judge.judge(case) for case in (MARKED, RIGHT)]
    assert [v.outcome for v in verdicts] == [Outcome.TIMED_OUT, Outcome.PASS]


def test_verdict_is_the_same_as_in_this_process(methods_file: Path) -> None:
    from effattn.run.executor import Local

    with Isolated("torch") as apart, Local("torch") as here:
        assert (apart.name, apart.spec) == (here.name, here.spec)
        there, ours = apart.judge(RIGHT).to_dict(), here.judge(RIGHT).to_dict()
    assert there.pop("seconds").keys() == ours.pop("seconds").keys()
    assert there == ours


def test_gate_goes_on_and_counts_the_crashes(effattn_command: Command, methods_file: Path) -> None:
    methods_file.write_text(
        METHODS.replace("MARKED", "0.0")
        + "\ncount = 0\n"
        + "def fails_now_and_then(q, k, v):\n"
        + "    if q.shape[2] == k.shape[2]:\n        calls_abort()\n"
        + "    return right(q, k, v)\n"
    )
    code, out, err = effattn_command(
        "gate", "mine.py:fails_now_and_then", "--laws", "none", "--dtype", "fp32", "--out", "run"
    )
    assert code == 1, err
    assert "crashed" in out
    assert "SIGABRT" in out
    assert "passed" in out


def test_method_that_kills_while_it_is_loaded_is_a_wrong_request(
    effattn_command: Command, methods_file: Path
) -> None:
    methods_file.write_text("import os\nos.abort()\n")
    code, _, err = effattn_command("gate", "mine.py:right", "--laws", "none", "--out", "run")
    assert code == 2
    assert "SIGABRT" in err
    assert "mine.py" in err
    assert not Path("run").exists()


def test_what_the_method_prints_comes_out_where_it_should(
    effattn_command: Command, methods_file: Path
) -> None:
    methods_file.write_text(
        "import sys, torch\n"
        "def talks(q, k, v):\n"
        "    print('said on stdout')\n"
        "    print('said on stderr', file=sys.stderr)\n"
        "    return torch.zeros_like(q)\n"
    )
    code, out, err = effattn_command("replay", RIGHT.to_json(), "mine.py:talks")
    assert code == 1
    assert out.index("said on stdout") < out.index("inaccurate")
    assert "said on stderr" in err


# Workers


def test_worker_is_used_again_and_replaced_when_it_died(worker: Worker) -> None:
    first = worker.call("effattn.run.provenance:now")
    assert first
    pids = [worker.call("effattn.run.isolation:_own_pid") for _ in range(2)]
    assert pids[0] == pids[1] != os.getpid()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(WorkerDied, match="SIGKILL"):
        worker.call("effattn.run.provenance:now")
    assert worker.call("effattn.run.isolation:_own_pid") not in pids


def test_worker_sees_the_environment_and_the_folder_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFATTN_OF_THE_MOMENT", "yes")
    monkeypatch.setenv("CC", "/nowhere/cc")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.py").write_text(
        "import os\ndef f(q, k, v):\n    raise ValueError(os.environ['EFFATTN_OF_THE_MOMENT'] + os.getcwd())\n"
    )
    with Isolated("local.py:f") as judge:
        assert f"yes{tmp_path}" in judge.judge(RIGHT).message


def test_a_worker_has_modules_that_were_imported_under_its_own_environment(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = worker.call("effattn.run.isolation:_parent_pid")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")  # read when it is needed
    with Worker() as same:
        assert same.call("effattn.run.isolation:_parent_pid") == first
    monkeypatch.setenv("TORCH_OF_ANOTHER_KIND", "1")  # torch reads such when it is imported
    with Worker() as other:
        assert other.call("effattn.run.isolation:_parent_pid") != first
    assert worker.call("effattn.run.isolation:_parent_pid") == first  # the one that there was works on


def test_calls_are_shared_by_the_processes_and_come_back_in_order() -> None:
    asked = [("flash",), ("torch",)] * 3
    with Isolated("torch", jobs=2) as judge, Isolated("torch", jobs=1) as one:
        found = list(judge.call_all(work.describe, asked))
        assert found == list(one.call_all(work.describe, asked)) == [work.describe(*spec) for spec in asked]
    assert [row["spec"] for row in found] == ["flash", "torch"] * 3


def test_errors_of_requests_and_faults_are_told_apart(worker: Worker) -> None:
    with pytest.raises(RequestError, match="did you mean 'flash'"):
        worker.call("effattn.run.work:describe", "flush")
    with pytest.raises(WorkerFault, match="TypeError"):
        worker.call("effattn.run.work:describe")
    with pytest.raises(WorkerFault, match="is no function of effattn"):
        worker.call("os:getpid")
    assert worker.call("effattn.run.work:describe", "torch") == {
        "name": "torch",
        "spec": "torch",
        "notes": [],
    }


def test_workers_end_with_the_process_that_asked_for_them(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from effattn.run.isolation import Worker\n"
        "worker = Worker()\n"
        "print(worker.call('effattn.run.isolation:_own_pid'), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert done.stdout is not None
    # The pipe is at its end when everybody who has it has gone: the script, the nursery, the worker.
    pid = int(done.stdout.read())
    done.stdout.close()
    assert done.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_executor_runs_on_after_a_death(tmp_path: Path) -> None:
    with IsolatedExecutor(2) as executor:
        futures = [executor.submit(isolation._own_pid) for _ in range(6)]
        died = executor.submit(isolation._die, int(signal.SIGSEGV))
        futures += [executor.submit(isolation._own_pid) for _ in range(6)]
        with pytest.raises(WorkerDied, match="SIGSEGV"):
            died.result()
        pids = {future.result() for future in futures}
    assert len(pids) <= 3
    assert os.getpid() not in pids
    with pytest.raises(TypeError, match="positional"):
        IsolatedExecutor(0).submit(print, end="")


def test_time_limit_is_switched_off_again() -> None:
    with work.time_limit(60.0):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(
    ("code", "words"),
    [(3, "exited with code 3"), (-11, "SIGSEGV (Segmentation fault)"), (-99, "was ended by signal 99")],
)
def test_how_it_ended_in_words(code: int, words: str) -> None:
    assert words in isolation.how_it_ended(code)
