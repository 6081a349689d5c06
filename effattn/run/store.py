"""Run folders: what a gate or a sweep leaves behind for machines and for later.

    verdicts*.jsonl    one verdict a line, with a checksum (`effattn.run.records`); one file for each process that wrote
    provenance.json    what ran, where, with which versions, and when
    summary.md         the table and the failures, for a pull request
    cases/ID.json      the recipe of each failed case, and of its shrunk form
    verdicts.parquet   the same verdicts as a table, made by `effattn runs compact` (`effattn.run.tables`)

A gate is written into a sibling folder and renamed at the end, so that its folder is complete or not there; a sweep
grows in its place (`effattn.run.sweep`). Everything in a run is data, nothing is ever unpickled or executed. Damaged
lines are named and left out, the rest is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from effattn.errors import RequestError
from effattn.run import migrate, records, seal
from effattn.run.records import Damage, Key, Record

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.verdict import Verdict

#: Where runs go when no folder is named.
DEFAULT_FOLDER = Path("effattn-runs")
#: What provenance.json says of itself; a folder is a run folder if its provenance says so.
KIND = "effattn run"
#: Lines of a file that are looked at, and bytes of each, to tell whether it is one of effattn's.
_FIRST_LINES = 10
_LONGEST_LINE = 1 << 20

VERDICTS = "verdicts.jsonl"
ALL_VERDICTS = "verdicts*.jsonl"
PROVENANCE = "provenance.json"
SUMMARY = "summary.md"
CASES = "cases"
#: Held by the supervisor of a sweep while it runs (`effattn.run.sweep`).
LOCK = "lock"


#: The form of those fields of a provenance that are read.
_FORMS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("command", "started", "ended", "kind_of_run", "sweep", "device"), (str, type(None))),
    **dict.fromkeys(
        ("effattn", "working_directory", "packages", "machine", "environment", "sources", "method"), (dict,)
    ),
    **dict.fromkeys(("methods", "resumed"), (list,)),
    "cases": (int, type(None)),
}
#: True is an int to Python. What is added when a provenance is read does not stand in it.
_NOT_FORMS: dict[str, type] = {"cases": bool, "id": object, "written_as": object}


class RunWriter:
    """Writes one run folder; use as a context manager and call `commit` at the end.

    Without `commit`, or after an exception, everything that was written is removed again.

    Args:
        folder: where the run will be.
        overwrite: replace a run folder that is there. Any other folder that is not empty is always refused.
        spec: the method as the command line names it, for the records.
        device: where it runs, for the records.

    Raises:
        RequestError: the folder cannot be written, or holds something already.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False, spec: str = "", device: str = "cpu") -> None:
        self.folder = folder
        self._spec, self._device = spec, device
        self._overwrite = overwrite
        self._check_free()
        self._temporary = folder.absolute().parent / f".{folder.name}.{os.getpid()}.tmp"
        self._made_parents: list[Path] = []
        self._verdicts: BinaryIO | None = None
        try:
            self._make_parents()
            self._temporary.mkdir()
            self._verdicts = (self._temporary / VERDICTS).open("wb")
        except OSError as error:
            self._remove()
            raise RequestError(
                f"cannot write the run folder {str(folder)!r}: {error.strerror or error}. "
                "Name a folder that can be written with --out"
            ) from error

    def add(self, verdict: Verdict) -> None:
        """Append one verdict."""
        assert self._verdicts is not None, "the run is already committed"
        with self._writing():
            self._verdicts.write(records.encode(verdict, spec=self._spec, device=self._device))

    def add_case(self, case: Case) -> Path:
        """Write the recipe of one case; the path that it will have, relative to the run folder."""
        relative = Path(CASES) / f"{case.id}.json"
        with self._writing():
            (self._temporary / CASES).mkdir(exist_ok=True)
            (self._temporary / relative).write_text(case.to_json() + "\n", encoding="utf-8")
        return relative

    def add_text(self, name: str, text: str) -> None:
        """Write a file of text."""
        with self._writing():
            (self._temporary / name).write_text(text, encoding="utf-8")

    def commit(self, provenance: Mapping[str, Any]) -> Path:
        """Put the run in its place. Returns the folder.

        Raises:
            RequestError: the disk is full, or another run took the place meanwhile.
        """
        assert self._verdicts is not None, "the run is already committed"
        described = {"kind": KIND, "schema": migrate.SCHEMA, **provenance}
        with self._writing():
            self._verdicts.close()
            self._verdicts = None
            (self._temporary / PROVENANCE).write_text(provenance_text(described), encoding="utf-8")
            self._check_free()
            set_aside = None
            if self.folder.is_dir() and any(self.folder.iterdir()):
                set_aside = self._temporary.with_suffix(".old")
                self.folder.rename(set_aside)
            self._temporary.rename(self.folder)
            if set_aside is not None:
                shutil.rmtree(set_aside)
        return self.folder

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _check_free(self) -> None:
        folder = self.folder
        if not folder.name:
            raise RequestError(
                f"{str(folder)!r} names no new folder; expected a folder of its own for the run"
            )
        if folder.exists() and not folder.is_dir():
            raise RequestError(f"{str(folder)!r} is a file; expected a folder for the run")
        if folder.is_dir() and any(folder.iterdir()):
            if is_locked(folder):  # by a sweep that may have written nothing yet
                raise RequestError(
                    f"a sweep is writing into {str(folder)!r}; wait for it, or name another folder with --out"
                )
            check_replaceable(folder)
            if not self._overwrite:
                raise RequestError(
                    f"the folder {str(folder)!r} holds a run already; name another one with --out, or "
                    "replace it with --overwrite"
                )

    def _make_parents(self) -> None:
        missing = [parent for parent in self._temporary.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made_parents.append(parent)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(
                f"cannot write the run folder {str(self.folder)!r}: {error.strerror or error}; "
                "nothing was kept of it"
            ) from error

    def _remove(self) -> None:
        """Remove what is not in its place yet; nothing to do after `commit`."""
        if self._verdicts is not None:
            with contextlib.suppress(OSError):
                self._verdicts.close()
            self._verdicts = None
        shutil.rmtree(self._temporary, ignore_errors=True)
        for parent in reversed(self._made_parents):
            # Fails on purpose where the run, or somebody else's file, is in it.
            with contextlib.suppress(OSError):
                parent.rmdir()


def check_replaceable(folder: Path) -> None:
    """Raise RequestError where a folder that is not empty is no run folder, whose content is then nobody's to remove."""
    if is_run(folder):
        return
    damage = provenance_damage(folder)
    why = "something other than an effattn run" if damage is None else f"what may be a run ({damage})"
    raise RequestError(
        f"the folder {str(folder)!r} holds {why}, which is never overwritten; name an empty or a new folder with --out"
    )


def is_locked(folder: Path) -> bool:
    """Whether a sweep is writing into the folder."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def provenance_text(described: Mapping[str, Any]) -> str:
    """What stands in the file of a provenance: strict JSON with a checksum (`effattn.run.seal`)."""
    return to_json(seal.sealed(json.loads(to_json(described))), indent=2) + "\n"


def _provenance_bytes(folder: Path) -> bytes | None:
    """What is in the file of the provenance; None where there is none, such as a pipe, on which a reader would wait."""
    file = folder / PROVENANCE
    try:
        return file.read_bytes() if stat.S_ISREG(file.stat().st_mode) else None
    except OSError:
        return None


def _described(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """What the file of the provenance says, damaged or not; or None, and what is wrong with the file."""
    text = _provenance_bytes(folder)
    if text is None:
        there = os.path.lexists(folder / PROVENANCE)
        return None, "it is no file that can be read" if there else "it is missing"
    try:
        described = json.loads(text)
    except json.JSONDecodeError as error:
        return (
            None,
            f"it is no JSON, at byte {error.pos}, so it was cut off or changed"
            if text.strip()
            else "it is empty",
        )
    except RecursionError:
        return None, "it is nested too deeply"
    except UnicodeDecodeError:
        return None, "it is no text, so it was changed"
    except ValueError:
        return None, "it has a number of too many digits"
    if records.is_deep(described):
        return None, "it is nested too deeply"
    return (described, "") if isinstance(described, dict) else (None, "it is no JSON object")


def is_run(folder: Path) -> bool:
    """True where the folder is a run folder."""
    return (_described(folder)[0] or {}).get("kind") == KIND


def provenance_damage(folder: Path) -> Damage | None:
    """What is wrong with the provenance of a run; None where nothing is, or the folder is none.

    One that no longer says what it is belongs to a run if there are verdicts beside it.
    """
    file = folder / PROVENANCE
    described, wrong = _described(folder)
    ours = described is not None and described.get("kind") == KIND
    if described is not None and seal.is_broken(described) and (ours or verdict_files(folder)):
        return Damage(
            file,
            0,
            "its checksum does not match, so it was changed after it was written: what it says of the run may be wrong. "
            f'The verdicts are kept and read. If you changed it on purpose, take "{seal.SEALED}" and "{seal.NAME}" out of it',
        )
    # What may be a provenance that was cut off suffices with files that are named like verdicts.
    damaged = described is None and _provenance_bytes(folder) is not None
    if ours or not (verdict_files(folder) if damaged else _has_records(folder)):
        return None
    if described is not None:
        wrong = f"it does not say that it is of an effattn run (kind {str(described.get('kind'))[:40]!r})"
    return Damage(file, 0, f"{wrong}. Where the run comes from is not known; its verdicts are kept and read")


def _has_records(folder: Path) -> bool:
    """Whether there are files of verdicts that begin as effattn writes them, of any schema.

    Not in a hidden folder: a gate that has not come to its end has verdicts there, and its provenance comes last.
    """
    if folder.name.startswith("."):
        return False
    for file in verdict_files(folder):
        with contextlib.suppress(OSError), file.open("rb") as opened:
            for _ in range(_FIRST_LINES):
                if migrate.has_form(opened.readline(_LONGEST_LINE)):
                    return True
    return False


def holds_run(folder: Path) -> bool:
    """True where there are verdicts to read: in a run folder, and in one whose provenance is damaged or missing."""
    return is_run(folder) or provenance_damage(folder) is not None


def read_provenance(folder: Path, damaged: list[Damage] | None = None) -> dict[str, Any]:
    """The provenance of a run, brought forward to the current schema.

    Args:
        folder: the run.
        damaged: takes a provenance that is damaged; then the schema is given as the verdicts show it, and the rest as far
            as it can be read. Without it, a damaged one is an error.

    Raises:
        RequestError: the folder is no run, or one of a newer schema; the provenance is damaged and `damaged` is None.
    """
    provenance = _described(folder)[0] or {}
    damage = provenance_damage(folder)
    if damage is None and provenance.get("kind") != KIND:
        raise RequestError(
            f"{str(folder)!r} is not a run folder: expected one that `effattn gate` or `effattn sweep` wrote"
        )
    if damage is not None:
        if damaged is None:
            raise RequestError(str(damage))
        damaged.append(damage)
        provenance |= {"kind": KIND, "schema": _schema_of_lines(folder)}
    provenance = seal.unsealed(provenance)
    schema = provenance.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or not 1 <= schema <= migrate.SCHEMA:
        raise RequestError(
            f"the run {str(folder)!r} has schema {schema!r}, this effattn reads 1 to {migrate.SCHEMA}; "
            "update effattn"
        )
    if wrong := [name for name, value in provenance.items() if not _has_form(name, value)]:
        damage = Damage(
            folder / PROVENANCE,
            0,
            f"{', '.join(wrong)}: of another form than effattn writes, so left out here",
        )
        if damaged is None:
            raise RequestError(str(damage))
        damaged.append(damage)
        for name in wrong:
            del provenance[name]
    return migrate.provenance(provenance)


def _has_form(name: str, value: object) -> bool:
    """Whether a field of the provenance is what those who read it count on."""
    if name == "evidence":
        return isinstance(value, dict) and all(
            isinstance(told, list)
            and all(
                isinstance(x.get("sentence") if isinstance(x, dict) and part == "alarms" else x, str)
                for x in told
            )
            for part, told in value.items()
        )
    return isinstance(value, _FORMS.get(name, (object,))) and not isinstance(value, _NOT_FORMS.get(name, ()))


def _schema_of_lines(folder: Path) -> int:
    """The schema that the first line was written with, for a run whose provenance does not tell."""
    for file in verdict_files(folder):
        for line in records.lines(file):
            return migrate.SCHEMA if records.has_form(line) else 1
    return migrate.SCHEMA


def verdict_files(folder: Path) -> list[Path]:
    """The files of verdicts of a run, in a fixed order: regular files alone, which are in the folder itself."""
    return [file for file in sorted(folder.glob(ALL_VERDICTS)) if stat.S_ISREG(file.lstat().st_mode)]


def foreign_files(folder: Path) -> list[Damage]:
    """What is named like a file of verdicts and is none: a link to elsewhere, a pipe, a folder. Nobody opens it."""
    return [
        Damage(file, 0, f"it is {_what_it_is(file)}, so it is no file of verdicts; it is left alone")
        for file in sorted(folder.glob(ALL_VERDICTS))
        if not stat.S_ISREG(file.lstat().st_mode)
    ]


def _what_it_is(file: Path) -> str:
    if file.is_symlink():
        return "a symbolic link"
    return "a folder" if file.is_dir() else "a pipe or a device"


def read_records(folder: Path, damaged: list[Damage] | None = None) -> Iterator[Record]:
    """The records of a run, file by file, each key once.

    Args:
        folder: the run.
        damaged: takes the damaged lines, which are left out, and a damaged provenance; without it, the first is an error.

    Raises:
        RequestError: the folder is no run, a file cannot be read, or a line is damaged and `damaged` is None.
    """
    schema = read_provenance(folder, damaged)["written_as"]
    if damaged is not None:
        damaged += foreign_files(folder)
    seen: set[Key] = set()
    for file in verdict_files(folder):
        try:
            for number, line in enumerate(records.lines(file), start=1):
                try:
                    record = migrate.record(line, schema)
                except ValueError as error:
                    damage = Damage(file, number, str(error))
                    if damaged is None:
                        raise RequestError(str(damage)) from error
                    damaged.append(damage)
                    continue
                # A worker that was believed dead may have gone on: what it repeated is left out.
                if record.key not in seen:
                    seen.add(record.key)
                    yield record
        except OSError as error:
            raise RequestError(f"the run {str(folder)!r}: cannot read {file}: {error.strerror}") from error


def read_verdicts(folder: Path, damaged: list[Damage] | None = None) -> Iterator[Verdict]:
    """The verdicts of a run; arguments and errors as those of `read_records`."""
    for _, verdict in read_judged(folder, damaged):
        yield verdict


def read_judged(folder: Path, damaged: list[Damage] | None = None) -> Iterator[tuple[Key, Verdict]]:
    """What was judged, and the verdict, of each record of a run; arguments and errors as those of `read_records`."""
    from effattn.verdict import Verdict

    for record in read_records(folder, damaged):
        try:
            yield record.key, Verdict.from_dict(record.verdict)
        except (RequestError, RecursionError) as error:
            damage = Damage(folder, 0, f"the verdict on case {record.key.case_id}: {error}")
            if damaged is None:
                raise RequestError(str(damage)) from error
            damaged.append(damage)


def content_id(folder: Path) -> str:
    """What identifies a run: a hash of its verdicts, without times, in whatever order and files they are.

    The same verdicts have the same identity wherever and whenever they were found.
    """
    return records.identity(record.content() for record in read_records(folder, []))


def find_case(name: str, folder: Path) -> Case:
    """The case of a run whose id begins with `name`, among the judged and the shrunk ones.

    Raises:
        RequestError: no case, or more than one, has such an id.
    """
    from effattn.case import Case

    found: dict[str, Case | Damage] = {}
    for record in read_records(folder, []):
        case_id = record.key.case_id
        if case_id.startswith(name) and case_id not in found:
            case = Case.from_dict(record.verdict["case"])
            is_it = case.id == case_id
            found[case_id] = case if is_it else Damage(folder, 0, _other_case(case_id, case))
    damaged: list[Damage] = []
    recipes = read_cases(folder, damaged)
    for case_id, recipe in (*recipes.items(), *((damage.file.stem, damage) for damage in damaged)):
        if case_id.startswith(name) and case_id not in found:
            found[case_id] = recipe
    if len(found) == 1:
        case = next(iter(found.values()))
        if isinstance(case, Damage):
            raise RequestError(f"{str(case).removesuffix('.')}. It cannot be judged again")
        return case
    if found:
        raise RequestError(
            f"{len(found)} cases of the run {str(folder)!r} have an id that begins with {name!r}: "
            f"{', '.join(sorted(found)[:5])}; give more of the id"
        )
    raise RequestError(
        f"no case of the run {str(folder)!r} has the id {name!r}; see its {VERDICTS} and {CASES}/"
    )


def read_cases(folder: Path, damaged: list[Damage]) -> dict[str, Case]:
    """The recipes of a run beside its verdicts, by id: what failed, and what it was shrunk to.

    Args:
        folder: the run.
        damaged: takes the files that are no recipe, or not that of their name; links, pipes and folders among them, which
            nobody opens.
    """
    from effattn.case import Case

    place = folder / CASES
    if place.is_symlink():
        damaged.append(
            Damage(place, 0, "it is a symbolic link, so it is no folder of cases; it is left alone")
        )
        return {}
    found: dict[str, Case] = {}
    for file in sorted(place.glob("*.json")):
        if not stat.S_ISREG(file.lstat().st_mode):
            damaged.append(Damage(file, 0, f"it is {_what_it_is(file)}, so it is no case; it is left alone"))
            continue
        try:
            case = Case.load(file)
        except RequestError as error:
            damaged.append(
                Damage(file, 0, f"it is no case: {str(error).removeprefix(f'case file {file}: ')}")
            )
            continue
        if case.id == file.stem:
            found[case.id] = case
        else:
            damaged.append(Damage(file, 0, _other_case(file.stem, case)))
    return found


def _other_case(case_id: str, case: Case) -> str:
    return f"what is recorded as case {case_id} is case {case.id}, so it was changed after it was written"


def newest_run(folder: Path = DEFAULT_FOLDER) -> Path:
    """The newest run in a folder of runs. Raises `RequestError` where there is none."""
    runs = [entry for entry in folder.iterdir() if holds_run(entry)] if folder.is_dir() else []
    if not runs:
        raise RequestError(
            f"there is no run in {str(folder)!r} to look the case up in; name a run folder with --run"
        )
    return max(runs, key=lambda run: (str(read_provenance(run, []).get("started", "")), run.name))


def default_folder(*, method: str, started: str) -> Path:
    """Where a run goes when no folder is named: `effattn-runs/TIME-METHOD`, numbered if that is taken."""
    time = started.replace(":", "").replace("-", "").split(".")[0].split("+")[0]
    name = f"{time}-{file_name(method)}"
    folder = DEFAULT_FOLDER / name
    number = 2
    while folder.exists():
        folder = DEFAULT_FOLDER / f"{name}-{number}"
        number += 1
    return folder


def ignore_in_git(folder: Path) -> None:
    """Keep a folder of runs out of the repository it stands in, as pytest and ruff do with their caches."""
    with contextlib.suppress(OSError):
        if not (folder / ".gitignore").exists():
            (folder / ".gitignore").write_text("*\n", encoding="utf-8")


def file_name(text: str) -> str:
    """Any text as a part of a file name: letters, digits, dot, dash and underscore, at most 60 of them."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "_" for c in text)
    return kept.lstrip(".")[-60:] or "_"


def to_json(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Strict JSON: infinity and NaN must have become text before."""
    separators = None if indent else (",", ":")
    return records.encodable(
        json.dumps(value, allow_nan=False, indent=indent, separators=separators, ensure_ascii=False)
    )
