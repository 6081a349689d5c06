"""Runs the draws of a study, keeps each as a line of a CSV file, and takes up where it was interrupted.

A study is a list of jobs and a function that measures one. A job's row is written and flushed when it is measured;
a row that an interruption cut short is dropped and measured again. So no draw is lost and none is repeated. The
folder remembers what was asked for, and refuses to mix it with something else and to be written by two at once.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from effattn.errors import RequestError

DRAWS = "draws.csv"
STUDY = "study.json"
SCHEMA = 1

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


class Store:
    """The rows of a study in its folder. RequestError if the folder holds something else or can't be written."""

    def __init__(self, folder: Path, request: Mapping[str, Any], columns: Sequence[str]) -> None:
        self.folder = folder
        self.columns = tuple(columns)
        self._header = (*_KEYS, *self.columns)
        asked = {"kind": "effattn study", "schema": SCHEMA, **request}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            before = folder / STUDY
            # An empty one is what a full disk has left.
            if before.exists() and before.stat().st_size:
                if json.loads(before.read_text(encoding="utf-8")) != json.loads(json.dumps(asked)):
                    raise RequestError(
                        f"{folder} holds the draws of another study, see {before}. Name another folder with --out, or"
                        " delete this one"
                    )
            elif any(path != before for path in folder.iterdir()):
                raise RequestError(f"{folder} holds something already; name an empty folder with --out")
            else:
                temporary = folder / f".{STUDY}.{os.getpid()}.tmp"
                try:
                    temporary.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
                    temporary.replace(before)
                finally:
                    temporary.unlink(missing_ok=True)
        except (OSError, json.JSONDecodeError) as error:
            raise RequestError(
                f"cannot use the folder {folder} ({error}); name another one with --out"
            ) from None
        self.rows = self._load()

    def _load(self, *, mend: bool = False) -> dict[tuple[str, ...], Row]:
        """The whole rows. `mend` cuts off what is left of a last one: for whoever holds the lock."""
        path = self.folder / DRAWS
        if not path.exists():
            return {}
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if mend and len(whole) < len(data):
            os.truncate(path, len(whole))
        lines = list(csv.reader(io.StringIO(whole.decode("utf-8"))))
        if lines and tuple(lines[0]) != self._header:
            raise RequestError(
                f"{path} has other columns than this effattn writes; name another folder with --out"
            )
        rows: dict[tuple[str, ...], Row] = {}
        for line in lines[1:]:
            row = row_from(self._header, line)
            rows[row.job.key] = row
        return rows

    @contextmanager
    def _writer(self) -> Iterator[Callable[[Row], None]]:
        path = self.folder / DRAWS
        with path.open("a", encoding="utf-8", newline="") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestError(
                    f"another study is writing into {self.folder}; wait for it, or name another folder with --out"
                ) from None
            self.rows = self._load(mend=True)
            writer = csv.writer(file, lineterminator="\n")
            if path.stat().st_size == 0:
                writer.writerow(self._header)

            def write(row: Row) -> None:
                text = [repr(row.measures[name]) if name in row.measures else "" for name in self.columns]
                writer.writerow([*row.job.key, *text])
                file.flush()
                os.fsync(file.fileno())
                self.rows[row.job.key] = row

            yield write

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
