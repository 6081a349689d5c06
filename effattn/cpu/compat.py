"""Code that was written for a GPU, on a machine without one: `as_cuda`.

    with effattn.cpu.as_cuda():
        q = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16)
        out = somebody_elses_attention(q, q, q)   # asserts is_cuda, asks for the capability, autotunes

`effattn cpu -- python script.py` and `pytest --effattn-cpu` do the same for a whole process.

Inside, torch says that there is one CUDA device; tensors made for it live in host memory (compat_tensor.py,
compat_storage.py); autocast follows CUDA's lists (compat_autocast.py); `torch.cuda` answers for a declared GPU
(compat_torch.py); Triton's driver is the CPU backend's under that GPU's name, it refuses tensors of the CPU, and autotuners
take their first valid configuration (compat_triton.py). Everything is undone on leaving. Tensors made inside tell the
truth outside: they are on the CPU.

Not emulated: CUDA graphs (refused), torch.compile (runs eagerly), CUDA C++ and CuTe kernels, cuBLAS and cuDNN handles,
NCCL, more than one device, torch's errors on mixing devices, the asynchrony of streams, memory statistics (0), and names
that were bound before (`from torch import zeros`) the emulation began.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from effattn.errors import RequestError

#: How an autotuner chooses: its first configuration that compiles, or the fastest of all.
AUTOTUNE = ("first", "all")
DEFAULT_CAPABILITY = "9.0"

#: environment variable with "CAPABILITY AUTOTUNE" of the emulation that a process starts in
VARIABLE = "EFFATTN_CPU_AS_CUDA"

_MISSING = object()
_lock = threading.Lock()
_depth = 0
_undo: ExitStack | None = None


def parse_capability(given: str | tuple[int, int]) -> tuple[int, int]:
    """(9, 0) of "9.0". RequestError for a capability that no known GPU has."""
    if isinstance(given, tuple):
        found = given
    else:
        major, _, minor = str(given).partition(".")
        found = (int(major), int(minor or 0)) if major.isdigit() and (minor or "0").isdigit() else (0, 0)
    from effattn.cpu.compat_gpus import GPUS

    if found not in GPUS:
        known = ", ".join(f"{a}.{b}" for a, b in GPUS)
        raise RequestError(f"compute capability {given!r} is not known; expected one of {known}")
    return found


def check_autotune(given: str) -> str:
    if given not in AUTOTUNE:
        raise RequestError(f"autotune {given!r} is not known; expected one of {', '.join(AUTOTUNE)}")
    return given


def activate(*, capability: str | tuple[int, int] = DEFAULT_CAPABILITY, autotune: str = "first") -> None:
    """Begin the emulation; `deactivate` ends it. Nested calls count, and the outermost one's settings hold."""
    global _depth, _undo
    found = parse_capability(capability)
    check_autotune(autotune)
    with _lock:
        if _depth == 0:
            _undo = _install(found, autotune)
        _depth += 1


def deactivate() -> None:
    """End what `activate` began."""
    global _depth, _undo
    with _lock:
        if _depth == 0:
            raise RequestError("deactivate() without activate()")
        _depth -= 1
        if _depth == 0:
            assert _undo is not None
            _undo.close()
            _undo = None


def settings(*, capability: str, autotune: str) -> str:
    """The value of VARIABLE. Raises RequestError for settings that are not known."""
    major, minor = parse_capability(capability)
    return f"{major}.{minor} {check_autotune(autotune)}"


def activate_from_environment() -> None:
    """Begin the emulation that VARIABLE describes, for good; nothing where it is not set."""
    given = os.environ.get(VARIABLE)
    if given:
        capability, _, autotune = given.partition(" ")
        activate(capability=capability, autotune=autotune or "first")


@contextmanager
def as_cuda(
    *, capability: str | tuple[int, int] = DEFAULT_CAPABILITY, autotune: str = "first"
) -> Iterator[None]:
    """Run code written for device "cuda" on the CPU inside the block.

    `capability`: the compute capability that is declared, such as "9.0"; decides the name, the number of
    multiprocessors and the shared memory that host code is told. `autotune`: "first" takes the first configuration that
    compiles, "all" times them all. Raises RequestError for values that are not known.
    """
    activate(capability=capability, autotune=autotune)
    try:
        yield
    finally:
        deactivate()


def _install(capability: tuple[int, int], autotune: str) -> ExitStack:
    from effattn.cpu import compat_autocast, compat_storage, compat_tensor, compat_torch, compat_triton

    undo = ExitStack()

    def patch(owner: Any, name: str, value: Any) -> None:
        # What stood in the owner itself: an inherited attribute comes back by deleting ours.
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        undo.callback(delattr, owner, name) if before is _MISSING else undo.callback(
            setattr, owner, name, before
        )

    with ExitStack() as failing:
        failing.push(undo.__exit__)
        undo.callback(_set_active, compat_tensor.state, False)
        # Triton first: it chooses its default driver while torch.cuda still tells the truth.
        compat_triton.install(patch, capability, autotune)
        compat_tensor.install(patch)
        undo.callback(compat_storage.install(patch))
        compat_torch.install(patch, capability)
        undo.callback(compat_autocast.install(patch))
        undo.enter_context(compat_tensor.module_moves())
        _set_active(compat_tensor.state, True)
        failing.pop_all()
    return undo


def _set_active(state: Any, value: bool) -> None:
    state.active = value
    state.default_device = False
