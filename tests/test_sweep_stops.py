"""Sweeps that something else than a method's answer goes wrong with: what stops, with which words, and what is kept.

Methods do the harm themselves, to the folder that their sweep is recorded in.
"""

from __future__ import annotations

import concurrent.futures
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from effattn.errors import RequestError
from effattn.run import chunk, isolation, spec, store, sweep, work
from effattn.run.isolation import IsolatedExecutor

Command = Callable[..., tuple[int, str, str]]

METHODS = """
import os, shutil, signal, sys
from pathlib import Path
import torch

HERE = Path(__file__).parent
RUN = HERE / "run"


def right(q, k, v):
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


def records():
    return [file for file in RUN.glob("verdicts*.jsonl") if file.stat().st_size]


def once(harm):
    # As soon as there is something to do harm to.
    if (HERE / "harm").exists() and records():
        (HERE / "harm").unlink()
        harm()


def own():
    # The descriptor that this process writes its verdicts to.
    for name in os.listdir("/proc/self/fd"):
        try:
            if "verdicts" in os.readlink(f"/proc/self/fd/{name}"):
                return int(name)
        except OSError:
            pass


def removes_work(q, k, v):
    once(lambda: shutil.rmtree(RUN / "work"))
    return right(q, k, v)


def removes_all(q, k, v):
    once(lambda: shutil.rmtree(RUN))
    return right(q, k, v)


def flips_a_bit(q, k, v):
    def harm():
        content = bytearray(records()[0].read_bytes())
        content[100] ^= 1
        records()[0].write_bytes(content)

    once(harm)
    return right(q, k, v)


def removes_records(q, k, v):
    once(lambda: records()[0].unlink())
    return right(q, k, v)


def writes_half_a_line(q, k, v):
    once(lambda: os.write(own(), b'{"crc32":"'))
    return right(q, k, v)


def closes_what_is_not_its_own(q, k, v):
    once(lambda: os.close(own()))
    return right(q, k, v)


def clears_the_path(q, k, v):
    sys.path.clear()
    return right(q, k, v)


def leaves_a_child(q, k, v):
    # It lives until it is killed, and writes nothing. This process stays in the case until it is killed, too.
    if (HERE / "harm").exists():
        (HERE / "harm").unlink()
        child = os.fork()
        if child == 0:
            os.setsid()
        else:
            with open(HERE / "told", "w") as told:
                told.write(f"{child}\\n")
        signal.pause()
    return right(q, k, v)


def begins_another(q, k, v):
    (RUN / "work" / "session").write_text("another")
    return right(q, k, v)
"""
#: The command line in a process of its own.
MAIN = "import sys; from effattn.cli import main; sys.exit(main())"


def toml(method: str, seeds: int = 20, more: str = "") -> str:
    return f"""
methods = ["mine.py:{method}"]
dtypes = ["fp32"]
shapes = [{{ q_len = 3, kv_len = 5, head_dim = 8 }}]
seeds = {{ from = 0, count = {seeds} }}
{more}"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(METHODS)
    return tmp_path


def outcomes(out: Path) -> Counter[str]:
    return Counter(record.verdict["outcome"] for record in store.read_records(out, []))


def stopped(out: Path, executor: concurrent.futures.Executor) -> str:
    """How the sweep of s.toml ends, which comes to no end."""
    with sweep.Sweep(out, spec.load(out.parent / "s.toml")) as taken, pytest.raises(RequestError) as told:
        taken.run(executor, parallel=1)
    return str(told.value)


# Only the death of a worker counts against a method


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("removes_work", ["does not find", "work/session", "it was removed"]),
        ("flips_a_bit", ["1 of 20 verdicts were damaged or removed", "line 1 is damaged: its checksum does not match"]),
        ("removes_records", ["was removed, while process"]),
        ("writes_half_a_line", ["1 of 20 verdicts were damaged or removed", "line ", "is damaged"]),
        ("closes_what_is_not_its_own", ["was closed, as 'mine.py:closes_what_is_not_its_own' was judged"]),
    ],
)  # fmt: skip
def test_harm_to_the_folder_stops_the_sweep_by_name_and_the_next_one_comes_to_the_end(
    effattn_command: Command, folder: Path, method: str, words: list[str]
) -> None:
    (folder / "harm").touch()
    (folder / "s.toml").write_text(toml(method))
    code, _, err = effattn_command("sweep", "s.toml", "--out", "run", "--jobs", "1")
    assert code == 2
    assert not (folder / "harm").exists()
    assert all(word in err for word in [*words, "the same command"]), err
    assert "Traceback" not in err
    assert set(outcomes(folder / "run")) <= {"pass"}
    code, _, err = effattn_command("sweep", "s.toml", "--out", "run", "--jobs", "1")
    assert code == 0, err
    assert outcomes(folder / "run") == {"pass": 20}


def test_removed_file_is_named_where_nobody_wrote_into_it_after(folder: Path) -> None:
    """The last case removes the file that its verdict is to go to."""
    (folder / "s.toml").write_text(toml("removes_records", 1, 'values = ["normal", "uniform"]'))
    (folder / "harm").touch()
    with IsolatedExecutor(1) as own:
        told = stopped(folder / "run", own)
    assert told.startswith("2 of 2 verdicts were damaged or removed ")
    assert ": it was removed. " in told


def test_removed_folder_stops_the_sweep_and_blames_nobody(effattn_command: Command, folder: Path) -> None:
    (folder / "harm").touch()
    (folder / "s.toml").write_text(toml("removes_all"))
    code, _, err = effattn_command("sweep", "s.toml", "--out", "run", "--jobs", "1")
    assert (code, "Traceback" in err) == (2, False)
    assert str(folder / "run") in err
    assert "crashed" not in err


class Elsewhere(concurrent.futures.Executor):
    """Runs everything here, where the run folder is another one, as a worker does that doesn't see its disk."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        future.set_result(fn(*((str(self.place), *args[1:]) if fn is chunk.run else args), **kwargs))
        return future


