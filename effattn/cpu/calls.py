"""Calls that Triton's inliner leaves: of functions with several blocks (early returns), from loops, branches and regions.

MLIR's structured regions hold one block, so such a body cannot be put there; C has no such limit. Each call becomes

    %r = "effattn.inlined"() ({ the blocks of the function })

whose blocks jump among themselves and end in "effattn.leave"(values), which ends the operation with these results.
"""

from __future__ import annotations

from effattn.cpu import blocks
from effattn.cpu.formats import Unsupported
from effattn.cpu.ir import Block, Module, Op, Region, Value, walk

INLINED, LEAVE = "effattn.inlined", "effattn.leave"
#: calls within calls; more is a recursion
_DEEPEST = 64


def inline(module: Module, function: Op) -> None:
    """Replace every call in a function by the body of what it calls."""
    by_name = {f.attrs["sym_name"].strip('"'): f for f in module.functions}
    number = 0
    depth: dict[Op, int] = {}
    while calls := [op for op in walk(function) if op.name == "tt.call"]:
        for call in calls:
            number += 1
            inside = depth.get(call, 0) + 1
            callee = by_name.get(call.attrs["callee"].lstrip("@").strip('"'))
            if callee is None or inside > _DEEPEST:
                raise CallError(call, Unsupported(f"a call of {call.attrs['callee']}, which calls itself"))
            _inline(call, callee, number)
            depth |= {op: inside for op in walk(call) if op.name == "tt.call"}


class CallError(Exception):
    """A call that cannot be inlined."""

    def __init__(self, op: Op, error: Unsupported) -> None:
        super().__init__(op, error)
        self.op, self.error = op, error


def _inline(call: Op, callee: Op, number: int) -> None:
    """Make a call the body of `callee`, in place, so that its results stay the values that they are."""
    entry = callee.regions[0].blocks[0]
    values = dict(zip(entry.args, call.operands, strict=True))
    for position, value in enumerate(call.operands):
        value.uses.remove((call, position))
    call.name, call.operands, call.attrs = INLINED, [], {}
    region = _copy(callee.regions[0], call, values, f"call{number}_")
    region.blocks[0].args.clear()
    for block in region.blocks:
        if block.terminator.name == "tt.return":
            block.terminator.name = LEAVE
    call.regions = [region]
    blocks.sort(call)


def _copy(region: Region, parent: Op, values: dict[Value, Value], prefix: str) -> Region:
    """A copy of a region; `values` maps those from outside, and is filled with those from inside."""
    out = Region([], parent)
    for old in region.blocks:
        block = Block(prefix + old.label, [], [], out)
        out.blocks.append(block)
        for arg in old.args:
            new = Value(arg.name, arg.type, block, arg.index)
            block.args.append(new)
            values.setdefault(arg, new)
    # Blocks may stand before those that define what they use: results first, then operands.
    made: list[tuple[Op, Op]] = []
    for old, block in zip(region.blocks, out.blocks, strict=True):
        for op in old.ops:
            copy = Op(op.name, [], [], dict(op.attrs), [], [prefix + x for x in op.successors], op.loc, block)
            block.ops.append(copy)
            made.append((op, copy))
            for result in op.results:
                copy.results.append(Value(result.name, result.type, copy, result.index))
                values[result] = copy.results[-1]
    for op, copy in made:
        for position, value in enumerate(op.operands):
            mapped = values.get(value, value)
            copy.operands.append(mapped)
            mapped.uses.append((copy, position))
        copy.regions = [_copy(inner, copy, values, prefix) for inner in op.regions]
    return out
