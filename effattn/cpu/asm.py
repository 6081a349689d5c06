"""Inline assembly: PTX instructions of arithmetic, translated to C.

A register is its bits in an unsigned integer of its width; an instruction reads them as its own type says. What PTX leaves
to an approximation (`ex2.approx`, `rcp.approx`, ...) gives the accurate result; `.ftz` flushes subnormals as told.
A program is one thread, so barriers are nothing and fences order the memory of the host. Accesses to memory, branches and
everything that looks at other threads are refused, by name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from effattn.cpu.atomics import rows
from effattn.cpu.formats import Unsupported, value_type
from effattn.cpu.ir import Op, Value, unescaped
from effattn.cpu.nest import Expr, Index, Scope, linear

if TYPE_CHECKING:
    from effattn.cpu.lower import FunctionEmitter

_WIDTH = {"pred": 8, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16, "b32": 32, "u32": 32,
          "s32": 32, "f32": 32, "f16x2": 32, "bf16x2": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64}  # fmt: skip
#: letters of constraints; n is a number known when the kernel is compiled
_CONSTRAINT = frozenset("hrfldcbn")
#: instructions that hold threads until others have come to the same place, or wait for another launch
_WAITS = ("bar", "barrier", "griddepcontrol", "nanosleep")
_FENCES = ("fence", "membar")
#: what PTX calls special registers -> C
_SPECIAL = {
    "%clock": "(uint32_t)host_ns()",
    "%clock64": "host_ns()",
    "%globaltimer": "host_ns()",
    "%globaltimer_lo": "(uint32_t)host_ns()",
    "%globaltimer_hi": "(uint32_t)(host_ns() >> 32)",
    # Told as one multiprocessor that runs every program.
    "%smid": "0u",
    "%nsmid": "1u",
}
#: type -> (read a register, write a register)
_FLOAT = {
    "f32": ("f32_of((uint32_t){})", "bits_of({})"),
    "f64": ("f64_of({})", "bits64_of({})"),
    "f16": ("f16_load((uint16_t){})", "f16_store(round_f16({}))"),
    "bf16": ("bf16_load((uint16_t){})", "bf16_store(round_bf16({}))"),
}
_COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
#: formats that come in pairs -> bits of one
_BITS = {"f16": 16, "bf16": 16, "e4m3": 8, "e5m2": 8, "e2m1": 4}
_DIRECTION = {"rn": "rn", "rz": "rz", "rm": "rd", "rp": "ru"}


def _unsigned(bits: int) -> str:
    return f"uint{bits}_t"


def _int(type_: str) -> str:
    return f"{'int' if type_[0] == 's' else 'uint'}{_WIDTH[type_]}_t"


class Translator:
    """One string of PTX as C statements. `operands[i]` is the C lvalue that stands for $i."""

    def __init__(self, text: str, operands: list[str]) -> None:
        self.operands = operands
        self.lines: list[str] = []
        self.declared: set[str] = set()
        # Also as LLVM's own assembler reads what is between quotes: \n and \t that Python left alone.
        text = text.replace("\\n", "\n").replace("\\t", " ")
        text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
        self.statements(text)

    def statements(self, text: str) -> None:
        for part in re.findall(r"[^;]+", self.braces(text)):
            statement = part.strip()
            while statement[:1] in ("\x01", "\x02"):
                self.lines.append("{" if statement[0] == "\x01" else "}")
                statement = statement[1:].strip()
            if statement:
                self.statement(statement)

    @staticmethod
    def braces(text: str) -> str:
        """Scopes marked apart from the braces of vector operands, which hold no statements."""
        out, kinds = [], []
        for i, c in enumerate(text):
            if c == "{":
                inside = text[i + 1 : text.index("}", i)] if "}" in text[i:] else ""
                scope = ";" in inside
                kinds.append(scope)
                out.append("\x01;" if scope else c)
            elif c == "}":
                scope = kinds.pop() if kinds else True
                out.append(";\x02;" if scope else c)
            else:
                out.append(c)
        return "".join(out)

    # -- operands

    def operand(self, token: str, type_: str) -> str:
        """The bits of an operand, as an unsigned integer at least as wide as its type."""
        if match := re.fullmatch(r"\$\{?(\d+)\}?", token):
            return self.operands[int(match.group(1))]
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", token):
            return f"(uint32_t)0x{match.group(1)}u"
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", token):
            return f"(uint64_t)0x{match.group(1)}u"
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)[uU]?", token):
            value = int(token.rstrip("uU"), 0)
            if type_ in ("f32", "f64"):
                return self.write(type_, f"{float(value)!r}")
            bits = max(_WIDTH[type_], 32)
            return f"({_unsigned(bits)})UINT64_C({value % (1 << 64)})"
        if re.fullmatch(r"-?\d*\.\d*([eE][-+]?\d+)?", token) and type_ in ("f32", "f64"):
            return self.write(type_, f"({token})")
        if token in _SPECIAL:
            return _SPECIAL[token]
        if re.fullmatch(r"%?[A-Za-z_$][\w$]*", token) and self.register(token) in self.declared:
            return self.register(token)
        raise Unsupported(f"inline assembly with the operand {token}")

    @staticmethod
    def register(token: str) -> str:
        return "ptx_" + re.sub(r"\W", "_", token.lstrip("%"))

    def read(self, type_: str, token: str) -> str:
        negative = token.startswith("-") and type_ in _FLOAT and not re.match(r"-[\d.]", token)
        bits = self.operand(token[1:] if negative else token, type_)
        if type_ in _FLOAT:
            return ("-" if negative else "") + _FLOAT[type_][0].format(bits)
        return f"({_int(type_)})({bits})"

    def write(self, type_: str, value: str) -> str:
        if type_ in _FLOAT:
            carrier = "double" if type_ == "f64" else "float"
            return _FLOAT[type_][1].format(f"({carrier})({value})")
        return f"({_unsigned(_WIDTH[type_])})({value})"

    def vector(self, token: str) -> list[str]:
        return [x.strip() for x in token.strip("{}").split(",")]

    # -- statements

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self.declare(text)
            return
        guard = ""
        if match := re.match(r"@(!?)(%?[\w$]+|\$\d+)\s+", text):
            guard = f"if ({match.group(1)}({self.operand(match.group(2), 'pred')})) "
            text = text[match.end() :]
        name, _, rest = text.partition(" ")
        if rest == "" and "\t" in text:
            name, _, rest = text.partition("\t")
        tokens = [x.strip() for x in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if x.strip()]
        self.lines.append(f"{guard}{{ {self.instruction(name, tokens)} }}")

    def declare(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        if match is None or match.group(1) not in _WIDTH:
            raise Unsupported(f"inline assembly with the declaration {text!r}")
        for name in match.group(2).split(","):
            name = name.strip()
            several = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
            names = [f"{several.group(1)}{i}" for i in range(int(several.group(2)))] if several else [name]
            for one in names:
                self.declared.add(self.register(one))
                self.lines.append(f"{_unsigned(_WIDTH[match.group(1)])} {self.register(one)} = 0;")

    def instruction(self, name: str, tokens: list[str]) -> str:
        opcode, *mods = name.split(".")
        handler = getattr(self, f"op_{opcode}", None) or (self.simple if opcode in _SIMPLE else None)
        if opcode in _WAITS and "red" not in mods:
            return ""
        if opcode in _FENCES:
            return "__atomic_thread_fence(ATOMIC);"
        if handler is None or not mods:
            raise Unsupported(f"the PTX instruction {name} in inline assembly")
        try:
            return handler(opcode, mods, tokens)
        except (KeyError, IndexError, ValueError) as error:
            raise Unsupported(f"the PTX instruction {name} in inline assembly") from error

    def set(self, token: str, bits: str) -> str:
        return f"{self.operand(token, 'b32')} = {bits};"

    def simple(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        """An instruction that is one expression of its sources, in its own type, once or in both halves of a register."""
        type_ = mods[-1]
        target, *sources = tokens
        if type_ in ("f16x2", "bf16x2"):
            half = type_[:-2]
            parts = [
                self.value(
                    opcode,
                    mods,
                    half,
                    [_FLOAT[half][0].format(f"({self.operand(s, type_)} >> {16 * h})") for s in sources],
                )
                for h in (0, 1)
            ]
            low, high = (f"(uint32_t){self.write(half, p)}" for p in parts)
            return self.set(target, f"{low} | {high} << 16")
        if "ftz" in mods and type_ == "f32":
            values = [f"FLUSH({self.read(type_, s)})" for s in sources]
        else:
            values = [self.read(type_, s) for s in sources]
        return self.set(target, self.write(type_, self.value(opcode, mods, type_, values)))

    def value(self, opcode: str, mods: list[str], type_: str, a: list[str]) -> str:
        kinds = _SIMPLE[opcode]
        kind = "float" if type_ in _FLOAT else "int" if type_[0] in "us" else "bits"
        form = kinds.get(kind) or kinds.get("int" if kind == "bits" else "bits" if kind == "int" else "")
        if form is None:
            raise KeyError(type_)
        direction = next((m for m in mods if m in _DIRECTION), "rn")
        if direction != "rn":
            if type_ not in ("f32", "f64") or opcode not in _DIRECTED:
                raise KeyError(direction)
            letter, one = ("f", "1.0f") if type_ == "f32" else ("d", "1.0")
            helper = f"{letter}{_DIRECTED[opcode]}_{_DIRECTION[direction]}"
            arguments = [one, *a] if opcode == "rcp" else a
            text = f"{helper}({', '.join([*arguments, '0', '0'][:3])})"
        else:
            suffix = "" if type_ == "f64" else "f"
            text = form.format(*a, f=suffix, T=_int(type_) if kind != "float" else "", w=_WIDTH[type_])
        if type_ in ("f16", "bf16") and opcode == "fma":
            text = f"f64_to_{type_}(fma_odd({', '.join(a)}))"
        if "sat" in mods:
            if kind != "float":
                raise KeyError("sat")
            text = f"SATURATE({text})"
        if "relu" in mods:
            text = f"RELU({text})"
        return f"FLUSH({text})" if "ftz" in mods and type_ == "f32" else text

    # -- instructions with a form of their own

    def op_mov(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        width = _WIDTH[mods[-1]]
        target, source = tokens
        if target.startswith("{"):
            names = self.vector(target)
            part = width // len(names)
            bits = self.operand(source, mods[-1])
            return " ".join(
                self.set(n, f"({_unsigned(part)})({bits} >> {i * part})")
                for i, n in enumerate(names)
                if n != "_"
            )
        if source.startswith("{"):
            names = self.vector(source)
            part, whole = width // len(names), _unsigned(width)
            bits = " | ".join(
                f"({whole})({_unsigned(part)}){self.operand(n, 'b32')} << {i * part}"
                for i, n in enumerate(names)
            )
            return self.set(target, bits)
        return self.set(target, self.operand(source, mods[-1]))

    def op_mul(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        return self._multiply(opcode, mods, tokens)

    def op_mad(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        if mods[-1] in _FLOAT:
            return self.simple("fma", mods, tokens)
        return self._multiply(opcode, mods, tokens)

    def _multiply(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        type_ = mods[-1]
        if type_ in _FLOAT or type_.endswith("x2"):
            return self.simple(opcode, mods, tokens)
        part, bits = mods[0], _WIDTH[type_]
        signed = type_[0] == "s"
        wide = {16: "int32_t", 32: "int64_t", 64: "__int128"}[bits]
        wide = wide if signed else "unsigned __int128" if bits == 64 else f"u{wide}"
        product = f"({wide}){self.read(type_, tokens[1])} * ({wide}){self.read(type_, tokens[2])}"
        if part == "wide":
            result, out = product, bits * 2
        elif part == "hi":
            result, out = f"({product}) >> {bits}", bits
        elif part == "lo":
            result, out = product, bits
        else:
            raise KeyError(part)
        if opcode == "mad":
            third = f"{type_[0]}{out}"
            result = f"({result}) + {self.read(third, tokens[3])}"
        return self.set(tokens[0], f"({_unsigned(out)})({result})")

    def op_setp(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        relation, type_ = mods[0], mods[-1]
        combine = next((m for m in mods[1:-1] if m in ("and", "or", "xor")), None)
        a, b = (self.read(type_, t) for t in tokens[1:3])
        if "ftz" in mods:
            a, b = f"FLUSH({a})", f"FLUSH({b})"
        if relation in ("num", "nan"):
            text = f"({a} == {a} && {b} == {b})" if relation == "num" else f"({a} != {a} || {b} != {b})"
        elif type_ in _FLOAT and relation.endswith("u") and relation[:-1] in _COMPARE:
            text = f"({a} {_COMPARE[relation[:-1]]} {b} || {a} != {a} || {b} != {b})"
        elif type_ in _FLOAT and relation == "ne":
            text = f"({a} < {b} || {a} > {b})"
        else:
            text = f"({a} {_COMPARE[relation]} {b})"
        targets = tokens[0].split("|")
        third = "1"
        if combine:
            token = tokens[3]
            third = (
                f"!{self.operand(token[1:], 'pred')}"
                if token.startswith("!")
                else f"!!{self.operand(token, 'pred')}"
            )
        sign = {"and": "&", "or": "|", "xor": "^", None: "&"}[combine]
        lines = [self.set(targets[0].strip(), f"({text}) {sign} {third}")]
        if len(targets) > 1:
            lines.append(self.set(targets[1].strip(), f"(!({text})) {sign} {third}"))
        return " ".join(lines)

    def op_selp(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        target, a, b, p = tokens
        type_ = mods[-1]
        return self.set(
            target, f"{self.operand(p, 'pred')} ? {self.operand(a, type_)} : {self.operand(b, type_)}"
        )

    def op_cvt(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        source, target = mods[-1], mods[-2]
        flags = set(mods[:-2])
        if target.endswith("x2") or source.endswith("x2"):
            return self._convert_pairs(target, source, flags, tokens)
        x = self.read(source, tokens[1])
        if "ftz" in flags and source == "f32":
            x = f"FLUSH({x})"
        whole = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}
        if source in _FLOAT and target not in _FLOAT:
            mode = next(m for m in flags if m in whole)
            return self.set(tokens[0], f"({_int(target)})fptosi_{'i' if target[0] == 's' else 'u'}{_WIDTH[target]}"
                                       f"(__builtin_{whole[mode]}((double){x}))")  # fmt: skip
        if source in _FLOAT:
            mode = next((m for m in flags if m in whole), None)
            if mode is not None:
                x = f"__builtin_{whole[mode]}((double){x})"
            direction = _DIRECTION[next((m for m in flags if m in _DIRECTION), "rn")]
            if target in ("f16", "bf16"):
                if direction != "rn":
                    raise KeyError(direction)
                x = f"f64_to_{target}({x})" if source == "f64" else x
            elif (source, target) == ("f64", "f32"):
                x = f"double2float_{direction}({x}, 0, 0)"
        elif target in _FLOAT:
            direction = _DIRECTION[next((m for m in flags if m in _DIRECTION), "rn")]
            helper = "ll" if source[0] == "s" else "ull"
            if target in ("f16", "bf16"):
                x = f"f64_to_{target}({'i' if source[0] == 's' else 'u'}64_odd({x}))"
            else:
                x = f"{helper}2{'float' if target == 'f32' else 'double'}_{direction}({x}, 0, 0)"
        elif "sat" in flags:
            low, high = (
                (0, (1 << _WIDTH[target]) - 1)
                if target[0] != "s"
                else (-(1 << _WIDTH[target] - 1), (1 << _WIDTH[target] - 1) - 1)
            )
            x = f"({x} < {low} ? {low} : {x} > INT64_C({high}) ? INT64_C({high}) : {x})"
        if "sat" in flags and target in _FLOAT:
            x = f"SATURATE({x})"
        return self.set(tokens[0], self.write(target, x))

    def _convert_pairs(self, target: str, source: str, flags: set[str], tokens: list[str]) -> str:
        """Two values in one register: the first source is the upper half."""
        from effattn.cpu import fp8

        if "rs" in flags:
            raise KeyError("rs")
        kinds = {**{k: v for k, v in _FLOAT.items() if k in ("f16", "bf16")}, **fp8.PTX}
        if source == "f32":
            kind = target.removesuffix("x2")
            _, store = kinds[kind]
            bits = _BITS[kind]
            high, low = (self.read("f32", t) for t in tokens[1:3])
            if "relu" in flags:
                high, low = f"RELU({high})", f"RELU({low})"
            return self.set(
                tokens[0], f"(uint32_t){store.format(low)} | (uint32_t){store.format(high)} << {bits}"
            )
        from_, to = source.removesuffix("x2"), target.removesuffix("x2")
        (load, _), (_, store) = kinds[from_], kinds[to]
        size, out = _BITS[from_], _BITS[to]
        bits = self.operand(tokens[1], "b32")
        low, high = (store.format(load.format(f"({bits} >> {h * size})")) for h in (0, 1))
        return self.set(tokens[0], f"(uint32_t){low} | (uint32_t){high} << {out}")

    def op_prmt(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        if mods != ["b32"]:
            raise KeyError(mods)
        return self.set(
            tokens[0], "byte_permute({}, {}, {})".format(*(self.operand(t, "b32") for t in tokens[1:4]))
        )

    def op_lop3(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        if mods != ["b32"]:
            raise KeyError(mods)
        return self.set(
            tokens[0], "logic3({}, {}, {}, {})".format(*(self.operand(t, "b32") for t in tokens[1:5]))
        )

    def op_bfe(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        if _WIDTH[mods[-1]] != 32:
            raise KeyError(mods)
        a, b, c = (self.operand(t, "b32") for t in tokens[1:4])
        return self.set(tokens[0], f"bit_field({a}, {b}, {c}, {int(mods[-1][0] == 's')})")

    def op_fns(self, opcode: str, mods: list[str], tokens: list[str]) -> str:
        a, b, c = (self.operand(t, "b32") for t in tokens[1:4])
        return self.set(tokens[0], f"find_nth_set({a}, {b}, (int32_t){c})")


#: opcode -> its value as C, for floats, integers (T: the type) and bits
_SIMPLE: dict[str, dict[str, str]] = {
    "add": {"float": "{0} + {1}", "int": "({T})({0} + {1})"},
    "sub": {"float": "{0} - {1}", "int": "({T})({0} - {1})"},
    "mul": {"float": "{0} * {1}"},
    "fma": {"float": "__builtin_fma{f}({0}, {1}, {2})"},
    "div": {"float": "{0} / {1}", "int": "({1} == 0 ? ({T})-1 : ({T})({0} / {1}))"},
    "rem": {"int": "({1} == 0 ? {0} : ({T})({0} % {1}))"},
    "min": {"float": "__builtin_fmin{f}({0}, {1})", "int": "({0} < {1} ? {0} : {1})"},
    "max": {"float": "__builtin_fmax{f}({0}, {1})", "int": "({0} > {1} ? {0} : {1})"},
    "abs": {"float": "__builtin_fabs{f}({0})", "int": "({0} < 0 ? 0 - {0} : {0})"},
    "neg": {"float": "-{0}", "int": "0 - {0}"},
    "sqrt": {"float": "__builtin_sqrt{f}({0})"},
    "rsqrt": {"float": "1 / __builtin_sqrt({0})"},
    "rcp": {"float": "1 / {0}"},
    "ex2": {"float": "exp2_f32((float){0})"},
    "lg2": {"float": "__builtin_log2{f}({0})"},
    "sin": {"float": "__builtin_sin{f}({0})"},
    "cos": {"float": "__builtin_cos{f}({0})"},
    "tanh": {"float": "__builtin_tanh{f}({0})"},
    "copysign": {"float": "__builtin_copysign{f}({1}, {0})"},
    "and": {"bits": "{0} & {1}"},
    "or": {"bits": "{0} | {1}"},
    "xor": {"bits": "{0} ^ {1}"},
    "not": {"bits": "~{0}"},
    "cnot": {"bits": "{0} == 0"},
    "shl": {"bits": "((uint32_t){1} < {w} ? {0} << (uint32_t){1} : 0)"},
    "shr": {
        "int": "({0} >> ((uint32_t){1} < {w} ? (uint32_t){1} : {w} - 1)) * ((uint32_t){1} < {w} || ({T})-1 < 0)"
    },
    "popc": {"bits": "__builtin_popcountll({0})"},
    "clz": {"bits": "(count_leading64({0}) - (64 - {w}))"},
    "brev": {"bits": "(bit_reverse64({0}) >> (64 - {w}))"},
}
_DIRECTED = {
    "add": "add",
    "sub": "sub",
    "mul": "mul",
    "div": "div",
    "rcp": "div",
    "sqrt": "sqrt",
    "fma": "fma",
}


def _layout(op: Op) -> tuple[int, list[tuple[Value, int, int]]]:
    """Elements that one run of the text handles; for results, then operands: value, bits of an element, elements a register."""
    pack = op.int_attr("packed_element")
    out = []
    for value in (*op.results, *op.operands):
        bits = value.type.bits
        bits = 8 if bits == 1 else bits
        out.append((value, bits, min(max(32 // bits, 1), pack)))
    return pack, out


_STORE = {"f16": "f16_store({})", "bf16": "bf16_store({})", "f32": "bits_of({})", "f64": "bits64_of({})"}
_LOAD = {
    "f16": "f16_load((uint16_t){})",
    "bf16": "bf16_load((uint16_t){})",
    "f32": "f32_of((uint32_t){})",
    "f64": "f64_of({})",
}


def _bits(value: Value, text: str) -> str:
    elem = value.type.elem
    if elem in _STORE:
        return _STORE[elem].format(text)
    if value.type.is_ptr:
        return f"(uint64_t){text}"
    from effattn.cpu import fp8

    if elem in fp8.FORMATS:
        return fp8.store_expr(elem, text)
    return f"({_unsigned(max(value.type.bits, 8))}){text}"


def _from_bits(value: Value, text: str) -> str:
    elem = value.type.elem
    if elem in _LOAD:
        return _LOAD[elem].format(text)
    if value.type.is_ptr:
        return f"(char *){text}"
    from effattn.cpu import fp8

    if elem in fp8.FORMATS:
        return fp8.load_expr(elem, f"(uint8_t)({text})")
    return f"({value_type(elem)})({text})" + ("& 1" if elem == "i1" else "")


def _body(op: Op, element: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """C of one run of the text. `element[i][k]`: the k-th element of operand i. Gives lines, and the results' elements."""
    pack, layout = _layout(op)
    count = len(op.results)
    lines: list[str] = []
    registers: list[str] = []
    where: list[list[str]] = []
    inputs = iter(element)
    for i, (value, bits, per) in enumerate(layout):
        parts = None if i < count else next(inputs)
        where.append([])
        for k in range(0, pack, per):
            name = f"ptx_arg{len(registers)}"
            registers.append(name)
            c_type = _unsigned(max(bits * per, 8))
            if parts is None:
                lines.append(f"{c_type} {name} = 0;")
                where[-1] += [
                    f"({_unsigned(bits)})({name} >> {bits * j})" if per > 1 else name for j in range(per)
                ]
            else:
                packed = [
                    f"({c_type}){_bits(value, parts[k + j])}" + (f" << {bits * j}" if j else "")
                    for j in range(per)
                ]
                lines.append(f"{c_type} {name} = {' | '.join(packed)};")
    translated = Translator(unescaped(op.attrs["asm_string"][1:-1]), registers)
    lines += translated.lines
    return lines, [[_from_bits(v, t) for t in where[i]] for i, v in enumerate(op.results)]


