"""Runs as tables: `compact` makes a Parquet file of a run, `query` answers SQL about one or more.

The Parquet file has what a table of verdicts is asked about, and stays small: 32-bit numbers, messages of failures only.
The records stay what they are. DuckDB (extra `report`) reads and writes it.

A table is used again where it is what was written and was made of the records that are there now: it has a CRC-32 of
itself, and sizes and CRC-32s of the files of records. Both are worked out whenever it is opened; otherwise it is made anew.

A query runs on a connection that can change nothing: one SELECT, no files but the runs' own tables, and settings that
can not be changed back. What it may take of time, memory and disk is limited.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import stat
import tempfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError
from effattn.run import records, store
from effattn.run.records import Damage, Key

if TYPE_CHECKING:
    import duckdb

PARQUET = "verdicts.parquet"
#: What DuckDB may use; a compaction spills to the disk beyond that.
MEMORY = "600MB"
#: What DuckDB may write beside that for a while.
SPILL = "4GB"
#: Seconds that a query may take.
TIMEOUT = 60.0
#: Rows that are answered at most; they are held in memory.
MOST_ROWS = 1_000_000
#: Rows that are fetched at once.
_FETCHED = 10_000
#: Damaged lines that a Parquet file tells of. One of a run with more is made anew each time, which names them all.
_MOST_DAMAGES = 1000
#: What is in a Parquet file before its checksum: a key and the length of its value, as Thrift's compact protocol has them.
_CHECKSUM = b"effattn_crc32\x18\x08"
_NO_CHECKSUM = b"00000000"
_READ = 1 << 20

_QUANTITY = (
    "STRUCT(name VARCHAR, count BIGINT, set_aside BIGINT, fraction VARCHAR, bit_equal VARCHAR, ulp_p50 VARCHAR,"
    " ulp_p99 VARCHAR, ulp_max VARCHAR, z_rms VARCHAR, z_max VARCHAR, z_mean VARCHAR, worst BIGINT[])"
)
#: The types of a body as JSON has them; numbers are VARCHAR where they may be "inf" or "nan".
_BODY = f"""STRUCT(id VARCHAR, spec VARCHAR, device VARCHAR, verdict STRUCT(
    "case" JSON, "method" VARCHAR, law VARCHAR, outcome VARCHAR, message VARCHAR, quantities {_QUANTITY}[],
    findings STRUCT(name VARCHAR)[], seconds MAP(VARCHAR, VARCHAR)))"""

#: The fields of a case, each a column, with type and what they are where a case does not say.
_CASE = (
    ("batch", "UINTEGER", "1"),
    ("heads", "UINTEGER", "1"),
    ("kv_heads", "UINTEGER", "heads"),
    ("q_len", "UINTEGER", "NULL"),
    ("kv_len", "UINTEGER", "NULL"),
    ("head_dim", "UINTEGER", "NULL"),
    ("v_dim", "UINTEGER", "head_dim"),
    ("dtype", "VARCHAR", "NULL"),
    ("causal", "VARCHAR", "'none'"),
    ("scale", "DOUBLE", "NULL"),
    ("window", "INTEGER[]", "NULL"),
    ("softcap", "DOUBLE", "NULL"),
    ("alibi", "VARCHAR", "'none'"),
    ("bias", "VARCHAR", "'none'"),
    ("mask", "VARCHAR", "'none'"),
    ("sinks", "BOOLEAN", "false"),
    ("lengths", "VARCHAR", "'none'"),
    ("dropout", "DOUBLE", "0"),
    ("backward", "BOOLEAN", "false"),
    ("layout", "VARCHAR", "'bhsd'"),
    ("values", "VARCHAR", "'normal'"),
    ("seed", "UBIGINT", "0"),
)
_NUMBERS = ("fraction", "bit_equal", "ulp_p50", "ulp_p99", "ulp_max", "z_rms", "z_max", "z_mean")


class NoVerdicts(RequestError):
    """A run of which there is nothing to read, such as that of a sweep that was broken off at its start.

    `damaged` has what is there and cannot be read.
    """

    def __init__(self, folder: Path, damaged: list[Damage]) -> None:
        that = " that can be read" if any(damage.line for damage in damaged) else ""
        super().__init__(f"the run {str(folder)!r} has no verdicts{that}; there is nothing to compact")
        self.damaged = damaged


@dataclass(frozen=True)
class Compacted:
    """What `compact` made."""

    file: Path
    rows: int
    size: int
    damaged: list[Damage]


def _select(source: str) -> str:
    def case(name: str, kind: str, default: str) -> str:
        default = {"heads": "COALESCE((v.\"case\"->>'heads')::UINTEGER, 1)",
                   "head_dim": "(v.\"case\"->>'head_dim')::UINTEGER"}.get(default, default)  # fmt: skip
        told = f"v.\"case\"->>'{name}'"
        if kind.endswith("[]"):  # a window may be one number, which stands for both of its sides
            told = (
                f"CASE WHEN ({told}) LIKE '[%' THEN {told} ELSE '[' || ({told}) || ',' || ({told}) || ']' END"
            )
        return f'COALESCE(({told})::{kind}, {default}) AS "{name}"'

    def of(quantity: str, name: str) -> str:
        return f"list_filter(v.quantities, lambda q: q.name = '{quantity}')[1].{name}"

    columns = [
        "body.id AS case_id",
        "body.spec AS spec",
        "body.device AS device",
        'v."method" AS "method"',
        "v.law AS law",
        "v.outcome AS outcome",
        "CASE WHEN v.outcome <> 'pass' THEN v.message END AS message",
        *(case(*field) for field in _CASE),
        'v."case"::VARCHAR AS recipe',
        "list_max(list_transform(v.quantities, lambda q: q.fraction::REAL)) AS fraction",
        f"{of('out', 'count')} AS count",
        f"{of('out', 'set_aside')} AS set_aside",
        f"{of('out', 'fraction')}::REAL AS out_fraction",
        *(f"{of('out', name)}::REAL AS {name}" for name in _NUMBERS[1:]),
        f"{of('out', 'worst')}::INTEGER[] AS worst",
        "map_from_entries(list_transform(list_filter(v.quantities, lambda q: q.name <> 'out'),"
        " lambda q: {'k': q.name, 'v': q.fraction::REAL})) AS other_fractions",
        "list_transform(v.findings, lambda f: f.name) AS findings",
        "COALESCE(list_sum(list_transform(map_values(v.seconds), lambda s: s::REAL)), 0)::REAL AS seconds",
        "COALESCE(v.seconds['method']::REAL, 0) AS method_seconds",
    ]
    return f"SELECT {', '.join(columns)} FROM (SELECT body, body.verdict AS v FROM {source})"


def compact(folder: Path, *, into: Path | None = None) -> Compacted:
    """Write the run's verdicts as a Parquet file, in the folder or at `into`.

    Raises:
        RequestError: the folder is no run, it has no verdicts (`NoVerdicts`), or the file cannot be written.
    """
    damaged: list[Damage] = []
    target = folder / PARQUET if into is None else into
    with contextlib.ExitStack() as stack:
        try:
            links = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effattn-")))
            place = Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=".compact-"))
            )
            scratch = _reached(place, links)
            # Before they are read: a table of records that grow meanwhile is of what is no longer there.
            origin = _origin(folder)
            files, rows = _whole(folder, scratch, damaged)
            if not rows:
                raise NoVerdicts(folder, damaged)
            connection = stack.enter_context(_connect(scratch))
            made = scratch / PARQUET
            source = f"read_json({_list(files)}, format='newline_delimited', columns={{'body': '{_BODY}'}})"
            told = {"effattn_origin": origin, "effattn_damaged": _told(damaged)}
            pairs = "".join(f"{name}: {_text(value)}, " for name, value in told.items())
            connection.execute(
                f"COPY ({_select(source)} ORDER BY spec, dtype, outcome)"
                f" TO {_text(made)} (FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE 60000,"
                f" KV_METADATA {{{pairs}effattn_crc32: '{_NO_CHECKSUM.decode()}'}})"
            )
            _seal(made)
            size = made.stat().st_size
            made.replace(target)
        except OSError as error:
            raise RequestError(
                f"cannot write {str(target)!r}: {error.strerror or error}; the run itself is untouched"
            ) from error
        except _duckdb_errors() as error:  # a full disk among them
            raise RequestError(
                f"cannot write {str(target)!r}: {error}; the run itself is untouched"
            ) from error
    return Compacted(target, rows, size, damaged)


def _reached(folder: Path, links: Path) -> Path:
    """The folder by a path that DuckDB takes: UTF-8, so a link in `links` where a name has other bytes."""
    if _is_utf8(folder):
        return folder
    link = links / f"{len(list(links.iterdir()))}"
    link.symlink_to(folder.absolute())
    return link


def _is_utf8(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _duckdb_errors() -> tuple[type[Exception], ...]:
    try:
        import duckdb
    except ImportError:
        return ()
    return (duckdb.Error,)


def _copied(scratch: Path, verdicts: Iterable[tuple[Key, dict[str, Any]]]) -> tuple[list[Path], int]:
    copy, rows = scratch / "whole.jsonl", 0
    with copy.open("w", encoding="utf-8") as out:
        for (case_id, spec, device, _), verdict in verdicts:
            body = {"id": case_id, "spec": spec, "device": device, "verdict": verdict}
            out.write(store.to_json({"body": body}) + "\n")
            rows += 1
    return [copy], rows


def _whole(folder: Path, scratch: Path, damaged: list[Damage]) -> tuple[list[Path], int]:
    """Files that have each good record once, and how many: the run's own, or a copy where those have anything else."""
    found: list[Damage] = []
    schema = store.read_provenance(folder, found)["written_as"]
    files = store.verdict_files(folder)
    # What grows is copied: DuckDB reads the file after it was looked at, and more than that.
    if (
        schema == store.migrate.SCHEMA
        and len(files) == 1
        and _is_utf8(files[0])
        and not store.is_locked(folder)
    ):
        rows = _rows_if_good(files[0])
        if rows is not None:
            damaged += found + store.foreign_files(folder)
            return files, rows
    return _copied(scratch, ((record.key, record.verdict) for record in store.read_records(folder, damaged)))


