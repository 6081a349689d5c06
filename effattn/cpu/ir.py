"""Reader of Triton's IR (TTIR): from a module to plain Python objects.

Why text: Triton's Python bindings give operation names, operands and types, but no float or dense
constants, no array attributes and no successors. The printed module has everything, but its custom assembly
differs between Triton versions. MLIR's *generic* form is uniform,

    %r = "op"(%operands)[^successors] <{properties}> ({regions}) {attributes} : (types) -> types loc(...)

and MLIR's printer falls back to it when a module does not verify. `generic_text` makes the module invalid
on purpose (a function without a terminator), prints it, and checks that the generic form came out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

_SENTINEL = "effattn_unterminated"


class ReadError(Exception):
    """The printed module is not in the form that this reader knows."""


# ---------------------------------------------------------------------------------------------- types


@dataclass(frozen=True)
class Type:
    """A scalar or tensor type. `elem` is the element's spelling: f32, bf16, i1, ptr<f32>, ..."""

    elem: str
    #: None for a scalar, () for a tensor of rank 0
    dims: tuple[int, ...] | None = None

    @property
    def is_tensor(self) -> bool:
        return self.dims is not None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.dims or ()

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    @property
    def is_ptr(self) -> bool:
        return self.elem.startswith("ptr<")

    @property
    def pointee(self) -> str:
        return self.elem[4:-1]

    @property
    def is_float(self) -> bool:
        return self.elem[0] == "f" or self.elem.startswith("bf")

    @property
    def is_int(self) -> bool:
        return self.elem[0] == "i" and self.elem[1:].isdigit()

    @property
    def bits(self) -> int:
        if self.is_ptr or self.elem == "index":
            return 64
        match = re.match(r"(?:i|f|bf)(\d+)", self.elem)
        if match is None:
            raise ReadError(f"type without a width: {self.elem}")
        return int(match.group(1))

    def __str__(self) -> str:
        if self.dims is None:
            return self.elem
        return "tensor<" + "".join(f"{n}x" for n in self.shape) + self.elem + ">"


_TYPES: dict[str, Type] = {}
#: the second part is an address space: a number, or "constant" for a pointer that is only read
_PTR = re.compile(r'!tt\.ptr<(.*?)(?:, (?:\d+|"\w+"))?>$')


def _element(text: str) -> str:
    match = _PTR.match(text)
    if match:
        return f"ptr<{_element(match.group(1))}>"
    return text


def parse_type(text: str) -> Type:
    """`tensor<64x64x!tt.ptr<bf16>>`, `i32`, `!tt.ptr<f32>`, `f8E4M3FN`, ..."""
    found = _TYPES.get(text)
    if found is None:
        if text.startswith("tensor<") and text.endswith(">"):
            body = text[7:-1]
            dims = []
            while match := re.match(r"(\d+)x", body):
                dims.append(int(match.group(1)))
                body = body[match.end() :]
            # An encoding (layout) never appears in TTIR; a trailing one would be after a comma.
            found = Type(_element(body), tuple(dims))
        else:
            found = Type(_element(text))
        _TYPES[text] = found
    return found


# ---------------------------------------------------------------------------------------- IR objects


@dataclass(frozen=True)
class Loc:
    """Where an operation comes from: the source file and line, and the source's name for the value."""

    file: str = ""
    line: int = 0
    name: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "unknown source line"


@dataclass(eq=False)
class Value:
    name: str
    type: Type
    owner: Op | Block
    index: int
    uses: list[tuple[Op, int]] = field(default_factory=list)

    @property
    def op(self) -> Op | None:
        return self.owner if isinstance(self.owner, Op) else None

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


