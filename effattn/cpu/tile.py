"""Operations on whole tiles: products, reductions, scans."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from effattn.cpu import elementwise, products, regions
from effattn.cpu.formats import splat_literal, value_type
from effattn.cpu.ir import Op, Value, walk
from effattn.cpu.nest import Expr, Nest, Scope, compute_into, linear
from effattn.cpu.plan import IEEE, TF32, operand_in_place

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter


def dot(emitter: FunctionEmitter, op: Op) -> None:
    a, b, c = op.operands
    result = op.results[0]
    *batch, m, n = result.type.shape
    k = a.type.shape[-1]
    kernel, more, declaration = products.kernel(op, emitter.plan.model)
    if declaration and declaration not in emitter.statics:
        emitter.statics.append(declaration)
    out = emitter.plan.buffers[result]
    zero = _is_zero(c)
    if not zero and emitter.plan.buffers.get(c) is not out:
        compute_into(emitter, out, c, fresh=False)
    wrap = products.rounding(op, emitter.plan.model) or "{}"
    names = []
    for index, factor in enumerate((a, b)):
        buffer = emitter.plan.packs.get((op, index))
        if buffer is None:
            buffer = operand_in_place(factor, emitter.plan)
            assert buffer is not None
        else:
            compute_into(emitter, buffer, factor, fresh=False, wrap=wrap)
        names.append(emitter.array(buffer))
    count = math.prod(batch)
    target = emitter.array(out)
    if count == 1:
        emitter.line(f"{kernel}({names[0]}, {names[1]}, {target}, {m}, {n}, {k}, {int(zero)}{more});")
    else:
        emitter.line(
            f"for (long b = 0; b < {count}; b++) {kernel}({names[0]} + b * {m * k}, {names[1]} + b * {k * n}, "
            f"{target} + b * {m * n}, {m}, {n}, {k}, {int(zero)}{more});"
        )
    if result.type.elem in ("f16", "bf16"):
        total = count * m * n
        emitter.line(
            f"INDEPENDENT for (long i = 0; i < {total}; i++) {target}[i] = round_{result.type.elem}({target}[i]);"
        )


def notes(function: Op) -> list[str]:
    """What a kernel's author may not expect of its products; shown where its output is judged wrong."""
    lines = [
        f"{op.loc}: tl.dot multiplies fp32 in tf32, which keeps 11 significant bits. That is Triton's default on "
        'NVIDIA GPUs too, where input_precision is not given; pass input_precision="ieee" for fp32'
        for op in walk(function)
        if op.name == "tt.dot"
        and op.operands[0].type.elem == "f32"
        and op.int_attr("inputPrecision", IEEE) == TF32
    ]
    return list(dict.fromkeys(lines))


def _is_zero(value: Value) -> bool:
    op = value.op
    if op is None or op.name != "arith.constant":
        return False
    text = splat_literal(op.attrs["value"], value.type)
    return text is not None and text.rstrip("f") in ("0", "0x0.0p+0")


# ---------------------------------------------------------------------------------------- reductions

#: combine operation -> helper that reduces a contiguous row, for the carriers that have one
_ROWS = {
    "arith.addf": "reduce_add",
    "arith.maxnumf": "reduce_maxnum",
    "arith.minnumf": "reduce_minnum",
    "arith.maximumf": "reduce_maximum",
    "arith.minimumf": "reduce_minimum",
}
_HELPERS = {
    "reduce_add_float": "effattn_reduce_add_float",
    "reduce_add_double": "reduce_add_double",
    "reduce_maxnum_float": "effattn_reduce_maxnum_float",
    "reduce_maxnum_double": "reduce_maxnum_double",
    "reduce_minnum_float": "effattn_reduce_minnum_float",
    "reduce_maximum_float": "reduce_maximum_float",
    "reduce_minimum_float": "reduce_minimum_float",
}


def _single_combine(op: Op) -> str | None:
    """The name of the one operation that the region applies to its two arguments, in order."""
    body = op.body
    if len(op.regions[0].blocks) != 1 or len(body.ops) != 2 or len(op.operands) != 1:
        return None
    combine, end = body.ops
    if combine.operands != body.args or end.operands != combine.results:
        return None
    return combine.name


def reduce(emitter: FunctionEmitter, op: Op) -> None:
    axis = op.int_attr("axis")
    source = op.operands[0]
    elem = source.type.elem
    name = _single_combine(op)
    row = f"{_ROWS[name]}_{value_type(elem)}" if name in _ROWS else ""
    # The order of a sum is part of its meaning: it may depend on the operation's type, never on how the plan keeps it.
    along_rows = all(n == 1 for n in source.type.shape[axis + 1 :])
    if row in _HELPERS and elem in ("f32", "f64") and along_rows:
        _reduce_rows(emitter, op, axis, _HELPERS[row])
    else:
        _reduce_general(emitter, op, axis)