def test_worker_that_does_not_see_the_folder_stops_the_sweep(folder: Path) -> None:
    (folder / "s.toml").write_text(toml("right"))
    told = stopped(folder / "run", Elsewhere(folder / "nowhere"))
    assert re.match(r"process \d+ on .* does not find the run folder .*every worker sees.*No method", told)
    assert not outcomes(folder / "run")


class Failing(concurrent.futures.Executor):
    """An executor whose machinery fails at each chunk, in some way of its own."""

    def __init__(self, error: Exception, at_once: bool) -> None:
        self.error, self.at_once = error, at_once

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if fn is not chunk.run:
            future.set_result(fn(*args, **kwargs))
        elif self.at_once:
            raise self.error
        else:
            future.set_exception(self.error)
        return future


@pytest.mark.parametrize(
    ("error", "at_once", "words"),
    [
        (ModuleNotFoundError("No module named 'x'"), False, "ModuleNotFoundError: No module named 'x'"),
        (OSError(24, "Too many open files"), False, "Too many open files"),
        (isolation.WorkerFault("effattn failed inside a worker:\nTraceback:\nKeyError: 7"), False, "die: KeyError: 7. That"),
        (concurrent.futures.BrokenExecutor("a process went"), True, "BrokenExecutor: a process went"),
        (concurrent.futures.CancelledError(), False, "the executor has cancelled"),
    ],
)  # fmt: skip
def test_failure_of_the_machinery_is_no_verdict(
    folder: Path, error: Exception, at_once: bool, words: str
) -> None:
    (folder / "s.toml").write_text(toml("right"))
    told = stopped(folder / "run", Failing(error, at_once))
    assert words in told
    assert "what is recorded is kept" in told.lower()
    assert not outcomes(folder / "run")


def test_dask_worker_that_a_method_broke_is_named_and_no_method_blamed(folder: Path) -> None:
    """Without sys.path the worker imports nothing any more. The next sweep there stops too, until it is started again."""
    from effattn.run import dask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dask's own: ports that are taken, slow event loops
        from distributed import LocalCluster

        with (
            LocalCluster(
                n_workers=1, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
            ) as cluster,
            dask.executor(cluster.scheduler_address.removeprefix("tcp://"), device="cpu") as (pool, _),
        ):
            for method in ("clears_the_path", "right"):
                (folder / "s.toml").write_text(toml(method).replace("mine.py", f"{folder}/mine.py"))
                assert "start the workers again" in stopped(folder / method, pool)
                assert "crashed" not in outcomes(folder / method)


# What a sweep before has left behind


def test_child_that_a_method_left_behind_keeps_nobody_waiting(effattn_command: Command, folder: Path) -> None:
    """It has every descriptor of the worker that forked it, and outlives both that and the supervisor."""
    (folder / "s.toml").write_text(toml("leaves_a_child"))
    (folder / "harm").touch()
    os.mkfifo(folder / "told")
    nothing = subprocess.DEVNULL
    supervisor = subprocess.Popen(
        [sys.executable, "-c", MAIN, "sweep", "s.toml", "--out", "run", "--jobs", "1"], stdout=nothing, stderr=nothing
    )  # fmt: skip
    child = int((folder / "told").read_text())
    try:
        supervisor.kill()
        supervisor.wait()
        code, _, err = effattn_command("sweep", "s.toml", "--out", "run", "--jobs", "1")
        assert code == 0, err
        assert outcomes(folder / "run") == {"pass": 20}
    finally:
        os.kill(child, signal.SIGKILL)  # fails where it was not there any more