@dataclass(eq=False)
class Op:
    name: str
    operands: list[Value]
    results: list[Value]
    attrs: dict[str, str]
    regions: list[Region]
    successors: list[str]
    loc: Loc
    block: Block

    def int_attr(self, name: str, default: int | None = None) -> int:
        raw = self.attrs.get(name)
        if raw is None:
            if default is None:
                raise ReadError(f"{self.name} has no attribute {name}")
            return default
        if raw in ("true", "false"):
            return int(raw == "true")
        match = re.match(r"-?\d+", raw)
        if match is None:
            raise ReadError(f"{self.name}: attribute {name} = {raw} is not an integer")
        return int(match.group())

    def ints_attr(self, name: str) -> list[int]:
        """An `array<i32: 1, 0>` attribute."""
        raw = self.attrs.get(name, "")
        match = re.fullmatch(r"array<\w+(?:: ?(.*))?>", raw)
        if match is None:
            raise ReadError(f"{self.name}: attribute {name} = {raw!r} is not an array")
        return [int(x) for x in (match.group(1) or "").split(",") if x.strip()]

    def segments(self) -> list[list[Value]]:
        """Operands split by `operandSegmentSizes`."""
        out, at = [], 0
        for size in self.ints_attr("operandSegmentSizes"):
            out.append(self.operands[at : at + size])
            at += size
        return out

    @property
    def body(self) -> Block:
        return self.regions[0].blocks[0]

    def __repr__(self) -> str:
        return f"<{self.name} {self.results} at {self.loc}>"


@dataclass(eq=False)
class Block:
    label: str
    args: list[Value]
    ops: list[Op]
    region: Region

    @property
    def terminator(self) -> Op:
        return self.ops[-1]


@dataclass(eq=False)
class Region:
    blocks: list[Block]
    parent: Op | None

    def block(self, label: str) -> Block:
        for block in self.blocks:
            if block.label == label:
                return block
        raise ReadError(f"no block {label}")


@dataclass
class Module:
    functions: list[Op]

    def function(self, name: str) -> Op:
        for op in self.functions:
            if op.attrs.get("sym_name") == f'"{name}"':
                return op
        raise ReadError(f"the module has no function {name}")

    def walk(self) -> Iterator[Op]:
        for fn in self.functions:
            yield from walk(fn)


def walk(op: Op) -> Iterator[Op]:
    """`op` and everything inside it, in program order."""
    yield op
    for region in op.regions:
        for block in region.blocks:
            for inner in block.ops:
                yield from walk(inner)


# ------------------------------------------------------------------------------------------- printing


def generic_text(mod: Any) -> str:
    """The module in MLIR's generic form, with source locations. Spoils `mod`: nothing may use it after."""
    from triton._C.libtriton import ir

    builder = ir.builder(mod.context)
    fn = builder.get_or_insert_function(mod, _SENTINEL, builder.get_function_ty([], []), "private", False)
    fn.add_entry_block()
    mod.push_back(fn)
    text = str(mod)
    if '"builtin.module"()' not in text:
        raise ReadError(
            "Triton printed its module in custom assembly where the generic form was expected; "
            "this version of Triton is not supported yet (3.6 to 3.9 are)"
        )
    return text


# -------------------------------------------------------------------------------------------- parsing

_OPEN, _CLOSE = "([{<", ")]}>"


def _close(text: str, start: int) -> int:
    """Index just past the bracket that closes the one at `start`; knows strings and arrows."""
    depth, i = 0, start
    while True:
        c = text[i]
        if c == '"':
            i += 1
            while text[i] != '"':
                i += 2 if text[i] == "\\" else 1
        elif c in _OPEN:
            depth += 1
        elif c in _CLOSE and not (c == ">" and text[i - 1] == "-"):
            depth -= 1
            if depth == 0:
                return i + 1
        i += 1


def _split(text: str) -> list[str]:
    """Split at the commas that stand outside every bracket and string."""
    if not any(c in text for c in '([{<"'):
        return [x.strip() for x in text.split(",")] if text.strip() else []
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        c = text[i]
        if c == '"':
            i += 1
            while text[i] != '"':
                i += 2 if text[i] == "\\" else 1
        elif c in _OPEN:
            depth += 1
        elif c in _CLOSE and not (c == ">" and text[i - 1] == "-"):
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
        i += 1
    last = text[start:].strip()
    if last:
        parts.append(last)
    return parts


