"""Atomic operations on memory: read-modify-write, compare-and-swap, load and store.

Each is one indivisible step of the host's memory, in sequentially consistent order, so updates from several programs
are never lost. Within one operation the elements of a tile are taken in the order of their indices. A masked-off
element is not touched and gives 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from effattn.cpu.formats import Unsupported, memory_type, value_type
from effattn.cpu.ir import Op, Type, Value
from effattn.cpu.nest import Index, Nest, Scope, linear

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter

#: tt.RMWOp
_RMW = {
    1: "and",
    2: "or",
    3: "xor",
    4: "add",
    5: "fadd",
    6: "max",
    7: "min",
    8: "umax",
    9: "umin",
    10: "xchg",
}


def _function(name: str, type_: Type) -> tuple[str, str]:
    """The helper for an element type, and the type of the address that it takes."""
    if type_.is_int and name != "fadd":
        c_type = memory_type(type_.elem)
        return f"atomic_{name}_{c_type}", f"{c_type} *"
    if type_.elem in ("f16", "bf16", "f32", "f64") and name in ("fadd", "xchg", "cas", "load"):
        return f"atomic_{name}_{type_.elem}", "void *"
    raise Unsupported(f"an atomic {name} of {type_.elem}")


def _name(op: Op) -> str:
    named = {"tt.atomic_cas": "cas", "tt.atomic_load": "load", "tt.atomic_store": "xchg"}.get(op.name)
    return named or _RMW[op.int_attr("atomic_rmw_op")]


def check(op: Op) -> None:
    """Raise Unsupported for an element type that has no such operation."""
    _function(_name(op), _element(op))


def _element(op: Op) -> Type:
    """The type of what an operation moves: a store gives nothing."""
    return op.results[0].type if op.results else op.operands[1].type


def rmw(emitter: FunctionEmitter, op: Op) -> None:
    """tt.atomic_rmw(pointer, value[, mask])"""
    name, cast = _function(_name(op), _element(op))
    mask = op.operands[2] if len(op.operands) > 2 else None
    each_element(emitter, op, op.operands[:2], mask, lambda p, v: f"{name}(({cast}){p}, {v})", probe=True)


def cas(emitter: FunctionEmitter, op: Op) -> None:
    """tt.atomic_cas(pointer, compared, value)"""
    name, cast = _function("cas", op.results[0].type)
    each_element(emitter, op, op.operands, None, lambda p, c, v: f"{name}(({cast}){p}, {c}, {v})", probe=True)


def load(emitter: FunctionEmitter, op: Op) -> None:
    """tt.atomic_load(pointer[, mask])"""
    name, cast = _function(_name(op), _element(op))
    mask = op.operands[1] if len(op.operands) > 1 else None
    each_element(emitter, op, op.operands[:1], mask, lambda p: f"{name}(({cast}){p})", probe=True)


#: tt.atomic_store(pointer, value[, mask]): an exchange whose old value nobody asked for
store = rmw


def each_element(
    emitter: FunctionEmitter,
    op: Op,
    values: list[Value],
    mask: Value | None,
    write: Callable[..., str],
    *,
    probe: bool = False,
) -> None:
    """Run a statement with side effects for each element, in order, and keep what it gives, if it has a result.

    `probe`: the first of the values is an address, which an instrumented kernel looks at before.
    """
    result = op.results[0] if op.results else None
    probes = emitter.probes if probe else None
    if not op.operands[0].type.is_tensor:
        call = write(*(emitter.scalar(v) for v in values))
        if probes is not None:
            look = probes.element(op, emitter.scalar(values[0]))
            emitter.line(f"if ({emitter.scalar(mask)}) {look}" if mask is not None else look)
        if mask is not None:
            call = f"{emitter.scalar(mask)} ? {call} : 0"
        if result is None:
            emitter.line(f"(void)({call});")
        else:
            emitter.define(result, call)
        return
    nest, axis, index = rows(emitter, op.operands[0].type)
    inner = Scope()
    parts = [nest.eval(v, index, inner).text for v in values]
    call = write(*parts)
    before: list[str] = []
    if probes is not None:
        scope = Scope(memo=dict(inner.memo))
        before = probes.tensor_overflow(nest, values[0], index, scope)
        before = [*scope.lines, *before, probes.element(op, parts[0])]
    if mask is not None:
        bit = nest.eval(mask, index, inner).text
        call = f"{bit} ? {call} : 0"
        before = [f"if ({bit}) {{", *before, "}"] if before else []
    statement = f"(void)({call});"
    if result is not None:
        buffer = emitter.plan.buffers[result]
        target = f"{emitter.array(buffer)}[{linear(index, buffer.strides()).text}]"
        statement = f"{target} = ({value_type(result.type.elem)})({call});"
    emitter.open("")
    nest.emit(nest.loop(axis, inner, [*before, statement], independent=False))
    emitter.close()


def rows(emitter: FunctionEmitter, type_: Type) -> tuple[Nest, int, Index]:
    """Loops over a tile in the order of its indices: the nest, its innermost axis, the index in it."""
    assert type_.shape is not None
    wide = [axis for axis, n in enumerate(type_.shape) if n > 1]
    axis = wide[-1] if wide else len(type_.shape) - 1
    nest = Nest(emitter, type_.shape, [a for a in range(len(type_.shape)) if a != axis])
    return nest, axis, nest.inner_index(axis)