def test_worker_that_is_at_a_case_still_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "s.toml").write_text(toml("right", 1))
    with IsolatedExecutor(1) as own:
        with sweep.Sweep(folder / "run", spec.load(folder / "s.toml")) as taken:
            taken.run(own, parallel=1)
        (file,) = store.verdict_files(folder / "run")
        holds = "import fcntl, sys; f = open(sys.argv[1], 'rb+'); fcntl.lockf(f, 2); print(flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", holds, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            assert holder.stdout is not None
            assert holder.stdin is not None
            holder.stdout.readline()
            monkeypatch.setattr(sweep, "SETTLING", 0.0)
            told = stopped(folder / "run", own)
            assert told.startswith(f"{str(file)!r} is held by a worker of a sweep that was broken off")
            holder.stdin.close()
        with sweep.Sweep(folder / "run", spec.load(folder / "s.toml")) as taken:
            assert taken.run(own, parallel=1).resumed == 1


def test_worker_that_was_left_behind_stops_at_the_next_case(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk, "LOOK_AGAIN", 0.0)
    (folder / "s.toml").write_text(toml("begins_another"))
    wanted = spec.load(folder / "s.toml")
    with sweep.Sweep(folder / "run", wanted) as taken:
        taken.begin({})
        items = [(method, case.to_dict()) for method, case in wanted.cases()]
        sources = {method: work.source(method) for method in wanted.methods}
        told = chunk.run(str(taken.folder), taken.session, "a", "cpu", 60.0, items, sources)
    assert "another sweep has begun" in told["refused"]
    assert outcomes(folder / "run") == {"pass": 1}


# A sweep that does not begin


def test_sweep_whose_method_does_not_load_changes_nothing(effattn_command: Command, folder: Path) -> None:
    (folder / "s.toml").write_text(toml("right", 2))
    arguments = ["sweep", "s.toml", "--out", "some/where/run", "--jobs", "1"]

    def everything() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (folder / "some").rglob("*") if path.is_file()}

    (folder / "mine.py").write_text(METHODS.replace("def right", "def wright"))
    code, _, err = effattn_command(*arguments)
    assert code == 2
    assert "no function 'right'" in err
    assert not (folder / "some").exists()
    (folder / "mine.py").write_text(METHODS)
    assert effattn_command(*arguments)[0] == 0
    before = everything()
    assert store.read_provenance(folder / "some/where/run")["ended"]
    (folder / "mine.py").write_text("1 / 0")
    code, _, err = effattn_command(*arguments)
    assert code == 2
    assert "ZeroDivisionError" in err
    assert everything() == before
    # Nothing is in the way of another sweep where a mistyped one was.
    (folder / "mine.py").write_text(METHODS)
    (folder / "t.toml").write_text(toml("wright", 2))
    assert effattn_command("sweep", "t.toml", "--out", "other", "--jobs", "1")[0] == 2
    assert effattn_command("sweep", "s.toml", "--out", "other", "--jobs", "1")[0] == 0


def test_gate_does_not_take_the_folder_of_a_sweep_that_is_loading(folder: Path) -> None:
    (folder / "s.toml").write_text(toml("right"))
    with (
        sweep.Sweep(folder / "run", spec.load(folder / "s.toml")),
        pytest.raises(RequestError, match="a sweep is writing into"),
    ):
        store.RunWriter(folder / "run", overwrite=True)
    assert not (folder / "run").exists()


# Limits


@pytest.mark.parametrize("command", ["sweep", "gate", "replay"])
@pytest.mark.parametrize(
    ("option", "given", "words"),
    [
        ("--time-limit", "inf", "at most 86400, a day"),
        ("--time-limit", "nan", "at most 86400, a day"),
        ("--time-limit", "1e10", "at most 86400, a day"),
        ("--memory-limit", "nan", "expected GiB"),
        ("--memory-limit", "1e300", "expected GiB"),
        ("--memory-limit", "inf", "expected GiB"),
    ],
)
def test_limit_that_is_none_is_refused(
    effattn_command: Command, folder: Path, command: str, option: str, given: str, words: str
) -> None:
    (folder / "s.toml").write_text(toml("right"))
    case = '{"schema": 1, "q_len": 3, "kv_len": 5, "head_dim": 8, "dtype": "fp32"}'
    arguments = {
        "sweep": ["s.toml", "--out", "run"],
        "gate": ["mine.py:right", "--out", "run"],
        "replay": [case, "mine.py:right"],
    }[command]
    code, _, err = effattn_command(command, *arguments, option, given)
    assert code == 2
    assert f"{option} {float(given):g}: " in err
    assert words in err
    assert not (folder / "run").exists()


def test_longest_time_limit_costs_no_worker(folder: Path) -> None:
    """A chunk of many cases may take longer than a wait can be told; one worker judges them all nevertheless."""
    (folder / "s.toml").write_text(toml("right", 60))
    with (
        IsolatedExecutor(1) as own,
        sweep.Sweep(folder / "run", spec.load(folder / "s.toml"), time_limit=isolation.LONGEST_CASE) as taken,
    ):
        assert own.submit(isolation._own_pid, backstop=1e9).result() == own.workers[0].pid
        assert taken.run(own, parallel=1).added == 60
    assert len(store.verdict_files(folder / "run")) == 1
