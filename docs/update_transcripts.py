"""Writes the transcripts and the listings in the README and in docs/ anew.

    python docs/update_transcripts.py [DOCUMENT ...]

Between `<!-- run: COMMAND -->` and `<!-- end -->` goes the command and what it prints; between
`<!-- file: PATH -->` and `<!-- end -->` the file. The tests run the commands again and compare
(tests/test_readme.py).
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"<!-- (run|file): (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)


def output_of(command: str, folder: Path) -> str:
    """What `effattn ...` prints in a folder that has the examples, as in a clone.

    Of `effattn cpu` also the standard error, which is where findings go.
    """
    program, *arguments = shlex.split(command)
    if program != "effattn":
        raise SystemExit(f"{command!r}: only effattn commands can be run here")
    shutil.copytree(ROOT / "docs" / "examples", folder / "docs" / "examples", dirs_exist_ok=True)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")
    }
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from effattn.cli import main; sys.exit(main())", *arguments],
        cwd=folder, text=True, check=False, env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if arguments[0] == "cpu" else subprocess.PIPE,
    )  # fmt: skip
    if done.returncode not in (0, 1):
        raise SystemExit(f"{command!r} exited with {done.returncode}:\n{done.stderr}")
    return done.stdout


def rewritten(text: str, output: Callable[[str], str]) -> str:
    """The document with its blocks written anew."""

    def block(match: re.Match[str]) -> str:
        kind, what, _ = match.groups()
        if kind == "run":
            body = f"```console\n$ {what}\n{output(what).rstrip()}\n```\n"
        else:
            body = f"```python\n{(ROOT / what).read_text(encoding='utf-8').rstrip()}\n```\n"
        return f"<!-- {kind}: {what} -->\n{body}<!-- end -->"

    return BLOCK.sub(block, text)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[1:] or DOCUMENTS:
            path = ROOT / name
            path.write_text(
                rewritten(path.read_text(encoding="utf-8"), lambda command: output_of(command, Path(folder))),
                encoding="utf-8",
            )


if __name__ == "__main__":
    main()
