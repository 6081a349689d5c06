"""What `effattn study NAME` does: plan, measure with a bar, write tables and charts, answer."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from effattn.errors import EffattnError, RequestError
from effattn.report import text
from effattn.run import provenance
from effattn.run import store as runs
from effattn.study import (
    axes,
    complexity,
    inverse,
    limits,
    linformer,
    model,
    own,
    performer,
    plans,
    probe,
    results,
    summary,
    traffic,
    words,
)
from effattn.study.engine import Job, Measure, Row, Store

#: name -> one line
STUDIES = {
    "performer": "the error of random features against their number m",
    "linformer": "the error of projected keys and values against their number k",
    "complexity": "CPU time and peak memory against the sequence length",
    "traffic": "elements moved between memory and chip, against the formula",
    "model": "what approximations do to SmolLM2-135M and all-MiniLM-L6-v2",
}
_MEASURES = {"performer": performer.measure, "linformer": linformer.measure}
#: an option that may be repeated, and was not given
_NOTHING: tuple[object, ...] = ()
_SIZE = {"performer": "m", "linformer": "k"}


def run(name: str, *, out: Path | None, profile: str, target_error: float | None, **changes: Any) -> None:
    """One study. Raises RequestError for what can't be run, and where its folder can't be written."""
    try:
        _run(name, out=out, profile=profile, target_error=target_error, **changes)
    except OSError as error:
        where = error.filename or out or runs.DEFAULT_FOLDER
        raise RequestError(
            f"cannot write {str(where)!r}: {error.strerror or error}; what is measured is kept. Name a folder that can be"
            " written with --out, or make room and give the same command again"
        ) from error


def _run(name: str, *, out: Path | None, profile: str, target_error: float | None, **changes: Any) -> None:
    if name not in STUDIES:
        raise RequestError(f"unknown study {name!r}; expected one of {', '.join(STUDIES)}")
    if target_error is not None:
        inverse.check_target(target_error)
    folder = out if out is not None else runs.DEFAULT_FOLDER / f"study-{name}-{profile}"
    if out is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        runs.ignore_in_git(runs.DEFAULT_FOLDER)
    if name in _FIXED:
        given = [option for option, value in changes.items() if value is not None and value != _NOTHING]
        if given or target_error is not None:
            raise RequestError(f"study {name} takes no options but --profile and --out; leave the others out")
        _fixed(name, folder, profile)
        return
    if target_error is not None:
        _inverse(name, folder, out is not None, profile, target_error, changes)
        return
    plan = plans.adapt(plans.profile(name, profile), **changes)
    rows = _measure(plan, folder, plans.jobs(plan))
    charts = summary.write(rows, folder, plans.ERROR_COLUMNS, title=f"Study {name}", size=_SIZE[name])
    size = _SIZE[name]
    for where, of_setting in results.curves(rows).items():
        click.echo(f"{words.heading(where.part)}: {where.words()}")
        click.echo(words.meaning(where.part, size=size))
        _print_table(results.table(results.with_second(rows, where, of_setting), size=size))
        for line in results.comparisons(of_setting, size=size):
            click.echo(f"- {line}")
        click.echo()
    for line in axes.along(results.curves(rows)):
        click.echo(f"{axes.heading(line)}: {line.title(size)}")
        _print_table(axes.table(line))
        click.echo()
    click.echo("What the names mean")
    for line in results.legend(rows, size=size):
        click.echo(f"- {line}")
    click.echo()
    _say_where(folder, charts)


def _open(folder: Path, request: Mapping[str, Any], columns: Sequence[str]) -> Store:
    """The folder's draws; what is damaged is said."""
    kept = Store(folder, request, columns)
    for damage in kept.damaged:
        click.echo(f"effattn: {text.plain(str(damage))}; the draw is dropped and measured again", err=True)
    return kept


def _measure(plan: plans.Plan, folder: Path, jobs: Sequence[Job]) -> list[Row]:
    limits.check_memory(plan.study, jobs)
    kept = _open(folder, plan.request(), plans.ERROR_COLUMNS)
    with _bar(len(jobs)) as progress:
        rows = kept.run(jobs, partial(_MEASURES[plan.study], seed=plan.seed), progress)
    _write_provenance(folder)
    return rows


