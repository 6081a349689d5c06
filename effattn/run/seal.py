"""A checksum inside a JSON object, which tells that what the object says was changed after it was written.

    {"kind": ..., ..., "crc32": "9ae0daaf"}

It is that of the other members in one fixed form, so that a file may be indented anew. An object without it is one that
an effattn from before wrote, or somebody who changed it on purpose and took it out.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

NAME = "crc32"


def sealed(told: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum, as the last member."""
    rest = {name: value for name, value in told.items() if name != NAME}
    return {**rest, NAME: _checksum(rest)}


def is_broken(told: Mapping[str, Any]) -> bool:
    """Whether the object has a checksum, and another one than belongs to it."""
    return NAME in told and told[NAME] != _checksum({name: told[name] for name in told if name != NAME})


def _checksum(told: Mapping[str, Any]) -> str:
    text = json.dumps(told, sort_keys=True, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x}"
