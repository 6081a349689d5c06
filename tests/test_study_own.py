"""Studies of a user's own method: what its folder belongs to, what is refused and how, what it costs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from effattn.cli import main
from effattn.study.engine import DRAWS, STUDY

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
