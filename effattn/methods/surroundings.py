"""What a method has to leave alone, its process: looked at around its calls, set back, and named.

`watched` goes around one call of a method or the import of its file. What it changed there of the process is what it was
again before anything else runs, so that neither exact attention nor the next case computes under another default dtype,
and is among the `notes` of the verdict. `noted` goes around a verdict: random states, which a method may move on from one
call to the next, are what they were before it, and what the method printed is taken. A process that a method forked ends
where it would leave either: it is a second one that would judge, answer and write as the first does.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports] part of CPython, without a stub
import contextlib
import ctypes
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

#: characters of what was printed that a note shows
_SHOWN = 60
#: bytes of what was printed that are read
_READ = 4096


@dataclass(frozen=True)
class _Thing:
    """Something of the process that a call can change."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]
    #: whether a note shows the values
    shown: bool = False


@lru_cache(maxsize=1)
def _of_torch() -> tuple[_Thing, ...]:
    import torch

    def set_device(name: str) -> None:
        # A device that was set, even "cpu", has torch pass every call by a function in Python.
        torch.set_default_device(None if name == "cpu" else name)

    return (
        _Thing("the default dtype", torch.get_default_dtype, torch.set_default_dtype, True),
        _Thing("the default device", lambda: str(torch.get_default_device()), set_device, True),
        _Thing("gradient mode", torch.is_grad_enabled, torch.set_grad_enabled, True),
        _Thing("the number of threads", torch.get_num_threads, torch.set_num_threads, True),
        _Thing(
            "deterministic mode",
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
        ),
        _Thing(
            "the precision of float32 products",
            torch.get_float32_matmul_precision,
            torch.set_float32_matmul_precision,
            True,
        ),
    )


def _set_environment(before: dict[str, str]) -> None:
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def _set_filters(before: list[Any]) -> None:
    warnings.filters[:] = before  # type: ignore[index] a list, which the stub calls a Sequence
    warnings._filters_mutated()  # type: ignore[attr-defined] what the warnings module itself calls after a change


#: those of Linux but the real-time ones; plain numbers, which are quicker to ask for than `signal.Signals`
_SIGNALS = tuple(int(number) for number in signal.valid_signals() if number <= signal.SIGSYS)


def _handlers() -> dict[int, Any]:
    return {number: _signal.getsignal(number) for number in _SIGNALS}


