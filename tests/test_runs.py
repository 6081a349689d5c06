"""`effattn runs`: listing, showing, comparing, compacting and asking.

One file, longer than others: every command is tried on the same few recorded runs, whole and damaged.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import say

from effattn.case import Case
from effattn.errors import RequestError
from effattn.run import catalog, records, store, tables
from effattn.verdict import Outcome, Quantity, Verdict

Command = Callable[..., tuple[int, str, str]]
OLD = Path(__file__).parent / "data" / "run-schema-1"
HOSTILE = "<script>alert(1)</script>`|*_[x](y)\x1b[31m'\"; drop table verdicts; --"


def verdict(seed: int, fraction: float, outcome: Outcome = Outcome.PASS, **changes: object) -> Verdict:
    case = Case(q_len=3, kv_len=5, head_dim=8, dtype=("fp16", "bf16")[seed % 2], seed=seed)
    return replace(
        Verdict(
            case=case,
            method="mine",
            outcome=outcome,
            message="what happened",
            quantities=(
                Quantity(name="out", count=24, fraction=fraction, z_rms=0.5, ulp_p99=2.0, worst=(0, 0, 1, 2)),
                Quantity(name="lse", count=3, fraction=fraction / 2),
            ),
            seconds={"method": 0.25, "exact": 0.5},
            replay="effattn replay ...",
        ),
        **changes,
    )


def write(folder: Path, verdicts: list[Verdict], spec: str = "mine.py:f", **provenance: object) -> Path:
    with store.RunWriter(folder, spec=spec) as writer:
        for item in verdicts:
            writer.add(item)
        writer.commit(
            {"started": "2030-01-01T00:00:00+00:00", "ended": "x", "kind_of_run": "gate", **provenance}
        )
    return folder


@pytest.fixture
def two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run, and a later one in which case 0 broke, 1 was mended, 2 is worse, 3 better and 4 is as it was."""
    monkeypatch.chdir(tmp_path)
    bad = Outcome.INACCURATE
    before = [
        verdict(0, 0.5),
        verdict(1, 3.0, bad),
        verdict(2, 0.2),
        verdict(3, 0.9),
        verdict(4, 0.6),
        verdict(5, 0.1),
    ]
    after = [
        verdict(0, 2.0, bad),
        verdict(1, 0.5),
        verdict(2, 0.7),
        verdict(3, 0.3),
        verdict(4, 0.7),
        verdict(6, 0.1),
    ]
    first = write(tmp_path / "effattn-runs" / "first", before)
    second = write(tmp_path / "effattn-runs" / "second", after, started="2031-01-01T00:00:00+00:00")
    return first, second


# list and show


