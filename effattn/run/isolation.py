"""Runs a method in a process of its own, so that whatever happens to it is an outcome of one case.

A segmentation fault, an abort, an endless loop, memory without end: the worker dies, the case gets a verdict that says
how, and another worker takes over. Workers are forked from a process that has everything imported
(`effattn.run.nursery`) and are used for many cases. What goes between the processes is JSON; nothing is unpickled.

Each worker has a connection of its own, so one that is killed in the middle of a message leaves no lock and no half
message to any other.

The file is long: a worker and its two users, for one method and for any function, share how a process begins and ends.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import json
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from effattn.errors import EffattnError, RequestError
from effattn.run import nursery, work

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.gate import Question
    from effattn.verdict import Verdict

T = TypeVar("T")

#: Seconds that one case may take if nothing else is asked for. Compiling a kernel is part of it.
TIME_LIMIT = 300.0
#: The most seconds that may be asked for: a day. Timers and waits count in numbers that end somewhere.
LONGEST_CASE = 86_400
#: The most GiB that a process may be allowed.
MOST_MEMORY = 2**20
#: Seconds that are waited at once; `poll` counts milliseconds in 32 bits.
_WAIT_AT_ONCE = 3600.0
#: Seconds beyond the time limit until a worker that blocks its signal is killed from outside.
GRACE = 10.0
#: Share of the memory available when they start that all workers together may take, if nothing else is asked for.
MEMORY_SHARE = 0.9
#: The most processes that cases are judged in if nothing else is asked for.
MOST_JOBS = 4
#: Lines that a process printed before it died, which are told.
MOST_SAID = 4
#: Fewer questions than this are not worth more processes than one.
FEW_QUESTIONS = 24


class WorkerDied(EffattnError):
    """The process ended before it answered."""

    def __init__(self, code: int | None, place: str = "", said: str = "") -> None:
        super().__init__(code, place, said)
        #: its exit code, negative for a signal, as `subprocess` has it; None where nobody tells
        self.code = code
        #: where it was, if that is known: the innermost Python frames
        self.place = place
        #: the last lines that it printed, if they were kept
        self.said = said

    def __str__(self) -> str:
        return f"the worker process {how_it_ended(self.code)}"


class WorkerFault(EffattnError):
    """effattn itself raised inside a worker; the message is the traceback from there."""


def how_it_ended(code: int | None) -> str:
    """An exit code in words."""
    if code is None:
        return "ended, and nobody tells how: it exited, was killed, or the machine was out of memory"
    if code >= 0:
        return f"exited with code {code}"
    try:
        name = signal.Signals(-code)
    except ValueError:
        return f"was ended by signal {-code}"
    words = f"was ended by {name.name} ({signal.strsignal(-code)})"
    if name == signal.SIGKILL:
        words += ", as the kernel does when the machine is out of memory"
    return words


def check_time_limit(seconds: float) -> None:
    """Raise RequestError for a `--time-limit` that is none."""
    if not 0 < seconds <= LONGEST_CASE:
        raise RequestError(
            f"--time-limit {seconds:g}: expected seconds for one case, more than 0 and at most {LONGEST_CASE}, a day"
        )


def memory_bytes(gib: float | None) -> int | None:
    """The bytes of a `--memory-limit`, given in GiB. Raises RequestError for one that is none."""
    if gib is None:
        return None
    if not 0 < gib <= MOST_MEMORY:
        raise RequestError(f"--memory-limit {gib:g}: expected GiB, more than 0 and at most {MOST_MEMORY}")
    return int(gib * 2**30)


class _Nursery:
    """The process that forks, and the requests to it."""

    def __init__(self) -> None:
        self.environ = nursery.read_at_import()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1]);"
            " from effattn.run import nursery; nursery.main(int(sys.argv[2]))"
        )
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(sys.path), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._socket = ours

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self, asked: dict[str, Any], descriptors: list[int]) -> None:
        socket.send_fds(self._socket, [json.dumps(asked).encode()], descriptors)

    def close(self) -> None:
        self._socket.close()
        self._process.wait()


_nursery: _Nursery | None = None
#: those of another environment, which have workers still
_former: list[_Nursery] = []
_lock = threading.Lock()


def start() -> None:
    """Start the process that workers come from, if there is none; returns at once."""
    global _nursery
    with _lock:
        if _nursery is not None and not _nursery.alive:
            _nursery.close()
            _nursery = None
        if _nursery is not None and _nursery.environ != nursery.read_at_import():
            _former.append(_nursery)
            _nursery = None
        if _nursery is None:
            _nursery = _Nursery()


def stop() -> None:
    """End the process that workers come from, and with it all of them."""
    global _nursery
    with _lock:
        while _former:
            _former.pop().close()
        if _nursery is not None:
            _nursery.close()
            _nursery = None


atexit.register(stop)


def available_memory() -> int:
    """Bytes that can be had on this machine, or in this container."""
    facts = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        most = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        available = min(available, max(0, most - used))
    return available


class Worker:
    """One process, started when it is first needed and again after it has died.

    Args:
        memory_limit: bytes that it may allocate; None for no limit.
        quiet: keep what the method prints for the verdicts' notes, in place of printing it.
        sources: method -> digest of its source; the process refuses to judge by another version of it.
    """

    def __init__(
        self,
        *,
        memory_limit: int | None = None,
        quiet: bool = False,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self._memory_limit, self._quiet = memory_limit, quiet
        self.sources = dict(sources or {})
        self._connection: socket.socket | None = None
        self._status = -1
        self._faults: Path | None = None
        self._said: Path | None = None
        #: the pid of the process; None where there is none now
        self.pid: int | None = None

    def call(self, function: str, *arguments: Any, backstop: float | None = None) -> Any:
        """Call a function of effattn, `module:function`, in the process.

        Args:
            function: what to call; arguments and result are plain data for JSON.
            arguments: its arguments.
            backstop: seconds after which the process is killed and counts as ended by its time limit.

        Raises:
            WorkerDied: the process ended. The next call starts another.
            RequestError: as the function raised it.
            WorkerFault: the function raised anything else.
        """
        connection = self._connected()
        try:
            asked = {"call": function, "arguments": list(arguments), "sources": self.sources}
            work.send(connection, asked)
            late = not self._wait(connection, backstop)
            reply = None if late else work.receive(connection)
        except (ConnectionError, BrokenPipeError):
            late, reply = False, None
        except BaseException:
            self.kill()  # interrupted: an answer to this call must not be taken for one to the next
            raise
        if reply is None:
            if late:
                self.kill()
                raise WorkerDied(-signal.SIGALRM)
            raise self._died()
        if "refused" in reply:
            raise RequestError(reply["refused"])
        if "fault" in reply:
            raise WorkerFault(f"effattn failed inside a worker:\n{reply['fault']}")
        return reply["result"]

    def start(self) -> None:
        """Start the process, if there is none."""
        self._connected()

    def kill(self) -> None:
        """End the process now, if there is one."""
        if self._connection is None:
            return
        if self.pid is None:
            self._read_status(1)
        if self.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._died()

    def close(self) -> None:
        """Let the process end by itself; it does when the connection closes and it is not in a call."""
        self._clean()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _connected(self) -> socket.socket:
        if self._connection is not None:
            return self._connection
        start()
        assert _nursery is not None
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        handle, faults = tempfile.mkstemp(prefix="effattn-faults-")
        os.close(handle)
        self._faults = Path(faults)
        if self._quiet:
            handle, said = tempfile.mkstemp(prefix="effattn-said-")
            os.close(handle)
            self._said = Path(said)
        asked = {
            "environ": dict(os.environ),
            "cwd": os.getcwd(),
            "path": sys.path,
            "faults": faults,
            "said": None if self._said is None else str(self._said),
            "memory": self._memory_limit,
        }
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        with theirs:
            try:
                _nursery.fork(asked, [theirs.fileno(), 1, 2, writing])
            except ConnectionError:  # it was killed; whoever asks again gets a new one
                ours.close()
                os.close(reading)
                self._remove_files()
                raise WorkerDied(-signal.SIGKILL) from None
            finally:
                os.close(writing)
        self._connection, self._status, self.pid = ours, reading, None
        return ours

    def _wait(self, connection: socket.socket, seconds: float | None) -> bool:
        """Wait for an answer or for the end of the process; False where neither came in time."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._status, select.POLLIN)
        end = None if seconds is None else time.monotonic() + seconds
        while True:
            left = _WAIT_AT_ONCE if end is None else max(0.0, min(_WAIT_AT_ONCE, end - time.monotonic()))
            ready = poll.poll(left * 1000)
            if not ready:
                if end is not None and time.monotonic() >= end:
                    return False
                continue
            if any(descriptor == connection.fileno() for descriptor, _ in ready):
                return True
            if self.pid is None:
                self._read_status(1)
                if self.pid is not None:
                    continue
            # It has ended. Its own children may hold the connection open, so nobody waits for that.
            if not _readable(connection):
                connection.shutdown(socket.SHUT_RDWR)
            return True

    def _read_status(self, lines: int) -> int | None:
        """Read lines of the nursery's pipe; the exit code, if one of them has it."""
        code = None
        for _ in range(lines):
            line = b""
            while not line.endswith(b"\n"):
                byte = os.read(self._status, 1)
                if not byte:
                    return code
                line += byte
            said = json.loads(line)
            self.pid = said.get("pid", self.pid)
            code = said.get("exit", code)
        return code

    def _died(self) -> WorkerDied:
        code = self._read_status(2 if self.pid is None else 1)
        place = said = ""
        if self._faults is not None:
            with contextlib.suppress(OSError):
                place = innermost(self._faults.read_text(errors="replace"))
        if self._said is not None:
            with contextlib.suppress(OSError):
                said = "\n".join(self._said.read_text(errors="replace").strip().splitlines()[-MOST_SAID:])
        self._clean()
        # Nothing said: the nursery went with it.
        return WorkerDied(-signal.SIGKILL if code is None else code, place, said)

    def _remove_files(self) -> None:
        for file in (self._faults, self._said):
            if file is not None:
                file.unlink(missing_ok=True)
        self._faults = self._said = None

    def _clean(self) -> None:
        if self._connection is None:
            return
        self._connection.close()
        os.close(self._status)
        self._remove_files()
        self._connection, self._status, self.pid = None, -1, None


