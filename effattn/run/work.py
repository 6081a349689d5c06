"""What runs inside a worker process: a loop that calls functions of effattn, with JSON in and JSON out.

A request is `{"call": "module:function", "arguments": [...], "sources": {...}}`, a reply `{"result": ...}`,
`{"refused": "..."}` where the function raised `RequestError`, or `{"fault": "traceback"}` where effattn itself is at
fault. Each is preceded by its length in four bytes. Only functions of effattn are called. `sources` has the digests of the
methods that the run began with: a worker that takes the place of one that died refuses to load anything else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.judge import Verdict
    from effattn.methods.base import Method

_LENGTH = struct.Struct("!I")


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Write one message."""
    text = json.dumps(message, allow_nan=False).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Read one message; None where the other side has closed the connection."""
    head = _exactly(connection, _LENGTH.size)
    if head is None:
        return None
    text = _exactly(connection, _LENGTH.unpack(head)[0])
    return None if text is None else json.loads(text)


def _exactly(connection: socket.socket, count: int) -> bytes | None:
    parts = []
    while count:
        part = connection.recv(min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def serve(connection: socket.socket) -> int:
    """Answer requests until the connection closes. Returns the exit code of the process."""
    from effattn.methods import surroundings

    surroundings.ignore_interrupts()  # Ctrl-C is for the process that asked; it ends this one
    pid = os.getpid()
    while (request := receive(connection)) is not None:
        try:
            _begun_with.update(request.get("sources") or {})
            reply = {"result": find(request["call"])(*request["arguments"])}
        except RequestError as error:
            reply = {"refused": str(error)}
        except Exception:
            # Not silenced: the side that asked raises it as `WorkerFault`, with this traceback.
            reply = {"fault": traceback.format_exc()}
        surroundings.end_of_child(pid)  # it would answer in place of the worker, and take requests from it
        sys.stdout.flush()  # what the method printed stands before what is printed about it
        send(connection, reply)
    return 0


def find(name: str) -> Callable[..., Any]:
    """The function that `module:function` names, which must be one of effattn's."""
    module, _, function = name.partition(":")
    if module != "effattn" and not module.startswith("effattn."):
        raise ValueError(f"{name!r} is no function of effattn")
    return getattr(importlib.import_module(module), function)


@contextlib.contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """End this process by SIGALRM unless the block is left in time.

    The kernel does it, so a loop in C that never comes back to Python ends as well. To be used where the signal has
    its default action, and in one thread of a process at a time.
    """
    signal.setitimer(signal.ITIMER_REAL, seconds or 0.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


#: method -> digest of the source that the run of this process began with
_begun_with: dict[str, str] = {}


def method(spec: str) -> Method:
    """The method, loaded once in each worker.

    Raises:
        RequestError: it cannot be loaded, or it is another version than the one that the run began with.
    """
    begun_with = _begun_with.get(spec)
    if begun_with is not None:
        check_source(spec, begun_with)
    return _loaded(spec, os.getcwd())[0]


#: what `_loaded` has loaded
_known: set[tuple[str, str]] = set()


@functools.cache
def _loaded(spec: str, folder: str) -> tuple[Method, tuple[str, ...], str]:
    """Method, notes and digest of its source. A file is named relative to the folder that the process is in."""
    from effattn import methods
    from effattn.methods import surroundings

    with surroundings.noted_import() as notes:
        loaded = methods.get(spec)
    _known.add((spec, folder))
    return loaded, tuple(notes), source(spec)


def check_source(spec: str, begun_with: str) -> None:
    """Raise RequestError where this process has, or would load, another version of the method than the run began with.

    What is loaded stays: an edit after that changes nothing in this process.
    """
    if (spec, os.getcwd()) not in _known and source(spec) != begun_with:  # what it is now may not even load
        raise _edited(spec)
    loaded = loaded_source(spec)
    if loaded == begun_with:
        return
    if loaded == source(spec):
        raise _edited(spec)
    raise RequestError(
        f"{spec!r} was edited since a worker loaded it, process {os.getpid()} on {socket.gethostname()}; start the workers"
        " again. What is recorded is kept"
    )


def _edited(spec: str) -> RequestError:
    return RequestError(
        f"{spec!r} was edited since the run began: process {os.getpid()} on {socket.gethostname()}, which took the place of one"
        " that had ended, found another version. Verdicts of two versions are never mixed: undo the edit, or begin anew. What"
        " is recorded is kept"
    )


def loaded_source(spec: str) -> str:
    """The digest of the source that this process has loaded the method from."""
    return _loaded(spec, os.getcwd())[2]


def describe(spec: str) -> dict[str, Any]:
    """Load the method: its name, how the command line names it, and what loading it did to the process."""
    loaded, notes, _ = _loaded(spec, os.getcwd())
    return {"name": loaded.name, "spec": loaded.spec, "notes": [*notes, *loaded.notes]}


def source(spec: str) -> str:
    """A digest of what the method is made of."""
    from effattn.methods.load import source_digest

    return source_digest(spec)


def check_device(device: str) -> None:
    """Raise RequestError where the device is not here."""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise RequestError(
                "--device cuda: torch finds no usable GPU here; leave --device out, or see `effattn doctor`"
            )


def judge_case(
    spec: str,
    device: str,
    case: dict[str, Any],
    limit: float | None,
    checks: Sequence[str] = (),
    weigh: str = "",
    explain: bool = False,
) -> dict[str, Any]:
    """Judge one case, both as plain data."""
    from effattn.case import Case

    return judged(Case.from_dict(case), spec, device, limit, checks, weigh, explain).to_dict()


def judged(
    case: Case,
    spec: str,
    device: str,
    limit: float | None,
    checks: Sequence[str] = (),
    weigh: str = "",
    explain: bool = False,
) -> Verdict:
    """Judge one case within the time limit, in seconds."""
    from effattn import judge as judging

    loaded = method(spec)
    with time_limit(limit):
        return judging.judge(case, loaded, device=device, checks=checks, weigh=weigh, explain=explain)


def judge_law(spec: str, device: str, case: dict[str, Any], limit: float | None, law: str) -> dict[str, Any]:
    """Try one law on one case, all as plain data."""
    from effattn import laws
    from effattn.case import Case
    from effattn.properties.law import get

    loaded = method(spec)
    with time_limit(limit):
        return laws.judge_law(get(law), Case.from_dict(case), loaded, device=device).to_dict()


def law_cases(spec: str, names: Sequence[str], profile: str, dtype: str) -> list[tuple[str, dict[str, Any]]]:
    """The cases on which laws are tried by the method: name of the law, case."""
    from effattn import laws

    loaded = method(spec)
    return [
        (law.name, case.to_dict())
        for law in laws.choose(names)
        for case in laws.cases_of(law, profile, dtype, loaded)
    ]
