"""Specifications of charts as pictures, drawn in a process of its own: a panic of vl-convert ends its process.

Run as a program, this file reads a list of pictures from standard input and writes a line when one is done. It imports
nothing of effattn, so that a process starts as fast as vl-convert does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is to be drawn, and where it goes."""

    spec: dict[str, Any]
    #: its suffix is the format, .svg or .png
    file: Path


def draw(pictures: Sequence[Picture], *, version: str) -> dict[Path, str]:
    """Write the pictures; the files that could not be, each with the reason on one line.

    Args:
        pictures: any number; where one ends the process, the others are drawn all the same.
        version: of Vega-Lite, as vl-convert names it.
    """
    failed: dict[Path, str] = {}
    left = list(pictures)
    while left:
        asked = json.dumps({"version": version, "pictures": [[p.spec, str(p.file)] for p in left]})
        # -P: the folder of this file, which has an html.py, is no place to import from.
        done = subprocess.run(
            [sys.executable, "-P", __file__, json.dumps(sys.path)],
            input=asked, capture_output=True, encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        failed |= {p.file: error for p, error in zip(left, answers, strict=False) if error}
        left = left[len(answers) :]
        if left:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            more = f": {' '.join(said)[:300]}" if said else ""
            failed[left.pop(0).file] = f"vl-convert ended with code {done.returncode}{more}"
    return failed


def _serve() -> None:
    sys.path[:] = json.loads(sys.argv[1])
    import vl_convert

    asked = json.loads(sys.stdin.buffer.read())
    for spec, file in asked["pictures"]:
        error = ""
        try:
            if file.endswith(".svg"):
                made = vl_convert.vegalite_to_svg(spec, vl_version=asked["version"]).encode()
            else:
                made = vl_convert.vegalite_to_png(spec, vl_version=asked["version"], scale=1.5)
            Path(file).write_bytes(made)
        except (ValueError, OSError) as given:
            error = " ".join(str(given).split())[:300]
        print(json.dumps(error), flush=True)


if __name__ == "__main__":
    _serve()
