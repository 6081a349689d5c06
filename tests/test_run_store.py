"""Run folders: complete or not there, never over somebody else's files; and how counterexamples get small.

One file, longer than others: most tests damage the same small run, each in its own way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from effattn.case import Case
from effattn.errors import RequestError
from effattn.report import gather
from effattn.run import catalog, migrate, provenance, records, shrink, store
from effattn.tolerances.statistics import Finding
from effattn.verdict import Outcome, Quantity, Verdict

CASE = Case(
    batch=3, heads=6, kv_heads=2, q_len=70, kv_len=133, head_dim=40, v_dim=24, dtype="bf16",
    causal="bottom-right", scale=0.25, layout="bshd+pad+offset", values="outliers", seed=7,
)  # fmt: skip


def verdict(case: Case, outcome: Outcome = Outcome.PASS) -> Verdict:
    return Verdict(
        case=case,
        method="mine",
        outcome=outcome,
        message="two\nlines",
        quantities=(
            Quantity(
                name="out", count=3, fraction=float("inf"), z_rms=0.5, worst=(0, 1, 2, 3), got=float("nan")
            ),
        ),
        findings=(Finding(name="out size", statistic=9.5, p_value=1e-30, threshold=1e-10),),
        seconds={"method": 0.25},
        replay="effattn replay ...",
    )


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# The store


def test_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = [verdict(CASE), verdict(replace(CASE, seed=8), Outcome.BIASED)]
    with store.RunWriter(tmp_path / "deep" / "run") as writer:
        for item in written:
            writer.add(item)
        writer.add_case(CASE)
        writer.add_text("summary.md", "# Summary\n")
        folder = writer.commit({"command": "effattn gate mine"})
    assert folder == tmp_path / "deep" / "run"
    assert names(tmp_path / "deep") == {
        "run", "run/verdicts.jsonl", "run/provenance.json", "run/summary.md",
        "run/cases", f"run/cases/{CASE.id}.json",
    }  # fmt: skip
    # NaN is not equal to itself, so the records are compared as they are written.
    assert [v.to_dict() for v in store.read_verdicts(folder)] == [v.to_dict() for v in written]
    assert store.read_provenance(folder)["command"] == "effattn gate mine"
    assert Case.load(folder / "cases" / f"{CASE.id}.json") == CASE


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add(verdict(CASE))
        writer.commit({})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "run" / "verdicts.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_run_that_is_broken_off_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def break_off() -> None:
        with store.RunWriter(tmp_path / "deep" / "run") as writer:
            writer.add(verdict(CASE))
            writer.add_case(CASE)
            raise error

    with pytest.raises(error):
        break_off()
    assert names(tmp_path) == set()


def test_run_that_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add(verdict(CASE))
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == set()


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with store.RunWriter(tmp_path / "run") as writer:
        writer.commit({})
    assert store.is_run(tmp_path / "run")


def test_run_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add_case(CASE)
        writer.commit({"command": "first"})
    with pytest.raises(RequestError, match="--overwrite"):
        store.RunWriter(tmp_path / "run")
    with store.RunWriter(tmp_path / "run", overwrite=True) as writer:
        assert store.read_provenance(tmp_path / "run")["command"] == "first", (
            "replaced before the new one is whole"
        )
        writer.commit({"command": "second"})
    assert store.read_provenance(tmp_path / "run")["command"] == "second"
    assert names(tmp_path) == {"run", "run/verdicts.jsonl", "run/provenance.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_folders_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "precious.txt").write_text("x")
    (tmp_path / "provenance.json").write_text('{"kind": "another program"}')
    with pytest.raises(RequestError, match="never overwritten"):
        store.RunWriter(tmp_path, overwrite=overwrite)
    assert names(tmp_path) == {"precious.txt", "provenance.json"}


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    first = store.RunWriter(tmp_path / "run")
    (tmp_path / ".run.0.tmp").mkdir()  # what another process would have
    with first:
        first.add(verdict(CASE))
        (tmp_path / ".run.0.tmp" / "provenance.json").write_text('{"kind": "effattn run", "schema": 1}')
        (tmp_path / ".run.0.tmp").rename(tmp_path / "run")
        with pytest.raises(RequestError, match="holds a run already"):
            first.commit({})
    assert names(tmp_path) == {"run", "run/provenance.json"}


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_folder_must_have_a_name(name: str) -> None:
    with pytest.raises(RequestError, match="folder"):
        store.RunWriter(Path(name))


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with store.RunWriter(tmp_path / "run") as writer:
            assert writer._verdicts is not None
            # The same open file, on a device that answers every write as a full disk does.
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, writer._verdicts.fileno())
            os.close(full)
            for _ in range(100):
                writer.add(verdict(CASE))
            writer.commit({})

    with pytest.raises(RequestError, match="No space left"):
        fill()
    assert names(tmp_path) == set()


def recorded(folder: Path, count: int = 4) -> Path:
    with store.RunWriter(folder, spec="mine.py:f") as writer:
        for seed in range(count):
            writer.add(verdict(replace(CASE, seed=seed)))
        writer.commit({"started": "2030-01-01T00:00:00+00:00", "ended": "2030-01-01T00:00:01+00:00"})
    return folder / "verdicts.jsonl"


def seeds(folder: Path, damaged: list[records.Damage]) -> list[int]:
    return [v.case.seed for v in store.read_verdicts(folder, damaged)]


def test_line_that_is_cut_off_is_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    file = recorded(tmp_path / "run")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(RequestError, match=r"verdicts.jsonl, line 4 is damaged: it is cut off"):
        list(store.read_verdicts(tmp_path / "run"))
    damaged: list[records.Damage] = []
    assert seeds(tmp_path / "run", damaged) == [0, 1, 2]
    assert [(d.line, d.reason) for d in damaged] == [(4, "it is cut off")]


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    file = recorded(tmp_path / "run", count=3)
    whole = file.read_bytes()
    first, second, third = whole.splitlines(keepends=True)
    for place in range(len(second)):
        bad = bytearray(second)
        bad[place] ^= 1 << place % 8
        file.write_bytes(first + bytes(bad) + third)
        damaged: list[records.Damage] = []
        found = seeds(tmp_path / "run", damaged)
        # A bit that turns another byte into a newline, or the newline into another byte, makes other lines of it.
        assert damaged, place
        assert found in ([0, 2], [0]), place
        assert damaged[0].line == 2


def test_any_flipped_bit_of_the_provenance_is_found(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    file = tmp_path / "run" / "provenance.json"
    whole = file.read_bytes()
    for place in range(8 * len(whole)):
        bad = bytearray(whole)
        bad[place // 8] ^= 1 << place % 8
        file.write_bytes(bad)
        damaged: list[records.Damage] = []
        assert seeds(tmp_path / "run", damaged) == [0, 1, 2, 3], place
        assert [damage.file for damage in damaged] == [file], place
        with pytest.raises(RequestError, match=r"provenance\.json"):
            store.read_provenance(tmp_path / "run")


def test_provenance_may_be_indented_anew_and_changed_on_purpose(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    file = tmp_path / "run" / "provenance.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(dict(reversed(told.items()))))
    assert store.read_provenance(tmp_path / "run")["started"] == "2030-01-01T00:00:00+00:00"
    file.write_text(json.dumps({**told, "started": "2031"}))
    with pytest.raises(
        RequestError,
        match=r'provenance.json: its checksum does not match.*take "sealed" and "crc32" out of it',
    ):
        store.read_provenance(tmp_path / "run")
    del told["crc32"]
    file.write_text(json.dumps({**told, "started": "2031"}))
    with pytest.raises(RequestError, match="its checksum does not match"):
        store.read_provenance(tmp_path / "run")
    del told["sealed"]
    file.write_text(json.dumps({**told, "started": "2031"}))
    assert store.read_provenance(tmp_path / "run")["started"] == "2031"


def test_provenance_without_verdicts_that_was_changed_is_named(tmp_path: Path) -> None:
    recorded(tmp_path / "run").unlink()
    file = tmp_path / "run" / "provenance.json"
    file.write_text(file.read_text().replace("2030", "2031", 1))
    with pytest.raises(RequestError, match="checksum does not match"):
        store.read_provenance(tmp_path / "run")


def test_pipe_in_place_of_the_provenance_is_never_waited_for(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    (tmp_path / "run" / "provenance.json").unlink()
    os.mkfifo(tmp_path / "run" / "provenance.json")
    with pytest.raises(RequestError, match=r"provenance\.json: it is no file that can be read"):
        store.read_provenance(tmp_path / "run")
    assert seeds(tmp_path / "run", []) == [0, 1, 2, 3]


def test_run_whose_provenance_is_gone_or_says_something_else_is_named_and_never_replaced(
    tmp_path: Path,
) -> None:
    import shutil

    recorded(tmp_path / "run")
    shutil.copytree(Path(__file__).parent / "data" / "run-schema-1", tmp_path / "old")
    old = (tmp_path / "old" / "provenance.json").read_text()
    for name, text in (
        ("run", None),
        ("run", '{"kind": "of another program"}'),
        ("old", None),
        ("old", old.replace('"effattn run"', '"effattn rum"')),
        ("old", old.replace('"kind"', '"kine"')),
    ):
        folder, file = tmp_path / name, tmp_path / name / "provenance.json"
        file.unlink() if text is None else file.write_text(text)
        assert text != old
        words = "it is missing" if text is None else "it does not say that it is of an effattn run"
        found: list[records.Damage] = []
        assert len(list(store.read_verdicts(folder, found))) == (4 if name == "run" else 9)
        assert [(damage.file, damage.reason.startswith(words)) for damage in found] == [(file, True)]
        before = names(tmp_path)
        with pytest.raises(RequestError, match=r"what may be a run .* never overwritten"):
            store.RunWriter(folder, overwrite=True)
        assert names(tmp_path) == before
        assert folder in catalog.runs_in(tmp_path)


def test_files_of_another_program_are_no_run(tmp_path: Path) -> None:
    for text in ("", "1\n2\n", '{"verdict": "guilty"}\n', '{"case": 1}\n', "x" * 3_000_000):
        folder = tmp_path / f"court-{len(text)}"
        folder.mkdir()
        (folder / "verdicts.jsonl").write_text(text)
        assert not store.holds_run(folder)
        (folder / "provenance.json").write_text('{"kind": "of another program"}')
        assert not store.holds_run(folder)
    # Nor is what a gate has written that has not come to its end.
    with store.RunWriter(tmp_path / "run") as writer:
        for _ in range(100):
            writer.add(verdict(CASE))
        assert writer._verdicts is not None
        writer._verdicts.flush()
        assert list(tmp_path.glob(".run.*/verdicts.jsonl"))
        assert catalog.runs_in(tmp_path) == []


def test_any_length_to_which_a_file_is_cut_keeps_the_lines_before(tmp_path: Path) -> None:
    file = recorded(tmp_path / "run", count=2)
    whole = file.read_bytes()
    ends = [i + 1 for i, c in enumerate(whole) if c == ord("\n")]
    for length in range(0, len(whole), 7):
        file.write_bytes(whole[:length])
        damaged: list[records.Damage] = []
        assert len(seeds(tmp_path / "run", damaged)) == sum(end <= length for end in ends)
        assert len(damaged) == (length not in (0, *ends))


def test_record_with_a_right_checksum_and_another_form_is_named(tmp_path: Path) -> None:
    file = recorded(tmp_path / "run", count=1)
    for body in (b"[]", b'{"id":1,"spec":"","device":"","verdict":{}}', b'{"id":"a"}'):
        import zlib

        line = b'{"crc32":"%08x","body":%s}\n' % (zlib.crc32(body), body)
        file.write_bytes(line)
        with pytest.raises(RequestError, match="line 1 is damaged: it has another form"):
            list(store.read_verdicts(tmp_path / "run"))


def test_lines_are_json_that_any_program_reads_and_have_a_key(tmp_path: Path) -> None:
    file = recorded(tmp_path / "run", count=1)
    line = json.loads(file.read_text())
    assert line["body"]["id"] == replace(CASE, seed=0).id
    assert line["body"]["spec"] == "mine.py:f"
    assert line["body"]["device"] == "cpu"
    assert line["body"]["verdict"]["outcome"] == "pass"


@pytest.mark.parametrize("schema", [99, 0, "2", None, True])
def test_other_schema_is_refused(tmp_path: Path, schema: object) -> None:
    (tmp_path / "provenance.json").write_text(json.dumps({"kind": "effattn run", "schema": schema}))
    with pytest.raises(RequestError, match=rf"{schema}.*update effattn"):
        store.read_provenance(tmp_path)


def test_run_of_the_first_schema_is_read_as_one_of_today() -> None:
    folder = Path(__file__).parent / "data" / "run-schema-1"
    assert json.loads((folder / "provenance.json").read_text())["schema"] == 1
    provenance = store.read_provenance(folder)
    assert provenance["schema"] == migrate.SCHEMA
    assert provenance["kind_of_run"] == "gate"
    verdicts = list(store.read_verdicts(folder))
    assert len(verdicts) == provenance["cases"] == 9
    assert sorted({str(v.outcome) for v in verdicts}) == ["non-finite", "pass"]
    kept = list(store.read_records(folder))
    assert [record.key.case_id for record in kept] == [v.case.id for v in verdicts]
    assert {record.key.spec for record in kept} == {"effattn.zoo:last_partial_block_dropped"}
    assert store.find_case(verdicts[0].case.id, folder) == verdicts[0].case
    # Written again, it is the same run.
    assert store.content_id(folder) == records.identity(record.content() for record in kept)


def test_damaged_line_of_the_first_schema_is_named(tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "old"
    shutil.copytree(Path(__file__).parent / "data" / "run-schema-1", folder)
    lines = (folder / "verdicts.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "verdicts.jsonl").write_bytes(lines[0] + b'{"case": 1}\n' + lines[1][:-9])
    damaged: list[records.Damage] = []
    assert len(list(store.read_verdicts(folder, damaged))) == 1
    assert [d.line for d in damaged] == [2, 3]


def test_identity_is_that_of_the_content(tmp_path: Path) -> None:
    def run(name: str, verdicts: list[Verdict], spec: str = "a") -> str:
        with store.RunWriter(tmp_path / name, spec=spec) as writer:
            for item in verdicts:
                writer.add(item)
            writer.commit({"command": name})
        return store.content_id(tmp_path / name)

    one, two = verdict(CASE), verdict(replace(CASE, seed=8))
    first = run("first", [one, two])
    assert run("other order and times", [replace(two, seconds={"method": 9.0}), one]) == first
    assert run("other outcome", [one, replace(two, outcome=Outcome.CRASHED)]) != first
    assert run("fewer", [one]) != first
    assert run("other method", [one, two], spec="b") != first
    # The same records in two files, with one of them twice.
    folder = tmp_path / "two files"
    folder.mkdir()
    (folder / "provenance.json").write_text('{"kind": "effattn run", "schema": 2}')
    for name, items in (("verdicts-1.jsonl", [one]), ("verdicts-2.jsonl", [two, one])):
        (folder / name).write_bytes(b"".join(records.encode(v, spec="a", device="cpu") for v in items))
    assert store.content_id(folder) == first
    assert len(list(store.read_verdicts(folder))) == 2


def test_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    import resource
    import signal

    appender = records.Appender(tmp_path / "verdicts-1.jsonl")
    line = records.encode(verdict(CASE), spec="a", device="cpu")
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # A file that may not grow answers as a full disk does: with a part of what is written.
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(line) * 5 // 2, before[0][1]))
        appender.append(line)
        appender.append(line)
        for _ in range(2):
            with pytest.raises(OSError, match=r"No space|too large"):
                appender.append(line)
        assert appender.file.read_bytes() == line * 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
        appender.close()


def test_case_is_found_by_the_start_of_its_id(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        for seed in range(40):
            writer.add(verdict(replace(CASE, seed=seed)))
        shrunk = replace(CASE, q_len=1)
        writer.add_case(shrunk)
        writer.commit({})
    wanted = replace(CASE, seed=3)
    assert store.find_case(wanted.id, tmp_path / "run") == wanted
    assert store.find_case(wanted.id[:10], tmp_path / "run") == wanted
    assert store.find_case(shrunk.id, tmp_path / "run") == shrunk
    with pytest.raises(RequestError, match="give more of the id"):
        store.find_case("", tmp_path / "run")
    with pytest.raises(RequestError, match="no case"):
        store.find_case("zzzz", tmp_path / "run")


def change_recipe(file: Path) -> None:
    file.write_text(file.read_text().replace('"q_len":1,', '"q_len":11,'))


def make_link(file: Path) -> None:
    other = file.parent.parent / "elsewhere.json"
    file.rename(other)
    file.symlink_to(other)


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_recipe, "is case"),
        (lambda file: file.write_bytes(b"\xff"), "not text in UTF-8"),
        (lambda file: file.write_text("{"), "not JSON"),
        (lambda file: file.write_text("[" * 100_000), "longer than"),
        (make_link, "it is a symbolic link"),
        (make_folder, "it is a folder"),
        (make_pipe, "it is a pipe"),
    ],
)
def test_recipe_that_is_not_that_of_its_name_is_named_and_not_judged(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    shrunk, other = replace(CASE, q_len=1), replace(CASE, q_len=2)
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add(verdict(CASE))
        for case in (CASE, shrunk, other):
            writer.add_case(case)
        writer.commit({})
    file = tmp_path / "run" / "cases" / f"{shrunk.id}.json"
    assert store.read_cases(tmp_path / "run", []) == {c.id: c for c in (CASE, shrunk, other)}
    damage(file)
    with pytest.raises(RequestError, match=words) as refused:
        store.find_case(shrunk.id[:8], tmp_path / "run")
    assert str(refused.value).startswith(str(file))
    assert store.find_case(other.id, tmp_path / "run") == other
    damaged: list[records.Damage] = []
    assert store.read_cases(tmp_path / "run", damaged) == {c.id: c for c in (CASE, other)}
    assert [each.file for each in damaged] == [file]
    material = gather.gather([tmp_path / "run"])
    assert (material.shrunk, material.damaged) == ({other.id: other.to_json()}, damaged)


def test_recipes_behind_a_link_and_records_of_another_case_are_not_judged(tmp_path: Path) -> None:
    recorded(tmp_path / "run", count=1)
    recorded(tmp_path / "other", count=1)
    with store.RunWriter(tmp_path / "elsewhere") as writer:
        writer.add_case(CASE)
        writer.commit({})
    (tmp_path / "run" / "cases").symlink_to(tmp_path / "elsewhere" / "cases")
    damaged: list[records.Damage] = []
    assert store.read_cases(tmp_path / "run", damaged) == {}
    assert [damage.file.name for damage in damaged] == ["cases"]
    line = records.encode(verdict(CASE), spec="", device="cpu")
    body = line[line.index(b'"body":') + 7 : -2].replace(b'"q_len":70', b'"q_len":71')
    import zlib

    (tmp_path / "other" / "verdicts.jsonl").write_bytes(
        b'{"crc32":"%08x","body":%s}\n' % (zlib.crc32(body), body)
    )
    with pytest.raises(RequestError, match=f"recorded as case {CASE.id} is case"):
        store.find_case(CASE.id, tmp_path / "other")


def test_newest_run_is_the_last_one_started(tmp_path: Path) -> None:
    for name, started in (("b", "2030-01-01T00:00:00+00:00"), ("a", "2031-01-01T00:00:00+00:00")):
        with store.RunWriter(tmp_path / name) as writer:
            writer.commit({"started": started})
    (tmp_path / "c").mkdir()
    assert store.newest_run(tmp_path).name == "a"
    with pytest.raises(RequestError, match="--run"):
        store.newest_run(tmp_path / "c")


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "a/b.py:f", "..", "", "x" * 500, "<script>", "tab\tnew\nline", "ä", ".hidden"],
)
def test_names_from_users_stay_inside_the_folder(name: str) -> None:
    made = store.file_name(name)
    assert 1 <= len(made) <= 60
    assert "/" not in made
    assert made not in (".", "..")
    assert not made.startswith(".")
    assert made.isascii()


# Where a run comes from


def test_provenance_says_what_ran_where() -> None:
    collected = provenance.collect(device="cpu")
    assert collected["packages"].keys() >= {"torch", "triton", "numpy", "scipy", "hypothesis"}
    assert collected["machine"]["cpu"]
    assert collected["machine"]["cores"] >= 1
    assert json.loads(json.dumps(collected)) == collected


def test_commit_and_whether_the_tree_is_clean(tmp_path: Path) -> None:
    import subprocess

    assert provenance.commit(tmp_path) == {"commit": None, "clean": None}
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "empty"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    clean = provenance.commit(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["clean"] is True
    (tmp_path / "report.html").write_text("")
    (tmp_path / "inner").mkdir()
    assert provenance.commit(tmp_path / "inner") == clean
    (tmp_path / "kernel.py").write_text("")
    assert provenance.commit(tmp_path / "inner") == {**clean, "clean": False}
    subprocess.run(["git", "-C", str(tmp_path), "add", "kernel.py"], check=True)
    assert provenance.commit(tmp_path) == {**clean, "clean": False}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 2024\nGCC version: 13.2.0\n",
            "550.54.15",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.133.20  Release Build  (root@x)  Sun Mar 30 2025\n",
            "570.133.20",
        ),
        ("something else 1.2.3\n", None),
        (None, None),
    ],
)
def test_version_of_the_driver_is_what_the_kernel_says(
    tmp_path: Path, text: str | None, version: str | None
) -> None:
    file = tmp_path / "version"
    if text is not None:
        file.write_text(text)
    assert provenance.driver_version(file) == version


def test_command_can_be_pasted() -> None:
    line = provenance.command_line(["gate", "my file.py:f", "--out", "a'b"])
    import shlex

    assert shlex.split(line) == ["effattn", "gate", "my file.py:f", "--out", "a'b"]


# Shrinking


def shrunk(start: Case, fails) -> tuple[Case, int]:  # type: ignore[no-untyped-def]
    """Shrink by a predicate on recipes, counting judgements."""

    def judge(case: Case) -> Verdict:
        return verdict(case, Outcome.INACCURATE if fails(case) else Outcome.PASS)

    result = shrink.shrink(judge(start), judge, most_judgements=2000)
    assert result.finished
    assert fails(result.verdict.case)
    return result.verdict.case, result.judgements


def test_everything_that_is_not_needed_goes() -> None:
    case, _ = shrunk(CASE, lambda c: True)
    assert case == Case(q_len=0, kv_len=0, head_dim=1, dtype="bf16")


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda c: c.kv_len > 64, {"kv_len": 65}),
        (lambda c: c.kv_len > 64 and c.kv_len % 2, {"kv_len": 65}),
        (
            lambda c: c.q_len < c.kv_len and c.causal == "bottom-right",
            {"kv_len": 1, "causal": "bottom-right"},
        ),
        (lambda c: c.kv_heads > 1 and c.heads > c.kv_heads, {"heads": 4, "kv_heads": 2}),
        (lambda c: c.head_dim & (c.head_dim - 1), {"head_dim": 3}),
        (lambda c: "offset" in c.layout, {"layout": "bhsd+offset"}),
        (lambda c: c.layout.startswith("bshd"), {"layout": "bshd"}),
        (lambda c: c.scale is not None, {"scale": 0.25}),
        (lambda c: c.values == "outliers" and c.q_len > 3, {"values": "outliers", "q_len": 4}),
        (lambda c: c.v_dim != c.head_dim, {"head_dim": 1, "v_dim": 2}),
        (lambda c: c.batch > 1, {"batch": 2}),
    ],
)
def test_what_is_needed_stays(fails, expected: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    case, judgements = shrunk(CASE, fails)
    plain = {"q_len": 0, "kv_len": 0, "head_dim": 1, "dtype": "bf16"}
    found = {name: value for name, value in case.to_dict().items() if name not in ("schema", "seed")}
    wanted = Case(**{**plain, **expected}).to_dict()
    del wanted["schema"]
    if "v_dim" in expected:
        assert case.v_dim != case.head_dim
        assert max(case.v_dim, case.head_dim) <= 2
    else:
        assert found == wanted
    assert judgements <= 400


def test_steps_only_lead_to_simpler_cases() -> None:
    for case in shrink.candidates(CASE):
        assert case.batch <= CASE.batch
        assert case.heads <= CASE.heads
        assert case.kv_heads <= CASE.kv_heads
        assert case.q_len <= CASE.q_len
        assert case.kv_len <= CASE.kv_len
        assert case.head_dim <= CASE.head_dim


def test_another_outcome_is_another_failure() -> None:
    def judge(case: Case) -> Verdict:
        if case.kv_len > 100:
            return verdict(case, Outcome.BIASED)
        return verdict(case, Outcome.CRASHED)

    result = shrink.shrink(judge(CASE), judge, most_judgements=2000)
    assert result.verdict.outcome == Outcome.BIASED
    assert result.verdict.case.kv_len == 101


def test_search_is_bounded_and_says_so() -> None:
    calls = []

    def judge(case: Case) -> Verdict:
        calls.append(case)
        return verdict(case, Outcome.CRASHED)

    result = shrink.shrink(verdict(CASE, Outcome.CRASHED), judge, most_judgements=3)
    assert not result.finished
    assert result.judgements == len(calls) == 3
