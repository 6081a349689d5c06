"""Attention of other libraries as functions that effattn judges: effattn gate effattn.adapters.flex:attention

A small file each, which imports its library when it is called. Conventions are translated: axes, alignment of the causal mask,
the base of the log-sum-exp, heads that share keys. What a library does not offer is said, not worked around.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from effattn.errors import RequestError


def need(module: str, install: str) -> ModuleType:
    """The module. RequestError with the command that installs it where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RequestError(
            f"this adapter needs the module {module!r}, which cannot be imported here ({error}): {install}"
        ) from None
