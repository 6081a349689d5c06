"""Loop nests: the place where virtual values become C expressions.

A nest has outer loops and one or more innermost loops. Every intermediate result becomes a named constant in
the outermost loop that its indices allow, so row values are computed once a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from effattn.cpu import elementwise
from effattn.cpu.formats import Unsupported, dense_literals, memory_size, splat_literal, value_type
from effattn.cpu.ir import Op, Value
from effattn.cpu.plan import Buffer

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter


@dataclass(frozen=True)
class Expr:
    """A C expression and the depth of the loop that it varies in (0: none)."""

    text: str
    level: int = 0


ZERO = Expr("0")
Index = tuple[Expr, ...]


@dataclass
class Scope:
    lines: list[str] = field(default_factory=list)
    memo: dict[tuple[Value, Index], Expr] = field(default_factory=dict)


def linear(index: Index, strides: dict[int, int]) -> Expr:
    """Offset of an index in a buffer."""
    terms, level = [], 0
    for axis, step in strides.items():
        part = index[axis]
        level = max(level, part.level)
        if part.text != "0":
            terms.append(part.text if step == 1 else f"{part.text} * {step}")
    return Expr(" + ".join(terms) or "0", level)


class Nest:
    """Loops over some axes of a shape. `index` maps every axis to its loop variable (or 0)."""

    def __init__(self, emitter: FunctionEmitter, shape: tuple[int, ...], outer: Iterable[int]) -> None:
        self.emitter = emitter
        self.shape = shape
        self.outer = [axis for axis in outer if shape[axis] > 1]
        self.scopes = [Scope() for _ in range(len(self.outer) + 1)]
        self.depth = len(self.outer)
        self.index: list[Expr] = [ZERO] * len(shape)
        for level, axis in enumerate(self.outer, 1):
            self.index[axis] = Expr(f"i{axis}", level)
        self.used: set[str] = set()

    # -- evaluating

    def name(self, hint: str) -> str:
        base = self.emitter.local(hint)
        name, k = base, 1
        # A constant in a loop must not hide a scalar or an array that an expression in the loop names.
        while name in self.used or name in self.emitter.taken:
            k += 1
            name = f"{base}_{k}"
        self.used.add(name)
        return name

    def scope(self, level: int, inner: Scope | None) -> Scope:
        if level <= self.depth:
            return self.scopes[level]
        assert inner is not None, "an innermost value is used outside its loop"
        return inner

    def define(self, c_type: str, hint: str, text: str, level: int, inner: Scope | None) -> Expr:
        name = self.name(hint)
        self.scope(level, inner).lines.append(f"const {c_type} {name} = {text};")
        return Expr(name, level)

    def eval(self, value: Value, index: Index, inner: Scope | None = None) -> Expr:
        """The element of `value` at `index`."""
        if not value.type.is_tensor:
            return Expr(self.emitter.scalar(value))
        key = (value, index)
        for scope in (*self.scopes, *([inner] if inner is not None else [])):
            if key in scope.memo:
                return scope.memo[key]
        buffer = self.emitter.plan.buffers.get(value)
        if buffer is not None:
            where = linear(index, buffer.strides())
            text = f"{self.emitter.array(buffer)}[{where.text}]"
            found = self.define(c_const(buffer.c_type), value.name, text, where.level, inner)
        else:
            op = value.op
            assert op is not None
            found = self.compute(op, value, index, inner)
        self.scope(found.level, inner).memo[key] = found
        return found

    def compute(self, op: Op, value: Value, index: Index, inner: Scope | None = None) -> Expr:
        """The element that `op` defines, from its operands."""
        name = op.name
        rule = elementwise.RULES.get(name)
        if rule is not None:
            parts = [self.eval(x, index, inner) for x in op.operands]
            level = max(p.level for p in parts)
            if self.emitter.probes is not None:
                self.scope(level, inner).lines += self.emitter.probes.division(op, parts[-1].text)
            text = rule(op, [p.text for p in parts])
            return self.define(value_type(value.type.elem), value.name, text, level, inner)
        view = VIEWS.get(name)
        if view is None:
            raise Unsupported(f"the operation {name}")
        return view(self, op, value, index, inner)

    # -- printing

    def emit(self, body: list[str]) -> None:
        """Print the nest with `body` (finished lines) inside the outer loops."""
        out = self.emitter
        for level, scope in enumerate(self.scopes):
            if level:
                axis = self.outer[level - 1]
                out.open(f"for (long i{axis} = 0; i{axis} < {self.shape[axis]}; i{axis}++)")
            for line in scope.lines:
                out.line(line)
        for line in body:
            out.line(line)
        for _ in self.outer:
            out.close()

    def loop(
        self, axis: int, scope: Scope, statements: list[str], *, independent: bool = True, stop: str = ""
    ) -> list[str]:
        """Lines of an innermost loop over `axis`, whose values are in `scope`."""
        body = [*scope.lines, *statements]
        n = self.shape[axis]
        if n == 1 and not stop:
            return ["{", *body, "}"]
        head = f"for (long i{axis} = 0; i{axis} < {stop or n}; i{axis}++) {{"
        return [("INDEPENDENT " if independent else "") + head, *body, "}"]

    def inner_index(self, axis: int) -> Index:
        index = list(self.index)
        if self.shape[axis] > 1:
            index[axis] = Expr(f"i{axis}", self.depth + 1)
        return tuple(index)


def c_const(c_type: str) -> str:
    return c_type


# ---------------------------------------------------------------------------------------------- views


def _constant(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    text = splat_literal(op.attrs["value"], value.type)
    if text is not None:
        return Expr(text)
    array = nest.emitter.static_array(value, dense_literals(op.attrs["value"], value.type))
    strides, step = {}, 1
    for axis in reversed(range(len(index))):
        strides[axis] = step
        step *= value.type.shape[axis]
    where = linear(index, strides)
    return Expr(f"{array}[{where.text}]", where.level)


def _poison(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    return ZERO


def _splat(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    return Expr(nest.emitter.scalar(op.operands[0]))


def _make_range(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    start = op.int_attr("start")
    at = index[0]
    return Expr(f"(int32_t)({start} + {at.text})" if start else f"(int32_t)({at.text})", at.level)


def _broadcast(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    source = op.operands[0]
    at = tuple(ZERO if n == 1 else i for i, n in zip(index, source.type.shape, strict=True))
    return nest.eval(source, at, inner)


def _expand_dims(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    axis = op.int_attr("axis")
    return nest.eval(op.operands[0], index[:axis] + index[axis + 1 :], inner)


def _trans(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    perm = op.ints_attr("order")
    at: list[Expr] = [ZERO] * len(index)
    for axis, source in enumerate(perm):
        at[source] = index[axis]
    return nest.eval(op.operands[0], tuple(at), inner)


def reshape_index(index: Index, shape: tuple[int, ...], source: tuple[int, ...]) -> Index:
    """The index into `source` of the same row-major element as `index` into `shape`."""
    kept = [i for i, n in zip(index, shape, strict=True) if n > 1]
    if [n for n in shape if n > 1] == [n for n in source if n > 1]:
        rest = iter(kept)
        return tuple(ZERO if n == 1 else next(rest) for n in source)
    strides, step = {}, 1
    for axis in reversed(range(len(shape))):
        strides[axis] = step
        step *= shape[axis]
    flat = linear(index, strides)
    out: list[Expr] = []
    step = 1
    for n in reversed(source):
        text = f"({flat.text}) / {step}" if step > 1 else f"({flat.text})"
        out.append(ZERO if n == 1 else Expr(f"({text} % {n})", flat.level))
        step *= n
    return tuple(reversed(out))


def _reshape(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    source = op.operands[0]
    return nest.eval(source, reshape_index(index, value.type.shape, source.type.shape), inner)


def _join(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    which, rest = index[-1], index[:-1]
    a, b = (nest.eval(x, rest, inner) for x in op.operands)
    if which.text == "0":
        return a
    return nest.define(
        value_type(value.type.elem),
        value.name,
        f"{which.text} ? {b.text} : {a.text}",
        max(which.level, a.level, b.level),
        inner,
    )


def _split(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    return nest.eval(op.operands[0], (*index, Expr(str(value.index))), inner)


def _cat(nest: Nest, op: Op, value: Value, index: Index, inner: Scope | None) -> Expr:
    a, b = op.operands
    n = a.type.shape[0]
    at = index[0]
    first = Expr(f"({at.text} < {n} ? {at.text} : 0)", at.level)
    second = Expr(f"({at.text} < {n} ? 0 : {at.text} - {n})", at.level)
    x, y = nest.eval(a, (first, *index[1:]), inner), nest.eval(b, (second, *index[1:]), inner)
    return nest.define(
        value_type(value.type.elem),
        value.name,
        f"{at.text} < {n} ? {x.text} : {y.text}",
        max(at.level, x.level, y.level),
        inner,
    )


VIEWS = {
    "arith.constant": _constant,
    "ub.poison": _poison,
    "tt.splat": _splat,
    "tt.make_range": _make_range,
    "tt.broadcast": _broadcast,
    "tt.expand_dims": _expand_dims,
    "tt.trans": _trans,
    "tt.reshape": _reshape,
    "tt.join": _join,
    "tt.split": _split,
    "tt.cat": _cat,
}


# ------------------------------------------------------------------------------------------- storing


def compute_into(
    emitter: FunctionEmitter, buffer: Buffer, value: Value, *, fresh: bool, wrap: str = "{}"
) -> None:
    """Fill `buffer` with `value`. `fresh`: by the operation that defines it; else from where it is kept."""
    order = list(buffer.order)
    wide = [axis for axis in order if buffer.type.shape[axis] > 1]
    inner_axis = wide[-1] if wide else order[-1]
    nest = Nest(emitter, buffer.type.shape, [a for a in order if a != inner_axis])
    inner = Scope()
    index = nest.inner_index(inner_axis)
    source = value.op
    computed = fresh or (source is not None and not emitter.plan.kept(value))
    by_row = computed and source is not None and rounds_to_f16(source)
    if by_row:
        # A whole row in one go: the conversion instructions of the machine are not reached through scalar C.
        assert source is not None
        result = nest.eval(source.operands[0], index, inner)
    elif fresh:
        assert source is not None
        result = nest.compute(source, value, index, inner)
    else:
        result = nest.eval(value, index, inner)
    where = linear(index, buffer.strides())
    body = nest.loop(
        inner_axis, inner, [f"{emitter.array(buffer)}[{where.text}] = {wrap.format(result.text)};"]
    )
    if by_row:
        start = linear(tuple(nest.index), buffer.strides()).text
        body.append(f"round_row_f16({emitter.array(buffer)} + {start}, {buffer.type.shape[inner_axis]});")
    emitter.open("")
    nest.emit(body)
    emitter.close()


def rounds_to_f16(op: Op) -> bool:
    return (
        op.name == "arith.truncf" and op.results[0].type.elem == "f16" and op.operands[0].type.elem == "f32"
    )


# ------------------------------------------------------------------------------------- steps of addresses


@dataclass
class Steps:
    """How an integer or pointer tensor grows along one axis, and the 32-bit sums that must not wrap for it."""

    nest: Nest
    checks: list[tuple[Value, Index, int | str]] = field(default_factory=list)

    def of(self, value: Value, axis: int, index: Index) -> int | str | None:
        """The constant difference of neighbours along `axis` (bytes for pointers); None where there is none.

        `index` is the start of the row, kept along so that a sum that could wrap is checked at the right element.
        """
        type_ = value.type
        if not type_.is_tensor or type_.shape[axis] == 1:
            return 0
        op = value.op
        if op is None or self.nest.emitter.plan.kept(value):
            return None
        name = op.name
        if name == "arith.constant":
            return 0 if splat_literal(op.attrs["value"], type_) is not None else None
        if name == "tt.splat":
            return 0
        if name == "tt.make_range":
            return 1
        source = op.operands[0]
        if name == "tt.broadcast":
            at = tuple(ZERO if n == 1 else i for i, n in zip(index, source.type.shape, strict=True))
            return self.of(source, axis, at)
        if name == "tt.expand_dims":
            gone = op.int_attr("axis")
            return (
                0 if axis == gone else self.of(source, axis - (axis > gone), index[:gone] + index[gone + 1 :])
            )
        if name == "tt.trans":
            perm = op.ints_attr("order")
            moved: list[Expr] = [ZERO] * len(index)
            for result_axis, source_axis in enumerate(perm):
                moved[source_axis] = index[result_axis]
            return self.of(source, perm[axis], tuple(moved))
        if name == "tt.reshape":
            if [n for n in type_.shape if n > 1] != [n for n in source.type.shape if n > 1]:
                return None
            place = sum(n > 1 for n in type_.shape[:axis])
            source_axis = [i for i, n in enumerate(source.type.shape) if n > 1][place]
            return self.of(source, source_axis, reshape_index(index, type_.shape, source.type.shape))
        if name not in elementwise.RULES:
            return None
        steps = [self.of(x, axis, index) for x in op.operands]
        if any(s is None for s in steps):
            return None
        if all(s == 0 for s in steps):
            return 0
        return self._combine(op, steps, value, index)

    def _combine(self, op: Op, steps: list[int | str | None], value: Value, index: Index) -> int | str | None:
        a, b = (steps[0], steps[1]) if len(steps) > 1 else (steps[0], 0)
        assert a is not None
        assert b is not None
        result: int | str | None = None
        if op.name == "tt.addptr":
            return _plus(a, _times(b, memory_size(op.results[0].type.pointee)))
        if op.name == "arith.addi":
            result = _plus(a, b)
        elif op.name == "arith.subi":
            result = _plus(a, _times(b, -1))
        elif op.name == "arith.muli":
            if b == 0:
                result = self._scaled(a, op.operands[1])
            elif a == 0:
                result = self._scaled(b, op.operands[0])
        elif op.name == "arith.extsi":
            return a if op.operands[0].type.elem != "i1" else None
        if result is not None and value.type.bits < 64:
            self.checks.append((value, index, result))
        return result

    def _scaled(self, step: int | str, factor: Value) -> int | str | None:
        """`step` times a factor that is the same everywhere."""
        op = factor.op
        while (
            op is not None
            and op.name in ("tt.broadcast", "tt.expand_dims", "arith.extsi")
            and op.operands[0].type.is_tensor
        ):
            factor = op.operands[0]
            op = factor.op
        if op is not None and op.name == "arith.constant":
            text = splat_literal(op.attrs["value"], factor.type)
            if text is not None:
                bare = text.removeprefix("INT64_C(").rstrip(")")
                return _times(step, int(bare)) if bare.lstrip("-").isdigit() else None
        if op is not None and op.name == "tt.splat":
            return _times(step, f"(int64_t){self.nest.emitter.scalar(op.operands[0])}")
        return None


def _times(a: int | str, b: int | str) -> int | str:
    if a == 0 or b == 0:
        return 0
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if a == 1:
        return b
    if b == 1:
        return a
    return f"({a}) * ({b})"


def _plus(a: int | str, b: int | str) -> int | str:
    if a == 0:
        return b
    if b == 0:
        return a
    if isinstance(a, int) and isinstance(b, int):
        return a + b
    return f"({a}) + ({b})"
