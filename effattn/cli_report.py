"""`effattn report`: recorded runs as a page for people, and in the forms that machines take."""

from __future__ import annotations

import os
from pathlib import Path

import click

from effattn.errors import RequestError

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
    markdown_file: Path | None,
    pictures: str | None,
    junit_file: Path | None,
    github: bool | None,
) -> int:
    """Write a report on RUNs as one HTML file that needs no network.

    RUN is a run folder, the name of one in effattn-runs/, or the start of an identity that `effattn runs list` shows.
    """
    from effattn.report import exports, gather, html, text
    from effattn.run import catalog

    folders = [catalog.resolve(name) for name in run]
    if pictures is not None and markdown_file is None:
        raise RequestError("--pictures are for the summary; give --markdown FILE too")
    material = gather.gather(
        folders, against=None if against is None else catalog.resolve(against), history=history
    )
    target = out if out is not None else folders[0] / "report.html"
    write(target, html.render(material))
    click.echo(f"Report: {target}")
    for damage in material.damaged:
        click.echo(f"effattn: {text.plain(str(damage))}", err=True)
    if markdown_file is not None:
        made = []
        if pictures is not None:
            made = exports.pictures(
                material, markdown_file.parent / f"{markdown_file.stem}-charts", format=pictures
            )
        write(markdown_file, exports.pull_request(material, made, link=str(target)))
        click.echo(f"Markdown: {markdown_file}")
    if junit_file is not None:
        write(junit_file, exports.junit(material))
        click.echo(f"JUnit: {junit_file}")
    if github if github is not None else os.environ.get("GITHUB_ACTIONS") == "true":
        for line in exports.annotations(material):
            click.echo(line)
        if summary_file := os.environ.get("GITHUB_STEP_SUMMARY"):
            with open(summary_file, "a", encoding="utf-8") as file:
                file.write(exports.pull_request(material))
    return 0


def write(file: Path, content: str) -> None:
    """Write a file whole or not at all. Raises RequestError where it cannot be written."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(content, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RequestError(f"cannot write {str(file)!r}: {error.strerror or error}") from error