def _readable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def innermost(dump: str) -> str:
    """The innermost frames of faulthandler's text, as one line."""
    frames = [line.strip() for line in dump.splitlines() if line.lstrip().startswith('File "')]
    short = []
    for frame in frames:
        if "effattn/judge.py" in frame or "effattn/methods/" in frame:
            break
        path, _, rest = frame.removeprefix('File "').partition('", line ')
        short.append(f"{Path(path).name}:{rest}")
    return ", from ".join(short[:3])


class Isolated:
    """Judges cases by one method in a worker process, many of them in several.

    Args:
        spec: the method as the command line names it.
        device: where it runs.
        time_limit: seconds for one case.
        memory_limit: bytes that a worker may allocate; None for the default on the CPU, no limit on a GPU, whose
            driver reserves addresses without end.
        checks: instruments that look at its kernels, see `effattn.cpu.checks`.
        quiet: keep what the method prints for the verdicts' notes, in place of printing it.
        jobs: processes that share the questions of `judge_all`; None for one a core, at most `MOST_JOBS`, on the CPU, and
            one on a GPU.

    Raises:
        RequestError: there is no such method, or no such device; the time limit is none, or more than a day.
    """

    def __init__(
        self,
        spec: str,
        *,
        device: str = "cpu",
        time_limit: float = TIME_LIMIT,
        memory_limit: int | None = None,
        checks: Sequence[str] = (),
        jobs: int | None = None,
        quiet: bool = False,
    ) -> None:
        check_time_limit(time_limit)
        self._quiet = quiet
        self.device, self.time_limit, self.checks = device, time_limit, tuple(checks)
        self._asked = spec
        if jobs is None:
            jobs = min(MOST_JOBS, len(os.sched_getaffinity(0))) if device == "cpu" else 1
        self.jobs = jobs
        if memory_limit is None and device == "cpu":
            memory_limit = int(available_memory() * MEMORY_SHARE / jobs)
        self.memory_limit = memory_limit
        self._worker = Worker(memory_limit=memory_limit, quiet=quiet)
        self._pool: IsolatedExecutor | None = None
        try:
            self._worker.call("effattn.run.work:check_device", device)
            described = self._worker.call("effattn.run.work:describe", spec)
            source = self._worker.call("effattn.run.work:loaded_source", spec)
        except WorkerDied as died:
            self.close()
            at = f" (at {died.place})" if died.place else ""
            at += f", after it printed {died.said!r}" if died.said else ""
            raise RequestError(
                f"loading the method {spec!r} killed the process: it {how_it_ended(died.code)}{at}."
                " It must be importable; what it computes belongs into the function"
            ) from None
        except BaseException:
            self.close()
            raise
        self.name: str = described["name"]
        self.spec: str = described["spec"]
        # A process that takes the place of one that died, and each that helps, must load what this one has loaded.
        self._worker.sources = {spec: source}
        #: what happened when the file was imported, see `effattn.methods.surroundings`
        self.notes: tuple[str, ...] = tuple(described["notes"])

    def judge(self, case: Case, law: str | None = None, *, weigh: str = "", explain: bool = False) -> Verdict:
        """Compare one case with exact attention, or try a law on it; `weigh` and `explain` as in `effattn.judge`.

        A worker that dies over it makes the verdict crashed or timed out.
        """

        def answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
            name = f"{function.__module__}:{function.__qualname__}"
            return self._worker.call(name, *arguments, backstop=self.time_limit + GRACE)

        return self._verdict(case, law, lambda: answer(*self._asking(case, law, weigh, explain)))

    def judge_all(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        """Judge all of them in `jobs` processes: the number of a question and its verdict, in the order of their ends."""
        if self.jobs == 1 or len(questions) < FEW_QUESTIONS:
            for number, asked in enumerate(questions):
                yield number, self.judge(asked.case, asked.law, weigh=asked.weigh)
            return
        pool = self._workers()
        try:
            futures: dict[concurrent.futures.Future[Any], int] = {}
            for number in _interleaved(len(questions), self.jobs):
                asked = questions[number]
                function, arguments = self._asking(asked.case, asked.law, asked.weigh)
                futures[pool.submit(function, *arguments, backstop=self.time_limit + GRACE)] = number
            for future in concurrent.futures.as_completed(futures):
                asked = questions[futures[future]]
                yield futures[future], self._verdict(asked.case, asked.law, future.result)
        finally:
            self._pool = None
            pool.shutdown(cancel_futures=True)

    def _workers(self) -> IsolatedExecutor:
        """The processes that share what is asked."""
        if self._pool is None:
            self._pool = IsolatedExecutor(
                self.jobs, memory_limit=self.memory_limit, quiet=self._quiet, sources=self._worker.sources
            )
        return self._pool

    def _asking(
        self, case: Case, law: str | None, weigh: str, explain: bool = False
    ) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """The function that answers in a worker, and its arguments."""
        asked = (self._asked, self.device, case.to_dict(), self.time_limit)
        if law is not None:
            return work.judge_law, (*asked, law)
        return work.judge_case, (*asked, self.checks, weigh, explain)

    def _verdict(self, case: Case, law: str | None, answer: Callable[[], dict[str, Any]]) -> Verdict:
        from effattn.verdict import Outcome, Verdict

        try:
            found = answer()
        except WorkerDied as died:
            return verdict_of_death(
                case,
                died,
                name=self.name,
                spec=self.spec,
                device=self.device,
                time_limit=self.time_limit,
                checks=self.checks,
                law=law,
            )
        verdict = Verdict.from_dict(found)
        if verdict.outcome == Outcome.CRASHED and self.memory_limit and _out_of_memory(verdict.message):
            hint = f"the process may allocate {self.memory_limit / 2**30:.3g} GiB; --memory-limit allows more"
            verdict = replace(verdict, message=f"{verdict.message}\n{hint}")
        return verdict

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of effattn in the worker."""
        return self._worker.call(function, *arguments)

    def call_all(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Call a function of effattn for each tuple of arguments, in `jobs` processes: the results, in order."""
        if self.jobs == 1:
            name = f"{function.__module__}:{function.__qualname__}"
            yield from (self._worker.call(name, *one) for one in arguments)
            return
        futures = [self._workers().submit(function, *one) for one in arguments]
        yield from (future.result() for future in futures)

    def close(self) -> None:
        """End the workers."""
        self._worker.kill()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Isolated:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _interleaved(count: int, parts: int) -> Iterator[int]:
    """0 to count - 1: the first of each of `parts` consecutive parts, then the second of each, ...

    Neighbours run the same kernels, which two processes should not compile at the same time.
    """
    size = -(-count // parts)
    for at in range(size):
        yield from range(at, count, size)


def _out_of_memory(message: str) -> bool:
    return any(words in message for words in ("MemoryError", "allocate memory", "bad_alloc", "out of memory"))


def verdict_of_death(
    case: Case,
    died: WorkerDied,
    *,
    name: str,
    spec: str,
    device: str,
    time_limit: float,
    checks: Sequence[str] = (),
    law: str | None = None,
) -> Verdict:
    """The verdict on a case whose worker died."""
    from effattn.judge import replay_line
    from effattn.verdict import Outcome, Verdict

    if died.code == -signal.SIGALRM:
        outcome = Outcome.TIMED_OUT
        message = f"the method was not done after {time_limit:g} s; --time-limit allows more"
    else:
        outcome = Outcome.CRASHED
        message = f"the process of the method {how_it_ended(died.code)}"
    if died.place:
        message += f"\nat {died.place}"
    if died.said:
        message += f"\nit printed: {died.said}"
    return Verdict(
        case=case,
        method=name,
        outcome=outcome,
        message=message,
        law=law,
        replay=replay_line(case, spec, device, checks, law=law),
    )


class IsolatedExecutor(concurrent.futures.Executor):
    """A `concurrent.futures` executor whose workers may die.

    It takes functions of effattn only, with plain data as arguments and results. A future whose worker died has a
    `WorkerDied`; the others go on.

    Args:
        workers: processes.
        memory_limit: bytes that each may allocate; None for no limit.
        quiet, sources: as for `Worker`.
    """

    def __init__(
        self,
        workers: int,
        *,
        memory_limit: int | None = None,
        quiet: bool = False,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self._queue: queue.SimpleQueue[
            tuple[concurrent.futures.Future[Any], str, tuple[Any, ...], float | None] | None
        ] = queue.SimpleQueue()
        self.workers = [
            Worker(memory_limit=memory_limit, quiet=quiet, sources=sources) for _ in range(workers)
        ]
        start()
        self._threads = [threading.Thread(target=self._run, args=(w,), daemon=True) for w in self.workers]
        for thread in self._threads:
            thread.start()

    def submit(
        self, fn: Callable[..., Any], /, *args: Any, backstop: float | None = None, **kwargs: Any
    ) -> concurrent.futures.Future[Any]:
        """Call `fn(*args)` in a worker; `backstop` as in `Worker.call`."""
        if kwargs:
            raise TypeError("functions in isolated workers take positional arguments only")
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self._queue.put((future, f"{fn.__module__}:{fn.__qualname__}", args, backstop))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the workers; with `cancel_futures` without waiting for what they are at."""
        if cancel_futures:
            with contextlib.suppress(queue.Empty):
                while (item := self._queue.get_nowait()) is None or item[0].cancel():
                    pass
        for _ in self._threads:
            self._queue.put(None)
        if cancel_futures:
            for worker in self.workers:
                if (pid := worker.pid) is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self, worker: Worker) -> None:
        while (item := self._queue.get()) is not None:
            future, function, arguments, backstop = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(worker.call(function, *arguments, backstop=backstop))
            except BaseException as error:
                future.set_exception(error)
        worker.kill()


def _own_pid() -> int:
    """Which process answers."""
    return os.getpid()


def _parent_pid() -> int:
    """Which process it was forked from."""
    return os.getppid()


def _die(number: int) -> None:
    """End the process that answers by a signal."""
    os.kill(os.getpid(), number)
