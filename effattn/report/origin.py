"""Where runs come from, as a report shows it: provenance of the form that it must have, each run once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effattn.run import store
from effattn.run.records import Damage

#: What a report reads of a provenance, and its form; the rest is shown as it is.
_FORMS: dict[str, tuple[type, str]] = {
    "method": (Mapping, "an object"),
    "working_directory": (Mapping, "an object"),
    "evidence": (Mapping, "an object"),
    "started": (str, "a text"),
    "kind_of_run": (str, "a text"),
}


def facts(folder: Path, damaged: list[Damage]) -> dict[str, Any]:
    """The provenance of a run with its identity. `damaged` takes the members of another form, which are left out.

    Raises:
        RequestError: the folder is no run, or one of a newer schema.
    """
    found: dict[str, Any] = {"id": identity(folder) or "unknown", **provenance(folder, damaged)}
    return found


def provenance(folder: Path, damaged: list[Damage]) -> dict[str, Any]:
    """As `facts`, without the identity, for which all records must be read."""
    file = folder / store.PROVENANCE
    found: dict[str, Any] = {}
    for name, value in store.read_provenance(folder, []).items():
        kind, words = _FORMS.get(name, (object, ""))
        if value is not None and not isinstance(value, kind):
            damaged.append(Damage(file, 0, f"{name} is {shown(value)}, expected {words}; it is left out"))
            continue
        found[sound(name)] = _sound_data(value)
    if found.get("evidence") is not None:
        found["evidence"] = _evidence(found["evidence"], file, damaged)
    return found


def _evidence(given: Mapping[str, Any], file: Path, damaged: list[Damage]) -> dict[str, Any]:
    """What `effattn.run.evidence.Weighed.to_dict` writes, as far as it is of that form."""
    found = dict(given)
    for name in ("alarms", "unsteady"):
        members = given.get(name, [])
        if not isinstance(members, list):
            damaged.append(
                Damage(file, 0, f"evidence.{name} is {shown(members)}, expected a list; it is left out")
            )
            members = []
        found[name] = []
        for i, member in enumerate(members):
            if _is_alarm(member) if name == "alarms" else isinstance(member, str):
                found[name].append(member)
            else:
                expected = "an object with the texts sentence and replay" if name == "alarms" else "a text"
                what = f"evidence.{name}[{i}] is {shown(member)}, expected {expected}; it is left out"
                damaged.append(Damage(file, 0, what))
    return found


def _is_alarm(member: Any) -> bool:
    return isinstance(member, Mapping) and all(
        isinstance(member.get(name), str) for name in ("sentence", "replay")
    )


def shown(value: Any) -> str:
    """A value of the wrong form, in few characters."""
    text = sound(repr(value))
    return text if len(text) <= 60 else text[:60] + " ..."


def sound(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can hold and no file of text can."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace") if not _is_sound(text) else text


def _is_sound(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _sound_data(value: Any) -> Any:
    if isinstance(value, str):
        return sound(value)
    if isinstance(value, list):
        return [_sound_data(item) for item in value]
    if isinstance(value, dict):
        return {sound(name): _sound_data(item) for name, item in value.items()}
    return value


def identity(folder: Path) -> str | None:
    """`store.content_id`; None where a record has text that cannot be encoded, which has no identity."""
    try:
        return store.content_id(folder)
    except UnicodeEncodeError:
        return None


def distinct(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The runs, each once: not again through a link, nor as a copy with the same provenance and verdicts.

    Two runs with the same verdicts are two where their provenance differs: a commit need not change a bit.

    Returns:
        The folders, and a sentence for each that is left out.
    """
    kept: list[Path] = []
    sentences: list[str] = []
    by_origin: dict[str, list[Path]] = {}
    for folder in folders:
        origin = json.dumps(store.read_provenance(folder, []), sort_keys=True)
        others = by_origin.setdefault(origin, [])
        same = next((other for other in others if _same(folder, other)), None)
        if same is None:
            kept.append(folder)
            others.append(folder)
        else:
            sentences.append(f"{folder} is the same run as {same} and counts once.")
    return kept, sentences


def _same(one: Path, other: Path) -> bool:
    return one.samefile(other) or ((found := identity(one)) is not None and found == identity(other))
