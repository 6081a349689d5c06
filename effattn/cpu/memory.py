"""Loads and stores.

A tile access runs row by row along the axis on which addresses are contiguous. For each row: the address of its
first element is computed exactly, with the IR's wrap-around; if no 32-bit sum wraps within the row and its mask is
all true (or true up to some point), a plain loop that the C compiler vectorises does the work, or a function of the
runtime library; if not, each element's address is computed by itself. Masked-off elements are never touched.

Most of the time that a kernel's compilation takes is spent on these rows, so as little as possible of them is written
into each kernel: what a row is loaded by is compiled once, into the runtime library, and a row that is stored in part
is computed in one place and written from there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effattn.cpu.formats import load_expr, memory_size, memory_type, size_of, store_expr, value_type
from effattn.cpu.ir import Op, Value
from effattn.cpu.nest import Expr, Index, Nest, Scope, Steps, linear
from effattn.cpu.plan import Buffer

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter


def load(emitter: FunctionEmitter, op: Op) -> None:
    pointer, mask, other = _parts(op)
    result = op.results[0]
    elem = result.type.elem
    c_type, stored = value_type(elem), memory_type(elem)
    undefined = emitter.probes.fill(elem) if emitter.probes is not None else "0"
    if not result.type.is_tensor:
        read = load_expr(elem, f"*(const {stored} *){emitter.scalar(pointer)}")
        if mask is not None:
            fallback = emitter.scalar(other) if other is not None else undefined
            read = f"{emitter.scalar(mask)} ? {read} : {fallback}"
        _probe_scalar(emitter, op, mask)
        emitter.define(result, read)
        return
    buffer = emitter.plan.buffers[result]
    array, strides = emitter.array(buffer), buffer.strides()
    access = _Access(emitter, op, pointer, mask, buffer.order)
    strip = access.strip(buffer)
    place, start = linear(access.index, strides).text, linear(tuple(access.nest.index), strides).text
    if strip is not None:
        array, strides = strip.name, strip.strides
        place, start = strip.place(access.index), strip.place(tuple(access.nest.index))
    fallback_scope = Scope()
    fallback = access.nest.eval(other, access.index, fallback_scope).text if other is not None else undefined

    def fill(stop: str = "", start: str = "") -> list[str]:
        lines = access.nest.loop(access.axis, fallback_scope, [f"{array}[{place}] = {fallback};"], stop=stop)
        if start:
            lines[0] = lines[0].replace(f"long i{access.axis} = 0", f"long i{access.axis} = {start}")
        return lines

    fast = load_expr(elem, f"*(const {stored} *)({access.fast})")
    slow = load_expr(elem, f"*(const {stored} *)({access.slow})")
    row = ""
    if elem in _LOADED_ROWS and access.step == memory_size(elem) and strides[access.axis] == 1:
        row = f"effattn_load_row_{elem}({array} + {start}, (const {stored} *){access.base}, {{}}, {{}});"
    emitter.open("")
    if strip is not None:
        emitter.line(strip.declaration)
        access.after = strip.turn
    access.emit(
        row=row,
        fast=[f"{array}[{place}] = {fast};"],
        slow=[f"{array}[{place}] = {slow};"],
        skipped=[f"{array}[{place}] = {fallback};"],
        skipped_scope=fallback_scope,
        fill=fill,
        other=fallback if not fallback_scope.lines else "",
    )
    emitter.close()
    assert c_type == buffer.c_type


def store(emitter: FunctionEmitter, op: Op) -> None:
    pointer, value = op.operands[0], op.operands[1]
    mask = op.operands[2] if len(op.operands) > 2 else None
    elem = value.type.elem
    stored = memory_type(elem)
    if not value.type.is_tensor:
        write = f"*({stored} *){emitter.scalar(pointer)} = {store_expr(elem, emitter.scalar(value))};"
        _probe_scalar(emitter, op, mask)
        emitter.line(f"if ({emitter.scalar(mask)}) {write}" if mask is not None else write)
        return
    buffer = emitter.plan.buffers.get(value)
    order = buffer.order if buffer else tuple(range(len(value.type.shape)))
    access = _Access(emitter, op, pointer, mask, order)
    fast_scope, slow_scope = Scope(), access.slow_scope
    fast_value = access.nest.eval(value, access.index, fast_scope).text
    # A division by zero that the mask hides is not to be told.
    told = any("effattn_fault" in line for line in fast_scope.lines)
    if access.masked_by_element and access.nest.shape[access.axis] <= _STAGED and not told:
        _store_staged(access, [*fast_scope.lines], store_expr(elem, fast_value), stored)
        return
    slow_value = access.nest.eval(value, access.index, slow_scope).text
    emitter.open("")
    access.emit(
        row="",
        fast=[*fast_scope.lines, f"*({stored} *)({access.fast}) = {store_expr(elem, fast_value)};"],
        slow=[f"*({stored} *)({access.slow}) = {store_expr(elem, slow_value)};"],
        skipped=[],
        skipped_scope=Scope(),
        fill=None,
    )
    emitter.close()


def _store_staged(access: _Access, lines: list[str], value: str, stored: str) -> None:
    """Compute a row, masked-off elements included, and write those that are not."""
    nest, axis = access.nest, access.axis
    row, i = nest.name("row"), f"i{axis}"
    n = nest.shape[axis]
    copy = nest.loop(axis, Scope(), [f"*({stored} *)({access.fast}) = {row}[{i}];"], stop="count")
    if access.step == size_of(stored):
        copy = [f"__builtin_memcpy(({stored} *){access.base}, {row}, count * sizeof *{row});"]
    access.emitter.open("")
    access.emit(
        before=[f"{stored} {row}[{n}];", *nest.loop(axis, Scope(lines), [f"{row}[{i}] = {value};"])],
        row="",
        fast=[],
        some=copy,
        slow=[f"*({stored} *)({access.slow}) = {row}[{i}];"],
        skipped=[],
        skipped_scope=Scope(),
        fill=None,
    )
    access.emitter.close()


def _probe_scalar(emitter: FunctionEmitter, op: Op, mask: Value | None) -> None:
    if emitter.probes is not None:
        call = emitter.probes.element(op, emitter.scalar(op.operands[0]))
        emitter.line(f"if ({emitter.scalar(mask)}) {call}" if mask is not None else call)


def _parts(op: Op) -> tuple[Value, Value | None, Value | None]:
    pointer, mask, other = ([*group, None][0] for group in op.segments())
    assert pointer is not None
    return pointer, mask, other


#: rows that are turned together
_STRIP = 16
#: element types of which the runtime library loads rows
_LOADED_ROWS = ("f16", "bf16", "f32")
#: the most elements of a row that is computed before it is written, on the stack
_STAGED = 1024


@dataclass(frozen=True)
class Strip:
    """Rows in memory order on their way into a tile that is stored transposed."""

    name: str
    declaration: str
    strides: dict[int, int]
    turn: list[str]  #: behind each row: moves the rows into the tile when they are all there
    across: int  #: the axis of the rows

    def place(self, index: Index) -> str:
        """Offset of an element of the tile in the strip."""
        row = index[self.across]
        inside = (
            *index[: self.across],
            Expr(f"({row.text} & {_STRIP - 1})", row.level),
            *index[self.across + 1 :],
        )
        return linear(inside, self.strides).text


class _Access:
    """The rows of one tile access: where each begins, how it goes on, and which of its elements are masked off."""

    def __init__(
        self, emitter: FunctionEmitter, op: Op, pointer: Value, mask: Value | None, order: tuple[int, ...]
    ) -> None:
        self.emitter = emitter
        self.op = op
        self.pointer = pointer
        self.mask = mask
        shape = pointer.type.shape
        size = memory_size(pointer.type.pointee)
        wide = [axis for axis in order if shape[axis] > 1] or [order[-1]]
        self.axis = wide[-1]
        chosen: tuple[Steps, int | str | None] | None = None
        for axis in reversed(wide):
            nest = Nest(emitter, shape, [a for a in order if a != axis])
            steps = Steps(nest)
            step = steps.of(pointer, axis, tuple(nest.index))
            if chosen is None or step == size:
                chosen, self.axis = (steps, step), axis
            if step == size:
                break
        assert chosen is not None
        self.steps, self.step = chosen
        self.nest = self.steps.nest
        self.index = self.nest.inner_index(self.axis)
        #: lines behind those of each row
        self.after: list[str] = []
        self.slow_scope = Scope()
        self.slow = self.nest.eval(pointer, self.index, self.slow_scope).text
        i = f"i{self.axis}"
        self.ok = ""
        self.base = ""
        if self.step is None:
            self.fast = self.slow
        else:
            base = self.nest.eval(pointer, tuple(self.nest.index))
            self.base = base.text
            if self.step == size:
                self.fast = f"(({memory_type(pointer.type.pointee)} *){base.text} + {i})"
            else:
                self.fast = f"{base.text} + {i} * ({self.step})" if self.step != 0 else base.text
            n = shape[self.axis]
            checks = []
            for value, at, by in self.steps.checks:
                start = self.nest.eval(value, at).text
                checks.append(f"fits_i{value.type.bits}((int64_t){start} + (int64_t)({by}) * {n - 1})")
            self.ok = " && ".join(dict.fromkeys(checks))
        self.mask_scope = Scope()
        #: the mask of one element; None where there is no mask
        self.bit = None if mask is None else self.nest.eval(mask, self.index, self.mask_scope)

    @property
    def masked_by_element(self) -> bool:
        """Whether elements of a row may have different answers."""
        return self.bit is not None and self.bit.level > self.nest.depth

    def strip(self, buffer: Buffer) -> Strip | None:
        """Rows on their way into a tile that is stored transposed, where a whole number of strips of 16 fills it."""
        strides, shape, axis = buffer.strides(), self.nest.shape, self.axis
        if (
            not self.nest.outer
            or buffer.c_type != "float"
            or self.step != memory_size(self.pointer.type.pointee)
        ):
            return None
        across = self.nest.outer[-1]
        if strides[across] != 1 or shape[across] % _STRIP or shape[axis] % _STRIP:
            return None
        name, n = self.nest.name("strip"), shape[axis]
        at = linear(tuple(self.nest.index), strides).text
        row = f"i{across}"
        return Strip(
            name,
            f"float {name}[{_STRIP * n}] __attribute__((aligned(64)));",
            {across: n, axis: 1},
            [
                f"if (({row} & {_STRIP - 1}) == {_STRIP - 1})",
                f"effattn_turn_f32({self.emitter.array(buffer)} + {at} - {_STRIP - 1}, {strides[axis]}, {name}, {n});",
            ],
            across,
        )

    def emit(
        self,
        *,
        row: str,
        fast: list[str],
        slow: list[str],
        skipped: list[str],
        skipped_scope: Scope,
        fill: Callable[..., list[str]] | None,
        other: str = "",
        before: Sequence[str] = (),
        some: Sequence[str] = (),
    ) -> None:
        """Write the rows.

        Args:
            row: a call for the first so many elements of a row, {} and {}: how many, and what the others get.
            fast: one element where a row's addresses follow each other.
            slow: one element by an address of its own.
            skipped: one element that is masked off, after the lines of `skipped_scope`.
            fill: the loop of `skipped` over a whole row or, with `start`, from there on.
            other: what `skipped` writes, where the call of `row` may write it too.
            before: at the head of a row whose elements may have different answers.
            some: the first `count` elements of such a row, in place of loops over `fast`.
        """
        nest, axis = self.nest, self.axis
        n = nest.shape[axis]
        probed: list[str] = []
        probed_some: list[str] = []
        if self.emitter.probes is not None:
            slow = [*self._probe_element(), *slow]
            probed, probed_some = (self._probe_row(count) for count in (str(n), "count"))
        # `row` does a whole row, or its first elements, by one call.
        # Whole rows of a known length are as short in C as the call, and faster, but for fp16.
        fast_loop = [row.format(n, "0, 0")] if "f16" in row else nest.loop(axis, Scope(), fast)
        fast_loop = [*probed, *fast_loop]
        plain = self.step is not None
        if self.bit is None:
            slow_loop = nest.loop(axis, self.slow_scope, slow)
            self._emit(self._either(fast_loop if plain else slow_loop, slow_loop))
            return
        if not self.masked_by_element:
            # The whole row has one answer.
            slow_loop = nest.loop(axis, self.slow_scope, slow)
            body = [
                f"if ({self.bit.text}) {{",
                *self._either(fast_loop if plain else slow_loop, slow_loop),
                "}",
            ]
            if fill is not None:
                body += ["else {", *fill(), "}"]
            self._emit(body)
            return
        on = nest.name("on")
        i = f"i{axis}"
        guarded = nest.loop(
            axis,
            Scope(lines=[]),
            [
                f"if ({on}[{i}]) {{",
                *self.slow_scope.lines,
                *slow,
                "}",
                *(["else {", *skipped_scope.lines, *skipped, "}"] if skipped else []),
            ],
            independent=False,
        )
        body = [
            f"uint8_t {on}[{n}];",
            *nest.loop(axis, self.mask_scope, [f"{on}[{i}] = {self.bit.text};"]),
            *before,
        ]
        if plain:
            # Not negative where the true ones come first.
            body.append(f"const long count = effattn_front({on}, {n});")
            if row and other:
                first = [*probed_some, row.format("count", f"{n}, {other}")]
            elif some:
                first = [*probed_some, *some]
            else:
                front = [row.format("count", "0, 0")] if row else nest.loop(axis, Scope(), fast, stop="count")
                first = [
                    f"if (count == {n}) {{",
                    *fast_loop,
                    "} else {",
                    *probed_some,
                    *front,
                    *(fill(start="count") if fill is not None else []),
                    "}",
                ]
            condition = "count >= 0" + (f" && {self.ok}" if self.ok else "")
            body += [f"if ({condition}) {{", *first, "} else {", *guarded, "}"]
        else:
            body += guarded
        self._emit(body)

    def _emit(self, body: list[str]) -> None:
        self.nest.emit([*body, *self.after])

    def _probe_element(self) -> list[str]:
        """Before an element whose address is computed by itself; goes behind the lines of `slow_scope`."""
        probes = self.emitter.probes
        assert probes is not None
        lines = probes.tensor_overflow(self.nest, self.pointer, self.index, self.slow_scope)
        return [*lines, probes.element(self.op, self.slow)]

    def _probe_row(self, count: str) -> list[str]:
        """Before the first `count` elements of a row along which no 32-bit sum wraps."""
        probes = self.emitter.probes
        assert probes is not None
        if self.step is None:
            return []
        scope = Scope()
        lines = probes.tensor_overflow(self.nest, self.pointer, tuple(self.nest.index), scope)
        if lines:
            lines = ["{", *scope.lines, *lines, "}"]
            if count != str(self.nest.shape[self.axis]):
                lines = [f"if ({count} > 0)", *lines]
        return [*lines, probes.row(self.op, self.base, self.step, count)]

    def _either(self, fast: list[str], slow: list[str]) -> list[str]:
        if not self.ok:
            return fast
        return [f"if ({self.ok}) {{", *fast, "} else {", *slow, "}"]