def _reduce_rows(emitter: FunctionEmitter, op: Op, axis: int, helper: str) -> None:
    """Each row in one go: computed into a small array unless it is in memory already."""
    source, result = op.operands[0], op.results[0]
    shape, n = source.type.shape, source.type.shape[axis]
    outer = [a for a in range(len(shape)) if a != axis]
    nest = Nest(emitter, shape, outer)
    kept = emitter.plan.buffers.get(source)
    if kept is not None and (n == 1 or kept.strides()[axis] == 1):
        where = linear(tuple(nest.index), kept.strides())
        body = []
        row = f"{emitter.array(kept)} + {where.text}"
    else:
        inner = Scope()
        index = nest.inner_index(axis)
        value = nest.eval(source, index, inner)
        row = nest.name("row")
        body = [
            f"{value_type(source.type.elem)} {row}[{n}] __attribute__((aligned(64)));",
            *nest.loop(axis, inner, [f"{row}[{index[axis].text}] = {value.text};"]),
        ]
    call = f"{helper}({row}, {n})"
    if result.type.is_tensor:
        buffer = emitter.plan.buffers[result]
        where = linear(tuple(e for a, e in enumerate(nest.index) if a != axis), buffer.strides())
        emitter.open("")
        long = [a for a in outer if shape[a] > 1]
        if not body and len(long) == 1 and helper.startswith("effattn_") and kept is not None:
            # All rows by one call.
            a = long[0]
            steps = f"{shape[a]}, {kept.strides()[a]}, {buffer.strides()[a - (a > axis)]}"
            emitter.line(f"{helper}_rows({emitter.array(buffer)}, {emitter.array(kept)}, {n}, {steps});")
            emitter.close()
            return
        nest.emit([*body, f"{emitter.array(buffer)}[{where.text}] = {call};"])
        emitter.close()
    else:
        name = emitter.declare(result)
        emitter.open("")
        nest.emit([*body, f"{name} = {call};"])
        emitter.close()


def _reduce_general(emitter: FunctionEmitter, op: Op, axis: int) -> None:
    """Any combine region, any number of operands: sequential along the axis, element by element."""
    shape, n = op.operands[0].type.shape, op.operands[0].type.shape[axis]
    rest = [a for a in range(len(shape)) if a != axis]
    tensor = op.results[0].type.is_tensor
    targets: list[str] = []
    if not tensor:
        targets = [emitter.declare(r) for r in op.results]
    emitter.open("")
    # The axis is the outermost loop, so that the accumulators of a tile are updated along rows.
    wide = [a for a in rest if shape[a] > 1]
    inner_axis = wide[-1] if wide else axis
    if inner_axis == axis:
        nest = Nest(emitter, shape, rest)
    else:
        nest = Nest(emitter, shape, [axis, *(a for a in rest if a != inner_axis)])
    inner = Scope()
    index = nest.inner_index(inner_axis)
    current = [nest.eval(x, index, inner) for x in op.operands]
    if tensor:
        buffers = [emitter.plan.buffers[r] for r in op.results]
        where = [
            linear(tuple(e for a, e in enumerate(index) if a != axis), b.strides()).text for b in buffers
        ]
        targets = [f"{emitter.array(b)}[{w}]" for b, w in zip(buffers, where, strict=True)]
    at = index[axis].text
    combine = combine_lines(emitter, nest, op, targets, [c.text for c in current])
    first = [f"{t} = {c.text};" for t, c in zip(targets, current, strict=True)]
    statements = first if n == 1 else [f"if ({at} == 0) {{", *first, "} else {", *combine, "}"]
    nest.emit(nest.loop(inner_axis, inner, statements, independent=inner_axis != axis))
    emitter.close()


def combine_lines(
    emitter: FunctionEmitter, nest: Nest, op: Op, left: list[str], right: list[str]
) -> list[str]:
    """Statements that apply the combine region to (left, right) and assign the result to `left`."""
    if not regions.is_chain(op):
        return [regions.call(emitter, op, [*left, *right], left)]
    body = op.body
    half = len(body.args) // 2
    names: dict[Value, str] = {}
    lines: list[str] = []
    for arg, text in zip(body.args, [*left, *right], strict=True):
        name = nest.name(arg.name)
        lines.append(f"const {value_type(arg.type.elem)} {name} = {text};")
        names[arg] = name
    for inner in body.ops[:-1]:
        if inner.name == "arith.constant":
            names[inner.results[0]] = splat_literal(inner.attrs["value"], inner.results[0].type) or "0"
            continue
        rule = elementwise.RULES[inner.name]
        args = [names[x] if x in names else emitter.scalar(x) for x in inner.operands]
        if emitter.probes is not None:
            lines += emitter.probes.division(inner, args[-1])
        name = nest.name(inner.results[0].name)
        lines.append(f"const {value_type(inner.results[0].type.elem)} {name} = {rule(inner, args)};")
        names[inner.results[0]] = name
    assert half == len(left)
    end = body.ops[-1]
    lines += [
        f"{t} = {names[v] if v in names else emitter.scalar(v)};"
        for t, v in zip(left, end.operands, strict=True)
    ]
    return lines


def scan(emitter: FunctionEmitter, op: Op) -> None:
    """Inclusive scan along an axis, any combine region."""
    axis = op.int_attr("axis")
    backward = op.int_attr("reverse", 0)
    shape, n = op.operands[0].type.shape, op.operands[0].type.shape[axis]
    nest = Nest(emitter, shape, [a for a in range(len(shape)) if a != axis])
    inner = Scope()
    step = f"i{axis}" if n > 1 else "0"
    at = Expr(f"({n - 1} - {step})" if backward else step, nest.depth + 1 if n > 1 else 0)
    index = tuple(at if a == axis else e for a, e in enumerate(nest.index))
    current = [nest.eval(x, index, inner) for x in op.operands]
    carries = [nest.name("carry") for _ in op.operands]
    buffers = [emitter.plan.buffers[r] for r in op.results]
    combine = combine_lines(emitter, nest, op, carries, [c.text for c in current])
    first = [f"{t} = {c.text};" for t, c in zip(carries, current, strict=True)]
    statements = [f"if ({step} == 0) {{", *first, "} else {", *combine, "}"] if n > 1 else first
    statements += [
        f"{emitter.array(b)}[{linear(index, b.strides()).text}] = {c};"
        for b, c in zip(buffers, carries, strict=True)
    ]
    declare = [f"{b.c_type} {c} = 0;" for b, c in zip(buffers, carries, strict=True)]
    emitter.open("")
    nest.emit([*declare, *nest.loop(axis, inner, statements, independent=False)])
    emitter.close()
