"""Sweeps over a Dask cluster: what kills its workers there is recorded as it is locally, and costs few of them.

One cluster of one worker on loopback. A loop starts another process where one has ended: Dask's nanny does so only if it has
seen the process start, and here some end at once.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from effattn.run import chunk, isolation, spec, store, sweep
from effattn.run.isolation import IsolatedExecutor

METHODS = """
import os, signal, time
from pathlib import Path

HERE = Path(__file__).parent


def ends(q, k, v):
    # One way to end for each number of queries.
    pids = HERE / "pids"
    with open(pids, "a") as file:
        file.write(f"{q.shape[2]} {os.getpid()}\\n")
    if q.shape[2] == 5:
        os.abort()
    if q.shape[2] == 6:
        time.sleep(600)
    if q.shape[2] == 7:
        if os.fork() == 0:
            signal.raise_signal(signal.SIGSEGV)
        os.wait()
    if q.shape[2] == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).to(q.dtype)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(METHODS)
    return tmp_path


def asked(folder: Path) -> spec.Spec:
    shapes = [{"q_len": n, "kv_len": 5, "head_dim": 4} for n in (4, 5, 6, 7, 8)]
    return spec.parse({"methods": [f"{folder}/mine.py:ends"], "dtypes": ["fp32"], "shapes": shapes})


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dask's own: ports that are taken, slow event loops
        from distributed import Client, LocalCluster

        with LocalCluster(n_workers=0, dashboard_address=None, host="127.0.0.1", silence_logs=50) as made:
            place = tmp_path_factory.mktemp("workers")
            with _workers(made.scheduler_address, place), Client(made.scheduler_address) as client:
                client.wait_for_workers(1)
                yield made.scheduler_address.removeprefix("tcp://")


@contextlib.contextmanager
def _workers(scheduler: str, place: Path) -> Iterator[None]:
    """One worker at a time, as long as the shell that starts them lives."""
    worker = [
        sys.executable,
        "-m",
        "dask",
        "worker",
        scheduler,
        "--nthreads",
        "1",
        "--no-nanny",
        "--no-dashboard",
    ]
    loop = f"while :; do {shlex.join([*worker, '--local-directory', str(place)])}; done"
    with (
        (place / "log").open("wb") as log,
        subprocess.Popen(["bash", "-c", loop], stdout=log, stderr=log, start_new_session=True) as shell,
    ):
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)


def recorded(out: Path) -> dict[int, tuple[str, str]]:
    """Number of queries -> outcome and message; each case once."""
    found = [record.verdict for record in store.read_records(out)]
    assert len({verdict["case"]["q_len"] for verdict in found}) == len(found)
    return {v["case"]["q_len"]: (v["outcome"], v["message"]) for v in found}


def processes(folder: Path) -> dict[int, int]:
    """Number of queries -> processes that have begun the case."""
    lines = {tuple(line.split()) for line in (folder / "pids").read_text().splitlines()}
    return {n: sum(1 for queries, _ in lines if int(queries) == n) for n in (4, 5, 6, 7, 8)}


def test_what_ends_a_worker_is_recorded_as_it_is_locally(folder: Path, cluster: str) -> None:
    from effattn.run import dask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            dask.executor(cluster, device="cpu") as (pool, parallel),
            sweep.Sweep(folder / "dask", asked(folder), time_limit=3.0) as taken,
        ):
            taken.run(pool, parallel=parallel)
    there, begun = recorded(folder / "dask"), processes(folder)
    (folder / "pids").unlink()
    with (
        IsolatedExecutor(1, quiet=True) as pool,
        sweep.Sweep(folder / "local", asked(folder), time_limit=3.0) as taken,
    ):
        taken.run(pool, parallel=1)
    here = recorded(folder / "local")
    assert {n: outcome for n, (outcome, _) in there.items()} == {
        4: "pass", 5: "crashed", 6: "timed out", 7: "pass", 8: "crashed"
    }  # fmt: skip
    # Of a kill nobody can tell, and nothing is made up; all else is told in the same words, with the place.
    assert "nobody tells how" in there.pop(8)[1]
    assert "SIGKILL" in here.pop(8)[1]
    assert there == here
    assert "SIGABRT" in there[5][1]
    assert "in ends" in there[5][1]
    assert "mine.py:" in there[6][1]
    assert begun == processes(folder) == {4: 1, 5: 2, 6: 1, 7: 1, 8: 3}


