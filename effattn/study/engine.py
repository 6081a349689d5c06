"""Runs the draws of a study, keeps each as a line of a CSV file, and takes up where it was interrupted.

A study is a list of jobs and a function that measures one. A job's row is written and flushed when it is measured;
a row that an interruption cut short is dropped and measured again. So no draw is lost and none is repeated. The
folder remembers what was asked for, and refuses to mix it with something else and to be written by two at once.

Each line ends with the CRC-32 of what stands before it, in the column `crc32`. A line that doesn't match is named,
dropped and measured again: one wrong digit would otherwise be a draw like any other.

Schema 1 (before any release): no column `crc32`. It is read as it is; who goes on with such a study writes the
file anew with checksums first.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from effattn.errors import RequestError
from effattn.run.records import Damage

DRAWS = "draws.csv"
STUDY = "study.json"
#: The version that is written, and the newest that is read.
SCHEMA = 2
#: the column of checksums
CHECK = "crc32"

#: Measures one job; the names are columns of the table.
Measure = Callable[["Job"], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, order=True)
class Point:
    """What one curve's point is: everything but the draw."""

    part: str = "error"  #: which experiment of the study
    n: int  #: sequence length
    head_dim: int
    values: str = "normal"
    input_scale: float = 1.0  #: q and k are multiplied by it
    dtype: str = "fp32"
    causal: bool = False
    method: str
    size: int = 0  #: rank k, features m; 0 where there is none


