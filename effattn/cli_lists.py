"""The commands that list what there is: methods, laws, values."""

from __future__ import annotations

from collections.abc import Sequence

import click


@click.command("methods")
def list_methods() -> int:
    """List the methods that come with effattn."""
    from effattn import methods

    _print_pairs([(name, methods.describe(name)) for name in methods.names()])
    from effattn.tolerances.numerics import PRESETS

    click.echo("\nA function of yours: path/to/file.py:function or package.module:function")
    click.echo(
        f"METHOD@PRESET judges by the arithmetic of {', '.join(PRESETS)} in place of what the method declares."
    )
    return 0


@click.command("laws")
@click.argument("name", required=False)
def list_laws(name: str | None) -> int:
    """List the laws that methods are held to; with a NAME, what that one states."""
    from effattn.properties.catalogue import all_laws
    from effattn.properties.law import FAMILIES, get, grouped

    if name is not None:
        law = get(name)
        _print_pairs([(law.sentence, law.statement), ("family", law.family), ("compares", law.compares)])
        return 0
    for family, members in grouped(list(all_laws().values())):
        click.echo(f"{family}: {FAMILIES[family]}")
        for law in members:
            click.echo(f"  {law.name}")
    click.echo("\n`effattn laws NAME` shows what a law states, `effattn gate METHOD --laws NAME` tries it.")
    return 0


@click.command("values")
def list_values() -> int:
    """List the value distributions, each with what it is there for."""
    from effattn import values

    _print_pairs([(name, values.get(name).summary) for name in values.names()])
    click.echo("\nQ, K and V of a real model: real:smollm2 (all layers) or real:smollm2/LAYER")
    return 0


def _print_pairs(pairs: Sequence[tuple[str, str]]) -> None:
    """Names in one column, what they are in another that is wrapped."""
    from rich.table import Table
    from rich.text import Text

    from effattn.report import terminal

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, words in pairs:
        table.add_row(Text(name, style="bold"), Text(words))
    terminal.console().print(table)


COMMANDS = (list_methods, list_laws, list_values)
