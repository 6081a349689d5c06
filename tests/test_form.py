"""What a record must hold: the quick look of `effattn.run.form` refuses what `Verdict.from_dict` refuses."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from effattn.case import Case
from effattn.errors import RequestError
from effattn.run import form, records, store, tables
from effattn.tolerances.evidence import Evidence
from effattn.tolerances.statistics import Finding
from effattn.verdict import Outcome, Quantity, Verdict

VERDICT = Verdict(
    case=Case(q_len=3, kv_len=5, head_dim=8, dtype="fp16", window=(2, 3), scale=0.5, seed=7),
    method="mine",
    outcome=Outcome.BIASED,
    message="what",
    law="a law",
    quantities=(
        Quantity(name="out", count=24, fraction=0.5, z_rms=float("nan"), ulp_max=float("inf"), worst=(0, 1)),
        Quantity(name="lse", count=0),
    ),
    findings=(Finding(name="out size", statistic=9.5, p_value=1e-30, threshold=1e-10),),
    evidence=(Evidence(name="out size", mean=1.0, rows=3.0, bets=(0.5, -0.5)),),
    accuracy=(0.5, 0.25),
    notes=("it printed",),
    seconds={"method": 0.25},
    replay="effattn replay ...",
)
#: What may stand anywhere in JSON.
STRANGE = [None, True, 0, -1, 3, 2**64, 10**400, 1.5, "", "inf", "text", [], [1], [None], ["a"], {}, {"a": 1}]


def plain(verdict: Verdict) -> dict[str, Any]:
    """As it is read."""
    return json.loads(json.dumps(verdict.to_dict(), allow_nan=False))


def places(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to each part of a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        yield (*way, name)
        yield from places(part, (*way, name))


def changed(way: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """The verdict with something strange in one place, without it, and with something beside it."""
    for strange in [*STRANGE, "removed", "added"]:
        found = plain(VERDICT)
        holder = found
        for name in way[:-1]:
            holder = holder[name]
        if strange == "removed":
            del holder[way[-1]]
        elif strange == "added" and isinstance(holder, dict):
            holder["unheard of"] = 1
        else:
            holder[way[-1]] = copy.deepcopy(strange)
        yield found


def readable(found: dict[str, Any]) -> bool:
    try:
        Verdict.from_dict(found)
    except RequestError:
        return False
    return True


def test_what_is_written_is_whole() -> None:
    for verdict in (
        VERDICT,
        replace(VERDICT, law=None, findings=(), evidence=(), accuracy=None, notes=(), seconds={}),
        replace(VERDICT, case=replace(VERDICT.case, window=None, seed=2**63 - 1)),
    ):
        assert form.fault(plain(verdict)) is None


@pytest.mark.parametrize("way", list(places(plain(VERDICT))), ids=lambda way: ".".join(map(str, way)))
def test_what_cannot_be_read_is_refused_whatever_is_where(way: tuple[Any, ...]) -> None:
    """The other way round, some is refused that could be read: a text or a truth value where a number must be."""
    refused = 0
    for found in changed(way):
        wrong = form.fault(found)
        refused += wrong is not None
        if wrong is None:
            assert readable(found), found
        else:
            assert wrong.isprintable()
            assert len(wrong) < 1000
    assert refused


def test_case_is_looked_at_with_its_types_and_its_seed() -> None:
    found = plain(VERDICT)
    for name, value in (
        ("q_len", True),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", True),
        ("seed", "7"),
        ("heads", 0),
    ):
        other = {**found, "case": {**found["case"], name: value}}
        assert form.fault(other) is not None, name
        assert form.fault(found) is None
    # Recorded activations have but one seed.
    real = {"schema": 1, "q_len": 64, "kv_len": 64, "heads": 9, "kv_heads": 3, "head_dim": 64, "dtype": "fp16",
            "values": "real:smollm2/3"}  # fmt: skip
    assert form.fault({**found, "case": real}) is None
    wrong = form.fault({**found, "case": {**real, "seed": 1}})
    assert wrong is not None
    assert "seed" in wrong


def test_names_of_fields_are_those_of_the_classes() -> None:
    assert {f.name for f in fields(Finding)} == form._FINDING
    assert {f.name for f in fields(Evidence)} == form._EVIDENCE
    assert {f.name for f in fields(Quantity)} == form._QUANTITY.keys()
    assert {f.name for f in fields(Verdict)} == form._REQUIRED | form._OPTIONAL


def test_what_is_not_refused_goes_into_a_table(tmp_path: Path) -> None:
    accepted = [
        found for way in places(plain(VERDICT)) for found in changed(way) if form.fault(found) is None
    ]
    strange = ("\0", "\x1b[31m", "'; drop table verdicts; --", "\u2028\U0001f600", '"', "\\", "x" * 100_000)
    accepted += [{**plain(VERDICT), "method": x, "message": x, "seconds": {x: 1e300}} for x in strange]
    assert len(accepted) > 200
    folder = tmp_path / "run"
    with store.RunWriter(folder) as writer:
        writer.commit({})
    with (folder / "verdicts.jsonl").open("wb") as out:
        for number, found in enumerate(accepted):
            told = {"id": str(number), "spec": "mine", "device": "cpu", "verdict": found}
            body = json.dumps(told, separators=(",", ":"), ensure_ascii=number % 2 == 0).encode()
            out.write(b'{"crc32":"%08x","body":%s}\n' % (zlib.crc32(body), body))
    made = tables.compact(folder)
    assert (made.rows, made.damaged) == (len(accepted), [])
    damaged: list[records.Damage] = []
    sql = "SELECT case_id, method, outcome FROM verdicts ORDER BY case_id::INTEGER"
    assert tables.query(sql, [folder], damaged=damaged)[1] == [
        (str(number), found["method"], found["outcome"]) for number, found in enumerate(accepted)
    ]
    assert damaged == []
    assert len(list(store.read_verdicts(folder))) == len(accepted)
