"""Which checks are on: what the compiler, the driver and launches ask. Imported with Triton, so it imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.cpu.sanitizer import Checks

_active: list[Checks] = []


def current() -> Checks | None:
    """The checks of the innermost `with effattn.cpu.checks(...)` block."""
    return _active[-1] if _active else None


def begin(checks: Checks) -> None:
    _active.append(checks)


def end(checks: Checks) -> None:
    _active.remove(checks)


def wants_checked_kernels() -> bool:
    """Whether kernels that are compiled now are instrumented."""
    return bool(_active)


def device_key(key: str) -> str:
    """The key under which Triton keeps compiled kernels in this process: instrumented ones apart."""
    return f"{key}+checked" if _active else key
