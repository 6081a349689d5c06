"""Methods: whatever computes attention and can be judged.

A new one is a module with a `Method` and an entry in the table below. Importing this package loads none of
them.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effattn.errors import RequestError
from effattn.methods.declare import method

if TYPE_CHECKING:
    from effattn.methods.base import Method

__all__ = ["describe", "get", "method", "names", "register"]


@dataclass(frozen=True, kw_only=True)
class _Entry:
    module: str
    cls: str
    summary: str


_REGISTRY: dict[str, _Entry] = {}


def register(name: str, *, module: str, cls: str, summary: str) -> None:
    """Add a method: `cls` is a `Method` without constructor arguments, `module` is imported on first use.

    Raises `RequestError` for a name that is taken or that could be read as a file or a module.
    """
    if name in _REGISTRY:
        raise RequestError(f"method {name!r} is registered already, by {_REGISTRY[name].module}")
    if not name or any(c in name for c in ":/\\") or name != name.strip():
        raise RequestError(f"{name!r} cannot name a method; expected a word without ':' and '/'")
    _REGISTRY[name] = _Entry(module=module, cls=cls, summary=summary)


def names() -> list[str]:
    """The registered methods, in the order of registration."""
    return list(_REGISTRY)


def describe(name: str) -> str:
    """One line on a registered method. Raises `RequestError` for an unknown name."""
    return _entry(name).summary


def get(spec: str) -> Method:
    """A method by its name, or a user's function: `path/to/file.py:function`, `package.module:function`.

    `@PRESET` at the end judges it by that preset of `effattn.tolerances.numerics` in place of what it declares.
    Raises `RequestError`, with close matches, for what is neither.
    """
    method, at, preset = spec.rpartition("@")
    if at and not set("/:.") & set(preset):
        from effattn.methods.declared import Declared

        return Declared(get(method), preset)
    if ":" in spec:
        from effattn.methods import user

        return user.load(spec)
    entry = _entry(spec)
    return getattr(importlib.import_module(entry.module), entry.cls)()


def _entry(name: str) -> _Entry:
    if name in _REGISTRY:
        return _REGISTRY[name]
    if name.endswith(".py"):
        raise RequestError(f"method {name!r} names no function; expected {name}:function")
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RequestError(
        f"unknown method {name!r}; {hint}there are {', '.join(names())}, and functions of yours as"
        " path/to/file.py:function or package.module:function"
    )


register(
    "flash",
    module="effattn.methods.flash",
    cls="Flash",
    summary="FlashAttention forward, the Triton kernel of this package; returns the log-sum-exp",
)
register(
    "torch",
    module="effattn.methods.torch_sdpa",
    cls="TorchSDPA",
    summary="torch.nn.functional.scaled_dot_product_attention",
)
register(
    "exact",
    module="effattn.methods.exact",
    cls="ExactRounded",
    summary="the float64 reference rounded once to the dtype: a control that nothing can beat",
)
