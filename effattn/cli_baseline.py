"""`effattn baseline` and `effattn gate --baseline`: errors beside those that were committed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.tolerances.baselines import Section
    from effattn.verdict import Verdict

#: changes of each kind that are shown; the rest is counted
SHOWN = 10


@click.command()
@click.argument("run")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The TOML file to write, or whose rows of this kind of run to replace.",
)
@click.option("--reason", metavar="TEXT", help="Why; needed where an entry becomes looser.")
def baseline(run: str, file: Path, reason: str | None) -> int:
    """Record how large the errors of a gate's RUN were, for `effattn gate --baseline FILE`.

    RUN is a run folder, the name of one in effattn-runs/, or the start of an identity that `effattn runs list` shows.
    """
    from effattn import cli_report
    from effattn.run import catalog, store
    from effattn.tolerances import baselines

    folder = catalog.resolve(run)
    facts = store.read_provenance(folder)
    if facts.get("kind_of_run") != "gate" or facts.get("values"):
        raise RequestError(
            f"the run {run!r} is no gate on a profile's own values; a baseline is made from one."
        )
    if facts.get("exit_code") != 0:
        raise RequestError(f"the run {run!r} did not pass; a baseline is made from one that did.")
    before = baselines.load(file) if file.exists() else None
    after = baselines.updated(
        before,
        method=facts["method"]["name"],
        kind=baselines.kind_of(facts),
        verdicts=store.read_verdicts(folder),
        origin=_origin(facts, reason),
    )
    cli_report.write(file, baselines.render(after))
    click.echo(f"Written to {file}")
    return 0


def load(file: Path, *, method: str, facts: Mapping[str, Any]) -> Section:
    """The rows that a run with these facts is to be compared with. RequestError where there are none."""
    from effattn.tolerances import baselines

    found = baselines.load(file)
    if found.method != method:
        raise RequestError(
            f"baseline {file}: it is of {found.method!r}, not of {method!r}; give that method's file."
        )
    return baselines.section_for(
        found, baselines.kind_of(facts), file=file, own_values=bool(facts.get("values"))
    )


def report(section: Section, verdicts: Sequence[Verdict], *, file: Path, folder: Path, passed: bool) -> bool:
    """Print what changed; whether nothing became worse. `passed`: whether the run did, and may be recorded."""
    from effattn.tolerances import baselines

    found = baselines.compare(section, verdicts)
    for title, changes in (("worse", found.worse), ("better", found.better)):
        _list(f"{title} than the baseline", [str(change) for change in changes])
    _list("in the baseline, but not judged now", [str(key) for key in found.gone])
    _list("judged now, but not in the baseline", [str(key) for key in found.new])
    now = baselines.collect(verdicts)
    for key, before in section.rows.items():
        cases = len(now[key]["fraction"]) if key in now else before.cases
        if (key.option, key.quantity) == (baselines.ALL, "out") and cases < before.cases:
            click.echo(
                f"{key.dtype}: {cases} of the {before.cases} cases in the baseline have an error to compare now"
            )
    if not (found.worse or found.better or found.gone or found.new):
        dtypes = {verdict.case.dtype for verdict in verdicts if verdict.law is None}
        rows = sum(key.dtype in dtypes for key in section.rows)
        click.echo(
            f"Baseline: nothing is worse or better than {file} has it by more than chance, in {rows} rows."
        )
        return True
    if not passed:
        return found.passed
    command = f"effattn baseline {shlex.quote(str(folder))} --file {shlex.quote(str(file))}"
    click.echo(f"To record these errors: {command}" + ("" if found.passed else " --reason TEXT"))
    return found.passed


def _list(title: str, lines: list[str]) -> None:
    if not lines:
        return
    click.echo(f"{title}: {len(lines)}")
    for line in lines[:SHOWN]:
        click.echo(f"  {line}")
    if len(lines) > SHOWN:
        click.echo(f"  and {len(lines) - SHOWN} more")


def _origin(facts: dict[str, Any], reason: str | None) -> dict[str, str]:
    machine = facts.get("machine", {})
    found = {
        "date": facts.get("started", ""),
        "cpu": machine.get("cpu", ""),
        "gpu": machine.get("gpu", ""),
        "commit": facts.get("effattn", {}).get("commit", ""),
        "effattn": facts.get("effattn", {}).get("version", ""),
        "python": facts.get("python", ""),
        **facts.get("packages", {}),
        "reason": reason or "",
    }
    return {name: text for name, text in found.items() if isinstance(text, str) and text}
