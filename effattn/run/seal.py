"""A checksum inside a JSON object, which tells that what the object says was changed after it was written.

    {"sealed": true, "kind": ..., ..., "crc32": "9ae0daaf"}

It is that of the other members in one fixed form, so that a file may be indented anew. `sealed` says that there is one: it
is missed where a changed byte gave it another name. An object without both is one that an effattn from before wrote, or
somebody who changed it on purpose and took them out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

NAME = "crc32"
SEALED = "sealed"


def sealed(told: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum, as the last member, and what says so, as the first."""
    rest = {SEALED: True, **unsealed(told)}
    return {**rest, NAME: _checksum(rest)}


def unsealed(told: Mapping[str, Any]) -> dict[str, Any]:
    """The object without what `sealed` adds."""
    return {name: value for name, value in told.items() if name not in (NAME, SEALED)}


def is_broken(told: Mapping[str, Any]) -> bool:
    """Whether the object has another checksum than belongs to it, or none where it says that it has one."""
    if NAME not in told:
        return SEALED in told
    return told[NAME] != _checksum({name: told[name] for name in told if name != NAME})


def _checksum(told: Mapping[str, Any]) -> str:
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"
