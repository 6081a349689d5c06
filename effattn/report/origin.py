"""Where runs come from, as a report shows it: provenance of the form that it must have, each run once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effattn.run import store
from effattn.run.records import Damage


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
