"""Regions that work on single elements: combine regions of reductions and scans, and `tl.map_elementwise`.

What is more than a chain of elementwise operations (branches, loops, early returns) becomes a C function of its own:
elements by value, results through pointers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.cpu import elementwise, outline
from effattn.cpu.formats import Unsupported, value_type
from effattn.cpu.ir import Op, Value, walk
from effattn.cpu.nest import Expr, Nest, Scope, linear, reshape_index

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter

#: operations whose regions are such functions
OWNERS = ("tt.reduce", "tt.scan", "tt.map_elementwise")
RETURNS = frozenset({f"{name}.return" for name in OWNERS})

#: the flag that ends a launch, by its name in a kernel
_STOP = "stop"

#: beyond the elementwise operations
_SCALAR = frozenset(
    {
        "arith.constant", "ub.poison", "scf.if", "scf.for", "scf.while", "scf.yield", "scf.condition", "cf.br", "cf.cond_br",
        "llvm.intr.assume", "effattn.inlined", "effattn.leave", "tt.get_program_id", "tt.get_num_programs", "tt.load", "tt.store",
        "tt.atomic_rmw", "tt.atomic_cas", "tt.atomic_load", "tt.atomic_store", *RETURNS,
    }
)  # fmt: skip


def check(op: Op) -> None:
    """Raise Unsupported where a region holds what an element cannot be put through."""
    what = "the combine region" if op.name != "tt.map_elementwise" else "the function"
    for inner in walk(op):
        if inner is op:
            continue
        if inner.name not in elementwise.RULES and inner.name not in _SCALAR:
            raise Unsupported(f"{inner.name} inside {what} of {op.name}")
        if any(value.type.is_tensor for value in (*inner.operands, *inner.results)):
            raise Unsupported(f"{inner.name} of a tensor inside {what} of {op.name}")


def is_chain(op: Op) -> bool:
    """Whether the region is one block of elementwise operations, which can be written in line."""
    blocks = op.regions[0].blocks
    return len(blocks) == 1 and all(
        inner.name in elementwise.RULES or inner.name == "arith.constant" for inner in blocks[0].ops[:-1]
    )


def function_of(emitter: FunctionEmitter, op: Op) -> str:
    """The name of the C function of an operation's region; written at the first call."""
    name = emitter.region_functions.get(op)
    if name is not None:
        return name
    body = Op(
        "tt.func", [], [], {"sym_name": emitter.function.attrs["sym_name"]}, op.regions, [], op.loc, op.block
    )
    inner = type(emitter)(body, emitter.plan, emitter.probes)
    inner.taken = emitter.taken  # functions and tables of a file share their names
    name = emitter.region_functions[op] = emitter.unique(op.name.split(".")[1] + "_element")
    parameters: list[str] = []
    for arg in op.body.args:
        inner.names[arg] = inner.unique(arg.name)
        c_type = inner.types[inner.names[arg]] = value_type(arg.type.elem)
        parameters.append(f"{c_type} {inner.names[arg]}")
    # What every kernel is handed, and what its loops look at to end early.
    emitter.types[_STOP] = "const int *"
    parameters += [*(f"int32_t {x}" for x in outline.PROGRAM), f"const int *{_STOP}"]
    for result in _returned(op):
        inner.returned.append(inner.unique("result"))
        parameters.append(f"{value_type(result.type.elem)} *{inner.returned[-1]}")
    inner.blocks(op.regions[0])
    emitter.statics += [x for x in inner.statics if x not in emitter.statics]
    emitter.functions += [
        *inner.functions,
        f"INLINE void {name}({', '.join(parameters)}) {{",
        *("    " + x for x in inner.hoisted),
        *inner.lines,
        "}",
        "",
    ]
    return name


def _returned(op: Op) -> list[Value]:
    return next(
        block.terminator.operands for block in op.regions[0].blocks if block.terminator.name in RETURNS
    )


def call(emitter: FunctionEmitter, op: Op, arguments: list[str], targets: list[str]) -> str:
    """A statement that puts elements through the region and assigns what comes out."""
    name = function_of(emitter, op)
    parts = [*arguments, *outline.PROGRAM, _STOP, *(f"&{t}" for t in targets)]
    return f"{name}({', '.join(parts)});"


def leave(emitter: FunctionEmitter, op: Op) -> None:
    """The end of such a region."""
    for target, value in zip(emitter.returned, op.operands, strict=True):
        emitter.line(f"*{target} = {emitter.scalar(value)};")
    emitter.line("return;")


def map_elementwise(emitter: FunctionEmitter, op: Op) -> None:
    """tt.map_elementwise: `pack` neighbours at once, in the order of the indices; which are neighbours is left open."""
    pack = op.int_attr("pack")
    type_ = op.results[0].type
    flat = (type_.numel,)
    nest = Nest(emitter, flat, [])
    inner = Scope()
    count = type_.numel // pack
    places = [
        reshape_index((Expr(_place(pack, j, count), 1 if count > 1 else 0),), flat, type_.shape)
        for j in range(pack)
    ]
    arguments = [nest.eval(x, at, inner).text for x in op.operands for at in places]
    buffers = [emitter.plan.buffers[r] for r in op.results]
    targets = [f"{emitter.array(b)}[{linear(at, b.strides()).text}]" for b in buffers for at in places]
    statement = call(emitter, op, arguments, targets)
    emitter.open("")
    nest.emit(nest.loop(0, inner, [statement], independent=False, stop=str(count)))
    emitter.close()


def _place(pack: int, j: int, count: int) -> str:
    if count == 1:
        return str(j)
    return "i0" if pack == 1 else f"(i0 * {pack} + {j})"
