"""What a worker of a sweep does: judges some cases, and appends each verdict to a file that is its own.

It holds for any executor, so it trusts none: a chunk is claimed before it is begun. An executor that runs a chunk again
by itself, because it thinks that a worker has died, finds it claimed; a worker that is left over from a supervisor that
was killed finds another session.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError, TooLarge
from effattn.run.records import Appender, encode

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.verdict import Verdict

#: Inside the run folder, while the sweep runs.
WORK = "work"
SESSION = "session"

#: run folder -> process, session, and the file that is theirs
_appenders: dict[str, tuple[int, str, Appender]] = {}
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

    Returns:
        `{"cases": n, "seconds": s, "judging": s}`, or `{"refused": reason}` where nothing was done.

    Raises:
        RequestError: the file cannot be written, the machine cannot run the method, or has another version of it.
    """
    from effattn.case import Case

    started = time.perf_counter()
    place = Path(folder) / WORK
    try:
        if (place / SESSION).read_text() != session:
            return {"refused": "another session"}
        os.close(os.open(place / claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return {"refused": "claimed before"}
    except FileNotFoundError:
        return {"refused": "the sweep is over"}
    except OSError as error:
        raise _unwritable(folder, error) from error
    out = _appender(folder, session)
    judging = 0.0
    # Whoever resumes a sweep waits for this lock, so nobody reads a file that is still growing.
    fcntl.flock(out.descriptor, fcntl.LOCK_EX)
    try:
        _check_current(folder, session, {spec: sources[spec] for spec, _ in items})
        for spec, data in items:
            before = time.perf_counter()
            verdict = _judged(Case.from_dict(data), spec, device, limit)
            judging += time.perf_counter() - before
            try:
                out.append(encode(verdict, spec=spec, device=device))
            except OSError as error:
                raise _unwritable(folder, error) from error
    finally:
        fcntl.flock(out.descriptor, fcntl.LOCK_UN)
    return {"cases": len(items), "seconds": time.perf_counter() - started, "judging": judging}


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
        return known[2]
    name = f"verdicts-{socket.gethostname()}-{pid}-{uuid.uuid4().hex[:8]}.jsonl"
    try:
        made = Appender(Path(folder) / name)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if known is not None:
        known[2].close()
    _appenders[folder] = pid, session, made
    return made


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
