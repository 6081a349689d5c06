"""What a worker of a sweep does: judges some cases, and appends each verdict to a file that is its own.

It holds for any executor, so it trusts none: a chunk is claimed before it is begun. An executor that runs a chunk again
by itself, because it thinks that a worker has died, finds it claimed; a worker that is left over from a supervisor that
was killed finds another session, and stops at the next case.

While cases are judged, the file that their verdicts go to is locked, and whoever resumes a sweep waits for that. The lock
is one of `lockf`, which is the process's own: a child that the method has forked neither has it nor keeps it.

Where nobody watches how a process ends, as with Dask's workers, the file of the claim says it: `faulthandler` writes into it
where the method is when the time limit's signal or that of a crash comes, before the process ends by it (`death`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import re
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError, TooLarge
from effattn.run.records import Appender, encode

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.run.isolation import WorkerDied
    from effattn.verdict import Verdict

#: Inside the run folder, while the sweep runs.
WORK = "work"
SESSION = "session"

#: Seconds after which a worker looks again whether the sweep is still on.
LOOK_AGAIN = 1.0

#: How faulthandler begins the text of each signal that it looks out for, besides the one that it is registered for.
_FATAL = "Fatal Python error: "
_SIGNALS = {
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
    "Segmentation fault": signal.SIGSEGV,
}
#: The head of a thread's frames in faulthandler's text, in which the thread's identity is.
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)\b.*$", re.MULTILINE)

#: run folder -> process, session, the file that is theirs, and what tells it from others
_appenders: dict[str, tuple[int, str, Appender, os.stat_result]] = {}
#: run folder -> session, and the methods whose source was looked at in it
_current: dict[str, tuple[str, set[str]]] = {}


def run(
    folder: str,
    session: str,
    claim: str,
    device: str,
    limit: float,
    items: list[tuple[str, dict[str, Any]]],
    sources: dict[str, str],
    alone: bool = False,
) -> dict[str, Any]:
    """Judge cases and append the verdicts.

    Args:
        folder: the run folder.
        session: what the supervisor wrote into `work/session`.
        claim: the name of this chunk, which no other has.
        device: where the methods run.
        limit: seconds for one case; beyond, the process ends.
        items: method and case, as plain data.
        sources: method -> digest of the source that the sweep began with.
        alone: nobody watches how this process ends, so the file of the claim is to say it.

    Returns:
        `{"cases": n, "seconds": s, "judging": s, "file": name}`; `{"claimed": claim}` where another has begun it, who has
        died or is believed to have; or `{"refused": reason}` where the folder is not that of the sweep, or not any more.

    Raises:
        RequestError: the file cannot be written, or was removed or closed; the machine cannot run the method, or has
            another version of it.
    """
    from effattn.case import Case

    started = time.perf_counter()
    place = Path(folder) / WORK
    try:
        if (refused := _refused(folder, session)) is not None:
            return {"refused": refused}
        claimed = os.open(place / claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND)
    except FileExistsError:
        return {"claimed": claim}
    except OSError as error:
        raise _unwritable(folder, error) from error
    with contextlib.ExitStack() as stack:
        stack.callback(_close, claimed, os.fstat(claimed))
        try:
            forget = stack.enter_context(_telling_how_it_ends(claimed)) if alone else _nothing
        except OSError as error:
            raise _unwritable(folder, error) from error
        judging, looked = 0.0, time.monotonic()
        out = _appender(folder, session)
        try:
            fcntl.lockf(out.descriptor, fcntl.LOCK_EX)
            _check_current(folder, session, {spec: sources[spec] for spec, _ in items})
            for spec, data in items:
                if time.monotonic() > looked + LOOK_AGAIN:
                    if (refused := _refused(folder, session)) is not None:
                        return {"refused": refused}
                    looked = time.monotonic()
                forget()
                before = time.perf_counter()
                verdict = _judged(Case.from_dict(data), spec, device, limit)
                judging += time.perf_counter() - before
                if not _is_open(folder, out):  # its number may be that of another file by now
                    raise _gone(folder, out, f"was closed, as {spec!r} was judged")
                try:
                    out.append(encode(verdict, spec=spec, device=device))
                except OSError as error:
                    raise _unwritable(folder, error) from error
        finally:
            with contextlib.suppress(OSError):  # closed: then the lock went with it
                fcntl.lockf(out.descriptor, fcntl.LOCK_UN)
        return {
            "cases": len(items),
            "seconds": time.perf_counter() - started,
            "judging": judging,
            "file": out.file.name,
        }


def _is(descriptor: int, opened: os.stat_result) -> bool:
    """Whether the descriptor is still that of the file; a method may have closed it, and opened another with its number."""
    try:
        return os.path.samestat(os.fstat(descriptor), opened)
    except OSError:
        return False


def _close(descriptor: int, opened: os.stat_result) -> None:
    if _is(descriptor, opened):
        os.close(descriptor)


def _nothing() -> None:
    """There is nothing to forget."""


@contextlib.contextmanager
def _telling_how_it_ends(descriptor: int) -> Iterator[Callable[[], None]]:
    """Have faulthandler write to the descriptor when a signal ends this process; what is yielded forgets what it wrote.

    It is forgotten before each case: a child that a method forked writes there, too, and may have died in another one.
    """
    head = b"%x\n" % threading.get_ident()  # of several threads this is the one that judges
    os.write(descriptor, head)
    opened = os.fstat(descriptor)

    def forget() -> None:
        if _is(descriptor, opened) and os.fstat(descriptor).st_size > len(head):
            os.ftruncate(descriptor, len(head))

    ours = not faulthandler.is_enabled()  # else somebody wants to have crashes told elsewhere
    if ours:
        faulthandler.enable(descriptor)
    faulthandler.register(signal.SIGALRM, descriptor, chain=True)
    try:
        yield forget
    finally:
        faulthandler.unregister(signal.SIGALRM)
        if ours:
            faulthandler.disable()


def death(folder: Path, claim: str) -> WorkerDied | None:
    """How the process that had claimed the chunk ended, as far as it could tell; None where nobody has claimed it.

    Args:
        folder: the run folder.
        claim: the name of the chunk.
    """
    from effattn.run import isolation

    try:
        head, _, told = (folder / WORK / claim).read_text(errors="replace").partition("\n")
    except FileNotFoundError:
        return None
    told = told.lstrip()
    if not told:
        return isolation.WorkerDied(None)
    code = -signal.SIGALRM
    if told.startswith(_FATAL):
        words = told.removeprefix(_FATAL)
        code = next((-number for name, number in _SIGNALS.items() if words.startswith(name)), None)
    parts = _THREAD.split(told)[1:]  # thread, its frames, thread, its frames, ...
    frames = next(
        (its for thread, its in zip(parts[::2], parts[1::2], strict=True) if thread.lstrip("0") == head), ""
    )
    return isolation.WorkerDied(code, isolation.innermost(frames))


def _refused(folder: str, session: str) -> str | None:
    """Why this process does nothing for the session; None where it does."""
    place = Path(folder) / WORK
    here = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        if (place / SESSION).read_text() != session:
            return f"{here} finds that another sweep has begun in {folder!r} since"
    except FileNotFoundError:
        if not Path(folder).is_dir():
            return (
                f"{here} does not find the run folder {folder!r}, which is there while a sweep runs, on a disk that every "
                "worker sees; it was removed, or the worker sees another disk"
            )
        return (
            f"{here} does not find {str(place / SESSION)!r}, which is there while a sweep runs; it was removed, or the "
            "worker sees another disk"
        )
    return None


def _judged(case: Case, spec: str, device: str, limit: float) -> Verdict:
    """The verdict on a case. One that is too large for this machine is not judged: the others are not to wait for it."""
    from effattn.judge import replay_line
    from effattn.run import work
    from effattn.verdict import Outcome, Verdict

    try:
        return work.judged(case, spec, device, limit)
    except TooLarge as error:
        method = work.method(spec)
        return Verdict(
            case=case,
            method=method.name,
            outcome=Outcome.NOT_JUDGED,
            message=f"not judged: {error}",
            replay=replay_line(case, method.spec, device),
        )


def _appender(folder: str, session: str) -> Appender:
    """The file of this process in the folder.

    A fork has a file of its own. So has each session: workers of Dask outlive a sweep, and the next one in the folder may
    have removed the files of the one before.
    """
    pid = os.getpid()
    known = _appenders.get(folder)
    if known is not None and known[:2] == (pid, session):
        if not _is_open(folder, known[2]):
            raise _gone(folder, known[2], "was closed")
        if not _is_in_place(known[2]):
            raise _gone(folder, known[2], "was removed")
        return known[2]
    name = f"verdicts-{socket.gethostname()}-{pid}-{uuid.uuid4().hex[:8]}.jsonl"
    try:
        made = Appender(Path(folder) / name)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if known is not None and _is_open(folder, known[2]):
        known[2].close()
    _appenders[folder] = pid, session, made, os.fstat(made.descriptor)
    return made


def _is_open(folder: str, out: Appender) -> bool:
    return _is(out.descriptor, _appenders[folder][3])


def _is_in_place(out: Appender) -> bool:
    try:
        return os.path.samestat(os.fstat(out.descriptor), out.file.stat())
    except OSError:
        return False


def _gone(folder: str, out: Appender, what: str) -> RequestError:
    return RequestError(
        f"{out.file.name!r} in the run folder {folder!r} {what}, while process {os.getpid()} on {socket.gethostname()} was "
        "writing into it: a method or another program did that. What is recorded is kept, and the same command runs what is "
        "lost again"
    )


def _check_current(folder: str, session: str, sources: dict[str, str]) -> None:
    """Once in each session: a worker that outlives a sweep may have loaded methods that were edited since, and one that takes
    the place of another finds what was edited since the sweep began.
    """
    from effattn.run import work

    if _current.get(folder, ("",))[0] != session:
        _current[folder] = session, set()
    known = _current[folder][1]
    for spec in sources.keys() - known:
        work.check_source(spec, sources[spec])
        known.add(spec)


def _unwritable(folder: str, error: OSError) -> RequestError:
    return RequestError(
        f"cannot write into the run folder {folder!r}: {error.strerror or error}; what is recorded is kept, and the "
        "same command goes on from there"
    )
