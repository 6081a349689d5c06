"""From TTIR to one C file: functions, control flow, and the dispatch over operations.

The C keeps the names of the kernel's source and notes the source line before each statement.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effattn.cpu import (
    blocks,
    calls,
    decompose,
    elementwise,
    extras,
    induction,
    memory,
    models,
    outline,
    regions,
    tile,
)
from effattn.cpu.formats import Unsupported, rounded, splat_literal, value_type
from effattn.cpu.ir import Block, Module, Op, Region, Value, generic_text, parse, walk
from effattn.cpu.launch import SHARED_MEMORY
from effattn.cpu.nest import Nest, compute_into
from effattn.cpu.plan import Buffer, Plan, make_plan, natural
from effattn.cpu.probes import Probes
from effattn.cpu.probes import header as probe_calls
from effattn.cpu.support import UnsupportedKernel, check, kernel_name, refusal
from effattn.errors import RequestError

_KEYWORDS = frozenset(
    re.findall(
        r"\w+",
        """auto break case char const continue default do double else enum extern float for goto if inline int long
        register restrict return short signed sizeof static struct switch typedef union unsigned void volatile while
        asm typeof args arena stop count head unix linux""",
    )
)
#: what the emitter itself names, and what macros of the prelude define for each C type
_OWN_NAMES = re.compile(r"(i\d+|pid_[xyz]|grid_[xyz]|(.*_)?(float|double|u?int\d+_t|b?f\d+|[iu]\d+))$")


@functools.cache
def _prelude() -> tuple[str, frozenset[str]]:
    """The text that every C file starts with, and the functions, macros and types that it defines."""
    text = Path(__file__).with_name("prelude.h").read_text()
    # Instrumented kernels know these names too, and a kernel's own names must not depend on that.
    names = re.findall(
        r"#define (\w+)|\b(\w+)\(|typedef [^;]*?\b(\w+)(?: __attribute__[^;]*)?;",
        text + extras.header() + probe_calls(),
    )
    return text, _KEYWORDS.union(*names)


class FunctionEmitter:
    """Writes the C of one kernel."""

    def __init__(self, function: Op, plan: Plan, probes: Probes | None = None) -> None:
        self.function = function
        #: what an instrumented kernel calls; None for any other
        self.probes = probes
        self.plan = plan
        self.lines: list[str] = []
        self.statics: list[str] = []
        self.depth = 1
        self.taken: set[str] = set()
        self.names: dict[Value, str] = {}
        self.arrays: dict[int, str] = {}
        self.hoisted: list[str] = []
        self.last_comment = ""
        self.multi_block = len(function.regions[0].blocks) > 1
        self.static_names: dict[Value, str] = {}
        #: C types of the scalars that are in scope somewhere
        self.types: dict[str, str] = dict(outline.PROGRAM)
        #: C declarations of the tiles that have a name, by that name
        self.tiles: dict[str, str] = {}
        self.functions: list[str] = []
        #: what such a function does -> its name
        self.meanings: dict[str, str] = {}
        #: operation -> C function of its region, see regions.py
        self.region_functions: dict[Op, str] = {}
        #: where such a function puts its results
        self.returned: list[str] = []
        self.current: Op = function
        #: lines and depth of the kernel's body, while the lines of a group are collected
        self.body: tuple[list[str], int] | None = None

    # -- text

    def line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def open(self, head: str) -> None:
        """Begin a block. One without a head is a group: its statements become a C function of their own."""
        if not head and self.body is None:
            self.body = self.lines, self.depth
            self.lines, self.depth = [], 1
            return
        self.line(f"{head} {{" if head else "{")
        self.depth += 1

    def close(self, tail: str = "") -> None:
        if self.body is not None and self.depth == 1:
            lines = self.lines
            self.lines, self.depth = self.body
            self.body = None
            self.group(lines)
            return
        self.depth -= 1
        self.line("}" + tail)

    def group(self, lines: list[str]) -> None:
        """Make a C function of these lines, and call it."""
        op = self.current
        hint = op.name.split(".", 1)[1]
        # SSA numbers go: `load_k`, not `load_k_17`.
        named = [re.sub(r"_\d+$", "", v.name) for v in (*op.results[:1], *op.operands[:1])]
        name = self.unique("_".join([hint, *[n for n in named if not n[0].isdigit()][:1]]))
        made = outline.group(name, lines, self.types, self.tiles, self.last_comment)
        same = self.meanings.setdefault(made.meaning, name)
        if same == name:
            self.functions += made.definition
        self.line(made.call.replace(f"{name}(", f"{same}(", 1))

    def comment(self, op: Op) -> None:
        loc = op.loc
        if loc.file:
            text = f"{Path(loc.file).name}:{loc.line}"
            if text != self.last_comment:
                self.line(f"// {text.replace('*/', '')}")
                self.last_comment = text

    # -- names

    def local(self, hint: str) -> str:
        """A C identifier made of a name of the IR."""
        name = re.sub(r"\W", "_", hint)
        if not name or name[0].isdigit():
            name = f"v{name}"
        if name in _prelude()[1] or _OWN_NAMES.match(name):
            name += "_"
        return name

    def unique(self, hint: str) -> str:
        base = self.local(hint)
        name, k = base, 1
        while name in self.taken:
            k += 1
            name = f"{base}_v{k}"
        self.taken.add(name)
        return name

    def array(self, buffer: Buffer) -> str:
        name = self.arrays.get(id(buffer))
        if name is None:
            name = self.arrays[id(buffer)] = self.unique(f"t_{buffer.name}")
            self.tiles[name] = _tile(buffer, name)
        return name

    def static_array(self, value: Value, literals: list[str]) -> str:
        name = self.static_names.get(value)
        if name is None:
            name = self.static_names[value] = self.unique(f"k_{value.name}")
            c_type = value_type(value.type.elem)
            self.statics.append(f"static const {c_type} {name}[] = {{{', '.join(literals)}}};")
        return name

    # -- scalars

    def scalar(self, value: Value) -> str:
        name = self.names.get(value)
        if name is not None:
            return name
        op = value.op
        if op is not None and op.name == "arith.constant":
            text = splat_literal(op.attrs["value"], value.type)
            assert text is not None
            return f"({text})" if text.startswith("-") else text
        if op is not None and op.name == "ub.poison":
            return "0"
        raise Unsupported(f"the value %{value.name}, which is used before it is computed")

    def declare(self, value: Value) -> str:
        """A variable that is assigned later."""
        name = self.names.get(value)
        if name is None:
            name = self.names[value] = self.unique(value.name)
            c_type = self.types[name] = value_type(value.type.elem)
            if self.multi_block:
                self.hoisted.append(f"{c_type} {name} = 0;")
            else:
                self.line(f"{c_type} {name} = 0;")
        return name

    def define(self, value: Value, text: str) -> None:
        c_type = value_type(value.type.elem)
        if self.multi_block:
            self.line(f"{self.declare(value)} = {text};")
            return
        name = self.names[value] = self.unique(value.name)
        self.types[name] = c_type
        self.line(f"const {c_type} {name} = {text};")

    # -- blocks and operations

    def block(self, block: Block) -> None:
        for op in block.ops:
            try:
                self.op(op)
            except Unsupported as error:
                raise refusal(self.function, op, error) from error

    def blocks(self, region: Region) -> None:
        """All blocks of a region, with their labels, in a function that has no other region of their names."""
        entry = region.blocks[0]
        for block in region.blocks:
            if block is not entry:
                for arg in block.args:
                    if not arg.type.is_tensor:
                        self.declare(arg)
        for block in region.blocks:
            if block is not entry:
                self.lines.append(f"{block.label}:;")
                self.last_comment = ""
            self.line("{")
            self.depth += 1
            self.block(block)
            self.close()

    def op(self, op: Op) -> None:
        self.current = op
        handler = _HANDLERS.get(op.name)
        if handler is not None:
            self.comment(op)
            handler(self, op)
            return
        if op.name == "arith.constant" or op.name == "ub.poison":
            return
        if op.name in elementwise.RULES:
            self.elementwise(op)
            return
        if op.name in elementwise.VIEWS:
            return
        raise Unsupported(f"the operation {op.name}")

    def elementwise(self, op: Op) -> None:
        result = op.results[0]
        if not result.type.is_tensor:
            self.comment(op)
            operands = [self.scalar(x) for x in op.operands]
            for line in self.probes.division(op, operands[-1]) if self.probes is not None else ():
                self.line(line)
            self.define(result, elementwise.RULES[op.name](op, operands))
            for line in self.probes.scalar_overflow(op, operands) if self.probes is not None else ():
                self.line(line)
            return
        buffer = self.plan.buffers.get(result)
        if buffer is not None:
            self.comment(op)
            compute_into(self, buffer, result, fresh=True)

    def assign(self, target: Value, value: Value, op: Op, index: int) -> None:
        """Copy a yielded value into what it becomes; tensors that were computed in place need nothing."""
        if not target.type.is_tensor:
            self.line(f"{self.names[target]} = {self.scalar(value)};")
            return
        buffer = self.plan.buffers[target]
        if self.plan.buffers.get(value) is buffer:
            return
        compute_into(self, buffer, value, fresh=False)

    def parallel(self, targets: list[Value], values: list[Value], op: Op) -> None:
        """All values first, then all targets: a yield is one parallel assignment."""
        late: list[str] = []
        for i, (target, value) in enumerate(zip(targets, values, strict=True)):
            if target.type.is_tensor and (op, i) in self.plan.staged:
                compute_into(self, self.plan.packs[op, i], value, fresh=False)
        for i, (target, value) in enumerate(zip(targets, values, strict=True)):
            if not target.type.is_tensor:
                text = self.scalar(value)
                if text == self.names[target]:
                    continue
                if any(text == self.names.get(t) for t in targets):
                    temporary = self.unique(f"next_{target.name}")
                    self.line(f"const {value_type(target.type.elem)} {temporary} = {text};")
                    text = temporary
                late.append(f"{self.names[target]} = {text};")
            elif (op, i) not in self.plan.staged:
                self.assign(target, value, op, i)
        for text in late:
            self.line(text)
        for i, target in enumerate(targets):
            if target.type.is_tensor and (op, i) in self.plan.staged:
                source, buffer = self.plan.packs[op, i], self.plan.buffers[target]
                self.copy(source, buffer)

    def copy(self, source: Buffer, target: Buffer) -> None:
        if source.order == target.order:
            self.line(f"__builtin_memcpy({self.array(target)}, {self.array(source)}, {target.bytes});")
            return
        self.open("")
        names = [f"i{a}" for a in target.order]
        for name, axis in zip(names, target.order, strict=True):
            self.open(f"for (long {name} = 0; {name} < {target.type.shape[axis]}; {name}++)")
        at = [" + ".join(f"i{a} * {s}" for a, s in b.strides().items()) for b in (target, source)]
        self.line(f"{self.array(target)}[{at[0]}] = {self.array(source)}[{at[1]}];")
        for _ in names:
            self.close()
        self.close()


# ------------------------------------------------------------------------------------- control flow


def _for(e: FunctionEmitter, op: Op) -> None:
    lower, upper, step = (e.scalar(x) for x in op.operands[:3])
    inits = op.operands[3:]
    induction, *args = op.body.args
    for arg, result, init in zip(args, op.results, inits, strict=True):
        if arg.type.is_tensor:
            e.assign(arg, init, op, 0)
        else:
            name = e.declare(result)
            e.names[arg] = name
            e.line(f"{name} = {e.scalar(init)};")
    counter = e.unique(f"{induction.name}_at")
    c_type = value_type(induction.type.elem)
    cast = "int64_t"
    if op.attrs.get("unsignedCmp", "false") != "false":
        cast = "uint64_t"
        lower, upper, step = (f"(u{c_type}){x}" for x in (lower, upper, step))
    # A 64-bit counter: the last addition of a 32-bit one could wrap.
    e.open(f"for ({cast} {counter} = {lower}; {counter} < {upper}; {counter} += {step})")
    e.line("CHECK_STOP;")
    name = e.names[induction] = e.unique(induction.name)
    e.types[name] = c_type
    e.line(f"const {c_type} {name} = ({c_type}){counter};")
    if e.probes is not None:
        e.line(e.probes.tick(op))
    e.block(op.body)
    e.parallel(args, op.body.terminator.operands, op.body.terminator)
    e.close()


def _if(e: FunctionEmitter, op: Op) -> None:
    for result in op.results:
        if not result.type.is_tensor:
            e.declare(result)
    for i, region in enumerate(op.regions):
        if not region.blocks:
            continue
        e.open(f"if ({e.scalar(op.operands[0])})" if i == 0 else "else")
        body = region.blocks[0]
        e.block(body)
        for k, (result, value) in enumerate(zip(op.results, body.terminator.operands, strict=True)):
            e.assign(result, value, body.terminator, k)
        e.close()


def _while(e: FunctionEmitter, op: Op) -> None:
    before, after = op.regions[0].blocks[0], op.regions[1].blocks[0]
    for arg, init in zip(before.args, op.operands, strict=True):
        if arg.type.is_tensor:
            e.assign(arg, init, op, 0)
        else:
            e.line(f"{e.declare(arg)} = {e.scalar(init)};")
    for arg, result in zip(after.args, op.results, strict=True):
        if not arg.type.is_tensor:
            e.names[arg] = e.declare(result)
    e.open("for (;;)")
    e.line("CHECK_STOP;")
    if e.probes is not None:
        e.line(e.probes.tick(op))
    e.block(before)
    condition, *values = before.terminator.operands
    for k, (arg, value) in enumerate(zip(after.args, values, strict=True)):
        e.assign(arg, value, before.terminator, k)
    e.line(f"if (!{e.scalar(condition)}) break;")
    e.block(after)
    e.parallel(before.args, after.terminator.operands, after.terminator)
    e.close()


def _jump(e: FunctionEmitter, op: Op, label: str, values: list[Value]) -> list[str]:
    target = op.block.region.block(label)
    start = len(e.lines)
    e.parallel(target.args, values, op)
    e.line(f"goto {label};")
    lines = e.lines[start:]
    del e.lines[start:]
    return lines


def _br(e: FunctionEmitter, op: Op) -> None:
    e.lines += _jump(e, op, op.successors[0], op.operands)


def _cond_br(e: FunctionEmitter, op: Op) -> None:
    (condition,), first, second = op.segments()
    e.open(f"if ({e.scalar(condition)})")
    e.lines += _jump(e, op, op.successors[0], first)
    e.close()
    e.lines += _jump(e, op, op.successors[1], second)


def _inlined(e: FunctionEmitter, op: Op) -> None:
    """The body of a function: its blocks jump among themselves, so what they define is declared before them all."""
    for result in op.results:
        if not result.type.is_tensor:
            e.declare(result)
    before, e.multi_block = e.multi_block, True
    e.blocks(op.regions[0])
    e.multi_block = before
    e.lines.append(f"{op.regions[0].blocks[0].label}_end:;")


def _leave(e: FunctionEmitter, op: Op) -> None:
    parent = op.block.region.parent
    assert parent is not None
    for k, (result, value) in enumerate(zip(parent.results, op.operands, strict=True)):
        e.assign(result, value, op, k)
    e.line(f"goto {op.block.region.blocks[0].label}_end;")


def _return(e: FunctionEmitter, op: Op) -> None:
    e.line("return;")


def _program_id(e: FunctionEmitter, op: Op) -> None:
    e.define(op.results[0], f"pid_{'xyz'[op.int_attr('axis')]}")


def _num_programs(e: FunctionEmitter, op: Op) -> None:
    e.define(op.results[0], f"grid_{'xyz'[op.int_attr('axis')]}")


def _unsplat(e: FunctionEmitter, op: Op) -> None:
    source = op.operands[0]
    nest = Nest(e, source.type.shape, ())
    name = e.declare(op.results[0])
    value = nest.eval(source, tuple(nest.index))
    e.open("")
    nest.emit([f"{name} = {value.text};"])
    e.close()


def _nothing(e: FunctionEmitter, op: Op) -> None:
    """Terminators that their parents handle, and hints."""


_HANDLERS: dict[str, Callable[[FunctionEmitter, Op], None]] = {
    "tt.load": memory.load,
    "tt.store": memory.store,
    "tt.dot": tile.dot,
    "tt.reduce": tile.reduce,
    "tt.scan": tile.scan,
    "tt.get_program_id": _program_id,
    "tt.get_num_programs": _num_programs,
    "tt.return": _return,
    "tt.unsplat": _unsplat,
    "scf.for": _for,
    "scf.if": _if,
    "scf.while": _while,
    "scf.yield": _nothing,
    "scf.condition": _nothing,
    "cf.br": _br,
    "cf.cond_br": _cond_br,
    calls.INLINED: _inlined,
    calls.LEAVE: _leave,
    "llvm.intr.assume": _nothing,
    "gpu.barrier": _nothing,  # a program is one thread
    "ttg.barrier": _nothing,
    "tt.grid_dependency_wait": _nothing,  # one launch ends before the next begins
    "tt.grid_dependency_launch_dependents": _nothing,
    **extras.HANDLERS,
}


# ---------------------------------------------------------------------------------------- whole file


def _argument(index: int, value: Value, name: str) -> str:
    type_ = value.type
    c_type = value_type(type_.elem)
    if type_.is_ptr:
        text = f"(char *)args[{index}]"
    elif type_.is_float:
        text = f"((const double *)args)[{index}]"
        if c_type == "float":
            text = rounded(type_.elem, f"(float){text}")
    else:
        text = f"({c_type})args[{index}]"
        if type_.elem == "i1":
            text = f"(uint8_t)(args[{index}] & 1)"
    return f"const {c_type} {name} = {text};"


def kernel_source(
    module: Module, name: str, *, dot_model: str = models.DEFAULT, probes: Probes | None = None
) -> tuple[str, Plan]:
    """The C file of one kernel, and its plan. With `probes` it is instrumented, and they then have its sites."""
    function = module.function(name)
    model = models.get(dot_model)
    try:
        calls.inline(module, function)
    except calls.CallError as error:
        raise refusal(function, error.op, error.error) from error
    for op in walk(function):
        if op.name in ("tt.func", *regions.OWNERS):
            blocks.sort(op)
    check(function, _HANDLERS)
    decompose.rewrite(function, model)
    induction.rewrite(function)
    if probes is not None:
        probes.prepare(function)
    plan = make_plan(function, model)
    e = FunctionEmitter(function, plan, probes)
    entry = function.regions[0].blocks[0]
    arguments: list[str] = []
    for i, arg in enumerate(entry.args):
        variable = e.names[arg] = e.unique(arg.name)
        e.types[variable] = value_type(arg.type.elem)
        arguments.append("    " + _argument(i, arg, variable))
    e.blocks(function.regions[0])
    used = outline.words(e.lines)
    tiles = ["    " + text for name, text in e.tiles.items() if name in used]
    hoisted = ["    " + x for x in e.hoisted]
    safe = re.sub(r"[^\w.]", "_", name)
    source = "\n".join(
        [
            _prelude()[0],
            *([extras.header()] if extras.needed(function) else []),
            *([probe_calls()] if probes is not None else []),
            f"/* ---- kernel {safe} ---- */",
            "",
            *e.statics,
            *e.functions,
            "EXPORT void effattn_kernel(const int64_t *args, int32_t pid_x, int32_t pid_y, int32_t pid_z,",
            "                           int32_t grid_x, int32_t grid_y, int32_t grid_z, char *arena,",
            "                           const int *stop) {",
            *arguments,
            *tiles,
            *hoisted,
            *e.lines,
            "}",
            "",
        ]
    )
    return source, plan


def _tile(buffer: Buffer, name: str) -> str:
    shape = "x".join(map(str, buffer.type.shape))
    axes = "" if buffer.order == natural(buffer.type) else f", axes {buffer.order}"
    return (
        f"{buffer.c_type} *const {name} = __builtin_assume_aligned(arena + {buffer.offset}, 64);"
        f" // {shape} {buffer.type.elem}{axes}"
    )


def entry_name(module: Module) -> str:
    """The kernel of a module: its public function, or its only one."""
    public = [f for f in module.functions if f.attrs.get("sym_visibility") == '"public"'] or module.functions
    if len(public) != 1:
        raise RequestError(f"expected one kernel in the module, found {[kernel_name(f) for f in public]}")
    return kernel_name(public[0])


def to_c(mod: Any, metadata: dict[str, Any], *, checked: bool = False) -> str:
    """The stage `c`: the C file of the module's kernel; notes in `metadata` what a launch needs.

    `checked`: with the calls of the sanitizer.
    """
    module = parse(generic_text(mod))
    name = entry_name(module)
    probes = Probes() if checked else None
    source, plan = kernel_source(module, name, dot_model=metadata["dot_model"], probes=probes)
    metadata["name"] = name
    metadata["shared"] = SHARED_MEMORY
    metadata["cpu_arena"] = plan.arena
    metadata["cpu_arguments"] = [str(a.type) for a in module.function(name).regions[0].blocks[0].args]
    metadata["cpu_probes"] = probes.table() if probes is not None else None
    metadata["cpu_notes"] = tile.notes(module.function(name))
    metadata.setdefault("tensordesc_meta", None)
    metadata.setdefault("global_scratch_size", 0)
    metadata.setdefault("global_scratch_align", 1)
    metadata.setdefault("profile_scratch_size", 0)
    metadata.setdefault("profile_scratch_align", 1)
    return source


__all__ = ["FunctionEmitter", "UnsupportedKernel", "kernel_source", "to_c"]
