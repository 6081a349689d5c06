"""The register of the zoo."""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.methods.base import Method
    from effattn.tolerances.numerics import Numerics

ALL = ("fp16", "bf16", "fp32")
HALF = ("fp16", "bf16")

#: q, k, v and the keywords causal ("none", "bottom-right", "top-left") and scale -> (out, lse)
Kernel = Callable[..., Any]
_K = TypeVar("_K")


@dataclass(frozen=True, kw_only=True)
class Specimen:
    """A kernel of the zoo."""

    name: str
    right: bool
    #: what it does differently, from its docstring
    what: str
    kernel: Kernel
    #: where a wrong one differs enough to be found
    dtypes: tuple[str, ...]
    #: cases made to show it; it need not be found in each of them
    shows: Callable[[Case], bool]
    #: what it is judged by; None for the numerics of kernels that declare nothing
    numerics: Callable[[Case], Numerics] | None = None

    @property
    def offers_options(self) -> bool:
        """Whether it knows every option, and gradients."""
        return hasattr(self.kernel, "attention")

    @property
    def function(self) -> Callable[..., Any]:
        """The kernel with the signature of a user's function."""
        attention = _with_options(self.kernel) if self.offers_options else _plain(self.kernel)
        if self.numerics is not None:
            attention = _declare(self.numerics, self._supports, self.offers_options)(attention)
        attention.__name__ = attention.__qualname__ = self.name.replace("-", "_")
        attention.__module__ = "effattn.zoo"
        attention.__doc__ = self.what
        return attention

    def _supports(self, case: Case) -> bool | str:
        return case.dtype in self.dtypes or f"the kernel is for {', '.join(self.dtypes)}"

    def method(self) -> Method:
        """The kernel as a method, judged by its numerics."""
        from effattn.methods.user import UserFunction

        return UserFunction(self.function, spec=f"effattn.zoo:{self.name.replace('-', '_')}")


def _declare(numerics: Any, supports: Any, offers_options: bool) -> Callable[..., Any]:
    from effattn.methods.declare import method
    from effattn.zoo.matrices import dropout_mask

    drops = dropout_mask if offers_options else None
    return method(numerics=numerics, supports=supports, same_bits=False, dropout_mask=drops)


def _with_options(kernel: Any) -> Callable[..., Any]:
    from effattn.methods.declare import method
    from effattn.zoo.matrices import dropout_mask

    @method(dropout_mask=dropout_mask)
    @functools.wraps(kernel.attention)
    def attention(*args: Any, **keywords: Any) -> Any:
        return kernel.attention(*args, **keywords)

    return attention


def _plain(kernel: Kernel) -> Callable[..., Any]:
    def attention(
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool = False,
        scale: float | None = None,
        causal_alignment: str = "bottom-right",
    ) -> Any:
        return kernel(q, k, v, causal=causal_alignment if causal else "none", scale=scale)

    return attention


_REGISTER: dict[str, Specimen] = {}


def right(name: str) -> Callable[[_K], _K]:
    """Register a correct kernel: an instance, or a function."""
    return lambda kernel: _register(kernel, name, True, ALL, lambda case: True)


def wrong(
    name: str, dtypes: tuple[str, ...] = ALL, shows: Callable[[Case], bool] = lambda case: True
) -> Callable[[_K], _K]:
    """Register a wrong kernel, the dtypes where it has to be found, and the cases that show it."""
    return lambda kernel: _register(kernel, name, False, dtypes, shows)


def quantised(
    name: str,
    numerics: Callable[[Case], Numerics],
    *,
    is_right: bool,
    shows: Callable[[Case], bool] = lambda case: True,
) -> Callable[[_K], _K]:
    """Register a kernel whose operands are quantised, and what it is judged by."""
    return lambda kernel: _register(kernel, name, is_right, HALF, shows, numerics, _QUANTISED)


_QUANTISED: dict[str, Specimen] = {}


def _register(
    kernel: Any,
    name: str,
    is_right: bool,
    dtypes: tuple[str, ...],
    shows: Callable[[Case], bool],
    numerics: Callable[[Case], Numerics] | None = None,
    register: dict[str, Specimen] = _REGISTER,
) -> Any:
    assert name not in _REGISTER | _QUANTISED, f"two kernels named {name}"
    # A class is a kernel of its default block size; a function is one as it is.
    call: Kernel = kernel() if isinstance(kernel, type) else kernel
    what = " ".join((kernel.__doc__ or "").split())
    register[name] = Specimen(
        name=name, right=is_right, what=what, kernel=call, dtypes=dtypes, shows=shows, numerics=numerics
    )
    return kernel


def specimens(*, right: bool | None = None, quantised: bool = False) -> tuple[Specimen, ...]:
    """All kernels of the zoo, or the right or the wrong ones only; or those whose operands are quantised."""
    _load()
    register = _QUANTISED if quantised else _REGISTER
    return tuple(s for s in register.values() if right is None or s.right == right)


def get(name: str) -> Specimen:
    """The kernel of that name; RequestError with close matches if there is none."""
    _load()
    known = _REGISTER | _QUANTISED
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise RequestError(f"the zoo has no kernel {name!r}.{hint}")


def _load() -> None:
    # Not `from effattn.zoo import ...`: that asks the package's own __getattr__, which ends up here.
    for name in (
        "right_kernels",
        "wrong_kernels",
        "subtle_kernels",
        "right_gradients",
        "wrong_gradients",
        "subtle_gradients",
        "right_quantised",
        "wrong_quantised",
    ):
        importlib.import_module(f"effattn.zoo.{name}")
