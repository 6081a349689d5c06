"""Studies of a user's own method: what its folder belongs to, what is refused and how, what it costs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from effattn.cli import main
from effattn.report.text import MISSING
from effattn.study.engine import DRAWS, STUDY, Point
from effattn.study.limits import least_bytes

AVERAGE = """
import torch

def attention(q, k, v, *, size, generator):
    {check}
    return v.mean(2, keepdim=True).expand(q.shape){more}
"""
SMALL = ["--n", "16", "--size", "4", "--draws", "2", "--input-scale", "0.5"]


def write(folder: Path, check: str = "pass", more: str = "") -> str:
    path = folder / "average.py"
    path.write_text(AVERAGE.replace("{check}", check).replace("{more}", more), encoding="utf-8")
    return str(path)


def study(method: str, out: Path, *more: str, study: str = "performer", small: list[str] = SMALL) -> int:
    return main(["study", study, "--method", method, *small, *more, "--out", str(out)])


def draws(out: Path, method: str) -> list[dict[str, str]]:
    with (out / DRAWS).open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["method"] == method]


# -- whose a folder is -------------------------------------------------------------------------------------


def test_a_request_that_fails_claims_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert study("positive, iid", out, "--head-dim", "0") == 2
    assert "--head-dim 0: expected at least 1" in capsys.readouterr().err
    assert not out.exists()
    # Refused by what measures, when study.json is written already.
    failing = write(tmp_path, "raise ValueError('no')")
    assert study(failing, out) == 2
    assert json.loads((out / STUDY).read_text())["methods"] == [failing]
    assert study("positive, iid", out) == 0
    assert json.loads((out / STUDY).read_text())["methods"] == ["positive, iid"]
    assert len(draws(out, "positive, iid")) == 2
    # Now it has draws, and is refused to others.
    capsys.readouterr()
    assert study("positive, orthogonal", out) == 2
    assert "holds the draws of another study" in capsys.readouterr().err


def test_a_study_with_other_columns_may_take_a_folder_without_draws(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert study("positive, iid", out) == 0
    path = out / DRAWS
    for left in out.iterdir():
        if left.name not in (DRAWS, STUDY):
            left.unlink()
    header, first, *_ = path.read_bytes().splitlines(keepends=True)
    # A draw, even a damaged one, is not lost; one that was being written is none.
    for held, code in ((header + b"x" + first, 2), (header.replace(b"kl", b"kl2") + first[:9], 0)):
        path.write_bytes(held)
        assert study("positive, orthogonal", out) == code
        assert (path.read_bytes() == held) == (code == 2)


def test_what_else_lies_in_a_folder_keeps_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert study(write(tmp_path, "raise ValueError('no')"), out) == 2
    (out / "notes.txt").write_text("mine")
    assert study("positive, iid", out) == 2


def test_an_edited_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = write(tmp_path)
    assert study(path, out) == 0
    write(tmp_path, more=" * 2")
    capsys.readouterr()
    assert study(path, out) == 2
    said = capsys.readouterr().err
    assert f"{path} was edited since its draws" in said
    assert "another folder with --out" in said
    assert "another study" not in said
    # Where more differs, it is another study.
    assert study(path, out, "--seed", "3") == 2
    assert "another study" in capsys.readouterr().err


# -- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "100000000"], "--n 100000000: expected at most 1048576"),
        (["--size", "100000000"], "--size 100000000: expected at most 1048576"),
        (["--head-dim", "100000000"], "--head-dim 100000000: expected at most"),
        (["--draws", "100000000"], "--draws 100000000: expected at most"),
        (
            ["--n", "1048576", "--size", "1048576"],
            "--size 1048576, --head-dim 16 has to hold 17,593 GB at least",
        ),
        (["--size", "4", "--head-dim", "1048576"], "--head-dim 1048576 has to hold 17,593 GB at least"),
    ],
)
def test_what_no_memory_has_room_for_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "out"
    small = ["--n", "16", "--size", "4", "--draws", "1"]
    assert study("positive, orthogonal", out, small=[*_without(small, options), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def _without(small: list[str], options: list[str]) -> list[str]:
    """An option that is given twice has both values."""
    pairs = zip(small[::2], small[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in options for word in pair]


def test_memory_is_that_of_what_has_to_be_held() -> None:
    def point(**changes: object) -> Point:
        return Point(**{"n": 1024, "head_dim": 16, "method": "positive, iid", "size": 256, **changes})  # pyright: ignore

    features, causal, theirs = (
        least_bytes("performer", p) for p in (point(), point(causal=True), point(method="a.py"))
    )
    assert features - causal == 2 * 1024 * 256 * 8
    assert theirs == 5 * 1024 * 16 * 8
    slots = least_bytes("linformer", point(method="mean pooling"))
    assert slots - theirs == 2 * 1024 * 256 * 8
    assert least_bytes("linformer", point(part="lemma", method="R^T R")) == 1024 * 1024 * 8
    assert least_bytes("linformer", point(part="spectrum")) > 3 * 1024 * 1024 * 8
    assert least_bytes("performer", point(part="moments")) == 0


@pytest.mark.parametrize(
    ("check", "more", "message"),
    [
        (
            "assert size % 2 == 0",
            "",
            "size = 1, n = 16, float32. Where it takes some sizes only, name them with --size",
        ),
        ("assert q.dtype != torch.float32", "", "size = 1, n = 16, float32."),
        ("assert q.dtype != torch.float64", "", "size = 1, n = 16, float64."),
        (
            "if q.dtype == torch.float32: raise NotImplementedError('no')",
            "",
            "raised NotImplementedError: no;",
        ),
        ("pass", ".to(torch.complex64)", "returned complex64; expected a real floating dtype"),
        ("pass", ".long()", "returned int64; expected a real floating dtype"),
        ("pass", "[..., :3]", "returned (1, 1, 16, 3); expected"),
    ],
)
def test_a_method_that_fails_is_told_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], check: str, more: str, message: str
) -> None:
    path = write(tmp_path, check, more)
    assert study(path, tmp_path / "out", small=["--n", "16", "--size", "1", "--draws", "1"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", ["NotImplementedError", "effattn.errors.NotSupported"])
def test_a_method_of_one_dtype_is_measured_in_it(tmp_path: Path, error: str) -> None:
    out = tmp_path / "all"
    path = write(tmp_path)
    assert study(path, out) == 0
    every = draws(out, path)
    assert all(row[name] for row in every for name in ("approximation", "rounding", "kl"))
    out = tmp_path / "one"
    write(tmp_path, f"import effattn\n    if q.dtype != torch.float32: raise {error}('float32 only')")
    assert study(path, out) == 0
    one = draws(out, path)
    assert len(one) == len(every) == 2
    for row, whole in zip(one, every, strict=True):
        assert [row[name] for name in ("approximation", "rounding", "kl")] == ["", "", ""]
        assert row["error"] == whole["error"] != ""
    # In another dtype there is nothing to measure.
    assert study(path, tmp_path / "other", "--dtype", "bf16") == 2


# -- what it costs -----------------------------------------------------------------------------------------


#: exact attention but for a factor: the error is 4 / size
FALLS = " * 0 + torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v * (1 + 4 / size)"
ASKED = ["--n", "16", "--size", "4,16", "--draws", "1", "--input-scale", "0.5", "--target-error", "0.5"]


def rows(out: str) -> dict[str, list[str]]:
    """The table of answers, by method."""
    return {row[0]: row[1:] for row in (re.split("  +", line) for line in out.splitlines()) if len(row) == 4}


def test_costs_are_those_of_the_users_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """64 MB that nothing of effattn's needs show."""
    path = write(tmp_path, "held = torch.ones(2**24)", FALLS)
    assert study(path, tmp_path / "out", "--method", "positive, iid", small=ASKED) == 0
    out = capsys.readouterr().out
    memory = {method: cells[2] for method, cells in rows(out).items()}
    assert 60 < float(memory[path].removesuffix(" MB")) < 80
    assert float(memory["exact"].removeprefix("under ").removesuffix(" MB")) < 8
    assert f"with positive features; of {path} with its own function `attention`; exact" in out


def test_costs_are_of_a_size_that_the_method_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "assert size in (4, 16)", FALLS)
    assert study(path, tmp_path / "a", small=ASKED) == 0
    said = capsys.readouterr()
    size, *costs = rows(said.out)[path]
    assert 4 < int(size) < 16
    assert all(cell.endswith(" at m = 16") for cell in costs)
    assert "AssertionError" in said.err
    assert "positive features" not in said.out
    # None where it doesn't take float32.
    write(tmp_path, "if q.dtype == torch.float32: raise NotImplementedError('no')", FALLS)
    assert study(path, tmp_path / "b", "--dtype", "bf16", small=ASKED) == 0
    said = capsys.readouterr()
    assert rows(said.out)[path][1:] == [MISSING, MISSING]
    assert "NotImplementedError: no; its costs there are left out" in said.err
