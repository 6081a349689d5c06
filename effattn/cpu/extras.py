"""What comes on top of the core operations: atomics, gather, histogram, libdevice, inline assembly, fp8, prints, assertions.

Their C helpers are in extras.h, which only kernels that use them include.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from effattn.cpu import asm, atomics, debug, decompose, elementwise, extern, fp8, gather, nest, regions
from effattn.cpu.ir import Op, walk

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter

HANDLERS: dict[str, Callable[[FunctionEmitter, Op], None]] = {
    "tt.atomic_rmw": atomics.rmw,
    "tt.atomic_cas": atomics.cas,
    "tt.atomic_load": atomics.load,
    "tt.atomic_store": atomics.store,
    "tt.gather": gather.gather,
    "tt.histogram": gather.histogram,
    "tt.elementwise_inline_asm": asm.inline_asm,
    "tt.print": debug.print_,
    "tt.assert": debug.assert_,
    "tt.map_elementwise": regions.map_elementwise,
    **dict.fromkeys(regions.RETURNS, regions.leave),
}

#: refusals that are found before anything is generated
CHECKS: dict[str, Callable[[Op], None]] = {
    "tt.atomic_rmw": atomics.check,
    "tt.atomic_cas": atomics.check,
    "tt.atomic_load": atomics.check,
    "tt.atomic_store": atomics.check,
    "tt.elementwise_inline_asm": asm.check,
}

elementwise.RULES["tt.extern_elementwise"] = extern.rule
nest.VIEWS[decompose.SCALED] = decompose.scaled
fp8.register()

_NEED_HEADER = frozenset(
    {
        "tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_store", "tt.elementwise_inline_asm", "tt.print",
        "tt.assert", "tt.extern_elementwise", "tt.fp_to_fp", decompose.SCALED,
    }
)  # fmt: skip


def header() -> str:
    return Path(__file__).with_name("extras.h").read_text()


def needed(function: Op) -> bool:
    """Whether a kernel uses anything of extras.h."""
    return any(
        op.name in _NEED_HEADER or any("f8E" in v.type.elem for v in (*op.results, *op.operands))
        for op in walk(function)
    )
