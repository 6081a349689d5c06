"""`effattn sweep`: many cases, on every core or every machine there is."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from effattn.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from effattn.run.tally import Result

INTERRUPTED, TERMINATED = 130, 143


class _Terminated(KeyboardInterrupt):
    """SIGTERM came, as from a scheduler of jobs whose time is over."""


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the run. The same command goes on where it was broken off. effattn-runs/NAME-HASH if not given.",
)
@click.option("--overwrite", is_flag=True, help="Begin anew where the folder holds a run.")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu or cuda.")
@click.option(
    "--jobs", type=click.IntRange(min=1), metavar="N", help="Local workers; as many as there are cores."
)
@click.option(
    "--executor",
    default="local",
    show_default=True,
    metavar="local|dask://HOST:PORT",
    help="Where the workers are. Workers of Dask must see the run folder and have one thread each.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="A case that takes longer, compilation included, is timed out.",
)
@click.option(
    "--memory-limit",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GIB",
    help="What each local worker may allocate; its share of nine tenths of what is available if not given.",
)
def sweep(
    spec: Path,
    out: Path | None,
    overwrite: bool,
    device: str,
    jobs: int | None,
    executor: str,
    time_limit: float,
    memory_limit: float | None,
) -> int:
    """Judge what SPEC, a TOML file, asks for: methods x dtypes x shapes x values x options x seeds."""
    from effattn import cli_progress
    from effattn.report import text
    from effattn.run import isolation, provenance, records, store
    from effattn.run import spec as specs
    from effattn.run.sweep import Sweep

    if device not in ("cpu", "cuda"):
        raise RequestError(f"unknown device {device!r}; expected one of cpu, cuda")
    isolation.check_time_limit(time_limit)
    wanted = specs.load(spec)
    folder = (
        out if out is not None else store.DEFAULT_FOLDER / f"{store.file_name(spec.stem)}-{wanted.id[:8]}"
    )
    try:
        with (
            _ended_by_sigterm(),
            _executor(executor, device=device, jobs=jobs, memory_limit=memory_limit) as (pool, parallel),
        ):
            origin = {
                "command": provenance.command_line(click.get_current_context().obj),
                "started": provenance.now(),
                "specification": spec.read_text(encoding="utf-8"),
                **provenance.collect(device=device, facts={}),
                "executor": executor,
                "workers": parallel,
            }
            with Sweep(
                folder, wanted, device=device, time_limit=time_limit, provenance=origin, overwrite=overwrite
            ) as taken:
                if out is None:
                    store.ignore_in_git(store.DEFAULT_FOLDER)
                with cli_progress.counted(wanted.count) as progress:
                    result = taken.run(pool, parallel=parallel, progress=progress)
    except KeyboardInterrupt as end:
        terminated = isinstance(end, _Terminated)
        how = "ended by SIGTERM" if terminated else "interrupted"
        there = sum(1 for file in store.verdict_files(folder) for _ in records.lines(file))
        click.echo(
            f"effattn: {how}; {there} of {wanted.count} verdicts are recorded in {text.plain(str(folder))}/, and the same "
            "command goes on from there",
            err=True,
        )
        raise click.exceptions.Exit(TERMINATED if terminated else INTERRUPTED) from None
    _print(result, folder)
    return result.exit_code


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise `_Terminated` on SIGTERM, where it would end this process; only the main thread can."""
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield
        return

    def end(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # ending the workers is not to be broken off
        raise _Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def _executor(
    name: str, *, device: str, jobs: int | None, memory_limit: float | None
) -> Iterator[tuple[concurrent.futures.Executor, int]]:
    """The executor that is meant, and how many workers it has."""
    from effattn.run import isolation

    if name == "local":
        parallel = jobs or (len(os.sched_getaffinity(0)) if device == "cpu" else 1)
        limit = isolation.memory_bytes(memory_limit)
        if limit is None and device == "cpu":
            limit = int(isolation.available_memory() * isolation.MEMORY_SHARE / parallel)
        pool = isolation.IsolatedExecutor(parallel, memory_limit=limit, quiet=True)
        try:
            yield pool, parallel
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        pool.shutdown()
        return
    if not name.startswith("dask://"):
        raise RequestError(f"unknown executor {name!r}; expected local or dask://HOST:PORT")
    if jobs is not None or memory_limit is not None:
        raise RequestError(
            "--jobs and --memory-limit are for local workers; Dask's are started with their own limits"
        )
    from effattn.run import dask

    with dask.executor(name.removeprefix("dask://"), device=device) as (pool, parallel):
        yield pool, parallel


def _print(result: Result, folder: Path) -> None:
    from effattn.report import terminal, text

    console = terminal.console()
    rows = []
    for (method, dtype), tally in result.tallies.items():
        failed = {outcome: n for outcome, n in tally.outcomes.items() if _failed(outcome)}
        rows.append(
            (
                method,
                dtype,
                str(tally.judged),
                str(tally.outcomes["pass"]),
                text.counts(failed),
                str(tally.outcomes["not supported"]),
                str(tally.outcomes["not judged"]),
                text.fraction(tally.fraction),
                tally.failing[0] if tally.failing is not None else tally.worst,
            )
        )
    names = (
        "method",
        "dtype",
        "judged",
        "passed",
        "failed",
        "not supported",
        "not judged",
        "error/bound",
        "worst case",
    )
    terminal.print_plain(console, names, rows)
    for damage in result.damaged:
        click.echo(f"effattn: {text.plain(str(damage))}", err=True)
    count = result.resumed + result.added
    parts = f": {result.resumed} recorded before, {result.added} now" if result.resumed else ""
    console.print(f"{count} {'case' if count == 1 else 'cases'}{parts}.", markup=False)
    if result.same:
        console.print(
            f"{result.same} more {'combination' if result.same == 1 else 'combinations'} of the specification"
            f" {'is' if result.same == 1 else 'are'} the same case as another, and {'was' if result.same == 1 else 'were'}"
            " not run again.",
            markup=False,
        )
    _print_reasons(console, result)
    if result.busy:
        console.print(
            f"Workers spent {result.judging / result.busy:.1%} of their time in the cases.", markup=False
        )
    console.print(f"Written to {folder}/", markup=False, soft_wrap=True)
    failing = next((tally.failing for tally in result.tallies.values() if tally.failing is not None), None)
    if failing is not None:
        line = shlex.join(["effattn", "replay", *failing, "--run", str(folder)])
        console.print(f"To see a failed case again: {line}", markup=False, soft_wrap=True)
    if result.exit_code == 2:
        console.print("Nothing was judged: that is not a pass.", markup=False, style="bold yellow")


def _print_reasons(console: Console, result: Result) -> None:
    """How many cases were not supported or not judged, and why: the reason of the first, of each method."""
    from effattn.report import summary, text

    for outcome in summary.SET_ASIDE:
        counted: dict[str, int] = {}  # a method has the same reason in each dtype, as a rule
        for tally in result.tallies.values():
            if (reason := tally.reasons.get(outcome)) is not None:
                counted[reason] = counted.get(reason, 0) + tally.outcomes[outcome]
        for reason, n in counted.items():
            first = "" if n == 1 else ", the first"
            console.print(f"{outcome}, {n}{first}: {text.one_line(reason)}", markup=False, soft_wrap=True)


def _failed(outcome: str) -> bool:
    from effattn.report import summary

    return summary.failed(outcome)