def _rows_if_good(file: Path) -> int | None:
    """How many records the file has; None where one is damaged, or two are of the same question."""
    seen: set[Key] = set()
    for line in records.lines(file):
        try:
            key = records.decode(line).key
        except ValueError:
            return None
        if key in seen:
            return None
        seen.add(key)
    return len(seen)


def _origin(folder: Path) -> str:
    """What tells that a Parquet file is of the records that are there, as they are read, with these columns."""
    schema = store.read_provenance(folder, [])["written_as"]
    files = [[file.name, *_crc32_of(file)] for file in store.verdict_files(folder)]
    return json.dumps({"columns": zlib.crc32(_select("").encode()), "schema": schema, "files": files})


def _crc32_of(file: Path) -> tuple[int, int]:
    """The size of a file in bytes, and its checksum."""
    size = checksum = 0
    try:
        with file.open("rb") as opened:
            while part := opened.read(_READ):
                size += len(part)
                checksum = zlib.crc32(part, checksum)
    except OSError as error:
        raise RequestError(f"cannot read {str(file)!r}: {error.strerror}") from error
    return size, checksum


def _told(damaged: Sequence[Damage]) -> str:
    """The damaged lines as text that a Parquet file keeps; what else is damaged is looked for when it is opened."""
    told = [[damage.file.name, damage.line, damage.reason] for damage in damaged if damage.line]
    return json.dumps(told if len(told) <= _MOST_DAMAGES else None)