def check(op: Op) -> None:
    constraints = [c.strip() for c in op.attrs["constraints"].strip('"').split(",")]
    if any(c.startswith("~") or not set(c.lstrip("=&+")) <= _CONSTRAINT for c in constraints):
        raise Unsupported(f"inline assembly with the constraints {','.join(constraints)}")
    pack, _ = _layout(op)
    _body(op, [["0"] * pack for _ in op.operands])


def inline_asm(emitter: FunctionEmitter, op: Op) -> None:
    """tt.elementwise_inline_asm: groups of elements in the order of their indices."""
    pack = op.int_attr("packed_element")
    first = (*op.results, *op.operands)[0]
    if not first.type.is_tensor:
        lines, results = _body(op, [[emitter.scalar(v)] * pack for v in op.operands])
        names = [emitter.declare(r) for r in op.results]
        emitter.open("")
        for line in [*lines, *(f"{n} = {r[0]};" for n, r in zip(names, results, strict=True))]:
            emitter.line(line)
        emitter.close()
        return
    nest, axis, index = rows(emitter, first.type)
    n = nest.shape[axis]
    if n % pack:
        raise Unsupported(f"inline assembly on groups of {pack} elements of a row of {n}")
    inner = Scope()
    places: list[Index] = []
    for k in range(pack):
        at = index[axis]
        shifted = Expr(f"({at.text} + {k})", at.level) if k else at
        places.append((*index[:axis], shifted, *index[axis + 1 :]))
    element = [[nest.eval(v, place, inner).text for place in places] for v in op.operands]
    lines, results = _body(op, element)
    for value, parts in zip(op.results, results, strict=True):
        buffer = emitter.plan.buffers[value]
        for place, part in zip(places, parts, strict=True):
            lines.append(f"{emitter.array(buffer)}[{linear(place, buffer.strides()).text}] = {part};")
    loop = nest.loop(axis, inner, lines, independent=False)
    if n > 1 and pack > 1:
        loop[0] = loop[0].replace(f"i{axis}++", f"i{axis} += {pack}")
    emitter.open("")
    nest.emit(loop)
    emitter.close()
