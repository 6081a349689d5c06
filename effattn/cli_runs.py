"""`effattn runs`: what runs there are, what is in them, what differs between them, and SQL about them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.run.records import Damage

#: Seconds that a query may be given at most.
LONGEST_QUERY = 86_400
_FOLDER = click.Path(path_type=Path)


@click.group("runs")
def runs() -> None:
    """List, show, compare and query recorded runs.

    RUN is a run folder, the name of one in effattn-runs/, or the start of an identity that `list` shows.
    """


@runs.command("list")
@click.argument("folder", type=_FOLDER, default=Path("effattn-runs"))
def list_runs(folder: Path) -> int:
    """List the runs in FOLDER (effattn-runs/ if not given), the newest last."""
    from effattn.report import text
    from effattn.run import catalog

    damaged: list[Damage] = []
    found = catalog.runs_in(folder, damaged)
    if not found:
        unread = "; ".join(damage.reason for damage in damaged)
        raise RequestError(unread or f"there is no run in {str(folder)!r}; `effattn gate METHOD` makes one")
    rows = []
    for run in found:
        entry = catalog.entry(run)
        damaged += entry.damaged
        state = "failed together" if entry.failed_together else ""
        if not entry.ended:
            state = "not at its end"
        if entry.damaged:
            state = f"{len(entry.damaged)} damaged"
        rows.append(
            (
                entry.folder.name,
                entry.id,
                entry.kind,
                entry.started.removesuffix("+00:00"),
                text.some(entry.methods),
                str(entry.recorded),
                str(entry.failed),
                state,
            )
        )
    _print_table(("run", "identity", "kind", "started (UTC)", "method", "verdicts", "failed", ""), rows)
    _name(damaged)
    return 0


@runs.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Provenance and identity as JSON.")
def show(run: str, as_json: bool) -> int:
    """Show where RUN comes from and what came out, row by row."""
    from effattn.report import summary, terminal, text
    from effattn.run import catalog, store

    folder = catalog.resolve(run)
    provenance = catalog.facts(folder)
    damaged: list[Damage] = []
    verdicts = list(store.read_verdicts(folder, damaged))
    if as_json:
        click.echo(json.dumps(_strict(provenance), indent=2, allow_nan=False))
        _name(damaged)
        return 0
    console = terminal.console()
    for name, value in provenance.items():
        shown = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
        console.print(text.one_line(f"{name:18} {shown}"), markup=False, soft_wrap=True)
    console.print()
    if not verdicts:
        console.print("no verdicts", markup=False)
    else:
        compared = [verdict for verdict in verdicts if verdict.law is None]
        if compared:
            rows = summary.rows(compared, by=lambda v: (v.method, v.case.dtype))
            terminal.print_rows(console, rows, ("method", "dtype"))
            terminal.print_set_aside(console, compared)
        terminal.print_laws(console, summary.law_rows(verdicts), summary.unjudged_laws(verdicts))
    _name(damaged)
    return 0


@runs.command()
@click.argument("before")
@click.argument("after")
def diff(before: str, after: str) -> int:
    """Compare two runs case by case: what broke, what is judged no more, what was mended, became notably worse or better.

    Exits with 1 where a case fails now that did not fail before.
    """
    from effattn.report import terminal
    from effattn.run import catalog

    damaged: list[Damage] = []
    first, second = (catalog.verdicts_by_case(catalog.resolve(run), damaged) for run in (before, after))
    _name(damaged)
    difference = catalog.compare(first, second)
    if not difference.both:
        raise RequestError("the two runs have no case in common; there is nothing to compare")
    terminal.print_difference(terminal.console(), difference)
    return 1 if difference.regressed else 0


@runs.command()
@click.argument("run")
def compact(run: str) -> int:
    """Write RUN's verdicts as a Parquet file into its folder. The records stay as they are."""
    from effattn.report import text
    from effattn.run import catalog, tables

    try:
        made = tables.compact(catalog.resolve(run))
    except tables.NoVerdicts as error:
        _name(error.damaged)
        raise
    click.echo(f"{made.rows} verdicts in {text.plain(str(made.file))}, {made.size / 1e6:.1f} MB")
    _name(made.damaged)
    return 0


@runs.command()
@click.argument("sql")
@click.argument("run", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row; null for NaN and infinity.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="A query that takes longer is ended.",
)
def query(sql: str, run: tuple[str, ...], as_json: bool, timeout: float) -> int:
    """Answer one SELECT about the table `verdicts` of the RUNs; all in effattn-runs/ if none is given.

    Columns: run, case_id, spec, device, method, outcome, message, the fields of a case (dtype, q_len, ...), fraction
    (error/bound), bit_equal, ulp_p50, ulp_p99, ulp_max, z_rms, z_max, z_mean, seconds, ... : DESCRIBE has them all.
    """
    from effattn.report import origin, text
    from effattn.run import catalog, store, tables

    damaged: list[Damage] = []
    if not 0 < timeout <= LONGEST_QUERY:
        raise RequestError(
            f"--timeout {timeout:g}: expected seconds, more than 0 and at most {LONGEST_QUERY}, a day"
        )
    folders = [catalog.resolve(name) for name in run] or catalog.runs_in(store.DEFAULT_FOLDER, damaged)
    if not folders:
        _name(damaged)
        raise RequestError("there is no run in effattn-runs/; name a run folder")
    folders, repeated = origin.distinct(folders)
    for sentence in repeated:
        click.echo(f"effattn: {text.plain(sentence)}", err=True)
    try:
        names, rows = tables.query(sql, folders, timeout=timeout, damaged=damaged)
    finally:
        _name(damaged)
    if as_json:
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RequestError(
                f"the answer has two columns {twice[0]!r}, and an object has one member of a name; name them apart with AS"
            )
        for row in rows:
            told = {name: _strict(cell) for name, cell in zip(names, row, strict=True)}
            click.echo(json.dumps(told, default=str, allow_nan=False))
        return 0
    _print_table(names, [tuple("" if cell is None else str(cell) for cell in row) for row in rows])
    return 0


def _strict(cell: Any) -> Any:
    """The cell as JSON has it, which has no NaN and no infinity."""
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, (list, tuple)):
        return [_strict(inner) for inner in cell]
    if isinstance(cell, dict):
        return {str(name): _strict(inner) for name, inner in cell.items()}
    return cell


def _name(damaged: Sequence[Damage]) -> None:
    """Say on stderr what could not be read."""
    from effattn.report import text

    for damage in damaged:
        click.echo(f"effattn: {text.plain(str(damage))}", err=True)


def _print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from effattn.report import terminal

    terminal.print_plain(terminal.console(), names, rows)