def test_what_a_claim_tells_is_of_the_case_that_the_process_ended_over(tmp_path: Path) -> None:
    """A child that a method forked crashes in one case; the process itself is killed in a later one."""
    (tmp_path / chunk.WORK).mkdir()
    code = (
        "import os, signal, sys; from pathlib import Path; from effattn.run import chunk\n"
        "claim = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY | os.O_APPEND)\n"
        "with chunk._telling_how_it_ends(claim) as forget:\n"
        "    if os.fork() == 0: signal.raise_signal(signal.SIGSEGV)\n"
        "    os.wait()\n"
        "    print(os.fstat(claim).st_size > 20)\n"
        "    if sys.argv[2] == 'next': forget()\n"
        "    sys.stdout.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    for case, expected in (("same", -11), ("next", None)):
        claim = tmp_path / chunk.WORK / case
        done = subprocess.run([sys.executable, "-c", code, claim, case], capture_output=True, text=True)
        assert done.stdout == "True\n", done.stderr
        died = chunk.death(tmp_path, case)
        assert died is not None
        assert died.code == expected
    assert chunk.death(tmp_path, "never begun") is None


def test_chunk_that_no_worker_has_begun_is_no_verdict(folder: Path) -> None:
    """It waited at workers that died over something else, or that die by themselves."""
    import concurrent.futures

    class Dying(concurrent.futures.Executor):
        """Its workers die before they begin, so many times."""

        def __init__(self, times: int) -> None:
            self.left = times

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            if fn is chunk.run and self.left:
                self.left -= 1
                future.set_exception(isolation.WorkerDied(None))
            else:
                future.set_result(fn(*args, **kwargs))
            return future

    shapes = [{"q_len": 4, "kv_len": 5, "head_dim": 4}]
    wanted = spec.parse({"methods": [f"{folder}/mine.py:ends"], "dtypes": ["fp32"], "shapes": shapes})
    with sweep.Sweep(folder / "run", wanted) as taken:
        taken.run(Dying(sweep.MOST_UNBEGUN - 1), parallel=1)
    assert recorded(folder / "run")[4][0] == "pass"
    with (
        sweep.Sweep(folder / "other", wanted) as taken,
        pytest.raises(sweep.RequestError, match="no method is to blame"),
    ):
        taken.run(Dying(sweep.MOST_UNBEGUN), parallel=1)
    assert not recorded(folder / "other")
    assert os.path.exists(folder / "other" / store.LOCK)


def test_cluster_whose_workers_are_all_gone_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effattn.run import dask

    monkeypatch.setattr(sweep, "NO_WORKERS", 0.5)
    monkeypatch.setattr(sweep, "TELL_AGAIN", 0.2)
    # Two signals end the shell that starts workers, and the worker.
    (folder / "mine.py").write_text(
        "import os\n\ndef ends(q, k, v):\n    os.kill(os.getppid(), 9)\n    os.kill(os.getpid(), 9)\n"
    )
    shapes = [{"q_len": 4, "kv_len": 5, "head_dim": 4}]
    wanted = spec.parse({"methods": [f"{folder}/mine.py:ends"], "dtypes": ["fp32"], "shapes": shapes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=0, dashboard_address=None, host="127.0.0.1", silence_logs=50) as made,
            _workers(made.scheduler_address, folder),
        ):
            with Client(made.scheduler_address) as client:
                client.wait_for_workers(1)
            with (
                dask.executor(made.scheduler_address.removeprefix("tcp://"), device="cpu") as (
                    pool,
                    parallel,
                ),
                sweep.Sweep(folder / "run", wanted) as taken,
                pytest.raises(
                    sweep.RequestError, match=r"no worker for 0\.5 s: all have ended.*same command again"
                ),
            ):
                taken.run(pool, parallel=parallel)
    assert not recorded(folder / "run")
