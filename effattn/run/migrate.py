"""Brings runs of older schemas forward while they are read; nothing on the disk changes.

Schema 1 (before any release): a line is a bare verdict, without checksum and key; `verdicts.jsonl` is the only file.
Schema 2: a line is a record with a checksum (`effattn.run.records`); any number of files `verdicts*.jsonl`.

A new schema adds one function from the one before to each table below, and a small run of the old one to
`tests/data`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from effattn.run import records

#: The version that is written, and the newest that is read.
SCHEMA = 2


def _provenance_1(provenance: dict[str, Any]) -> dict[str, Any]:
    return {**provenance, "kind_of_run": "gate", "isolation": False}


def _body_1(verdict: dict[str, Any]) -> dict[str, Any]:
    from effattn.case import Case

    # The line that repeats it has what a record names: `effattn replay CASE SPEC [--device DEVICE]`.
    words = shlex.split(verdict["replay"])
    device = words[5] if len(words) > 5 and words[4] == "--device" else "cpu"
    spec = words[3] if len(words) > 3 else verdict["method"]
    return {"id": Case.from_dict(verdict["case"]).id, "spec": spec, "device": device, "verdict": verdict}


#: schema -> what turns it into the next one
PROVENANCE: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _provenance_1}
BODIES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: _body_1}


def provenance(found: dict[str, Any]) -> dict[str, Any]:
    """The provenance of a run as the current schema has it; `written_as` keeps the schema of its files."""
    schema = found["schema"]
    result = dict(found)
    for version in range(schema, SCHEMA):
        result = PROVENANCE[version](result)
    return {**result, "schema": SCHEMA, "written_as": schema}


def has_form(line: bytes) -> bool:
    """Whether a line, or its start, begins as one of effattn's does in any schema, damaged or not."""
    return records.has_form(line) or line.startswith(b'{"case":{"schema":')


def record(line: bytes, schema: int) -> records.Record:
    """The record of a line that was written with some schema. Raises ValueError where it is damaged."""
    if schema == SCHEMA:
        return records.decode(line)
    if not line.endswith(b"\n"):
        raise ValueError("it is cut off")
    body = records.parsed(line if schema == 1 else records.body_of(line))
    try:
        for version in range(schema, SCHEMA):
            body = BODIES[version](body)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it has another form than a record of schema {schema}: {error}") from None
    return records.record_of(body)
