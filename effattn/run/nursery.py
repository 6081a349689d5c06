"""The process that workers are forked from.

It has imported torch and most else that a case needs, and does nothing but fork: a worker is there in
milliseconds instead of seconds, also the one that takes the place of a worker that died. It computes nothing, so no
thread and no GPU is open in it that a fork would break.

It is started by `effattn.run.isolation` with one end of a socket. Each message asks for one worker:

    {"environ": {...}, "cwd": "...", "path": [...], "faults": "FILE", "said": "FILE" or null, "memory": BYTES or null}

and brings four descriptors: the worker's end of its connection, its stdout, its stderr, and a pipe on which the
nursery tells its pid and, when it has ended, its exit status. When the other end of the socket closes, because the
process that asked has gone, however it went, the nursery kills its workers and goes too.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

#: What a case needs and what takes long to import.
PRELOADED = (
    "torch",
    "numpy",
    "scipy.special",
    "effattn.judge",
    "effattn.exact",
    "effattn.methods.user",
    "effattn.tolerances.envelope",
    "effattn.tolerances.statistics",
    "effattn.tolerances.predict",
)
#: What many cases need: imported when the first worker is there and nothing is asked for, so that those after it have it.
LATER = (
    "triton",
    "effattn.laws",
    "effattn.properties.catalogue",
    "effattn.properties.law_cases",
    "effattn.judgement",
    "effattn.tolerances.gradients",
    "torch._dynamo",
)
#: Variables that these read when they are imported: a nursery forks for workers with the same ones.
READ_AT_IMPORT = ("TRITON_INTERPRET", "TORCH")
#: Bytes of one message, environment and all.
LONGEST = 1 << 20
_PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> None:
    """Serve requests on the socket until its other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked
    requests = socket.socket(fileno=descriptor)
    for name in PRELOADED:
        importlib.import_module(name)
    children: dict[int, tuple[int, int]] = {}  # pidfd -> pid, pipe
    poll = select.poll()
    poll.register(requests, select.POLLIN)
    later = list(LATER)
    while True:
        ready_now = poll.poll(0 if later and children else None)
        if not ready_now:
            # Whatever is wrong with it is told by the worker that needs it.
            with contextlib.suppress(Exception):
                importlib.import_module(later.pop(0))
        for ready, _ in ready_now:
            if ready in children:
                poll.unregister(ready)
                _bury(ready, *children.pop(ready))
            elif not _fork(requests, children, poll):
                for pid, _pipe in children.values():
                    os.kill(pid, signal.SIGKILL)  # a child that nobody has waited for yet is there
                    os.waitpid(pid, 0)
                return


def read_at_import() -> dict[str, str]:
    """The variables of this process that `LATER` reads when it is imported."""
    return {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}


def _fork(requests: socket.socket, children: dict[int, tuple[int, int]], poll: select.poll) -> bool:
    """Fork one worker as asked for; False where nobody is there to ask any more."""
    try:
        message, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 4)
    except OSError:
        return False
    if not message:
        return False
    connection, out, err, pipe = descriptors
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        requests.close()
        os.close(pipe)
        for pidfd, (_, other) in children.items():
            os.close(pidfd)
            os.close(other)
        _become_worker(json.loads(message), connection, out, err, parent)
    for descriptor in (connection, out, err):
        os.close(descriptor)
    pidfd = os.pidfd_open(pid)
    children[pidfd] = (pid, pipe)
    poll.register(pidfd, select.POLLIN)
    _tell(pipe, {"pid": pid})
    return True


def _bury(pidfd: int, pid: int, pipe: int) -> None:
    _, status = os.waitpid(pid, 0)
    _tell(pipe, {"exit": os.waitstatus_to_exitcode(status)})
    os.close(pipe)
    os.close(pidfd)


def _tell(pipe: int, said: dict[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(pipe, json.dumps(said).encode() + b"\n")


def _become_worker(asked: dict[str, Any], connection: int, out: int, err: int, parent: int) -> NoReturn:
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.close(out)
        os.close(err)
        # Should the nursery be killed, its workers are not to go on alone.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if asked["said"] is not None:
            from effattn.methods import surroundings

            surroundings.print_into(asked["said"])
        os.environ.clear()
        os.environ.update(asked["environ"])
        with contextlib.suppress(OSError):
            os.chdir(asked["cwd"])
        sys.path[:] = asked["path"]
        importlib.invalidate_caches()
        faults = open(asked["faults"], "w")  # noqa: SIM115 open as long as the process lives
        faulthandler.enable(faults, all_threads=False)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # The time limit's signal: write where the method is, then end as by default.
        faulthandler.register(signal.SIGALRM, faults, all_threads=False, chain=True)
        if asked["memory"] is not None:
            limit_memory(asked["memory"])
        from effattn.run import work

        code = work.serve(socket.socket(fileno=connection))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def limit_memory(more: int) -> None:
    """Let this process allocate so many bytes beyond what it has; more than that fails where it is asked for."""
    import resource

    pages = int(open("/proc/self/statm").read().split()[5])  # noqa: SIM115 data and stack
    limit = pages * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
