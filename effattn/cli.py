"""The command line. Exit codes: 0 pass, 1 the method failed, 2 the request or the environment is wrong.

Nothing is imported before it is needed: `effattn --help` starts in a tenth of a second, torch alone takes
ten times that. What is effattn's own fault is not caught: it ends with a traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from effattn import (
    cli_approximation,
    cli_baseline,
    cli_certify,
    cli_lists,
    cli_progress,
    cli_report,
    cli_runs,
    cli_sweep,
)
from effattn.errors import RequestError
from effattn.study.cli import study

if TYPE_CHECKING:
    from effattn.run.executor import Local
    from effattn.run.isolation import Isolated

PASSED, FAILED, WRONG_REQUEST, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141

#: Other names of the dtypes, so that the message can say which one is meant.
_DTYPE_ALIASES = {
    "float16": "fp16", "half": "fp16", "f16": "fp16",
    "bfloat16": "bf16",
    "float32": "fp32", "float": "fp32", "f32": "fp32", "single": "fp32",
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; the console script exits with it."""
    import os

    # torch's threads spin while they wait for each other, unless told so before it is imported. Where anything
    # else wants the cores, spinning makes a case ten times slower; alone, it gains next to nothing.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # Not `cli.main`, which exits with 1 when a pipe breaks: that would say that the method failed.
        with cli.make_context("effattn", given, obj=tuple(given)) as context:
            code = cli.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except RequestError as error:
        _complain(str(error))
        return WRONG_REQUEST
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "effattn"
        _complain(f"{error.format_message()} See `{where} --help`.")
        return WRONG_REQUEST
    except click.ClickException as error:
        _complain(error.format_message())
        return WRONG_REQUEST
    except (click.Abort, KeyboardInterrupt):
        # 1 would say that the method failed.
        _complain("interrupted; nothing was written")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe, such as `head`, has gone. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return BROKEN_PIPE
    return code if isinstance(code, int) else PASSED


def _complain(message: str) -> None:
    from effattn.report.text import plain

    click.echo(f"effattn: {plain(message)}", err=True)


def _print_version(context: click.Context, _parameter: click.Parameter, given: bool) -> None:
    if given and not context.resilient_parsing:
        import effattn

        click.echo(f"effattn {effattn.__version__}")
        context.exit()


def _check_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--check",
        "check_names",
        multiple=True,
        metavar="NAME",
        help="Look at what the method's Triton kernels do on the CPU: bounds, races, poison, order; repeat it or list "
        "them with commas.",
    )(command)


