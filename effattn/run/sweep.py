"""The supervisor of a sweep: hands cases out, keeps count, and takes up where another was killed.

It runs over any `concurrent.futures.Executor`. Each case is recorded exactly once, by the worker that judged it, in a
file of that worker's own; the supervisor writes only the verdicts on cases that killed their worker. What it knows is
in the run folder:

    provenance.json    which specification, digests of the methods' sources, started, and at the end ended
    lock               held by the supervisor (`store.LOCK`): a second one in the same folder is refused
    work/              the session and the chunks that were begun (`effattn.run.chunk`); gone at the end

Chunks run in order, so the first case of a chunk that has no verdict when its worker has died is the one it died over.
It is tried again alone; where that kills again, the case gets the verdict.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError
from effattn.report import summary
from effattn.run import chunk, isolation, migrate, records, store, work
from effattn.run.records import Damage, Key

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
LOCK = store.LOCK
PROVENANCE = store.PROVENANCE

Item = tuple[str, "Case"]


@dataclass
class Tally:
    """What is known of one method in one dtype, added up as the verdicts come."""

    outcomes: Counter[str] = field(default_factory=Counter)
    #: the largest error/bound, and on which case
    fraction: float | None = None
    worst: str = ""
    #: a failed case, as the command line names it, and its method: that of the largest error/bound, if one has any
    failing: tuple[str, str] | None = None
    _failing_fraction: float = -1.0

    def add(self, record: records.Record) -> None:
        """Add one record."""
        self.outcomes[record.verdict["outcome"]] += 1
        largest = -1.0
        for quantity in record.verdict["quantities"]:
            given = quantity.get("fraction")
            if given is None:
                continue
            found = float(given)
            found = float("inf") if found != found else found
            largest = max(largest, found)
            if self.fraction is None or found > self.fraction:
                self.fraction, self.worst = found, record.key.case_id
        if summary.failed(record.verdict["outcome"]) and (
            self.failing is None or largest > self._failing_fraction
        ):
            self.failing, self._failing_fraction = (record.key.case_id, record.key.spec), largest

    @property
    def failed(self) -> int:
        """Verdicts against the method."""
        return sum(n for outcome, n in self.outcomes.items() if summary.failed(outcome))

    @property
    def judged(self) -> int:
        """Verdicts that passed or failed."""
        return sum(n for outcome, n in self.outcomes.items() if outcome not in summary.SET_ASIDE)


@dataclass
class Result:
    """What came out of a sweep."""

    folder: Path
    #: (method, dtype) -> what is known
    tallies: dict[tuple[str, str], Tally]
    #: verdicts that were there before, and that this call added
    resumed: int
    added: int
    #: combinations that are the same case as another, which was run once
    same: int
    #: lines that were damaged, whose cases have been run again
    damaged: list[Damage]
    #: seconds in which workers were judging, and in which they were busy
    judging: float
    busy: float

    @property
    def exit_code(self) -> int:
        """0 pass, 1 a method failed, 2 nothing was judged."""
        if any(tally.failed for tally in self.tallies.values()):
            return 1
        return 0 if any(tally.judged for tally in self.tallies.values()) else 2


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
        RequestError: the folder holds something else, or another sweep is writing into it.
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
        self.folder, self.spec, self.device, self.time_limit = folder.absolute(), spec, device, time_limit
        self._provenance = dict(provenance or {})
        self.damaged: list[Damage] = []
        #: the folder's provenance.json as it was before
        self._found: str | None = None
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
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = _locked(folder / LOCK)
        except BlockingIOError:
            raise RequestError(
                f"another sweep is writing into {str(folder)!r}; wait for it, or name another folder with --out"
            ) from None
        #: whether a run is there that is to go
        self._anew = overwrite and store.is_run(folder)
        if not self._anew:
            self._begin()

    def _remove_run(self) -> None:
        """Empty the folder. The provenance stays, since it says what the folder is, until another takes its place."""
        for entry in self.folder.iterdir():
            if entry.name in (LOCK, PROVENANCE):
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def _begin(self) -> None:
        folder = self.folder
        if store.is_run(folder) and not self._anew:
            found = store.read_provenance(folder)
            if found.get("sweep") != self.spec.id or found.get("device") != self.device:
                raise RequestError(
                    f"the folder {str(folder)!r} holds another run ({found.get('command', 'of unknown origin')}); two "
                    "runs are never mixed. Name another folder with --out, or replace that run with --overwrite"
                )
            self._provenance["resumed"] = [*found.get("resumed", []), self._provenance.get("started")]
            self._provenance["started"] = found.get("started")
            self._found = (folder / PROVENANCE).read_text(encoding="utf-8")
            self._provenance["sources"] = found.get("sources", {})
        self._write_provenance()
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
            fcntl.flock(opened, fcntl.LOCK_EX)
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
        self._replace_provenance(store.provenance_text(described))

    def _replace_provenance(self, text: str) -> None:
        temporary = self.folder / f".{PROVENANCE}.tmp"
        temporary.write_text(text, encoding="utf-8")
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
            progress: called with the number of cases that are done, and of all.

        Raises:
            RequestError: the machine cannot run a method, a method whose verdicts are recorded was edited since, or the
                folder cannot be written. What is recorded is kept.
        """
        names = self._load_methods(executor)
        if self._anew:
            with self._writing():
                self._remove_run()
                self._begin()
        done = {record.key: None for record in store.read_records(self.folder, self.damaged)}
        with self._writing():
            self._check_sources(executor, {key.spec for key in done})
        resumed = len(done)
        state = _State(self, executor, names, done)
        begun: set[Key] = set()
        items = self._missing(done, begun)
        waiting: dict[concurrent.futures.Future[Any], list[Item]] = {}
        try:
            while True:
                while len(waiting) < AHEAD * parallel and (next_items := state.next_chunk(items)):
                    waiting[state.submit(next_items)] = next_items
                if not waiting:
                    break
                finished, _ = concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    state.take(future, waiting.pop(future))
                if progress is not None:
                    progress(resumed + state.added, self.spec.count)
        except BaseException:
            for future in waiting:
                future.cancel()
            raise
        with self._writing():
            return self._finish(state, resumed, expected=resumed + len(begun))

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

    def _check_sources(self, executor: concurrent.futures.Executor, recorded: set[str]) -> None:
        """Record what each method is made of; refuse to add verdicts to those of another version of it."""
        sources = {spec: executor.submit(work.source, spec).result() for spec in self.spec.methods}
        before = self._provenance.get("sources", {})
        edited = [
            spec for spec in sources if spec in recorded and before.get(spec, sources[spec]) != sources[spec]
        ]
        if edited:
            assert self._found is not None
            self._replace_provenance(self._found)
            shutil.rmtree(self.folder / chunk.WORK, ignore_errors=True)
            raise RequestError(
                f"{' and '.join(map(repr, edited))} was edited since its verdicts in {str(self.folder)!r} were recorded;"
                " verdicts of two versions are never mixed. Name another folder with --out, begin anew with --overwrite, or"
                " undo the edit"
            )
        self.sources = sources
        self._write_provenance(sources=sources)

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

    def _finish(self, state: _State, resumed: int, *, expected: int) -> Result:
        from effattn.run import provenance

        tallies: dict[tuple[str, str], Tally] = {}
        recorded = 0
        for record in store.read_records(self.folder, []):
            label = (record.verdict["method"], record.verdict["case"]["dtype"])
            tallies.setdefault(label, Tally()).add(record)
            recorded += 1
        if recorded != expected:
            raise AssertionError(f"{recorded} cases are recorded in {self.folder}, and {expected} were begun")
        for file in store.verdict_files(self.folder):
            if not file.stat().st_size:
                file.unlink()
        result = Result(
            folder=self.folder,
            tallies=tallies,
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

    def close(self) -> None:
        """Let go of the folder."""
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
        self._tail = _Tail(sweep.folder)
        self._claims = 0
        self._seconds_per_case = CHUNK_SECONDS
        self._folder = str(sweep.folder)
        self.added = 0
        self.judging = self.busy = 0.0

    def next_chunk(self, items: Iterator[Item]) -> list[Item]:
        if self._again:
            return self._again.popleft()
        size = max(1, min(MOST_IN_CHUNK, int(CHUNK_SECONDS / self._seconds_per_case)))
        return list(itertools.islice(items, size))

    def submit(self, items: list[Item]) -> concurrent.futures.Future[Any]:
        self._claims += 1
        limit = self._sweep.time_limit
        arguments = (
            self._folder,
            self._sweep.session,
            f"{self._sweep.session[:8]}-{self._claims}",
            self._sweep.device,
            limit,
            [(spec, case.to_dict()) for spec, case in items],
            {spec: self._sweep.sources[spec] for spec, _ in items},
        )
        if isinstance(self._executor, isolation.IsolatedExecutor):
            return self._executor.submit(
                chunk.run, *arguments, backstop=(limit + isolation.GRACE) * len(items)
            )
        return self._executor.submit(chunk.run, *arguments)

    def take(self, future: concurrent.futures.Future[Any], items: list[Item]) -> None:
        """Account for a chunk that came back, one way or the other."""
        error: BaseException | None = None
        try:
            told = future.result()
        except (RequestError, isolation.WorkerFault, KeyboardInterrupt):
            raise
        except concurrent.futures.CancelledError as lost:
            raise RequestError(
                "the executor has cancelled what it was given, so it is gone; what is recorded is kept, and the same "
                "command goes on from there"
            ) from lost
        except BaseException as died:  # each executor has its own words for a worker that died
            error, told = died, {}
        if "cases" in told:
            self.added += told["cases"]
            self.judging += told["judging"]
            self.busy += told["seconds"]
            latest = told["seconds"] / told["cases"]
            self._seconds_per_case += 0.3 * (latest - self._seconds_per_case)
            return
        self._recover(items, error)

    def _recover(self, items: list[Item], error: BaseException | None) -> None:
        self._done.update(dict.fromkeys(self._tail.read()))
        device = self._sweep.device
        left = [item for item in items if Key(item[1].id, item[0], device) not in self._done]
        self.added += len(items) - len(left)
        if not left:
            return
        spec, case = left[0]
        key = Key(case.id, spec, device)
        self._deaths[key] += 1
        if self._is_to_blame(key, error):
            died = error if isinstance(error, isolation.WorkerDied) else isolation.WorkerDied(-signal.SIGKILL)
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

    def _is_to_blame(self, key: Key, error: BaseException | None) -> bool:
        """Whether the case itself ended the worker, and not somebody else."""
        deaths = self._deaths[key]
        if isinstance(error, isolation.WorkerDied):
            if error.code == -signal.SIGALRM:
                return True
            if error.code not in (-signal.SIGKILL, -signal.SIGTERM):
                return deaths >= 2
        return deaths >= MOST_DEATHS


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
