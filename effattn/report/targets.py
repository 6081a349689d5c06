"""Where a report may be written: never over the records of a run, another output, or a file that is no report."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

from effattn.errors import RequestError
from effattn.run import store

#: option -> the ends of names that fit it, and what a file begins with that it wrote
_FORMS: dict[str, tuple[tuple[str, ...], bytes]] = {
    "--out": ((".html", ".htm"), b"<!doctype html>"),
    "--markdown": ((".md",), b"# effattn"),
    "--junit": ((".xml",), b'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites name="effattn">'),
}
#: What `effattn report` writes into a page, near its end.
_WRITTEN = b"<p>Written by effattn "
#: The summary of a gate, or of a study: its own, though its suffix is that of a report.
_OWN = (store.SUMMARY,)


def check(targets: Sequence[tuple[str, Path]], studies: Sequence[Path] = ()) -> None:
    """Refuse outputs that would replace something that is none of a report's.

    Args:
        targets: option and file of each output.
        studies: folders of studies, whose own summaries are not to be replaced either.

    Raises:
        RequestError: two outputs have one path; one is a run's own file, or would be taken for one; one is there, is no report,
            and its suffix doesn't fit; one is there and is no file.
    """
    taken: dict[Path, str] = {}
    for option, file in targets:
        place = _resolved(file)
        if place in taken:
            raise RequestError(
                f"{option} {str(file)!r} is the file of {taken[place]} too; name a file for each of them"
            )
        taken[place] = option
        suffixes, _ = _FORMS[option]
        fits = place.suffix.lower() in suffixes
        run = next((folder for folder in place.parents if store.holds_run(folder)), None)
        own = place.name in _OWN and place.parent in (run, *map(_resolved, studies))
        if own or (run is not None and not fits):
            whose = "a study" if own and place.parent != run else f"the run {str(run)!r}"
            raise RequestError(
                f"{option} {str(file)!r} is, or would be taken for, a file of {whose} itself; name another, with the suffix "
                f"{suffixes[0]}, such as report{suffixes[0]}"
            )
        try:
            mode = place.stat().st_mode
        except OSError:  # it isn't there, or writing says why not
            continue
        if not stat.S_ISREG(mode):
            raise RequestError(f"{option} {str(file)!r} is there and is no file; name a file")
        if not fits and not _is_report(place, option):
            raise RequestError(
                f"{option} {str(file)!r} is there, and no report of effattn; it is left as it is. Name another file, with "
                f"the suffix {suffixes[0]}"
            )


def _resolved(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError):  # a loop of links
        return file.absolute()


def _is_report(file: Path, option: str) -> bool:
    """Whether `effattn report` wrote a file, by its beginning and, of a page, by its end."""
    _, start = _FORMS[option]
    try:
        with file.open("rb") as opened:
            if not opened.read(len(start) + 64).lstrip().startswith(start):
                return False
            return option != "--out" or _WRITTEN in opened.read()
    except OSError:
        return False
