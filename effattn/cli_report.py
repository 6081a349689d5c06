"""`effattn report`: recorded runs as a page for people, and in the forms that machines take."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from effattn.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from effattn.run.records import Damage, Key
    from effattn.verdict import Verdict

_PATH = click.Path(path_type=Path)


@click.command()
@click.argument("run", nargs=-1, required=True)
@click.option(
    "--out", type=_PATH, metavar="FILE", help="The HTML file; RUN/report.html of the first run if not given."
)
@click.option("--against", metavar="RUN", help="Compare with this run: what broke, what was mended.")
@click.option(
    "--history", type=_PATH, metavar="DIR", help="Accuracy per commit, from a folder of run folders."
)
@click.option(
    "--baseline",
    "baseline_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Beside a committed baseline: what is worse, what is better.",
)
@click.option(
    "--study",
    "studies",
    type=_PATH,
    multiple=True,
    metavar="DIR",
    help="Also a study's error against rank or features, from the folder of `effattn study`; may be repeated.",
)
@click.option(
    "--markdown", "markdown_file", type=_PATH, metavar="FILE", help="Also a summary for a pull request."
)
@click.option(
    "--pictures", type=click.Choice(["svg", "png"]), help="Charts beside the Markdown, as pictures."
)
@click.option("--junit", "junit_file", type=_PATH, metavar="FILE", help="Also JUnit XML.")
@click.option(
    "--github/--no-github",
    default=None,
    help="Job summary and at most ten annotations; on where GITHUB_ACTIONS is true.",
)
def report(
    run: tuple[str, ...],
    out: Path | None,
    against: str | None,
    history: Path | None,
    baseline_file: Path | None,
    studies: tuple[Path, ...],
    markdown_file: Path | None,
    pictures: str | None,
    junit_file: Path | None,
    github: bool | None,
) -> int:
    """Write a report on RUNs as one HTML file that needs no network.

    RUN is a run folder, the name of one in effattn-runs/, or the start of an identity that `effattn runs list` shows.
    """
    from effattn.report import exports, gather, html, targets, text
    from effattn.run import catalog

    folders = [catalog.resolve(name) for name in run]
    if pictures is not None and markdown_file is None:
        raise RequestError("--pictures are for the summary; give --markdown FILE too")
    target = out if out is not None else folders[0] / "report.html"
    outputs = [("--out", target), ("--markdown", markdown_file), ("--junit", junit_file)]
    targets.check([(option, file) for option, file in outputs if file is not None], studies)
    notes: list[str] = []
    other = None if against is None else catalog.resolve(against)
    named = other is not None
    if len(folders) == 1:
        then = _compared(folders[0], notes, against=not named, baseline=baseline_file is None)
        other, baseline_file = other or then[0], baseline_file or then[1]
    material = gather.gather(
        folders, against=other, history=history, baseline=baseline_file, studies=studies, in_common=named
    )
    material.notes += notes
    for note in material.notes:
        click.echo(f"effattn: {text.plain(note)}", err=True)
    for damage in material.damaged:
        click.echo(f"effattn: {text.plain(str(damage))}", err=True)
    # What cannot be written is no reason to leave out the rest.
    problems: list[str] = []
    with _kept(problems):
        write(target, html.render(material))
        click.echo(f"Report: {text.plain(str(target))}")
    made: list[Path] = []
    if pictures is not None and markdown_file is not None:
        with _kept(problems):
            charts_folder = markdown_file.parent / f"{markdown_file.stem}-charts"
            made, failed = exports.pictures(material, charts_folder, format=pictures)
            problems += [
                f"cannot draw the picture {str(file)!r}: {reason}" for file, reason in failed.items()
            ]
    if markdown_file is not None:
        with _kept(problems):
            write(markdown_file, exports.pull_request(material, made, link=str(target)))
            click.echo(f"Markdown: {text.plain(str(markdown_file))}")
    if junit_file is not None:
        with _kept(problems):
            write(junit_file, exports.junit(material))
            click.echo(f"JUnit: {text.plain(str(junit_file))}")
    if github if github is not None else os.environ.get("GITHUB_ACTIONS") == "true":
        for line in exports.workflow_commands(material):
            click.echo(line)
        if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
            with _kept(problems):
                _append(Path(summary_file), exports.pull_request(material))
    if problems:
        raise RequestError("; ".join(problems))
    return 0


def _compared(
    folder: Path, notes: list[str], *, against: bool, baseline: bool
) -> tuple[Path | None, Path | None]:
    """The run and the baseline that a gate was compared with, as far as they are wanted and still there; `notes` says so."""
    from effattn.run import catalog, store

    told = store.read_provenance(folder, []).get("compared")
    told = told if isinstance(told, dict) else {}
    run, file = (
        told.get(name) if wanted else None for name, wanted in (("against", against), ("baseline", baseline))
    )
    other = found = None
    if isinstance(run, str):
        try:
            other = catalog.resolve(run)
            notes.append(f"Compared with the run {run}, as the gate was; name another with --against.")
        except RequestError:
            notes.append(f"The gate was compared with the run {run}, which is not there any more.")
    if isinstance(file, str):
        found = Path(file) if Path(file).is_file() else None
        there = "as the gate was" if found is not None else "which is not there any more"
        notes.append(
            f"{'Beside' if found is not None else 'The gate was beside'} the baseline {file}, {there}."
        )
    return other, found


@contextlib.contextmanager
def _kept(problems: list[str]) -> Iterator[None]:
    """Keep what a step could not do, to say so when the others are done."""
    try:
        yield
    except RequestError as error:
        problems.append(str(error))


def _append(file: Path, content: str) -> None:
    """Add to the job summary. Raises RequestError where that cannot be."""
    try:
        with file.open("a", encoding="utf-8", errors="replace") as opened:
            opened.write(content)
    except OSError as error:
        raise RequestError(
            f"cannot write the job summary into {str(file)!r}, which GITHUB_STEP_SUMMARY names: {error.strerror or error}"
        ) from error


def baseline(name: str) -> dict[Key, Verdict]:
    """The verdicts of the run that another is to be compared with; what is damaged in it is named.

    Raises:
        RequestError: there is no such run, or it has no verdict.
    """
    from effattn.report import text
    from effattn.run import catalog

    damaged: list[Damage] = []
    found = catalog.verdicts_by_case(catalog.resolve(name), damaged)
    for damage in damaged:
        click.echo(f"effattn: {text.plain(str(damage))}", err=True)
    if not found:
        raise RequestError(f"the run {name!r} has no verdicts; there is nothing to compare with")
    return found


def print_against(console: Console, before: dict[Key, Verdict], folder: Path) -> None:
    """What changed against another run."""
    from effattn.report import terminal
    from effattn.run import catalog

    terminal.print_difference(console, catalog.compare(before, catalog.verdicts_by_case(folder)))


def check_installed() -> None:
    """Raise RequestError where what a report needs is missing: before the gate has run, not after."""
    from effattn.report import charts, html

    charts.load()
    html.load()


def write_report(folder: Path, against: str | None, baseline: Path | None) -> Path:
    """Write `report.html` into a run folder; its path. Where it shares no case with the other run, the page says so."""
    from effattn.report import gather, html
    from effattn.run import catalog

    target = folder / "report.html"
    other = None if against is None else catalog.resolve(against)
    write(target, html.render(gather.gather([folder], against=other, baseline=baseline, in_common=False)))
    return target


def write(file: Path, content: str) -> None:
    """Write a file whole or not at all. Raises RequestError where it cannot be written."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # A name of a folder need not be text.
        temporary.write_text(content, encoding="utf-8", errors="replace")
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a file system that can't be written, say
            temporary.unlink(missing_ok=True)
        raise RequestError(f"cannot write {str(file)!r}: {error.strerror or error}") from error
