"""Makes docs/report.png anew: the report on an example that fails, in Chromium.

python docs/update_pictures.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    from effattn.cli import main as effattn

    spec = importlib.util.spec_from_file_location("browser", ROOT / "tests" / "browser" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    browser = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(browser)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # From there, so that the picture has the method's name alone.
        command = ["gate", "my_attention_rounded.py:attention", "--out", str(folder / "run"), "--report"]
        with contextlib.chdir(ROOT / "docs" / "examples"):
            code = effattn(command)
        if code != 1:
            sys.exit("the example was expected to fail")
        with browser.Page(folder / "profile", width=1200, height=1500) as page:
            page.size(1200, 1500)
            page.open(folder / "run" / "report.html")
            page.screenshot(ROOT / "docs" / "report.png")


if __name__ == "__main__":
    main()
