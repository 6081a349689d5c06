"""The file of draws: checksums, damage, the schema without them, and what reads it."""

from __future__ import annotations

import csv
import fcntl
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from effattn.errors import RequestError
from effattn.report import studies
from effattn.study import plans, recorded
from effattn.study.engine import DRAWS, SCHEMA, STUDY, Job, Point, Store, read_draws

OLD = Path(__file__).parent / "data" / "study-schema-1"
COLUMNS = ("error", "kl")
REQUEST = {"study": "performer"}


def jobs(count: int = 6) -> list[Job]:
    # A comma, a quote and a letter beyond ASCII: what CSV has to keep.
    return [
        Job(point=Point(n=8, head_dim=4, method='a, "b" ü', size=2 + i % 2), draw=i // 2)
        for i in range(count)
    ]


def measure(job: Job) -> dict[str, float]:
    return {"error": 0.1 + job.draw / 7 + job.point.size}


def written(folder: Path) -> Path:
    Store(folder, REQUEST, COLUMNS).run(jobs(), measure)
    return folder / DRAWS


def again(folder: Path) -> list[Job]:
    """What a second run measures; the rows are those of a first in the end."""
    measured: list[Job] = []
    rows = Store(folder, REQUEST, COLUMNS).run(jobs(), lambda job: (measured.append(job), measure(job))[1])
    assert [row.measures for row in rows] == [measure(job) for job in jobs()]
    assert Store(folder, REQUEST, COLUMNS).damaged == []
    return measured


def test_a_flipped_digit_is_named_dropped_and_measured_again(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    lines = whole.split(b"\n")
    assert lines[0].endswith(b",error,kl,crc32")
    place = lines[3].index(b"2.") + 2
    lines[3] = (
        lines[3][:place] + (b"9" if lines[3][place : place + 1] != b"9" else b"8") + lines[3][place + 1 :]
    )
    file.write_bytes(b"\n".join(lines))
    store = Store(tmp_path, REQUEST, COLUMNS)
    assert [str(d) for d in store.damaged] == [f"{file}, line 4 is damaged: its checksum does not match"]
    assert len(store.rows) == 5
    assert again(tmp_path) == [jobs()[2]]
    assert sorted(file.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    expected = {job.key: measure(job) for job in jobs()}
    start = whole.index(b"\n") + 1
    # Every bit of one line, its end included, and some of the others.
    some = random.Random(0)
    places = [(i, bit) for i in range(start, whole.index(b"\n", start) + 1) for bit in range(8)]
    places += [(some.randrange(start, len(whole)), some.randrange(8)) for _ in range(100)]
    for i, bit in places:
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :])
        got = read_draws(file, schema=SCHEMA)
        assert len(got.rows) < 6, (i, bit)
        assert not got.tidy
        assert all(row.measures == expected[row.job.key] for row in got.rows)


@pytest.mark.parametrize("change", [b"pert", b"part,n\nx", b"crc31", b"mess"])
def test_a_damaged_first_line_is_refused(tmp_path: Path, change: bytes) -> None:
    file = written(tmp_path)
    old = {b"pert": b"part", b"part,n\nx": b"part,n", b"crc31": b"crc32", b"mess": b"error"}[change]
    file.write_bytes(file.read_bytes().replace(old, change, 1))
    with pytest.raises(RequestError, match="first line"):
        Store(tmp_path, REQUEST, COLUMNS)


def test_what_is_cut_off_is_dropped_without_a_word(tmp_path: Path) -> None:
    file = written(tmp_path)
    whole = file.read_bytes()
    for left in (len(whole) - 1, len(whole) - 20, 20, 0):
        file.write_bytes(whole[:left])
        assert Store(tmp_path, REQUEST, COLUMNS).damaged == []
        assert len(again(tmp_path)) == 6 - max(0, whole[:left].count(b"\n") - 1)
        assert file.read_bytes() == whole


def test_a_study_without_checksums_is_read_and_goes_on_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    shutil.copytree(OLD, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    plan = plans.adapt(
        plans.profile("linformer", "smoke"), n=(16,), head_dim=(4,), values=("normal",), sizes=(4, 8), draws=2,
        methods=("gaussian, E and F",),
    )  # fmt: skip
    store = Store(folder, plan.request(), plans.ERROR_COLUMNS)
    with (OLD / DRAWS).open(newline="", encoding="utf-8") as file:
        wanted = list(csv.DictReader(file))
    assert len(store.rows) == len(wanted) == 38
    assert [row.measures["error"] for row in store.rows.values()] == [float(row["error"]) for row in wanted]
    # Reading changes nothing.
    assert len(studies.read(folder).tables) == 2
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    every = plans.jobs(plan)
    rows = store.run(every, lambda job: pytest.fail(f"{job} is there"))
    assert len(rows) == len(every) == 38
    assert json.loads((folder / STUDY).read_text())["schema"] == SCHEMA
    found = read_draws(folder / DRAWS, schema=SCHEMA)
    assert found.tidy
    assert {row.job.key: row for row in found.rows} == store.rows
    assert sorted(path.name for path in folder.iterdir()) == [DRAWS, STUDY]


def test_a_study_of_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    written(tmp_path)
    asked = tmp_path / STUDY
    asked.write_text(asked.read_text().replace(f'"schema": {SCHEMA}', '"schema": 99'))
    with pytest.raises(RequestError, match="schema 99, and this effattn knows 2"):
        Store(tmp_path, REQUEST, COLUMNS)


def test_a_file_that_is_written_anew_stays_locked(tmp_path: Path) -> None:
    """Whoever opens the new file, or has opened the old one, is refused."""
    file = written(tmp_path)
    file.write_bytes(file.read_bytes()[:-30])
    script = (
        "import sys\nfrom pathlib import Path\nfrom effattn.study.engine import Store\n"
        f"Store(Path(sys.argv[1]), {REQUEST!r}, {COLUMNS!r}).run([], lambda job: {{}})"
    )

    def second(job: Job) -> dict[str, float]:
        with pytest.raises(BlockingIOError):
            fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
        )
        assert "another study is writing into" in done.stderr
        return measure(job)

    with file.open("a") as old:
        assert len(Store(tmp_path, REQUEST, COLUMNS).run(jobs(), second)) == 6


def test_the_command_says_what_is_damaged(tmp_path: Path, effattn_command) -> None:
    command = (
        "study", "linformer", "--n", "16", "--head-dim", "4", "--values", "normal", "--size", "4,8", "--draws", "2",
        "--method", "mean pooling", "--out", tmp_path / "s",
    )  # fmt: skip
    assert effattn_command(*command)[0] == 0
    file = tmp_path / "s" / DRAWS
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"mean pooling,4,0", b"mean pooling,8,0", 1))
    code, _, err = effattn_command(*command)
    assert code == 0
    assert (
        f"{file}, line 2 is damaged: its checksum does not match; the draw is dropped and measured again"
        in err
    )
    assert sorted(file.read_bytes().split(b"\n")) == sorted(whole.split(b"\n"))


def test_a_report_names_damaged_draws_and_a_record_refuses_them(tmp_path: Path, effattn_command) -> None:
    file = written(tmp_path / "s")
    file.write_bytes(file.read_bytes().replace(b"fp32", b"fp31", 1))
    (damage,) = studies.read(tmp_path / "s").damaged
    assert (damage.file, damage.line) == (file, 2)
    with pytest.raises(RequestError, match=r"line 2 is damaged: .*; run the study again"):
        recorded.rows_of(tmp_path / "s", COLUMNS)
