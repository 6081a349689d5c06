"""The supervisor of a sweep: hands cases out, keeps count, and takes up where another was killed.

It runs over any `concurrent.futures.Executor`. Each case is recorded exactly once, by the worker that judged it, in a
file of that worker's own; the supervisor writes only the verdicts on cases that killed their worker. What it knows is
in the run folder:

    provenance.json    which specification, digests of the methods' sources, started, and at the end ended
    lock               held by the supervisor (`store.LOCK`): a second one in the same folder is refused
    work/              the session and the chunks that were begun (`effattn.run.chunk`); gone at the end

Nothing of it is written before the methods have loaded: a sweep that does not begin leaves what was there, or nothing.

Chunks run in order, so the first case of a chunk that has no verdict when its worker has died is the one it died over.
It is tried again alone; where that kills again, the case gets the verdict. Only the death of a worker counts against a
method: whatever else goes wrong with a chunk stops the sweep.

The file is long: taking a folder, handing out and taking back are of one state, and what one does the others rely on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from effattn.errors import RequestError
from effattn.run import chunk, isolation, migrate, records, store, work
from effattn.run.records import Damage, Key
from effattn.run.tally import Result, Tally

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.run.spec import Spec

#: Seconds that a chunk is to take: long against what handing it out costs, short against a sweep.
CHUNK_SECONDS = 0.5
#: Cases of a chunk at most.
MOST_IN_CHUNK = 256
#: Chunks handed out for each worker: one that runs, one that waits.
AHEAD = 2
#: Deaths after which a case gets the verdict. One by its own fault would do; a kill from outside may be bad luck.
MOST_DEATHS = 3
#: Seconds to wait for a worker that a sweep before has left behind: it stops at its next case.
SETTLING = 30.0
#: Deaths of workers after which a chunk that none of them has begun stops the sweep.
MOST_UNBEGUN = 10
#: Seconds after which progress is told even if nothing was done.
TELL_AGAIN = 5.0
#: Seconds without any worker after which a sweep over a cluster stops; one that ended is started again in a few.
NO_WORKERS = 60.0
#: Damages that a message names.
MOST_NAMED = 3
LOCK = store.LOCK
PROVENANCE = store.PROVENANCE

Item = tuple[str, "Case"]


def _has_workers(executor: concurrent.futures.Executor) -> bool:
    """Whether somebody works; an executor that cannot tell has workers of its own."""
    count: Callable[[], int] | None = getattr(executor, "count_workers", None)
    return count is None or count() > 0


class Sweep:
    """One run folder, taken for the time of a sweep.

    Args:
        folder: where it is recorded: new, empty, or that of the same sweep, which is then resumed.
        overwrite: begin anew where the folder holds a run, of whatever kind. It goes when the methods have loaded and not
            before; a folder that holds anything else is refused in any case.
        spec: what to run.
        device: where the methods run.
        time_limit: seconds for one case.
        provenance: where it comes from.

    Raises:
        RequestError: the folder holds something else, or another sweep is writing into it; the time limit is none.
    """

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        *,
        device: str = "cpu",
        time_limit: float = isolation.TIME_LIMIT,
        provenance: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        isolation.check_time_limit(time_limit)
        self.folder, self.spec, self.device, self.time_limit = folder.absolute(), spec, device, time_limit
        self._provenance = dict(provenance or {})
        self.damaged: list[Damage] = []
        #: the folder's provenance as it was before, if this sweep goes on from there
        self._found: dict[str, Any] | None = None
        #: folders that were made for it, the outermost first
        self._made: list[Path] = []
        self._begun = False
        #: method -> digest of the source that its verdicts of this session are of
        self.sources: dict[str, str] = {}
        self._session = uuid.uuid4().hex
        self._lock = -1
        self._own: records.Appender | None = None
        try:
            with self._writing():
                self._take(overwrite)
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"cannot write the run folder {str(self.folder)!r}: {error.strerror or error}. "
                "Name a folder that can be written with --out; what is recorded is kept, and the same command goes on from it"
            ) from error

    def _take(self, overwrite: bool) -> None:
        folder = self.folder
        # These alone are what a sweep leaves that was killed before it began.
        if folder.is_dir() and {entry.name for entry in folder.iterdir()} - {LOCK, f".{PROVENANCE}.tmp"}:
            store.check_replaceable(folder)
        if folder.exists() and not folder.is_dir():
            raise RequestError(f"{str(folder)!r} is a file; expected a folder for the run")
        for place in reversed((folder, *folder.parents)):
            if not place.exists():
                place.mkdir(exist_ok=True)
                self._made.append(place)
        try:
            self._lock = _locked(folder / LOCK)
        except BlockingIOError:
            raise RequestError(
                f"another sweep is writing into {str(folder)!r}; wait for it, or name another folder with --out"
            ) from None
        #: whether a run is there that is to go
        self._anew = overwrite and store.is_run(folder)
        if store.is_run(folder) and not self._anew:
            found = store.read_provenance(folder)
            if found.get("sweep") != self.spec.id or found.get("device") != self.device:
                raise RequestError(
                    f"the folder {str(folder)!r} holds another run ({found.get('command', 'of unknown origin')}); two "
                    "runs are never mixed. Name another folder with --out, or replace that run with --overwrite"
                )
            self._found = found

    def _remove_run(self) -> None:
        """Empty the folder. The provenance stays, since it says what the folder is, until another takes its place."""
        for entry in self.folder.iterdir():
            if entry.name in (LOCK, PROVENANCE):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def begin(self, sources: Mapping[str, str]) -> None:
        """Take the folder over, before the first case.

        Args:
            sources: method -> digest of the source that the verdicts of this session are of.

        Raises:
            RequestError: a method whose verdicts are recorded was edited since; a worker of the sweep before is at a case
                still; the folder cannot be written.
        """
        with self._writing():
            self.sources = dict(sources)
            found = self._found
            self._check_sources()
            self._begun = True
            if self._anew:
                self._remove_run()
            if found is not None:
                self._provenance["resumed"] = [*found.get("resumed", []), self._provenance.get("started")]
                self._provenance["started"] = found.get("started")
            self._write_provenance(sources=self.sources, cases=self.spec.count)
            self._settle_all()

    def _settle_all(self) -> None:
        folder = self.folder
        place = folder / chunk.WORK
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        # From here on, workers that another supervisor has left behind begin nothing any more.
        (place / chunk.SESSION).write_text(self._session)
        for file in store.verdict_files(folder):
            self._settle(file)

    def _settle(self, file: Path) -> None:
        """Wait until the file's writer is done, and cut off what a killed one has left of a line."""
        with file.open("rb+") as opened:
            self._wait_for_writer(file, opened.fileno())
            size = opened.seek(0, os.SEEK_END)
            if not size:
                return
            whole, start = 0, size
            while start and not whole:  # a line may be longer than any part that is read at once
                end, start = start, max(0, start - (1 << 20))
                opened.seek(start)
                if (at := opened.read(end - start).rfind(b"\n")) >= 0:
                    whole = start + at + 1
            if whole != size:
                opened.seek(0)
                line = sum(1 for _ in opened)
                self.damaged.append(Damage(file, line, "it is cut off; the case is run again"))
                opened.truncate(whole)

    def _wait_for_writer(self, file: Path, descriptor: int) -> None:
        end = time.monotonic() + SETTLING
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                if time.monotonic() >= end:
                    raise RequestError(
                        f"{str(file)!r} is held by a worker of a sweep that was broken off, which is at a case still: its "
                        f"name has the host and the process. Wait until that is done, {self.time_limit:g} s at most with "
                        "this --time-limit, or end the process; then give the same command again"
                    ) from None
            time.sleep(0.05)

    def _write_provenance(self, **more: Any) -> None:
        self._provenance |= more
        described = {
            "kind": store.KIND,
            "schema": migrate.SCHEMA,
            "kind_of_run": "sweep",
            "sweep": self.spec.id,
            "device": self.device,
            **self._provenance,
        }
        temporary = self.folder / f".{PROVENANCE}.tmp"
        temporary.write_text(store.provenance_text(described), encoding="utf-8")
        temporary.replace(self.folder / PROVENANCE)

    def run(
        self,
        executor: concurrent.futures.Executor,
        *,
        parallel: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> Result:
        """Run what is not recorded yet.

        Args:
            executor: runs `effattn.run.chunk.run`; its workers see the run folder.
            parallel: how many workers it has.
            progress: called with the number of cases that are done, and of all: before the first, and every few seconds.

        Raises:
            RequestError: the machine cannot run a method, a method whose verdicts are recorded was edited since, or the
                folder cannot be written. What is recorded is kept.
        """
        names = self._load_methods(executor)
        self.begin({spec: executor.submit(work.source, spec).result() for spec in self.spec.methods})
        done = {record.key: None for record in store.read_records(self.folder, self.damaged)}
        resumed = len(done)
        state = _State(self, executor, names, done)
        begun: set[Key] = set()
        items = self._missing(done, begun)
        waiting: dict[concurrent.futures.Future[Any], _Chunk] = {}
        if progress is not None:
            progress(resumed, self.spec.count)
        manned = time.monotonic()
        try:
            while True:
                while len(waiting) < AHEAD * parallel and (next_items := state.next_chunk(items)):
                    future, handed_out = state.submit(next_items)
                    waiting[future] = handed_out
                if not waiting:
                    break
                finished, _ = concurrent.futures.wait(
                    waiting, timeout=TELL_AGAIN, return_when=concurrent.futures.FIRST_COMPLETED
                )
                for future in finished:
                    state.take(future, waiting.pop(future))
                if finished or _has_workers(executor):
                    manned = time.monotonic()
                elif time.monotonic() > manned + NO_WORKERS:
                    raise RequestError(
                        f"there has been no worker for {NO_WORKERS:g} s: all have ended, and none was started again; what Dask "
                        "logged says why. What is recorded is kept. Start some with `dask worker` and give the same command again"
                    )
                if progress is not None:
                    progress(resumed + state.added, self.spec.count)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        with self._writing():
            begun.update(done)
            return self._finish(state, resumed, begun)

    def _load_methods(self, executor: concurrent.futures.Executor) -> dict[str, str]:
        """Load each method in a worker, so that a wrong name is an error before anything runs."""
        names = {}
        for spec in self.spec.methods:
            try:
                executor.submit(work.check_device, self.device).result()
                names[spec] = executor.submit(work.describe, spec).result()["name"]
            except isolation.WorkerDied as died:
                raise RequestError(
                    f"loading the method {spec!r} killed the process: it {isolation.how_it_ended(died.code)}"
                ) from None
        return names

    def _check_sources(self) -> None:
        """Refuse to add verdicts to those of another version of a method."""
        before = {} if self._found is None else self._found.get("sources", {})
        edited = {spec for spec in self.sources if before.get(spec, self.sources[spec]) != self.sources[spec]}
        if edited:  # else nothing is read for it
            edited &= {record.key.spec for record in store.read_records(self.folder, [])}
        if edited:
            raise RequestError(
                f"{_edited(sorted(edited))} verdicts in {str(self.folder)!r} were recorded;"
                " verdicts of two versions are never mixed. Name another folder with --out, begin anew with --overwrite, or"
                " undo the edit"
            )

    def _missing(self, done: Mapping[Key, None], begun: set[Key]) -> Iterator[Item]:
        """The cases that are not recorded yet, each once; their keys go into `begun`."""
        before = set(done)  # what is recorded from now on is begun too
        for spec, case in self.spec.cases():
            key = Key(case.id, spec, self.device)
            if key not in before and key not in begun:
                begun.add(key)
                yield spec, case

    def record(self, line: bytes) -> None:
        """Append a verdict of the supervisor's own."""
        with self._writing():
            if self._own is None:
                self._own = records.Appender(self.folder / f"verdicts-supervisor-{self._session[:8]}.jsonl")
            self._own.append(line)

    def _finish(self, state: _State, resumed: int, lost: set[Key]) -> Result:
        """Count what is recorded; `lost` are the keys that are to be found there."""
        from effattn.run import provenance

        by_spec: dict[tuple[str, str], Tally] = {}
        names: dict[str, str] = {}
        recorded, expected = 0, len(lost)
        damaged: list[Damage] = []
        for record in store.read_records(self.folder, damaged):
            by_spec.setdefault((record.key.spec, record.verdict["case"]["dtype"]), Tally()).add(record)
            names[record.key.spec] = record.verdict["method"]
            recorded += 1
            lost.discard(record.key)
        if lost:
            raise self._lost(
                len(lost), expected, [damage for damage in damaged if damage not in self.damaged], state.files
            )
        # Files of one name in two folders: what the command line calls them tells them apart.
        often = Counter(names.values())
        label = {spec: name if often[name] == 1 else spec for spec, name in names.items()}
        for file in store.verdict_files(self.folder):
            if not file.stat().st_size:
                file.unlink()
        result = Result(
            folder=self.folder,
            tallies={(label[spec], dtype): tally for (spec, dtype), tally in by_spec.items()},
            resumed=resumed,
            added=recorded - resumed,
            same=max(0, self.spec.count - recorded),
            damaged=self.damaged,
            judging=state.judging,
            busy=state.busy,
        )
        self._write_provenance(
            ended=provenance.now(),
            cases=recorded,
            methods=list(self.spec.methods),
            exit_code=result.exit_code,
        )
        shutil.rmtree(self.folder / chunk.WORK, ignore_errors=True)
        (self.folder / LOCK).unlink(missing_ok=True)
        return result

    def _lost(self, lost: int, expected: int, damaged: list[Damage], files: set[str]) -> RequestError:
        """What became of verdicts that were written and are not there."""
        damaged += [
            Damage(self.folder / name, 0, "it was removed")
            for name in sorted(files)
            if not (self.folder / name).exists()
        ]
        told = [str(damage) for damage in damaged[:MOST_NAMED]]
        if len(damaged) > MOST_NAMED:
            told.append(f"and {len(damaged) - MOST_NAMED} more")
        why = "; ".join(told) or "no line is damaged, so some were taken out"
        return RequestError(
            f"{lost} of {expected} verdicts were damaged or removed while the sweep ran, by a method or another program: "
            f"{why}. The others are kept, and the same command runs the lost cases again"
        )

    def close(self) -> None:
        """Let go of the folder. A sweep that has not begun leaves nothing of itself."""
        if not self._begun and self._lock >= 0:
            with contextlib.suppress(OSError):
                (self.folder / LOCK).unlink()
        if not self._begun:
            for place in reversed(self._made):
                with contextlib.suppress(OSError):  # another has taken it meanwhile
                    place.rmdir()
        if self._own is not None:
            self._own.close()
            self._own = None
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def session(self) -> str:
        """What tells this supervisor's chunks from those of another."""
        return self._session


def _edited(specs: Sequence[str]) -> str:
    named = " and ".join(map(repr, specs))
    return f"{named} was edited since its" if len(specs) == 1 else f"{named} were edited since their"


def _locked(file: Path) -> int:
    """A descriptor of the lock, which is held. Raises BlockingIOError where another holds it."""
    while True:
        descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who had it may have removed it since it was opened here; the next would then make another.
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


class _Chunk(NamedTuple):
    """What was handed out, and the name under which a worker claims it."""

    claim: str
    items: list[Item]


class _State:
    """What is going on: chunks that are out, cases that killed, how long cases take."""

    def __init__(
        self,
        sweep: Sweep,
        executor: concurrent.futures.Executor,
        names: dict[str, str],
        done: dict[Key, None],
    ) -> None:
        self._sweep, self._executor, self._names, self._done = sweep, executor, names, done
        self._again: deque[list[Item]] = deque()
        self._deaths: Counter[Key] = Counter()
        #: deaths of workers before they had begun a chunk that begins with the case
        self._unbegun: Counter[Key] = Counter()
        self._tail = _Tail(sweep.folder)
        self._claims = 0
        #: names of the files that workers have written into
        self.files: set[str] = set()
        self._seconds_per_case = CHUNK_SECONDS
        self._folder = str(sweep.folder)
        self.added = 0
        self.judging = self.busy = 0.0

    def next_chunk(self, items: Iterator[Item]) -> list[Item]:
        if self._again:
            return self._again.popleft()
        size = max(1, min(MOST_IN_CHUNK, int(CHUNK_SECONDS / self._seconds_per_case)))
        return list(itertools.islice(items, size))

    def submit(self, items: list[Item]) -> tuple[concurrent.futures.Future[Any], _Chunk]:
        self._claims += 1
        chunked = _Chunk(f"{self._sweep.session[:8]}-{self._claims}", items)
        limit = self._sweep.time_limit
        arguments = (
            self._folder,
            self._sweep.session,
            chunked.claim,
            self._sweep.device,
            limit,
            [(spec, case.to_dict()) for spec, case in items],
            {spec: self._sweep.sources[spec] for spec, _ in items},
        )
        if isinstance(self._executor, isolation.IsolatedExecutor):
            backstop = (limit + isolation.GRACE) * len(items)
            return self._executor.submit(chunk.run, *arguments, backstop=backstop), chunked
        try:
            return self._executor.submit(chunk.run, *arguments, True), chunked
        except concurrent.futures.BrokenExecutor as error:
            raise _broken(error) from error

    def take(self, future: concurrent.futures.Future[Any], handed_out: _Chunk) -> None:
        """Account for a chunk that came back, one way or the other."""
        died: isolation.WorkerDied | None = None
        try:
            told = future.result()
        except RequestError:
            raise
        except isolation.WorkerDied as error:
            died, told = error, {}
        except (concurrent.futures.CancelledError, asyncio.CancelledError) as lost:
            raise RequestError(
                "the executor has cancelled what it was given, so it is gone; what is recorded is kept, and the same "
                "command goes on from there"
            ) from lost
        except Exception as error:
            if not _is_death(error):
                raise _broken(error) from error
            told = {}
        if "refused" in told:
            raise RequestError(
                f"{told['refused']}. No method is to blame; what is recorded is kept, and the same command goes on from there"
            )
        if "cases" in told:
            self.files.add(told["file"])
            self.added += told["cases"]
            self.judging += told["judging"]
            self.busy += told["seconds"]
            latest = told["seconds"] / told["cases"]
            self._seconds_per_case += 0.3 * (latest - self._seconds_per_case)
            return
        # Its worker has died, or another did that had claimed it, after which the executor gave it out again.
        with self._sweep._writing():
            self._recover(handed_out, died)

    def _recover(self, handed_out: _Chunk, died: isolation.WorkerDied | None) -> None:
        """Account for a chunk whose worker has died: `died` says how, where the executor knows."""
        items = handed_out.items
        told = chunk.death(self._sweep.folder, handed_out.claim)
        self._done.update(dict.fromkeys(self._tail.read()))
        device = self._sweep.device
        left = [item for item in items if Key(item[1].id, item[0], device) not in self._done]
        self.added += len(items) - len(left)
        if not left:
            return
        spec, case = left[0]
        key = Key(case.id, spec, device)
        if told is None:
            # It waited at a worker that died over something else.
            self._unbegun[key] += 1
            if self._unbegun[key] >= MOST_UNBEGUN:
                raise RequestError(
                    f"{MOST_UNBEGUN} workers died before they had begun what they were given, so no method is to blame; see what "
                    "they say, and start them again. What is recorded is kept, and the same command goes on from there"
                )
            self._again.append(left)
            return
        died = died or told
        self._deaths[key] += 1
        if self._is_to_blame(key, died.code):
            verdict = isolation.verdict_of_death(
                case,
                died,
                name=self._names[spec],
                spec=spec,
                device=device,
                time_limit=self._sweep.time_limit,
            )
            self._sweep.record(records.encode(verdict, spec=spec, device=device))
            self._done[key] = None
            self.added += 1
        else:
            self._again.append([left[0]])
        if left[1:]:
            self._again.append(left[1:])

    def _is_to_blame(self, key: Key, code: int | None) -> bool:
        """Whether the case itself ended the worker, and not somebody else."""
        if code == -signal.SIGALRM:
            return True
        from_outside = code in (None, -signal.SIGKILL, -signal.SIGTERM)
        return self._deaths[key] >= (MOST_DEATHS if from_outside else 2)


def _is_death(error: Exception) -> bool:
    """Whether this is Dask's word for a chunk whose workers have died, one after the other."""
    return type(error).__name__ == "KilledWorker" and type(error).__module__.startswith("distributed")


def _broken(error: Exception) -> RequestError:
    """What stops a sweep and is no method's verdict: the worker could not run the chunk, or could not be reached."""
    text = str(error).strip()
    last = text.rpartition("\n")[2]
    cause = last if isinstance(error, isolation.WorkerFault) else f"{type(error).__name__}: {last}"
    told = f"\n{text}" if last != text else ""
    return RequestError(
        f"a worker failed, and did not die: {cause}. That is no verdict on a method, but a method may have changed what its "
        "process needs, sys.path for one; start the workers again. What is recorded is kept, and the same command goes on "
        f"from there{told}"
    )


class _Tail:
    """Reads what has come into the files of a run since it was read last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ends: dict[Path, int] = {}

    def read(self) -> list[Key]:
        """The keys of the whole records that are new."""
        keys = []
        for file in store.verdict_files(self._folder):
            end = self._ends.get(file, 0)
            for line in records.lines(file, start=end):
                if not line.endswith(b"\n"):
                    break
                end += len(line)
                with contextlib.suppress(ValueError):
                    keys.append(records.decode(line).key)
            self._ends[file] = end
        return keys
