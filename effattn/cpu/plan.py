"""What is kept in memory, where, and for how long.

A tensor value is either *virtual*, an expression of its indices that is computed inside the loops of whoever uses
it, or *kept*: computed once, at its place in the program, into a buffer of the thread's arena. Views (splat,
broadcast, trans, ...) and cheap integer and pointer arithmetic are virtual; loads, products and reductions are kept;
a floating-point operation is virtual where one operation of the same block uses it, element for element.

The plan then decides for each buffer
  - the order of its axes in memory (a tile that is only multiplied as its transpose is stored transposed),
  - whether a loop-carried value can be updated in place, so that `scf.yield` copies nothing,
  - an offset in the arena, so that buffers that are never alive together share memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from effattn.cpu import elementwise
from effattn.cpu.formats import size_of, value_type
from effattn.cpu.ir import Block, Op, Type, Value, walk
from effattn.cpu.models import DEFAULT, MODELS, DotModel

#: tt.InputPrecision
TF32, IEEE = 0, 2

LOOPS = ("scf.for", "scf.while")


@dataclass(eq=False)
class Buffer:
    """A tensor in the arena: row-major over its axes taken in `order`."""

    name: str
    type: Type
    order: tuple[int, ...]
    first: int = 1 << 60
    last: int = -1
    offset: int = 0

    @property
    def c_type(self) -> str:
        return value_type(self.type.elem)

    @property
    def bytes(self) -> int:
        return self.type.numel * size_of(self.c_type)

    def strides(self) -> dict[int, int]:
        out, step = {}, 1
        for axis in reversed(self.order):
            out[axis] = step
            step *= self.type.shape[axis]
        return out


@dataclass
class Plan:
    function: Op
    #: how products are accumulated
    model: DotModel = MODELS[DEFAULT]
    buffers: dict[Value, Buffer] = field(default_factory=dict)
    position: dict[Op, int] = field(default_factory=dict)
    end: dict[Op, int] = field(default_factory=dict)
    #: (yield-like op, operand index) -> the operand must pass through a temporary buffer
    staged: set[tuple[Op, int]] = field(default_factory=set)
    #: operations whose operands need packing: op -> {operand index: Buffer}
    packs: dict[tuple[Op, int], Buffer] = field(default_factory=dict)
    arena: int = 0

    def kept(self, value: Value) -> bool:
        return value in self.buffers

    def all_buffers(self) -> list[Buffer]:
        """Every buffer once."""
        return list({id(b): b for b in (*self.buffers.values(), *self.packs.values())}.values())


def natural(type_: Type) -> tuple[int, ...]:
    return tuple(range(len(type_.shape)))


# ------------------------------------------------------------------------------------------ decisions

#: Operations that a virtual value may stand for: beyond it, computing it again costs more than keeping it, and the
#: expressions grow without bound. Where a value has one use nothing is computed twice, so more are allowed.
_MOST_SHARED, _MOST = 32, 128


def _is_elementwise(op: Op) -> bool:
    return op.name in elementwise.RULES


def _single_elementwise_user(value: Value) -> bool:
    """One use, in the same block, by something that visits each element once."""
    if len(value.uses) != 1:
        return False
    user, _ = value.uses[0]
    assert value.op is not None
    if user.block is not value.op.block:
        return False
    # A loop's own yield may compute it straight into the loop-carried buffer.
    return _is_elementwise(user) or user.name in ("tt.store", "tt.reduce", "tt.trans", "tt.dot", "scf.yield")


def _virtual_values(function: Op) -> set[Value]:
    """The tensor values that are computed where they are used, instead of kept in memory."""
    virtual: set[Value] = set()
    cost: dict[Value, int] = {}
    for op in walk(function):
        for value in op.results:
            if not value.type.is_tensor:
                continue
            total = sum(cost.get(x, 0) for x in op.operands) + _is_elementwise(op)
            if _may_be_virtual(op, value, total):
                virtual.add(value)
                cost[value] = total
    return virtual


def _may_be_virtual(op: Op, value: Value, cost: int) -> bool:
    if op.name == "arith.constant" or op.name in elementwise.VIEWS:
        return True
    if not _is_elementwise(op) or cost > _MOST:
        return False
    if _single_elementwise_user(value):
        return True
    cheap = op.name in elementwise.CHEAP or (op.name == "arith.select" and not value.type.is_float)
    return cheap and cost <= _MOST_SHARED


def leaves(value: Value, plan: Plan) -> dict[Value, bool]:
    """The kept values that computing `value` reads; True where each is read at the same index only."""
    found: dict[Value, bool] = {}
    seen: set[tuple[Value, bool]] = set()
    todo = [(value, True)]
    while todo:
        item = todo.pop()
        current, same_index = item
        if item in seen or not current.type.is_tensor:
            continue
        seen.add(item)
        if plan.kept(current):
            found[current] = found.get(current, True) and same_index
            continue
        op = current.op
        assert op is not None
        inner = same_index and _is_elementwise(op)
        todo += [(operand, inner) for operand in op.operands]
    return found


# --------------------------------------------------------------------------------------------- making


class _Planner:
    def __init__(self, function: Op, model: DotModel) -> None:
        self.plan = Plan(function, model)
        self.counter = 0
        self.names: set[str] = set()
        self.blocks_of: dict[Op, list[Op]] = {}
        self.reads: dict[Value, list[tuple[int, Op, bool]]] = {}
        self.virtual = _virtual_values(function)
        self.products: dict[Value, tuple[bool, bool]] = {}

    def run(self) -> Plan:
        fn = self.plan.function
        self.number(fn, [])
        self.assign(fn)
        self.collect(fn)
        self.coalesce(fn)
        self.lifetimes(fn)
        self.place()
        return self.plan

    # -- program order

    def number(self, op: Op, loops: list[Op]) -> None:
        self.plan.position[op] = self.counter
        self.blocks_of[op] = loops
        self.counter += 1
        inside = [*loops, op] if op.name in LOOPS else loops
        for region in op.regions:
            for block in region.blocks:
                for inner in block.ops:
                    self.number(inner, inside)
        self.plan.end[op] = self.counter
        self.counter += 1

    # -- buffers

    def new(self, value: Value, order: tuple[int, ...] | None = None) -> Buffer:
        return Buffer(value.name, value.type, order or natural(value.type))

    def assign(self, op: Op) -> None:
        buffers = self.plan.buffers
        if op.name == "scf.for":
            for arg, result in zip(op.body.args[1:], op.results, strict=True):
                if arg.type.is_tensor:
                    buffers[arg] = buffers[result] = self.new(arg)
        elif op.name == "scf.while":
            before, after = op.regions[0].blocks[0], op.regions[1].blocks[0]
            for arg in before.args:
                if arg.type.is_tensor:
                    buffers[arg] = self.new(arg)
            for arg, result in zip(after.args, op.results, strict=True):
                if arg.type.is_tensor:
                    buffers[arg] = buffers[result] = self.new(arg)
        elif op.name == "tt.func":
            for block in op.regions[0].blocks[1:]:
                for arg in block.args:
                    if arg.type.is_tensor:
                        buffers[arg] = self.new(arg)
        else:
            for result in op.results:
                if result.type.is_tensor and result not in self.virtual:
                    buffers[result] = self.new(result, self.order(result))
        if op.name == "effattn.inlined":
            for block in op.regions[0].blocks[1:]:
                for arg in block.args:
                    if arg.type.is_tensor:
                        buffers[arg] = self.new(arg)
        for region in op.regions:
            if op.name in ("tt.reduce", "tt.scan", "tt.map_elementwise"):
                continue
            for block in region.blocks:
                for inner in block.ops:
                    self.assign(inner)

    def order(self, value: Value) -> tuple[int, ...]:
        """A tile that is only multiplied as its transpose is stored transposed."""
        order = natural(value.type)
        if len(order) == 2 and value.op is not None and value.op.name != "tt.dot":
            straight, crossed = self.product_uses(value)
            if crossed and not straight:
                return (1, 0)
        return order

    def product_uses(self, value: Value) -> tuple[bool, bool]:
        """Whether products use a rank-2 value as it is, and whether they use its transpose."""
        found = self.products.get(value)
        if found is None:
            straight = crossed = False
            for user, _ in value.uses:
                if user.name == "tt.dot":
                    straight = True
                elif user.results and user.results[0] in self.virtual:
                    if user.name == "tt.trans":
                        b, a = self.product_uses(user.results[0])
                    elif _is_elementwise(user):
                        a, b = self.product_uses(user.results[0])
                    else:
                        continue
                    straight, crossed = straight or a, crossed or b
            found = self.products[value] = (straight, crossed)
        return found

    # -- who reads what, when

    def inputs(self, op: Op) -> list[Value]:
        """Tensor values that are computed when `op` is emitted."""
        if op.name in elementwise.RULES or op.name in elementwise.VIEWS or op.name == "arith.constant":
            results = [r for r in op.results if self.plan.kept(r)]
            return op.operands if results else []
        return op.operands

    def collect(self, op: Op) -> None:
        for value in self.inputs(op):
            if value.type.is_tensor:
                for leaf, same in leaves(value, self.plan).items():
                    self.reads.setdefault(leaf, []).append((self.plan.position[op], op, same))
        for region in op.regions:
            for block in region.blocks:
                for inner in block.ops:
                    self.collect(inner)

    def last_read(self, value: Value, within: Op | None) -> int:
        """Position of the last read; a read inside a loop that does not contain the definition lasts to its end."""
        home = set(self.blocks_of[within]) | {within} if within is not None else set()
        last = -1
        for position, op, _ in self.reads.get(value, []):
            outer = [loop for loop in self.blocks_of[op] if loop not in home]
            last = max(last, self.plan.end[outer[0]] if outer else position)
        return last

    # -- updating in place

    def coalesce(self, op: Op) -> None:
        taken: set[Buffer] = set()
        self._coalesce(op, taken)

    def _coalesce(self, op: Op, taken: set[Buffer]) -> None:
        for region in op.regions:
            for block in region.blocks:
                for inner in block.ops:
                    self._coalesce(inner, taken)
        if op.name == "scf.for":
            end = op.body.terminator
            for arg, value in zip(op.body.args[1:], end.operands, strict=True):
                if arg.type.is_tensor:
                    self._in_place(op, op.body, arg, value, taken)
            self._stage(end, op.body.args[1:])
        elif op.name == "scf.if":
            for region in op.regions:
                for block in region.blocks:
                    for result, value in zip(op.results, block.terminator.operands, strict=False):
                        if result.type.is_tensor:
                            self._direct(block, result, value, taken)

    def _movable(self, block: Block, value: Value, taken: set[Buffer]) -> Buffer | None:
        """The buffer of a value that an operation of this very block computes and that no other rule has moved."""
        op = value.op
        if (
            op is None
            or op.block is not block
            or not self.plan.kept(value)
            or op.name in LOOPS
            or op.name in ("scf.if", "effattn.inlined")
        ):
            return None
        buffer = self.plan.buffers[value]
        return None if buffer in taken else buffer

    def _in_place(self, loop: Op, body: Block, arg: Value, value: Value, taken: set[Buffer]) -> None:
        """Let the operation that computes the next value of a loop-carried tensor write over the current one."""
        target = self.plan.buffers[arg]
        buffer = self._movable(body, value, taken)
        if buffer is None:
            return
        writer = value.op
        assert writer is not None
        at = self.plan.position[writer]
        for position, reader, same in self.reads.get(arg, []):
            outer = [x for x in self.blocks_of[reader] if x not in self.blocks_of[loop] and x is not loop]
            if (self.plan.end[outer[0]] if outer else position) > at:
                return
            if position == at and not self._safe(writer, arg, same):
                return
        if buffer.order != target.order:
            # The loop-carried buffer takes the order that its producer prefers; all readers follow it.
            target.order = buffer.order
        self.plan.buffers[value] = target
        taken.add(target)

    def _safe(self, writer: Op, arg: Value, same: bool) -> bool:
        if writer.name == "tt.dot":
            factors = {**leaves(writer.operands[0], self.plan), **leaves(writer.operands[1], self.plan)}
            return arg not in factors and leaves(writer.operands[2], self.plan).get(arg, False)
        return same and _is_elementwise(writer)

    def _direct(self, block: Block, result: Value, value: Value, taken: set[Buffer]) -> None:
        """Let a branch compute its value straight into the result of `scf.if`."""
        target = self.plan.buffers[result]
        buffer = self._movable(block, value, taken)
        if buffer is None or buffer.order != target.order:
            return
        self.plan.buffers[value] = target
        # One value may be yielded twice; the second time it is copied.
        taken.add(target)

    def _stage(self, end: Op, args: list[Value]) -> None:
        """Parallel assignment: what a yield still has to write must not overwrite what another operand reads."""
        plan = self.plan
        for i, value in enumerate(end.operands):
            if not value.type.is_tensor or plan.buffers.get(value) is plan.buffers[args[i]]:
                continue
            for j, other in enumerate(end.operands):
                found = leaves(other, plan) if other.type.is_tensor else {}
                if args[i] in found and (j != i or not found[args[i]]):
                    plan.staged.add((end, i))

    # -- lifetimes and places

    def touch(self, buffer: Buffer, first: int, last: int) -> None:
        buffer.first = min(buffer.first, first)
        buffer.last = max(buffer.last, last)

    def lifetimes(self, op: Op) -> None:
        plan = self.plan
        for value, buffer in plan.buffers.items():
            owner = value.op
            if owner is None:
                block = value.owner
                assert isinstance(block, Block)
                owner = block.region.parent
                assert owner is not None
            start = plan.position[owner]
            if owner.name == "tt.func":
                self.touch(buffer, start, plan.end[owner])
                continue
            if value.op is None or owner.name in LOOPS or owner.name in ("scf.if", "effattn.inlined"):
                self.touch(buffer, start, plan.end[owner])
            self.touch(buffer, start, max(start, self.last_read(value, owner)))
            # A definition inside a loop whose buffer is shared with something outside is covered by that value.
        for inner in walk(op):
            if inner.name == "tt.dot":
                for index in (0, 1):
                    self._pack(inner, index)
            if inner.name == "scf.yield":
                for i, value in enumerate(inner.operands):
                    if (inner, i) in plan.staged:
                        self._temporary(inner, i, self.new(value))

    def _temporary(self, op: Op, index: int, buffer: Buffer) -> None:
        at = self.plan.position[op]
        self.touch(buffer, at, at)
        self.plan.packs[op, index] = buffer

    def _pack(self, dot: Op, index: int) -> None:
        """A factor that is not already a row-major buffer of the type that is multiplied is copied into one."""
        value, result = dot.operands[index], dot.results[0]
        rounds = value.type.elem == "f32" and dot.int_attr("inputPrecision", IEEE) == TF32
        rounds = rounds and self.plan.model.tf32 != "none"
        widens = value_type(value.type.elem) != value_type(result.type.elem)
        if rounds or widens or operand_in_place(value, self.plan) is None:
            elem = result.type.elem if widens else value.type.elem
            self._temporary(dot, index, Buffer(value.name, Type(elem, value.type.shape), natural(value.type)))

    def place(self) -> None:
        """First fit, by start of life; a tile that is computed from one that dies there takes its place."""
        live: list[Buffer] = []
        heirs = self.heirs()
        for buffer in sorted(self.plan.all_buffers(), key=lambda b: (b.first, b.last)):
            live = [b for b in live if b.last >= buffer.first]
            heir_of = next((b for b in heirs.get(id(buffer), []) if b in live), None)
            if heir_of is not None:
                buffer.offset = heir_of.offset
                live.remove(heir_of)
                live.append(buffer)
                continue
            offset = 0
            for other in sorted(live, key=lambda b: b.offset):
                if offset + buffer.bytes <= other.offset:
                    break
                offset = max(offset, (other.offset + other.bytes + 63) & ~63)
            buffer.offset = offset
            live.append(buffer)
            self.plan.arena = max(self.plan.arena, offset + buffer.bytes)

    def heirs(self) -> dict[int, list[Buffer]]:
        """For the buffers of elementwise results: those whose elements are last read there, each where it is written."""
        values: dict[int, list[Value]] = {}
        for value, buffer in self.plan.buffers.items():
            values.setdefault(id(buffer), []).append(value)
        readings: dict[Op, dict[Value, bool]] = {}
        for leaf, reads in self.reads.items():
            for _, op, same in reads:
                found = readings.setdefault(op, {})
                found[leaf] = found.get(leaf, True) and same
        out: dict[int, list[Buffer]] = {}
        for buffer in self.plan.all_buffers():
            (value, *others) = values.get(id(buffer), [None])
            op = value.op if value is not None else None
            if others or op is None or not _is_elementwise(op) or self.plan.position[op] != buffer.first:
                continue
            # A buffer that holds several values is left alone: another of them may still be needed.
            out[id(buffer)] = [
                self.plan.buffers[leaf]
                for leaf, same in readings.get(op, {}).items()
                if same
                and len(values[id(self.plan.buffers[leaf])]) == 1
                and self.plan.buffers[leaf].last == buffer.first
                and self.plan.buffers[leaf].order == buffer.order
                and size_of(self.plan.buffers[leaf].c_type) == size_of(buffer.c_type)
                and self.plan.buffers[leaf].type.shape == buffer.type.shape
            ]
        return out


def operand_in_place(value: Value, plan: Plan) -> Buffer | None:
    """The buffer that holds `value` row-major, looking through transposes; None where there is none."""
    order = list(natural(value.type))
    while not plan.kept(value):
        op = value.op
        if op is None or op.name != "tt.trans":
            return None
        perm = op.ints_attr("order")
        order = [perm[axis] for axis in order]
        value = op.operands[0]
    buffer = plan.buffers[value]
    return buffer if buffer.order == tuple(order) else None


def make_plan(function: Op, model: DotModel = MODELS[DEFAULT]) -> Plan:
    return _Planner(function, model).run()
