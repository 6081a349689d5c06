"""effattn: is an attention kernel still right, and by how much did its accuracy move?

Importing this package imports neither torch nor triton; the names below load on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

#: public name -> the module that defines it
_PUBLIC: dict[str, str] = {
    "Case": "effattn.case",
    "EffattnError": "effattn.errors",
    "RequestError": "effattn.errors",
    "NotSupported": "effattn.errors",
    "method": "effattn.methods.declare",
    "check": "effattn.laws",
    "check_approximation": "effattn.approximation",
    "parametrize_with_laws": "effattn.laws",
}

#: packages that are used as attributes: `effattn.cpu.checks`
_PACKAGES = ("cpu", "kernels")

__all__ = ["__version__", *sorted(_PUBLIC)]  # pyright: ignore[reportUnsupportedDunderAll] one list, not two


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"effattn.{name}")
    raise AttributeError(f"module 'effattn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted((*__all__, *_PACKAGES))
