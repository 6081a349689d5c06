"""Writes the generated tables into README.md and docs/*.md.

    python docs/update_tables.py            writes them
    python docs/update_tables.py --check    exits with 1, and names the pages, where one is not what the data say

A page has a line `<!-- table: NAME -->`; what follows up to `<!-- end -->` is what `render()` of docs/tables/NAME.py
returns. Renderers read recorded measurements and the code; they measure nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Renderers share what they have in common.
sys.path.append(str(ROOT / "docs" / "tables"))
_MARKED = re.compile(r"(<!-- table: ([a-z0-9-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(name: str) -> str:
    """The table of that name."""
    path = ROOT / "docs" / "tables" / f"{name.replace('-', '_')}.py"
    spec = importlib.util.spec_from_file_location(f"effattn_docs_{path.stem}", path)
    if spec is None or spec.loader is None or not path.exists():
        raise SystemExit(f"no renderer {path.relative_to(ROOT)} for the table {name!r}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.render().strip() + "\n"


def filled(text: str) -> str:
    """The page with all its tables as they should be."""
    return _MARKED.sub(lambda m: f"{m[1]}\n{render(m[2])}\n{m[3]}", text)


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def stale() -> list[Path]:
    """Pages with a table that is not what the data say."""
    return [page for page in pages() if filled(text := page.read_text(encoding="utf-8")) != text]


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    found = stale()
    if parser.parse_args().check:
        for page in found:
            print(f"{page.relative_to(ROOT)}: out of date; run python docs/update_tables.py", file=sys.stderr)
        return 1 if found else 0
    for page in found:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
