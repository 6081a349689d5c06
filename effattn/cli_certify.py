"""`effattn certify`, and how the command line names a case."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.case import Case


def find_case(given: str, run_folder: Path | None) -> Case:
    """The case that a text stands for: a file, JSON, or the id of a case in a run folder."""
    from effattn.case import Case
    from effattn.run import store

    text = given.strip()
    if text.startswith("{"):
        return Case.from_json(text)
    if run_folder is None and (text.endswith(".json") or "/" in text or Path(text).exists()):
        return Case.load(text)
    if not text or not all(c in "0123456789abcdef" for c in text) or len(text) < 4:
        raise RequestError(
            f"{given!r} is no case; expected a file with a case as JSON, the JSON itself, or at least four "
            "digits of the id of a case in a run folder"
        )
    return store.find_case(text, run_folder if run_folder is not None else store.newest_run())


@click.command()
@click.argument("case")
@click.option(
    "--run",
    "run_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The run folder to look an id up in; the newest in effattn-runs/ if not given.",
)
def certify(case: str, run_folder: Path | None) -> int:
    """Hold the float64 reference of a small CASE against intervals that certainly hold the exact values.

    CASE is a file with a case as JSON, the JSON itself, or the id of a case in a run folder.

    Exit codes: 0 the reference is as near as it has to be, 1 it is not, 2 the request is wrong.
    """
    from effattn.certify import ALLOWED, MOST_BITS
    from effattn.certify import certify as run
    from effattn.report import terminal

    found = find_case(case, run_folder)
    rows = run(found)
    click.echo(found.describe())
    console = terminal.console()
    table = terminal.plain_table("", "elements", "largest error", "rounding open", "decided", "float64 off")
    for row in rows:
        cells = (str(row.count), f"{row.units:.2f} units", str(row.open), str(row.decided), str(row.wrong))
        table.add_row(row.name, *cells)
    terminal.print_table(console, table)
    click.echo(f"allowed: {ALLOWED:g} units of 2^-53 each, see `effattn.certify`")
    undecided = sum(row.open - row.decided for row in rows)
    if undecided:
        click.echo(f"{undecided} elements may be ties: {MOST_BITS} bits do not tell")
    worse = [row for row in rows if not row.holds]
    for row in worse:
        at = ", ".join(map(str, row.worst or ()))
        click.echo(
            f"{row.name}[{at}] is {row.units:.3g} units off: the reference is not accurate enough here"
        )
    return 1 if worse else 0
