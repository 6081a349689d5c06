"""What an instrumented kernel has in its C besides its own work: calls that look at each access before it happens.

A kernel is instrumented only where `effattn.cpu.checks` asks for it (sanitizer.py); without that this module is not used and
the C is the same as ever. Every call names a *site*, an entry of a table that goes with the compiled kernel: what is looked
at, in which line, through which argument. What the calls do is in checks.c.

The argument that an access belongs to is found in the IR, by following its address back through the pointer arithmetic:
an access that leaves one tensor and lands in another is found too. An address that comes from memory belongs to none.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effattn.cpu import calls
from effattn.cpu.formats import memory_size
from effattn.cpu.ir import Op, Value, walk
from effattn.cpu.nest import ZERO, Index, Nest, Scope, reshape_index

#: kinds of sites; checks.c has the same numbers
LOAD, STORE, ATOMIC, OVERFLOW, DIVISION, LOOP = range(6)
#: flags of atomic sites: what the program did before is seen by who comes after; the other way round
RELEASES, ACQUIRES = 1, 2

_RELAXED, _ACQUIRE, _RELEASE, _ACQ_REL = 1, 2, 3, 4  # tt.MemSemantic

_DIVISIONS = frozenset({"arith.divsi", "arith.remsi", "arith.divui", "arith.remui"})
#: exact values, in 64 bits, of the operations whose 32-bit results may wrap
_EXACT = {
    "arith.addi": "(int64_t){a} + {b}",
    "arith.subi": "(int64_t){a} - {b}",
    "arith.muli": "(int64_t){a} * {b}",
    "arith.shli": "(int64_t){a} << ({b} & 31)",
}
#: The same where the result is used as an unsigned number, of C type {U}. Differences are left alone: they may be negative
#: for a while, and one that still is at the address is far outside of the tensor.
_EXACT_UNSIGNED = {
    "arith.addi": "EFFATTN_SUM({U}, {a}, {b})",
    "arith.muli": "(int64_t)((uint64_t)({U}){a} * ({U}){b})",
    "arith.shli": "(int64_t)(uint64_t)({U}){a} << ({b} & 31)",
}
_SYMBOL = {"arith.addi": "+", "arith.subi": "-", "arith.muli": "*", "arith.shli": "<<"}
#: what an offset goes through on its way to an address without becoming another number. No select: the arm that is not
#: taken may be anything.
_THROUGH = frozenset(
    {
        "arith.extsi",
        "arith.extui",
        "arith.index_cast",
        "tt.splat",
        "tt.broadcast",
        "tt.expand_dims",
        "tt.trans",
        "tt.reshape",
    }
)
_POINTER_VIEWS = frozenset(
    {"tt.splat", "tt.broadcast", "tt.expand_dims", "tt.trans", "tt.reshape", "tt.bitcast", "tt.unsplat"}
)


#: what leaves a number as it is, or rounds it
_MOVES = frozenset(
    {
        *_POINTER_VIEWS, "tt.store", "tt.join", "tt.split", "tt.cat", "tt.gather", "arith.select", "arith.extf", "arith.truncf",
        "tt.fp_to_fp", "arith.bitcast", "scf.for", "scf.if", "scf.yield",
    }
)  # fmt: skip
#: what has a function of its own for elements
_COMBINING = frozenset({"tt.reduce", "tt.scan", "tt.map_elementwise"})


def header() -> str:
    """The declarations that instrumented kernels start with."""
    return Path(__file__).with_name("checks.h").read_text()


@dataclass(frozen=True)
class Site:
    """One place of a kernel that is looked at."""

    kind: int
    file: str
    line: int
    #: slot of the argument whose tensor is accessed; -1 where the address comes from somewhere else
    base: int = -1
    #: bytes of an element
    size: int = 0
    #: of atomic sites RELEASES and ACQUIRES; of overflows 1 where the number is used as an unsigned one
    flags: int = 0
    #: what is done there, in the IR's words: "tt.load", "*"
    what: str = ""
    #: slots of the arguments between which the address is chosen, where there are several
    choice: tuple[int, ...] = ()

    def row(self) -> list[Any]:
        return [
            self.kind,
            self.file,
            self.line,
            self.base,
            self.size,
            self.flags,
            self.what,
            list(self.choice),
        ]

    @property
    def slots(self) -> tuple[int, ...]:
        """Slots of all arguments that it may access; empty where that is not known."""
        return (self.base,) if self.base >= 0 else self.choice


def moved(table: dict[str, Any], now: Mapping[str, str]) -> dict[str, Any]:
    """The table with the files where they are now, given the path of each name."""
    sites = [[kind, now.get(os.path.basename(file), file), *rest] for kind, file, *rest in table["sites"]]
    places = {
        name: [[now.get(os.path.basename(file), file), line] for file, line in table[name]]
        for name in ("undefined", "float_atomics")
    }
    return {**table, "sites": sites, **places}


class Probes:
    """The sites of one kernel, and the C of the calls."""

    function: Op

    def __init__(self) -> None:
        self.sites: list[Site] = []
        self._known: dict[tuple[Op, int], int] = {}
        self._origins: dict[Value, tuple[int, ...]] = {}
        #: operations whose wrapped results would reach an address -> slot of the argument that is addressed, and whether
        #: the result is used as an unsigned number
        self._offsets: dict[Op, tuple[int, bool]] = {}

    def prepare(self, function: Op) -> None:
        """Find what reaches addresses; after the last rewriting of the IR, before anything is emitted."""
        self.function = function
        for op in walk(self.function):
            if op.name == "tt.addptr":
                self._collect(op.operands[1], self.base(op.operands[0]), False, set())

    # -- analysis

    def origins(self, pointer: Value) -> tuple[int, ...]:
        """Slots of the arguments that an address may be made from; -1 among them for an address from memory."""
        found = self._origins.get(pointer)
        if found is None:
            slots: set[int] = set()
            todo, seen = [pointer], set[Value]()
            while todo:
                value = todo.pop()
                if value not in seen:
                    seen.add(value)
                    sources = self._sources(value)
                    if isinstance(sources, list):
                        todo += sources
                    else:
                        slots.add(-1 if sources is None else sources)
            found = self._origins[pointer] = tuple(sorted(slots))
        return found

    def base(self, pointer: Value) -> int:
        """Slot of the argument that an address is made from; -1 where that is not one argument."""
        found = self.origins(pointer)
        return found[0] if len(found) == 1 else -1

    def _sources(self, value: Value) -> list[Value] | int | None:
        """The pointers that a pointer is made from; a slot for an argument of the kernel; None for anything else."""
        op = value.op
        if op is None:
            return self._sources_of_argument(value)
        if op.name == "tt.addptr" or op.name in _POINTER_VIEWS:
            source = op.operands[0]
            return [source] if source.type.is_ptr else None
        if op.name == "arith.select":
            return op.operands[1:]
        if op.name == "scf.for":
            return [op.operands[3 + value.index], op.body.terminator.operands[value.index]]
        if op.name == "scf.if":
            return [r.blocks[0].terminator.operands[value.index] for r in op.regions if r.blocks]
        if op.name == "scf.while":
            return [op.regions[0].blocks[0].terminator.operands[1 + value.index]]
        if op.name == calls.INLINED:
            ends = [b.terminator for b in op.regions[0].blocks if b.terminator.name == calls.LEAVE]
            return [end.operands[value.index] for end in ends]
        return None

    def _sources_of_argument(self, value: Value) -> list[Value] | int | None:
        block = value.owner
        assert not isinstance(block, Op)
        parent = block.region.parent
        if parent is self.function:
            return value.index if block is self.function.regions[0].blocks[0] else None
        if parent is None:
            return None
        if parent.name == "scf.for" and value.index > 0:
            return [parent.operands[2 + value.index], parent.body.terminator.operands[value.index - 1]]
        if parent.name == "scf.while":
            if block is parent.regions[0].blocks[0]:
                end = parent.regions[1].blocks[0].terminator
                return [parent.operands[value.index], end.operands[value.index]]
            return [parent.regions[0].blocks[0].terminator.operands[1 + value.index]]
        if parent.name == "tt.map_elementwise" and block is parent.body:
            return [parent.operands[value.index // parent.int_attr("pack")]]
        return None

    def _collect(self, value: Value, base: int, unsigned: bool, seen: set[Value]) -> None:
        if value in seen or not value.type.is_int or value.type.bits == 1:
            return
        seen.add(value)
        op = value.op
        if op is None:
            sources = self._sources_of_argument(value)
            for source in sources if isinstance(sources, list) else []:
                self._collect(source, base, unsigned, seen)
            return
        if op.name in _EXACT:
            if value.type.bits < 64 and not (unsigned and op.name not in _EXACT_UNSIGNED):
                self._offsets.setdefault(op, (base, unsigned))
            inputs = op.operands if op.name != "arith.shli" else op.operands[:1]
        elif op.name in ("scf.for", "scf.if", "scf.while", calls.INLINED):
            inputs = self._sources(value) or []
            assert not isinstance(inputs, int)
        elif op.name in _THROUGH:
            inputs = op.operands[:1]
            if op.name in ("arith.extsi", "arith.extui"):
                unsigned = op.name == "arith.extui"
        else:
            return
        for source in inputs:
            self._collect(source, base, unsigned, seen)

    # -- sites

    def _site(
        self,
        op: Op,
        kind: int,
        *,
        base: int = -1,
        size: int = 0,
        flags: int = 0,
        what: str = "",
        choice: tuple[int, ...] = (),
    ) -> int:
        key = (op, kind)
        if key not in self._known:
            self._known[key] = len(self.sites)
            self.sites.append(
                Site(kind, op.loc.file, op.loc.line, base, size, flags, what or op.name, choice)
            )
        return self._known[key]

    def access(self, op: Op) -> int:
        """The site of a load, a store or an atomic operation."""
        pointer = op.operands[0]
        kind = {"tt.load": LOAD, "tt.store": STORE}.get(op.name, ATOMIC)
        flags = 0
        if kind == ATOMIC:
            sem = op.int_attr("sem", _ACQ_REL)
            # A result that nobody looks at orders nothing: another order of the programs would do as well.
            waits = any(result.uses for result in op.results)
            flags = RELEASES * (sem in (_RELEASE, _ACQ_REL)) | ACQUIRES * (
                sem in (_ACQUIRE, _ACQ_REL) and waits
            )
        size = memory_size(pointer.type.pointee)
        origins = self.origins(pointer)
        choice = origins if len(origins) > 1 and -1 not in origins else ()
        return self._site(op, kind, base=self.base(pointer), size=size, flags=flags, choice=choice)

    def table(self) -> dict[str, Any]:
        """What a launch needs to know, for the kernel's metadata."""
        loads = [op for op in walk(self.function) if op.name == "tt.load"]
        undefined = [op for op in loads if [len(group) for group in op.segments()] == [1, 1, 0]]
        return {
            "sites": [site.row() for site in self.sites],
            "undefined": [[op.loc.file, op.loc.line] for op in undefined],
            **self._reached(undefined),
            "float_atomics": [
                [op.loc.file, op.loc.line]
                for op in walk(self.function)
                if op.name == "tt.atomic_rmw" and op.operands[1].type.is_float
            ],
        }

    def _reached(self, undefined: list[Op]) -> dict[str, bool]:
        """What becomes of undefined elements.

        steered: they may decide where something is stored, and not only what. computed: numbers are computed from them,
        so two values may give the same. ordered: one is compared with another, so a small one may matter. divided: integers
        are divided by them.
        """
        todo = [result for op in undefined for result in op.results]
        seen: set[Value] = set()
        names: set[str] = set()
        steered = False
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            for user, position in value.uses:
                names.add(user.name)
                if user.name in _COMBINING:
                    names.update(inner.name for inner in walk(user))
                if user.name == "tt.store":
                    steered |= position != 1
                elif user.name == "scf.yield":
                    parent = user.block.region.parent
                    if parent is None or parent.name not in ("scf.for", "scf.if"):
                        steered = True
                        continue
                    todo.append(parent.results[position])
                    if parent.name == "scf.for":
                        todo.append(parent.body.args[1 + position])
                elif user.name == "scf.for" and position >= 3:
                    todo += [user.results[position - 3], user.body.args[position - 2]]
                elif user.name.startswith(("scf.", "cf.", "tt.atomic")) or user.successors:
                    steered = True
                else:
                    todo += user.results
        return {
            "steered": steered,
            "computed": steered or not names <= _MOVES,
            "ordered": steered or any("cmp" in name or "min" in name for name in names),
            "divided": not names.isdisjoint(_DIVISIONS),
        }

    # -- C

    def row(self, op: Op, first: str, step: int | str, count: int | str) -> str:
        """Look at `count` elements, `step` bytes apart."""
        return f"effattn_access({self.access(op)}, {first}, {step}, {count});"

    def element(self, op: Op, pointer: str) -> str:
        return self.row(op, pointer, 0, 1)

    def fill(self, elem: str) -> str:
        """What a masked-off element of a load without `other` holds."""
        if elem.startswith("ptr<"):
            return "(char *)effattn_fill_int"
        if elem == "i1":
            return "(uint8_t)(effattn_fill_int & 1)"
        if elem.startswith("f8"):
            return "effattn_fill_eighth"
        if elem[0] not in "fb":
            return "effattn_fill_int"
        return "effattn_fill_half" if elem == "f16" else "effattn_fill_float"

    def tick(self, op: Op) -> str:
        return f"EFFATTN_TICK({self._site(op, LOOP)});"

    def division(self, op: Op, divisor: str) -> list[str]:
        """Before a division: look at the divisor."""
        if op.name not in _DIVISIONS:
            return []
        what = "%" if "rem" in op.name else "//"
        return [f"if ({divisor} == 0) effattn_fault({self._site(op, DIVISION, what=what)}, 0);"]

    def scalar_overflow(self, op: Op, operands: list[str]) -> list[str]:
        """After a scalar operation that reaches an address."""
        return [self._overflow(op, operands)] if op in self._offsets else []

    def _overflow(self, op: Op, operands: list[str]) -> str:
        base, unsigned = self._offsets[op]
        site = self._site(op, OVERFLOW, base=base, flags=int(unsigned), what=_SYMBOL[op.name])
        bits = op.results[0].type.bits
        forms = _EXACT_UNSIGNED if unsigned else _EXACT
        exact = forms[op.name].format(a=operands[0], b=operands[1], U=f"uint{bits}_t")
        return f"EFFATTN_FITS({'u' * unsigned}int{bits}_t, {site}, {exact});"

    def tensor_overflow(self, nest: Nest, pointer: Value, index: Index, inner: Scope) -> list[str]:
        """For one element of a tensor of addresses: whether the integers that it is computed from have wrapped.

        `inner` gets the values that are needed first.
        """
        lines = []
        for op, at in self._operations(nest, pointer, index):
            operands = [nest.eval(x, at, inner).text for x in op.operands]
            lines.append(self._overflow(op, operands))
        return list(dict.fromkeys(lines))

    def _operations(self, nest: Nest, value: Value, index: Index) -> Iterator[tuple[Op, Index]]:
        """The operations of virtual tensors behind an element, each with the index that it is needed at."""
        op = value.op
        if not value.type.is_tensor or op is None or nest.emitter.plan.kept(value):
            return
        name = op.name
        if name == "tt.splat" or not op.operands:
            return
        source = op.operands[0]
        if name == "tt.broadcast":
            index = tuple(ZERO if n == 1 else i for i, n in zip(index, source.type.shape, strict=True))
        elif name == "tt.expand_dims":
            gone = op.int_attr("axis")
            index = index[:gone] + index[gone + 1 :]
        elif name == "tt.trans":
            moved = [ZERO] * len(index)
            for axis, source_axis in enumerate(op.ints_attr("order")):
                moved[source_axis] = index[axis]
            index = tuple(moved)
        elif name == "tt.reshape":
            index = reshape_index(index, value.type.shape, source.type.shape)
        elif name not in _THROUGH and name not in _EXACT and name != "tt.addptr":
            return
        for operand in op.operands:
            yield from self._operations(nest, operand, index)
        if op in self._offsets:
            yield op, index