def _attributes(text: str) -> dict[str, str]:
    out = {}
    for item in _split(text):
        name, eq, value = item.partition(" = ")
        out[name.strip().strip('"')] = value if eq else "true"
    return out


_ESCAPE = re.compile(rb"\\(?:([0-9A-Fa-f]{2})|(.))", re.DOTALL)


def unescaped(text: str) -> str:
    """What stands between the quotes of an MLIR string: a backslash and two hexadecimal digits are a byte of UTF-8."""
    if "\\" not in text:
        return text
    found = _ESCAPE.sub(lambda m: bytes([int(m[1], 16)]) if m[1] else m[2], text.encode())
    return found.decode(errors="replace")


_LOC_LINE = re.compile(r"^(#loc\d*) = loc\((.*)\)$")
_HEAD = re.compile(r'\s*(?:(%[^=]*?) = )?"([\w.$]+)"\(([^)]*)\)')
_RESULT = re.compile(r"%([\w.$-]+)(?::(\d+))?")


class _Locations:
    """Resolves `#loc12`, `loc("f.py":3:1)`, `callsite(... at ...)`, `fused[...]`, names."""

    def __init__(self, text: str) -> None:
        self.raw: dict[str, str] = {}
        self.cache: dict[str, Loc] = {}
        for line in text.splitlines():
            match = _LOC_LINE.match(line)
            if match:
                self.raw[match.group(1)] = match.group(2)

    def get(self, text: str) -> Loc:
        found = self.cache.get(text)
        if found is None:
            self.cache[text] = Loc()  # a cycle cannot happen in a valid module; this ends one anyway
            found = self.cache[text] = self._resolve(text.strip())
        return found

    def _resolve(self, text: str) -> Loc:
        if text.startswith("#loc"):
            return self.get(self.raw.get(text, "unknown"))
        if text.startswith("loc("):
            return self.get(text[4:-1])
        if match := re.match(r'"((?:[^"\\]|\\.)*)":(\d+):\d+', text):
            return Loc(unescaped(match.group(1)), int(match.group(2)))
        if match := re.match(r'"((?:[^"\\]|\\.)*)"(?:\((.*)\))?$', text):
            inner = self.get(match.group(2)) if match.group(2) else Loc()
            return Loc(inner.file, inner.line, unescaped(match.group(1)))
        if text.startswith("callsite("):
            callee, _, caller = text[9:-1].partition(" at ")
            # The user's line is the caller's, unless the callee is the user's own function.
            outer, inner = self.get(caller), self.get(callee)
            library = not inner.file or "/triton/language/" in inner.file
            best = outer if library and outer.file else inner
            return Loc(best.file, best.line, outer.name or inner.name)
        if text.startswith("fused"):
            items = [self.get(x) for x in _split(text[text.index("[") + 1 : text.rindex("]")])]
            return next((x for x in items if x.file), Loc())
        return Loc()


