"""The blocks of a function with early returns, in an order in which none jumps backwards.

MLIR prints blocks in the order in which they were made. The planner takes the order of the text for that of the program.
"""

from __future__ import annotations

from effattn.cpu.ir import Block, Op


def sort(function: Op) -> None:
    """Put the blocks of a function or another operation in reverse postorder, the entry first.

    Blocks that nothing reaches go. Loops stay as they are.
    """
    region = function.regions[0]
    by_label = {block.label: block for block in region.blocks}
    done: list[Block] = []
    seen: set[str] = set()
    todo: list[tuple[Block, bool]] = [(region.blocks[0], False)]
    while todo:
        block, finished = todo.pop()
        if finished:
            done.append(block)
        elif block.label not in seen:
            seen.add(block.label)
            todo.append((block, True))
            todo += [(by_label[label], False) for label in reversed(block.terminator.successors)]
    region.blocks[:] = reversed(done)
