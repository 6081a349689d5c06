"""`effattn cpu -- PROGRAM ...`: run a Python program that was written for a GPU on this machine's cores.

The program becomes this process, so its exit code and its signals are its own; with `--check` it is a child, whose
findings are printed when it has ended (checked_process.py). What begins the emulation in it, and in
the processes that it starts, is an environment variable and a `sitecustomize` on PYTHONPATH (autoload/).
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from effattn.cpu import compat, launch, models
from effattn.errors import RequestError

_AUTOLOAD = Path(__file__).with_name("autoload")
_EXAMPLES = (
    "`effattn cpu -- python script.py`, `effattn cpu -- pytest tests/` or `effattn cpu -- -m package.module`"
)


def command_line(program: Sequence[str], path: str) -> list[str]:
    """The program as it is started: its file, then its arguments. RequestError where there is none to start."""
    if not program:
        raise RequestError(f"nothing to run; expected a program after --, such as {_EXAMPLES}")
    name, *rest = program
    if name in ("-m", "-c"):
        if not rest:
            raise RequestError(
                f"{name} needs {'a module' if name == '-m' else 'code'} to run, such as {_EXAMPLES}"
            )
        return [sys.executable, *program]
    if name.startswith("-"):
        raise RequestError(f"expected a program after --, found the option {name}; such as {_EXAMPLES}")
    if name in ("python", "python3"):
        return [sys.executable, *rest]
    if name.endswith(".py") and Path(name).is_file():
        return [sys.executable, *program]
    found = shutil.which(name, path=path)
    if found is None:
        why = "exists, but cannot be executed" if Path(name).exists() else "was not found"
        raise RequestError(
            f"the program {name!r} {why}; expected one on PATH or a path to one, such as {_EXAMPLES}"
        )
    return [found, *rest]


def environment(settings: str, base: Mapping[str, str], dot_model: str | None = None) -> dict[str, str]:
    """The environment of the program: this Python's own programs first on PATH, the emulation told to each Python."""
    own = str(Path(sys.executable).parent)
    out = dict(base)
    out["PATH"] = os.pathsep.join([own, *filter(None, [base.get("PATH")])])
    out["PYTHONPATH"] = os.pathsep.join([str(_AUTOLOAD), *filter(None, [base.get("PYTHONPATH")])])
    out[compat.VARIABLE] = settings
    if dot_model is not None:
        out[models.VARIABLE] = models.get(dot_model).name
    return out


def run(
    program: Sequence[str],
    *,
    capability: str,
    autotune: str,
    checks: Sequence[str] = (),
    dot_model: str | None = None,
) -> int:
    """Become the program, or run it under checks and return its exit code.

    Raises RequestError for settings that are not known and programs that cannot be started.
    """
    settings = compat.settings(capability=capability, autotune=autotune)
    launch.threads_from_environment()
    if dot_model is None:
        models.selected()
    env = environment(settings, os.environ, dot_model)
    command = command_line(program, env["PATH"])
    if checks:
        from effattn.cpu import checked_process

        try:
            return checked_process.run(command, env, checks)
        except OSError as error:
            raise RequestError(f"could not start {command[0]}: {error.strerror}") from error
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(command[0], command, env)
    except OSError as error:
        raise RequestError(f"could not start {command[0]}: {error.strerror}") from error