class _Parser:
    def __init__(self, text: str) -> None:
        self.locations = _Locations(text)
        self.lines = [x for x in text.splitlines() if x.strip() and not x.startswith("#")]
        self.at = 0
        self.scopes: list[dict[str, Value]] = [{}]

    # -- values

    def lookup(self, name: str) -> Value:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise ReadError(f"%{name} is used before it is defined")

    def define(self, name: str, type_: Type, owner: Op | Block, index: int) -> Value:
        value = Value(name, type_, owner, index)
        self.scopes[-1][name] = value
        return value

    # -- structure

    def operation(self, block: Block) -> Op:
        line = self.lines[self.at]
        head = _HEAD.match(line)
        if head is None:
            raise ReadError(f"not an operation: {line.strip()[:200]}")
        self.at += 1
        names, op_name, operand_text = head.groups()
        rest = line[head.end() :]
        op = Op(op_name, [], [], {}, [], [], Loc(), block)
        if rest.startswith("["):
            end = _close(rest, 0)
            op.successors = [x.lstrip("^") for x in _split(rest[1 : end - 1])]
            rest = rest[end:]
        rest = rest.lstrip()
        if rest.startswith("<{"):
            end = _close(rest, 0)
            op.attrs.update(_attributes(rest[2 : end - 2]))
            rest = rest[end:].lstrip()
        for token in _split(operand_text):
            op.operands.append(self.lookup(token[1:]))
        if rest.startswith("({"):
            rest = self.regions(op)
        if rest.startswith("{"):
            end = _close(rest, 0)
            op.attrs.update(_attributes(rest[1 : end - 1]))
            rest = rest[end:].lstrip()
        if not rest.startswith(": "):
            raise ReadError(f"no type after {op_name}: {rest[:200]}")
        rest = rest[2:]
        end = _close(rest, 0)
        rest = rest[end:]
        if not rest.startswith(" -> "):
            raise ReadError(f"no result type after {op_name}: {rest[:200]}")
        rest = rest[4:]
        where = rest.rfind(" loc(")
        types = rest if where < 0 else rest[:where]
        if where >= 0:
            op.loc = self.locations.get(rest[where + 5 : -1])
        types = types.strip()
        if types.startswith("("):
            types = types[1:-1]
        result_types = [parse_type(x) for x in _split(types)]
        if names:
            index = 0
            for match in _RESULT.finditer(names):
                name, count = match.group(1), int(match.group(2) or 1)
                for k in range(count):
                    key = f"{name}#{k}" if match.group(2) else name
                    op.results.append(self.define(key, result_types[index], op, index))
                    index += 1
        for position, value in enumerate(op.operands):
            value.uses.append((op, position))
        return op

    def regions(self, op: Op) -> str:
        """Reads `({ ... }, { ... })`; the opening line is consumed. Returns what follows the last `}`."""
        while True:
            region = Region([], op)
            op.regions.append(region)
            self.scopes.append({})
            block: Block | None = None
            while True:
                line = self.lines[self.at].lstrip()
                if line.startswith("}"):
                    break
                if line.startswith("^"):
                    block = self.block_header(line, region)
                    self.at += 1
                    continue
                if block is None:
                    block = Block("bb0", [], [], region)
                    region.blocks.append(block)
                block.ops.append(self.operation(block))
            self.scopes.pop()
            self.at += 1
            if line.startswith("}, {"):
                continue
            if line.startswith("})"):
                return line[2:].lstrip()
            raise ReadError(f"a region ends with {line[:80]}")

    def block_header(self, line: str, region: Region) -> Block:
        label = line[1:].partition(":")[0].partition("(")[0]
        block = Block(label.strip(), [], [], region)
        region.blocks.append(block)
        if "(" in line:
            start = line.index("(")
            end = _close(line, start)
            for i, item in enumerate(_split(line[start + 1 : end - 1])):
                name, _, rest = item.partition(": ")
                where = rest.find(" loc(")
                type_text = rest if where < 0 else rest[:where]
                block.args.append(self.define(name[1:], parse_type(type_text), block, i))
        return block


def parse(text: str) -> Module:
    """Parse a module printed in generic form. Raises ReadError where it is not, or where it ends early."""
    try:
        return _parse(text)
    except IndexError as error:
        raise ReadError("the text of the module ends early") from error


def _parse(text: str) -> Module:
    parser = _Parser(text)
    start = next((i for i, x in enumerate(parser.lines) if x.startswith('"builtin.module"')), None)
    if start is None:
        raise ReadError("the text has no builtin.module in generic form")
    parser.at = start + 1
    functions: list[Op] = []
    top = Block("top", [], [], Region([], None))
    while not parser.lines[parser.at].lstrip().startswith("}"):
        if parser.lines[parser.at].lstrip().startswith("^"):
            parser.at += 1
            continue
        line = parser.lines[parser.at]
        if f'sym_name = "{_SENTINEL}"' in line:
            break
        op = parser.operation(top)
        if op.name == "tt.func":
            functions.append(op)
    return Module(functions)