def _seal(file: Path) -> None:
    """Put the checksum of a new Parquet file into it: that of its bytes while the checksum itself is 00000000."""
    table = file.read_bytes()
    place = table.rfind(_CHECKSUM) + len(_CHECKSUM)
    if table[place : place + len(_NO_CHECKSUM)] != _NO_CHECKSUM:
        raise AssertionError("DuckDB wrote the metadata of the table in another form than Parquet has it")
    with file.open("rb+") as opened:
        opened.seek(place)
        opened.write(b"%08x" % zlib.crc32(table))


def _is_whole(file: Path) -> bool:
    """Whether the file is a table that `_seal` was given, unchanged since."""
    table = file.read_bytes()
    place = table.rfind(_CHECKSUM) + len(_CHECKSUM)
    if place < len(_CHECKSUM):
        return False
    end = place + len(_NO_CHECKSUM)
    checksum = zlib.crc32(_NO_CHECKSUM, zlib.crc32(memoryview(table)[:place]))
    return table[place:end] == b"%08x" % zlib.crc32(memoryview(table)[end:], checksum)


@contextlib.contextmanager
def opened(
    folders: Sequence[Path], damaged: list[Damage] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the view `verdicts` of the runs, a column `run` added, that can change nothing any more.

    `damaged` takes what of the runs could not be read, which is left out.

    Raises:
        RequestError: no run has verdicts, or a table cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="effattn-") as scratch, _connect(Path(scratch)) as connection:
        files: list[tuple[str, Path]] = []
        for number, folder in enumerate(folders):
            reached = _reached(folder, Path(scratch))
            file, left_out = reached / PARQUET, _fresh(connection, folder, reached)
            if left_out is None:
                writable = os.access(folder, os.W_OK)
                try:
                    made = compact(folder, into=None if writable else Path(scratch) / f"{number}.parquet")
                except NoVerdicts as error:
                    if damaged is not None:
                        damaged += error.damaged
                        damaged.append(Damage(folder, 0, "it has no verdicts; it is left out"))
                    continue
                file, left_out = file if writable else made.file, made.damaged
            files.append((str(folder).encode("utf-8", "backslashreplace").decode(), file))
            if damaged is not None:
                damaged += left_out
        if not files:
            raise RequestError("there are no verdicts in any of the runs; there is nothing to ask about")
        union = " UNION ALL ".join(
            f"SELECT {_text(name)} AS run, * FROM read_parquet({_text(file)})" for name, file in files
        )
        connection.execute(f"CREATE VIEW verdicts AS {union}")
        connection.execute(f"SET allowed_paths = {_list([file for _, file in files])}")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection


def query(
    sql: str,
    folders: Sequence[Path],
    *,
    most: int = MOST_ROWS,
    timeout: float = TIMEOUT,
    damaged: list[Damage] | None = None,
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Answer one SELECT about the view `verdicts`: names of the columns, and rows.

    Args:
        sql: the statement.
        folders: the runs.
        most: rows that are answered at most.
        timeout: seconds that it may take; what makes the tables before it does not count.
        damaged: takes what of the runs could not be read, which is left out.

    Raises:
        RequestError: it is no SELECT, it is wrong, it asks for anything outside of the runs, it takes longer than `timeout`
            or more memory or disk than there is for it, or its answer has more than `most` rows.
    """
    with opened(folders, damaged) as connection:
        import duckdb

        try:
            sql.encode()
        except UnicodeEncodeError:
            raise RequestError("the query has bytes that are no UTF-8; write it in UTF-8") from None
        try:
            statements = connection.extract_statements(sql)
            if len(statements) != 1:
                raise RequestError(f"{len(statements)} statements; expected one SELECT")
            # Not EXPLAIN either: EXPLAIN ANALYZE executes what it explains, a COPY over the runs' tables, say.
            if statements[0].type != duckdb.StatementType.SELECT:
                raise RequestError(
                    f"a statement of the kind {statements[0].type.name}; expected a SELECT, since runs are only read"
                )
            return _answer(connection, statements[0], most, timeout)
        except duckdb.Error as error:
            raise RequestError(f"the query failed: {error}") from error


def _answer(
    connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement, most: int, timeout: float
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Execute in a thread, so that this one can end it: DuckDB looks neither at a clock nor for Ctrl-C."""
    over = threading.Event()

    def work() -> tuple[list[str], list[tuple[Any, ...]]]:
        answer = connection.execute(statement)
        rows: list[tuple[Any, ...]] = []
        while not over.is_set() and (more := answer.fetchmany(_FETCHED)):
            rows += more
            if len(rows) > most:
                raise RequestError(
                    f"the query has more than {most:,} rows; add LIMIT, or add them up with GROUP BY"
                )
        return [column[0] for column in answer.description or []], rows

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        working = threads.submit(work)
        try:
            return working.result(timeout)
        except TimeoutError:
            raise RequestError(
                f"the query was not done after {timeout:g} s and was ended; narrow it with WHERE or LIMIT, or give it longer "
                "with --timeout"
            ) from None
        finally:
            over.set()
            while not working.done():  # what interrupts a query that has not quite begun is lost
                connection.interrupt()
                concurrent.futures.wait([working], 0.1)


def _fresh(connection: duckdb.DuckDBPyConnection, folder: Path, reached: Path) -> list[Damage] | None:
    """What of the run cannot be read; None where its Parquet file is damaged, or not of what is there now."""
    import duckdb

    damaged: list[Damage] = []
    store.read_provenance(folder, damaged)
    damaged += store.foreign_files(folder)
    file = folder / PARQUET
    try:
        if not stat.S_ISREG(file.lstat().st_mode) or not _is_whole(file):
            return None
        found = dict(
            connection.execute(
                f"SELECT decode(key), decode(value) FROM parquet_kv_metadata({_text(reached / PARQUET)})"
            ).fetchall()
        )
        if found["effattn_origin"] != _origin(folder):
            return None
        lines = [
            Damage(folder / name, line, reason) for name, line, reason in json.loads(found["effattn_damaged"])
        ]
    except (OSError, duckdb.Error, KeyError, ValueError, TypeError):
        return None  # not there, not ours, older, or of a run with more damage than it tells; it is made anew
    return damaged + lines


def _connect(scratch: Path) -> duckdb.DuckDBPyConnection:
    try:
        import duckdb
    except ImportError:
        raise RequestError(
            "this needs DuckDB, which is not installed; install it with `pip install 'effattn[report]'`"
        ) from None
    if not _is_utf8(scratch):
        raise RequestError(
            f"the folder for temporary files, {str(scratch.parent)!r}, has a name that is no UTF-8, which DuckDB does not take; "
            "name another one in TMPDIR"
        )
    return duckdb.connect(
        ":memory:",
        config={
            "memory_limit": MEMORY,
            "temp_directory": str(scratch),
            "max_temp_directory_size": SPILL,
            "autoinstall_known_extensions": False,
        },
    )


def _text(value: Path | str) -> str:
    return "'" + str(value).replace("'", "''") + "'"


def _list(values: Sequence[Path]) -> str:
    return "[" + ", ".join(_text(value) for value in values) + "]"
