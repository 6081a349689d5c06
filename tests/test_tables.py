"""The generated tables in the pages are what the data and the code say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from effattn.properties import catalogue

ROOT = Path(__file__).resolve().parent.parent


def _load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "docs" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tables() -> ModuleType:
    return _load("update_tables.py")


def test_pages_hold_what_the_data_say(tables: ModuleType) -> None:
    assert tables.stale() == []


def test_a_page_that_was_edited_is_named(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- table: any -->\n\n| edited |\n<!-- end -->\n")
    monkeypatch.setattr(tables, "pages", lambda: [page])
    monkeypatch.setattr(sys, "argv", ["update_tables.py", "--check"])
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "render", lambda name: "other\n")
    assert tables.main() == 1
    assert "docs/page.md: out of date" in capsys.readouterr().err


def test_every_law_finds_what_accuracy_misses_or_says_why_it_is_kept() -> None:
    found = _load("tables/law_power.py").found()
    assert set(found) == set(catalogue.all_laws())
    assert all(row["all"] for row in found.values())
    assert {law for law, row in found.items() if not row["unseen"]} == set(catalogue.KEPT)
