"""`@effattn.method(...)`: what a function can say about itself beyond its signature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from effattn.errors import RequestError

if TYPE_CHECKING:
    import torch

    from effattn.case import Case
    from effattn.tolerances.numerics import Numerics

ALIGNMENTS = ("bottom-right", "top-left")
_ATTRIBUTE = "__effattn_method__"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What was declared; None means nothing."""

    name: str | None = None
    numerics: Numerics | str | Callable[[Case], Numerics] | None = None
    causal_alignment: str | None = None
    supports: Callable[[Case], bool | str] | None = None
    same_bits: bool = True
    nan_safe: bool = True
    dropout_mask: Callable[..., torch.Tensor] | None = None


def method(
    *,
    name: str | None = None,
    numerics: Numerics | str | Callable[[Case], Numerics] | None = None,
    causal_alignment: str | None = None,
    supports: Callable[[Case], bool | str] | None = None,
    dropout_mask: Callable[..., torch.Tensor] | None = None,
    same_bits: bool = True,
    nan_safe: bool = True,
) -> Callable[[_F], _F]:
    """Declare how a function is to be judged. It stays the function that it was.

        @effattn.method(causal_alignment="top-left", supports=lambda case: case.head_dim <= 128)
        def attention(q, k, v, *, causal=False, scale=None): ...

    name: what tables call it; its file and function otherwise.
    numerics: the arithmetic that it is held to: a `Numerics`, the name of a preset, or a function from the
        case to a `Numerics`. Otherwise that of flash kernels in the inputs' dtype: everything in float32, the
        weights rounded to the inputs' dtype for the second product.
    causal_alignment: what `causal=True` means where q_len != kv_len: "bottom-right" (the last query sees the
        last key; the default) or "top-left" (query i sees the keys up to i). Not for functions that have a
        keyword `causal_alignment`: they are told.
    supports: takes the `Case`, returns True, or False or a reason why the function does not offer it.
    dropout_mask: for functions with `dropout_p`: fn(batch, heads, q_len, kv_len, p, seed, offset, device) returns the
        weights that dropout keeps, a bool tensor (batch, heads, q_len, kv_len). The reference applies it.

    same_bits: whether equal questions have equal bits, whatever else is in the batch. A function whose sums depend on
        the shape of the whole call, as those of matrix products of a library do, says False: the laws then compare
        within rounding.
    nan_safe: whether NaN and infinity in what a row does not see leave the row alone. A function that multiplies hidden
        values by a weight of 0 says False: the laws then hide finite numbers only.

    Raises `RequestError` for anything else.
    """
    for what, flag in (("same_bits", same_bits), ("nan_safe", nan_safe)):
        if not isinstance(flag, bool):
            raise RequestError(f"@effattn.method: {what} is {flag!r}; expected True or False")
    for what, value, types in (("name", name, str), ("causal_alignment", causal_alignment, str)):
        if value is not None and not (isinstance(value, types) and value):
            raise RequestError(f"@effattn.method: {what} is {value!r}; expected a string")
    if name is not None and not name.isprintable():
        raise RequestError(
            f"@effattn.method: name is {name!r}; it goes into reports and terminals, expected a string without control"
            " characters"
        )
    if causal_alignment is not None and causal_alignment not in ALIGNMENTS:
        raise RequestError(
            f"@effattn.method: causal_alignment is {causal_alignment!r};"
            f" expected {' or '.join(map(repr, ALIGNMENTS))}"
        )
    if supports is not None and not callable(supports):
        raise RequestError(
            f"@effattn.method: supports is {supports!r}; expected a function that takes the case"
        )
    if dropout_mask is not None and not callable(dropout_mask):
        raise RequestError(
            f"@effattn.method: dropout_mask is {dropout_mask!r}; expected a function"
            " fn(batch, heads, q_len, kv_len, p, seed, offset, device)"
        )
    if numerics is not None and not callable(numerics):
        from effattn.tolerances.numerics import PRESETS, Numerics, for_dtype

        if isinstance(numerics, str):
            for_dtype("fp16", numerics)  # raises for a name that is unknown
        elif not isinstance(numerics, Numerics):
            raise RequestError(
                f"@effattn.method: numerics is {numerics!r}; expected a Numerics, a function that takes the"
                f" case, or one of {', '.join(map(repr, PRESETS))}"
            )
    declared = Declaration(
        name=name,
        numerics=numerics,
        causal_alignment=causal_alignment,
        supports=supports,
        dropout_mask=dropout_mask,
        same_bits=same_bits,
        nan_safe=nan_safe,
    )

    def declare(function: _F) -> _F:
        try:
            setattr(function, _ATTRIBUTE, declared)
        except AttributeError:
            raise RequestError(
                f"@effattn.method cannot mark {function!r}; wrap it in a function of your own and mark that"
            ) from None
        return function

    return declare


def declaration(function: Any) -> Declaration:
    """What a function declared; an empty declaration if nothing."""
    found = getattr(function, _ATTRIBUTE, None)
    return found if isinstance(found, Declaration) else Declaration()
