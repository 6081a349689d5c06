"""`effattn approximation`: the laws of Performer, Linformer and their kin on a user's own."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from effattn.properties.approximation import Finding

FAILED = 1
#: in the order in which they are counted
_OUTCOMES = ("holds", "broken", "crashed", "not supported", "not claimed")


@click.command()
@click.argument("subject", required=False)
@click.option("--law", "laws", multiple=True, metavar="NAME", help="This law only; repeat it.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn.")
@click.option("--list", "listed", is_flag=True, help="List the laws and the claims, with what they say.")
def approximation(subject: str | None, laws: Sequence[str], seed: int, listed: bool) -> int:
    """Hold an approximation of attention to the laws of its kind.

    SUBJECT is path/to/file.py with some of the functions draw and features (random features), slots (a projection of
    tokens), attention, and prefix_sums (a kernel for the causal sums), or package.module:attention, or effattn's own:
    performer, linformer.

    How far it is from exact attention: `effattn study performer --method path/to/file.py`.
    """
    if listed:
        _list()
        return 0
    if subject is None:
        raise click.UsageError("Missing argument 'SUBJECT', such as path/to/my_performer.py.")
    from effattn.approximation import load
    from effattn.errors import RequestError
    from effattn.properties.approximation import ABSENT, judge
    from effattn.report.text import plain

    chosen = load(subject)
    counts: dict[str, int] = {}
    broken: list[Finding] = []
    absent: dict[str, int] = {}
    for finding in judge(chosen, names=laws, seed=seed):
        if finding.outcome == ABSENT:
            absent[finding.law.needs] = absent.get(finding.law.needs, 0) + 1
            continue
        counts[finding.outcome] = counts.get(finding.outcome, 0) + 1
        why = "" if finding.broken or not finding.text else f": {plain(finding.text)}"
        click.echo(f"{finding.outcome:<13}  {finding.law.sentence}{why}")
        if finding.broken:
            broken.append(finding)
    if absent:
        words = ", ".join(f"{number} of `{name}`" for name, number in absent.items())
        click.echo(f"not tried, for there is no such function: {words}")
    for finding in broken:
        click.echo(
            f"\n{finding.outcome}: {finding.law.sentence}\n  {plain(finding.text)}\n  {finding.law.statement}"
        )
        again = f"  effattn approximation {shlex.quote(subject)} --law {finding.law.name}"
        click.echo(again + (f" --seed {seed}" if seed else ""))
    total = sum(counts.values())
    verbs = {"holds": "holds" if counts.get("holds") == 1 else "hold"}
    words = ", ".join(f"{counts[kind]} {verbs.get(kind, kind)}" for kind in _OUTCOMES if kind in counts)
    if total:
        click.echo(f"\n{plain(chosen.name)}: of {total} law{'s' if total > 1 else ''} {words}.")
    if broken:
        return FAILED
    if not counts.get("holds"):
        raise RequestError(f"no law was tried on {chosen.name}; see above what is missing")
    return 0


def _list() -> None:
    from effattn.approximation import CLAIM_WORDS
    from effattn.properties.approximation import all_laws

    for law in all_laws().values():
        claims = "".join(f", claimed {claim!r}" for claim in law.claims)
        click.echo(f"{law.name} (of `{law.needs}`{claims})\n  {law.statement}")
    click.echo('\nA file says what it claims: CLAIMS = ("orthogonal", "positive"). The words:')
    for word, what in CLAIM_WORDS.items():
        click.echo(f"  {word}: {what}")
