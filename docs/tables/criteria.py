"""Published criteria: what each asks for, and how often it errs."""

from __future__ import annotations

from typing import Any

from criteria_record import NOT_RECORDED, load, own


def of(sides: dict[str, Any], side: str, names: set[str] | None = None) -> int:
    """Kernels times dtypes on one side of a result; of these kernels only, where given."""
    return sum(len(dtypes) for kernel, dtypes in sides[side].items() if names is None or kernel in names)


def share(result: dict[str, Any], part: str, whole: str, names: set[str] | None = None) -> str:
    """ "3 of 40" """
    return f"{of(result, part, names)} of {of(result, whole, names)}"


def render() -> str:
    record = load()
    if record is None:
        return NOT_RECORDED
    sets = record["inputs"]
    gradients = {name for name, kernel in record["kernels"].items() if kernel["gradients"]}
    forward = set(record["kernels"]) - gradients
    lines = [
        "| criterion | right ones objected to | wrong ones missed | with a mistake in an option or gradient, missed"
        " | own inputs: right ones objected to | wrong ones missed | effattn there: missed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in record["criteria"]:
        smoke, mine = sets["smoke"][name], own(sets, name)
        cells = [
            name,
            share(smoke, "alarms", "right"),
            share(smoke, "missed", "wrong", forward),
            share(smoke, "missed", "wrong", gradients),
        ]
        if mine is None:
            cells += ["", "", ""]
        else:
            dtypes = set(record["criteria"][name]["dtypes"])
            beside = {
                side: {
                    kernel: [d for d in found if d in dtypes]
                    for kernel, found in mine["effattn"][side].items()
                }
                for side in ("missed", "wrong")
            }
            cells += [
                share(mine[name], "alarms", "right"),
                share(mine[name], "missed", "wrong"),
                share(beside, "missed", "wrong"),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", origin(record)])


def origin(record: dict[str, Any]) -> str:
    """Where the figures come from."""
    machine, packages, commit = record["machine"], record["packages"], record["effattn"]["commit"]
    every = "" if record["every"] == 1 else f" Of the profile's cases, one in {record['every']} was taken."
    return (
        f"Measured by `{record['command']}` on {record['date'][:10]} in {record['seconds'] / 60:.0f} min, commit"
        f" {commit[:10] if commit else 'unknown'}, {machine['cpu']}, one thread, Python {record['python']}, torch"
        f" {packages['torch']}.{every}"
    )