def _isolation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options about the process that the method runs in."""
    options = (
        click.option(
            "--time-limit",
            type=click.FloatRange(min=0, min_open=True),
            default=300.0,
            show_default=True,
            metavar="SECONDS",
            help="A case that takes longer, compilation included, is timed out.",
        ),
        click.option(
            "--memory-limit",
            type=click.FloatRange(min=0, min_open=True),
            metavar="GIB",
            help="What the method's process may allocate; nine tenths of what is available if not given. On a GPU "
            "there is no limit if not given.",
        ),
        click.option(
            "--isolation/--no-isolation",
            default=True,
            show_default=True,
            help="Run the method in a process of its own, or in this one, where a debugger can follow and a crash "
            "takes the gate with it.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


_dot_model_option = click.option(
    "--dot-model",
    metavar="MODEL",
    help="How the CPU backend accumulates tl.dot: ieee, or a GPU's tensor cores, such as hopper; EFFATTN_DOT_MODEL, "
    "else ieee, if not given.",
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Show the version.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Is an attention kernel still right, and by how much did its accuracy move?

    METHOD is a name that `effattn methods` lists, or a function of yours: path/to/file.py:function or
    package.module:function. METHOD@PRESET judges it by other arithmetic than it declares, see `effattn methods`.

    Exit codes: 0 pass, 1 the method failed, 2 the request or the environment is wrong or nothing was judged.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@cli.command()
@click.argument("method")
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="DTYPE",
    help="fp16, bf16 or fp32; repeat it or list them with commas. All three if not given.",
)
@click.option(
    "--profile",
    default="smoke",
    show_default=True,
    metavar="PROFILE",
    help="Which cases: smoke (seconds) or ci (minutes).",
)
@click.option(
    "--values",
    "value_names",
    multiple=True,
    metavar="NAME",
    help="Value distributions in place of the profile's own, see `effattn values`; repeat it or list them "
    "with commas. real:smollm2 takes Q, K and V of a real model.",
)
@click.option(
    "--laws",
    "law_names",
    multiple=True,
    metavar="NAME",
    help="Laws to try, see `effattn laws`: all, none, or names or families; repeat it or list them with commas. All if "
    "not given, but none with --values or --check.",
)
@click.option(
    "--expected",
    "expected_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Laws that METHOD is known to break, each with the reason, see docs/laws.md.",
)
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu or cuda.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the run: verdicts.jsonl, summary.md, provenance.json, failed cases. "
    "A new folder in effattn-runs/ if not given.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run that --out holds.")
@_check_option
@_dot_model_option
@_isolation_options
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    metavar="N",
    help="Processes that cases are judged in: one for each core, at most 4, if not given; one on a GPU.",
)
@click.option("--by-values", is_flag=True, help="Show one more row for each value distribution.")
@click.option("--against", metavar="RUN", help="Also compare with this run: what broke, what was mended.")
@click.option(
    "--baseline",
    "baseline_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Fail where errors have become larger than `effattn baseline` recorded, by more than chance.",
)
@click.option("--report", "with_report", is_flag=True, help="Also write report.html into the run folder.")
def gate(
    method: str,
    dtypes: tuple[str, ...],
    profile: str,
    value_names: tuple[str, ...],
    law_names: tuple[str, ...],
    expected_file: Path | None,
    device: str,
    out: Path | None,
    overwrite: bool,
    check_names: tuple[str, ...],
    dot_model: str | None,
    time_limit: float,
    memory_limit: float | None,
    isolation: bool,
    jobs: int | None,
    by_values: bool,
    against: str | None,
    baseline_file: Path | None,
    with_report: bool,
) -> int:
    """Judge METHOD on generated cases: pass or fail, with evidence."""
    from effattn import gate as gates
    from effattn.expected import expected_failures
    from effattn.judge import NOTHING_CHECKED
    from effattn.properties import profiles
    from effattn.report import markdown, summary, terminal
    from effattn.run import provenance, store

    wanted = _dtypes(dtypes)
    profiles.get(profile)
    chosen_values = tuple(dict.fromkeys(_split(value_names)))
    chosen_laws = _laws(law_names or (("none",) if chosen_values or check_names else ("all",)))
    known = () if expected_file is None else tuple(expected_failures(expected_file))
    started = provenance.now()
    if overwrite and out is None:
        raise RequestError("--overwrite replaces the run that --out names; give --out too")
    folder = out if out is not None else store.default_folder(method=method, started=started)
    before = None if against is None else cli_report.baseline(against)
    if with_report:
        cli_report.check_installed()
    checks = _checks(check_names, device)
    with (
        _multiplying(dot_model, device) as multiplied,
        _judge(
            method,
            device,
            time_limit=time_limit,
            memory_limit=memory_limit,
            isolation=isolation,
            checks=checks,
            jobs=jobs,
            quiet=True,
        ) as judge,
        cli_progress.shown() as progress,
    ):
        committed = None
        if baseline_file is not None:
            kind = {"device": device, "dot_model": multiplied, "profile": profile, "values": chosen_values}
            committed = cli_baseline.load(baseline_file, method=judge.name, facts=kind)
        request = gates.Request(
            judge=judge,
            dtypes=wanted,
            profile=profile,
            values=chosen_values,
            laws=chosen_laws,
            expected=known,
        )
        _announce_capture(request.values)
        questions = gates.collect(request, progress=progress)
        facts = judge.call("effattn.run.provenance:torch_facts", device)
        origin = {
            "command": provenance.command_line(click.get_current_context().obj),
            "started": started,
            **provenance.collect(device=device, facts=facts),
        }
        with store.RunWriter(folder, overwrite=overwrite, spec=judge.spec, device=device) as writer:
            progress.begin(questions)
            result = gates.run_gate(request, questions, record=writer.add, progress=progress)
            for failure in result.failures:
                for failed in failure.verdicts:
                    writer.add_case(failed.case)
                writer.add_case(failure.shrunk.verdict.case)
            origin |= {
                "kind_of_run": "gate",
                "ended": provenance.now(),
                "method": {"name": judge.name, "spec": judge.spec},
                "dtypes": list(request.dtypes),
                "profile": profile,
                "values": list(request.values),
                "device": device,
                "checks": list(checks),
                "dot_model": multiplied,
                "laws": list(request.laws) if law_names else "all" if request.laws else [],
                "cases": len(questions),
                "isolation": isolation,
                "exit_code": result.exit_code,
            }
            if result.failures:
                small = [failure.shrunk.verdict for failure in result.failures]
                origin["smallest"] = [{"case": v.case.id, "replay": v.replay} for v in small]
            compared = {"against": against, "baseline": None if baseline_file is None else str(baseline_file)}
            if given := {name: told for name, told in compared.items() if told is not None}:
                origin["compared"] = given
            if not result.weighed.passed:
                origin["evidence"] = result.weighed.to_dict()
            writer.add_text(store.SUMMARY, markdown.summary(result, origin))
            if out is None:
                store.ignore_in_git(store.DEFAULT_FOLDER)
            writer.commit(origin)

    if checks and not result.failures:
        passed = [v for v in result.compared if str(v.outcome) == summary.PASS]
        if passed and all(v.message.endswith(NOTHING_CHECKED) for v in passed):
            raise RequestError(f"--check {','.join(checks)}: {NOTHING_CHECKED}; leave --check out")
    console = terminal.console()
    terminal.print_result(console, result, by_values=by_values)
    if before is not None:
        cli_report.print_against(console, before, folder)
    console.print(f"Written to {folder}/", markup=False, soft_wrap=True)
    as_before = True
    if committed is not None and baseline_file is not None:
        as_before = cli_baseline.report(
            committed, result.verdicts, file=baseline_file, folder=folder, passed=result.exit_code == 0
        )
    if with_report:
        made = cli_report.write_report(folder, against, baseline_file)
        console.print(f"Report: {made}", markup=False, soft_wrap=True)
    return result.exit_code if as_before else FAILED


@cli.command()
@click.argument("case")
@click.argument("method")
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu or cuda.")
@click.option(
    "--run",
    "run_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The run folder to look an id up in; the newest in effattn-runs/ if not given.",
)
@_check_option
@_dot_model_option
@click.option(
    "--law", metavar="NAME", help="Try this law on the case instead of comparing with exact attention."
)
@click.option(
    "--export",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the failure as a script that needs only torch and the function, for a bug report.",
)
@_isolation_options
def replay(
    case: str,
    method: str,
    law: str | None,
    export: Path | None,
    device: str,
    run_folder: Path | None,
    check_names: tuple[str, ...],
    dot_model: str | None,
    time_limit: float,
    memory_limit: float | None,
    isolation: bool,
) -> int:
    """Judge one CASE again, with everything shown.

    CASE is a file with a case as JSON, the JSON itself, or the id of a case in a run folder.
    """
    from effattn.report import summary, terminal

    found = cli_certify.find_case(case, run_folder)
    checks = _checks(check_names, device)
    if law is not None:
        from effattn.properties.law import get

        get(law)
    with (
        _multiplying(dot_model, device),
        _judge(
            method,
            device,
            time_limit=time_limit,
            memory_limit=memory_limit,
            isolation=isolation,
            checks=checks,
        ) as judge,
    ):
        verdict = judge.judge(found, law, explain=True)
        terminal.print_details(terminal.console(), verdict)
        if export is not None:
            text = judge.call("effattn.report.export:for_command", found.to_dict(), judge.spec, law, device)
            export.write_text(text, encoding="utf-8")
            click.echo(f"Written to {export}")
    if summary.failed(verdict.outcome):
        return FAILED
    return PASSED if str(verdict.outcome) == summary.PASS else WRONG_REQUEST


@cli.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--capability", default="9.0", show_default=True, metavar="X.Y", help="The GPU that code is told of."
)
@click.option(
    "--autotune", default="first", show_default=True, metavar="first|all", help="Configurations to try."
)
@click.option(
    "--check",
    "check_names",
    multiple=True,
    metavar="NAME",
    help="Look at what Triton kernels do: bounds, races, poison, order, traffic; repeat it or list them with commas.",
)
@_dot_model_option
@click.argument("program", nargs=-1, type=click.UNPROCESSED)
def cpu(
    program: tuple[str, ...],
    capability: str,
    autotune: str,
    check_names: tuple[str, ...],
    dot_model: str | None,
) -> int:
    """Run a Python PROGRAM that was written for device "cuda" on the CPU: effattn cpu -- pytest tests/

    PROGRAM is python, pytest, -m MODULE, a script or a console script, with its arguments; put -- before it.
    """
    from effattn.cpu import command

    checks: tuple[str, ...] = ()
    if check_names:
        from effattn.cpu import sanitizer

        checks = sanitizer.parse(",".join(check_names))
    return command.run(program, capability=capability, autotune=autotune, checks=checks, dot_model=dot_model)


cli.add_command(study)
cli.add_command(cli_approximation.approximation)


@cli.command()
def doctor() -> int:
    """Show what this machine can run, and what is missing."""
    from effattn import doctor as doctors
    from effattn.report import terminal

    checks = doctors.examine()
    doctors.show(terminal.console(), checks)
    return PASSED if all(check.ok for check in checks if check.needed) else WRONG_REQUEST


for listing in cli_lists.COMMANDS:
    cli.add_command(listing)
cli.add_command(cli_baseline.baseline)
cli.add_command(cli_certify.certify)
cli.add_command(cli_runs.runs)
cli.add_command(cli_sweep.sweep)
cli.add_command(cli_report.report)


def _laws(given: Sequence[str]) -> tuple[str, ...]:
    """Names of the laws to try; `all` stands for all of them, `none` for none."""
    from effattn import laws

    names = _split(given)
    if names == ["none"]:
        return ()
    return tuple(law.name for law in laws.choose(() if names == ["all"] else names))


def _announce_capture(value_names: Sequence[str]) -> None:
    """Say on stderr what takes a minute without a word: the first use of a real model."""
    models = {
        name.removeprefix("real:").partition("/")[0] for name in value_names if name.startswith("real:")
    }
    if not models:
        return
    from effattn import real

    for model in sorted(models & real.MODELS.keys()):
        if not real.is_cached(model):
            click.echo(f"effattn: running {real.MODELS[model].title} once to capture Q, K and V", err=True)


def _dtypes(given: Sequence[str]) -> tuple[str, ...]:
    from effattn.case import DTYPES

    names = _split(given)
    for name in names:
        if name not in DTYPES:
            meant = _DTYPE_ALIASES.get(name.lower()) or (name.lower() if name.lower() in DTYPES else None)
            raise RequestError(_unknown("dtype", name, DTYPES, meant))
    if given and not names:
        raise RequestError(f"--dtype {given[0]!r} names no dtype; expected some of {', '.join(DTYPES)}")
    return tuple(dict.fromkeys(names)) or DTYPES


def _split(given: Sequence[str]) -> list[str]:
    return [name.strip() for text in given for name in text.split(",") if name.strip()]


def _unknown(what: str, name: str, known: Sequence[str], meant: str | None = None) -> str:
    close = [meant] if meant else difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown {what} {name!r}; expected one of {', '.join(known)}{hint}"


@contextlib.contextmanager
def _multiplying(dot_model: str | None, device: str) -> Iterator[str | None]:
    """Run with a dot model; its name, or None on a GPU, which has its own."""
    from effattn.cpu import models

    if device != "cpu":
        if dot_model is not None:
            raise RequestError(
                f"--dot-model {dot_model} says how the CPU multiplies; with --device {device} leave it out"
            )
        yield None
        return
    with models.use(models.selected() if dot_model is None else dot_model):
        yield models.selected()


def _judge(
    method: str,
    device: str,
    *,
    time_limit: float,
    memory_limit: float | None,
    isolation: bool,
    checks: Sequence[str],
    jobs: int | None = 1,
    quiet: bool = False,
) -> Isolated | Local:
    """The method, loaded where it will run."""
    if device not in ("cpu", "cuda"):
        raise RequestError(_unknown("device", device, ("cpu", "cuda")))
    if device == "cpu":
        from effattn.cpu import launch

        launch.threads_from_environment()  # before the first case, not in each
    from effattn.run.isolation import Isolated, check_time_limit, memory_bytes

    check_time_limit(time_limit)
    memory = memory_bytes(memory_limit)
    if not isolation:
        from effattn.run.executor import Local

        return Local(method, device=device, checks=checks)
    return Isolated(
        method,
        device=device,
        time_limit=time_limit,
        memory_limit=memory,
        checks=checks,
        jobs=jobs,
        quiet=quiet,
    )


def _checks(given: Sequence[str], device: str) -> tuple[str, ...]:
    """The instruments of --check, for a verdict."""
    if not given:
        return ()
    from effattn.cpu import sanitizer

    names = sanitizer.parse(",".join(given))
    if device != "cpu":
        raise RequestError(
            f"--check looks at kernels that run on the CPU, not on {device}; leave one of them out"
        )
    if "traffic" in names:
        raise RequestError(
            "--check traffic counts bytes and says nothing about right or wrong; use `effattn cpu --check traffic -- PROGRAM`"
        )
    return names