def _inverse(
    name: str, folder: Path, named: bool, profile: str, target: float, changes: dict[str, Any]
) -> None:
    plan = plans.adapt(plans.profile(name, profile), **changes)
    inverse.check_target(target, plan.dtype)
    if len(plan.n) != 1:
        raise RequestError("--target-error answers for one length; name it with --n")
    (n,) = plan.n
    if not changes.get("sizes"):
        pairs = any(method.startswith(("trigonometric", "hyperbolic")) for method in plan.methods)
        plan = plans.adapt(plan, sizes=inverse.sizes_up_to(n, pairs=pairs))
    folder = folder if named else folder.with_name(f"{folder.name}-inverse")
    known = performer.METHODS if name == "performer" else linformer.METHODS
    # Baselines and divergences would take most of the time, and the answer has neither.
    jobs = [
        job for job in plans.jobs(plan)
        if job.point.part == "error" and (job.point.method in known or own.is_own(job.point.method))
    ]  # fmt: skip
    limits.check_memory(name, jobs)
    measure = partial(_MEASURES[name], seed=plan.seed, divergence=False)
    kept = _open(folder, {**plan.request(), "question": "smallest size"}, plans.ERROR_COLUMNS)
    with _bar(len(jobs)) as progress:
        rows = kept.run(jobs, measure, progress)
    while not changes.get("sizes") and (more := _halfway(rows, target)):
        with _bar(len(more)) as progress:
            rows = rows + kept.run(more, measure, progress)
    _write_provenance(folder)
    said: list[str] = []
    for where, of_setting in results.curves(rows).items():
        title = f"{where.words()}: the smallest {_SIZE[name]} with a relative error of at most {target:g}"
        table = _answers(name, where, of_setting, target)
        click.echo(title)
        _print_table(table)
        click.echo()
        said += [f"## {title}", "", *table, ""]
    click.echo("What the names mean")
    for line in words.explained(plan.methods, size=_SIZE[name]):
        click.echo(f"- {line}")
    click.echo(f"- {words.INTERVALS}")
    click.echo()
    note = (
        f"{_SIZE[name]} between two sizes that were measured is interpolated, by the logarithms of size and error."
        f" CPU time and memory: of one head in float32{_not_in(plan.dtype)}, on one thread, {_measured_with(name, plan)};"
        " exact attention with all scores written out."
    )
    click.echo(note)
    charts = summary.write(
        rows, folder, plans.ERROR_COLUMNS, title=f"Study {name}: which {_SIZE[name]} for an error of {target:g}?",
        size=_SIZE[name], lead=[*said, note, ""],
    )  # fmt: skip
    _say_where(folder, charts)


def _halfway(rows: Sequence[Row], target: float) -> list[Job]:
    """Draws at sizes between the last that misses the target and the first that reaches it, while these lie apart."""
    found = []
    for where, of_setting in results.curves(rows).items():
        for curve in of_setting:
            if (between := inverse.between(curve, target)) is not None:
                below, middle = between
                found += [
                    replace(row.job, point=replace(row.job.point, size=middle))
                    for row in rows
                    if results.setting(row.job.point) == where
                    and (row.job.point.method, row.job.point.size) == (curve.method, below)
                ]
    return found


def _not_in(dtypes: Sequence[str]) -> str:
    """What the costs are not of: the errors may be of dtypes that CPUs compute slowly."""
    other = [dtype for dtype in dtypes if dtype != "fp32"]
    return f", not in {' or '.join(other)}" if other else ""


def _measured_with(name: str, plan: plans.Plan) -> str:
    """What the costs are of, in words."""
    theirs = [method for method in plan.methods if own.is_own(method)]
    words = ["with positive features" if name == "performer" else "with averages of neighbours"]
    if len(theirs) == len(plan.methods):
        words.clear()
    return "; ".join([*words, *(f"of {method} with its own function `attention`" for method in theirs)])


def _answers(
    name: str, where: results.Setting, of_setting: Sequence[results.Curve], target: float
) -> list[str]:
    """What each method needs, with its cost, as a table of Markdown."""
    letter, n = _SIZE[name], where.n
    lines = [f"| method | {letter} | CPU time | memory |", "|---|---|---|---|"]
    for curve in of_setting:
        got = inverse.answer(curve, target)
        if got.smallest is None:
            error = results.cell(got.at_limit)
            some = (
                f" in {curve.intervals[0].draws - got.reached} of {curve.intervals[0].draws} draws"
                if got.reached
                else ""
            )
            lines.append(f"| {curve.method} | none up to {got.limit}{some}, error {error} there | - | - |")
            continue
        size = int(got.smallest.median)
        time, memory = _cost(name, curve, size)
        low, high = (_whole(x, got.limit) for x in (got.smallest.low, got.smallest.high))
        spread = f" ({low} to {high})" if low != high else ""
        if got.open_below:
            spread = " or fewer; none below was tried"
        elif got.too_few is not None:
            spread += f", where it is exact; {got.too_few} are too few"
        lines.append(f"| {curve.method} | {size}{spread} | {time} | {memory} |")
    exact = probe.measure(method="standard", n=(n,), head_dim=where.head_dim, size=1)[0]
    lines.append(f"| exact | - | {text.seconds(exact['seconds'])} | {_bytes(exact['bytes'])} |")
    return lines


