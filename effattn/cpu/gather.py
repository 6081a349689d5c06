"""Operations whose elements come from places that the data names: gather, histogram."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.cpu.atomics import rows
from effattn.cpu.ir import Op
from effattn.cpu.nest import Expr, Scope, linear

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter


def gather(emitter: FunctionEmitter, op: Op) -> None:
    """tt.gather(source, indices) along an axis. An index outside of the source is undefined; here it wraps around."""
    source, indices = op.operands
    axis = op.int_attr("axis")
    result = op.results[0]
    buffer = emitter.plan.buffers[result]
    nest, inner_axis, index = rows(emitter, result.type)
    inner = Scope()
    at = nest.eval(indices, index, inner)
    assert source.type.shape is not None
    place = Expr(f"({at.text} & {source.type.shape[axis] - 1})", at.level)  # shapes are powers of two
    value = nest.eval(source, (*index[:axis], place, *index[axis + 1 :]), inner)
    target = f"{emitter.array(buffer)}[{linear(index, buffer.strides()).text}]"
    emitter.open("")
    nest.emit(nest.loop(inner_axis, inner, [f"{target} = {value.text};"]))
    emitter.close()


def histogram(emitter: FunctionEmitter, op: Op) -> None:
    """tt.histogram(values[, mask]): how many values equal each bin's number; values outside of the bins are not counted."""
    values, *mask = op.operands
    result = op.results[0]
    bins = emitter.array(emitter.plan.buffers[result])
    n = result.type.numel
    nest, axis, index = rows(emitter, values.type)
    inner = Scope()
    value = nest.eval(values, index, inner).text
    inside = f"(uint64_t)(int64_t){value} < {n}"
    if mask:
        inside = f"{nest.eval(mask[0], index, inner).text} && {inside}"
    emitter.line(f"for (long i = 0; i < {n}; i++) {bins}[i] = 0;")
    emitter.open("")
    nest.emit(nest.loop(axis, inner, [f"if ({inside}) {bins}[{value}]++;"], independent=False))
    emitter.close()
