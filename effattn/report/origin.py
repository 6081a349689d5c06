"""Where runs come from, as a report shows it: provenance of the form that it must have, each run once."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effattn.run import store
from effattn.run.records import Damage


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A run that is not at its end: it was broken off, or it is still going on."""

    folder: Path
    #: verdicts that are recorded, and that it is to have where that is known
    recorded: int
    expected: int | None
    #: the line that goes on with it, in the folder in which it was started; empty where that is not known
    command: str

    @property
    def share(self) -> str:
        """How far it is, in words."""
        of = "" if self.expected is None else f" of {self.expected}"
        return f"{self.recorded}{of} verdicts are recorded"


def unfinished(folder: Path, facts: dict[str, Any], recorded: int) -> Unfinished | None:
    """What there is to know of a run that is not at its end; None where it is, or where its provenance is damaged.

    A gate leaves a folder only at its end. A sweep writes from the start, and goes on where the same command is given
    again, unless that says to begin anew.

    Args:
        folder: the run.
        facts: its provenance.
        recorded: how many verdicts it has.
    """
    if "ended" in facts or not facts.get("kind_of_run"):
        return None
    command = facts.get("command") if facts["kind_of_run"] == "sweep" else None
    try:
        words = shlex.split(command or "")
    except ValueError:
        words = []
    expected = facts.get("cases")
    return Unfinished(
        folder=folder,
        recorded=recorded,
        expected=expected if isinstance(expected, int) and expected >= recorded else None,
        command=shlex.join(word for word in words if word != "--overwrite"),
    )


def facts(folder: Path, damaged: list[Damage]) -> dict[str, Any]:
    """The provenance of a run with its identity, as far as it has the form that a report reads; `damaged` takes the rest.

    Raises:
        RequestError: the folder is no run, or one of a newer schema.
    """
    return {"id": store.content_id(folder), **provenance(folder, damaged)}


def provenance(folder: Path, damaged: list[Damage]) -> dict[str, Any]:
    """As `facts`, without the identity, for which all records must be read."""
    found: dict[str, Any] = _sound_data(store.read_provenance(folder, damaged))
    evidence = found.get("evidence", {})
    whole = [alarm for alarm in evidence.get("alarms", []) if isinstance(alarm.get("replay"), str)]
    if missing := len(evidence.get("alarms", [])) - len(whole):
        what = f"evidence: {missing} of its alarms have no replay line, so they are left out here"
        damaged.append(Damage(folder / store.PROVENANCE, 0, what))
        found["evidence"] = {**evidence, "alarms": whole}
    return found


def _sound(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no file of text can."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _sound_data(value: Any) -> Any:
    if isinstance(value, str):
        return _sound(value)
    if isinstance(value, list):
        return [_sound_data(item) for item in value]
    if isinstance(value, dict):
        return {_sound(name): _sound_data(item) for name, item in value.items()}
    return value


def distinct(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The runs, each once: not again through a link, nor as a copy with the same provenance and verdicts.

    Two runs with the same verdicts are two where their provenance differs: a commit need not change a bit.

    Returns:
        The folders, and a sentence for each that is left out.
    """
    kept: list[Path] = []
    sentences: list[str] = []
    by_origin: dict[bytes, list[Path]] = {}
    for folder in folders:
        others = by_origin.setdefault(_bytes(folder / store.PROVENANCE), [])
        same = next((other for other in others if _same(folder, other)), None)
        if same is None:
            kept.append(folder)
            others.append(folder)
        else:
            sentences.append(f"{folder} is the same run as {same} and counts once.")
    return kept, sentences


def _bytes(file: Path) -> bytes:
    """What is in a file; nothing where it cannot be read, which reading the run says."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


def _same(one: Path, other: Path) -> bool:
    return one.samefile(other) or store.content_id(one) == store.content_id(other)