def _cost(study: str, curve: results.Curve, size: int) -> tuple[str, str]:
    """CPU time and memory of a method at a size, for the table. A user's own that doesn't take that size, which may be
    interpolated, is measured at the next one that it took."""
    where, theirs = curve.setting, own.is_own(curve.method)
    larger = [taken for taken in curve.sizes if taken > size][:1] if theirs else []
    for tried in (size, *larger):
        try:
            (cost,) = probe.measure(
                method=_probed(study, curve.method, causal=where.causal),
                n=(where.n,), head_dim=where.head_dim, size=tried, causal=where.causal,
            )  # fmt: skip
        except EffattnError as error:
            if not theirs:
                raise
            click.echo(f"effattn: {text.plain(str(error))}; its costs there are left out", err=True)
            continue
        at = f" at {_SIZE[study]} = {tried}" if tried != size else ""
        return f"{text.seconds(cost['seconds'])}{at}", f"{_bytes(cost['bytes'])}{at}"
    return text.MISSING, text.MISSING


def _probed(study: str, method: str, *, causal: bool) -> str:
    """The name by which `probe` knows what is to be measured."""
    if own.is_own(method):
        return method
    return "performer, causal" if study == "performer" and causal else study


def _whole(size: float, limit: int) -> str:
    return f"over {limit}" if size == float("inf") else str(int(size))


def _bytes(count: float) -> str:
    if count < 0.1 * 2**20:  # the peak is that of the process, to a page, over what it had before
        return "under 0.1 MB"
    return f"{count / 2**20:.1f} MB" if count < 2**30 else f"{count / 2**30:.2f} GB"


class _Fixed(NamedTuple):
    """A study whose grid is its profile's."""

    jobs: Callable[[str], list[Job]]
    measure: Callable[[str], Measure]  #: for a profile
    columns: tuple[str, ...]
    write: Callable[[Sequence[Row], Path], list[Path]]
    tables: Callable[[Sequence[Row]], list[list[str]]]
    notes: tuple[str, ...]  #: how to read the tables


_FIXED = {
    "complexity": _Fixed(
        complexity.jobs,
        lambda profile: partial(complexity.measure, profile=profile),
        (*plans.COST_COLUMNS, "error"),
        lambda rows, folder: complexity.write(complexity.lines(rows), folder),
        lambda rows: [complexity.table(complexity.lines(rows))],
        complexity.NOTES,
    ),
    "traffic": _Fixed(
        traffic.jobs, lambda profile: traffic.measure, traffic.COLUMNS, traffic.write, lambda rows: [traffic.table(rows)],
        traffic.NOTES,
    ),
    "model": _Fixed(
        model.jobs, lambda profile: model.measure, model.COLUMNS, model.write,
        lambda rows: [model.table(rows), model.layers(rows)],
        model.NOTES,
    ),
}  # fmt: skip


def _fixed(name: str, folder: Path, profile: str) -> None:
    chosen = _FIXED[name]
    jobs = chosen.jobs(profile)
    kept = _open(folder, {"study": name, "profile": profile}, chosen.columns)
    with _bar(len(jobs)) as progress:
        rows = kept.run(jobs, chosen.measure(profile), progress)
    _write_provenance(folder)
    charts = chosen.write(rows, folder)
    for table in chosen.tables(rows):
        _print_table(table)
        click.echo()
    for line in chosen.notes:
        click.echo(f"- {line}")
    click.echo()
    with (folder / summary.SUMMARY_MD).open("a", encoding="utf-8") as file:
        file.write("\n" + "".join(f"- {text.markdown(line)}\n" for line in chosen.notes))
    _say_where(folder, charts)


def _print_table(lines: Sequence[str]) -> None:
    """A table of Markdown in columns."""
    rows = [
        [cell.strip().replace("\\", "") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if not line.startswith("|---")
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _say_where(folder: Path, charts: Sequence[Path]) -> None:
    drawn = f", {len(charts)} chart{'s' if len(charts) > 1 else ''}" if charts else ""
    click.echo(f"Written to {folder}/{drawn}")


def _write_provenance(folder: Path) -> None:
    import json

    origin = {"ended": provenance.now(), **provenance.collect(device="cpu")}
    (folder / "provenance.json").write_text(json.dumps(origin, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _bar(total: int) -> Iterator[Callable[[Job], None] | None]:
    """A progress bar on stderr where that is a terminal; a line at each tenth elsewhere, such as in a log."""
    if not sys.stderr.isatty():
        yield _tenths(total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from effattn.report import terminal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        yield lambda job: bar.update(task, advance=1, description=job.point.method or "measuring")


def _tenths(total: int) -> Callable[[Job], None]:
    """Says on stderr when another tenth of the draws is there."""
    done = 0

    def progress(job: Job) -> None:
        nonlocal done
        before, done = done, done + 1
        if total >= 10 and done * 10 // total > before * 10 // total:
            click.echo(
                f"effattn: {done} of {total} draws, the last of {job.point.method or job.point.part}",
                err=True,
            )

    return progress
