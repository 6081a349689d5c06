"""One verdict as one line, and files of such lines that tell when they are damaged.

    {"crc32":"9ae0daaf","body":{"id":CASE ID,"spec":METHOD,"device":"cpu","verdict":{...}}}

The checksum is that of the bytes of the body, so a line can be checked without being parsed, and it is JSON for every
other program. A line is appended by one `write`, so all that a killed writer leaves is one line that is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from effattn.case import id_of
from effattn.run import form

if TYPE_CHECKING:
    from effattn.verdict import Verdict

_FRONT, _MIDDLE, _BACK = b'{"crc32":"', b'","body":', b"}\n"
_BODY = len(_FRONT) + 8 + len(_MIDDLE)
_LONE = re.compile("[\ud800-\udfff]")
#: Levels that a record is nested at most; a verdict has seven.
MOST_LEVELS = 50
_encoder = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def _no_number(text: str) -> None:
    raise ValueError(f"it has {text}, which is no JSON")


_decoder = json.JSONDecoder(parse_constant=_no_number)


class Key(NamedTuple):
    """What was judged: two records with the same key answer the same question."""

    case_id: str
    #: the method as the command line names it
    spec: str
    device: str
    #: the law that was tried; empty where the output was compared with exact attention
    law: str = ""


@dataclass(frozen=True)
class Damage:
    """A line that cannot be used, or a run."""

    file: Path
    #: from 1; 0 where it is no single line
    line: int
    reason: str

    def __str__(self) -> str:
        where = f", line {self.line} is damaged" if self.line else ""
        return f"{self.file}{where}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """One recorded verdict, as data of the current schema."""

    key: Key
    verdict: dict[str, Any]

    def content(self) -> str:
        """What identifies it: everything but how long it took."""
        told = {name: value for name, value in self.verdict.items() if name != "seconds"}
        return json.dumps([*self.key, told], sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def encode(verdict: Verdict, *, spec: str, device: str) -> bytes:
    """The line of a verdict."""
    told = verdict.to_dict()
    text = _encoder.encode({"id": id_of(told["case"]), "spec": spec, "device": device, "verdict": told})
    body = encodable(text).encode()
    return b"".join((_FRONT, b"%08x" % zlib.crc32(body), _MIDDLE, body, _BACK))


def encodable(text: str) -> str:
    """The text with a backslash and digits for what UTF-8 has not; in JSON too, where that is doubled.

    Half a surrogate pair stands for a byte of a file's name that is no UTF-8.
    """
    return text if text.isascii() else _LONE.sub(lambda found: f"\\\\u{ord(found[0]):04x}", text)


def body_of(line: bytes) -> bytes:
    """The body of a line whose checksum is right. Raises ValueError, in words, for any other line."""
    if not line.endswith(b"\n"):
        raise ValueError("it is cut off")
    if not line.startswith(_FRONT) or line[len(_FRONT) + 8 : _BODY] != _MIDDLE or not line.endswith(_BACK):
        raise ValueError("it is no record")
    body = line[_BODY : -len(_BACK)]
    if line[len(_FRONT) : len(_FRONT) + 8] != b"%08x" % zlib.crc32(body):
        raise ValueError("its checksum does not match")
    return body


def has_form(line: bytes) -> bool:
    """Whether a line begins as a record does, damaged or not."""
    return line.startswith(_FRONT)


def decode(line: bytes) -> Record:
    """The record of a line. Raises ValueError, in words, where it is damaged."""
    return record_of(parsed(body_of(line)))


def parsed(text: bytes) -> Any:
    """The JSON of a body. Raises ValueError, in words, for what no record is: deep nesting, half a surrogate pair."""
    try:
        found = _decoder.decode(text.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Both are looked for only where they can be.
    if text.count(b"[") + text.count(b"{") > MOST_LEVELS and is_deep(found):
        raise ValueError(f"it is nested more than {MOST_LEVELS} levels deep")
    if b"\\u" in text:
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half a surrogate pair, which is no character") from None
    return found


def is_deep(value: Any) -> bool:
    """Whether it is nested deeper than `MOST_LEVELS`."""
    level, inner = 0, [value]
    while inner and level <= MOST_LEVELS:
        level += 1
        inner = [
            x
            for outer in inner
            if isinstance(outer, (dict, list))
            for x in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return level > MOST_LEVELS


def record_of(body: Mapping[str, Any]) -> Record:
    """The record of a body. Raises ValueError where it has another form."""
    try:
        verdict = body["verdict"]
        key = Key(body["id"], body["spec"], body["device"], verdict.get("law") or "")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it has another form than a record: {error}") from None
    if not isinstance(verdict, dict) or not all(isinstance(part, str) for part in key):
        raise ValueError("it has another form than a record")
    if (wrong := form.fault(verdict)) is not None:
        raise ValueError(f"it has another form than a record: {wrong}")
    return Record(key, verdict)


def lines(file: Path, *, start: int = 0) -> Iterator[bytes]:
    """The lines of a file from a byte on, whole ones with their newline."""
    with file.open("rb") as opened:
        opened.seek(start)
        yield from opened


def identity(contents: Iterator[str]) -> str:
    """Twelve hexadecimal digits that stand for the contents, in whatever order and files they are."""
    digests = sorted(hashlib.sha256(content.encode()).digest() for content in contents)
    return hashlib.sha256(b"".join(digests)).hexdigest()[:12]


class Appender:
    """A new file of records that this process alone appends to.

    Raises:
        OSError: the file is there already, or cannot be made.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.descriptor = os.open(
            file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644
        )

    def append(self, line: bytes) -> None:
        """Append one line. Raises OSError where the disk is full; then nothing of the line stays."""
        written = os.write(self.descriptor, line)
        if written != len(line):
            # The disk became full in the middle. What there is of the line goes; the next write says why.
            os.ftruncate(self.descriptor, os.fstat(self.descriptor).st_size - written)
            raise OSError(28, os.strerror(28))

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)
