"""What this backend runs, checked before anything is generated, so that a refusal names the operation's own line."""

from __future__ import annotations

from collections.abc import Callable, Container

from effattn.cpu import calls, decompose, elementwise, extras, regions
from effattn.cpu.formats import Unsupported, c_type_of_dot, splat_literal, value_type
from effattn.cpu.ir import Op, walk
from effattn.cpu.plan import IEEE, TF32
from effattn.errors import RequestError

_PRECISIONS = (TF32, IEEE, decompose.TF32X3, decompose.BF16X3, decompose.BF16X6)


class UnsupportedKernel(RequestError):
    """A kernel uses an operation or a type that the CPU backend does not offer."""


def refusal(function: Op, op: Op, error: Unsupported) -> UnsupportedKernel:
    """The error that a user sees: kernel, source line, what."""
    return UnsupportedKernel(
        f"kernel {kernel_name(function)}, {op.loc}: {error} is not supported by the CPU backend"
    )


def check(function: Op, handled: Container[str]) -> None:
    """Raise UnsupportedKernel for the first operation of a function that cannot be run.

    `handled`: names of the operations that are neither elementwise nor views.
    """
    for op in walk(function):
        try:
            _check(op, handled)
        except Unsupported as error:
            raise refusal(function, op, error) from error


def kernel_name(function: Op) -> str:
    return function.attrs["sym_name"].strip('"')


def _check(op: Op, handled: Container[str]) -> None:
    name = op.name
    known = name in elementwise.RULES or name in elementwise.VIEWS or name in handled
    if not known and name not in ("tt.func", "arith.constant", "tt.dot_scaled"):
        raise Unsupported(f"the operation {name}")
    for value in (*op.operands, *op.results, *(a for r in op.regions for b in r.blocks for a in b.args)):
        value_type(value.type.elem)
    if name in elementwise.RULES:
        elementwise.RULES[name](op, ["0"] * len(op.operands))
    special = _CHECKS.get(name) or extras.CHECKS.get(name)
    if special is not None:
        special(op)


def _function(op: Op) -> None:
    blocks = op.regions[0].blocks
    labels = {block.label: i for i, block in enumerate(blocks)}
    for i, block in enumerate(blocks):
        # Lifetimes follow the order of the text.
        if any(labels[target] <= i for target in block.terminator.successors):
            raise Unsupported("a loop made of branches")


def _constant(op: Op) -> None:
    splat_literal(op.attrs["value"], op.results[0].type)


def _dot(op: Op) -> None:
    a, b, _ = op.operands
    if a.type.elem == "f32" and op.int_attr("inputPrecision", IEEE) not in _PRECISIONS:
        raise Unsupported(f"tt.dot with the precision {op.attrs['inputPrecision']}")
    c_type_of_dot(a.type.elem, b.type.elem, op.results[0].type.elem)


def _dot_scaled(op: Op) -> None:
    for name in ("a_elem_type", "b_elem_type"):
        if op.int_attr(name) not in decompose.ELEMENTS:
            raise Unsupported(f"tt.dot_scaled with elements of the kind {op.int_attr(name)}")


def _map(op: Op) -> None:
    regions.check(op)
    _function(op)


def _return(op: Op) -> None:
    if op.operands:
        raise Unsupported("a function that returns values")


_CHECKS: dict[str, Callable[[Op], None]] = {
    "tt.func": _function,
    "arith.constant": _constant,
    "tt.dot": _dot,
    "tt.dot_scaled": _dot_scaled,
    "tt.reduce": regions.check,
    "tt.scan": regions.check,
    "tt.map_elementwise": _map,
    calls.INLINED: _function,
    "tt.return": _return,
}