def test_runs_are_listed_with_what_is_wrong_with_them(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    file = two_runs[1] / "verdicts.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    code, out, err = effattn_command("runs", "list")
    assert code == 0
    _, _, first, second = out.splitlines()
    assert first.split()[:2] == ["first", store.content_id(two_runs[0])]
    assert first.split()[-2:] == ["6", "1"]
    assert second.split()[-4:] == ["5", "1", "1", "damaged"]
    assert "verdicts.jsonl, line 6 is damaged: it is cut off" in err


def test_run_of_a_newer_schema_is_named_and_the_others_are_listed(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    identity = store.content_id(two_runs[0])
    say(two_runs[1], schema=3)
    code, out, err = effattn_command("runs", "list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[2:]] == ["first"]
    assert "second/provenance.json: the run" in err
    assert "has schema 3, this effattn reads 1 to 2" in err
    assert catalog.resolve(identity[:6]).resolve() == two_runs[0].resolve()
    with pytest.raises(RequestError, match="has schema 3"):
        catalog.entry(two_runs[1])
    shutil.rmtree(two_runs[0])
    code, _, err = effattn_command("runs", "list")
    assert code == 2
    assert "has schema 3" in err


def test_folder_without_runs_is_refused(effattn_command: Command, tmp_path: Path) -> None:
    code, _, err = effattn_command("runs", "list", tmp_path)
    assert code == 2
    assert "no run in" in err
    code, _, err = effattn_command("runs", "list", tmp_path / "nowhere")
    assert code == 2
    assert "no folder" in err


def test_run_is_named_by_folder_name_or_identity(two_runs: tuple[Path, Path]) -> None:
    first, second = two_runs
    assert catalog.resolve(str(first)) == first
    assert catalog.resolve("second").resolve() == second
    assert catalog.resolve(store.content_id(second)[:6]).resolve() == second
    with pytest.raises(RequestError, match="is no run"):
        catalog.resolve("third")
    write(Path("effattn-runs/copy"), [verdict(0, 0.5)])
    write(Path("effattn-runs/copy2"), [verdict(0, 0.5)])
    with pytest.raises(RequestError, match="identity of 2 runs"):
        catalog.resolve(store.content_id(Path("effattn-runs/copy")))


def test_show_has_provenance_and_rows(effattn_command: Command, two_runs: tuple[Path, Path]) -> None:
    code, out, _ = effattn_command("runs", "show", "first")
    assert code == 0
    for word in (store.content_id(two_runs[0]), "2030-01-01", "fp16", "bf16", "inaccurate"):
        assert word in out
    code, out, _ = effattn_command("runs", "show", "first", "--json")
    assert code == 0
    assert json.loads(out)["id"] == store.content_id(two_runs[0])


def test_old_run_is_shown(effattn_command: Command) -> None:
    code, out, err = effattn_command("runs", "show", OLD)
    assert (code, err) == (0, "")
    assert "last_partial_block_dropped" in out


def test_run_without_verdicts_is_shown_and_not_compacted(effattn_command: Command, tmp_path: Path) -> None:
    write(tmp_path / "empty", [])
    code, out, _ = effattn_command("runs", "show", tmp_path / "empty")
    assert code == 0
    assert "no verdicts" in out
    code, _, err = effattn_command("runs", "compact", tmp_path / "empty")
    assert code == 2
    assert "has no verdicts" in err
    # Beside others it is left out of a query; alone there is nothing to ask about.
    write(tmp_path / "other", [verdict(0, 0.5)])
    asked = "query", "SELECT count(*) AS n FROM verdicts"
    code, out, err = effattn_command("runs", *asked, tmp_path / "empty", tmp_path / "other", "--json")
    assert (code, json.loads(out)) == (0, {"n": 1})
    assert "empty: it has no verdicts; it is left out" in err
    code, out, err = effattn_command("runs", *asked, tmp_path / "empty")
    assert (code, out) == (2, "")
    assert "no verdicts in any of the runs" in err


# diff


def test_difference_sorts_changes(two_runs: tuple[Path, Path]) -> None:
    found = catalog.compare(*(catalog.verdicts_by_case(run) for run in two_runs))
    seeds = {
        name: [change.after.case.seed for change in getattr(found, name)]
        for name in ("broken", "mended", "worse", "better", "other")
    }
    assert seeds == {"broken": [0], "mended": [1], "worse": [2], "better": [3], "other": []}
    assert (found.both, found.only_before, found.only_after) == (5, 1, 1)
    assert found.regressed


def test_diff_exits_with_one_where_something_broke(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    code, out, _ = effattn_command("runs", "diff", "first", "second")
    assert code == 1
    assert "broken: 1" in out
    assert "pass 0.50 -> inaccurate 2.00" in out
    assert "5 cases compared: 1 broken, 1 notably worse, 1 mended, 1 notably better." in out
    code, out, _ = effattn_command("runs", "diff", "second", "first")
    assert code == 1
    assert "pass 0.50 -> inaccurate 3.00" in out
    code, out, _ = effattn_command("runs", "diff", "first", "first")
    assert code == 0
    assert "6 cases compared: 0 broken" in out


def test_changes_to_and_from_what_is_set_aside_are_kinds_of_their_own(
    effattn_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    unsupported, unjudged = Outcome.NOT_SUPPORTED, Outcome.NOT_JUDGED
    outcomes = [
        ("unjudged", Outcome.PASS, unsupported),
        ("unjudged", Outcome.PASS, unjudged),
        ("failing", unsupported, Outcome.CRASHED),
        ("failing", unjudged, Outcome.INACCURATE),
        ("other", Outcome.INACCURATE, unsupported),
        ("other", unjudged, Outcome.PASS),
        ("other", unjudged, unsupported),
        ("other", Outcome.CRASHED, Outcome.INACCURATE),
        ("broken", Outcome.PASS, Outcome.CRASHED),
        ("mended", Outcome.CRASHED, Outcome.PASS),
        ("", unsupported, unsupported),
    ]
    for name, of in (("before", 1), ("after", 2)):
        write(tmp_path / name, [verdict(s, 0.05, each[of]) for s, each in enumerate(outcomes)])
    found = catalog.compare(*(catalog.verdicts_by_case(tmp_path / name) for name in ("before", "after")))
    kinds = ("broken", "failing", "unjudged", "mended", "worse", "better", "other")
    seeds = {name: [change.after.case.seed for change in getattr(found, name)] for name in kinds}
    assert seeds == {
        name: [seed for seed, (kind, *_) in enumerate(outcomes) if kind == name] for name in kinds
    }
    assert [len(kind.changes) for kind in found.kinds] == [1, 2, 2, 0, 4, 1, 0]
    code, out, _ = effattn_command("runs", "diff", "before", "after")
    assert code == 1
    assert "failing and not judged before: 2" in out
    assert "passed and judged no more: 2" in out
    sentence = (
        "11 cases compared: 1 broken, 2 failing and not judged before, 2 passed and judged no more, 0 notably worse, "
        "4 other outcome, 1 mended, 0 notably better."
    )
    assert out.splitlines()[-1] == sentence
    # What fails now and was not judged before is told by the exit code alone too; what is judged no more is not.
    for seed, exit_code in ((2, 1), (0, 0), (4, 0)):
        _, was, now = outcomes[seed]
        for name, outcome in (("one", was), ("other", now)):
            write(tmp_path / f"{name}{seed}", [verdict(seed, 0.05, outcome)])
        assert effattn_command("runs", "diff", f"one{seed}", f"other{seed}")[0] == exit_code


def test_runs_without_a_common_case_cannot_be_compared(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    code, _, err = effattn_command("runs", "diff", "first", OLD)
    assert code == 2
    assert "no case in common" in err


def test_cases_of_several_methods_are_matched_by_method(tmp_path: Path) -> None:
    def keyed(spec: str, fraction: float) -> dict[records.Key, Verdict]:
        item = verdict(0, fraction)
        return {records.Key(item.case.id, spec, "cpu"): item}

    both = keyed("a", 0.2) | keyed("b", 0.9)
    assert catalog.compare(both, keyed("b", 0.9)).worse == []
    # One method each: a kernel against its successor.
    assert len(catalog.compare(keyed("old", 0.2), keyed("new", 0.9)).worse) == 1


def test_nan_is_worse_than_any_number() -> None:
    nan = verdict(0, float("nan"), Outcome.INACCURATE)
    assert catalog.fraction(nan) == float("inf")


# compact and query


def test_table_has_every_field_of_a_case_and_what_it_is(tmp_path: Path) -> None:
    """Of a case that says as little as it can, and of one in which each field is another than usual."""
    least = Case(q_len=3, kv_len=7, head_dim=8, dtype="fp16")
    given: dict[str, Any] = {
        "batch": 2, "heads": 4, "kv_heads": 2, "q_len": 4, "kv_len": 6, "head_dim": 16, "v_dim": 32, "dtype": "bf16",
        "causal": "top-left", "scale": 0.3, "window": (2, -1), "softcap": 30.1, "alibi": "geometric", "bias": "bhqk:fp32",
        "mask": "qk", "sinks": True, "lengths": "kv", "dropout": 0.1, "backward": True, "layout": "bshd",
        "values": "outliers", "seed": 2**63 - 1,
    }  # fmt: skip
    most = Case(**given)
    assert given.keys() == {field.name for field in fields(Case)}, (
        "a new field is to have a column, and a value here"
    )
    assert all(getattr(most, name) != getattr(least, name) for name in given)
    run = write(tmp_path / "run", [replace(verdict(0, 0.5), case=case) for case in (least, most)])
    names, rows = tables.query("SELECT * FROM verdicts ORDER BY q_len", [run])
    assert set(given) <= set(names)
    for case, row in zip((least, most), rows, strict=True):
        found = dict(zip(names, row, strict=True))
        for name in given:
            value = getattr(case, name)
            value = list(value) if isinstance(value, tuple) else value
            assert (found[name], type(found[name])) == (value, type(value)), name
    asked = """SELECT q_len FROM verdicts WHERE "window"[1] = 2 AND sinks AND "values" = 'outliers'"""
    assert tables.query(asked, [run])[1] == [(4,)]


def test_table_of_other_columns_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an older effattn made it, which had fewer."""
    run = write(tmp_path / "run", [verdict(0, 0.5)])
    with monkeypatch.context() as patch:
        patch.setattr(tables, "_CASE", tuple(field for field in tables._CASE if field[0] != "softcap"))
        assert "softcap" not in tables.query("SELECT * FROM verdicts", [run])[0]
        older = (run / tables.PARQUET).read_bytes()
    assert "softcap" in tables.query("SELECT * FROM verdicts", [run])[0]
    assert (run / tables.PARQUET).read_bytes() != older


def test_table_has_what_the_records_have(two_runs: tuple[Path, Path]) -> None:
    first = two_runs[0]
    made = tables.compact(first)
    assert (made.rows, made.file) == (6, first / "verdicts.parquet")
    names, rows = tables.query("SELECT * FROM verdicts ORDER BY seed", [first])
    for row, item in zip(rows, store.read_verdicts(first), strict=True):
        found = dict(zip(names, row, strict=True))
        for field in fields(Case):
            assert found[field.name] == getattr(item.case, field.name), field.name
        out, lse = item.quantities
        assert found["run"] == str(first)
        assert found["case_id"] == item.case.id
        assert found["spec"] == "mine.py:f"
        assert found["method"] == "mine"
        assert Case.from_json(found["recipe"]) == item.case
        assert found["outcome"] == str(item.outcome)
        assert found["message"] == (None if item.outcome == Outcome.PASS else item.message)
        assert found["fraction"] == pytest.approx(out.fraction)
        assert found["other_fractions"] == {"lse": pytest.approx(lse.fraction)}
        assert (found["count"], found["ulp_p99"], found["z_rms"]) == (24, 2.0, 0.5)
        assert found["bit_equal"] is None
        assert found["worst"] == [0, 0, 1, 2]
        assert (found["seconds"], found["method_seconds"]) == (0.75, 0.25)


def test_verdicts_of_laws_are_kept_beside_that_of_the_case(tmp_path: Path) -> None:
    items = [verdict(0, 0.5), *(verdict(0, 0.5, law=law) for law in ("a law", "another law"))]
    folder = write(tmp_path / "run", items)
    assert [record.key.law for record in store.read_records(folder)] == ["", "a law", "another law"]
    _, rows = tables.query("SELECT law FROM verdicts ORDER BY law NULLS FIRST", [folder])
    assert rows == [(None,), ("a law",), ("another law",)]
    found = catalog.verdicts_by_case(folder)
    assert catalog.compare(found, found).both == 3


def test_numbers_that_json_has_not_are_numbers_in_the_table(tmp_path: Path) -> None:
    write(tmp_path / "run", [verdict(0, float("inf"), Outcome.INACCURATE), verdict(1, float("nan"))])
    _, rows = tables.query(
        "SELECT isinf(fraction), isnan(out_fraction) FROM verdicts ORDER BY seed", [tmp_path / "run"]
    )
    assert rows == [(True, False), (False, True)]


def test_compaction_leaves_out_what_is_damaged_and_says_so(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    file = two_runs[0] / "verdicts.jsonl"
    kept = file.read_bytes()
    broken = bytearray(kept)
    broken[300] ^= 4
    file.write_bytes(broken)
    code, out, err = effattn_command("runs", "compact", "first")
    assert code == 0
    assert out.startswith("5 verdicts in ")
    assert "line 1 is damaged: its checksum does not match" in err
    assert file.read_bytes() == broken, "the records stay as they are"


def test_table_is_made_anew_when_the_records_changed(two_runs: tuple[Path, Path]) -> None:
    first = two_runs[0]
    count = "SELECT count(*) FROM verdicts"
    assert tables.query(count, [first])[1] == [(6,)]
    (first / "verdicts-more.jsonl").write_bytes(
        records.encode(verdict(77, 0.1), spec="mine.py:f", device="cpu")
    )
    assert tables.query(count, [first])[1] == [(7,)]
    (first / "verdicts.parquet").write_bytes(b"not parquet")
    assert tables.query(count, [first])[1] == [(7,)]


def asked(
    folder: Path, sql: str = "SELECT * EXCLUDE (run) FROM verdicts ORDER BY seed"
) -> tuple[object, list[str]]:
    """The rows of a query, and what it names as damaged."""
    damaged: list[records.Damage] = []
    return tables.query(sql, [folder], damaged=damaged)[1], [str(each) for each in damaged]


def test_any_flipped_bit_of_the_table_is_found(two_runs: tuple[Path, Path]) -> None:
    first = two_runs[0]
    right = asked(first)
    file = first / "verdicts.parquet"
    whole = file.read_bytes()
    bad = bytearray(whole)
    for place in range(len(whole)):
        bad[place] ^= 1 << place % 8
        file.write_bytes(bad)
        assert not tables._is_whole(file), place
        bad[place] = whole[place]
    file.write_bytes(whole)
    assert tables._is_whole(file)
    # Near the start are the columns, at the end the metadata.
    for place in (0, 200, 700, len(whole) // 2, whole.rindex(b"effattn_crc32"), len(whole) - 6):
        bad = bytearray(whole)
        bad[place] ^= 2
        file.write_bytes(bad)
        assert asked(first) == right, place
        assert tables._is_whole(file), "it is made anew"


def test_table_of_something_else_is_made_anew(tmp_path: Path) -> None:
    """One that is whole and of another run, that another program wrote, or that is a link to one elsewhere."""
    import duckdb

    # Of the same size, to the byte.
    first, second = (write(tmp_path / f"{x}", [verdict(0, x)]) for x in (0.25, 0.75))
    assert len({(run / "verdicts.jsonl").stat().st_size for run in (first, second)}) == 1
    right, other = asked(first), asked(second)
    assert right != other
    file = first / "verdicts.parquet"
    shutil.copy(second / "verdicts.parquet", file)
    assert asked(first) == right
    file.unlink()
    duckdb.sql("SELECT 1 AS seed").write_parquet(str(file))
    assert asked(first) == right
    file.unlink()
    file.symlink_to(second / "verdicts.parquet")
    assert asked(first) == right
    assert asked(second) == other


def test_table_is_used_again_where_nothing_changed(two_runs: tuple[Path, Path]) -> None:
    file = tables.compact(two_runs[0]).file
    made = file.stat().st_ino
    asked(two_runs[0])
    assert file.stat().st_ino == made
    records_file = two_runs[0] / "verdicts.jsonl"
    records_file.write_bytes(records_file.read_bytes().replace(b'"fraction":0.5', b'"fraction":0.6', 1))
    asked(two_runs[0])
    assert file.stat().st_ino != made


def listed(effattn_command: Command, *arguments: object) -> list[str]:
    """What a command names on stderr."""
    return sorted(effattn_command(*arguments)[2].splitlines())


def flip_record(folder: Path) -> None:
    file = folder / "verdicts.jsonl"
    whole = bytearray(file.read_bytes())
    whole[300] ^= 4
    file.write_bytes(whole)


def flip_provenance(folder: Path) -> None:
    file = folder / "provenance.json"
    file.write_bytes(file.read_bytes().replace(b"2030", b"2031", 1))


@pytest.mark.parametrize(
    "damage",
    [
        [flip_record],
        [flip_provenance],
        [flip_provenance, flip_record],
        [lambda folder: (folder / "verdicts-2.jsonl").symlink_to("verdicts.jsonl")],
        [lambda folder: (folder / "verdicts.jsonl").write_text("nothing\n" * 3)],
        [
            lambda folder: (folder / "verdicts-2.jsonl").write_text("nothing\n" * 1005)
        ],  # more than a table tells of
    ],
)
def test_query_names_what_the_others_name_after_a_table_was_made_and_when_it_is_mended(
    effattn_command: Command, two_runs: tuple[Path, Path], damage: list[Callable[[Path], object]]
) -> None:
    first = two_runs[0]
    query = "runs", "query", "SELECT 1", "first"
    kept = {file: file.read_bytes() for file in first.iterdir()}
    tables.compact(first)
    shutil.rmtree(two_runs[1])
    for harm in damage:
        harm(first)
        named = [line for line in listed(effattn_command, "runs", "show", "first") if line]
        assert named
        assert listed(effattn_command, "runs", "list") == named
        for _ in range(2):
            found = [line for line in listed(effattn_command, *query) if "no verdicts" not in line]
            assert found == named
    (first / "verdicts-2.jsonl").unlink(missing_ok=True)
    for file, content in kept.items():
        file.write_bytes(content)
    for arguments in (query, ("runs", "show", "first"), ("runs", "list")):
        assert listed(effattn_command, *arguments) == []


def test_run_that_is_named_twice_counts_once(effattn_command: Command, two_runs: tuple[Path, Path]) -> None:
    shutil.copytree(two_runs[0], two_runs[0].parent / "copy")
    code, out, err = effattn_command(
        "runs",
        "query",
        "SELECT count(*) AS n FROM verdicts",
        "first",
        two_runs[0],
        "copy",
        "second",
        "--json",
    )
    assert (code, json.loads(out)) == (0, {"n": 12})
    assert err.count("is the same run as") == 2


def test_two_columns_of_a_name_are_no_object(effattn_command: Command, two_runs: tuple[Path, Path]) -> None:
    sql = "SELECT 1 AS a, 2 AS a, 3 AS b"
    code, out, err = effattn_command("runs", "query", sql, "first", "--json")
    assert (code, out) == (2, "")
    assert "two columns 'a'" in err
    code, out, _ = effattn_command("runs", "query", sql, "first")
    assert (code, out.splitlines()[-1].split()) == (0, ["1", "2", "3"])


def test_folder_whose_name_is_no_utf8_is_compacted_and_asked(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    folder = Path(os.fsdecode(b"effattn-runs/by\xffte"))
    two_runs[0].rename(folder)
    code, out, err = effattn_command("runs", "compact", folder)
    assert (code, err) == (0, "")
    assert out.startswith("6 verdicts in effattn-runs/by\N{REPLACEMENT CHARACTER}te/verdicts.parquet")
    assert {file.name for file in folder.iterdir()} == {
        "verdicts.jsonl",
        "provenance.json",
        "verdicts.parquet",
    }
    made = (folder / "verdicts.parquet").stat().st_ino
    (folder / "verdicts.jsonl").rename(folder / os.fsdecode(b"verdicts-\xff.jsonl"))
    for _ in range(2):
        code, out, err = effattn_command(
            "runs", "query", "SELECT run, count(*) AS n FROM verdicts GROUP BY run", folder, "--json"
        )
        assert (code, err) == (0, "")
        assert json.loads(out) == {"run": "effattn-runs/by\\udcffte", "n": 6}
    assert (folder / "verdicts.parquet").stat().st_ino != made
    code, out, err = effattn_command("runs", "query", "SELECT '\udcff'", folder)
    assert (code, out) == (2, "")
    assert "no UTF-8" in err


def test_temporary_files_in_a_folder_whose_name_is_no_utf8_are_refused(two_runs: tuple[Path, Path]) -> None:
    place = Path(os.fsdecode(b"by\xffte")).absolute()
    place.mkdir()
    for arguments in (["compact", "first"], ["query", "SELECT 1", "first"]):
        done = subprocess.run(
            [sys.executable, "-c", "import sys; from effattn.cli import main; sys.exit(main())", "runs", *arguments],
            capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": str(place)},
        )  # fmt: skip
        if arguments[0] == "compact":  # which needs no more of it than a place for links
            assert (done.returncode, done.stderr) == (0, "")
        else:
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith("effattn: the folder for temporary files")
            assert "TMPDIR" in done.stderr


def test_records_that_grow_are_read_once(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    """DuckDB would read them again, with what was added since they were looked at, half a line perhaps."""
    import fcntl

    first = two_runs[0]
    own, copied = [first / "verdicts.jsonl"], [tmp_path / "whole.jsonl"]
    assert tables._whole(first, tmp_path, []) == (own, 6)
    with (first / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert tables._whole(first, tmp_path, []) == (copied, 6)
        assert tables.compact(first).rows == 6


def test_name_of_a_folder_is_harmless_on_a_terminal(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    folder = two_runs[0].rename(
        two_runs[0].parent / "a\x1b[31m\x07b"
    )  # click takes the former out, but for terminals
    flip_record(folder)
    for arguments in (
        ["runs", "compact"],
        ["runs", "show"],
        ["runs", "query", "SELECT DISTINCT run FROM verdicts"],
        ["report", "--markdown", folder / "a.md", "--junit", folder / "a.xml"],
    ):
        code, out, err = effattn_command(*arguments, folder)
        assert code == 0, err
        assert "is damaged" in err
        assert not {"\x1b", "\x07"} & set(out + err)


def test_old_run_and_several_runs_are_asked_together(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    import shutil

    old = tmp_path / "old"
    shutil.copytree(OLD, old)
    _, rows = tables.query("SELECT run, count(*) FROM verdicts GROUP BY run ORDER BY 2", [*two_runs, old])
    assert sorted(rows) == sorted([(str(two_runs[0]), 6), (str(two_runs[1]), 6), (str(old), 9)])


def test_run_in_a_folder_that_cannot_be_written_is_asked(
    two_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Root may write anywhere, so the answer of the system is what is changed here.
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert tables.query("SELECT count(*) FROM verdicts", [two_runs[0]])[1] == [(6,)]
    assert not (two_runs[0] / "verdicts.parquet").exists()


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM verdicts",
        "COPY (SELECT 1) TO 'effattn-runs/first/verdicts.parquet' (USE_TMP_FILE false)",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO 'effattn-runs/first/verdicts.parquet' (FORMAT parquet, USE_TMP_FILE false)",
        "SELECT * FROM read_csv('secret.csv')",
        "PRAGMA version",
        "CREATE TABLE x AS SELECT 1",
        "DROP VIEW verdicts",
        "COPY (SELECT 1) TO 'written.csv'",
        "ATTACH 'written.db'",
        "SET enable_external_access = true",
        "INSTALL httpfs",
        "SELECT 1; DROP VIEW verdicts",
        "SELECT * FROM read_text('secret.txt')",
        "SELECT * FROM 'secret.csv'",
        "SELECT * FROM glob('*')",
        "SELECT nothing FROM verdicts",
        "SELECT",
        "",
    ],
)
def test_sql_that_does_more_than_read_the_table_is_refused(
    effattn_command: Command, two_runs: tuple[Path, Path], sql: str
) -> None:
    Path("secret.txt").write_text("secret")
    Path("secret.csv").write_text("a,b\n1,secret\n")
    tables.compact(two_runs[0])
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    code, out, err = effattn_command("runs", "query", sql, "first")
    assert code == 2, out
    assert err.startswith("effattn: ")
    assert "secret" not in out
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


#: Rows without end, as many joins as it takes.
ENDLESS = "SELECT count(*) FROM range(1000000) a, range(1000000) b, range(1000000) c WHERE a.range + b.range <> c.range"


def test_query_that_takes_too_long_is_ended(effattn_command: Command, two_runs: tuple[Path, Path]) -> None:
    code, out, err = effattn_command("runs", "query", ENDLESS, "first", "--timeout", "0.2")
    assert (code, out) == (2, "")
    assert "the query was not done after 0.2 s and was ended" in err
    assert "--timeout" in err
    code, out, _ = effattn_command("runs", "query", "SELECT count(*) AS n FROM verdicts", "first", "--json")
    assert (code, json.loads(out)) == (0, {"n": 6})


def test_query_is_ended_by_an_interrupt(two_runs: tuple[Path, Path]) -> None:
    tables.compact(two_runs[0])
    # The signal comes while DuckDB works: the query has no end.
    main = (
        "import os, signal, sys, threading\n"
        "from effattn.cli import main\n"
        "from effattn.run import tables\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "answer = tables._answer\n"
        "def interrupted(*arguments):\n"
        "    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    return answer(*arguments)\n"
        "tables._answer = interrupted\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", main, "runs", "query", ENDLESS, "first"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, ""), done.stderr
    assert "interrupted" in done.stderr


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT a.range FROM range(1000000) a, range(2) b", ["more than 1,000,000 rows", "LIMIT"]),
        ("SELECT list(a.range::VARCHAR || b.range) FROM range(1000000) a, range(100) b", ["Out of Memory"]),
    ],
)
def test_query_that_takes_too_much_is_ended(two_runs: tuple[Path, Path], sql: str, words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        tables.query(sql, [two_runs[0]])
    for word in words:
        assert word in str(refused.value)


def test_query_names_what_it_leaves_out(effattn_command: Command, two_runs: tuple[Path, Path]) -> None:
    """The first time, when the table is made, and the second time, when it is there."""
    file = two_runs[0] / "verdicts.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    for _ in range(2):
        code, out, err = effattn_command(
            "runs", "query", "SELECT count(*) AS n FROM verdicts", "first", "--json"
        )
        assert (code, json.loads(out)) == (0, {"n": 5})
        assert "verdicts.jsonl, line 6 is damaged: it is cut off" in err
    code, _, err = effattn_command("runs", "query", "SELECT 1", "second")
    assert (code, err) == (0, "")


def record_line(body: bytes) -> bytes:
    return b'{"crc32":"%08x","body":%s}\n' % (zlib.crc32(body), body)


WRONG: dict[str, Callable[[dict[str, Any]], None]] = {
    "seconds": lambda body: body["verdict"].update(seconds=3),
    "text seconds": lambda body: body["verdict"].update(seconds={"method": "soon"}),
    "fraction": lambda body: body["verdict"]["quantities"][0].update(fraction="much"),
    "size": lambda body: body["verdict"]["case"].update(q_len=-5),
    "quantities": lambda body: body["verdict"].update(quantities="none"),
    "surrogate": lambda body: body["verdict"].update(method="\ud800"),
    "count": lambda body: body["verdict"]["quantities"][0].update(count=10**400),
    "method": lambda body: body["verdict"].update(method=5),
    "outcome": lambda body: body["verdict"].update(outcome="fine"),
    "empty": lambda body: body["verdict"].clear(),
    "replay": lambda body: body["verdict"].pop("replay"),
    "field": lambda body: body["verdict"].update(extra=1),
    "field of a quantity": lambda body: body["verdict"]["quantities"][0].update(zzz=1),
    "values": lambda body: body["verdict"]["case"].update(values="unheard of"),
    "place": lambda body: body["verdict"]["quantities"][0].update(worst=[0, 2**40]),
    "truth": lambda body: body["verdict"]["quantities"][0].update(fraction=True),
    "no number": lambda body: body["verdict"]["quantities"][0].update(fraction=float("nan")),
    "nested": lambda body: body["verdict"].update(findings=json.loads("[" * 90 + "]" * 90)),
}


@pytest.mark.parametrize("wrong", [*WRONG, "nested without end"])
def test_record_with_a_right_checksum_and_wrong_content_is_named_and_the_rest_is_read(
    effattn_command: Command, two_runs: tuple[Path, Path], wrong: str
) -> None:
    file = two_runs[0] / "verdicts.jsonl"
    line, *rest = file.read_bytes().splitlines(keepends=True)
    body = json.loads(line)["body"]
    if wrong in WRONG:
        WRONG[wrong](body)
    told = json.dumps(body).encode()
    if wrong not in WRONG:
        told = told.replace(b'"findings": []', b'"findings": ' + b"[" * 5000 + b"]" * 5000)
    file.write_bytes(b"".join([record_line(told), *rest]))
    for arguments, found in (
        (["list"], "first"),
        (["show", "first"], ""),
        (["compact", "first"], "5 verdicts in"),
        (["query", "SELECT count(*) AS n FROM verdicts", "first", "--json"], '{"n": 5}'),
    ):
        code, out, err = effattn_command("runs", *arguments)
        assert code == 0, err
        assert found in out
        assert err.count("first/verdicts.jsonl, line 1 is damaged: it") == 1
        assert len(err.splitlines()) == 1


def test_what_is_recorded_twice_counts_once_wherever_it_is_counted(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    file = two_runs[0] / "verdicts.jsonl"
    file.write_bytes(file.read_bytes() * 2)
    assert catalog.entry(two_runs[0]).recorded == 6
    assert tables.compact(two_runs[0]).rows == 6
    assert tables.query("SELECT count(*) FROM verdicts", [two_runs[0]])[1] == [(6,)]


def test_full_disk_ends_a_compaction_with_a_message(two_runs: tuple[Path, Path]) -> None:
    write(Path("large"), [verdict(seed, 0.1, message=str(seed) * 100) for seed in range(300)])
    for arguments in (["compact", "large"], ["query", "SELECT 1", "large"]):
        done = subprocess.run(
            [sys.executable, "-c", SMALL_DISK, "runs", *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("effattn: cannot write")
        assert "Traceback" not in done.stderr


#: The command line where no file can be larger than a page.
SMALL_DISK = (
    "import resource, signal, sys; from effattn.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    " resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); sys.exit(main())"
)


@pytest.mark.parametrize("given", ["inf", "nan", "1e300", "86401", "0"])
def test_time_that_is_none_is_refused(
    effattn_command: Command, two_runs: tuple[Path, Path], given: str
) -> None:
    code, out, err = effattn_command("runs", "query", "SELECT 1", "--timeout", given)
    assert (code, out) == (2, "")
    assert "--timeout" in err
    assert effattn_command("runs", "query", "SELECT 1", "--timeout", "86400")[0] == 0


def test_rows_are_strict_json(effattn_command: Command, two_runs: tuple[Path, Path]) -> None:
    sql = "SELECT 'nan'::REAL AS a, ['inf'::DOUBLE, 1.5] AS b, {'c': '-inf'::REAL} AS d"
    code, out, _ = effattn_command("runs", "query", sql, "--json")
    assert (code, out) == (0, '{"a": null, "b": [null, 1.5], "d": {"c": null}}\n')


# A damaged provenance


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("evidence", []),
        ("evidence", "none"),
        ("evidence", {"alarms": [1]}),
        ("evidence", {"unsteady": 3}),
        ("working_directory", [1]),
        ("sources", [1]),
        ("started", 5),
        ("cases", "many"),
        ("id", "000000000000"),
        ("written_as", 1),
    ],
)
def test_provenance_with_a_field_of_another_form_is_named_and_the_rest_is_read(
    effattn_command: Command, two_runs: tuple[Path, Path], field: str, value: object
) -> None:
    say(two_runs[0], **{field: value})
    complaint = f"first/provenance.json: {field}: of another form"
    for arguments, words in (
        (["list"], "first"),
        (["show", "first"], "inaccurate"),
        (["show", "first", "--json"], "kind"),
    ):
        code, out, err = effattn_command("runs", *arguments)
        assert code == 0, err
        assert words in out
        assert "000000000000" not in out
        assert err.count(complaint) == 1
    with pytest.raises(RequestError, match=f"{field}: of another form"):
        store.read_provenance(two_runs[0])


def test_provenance_with_numbers_that_json_has_not_is_shown_as_json(
    effattn_command: Command, two_runs: tuple[Path, Path]
) -> None:
    file = two_runs[0] / "provenance.json"
    file.write_text(file.read_text().replace("{", '{"far": 1e400, ', 1))
    code, out, _ = effattn_command("runs", "show", "first", "--json")
    assert (code, json.loads(out)["far"]) == (0, None)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "it is no JSON, at byte"),
        (lambda text: b"", "it is empty"),
        (lambda text: text.replace(b'"kind"', b'"kin\xff"'), "it is no text"),
        (
            lambda text: text.replace(b"{", b'{"far": ' + b"9" * 5000 + b",", 1),
            "it has a number of too many digits",
        ),
        (lambda text: b"[]", "it is no JSON object"),
        (
            lambda text: text.replace(b"{", b'{"x":' + b"[" * 5000 + b"]" * 5000 + b",", 1),
            "it is nested too deeply",
        ),
    ],
)
def test_damaged_provenance_is_named_and_the_rest_is_read(
    effattn_command: Command, two_runs: tuple[Path, Path], damage: Callable[[bytes], bytes], words: str
) -> None:
    first, second = two_runs
    identity = store.content_id(first)
    file = first / "provenance.json"
    file.write_bytes(damage(file.read_bytes()))
    complaint = f"first/provenance.json: {words}"

    code, out, err = effattn_command("runs", "list")
    assert code == 0
    assert sorted(line.split()[:2] for line in out.splitlines()[2:]) == sorted(
        [["first", identity], ["second", store.content_id(second)]]
    )
    assert complaint in err
    assert "its verdicts are kept and read" in err
    for arguments, exit_code, found in (
        (["show", "first"], 0, "inaccurate"),
        (["diff", "first", "second"], 1, "5 cases compared: 1 broken"),
        (["compact", "first"], 0, "6 verdicts in"),
        (["query", "SELECT count(*) AS n FROM verdicts", "first", "--json"], 0, '{"n": 6}'),
    ):
        code, out, err = effattn_command("runs", *arguments)
        assert code == exit_code, err
        assert found in out
        assert complaint in err
        assert err.count("provenance.json") == 1
    code, out, err = effattn_command(
        "report", identity, "--history", "effattn-runs", "--markdown", "summary.md"
    )
    assert code == 0, err
    assert err.count(complaint) == 1
    assert "provenance.json" in Path("summary.md").read_text()
    assert "provenance.json" in (first / "report.html").read_text()
    code, _, err = effattn_command("baseline", "first", "--file", "baseline.toml")
    assert code == 2
    assert complaint in err


@pytest.mark.parametrize("levels", [60, 500, 900, 2000, 20_000])
def test_provenance_that_is_nested_deeply_is_named_by_all(
    effattn_command: Command, two_runs: tuple[Path, Path], levels: int
) -> None:
    file = two_runs[0] / "provenance.json"
    file.write_text('{"kind": "effattn run", "schema": 2, "x": ' + "[" * levels + "]" * levels + "}")
    for arguments in (
        ["runs", "list"],
        ["runs", "show", "first"],
        ["runs", "show", "first", "--json"],
        ["runs", "query", "SELECT 1", "first"],
        ["report", "first"],
    ):
        code, _, err = effattn_command(*arguments)
        assert code == 0, err
        assert err.count("first/provenance.json: it is nested too deeply") == 1


def test_damaged_provenance_of_the_first_schema_is_read(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "old")
    whole = store.content_id(tmp_path / "old")
    (tmp_path / "old" / "provenance.json").write_text("{")
    damaged: list[records.Damage] = []
    assert len(list(store.read_verdicts(tmp_path / "old", damaged))) == 9
    assert len(damaged) == 1
    assert store.content_id(tmp_path / "old") == whole


def test_folder_with_a_damaged_provenance_is_never_replaced(two_runs: tuple[Path, Path]) -> None:
    """It may be anything, such as the file of another program."""
    (two_runs[0] / "provenance.json").write_text("")
    before = {path: path.read_bytes() for path in two_runs[0].iterdir()}
    with pytest.raises(RequestError, match=r"what may be a run .*it is empty.* never overwritten"):
        store.RunWriter(two_runs[0], overwrite=True)
    assert {path: path.read_bytes() for path in two_runs[0].iterdir()} == before


def test_names_of_users_are_data_in_sql_and_harmless_on_a_terminal(
    effattn_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(tmp_path / "it's a run", [verdict(0, 0.5, method=HOSTILE)], spec=HOSTILE)
    _, rows = tables.query("SELECT method, spec FROM verdicts", [folder])
    assert rows == [(HOSTILE, HOSTILE)]
    code, out, _ = effattn_command("runs", "query", "SELECT method FROM verdicts", folder)
    assert code == 0
    assert "\x1b" not in out
    code, out, _ = effattn_command("runs", "show", folder)
    assert code == 0
    assert "\x1b" not in out


def test_query_as_json(effattn_command: Command, two_runs: tuple[Path, Path]) -> None:
    code, out, _ = effattn_command(
        "runs", "query", "SELECT seed FROM verdicts ORDER BY 1 LIMIT 2", "first", "--json"
    )
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [{"seed": 0}, {"seed": 1}]


def test_what_runs_need_is_named_where_it_is_missing(
    effattn_command: Command, two_runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "duckdb", None)
    code, _, err = effattn_command("runs", "query", "SELECT 1", "first")
    assert code == 2
    assert "effattn[report]" in err
    assert effattn_command("runs", "list")[0] == 0, "listing needs nothing more"