@dataclass(frozen=True, kw_only=True, order=True)
class Job:
    """One draw at one point."""

    point: Point
    draw: int

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the job's row."""
        return (*(str(value) for value in asdict(self.point).values()), str(self.draw))

    def seed(self, *words: object) -> int:
        """A seed of 63 bits for a generator, from the draw and these words alone."""
        import hashlib

        text = "/".join(map(str, ("effattn/study", self.draw, *words)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured job."""

    job: Job
    measures: dict[str, float]


_KEYS = (*(field.name for field in fields(Point)), "draw")


def row_from(header: Sequence[str], line: Sequence[str]) -> Row:
    """A row from a line of the CSV file. ValueError or KeyError for one that no study wrote."""
    record = dict(zip(header, line, strict=True))
    point = Point(
        part=record["part"], n=int(record["n"]), head_dim=int(record["head_dim"]), values=record["values"],
        input_scale=float(record["input_scale"]), dtype=record["dtype"], causal=record["causal"] == "True",
        method=record["method"], size=int(record["size"]),
    )  # fmt: skip
    measures = {name: float(text) for name, text in record.items() if name not in _KEYS and text != ""}
    return Row(job=Job(point=point, draw=int(record["draw"])), measures=measures)


def _text(cells: Sequence[object]) -> str:
    """Cells as a line of CSV, without its end."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()


def _checked(cells: Sequence[object]) -> str:
    """Cells and their checksum as a whole line."""
    text = _text(cells)
    return f"{text},{zlib.crc32(text.encode()):08x}\n"


class Draws(NamedTuple):
    """What a file of draws holds."""

    header: tuple[str, ...]  #: columns, without that of checksums; empty if there is no whole line
    rows: list[Row]
    damaged: list[Damage]
    #: whether it is as this effattn leaves it: lines with checksums, none of them damaged or cut off
    tidy: bool


def read_draws(path: Path, *, schema: int = 1) -> Draws:
    """The draws in a file that a study with this schema wrote; what is damaged is named, and left out.

    A last line without its end is left out silently: it is being written, or was when the power went.

    Raises:
        OSError: the file can't be read.
        RequestError: its first line isn't that of a table of draws.
    """
    data = path.read_bytes()
    lines = data.split(b"\n")
    cut_off = lines.pop() != b""
    if not lines:
        return Draws((), [], [], tidy=not data)
    header = tuple(lines[0].decode("utf-8", "replace").split(","))
    with_checks = header[-1] == CHECK
    if header[: len(_KEYS)] != _KEYS or (schema > 1 and not with_checks):
        raise RequestError(
            f"{str(path)!r} cannot be read: its first line is not that of a table of draws, or it is damaged"
        )
    header = header[:-1] if with_checks else header
    rows: list[Row] = []
    damaged: list[Damage] = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(_decode(header, line, with_checks=with_checks))
        except ValueError as error:
            damaged.append(Damage(path, number, str(error)))
    return Draws(header, rows, damaged, tidy=with_checks and not cut_off and not damaged)


def _decode(header: Sequence[str], line: bytes, *, with_checks: bool) -> Row:
    """The row of a line. Raises ValueError, in words, where it is damaged."""
    if with_checks:
        line, _, check = line.rpartition(b",")
        if check != b"%08x" % zlib.crc32(line):
            raise ValueError("its checksum does not match")
    try:
        (cells,) = csv.reader([line.decode("utf-8")])
        return row_from(header, cells)
    except (ValueError, KeyError, csv.Error):
        raise ValueError("it has another form than a draw") from None


def _edited(found: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """The files of two requests that differ in nothing but the contents of these."""
    mine, theirs = ({**request, "schema": SCHEMA} for request in (asked, found))
    now, before = mine.pop("sources", {}), theirs.pop("sources", {})
    return [name for name in now if now[name] != before.get(name)] if mine == theirs else []


class Store:
    """The rows of a study in its folder. RequestError if the folder holds something else or can't be written."""

    rows: dict[tuple[str, ...], Row]
    #: lines that were dropped; `run` measures them again
    damaged: list[Damage]

    def __init__(self, folder: Path, request: Mapping[str, Any], columns: Sequence[str]) -> None:
        self.folder = folder
        self.columns = tuple(columns)
        self._header = (*_KEYS, *self.columns)
        self._schema = SCHEMA
        self._asked = {"kind": "effattn study", "schema": SCHEMA, **request}
        self.rows, self.damaged = {}, []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            ours = self._ours()
        except OSError as error:
            raise self._unusable(error) from None
        if ours:
            self._load()

    def _unusable(self, error: Exception) -> RequestError:
        return RequestError(f"cannot use the folder {self.folder} ({error}); name another one with --out")

    def _ours(self) -> bool:
        """Whether the folder is this study's; if not, it is nobody's: another one's that has no draw, as after a request
        that failed. RequestError if it holds something else."""
        before = self.folder / STUDY
        # An empty one is what a full disk has left.
        if not before.exists() or not before.stat().st_size:
            if any(path != before for path in self.folder.iterdir()):
                raise RequestError(f"{self.folder} holds something already; name an empty folder with --out")
            self._say_what()
            return True
        try:
            found = json.loads(before.read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._unusable(error) from None
        schema = found.pop("schema", None) if isinstance(found, dict) else None
        schema = schema if isinstance(schema, int) else 0
        if schema > SCHEMA:
            raise RequestError(
                f"{self.folder} holds a study of schema {schema}, and this effattn knows {SCHEMA}: take a newer one, or"
                " name another folder with --out"
            )
        asked = json.loads(json.dumps(self._asked))
        if schema >= 1 and {**found, "schema": SCHEMA} == asked:
            self._schema = schema
            return True
        if schema >= 1 and self._without_draws():
            return False
        if edited := _edited(found, asked):
            raise RequestError(
                f"{' and '.join(edited)} was edited since its draws in {self.folder} were recorded. Name another folder"
                " with --out, or delete this one"
            )
        raise RequestError(
            f"{self.folder} holds the draws of another study, see {before}. Name another folder with --out, or"
            " delete this one"
        )

    def _without_draws(self) -> bool:
        """Whether the folder has nothing but study.json and a table without a whole line of a draw."""
        if any(path.name not in (STUDY, DRAWS) for path in self.folder.iterdir()):
            return False
        path = self.folder / DRAWS
        return not path.exists() or path.read_bytes().count(b"\n") <= 1

    def _say_what(self) -> None:
        """Write study.json."""
        temporary = self.folder / f".{STUDY}.{os.getpid()}.tmp"
        try:
            temporary.write_text(json.dumps(self._asked, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.folder / STUDY)
        finally:
            temporary.unlink(missing_ok=True)

    def _load(self) -> bool:
        """Take in what the file holds. Returns whether it can be appended to as it is."""
        path = self.folder / DRAWS
        self.rows, self.damaged = {}, []
        if not path.exists():
            return True
        found = read_draws(path, schema=self._schema)
        if found.header and found.header != self._header:
            raise RequestError(
                f"{path} has other columns than this effattn writes, or its first line is damaged; name another folder"
                " with --out"
            )
        self.rows = {row.job.key: row for row in found.rows}
        self.damaged = found.damaged
        return found.tidy

    def _line(self, row: Row) -> str:
        cells = [repr(row.measures[name]) if name in row.measures else "" for name in self.columns]
        return _checked([*row.job.key, *cells])

    @contextmanager
    def _writer(self) -> Iterator[Callable[[Row], None]]:
        with ExitStack() as stack:
            file = stack.enter_context(self._locked())
            # Under the lock: nobody measures for a folder that is taken over here, or was since it was looked at.
            if not self._ours():
                file.truncate(0)
                self._say_what()
            if not self._load():
                # The lock on the old file is kept until the end: who waits at either of the two is refused.
                file = stack.enter_context(self._anew())
            elif not os.fstat(file.fileno()).st_size:
                file.write(_text([*self._header, CHECK]) + "\n")

            def write(row: Row) -> None:
                file.write(self._line(row))
                file.flush()
                os.fsync(file.fileno())
                self.rows[row.job.key] = row

            yield write

    def _locked(self) -> TextIO:
        """The file of draws, to append to. RequestError where another process has it."""
        path = self.folder / DRAWS
        while True:
            file = path.open("a", encoding="utf-8", newline="")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another one may have put a new file in its place between the two lines above.
                if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                    return file
            except BlockingIOError:
                file.close()
                raise RequestError(
                    f"another study is writing into {self.folder}; wait for it, or name another folder with --out"
                ) from None
            except BaseException:
                file.close()
                raise
            file.close()

    def _anew(self) -> TextIO:
        """Write what is whole into a new file in the place of the old one. Returns it, locked, to append to."""
        temporary = self.folder / f".{DRAWS}.{os.getpid()}.tmp"
        file = temporary.open("w", encoding="utf-8", newline="")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(_text([*self._header, CHECK]) + "\n")
            file.writelines(map(self._line, self.rows.values()))
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(self.folder / DRAWS)
            if self._schema != SCHEMA:
                self._say_what()
                self._schema = SCHEMA
        except BaseException:
            file.close()
            temporary.unlink(missing_ok=True)
            raise
        return file

    def run(
        self, jobs: Sequence[Job], measure: Measure, progress: Callable[[Job], None] | None = None
    ) -> list[Row]:
        """Measure the jobs that have no row yet, in order. Returns the rows of all of them."""
        with self._writer() as write:
            for job in jobs:
                if job.key not in self.rows:
                    measures = {name: float(value) for name, value in measure(job).items()}
                    unknown = measures.keys() - set(self.columns)
                    assert not unknown, f"measures without a column: {unknown}"
                    write(Row(job=job, measures=measures))
                if progress is not None:
                    progress(job)
        return [self.rows[job.key] for job in jobs]


def by_point(rows: Sequence[Row]) -> dict[Point, list[Row]]:
    """The rows of each point, in the order of draws."""
    groups: dict[Point, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.job):
        groups.setdefault(row.job.point, []).append(row)
    return groups