def _set_handlers(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        # None: it was set by C code, which Python cannot put back. Only the main thread may set any.
        if handler is not None and _signal.getsignal(number) != handler:
            with contextlib.suppress(ValueError, OSError):
                signal.signal(number, handler)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it has been removed
        return None


_OF_THE_PROCESS = (
    _Thing("the working directory", _folder, lambda path: path and os.chdir(path), True),
    _Thing("a signal handler", _handlers, _set_handlers),
)
#: not looked at where modules are imported: these set variables that they read, and filters
_OF_CALLS = (
    _Thing("the environment", lambda: dict(os.environ), _set_environment),
    _Thing("the filters of warnings", lambda: list(warnings.filters), _set_filters),
    _Thing(
        "sys.stdout or sys.stderr",
        lambda: (sys.stdout, sys.stderr),
        lambda streams: (setattr(sys, "stdout", streams[0]), setattr(sys, "stderr", streams[1])),
    ),
)


def _numpy_state() -> tuple[Any, ...]:
    import numpy as np

    name, key, *rest = np.random.get_state(legacy=True)
    return (name, key.tobytes(), *rest)  # type: ignore[union-attr] a tuple, as legacy=True asks for


def _set_numpy_state(state: tuple[Any, ...]) -> None:
    import numpy as np

    np.random.set_state((state[0], np.frombuffer(state[1], dtype=np.uint32), *state[2:]))


def _torch_state() -> bytes:
    import torch

    return torch.get_rng_state().numpy().tobytes()


def _set_torch_state(state: bytes) -> None:
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


RANDOM = (
    _Thing("torch's random state", _torch_state, _set_torch_state),
    _Thing("Python's random state", random.getstate, random.setstate),
    _Thing("numpy's random state", _numpy_state, _set_numpy_state),
)
#: what `the_state_of_torch_is_left_alone` states, besides random states
STATED = ("the working directory", "the default dtype", "the default device", "gradient mode", "the number of threads",
          "deterministic mode", "the precision of float32 products")  # fmt: skip

#: what was changed since it was last taken -> the change in words
_changes: dict[str, str] = {}
#: how often this process was forked by Python code; `subprocess` does it without
_forks = 0
#: whether Ctrl-C cannot reach this process
_uninterrupted = False
FORKED = "it forked the process; a child that comes back from the method is ended"


def _forked() -> None:
    global _forks
    _forks += 1


os.register_at_fork(after_in_parent=_forked)


def end_of_child(pid: int) -> None:
    """End this process at once, without a word, where it is not the one of this pid: somebody forked it."""
    if os.getpid() != pid:
        os._exit(0)


def ignore_interrupts() -> None:
    """Leave Ctrl-C to the process that asked this one: a KeyboardInterrupt is from then on the method's own."""
    global _uninterrupted
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _uninterrupted = True


def interrupted(error: BaseException) -> bool:
    """Whether it is the user who wants to stop, and not the method that raised."""
    return isinstance(error, KeyboardInterrupt) and not _uninterrupted


def _words(thing: _Thing, before: Any, now: Any) -> str:
    if thing.shown:
        return f" ({before} -> {now})"
    if isinstance(before, dict) and isinstance(now, dict):
        names = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        known = [signal.Signals(n).name if isinstance(n, int) else str(n) for n in names[:3]]
        return f" ({', '.join(known)}{', ...' if len(names) > 3 else ''})"
    return ""


@contextlib.contextmanager
def watched(*, importing: bool = False) -> Iterator[dict[str, str]]:
    """Set back what is changed inside; gives what that was, with the change in words, once the block has been left."""
    things = (*_of_torch(), *_OF_THE_PROCESS, *(RANDOM if importing else _OF_CALLS))
    before = [thing.read() for thing in things]
    modules = len(sys.modules)
    pid = os.getpid()
    found: dict[str, str] = {}
    try:
        yield found
    finally:
        end_of_child(pid)
        for thing, was in zip(things, before, strict=True):
            if thing in _OF_CALLS and len(sys.modules) != modules:
                continue
            if (now := thing.read()) != was:
                thing.write(was)
                found[thing.name] = _words(thing, was, now)
        _changes.update(found)


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """Around a verdict: random states are set back; gives what the method did to the process, once the block has been left."""
    before = [thing.read() for thing in RANDOM]
    _changes.clear()
    notes: list[str] = []
    pid, forks = os.getpid(), _forks
    with _listening() as heard:
        try:
            yield notes
        finally:
            end_of_child(pid)
            for thing, was in zip(RANDOM, before, strict=True):
                if thing.read() != was:
                    thing.write(was)
                    _changes[thing.name] = ""
    notes += [f"it changed {what}{words}; set back after the call" for what, words in _changes.items()]
    notes += [FORKED] if _forks != forks else []
    notes += _said(b"".join(heard))


@contextlib.contextmanager
def noted_import() -> Iterator[list[str]]:
    """Around the import of a file: what `watched` and `noted` do, for all that is no setting for imports of its own."""
    notes: list[str] = []
    forks = _forks
    with _listening() as heard, watched(importing=True) as found:
        yield notes
    notes += [f"importing it changed {what}{words}; set back" for what, words in found.items()]
    notes += (
        ["importing it forked the process; a child that comes back from it is ended"]
        if _forks != forks
        else []
    )
    notes += [note.replace("it printed", "importing it printed", 1) for note in _said(b"".join(heard))]
    _changes.clear()


def _said(text: bytes) -> list[str]:
    if not text:
        return []
    lines = text.decode(errors="replace").strip().splitlines()
    first = lines[0].strip() if lines else ""
    return [f"it printed {first[:_SHOWN]!r}{' ...' if len(lines) > 1 or len(first) > _SHOWN else ''}"]


# -- what is printed ------------------------------------------------------------------------------------------------

#: the file that standard output and error of a worker process go to; None where they are those of whoever asked
_file: int | None = None


def print_into(path: str) -> None:
    """Have everything that this process prints, C libraries included, go into a file, from which notes are made."""
    global _file
    _file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    os.dup2(_file, 1)
    os.dup2(_file, 2)


class _Heard:
    """A stream that keeps what is written to it by one thread, and passes everything on."""

    def __init__(self, stream: Any, heard: list[bytes]) -> None:
        self._stream, self._heard, self._thread = stream, heard, threading.get_ident()

    def write(self, text: Any) -> Any:
        if threading.get_ident() == self._thread and len(self._heard) < 100:
            self._heard.append(text.encode(errors="replace") if isinstance(text, str) else bytes(text))
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __iter__(self) -> Any:
        return iter(self._stream)


@contextlib.contextmanager
def _listening() -> Iterator[list[bytes]]:
    """What is printed inside: of a worker what came in its file, which is emptied; else what goes by sys.stdout and stderr."""
    heard: list[bytes] = []
    if _file is not None:
        try:
            yield heard
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(Exception):  # a stream that the method closed
                    stream.flush()
            ctypes.CDLL(None).fflush(None)
            if os.fstat(_file).st_size:
                heard.append(os.pread(_file, _READ, 0))
                os.ftruncate(_file, 0)
        return
    before = sys.stdout, sys.stderr
    ours = tuple(_Heard(stream, heard) for stream in before)
    sys.stdout, sys.stderr = ours  # type: ignore[assignment] streams to whoever prints, by __getattr__
    try:
        yield heard
    finally:
        if (sys.stdout, sys.stderr) == ours:
            sys.stdout, sys.stderr = before
