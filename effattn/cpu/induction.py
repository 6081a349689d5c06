"""Tensors that a loop moves as a whole become a fixed tensor and a scalar that moves.

    for ...:                                 for ...:
        x = tl.load(ptrs)                        x = tl.load(init + at)
        ptrs += step              becomes        at += step

where `ptrs` is a tensor of pointers or integers and `step` is the same for all its elements. Both wrap around in the
same way, so nothing changes but the form: the addresses are seen to be contiguous, and no tensor of 64-bit pointers is
kept in memory and updated at each turn.
"""

from __future__ import annotations

from dataclasses import dataclass

from effattn.cpu.formats import splat_literal
from effattn.cpu.ir import Block, Op, Type, Value, walk

#: operations that add something to a tensor: name -> positions that the tensor may stand at
_MOVES = {"tt.addptr": (0,), "arith.addi": (0, 1), "arith.subi": (0,)}


def rewrite(function: Op) -> None:
    """Rewrite every loop of a function, inner ones first: their results are steps of the outer ones."""
    for op in reversed(list(walk(function))):
        if op.name == "scf.for":
            for k in reversed(range(len(op.results))):
                _rewrite(op, k)


@dataclass
class _Move:
    """`op` adds the scalar `step`, or subtracts it."""

    op: Op
    step: Value


def _rewrite(loop: Op, k: int) -> None:
    body = loop.body
    arg, result, init = body.args[1 + k], loop.results[k], loop.operands[3 + k]
    if not arg.type.is_tensor or not (arg.type.is_ptr or (arg.type.is_int and arg.type.bits > 1)):
        return
    moves = _moves(body, arg, body.terminator.operands[k])
    if not moves:
        return
    scalar = Type("i64" if arg.type.is_ptr else arg.type.elem)
    zero = Builder(loop.block, loop.block.ops.index(loop)).constant("0", scalar)
    old_type = arg.type
    uses = list(arg.uses)
    arg.type = result.type = scalar
    arg.uses.clear()
    _set_operand(loop, 3 + k, zero)
    inside = Builder(body, 0).moved(init, arg, arg.name, old_type)
    for user, position in uses:
        _set_operand(user, position, inside)
    at = arg
    for move in moves:
        build = Builder(body, body.ops.index(move.op))
        step = move.step
        if step.type != scalar:
            step = build.op("arith.extsi", [step], scalar, "step")
        at = build.op(
            "arith.subi" if move.op.name == "arith.subi" else "arith.addi", [at, step], scalar, arg.name
        )
        whole = build.moved(init, at, arg.name, old_type)
        replace(move.op.results[0], whole)
        remove(move.op)
    _set_operand(body.terminator, k, at)
    after_uses = list(result.uses)
    result.uses.clear()
    if after_uses:
        after = Builder(loop.block, loop.block.ops.index(loop) + 1).moved(init, result, result.name, old_type)
        for user, position in after_uses:
            _set_operand(user, position, after)


def _moves(body: Block, arg: Value, value: Value) -> list[_Move]:
    """The steps from a loop-carried tensor to its next value, in order; empty where it does not just move."""
    moves: list[_Move] = []
    while value is not arg:
        op = value.op
        if op is None or op.block is not body:
            return []
        found = None
        for position in _MOVES.get(op.name, ()):
            step = _uniform(op.operands[1 - position])
            if step is not None:
                found = op.operands[position]
                moves.append(_Move(op, step))
                break
        if found is None:
            return []
        value = found
    return moves[::-1]


def _uniform(value: Value) -> Value | None:
    """The scalar that all elements of a tensor equal; None where it is not seen at once."""
    op = value.op
    if op is None:
        return None
    if op.name == "tt.splat":
        return op.operands[0]
    if op.name in ("tt.broadcast", "tt.expand_dims", "tt.reshape", "tt.trans"):
        return _uniform(op.operands[0])
    if op.name == "arith.constant" and splat_literal(op.attrs["value"], value.type) is not None:
        text = op.attrs["value"]
        literal = text[text.index("dense<") + 6 : text.rindex("> : ")]
        return Builder(op.block, op.block.ops.index(op)).constant(literal, Type(value.type.elem))
    return None


class Builder:
    """Inserts operations into a block, one after the other, from a place on."""

    def __init__(self, block: Block, at: int) -> None:
        self.block, self.at = block, at
        self.loc = block.ops[min(at, len(block.ops) - 1)].loc

    def op(
        self, name: str, operands: list[Value], type_: Type, hint: str, attrs: dict[str, str] | None = None
    ) -> Value:
        op = Op(name, operands, [], attrs or {}, [], [], self.loc, self.block)
        result = Value(hint, type_, op, 0)
        op.results.append(result)
        for position, value in enumerate(operands):
            value.uses.append((op, position))
        self.block.ops.insert(self.at, op)
        self.at += 1
        return result

    def constant(self, literal: str, type_: Type) -> Value:
        return self.op("arith.constant", [], type_, "c", {"value": f"{literal} : {type_}"})

    def moved(self, init: Value, at: Value, hint: str, type_: Type) -> Value:
        by = self.op("tt.splat", [at], Type(at.type.elem, type_.shape), hint)
        if not type_.is_ptr:
            return self.op("arith.addi", [init, by], type_, hint)
        # Elements, as the steps were.
        return self.op("tt.addptr", [init, by], type_, hint)


def _set_operand(op: Op, position: int, value: Value) -> None:
    old = op.operands[position]
    if (op, position) in old.uses:
        old.uses.remove((op, position))
    op.operands[position] = value
    value.uses.append((op, position))


def replace(old: Value, new: Value) -> None:
    for user, position in list(old.uses):
        _set_operand(user, position, new)


def remove(op: Op) -> None:
    for position, value in enumerate(op.operands):
        value.uses.remove((op, position))
    op.block.ops.remove(op)
