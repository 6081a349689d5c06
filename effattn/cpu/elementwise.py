"""C expressions of the elementwise operations, for scalars and for elements of tensors alike.

Each entry takes (op, operand expressions) and returns the expression of the result's carrier. Integer results
are cast to their width, so arithmetic wraps as it does in the IR.
"""

from __future__ import annotations

from collections.abc import Callable

from effattn.cpu.formats import Unsupported, memory_size, rounded, value_type
from effattn.cpu.ir import Op

Rule = Callable[[Op, list[str]], str]

_UNSIGNED = {
    "uint8_t": "uint8_t",
    "int8_t": "uint8_t",
    "int16_t": "uint16_t",
    "int32_t": "uint32_t",
    "int64_t": "uint64_t",
}

_CMPI = ["==", "!=", "<", "<=", ">", ">=", "<", "<=", ">", ">="]

#: arith.cmpf predicates. Ordered ones are false, unordered ones are true where either operand is NaN.
_CMPF = {
    0: "0",
    1: "({a} == {b})",
    2: "({a} > {b})",
    3: "({a} >= {b})",
    4: "({a} < {b})",
    5: "({a} <= {b})",
    6: "(({a} < {b}) | ({a} > {b}))",
    7: "(({a} == {a}) & ({b} == {b}))",
    8: "!(({a} < {b}) | ({a} > {b}))",
    9: "!({a} <= {b})",
    10: "!({a} < {b})",
    11: "!({a} >= {b})",
    12: "!({a} > {b})",
    13: "({a} != {b})",
    14: "(({a} != {a}) | ({b} != {b}))",
    15: "1",
}


def _result(op: Op) -> str:
    return op.results[0].type.elem


def _carrier(op: Op) -> str:
    return value_type(_result(op))


def _float2(symbol: str) -> Rule:
    return lambda op, a: rounded(_result(op), f"({a[0]} {symbol} {a[1]})")


def _int2(symbol: str) -> Rule:
    def rule(op: Op, a: list[str]) -> str:
        if _result(op) == "i1":
            return f"(uint8_t)(({a[0]} {symbol} {a[1]}) & 1)"
        return f"({_carrier(op)})({a[0]} {symbol} {a[1]})"

    return rule


def _helper(prefix: str) -> Rule:
    def rule(op: Op, a: list[str]) -> str:
        if _result(op) == "i1":
            raise Unsupported(f"{op.name} on i1")
        return f"{prefix}_{_carrier(op)}({a[0]}, {a[1]})"

    return rule


def _minmax_float(name: str) -> Rule:
    return lambda op, a: f"{name}_{_carrier(op)}({a[0]}, {a[1]})"


def _minmax_int(symbol: str, unsigned: bool) -> Rule:
    def rule(op: Op, a: list[str]) -> str:
        cast = f"({_UNSIGNED[_carrier(op)]})" if unsigned else ""
        if _result(op) == "i1" and not unsigned:
            cast = "-"  # a signed i1 is 0 or -1
        return f"({cast}{a[0]} {symbol} {cast}{a[1]} ? {a[0]} : {a[1]})"

    return rule


def _cmpi(op: Op, a: list[str]) -> str:
    predicate = op.int_attr("predicate")
    cast = ""
    if predicate >= 6:
        type_ = op.operands[0].type
        cast = "(uintptr_t)" if type_.is_ptr else f"({_UNSIGNED[value_type(type_.elem)]})"
    elif op.operands[0].type.elem == "i1" and predicate >= 2:
        # A signed i1 is 0 or -1.
        return f"(-{a[0]} {_CMPI[predicate]} -{a[1]})"
    return f"({cast}{a[0]} {_CMPI[predicate]} {cast}{a[1]})"


def _cmpf(op: Op, a: list[str]) -> str:
    return _CMPF[op.int_attr("predicate")].format(a=a[0], b=a[1])


def _extsi(op: Op, a: list[str]) -> str:
    source = op.operands[0].type.elem
    return f"({_carrier(op)})-{a[0]}" if source == "i1" else f"({_carrier(op)}){a[0]}"


def _extui(op: Op, a: list[str]) -> str:
    source = value_type(op.operands[0].type.elem)
    return f"({_carrier(op)})({_UNSIGNED[source]}){a[0]}"


def _trunci(op: Op, a: list[str]) -> str:
    return f"(uint8_t)({a[0]} & 1)" if _result(op) == "i1" else f"({_carrier(op)}){a[0]}"


def _float_from_int(op: Op, expr: str) -> str:
    elem = _result(op)
    if elem in ("f16", "bf16"):
        # Through double, exactly or rounded to odd, so that the type's own rounding is the only one.
        bits = op.operands[0].type.bits
        wide = (
            f"(double){expr}" if bits < 64 else f"{'i' if op.name == 'arith.sitofp' else 'u'}64_odd({expr})"
        )
        return f"f64_to_{elem}({wide})"
    return f"({_carrier(op)}){expr}"


def _sitofp(op: Op, a: list[str]) -> str:
    return _float_from_int(op, f"-{a[0]}" if op.operands[0].type.elem == "i1" else a[0])


def _uitofp(op: Op, a: list[str]) -> str:
    source = value_type(op.operands[0].type.elem)
    return _float_from_int(op, f"({_UNSIGNED[source]}){a[0]}")


def _fptoint(sign: str) -> Rule:
    def rule(op: Op, a: list[str]) -> str:
        bits = op.results[0].type.bits
        if bits == 1:
            return f"(uint8_t)({a[0]} != 0)"
        return f"({_carrier(op)})fptosi_{sign}{bits}({a[0]})"

    return rule


def _truncf(op: Op, a: list[str]) -> str:
    source, target = op.operands[0].type.elem, _result(op)
    if source == "f64" and target in ("f16", "bf16"):
        return f"f64_to_{target}({a[0]})"
    if target == "f32":
        return f"(float){a[0]}"
    return rounded(target, a[0])


def _fp_to_fp(op: Op, a: list[str]) -> str:
    mode = op.attrs.get("rounding", "1")
    if not mode.startswith("1"):
        raise Unsupported(f"tt.fp_to_fp with rounding mode {mode} (only to nearest even is)")
    # Any pair of formats, those of the same width (fp16 and bf16) included: what fits is unchanged by rounding.
    return _truncf(op, a) if op.results[0].type.bits < 64 else f"(double){a[0]}"


def _bitcast(op: Op, a: list[str]) -> str:
    source, target = op.operands[0].type, op.results[0].type
    if (source.is_ptr and target.is_ptr) or source.elem == target.elem:
        return a[0]
    raw = {
        "f16": "f16_store({})",
        "bf16": "bf16_store({})",
        "f32": "bits_of({})",
        "f64": "bits64_of({})",
    }.get(source.elem, "{}").format(a[0])
    if source.is_ptr:
        return f"(int64_t){raw}"
    if target.is_ptr:
        return f"(char *){raw}"
    unsigned = {16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}.get(target.bits)
    wrap = {
        "f16": f"f16_load((uint16_t){raw})",
        "bf16": f"bf16_load((uint16_t){raw})",
        "f32": f"f32_of((uint32_t){raw})",
        "f64": f"f64_of((uint64_t){raw})",
    }.get(target.elem)
    if wrap is not None:
        return wrap
    return f"({_carrier(op)})({unsigned}){raw}" if unsigned else f"({_carrier(op)}){raw}"


def _addptr(op: Op, a: list[str]) -> str:
    return f"({a[0]} + (int64_t){a[1]} * {memory_size(op.results[0].type.pointee)})"


def _select(op: Op, a: list[str]) -> str:
    return f"({a[0]} ? {a[1]} : {a[2]})"


def _math(f32: str, f64: str) -> Rule:
    def rule(op: Op, a: list[str]) -> str:
        elem = _result(op)
        return f"{f64}({a[0]})" if elem == "f64" else rounded(elem, f"{f32}({a[0]})")

    return rule


def _absf(op: Op, a: list[str]) -> str:
    # Not rounded: that would make a signalling NaN of 16 bits quiet.
    return f"__builtin_fabs{'' if _result(op) == 'f64' else 'f'}({a[0]})"


def _negf(op: Op, a: list[str]) -> str:
    return f"(-{a[0]})"


def _fma(op: Op, a: list[str]) -> str:
    elem = _result(op)
    if elem == "f32":
        return f"__builtin_fmaf({', '.join(a)})"
    if elem == "f64":
        return f"__builtin_fma({', '.join(a)})"
    return f"f64_to_{elem}(fma_odd({', '.join(a)}))"


def _clampf(op: Op, a: list[str]) -> str:
    c = _carrier(op)
    name = ("maximum", "minimum") if op.int_attr("propagateNan", 0) else ("maxnum", "minnum")
    return f"{name[1]}_{c}({name[0]}_{c}({a[0]}, {a[1]}), {a[2]})"


def _mulhiui(op: Op, a: list[str]) -> str:
    if _carrier(op) == "int32_t":
        return f"(int32_t)(((uint64_t)(uint32_t){a[0]} * (uint32_t){a[1]}) >> 32)"
    return f"(int64_t)(((unsigned __int128)(uint64_t){a[0]} * (uint64_t){a[1]}) >> 64)"


def _remf(op: Op, a: list[str]) -> str:
    return f"fmod({a[0]}, {a[1]})" if _result(op) == "f64" else rounded(_result(op), f"fmodf({a[0]}, {a[1]})")


RULES: dict[str, Rule] = {
    "arith.addf": _float2("+"),
    "arith.subf": _float2("-"),
    "arith.mulf": _float2("*"),
    "arith.divf": _float2("/"),
    "arith.remf": _remf,
    "arith.negf": _negf,
    "arith.maxnumf": _minmax_float("maxnum"),
    "arith.minnumf": _minmax_float("minnum"),
    "arith.maximumf": _minmax_float("maximum"),
    "arith.minimumf": _minmax_float("minimum"),
    "arith.addi": _int2("+"),
    "arith.subi": _int2("-"),
    "arith.muli": _int2("*"),
    "arith.andi": _int2("&"),
    "arith.ori": _int2("|"),
    "arith.xori": _int2("^"),
    "arith.divsi": _helper("div"),
    "arith.remsi": _helper("rem"),
    "arith.divui": _helper("udiv"),
    "arith.remui": _helper("urem"),
    "arith.shli": _helper("shl"),
    "arith.shrsi": _helper("shrs"),
    "arith.shrui": _helper("shru"),
    "arith.maxsi": _minmax_int(">", False),
    "arith.minsi": _minmax_int("<", False),
    "arith.maxui": _minmax_int(">", True),
    "arith.minui": _minmax_int("<", True),
    "arith.cmpi": _cmpi,
    "arith.cmpf": _cmpf,
    "arith.select": _select,
    "arith.extsi": _extsi,
    "arith.extui": _extui,
    "arith.trunci": _trunci,
    "arith.sitofp": _sitofp,
    "arith.uitofp": _uitofp,
    "arith.fptosi": _fptoint("i"),
    "arith.fptoui": _fptoint("u"),
    "arith.extf": lambda op, a: f"({_carrier(op)}){a[0]}",
    "arith.truncf": _truncf,
    "arith.bitcast": _bitcast,
    "arith.index_cast": lambda op, a: f"({_carrier(op)}){a[0]}",
    "tt.bitcast": _bitcast,
    "tt.fp_to_fp": _fp_to_fp,
    "tt.int_to_ptr": lambda op, a: f"(char *){a[0]}",
    "tt.ptr_to_int": lambda op, a: f"(int64_t){a[0]}",
    "tt.addptr": _addptr,
    "tt.clampf": _clampf,
    "tt.mulhiui": _mulhiui,
    "math.exp": _math("exp_f32", "exp"),
    "math.exp2": _math("exp2_f32", "exp2"),
    "math.log": _math("logf", "log"),
    "math.log2": _math("log2f", "log2"),
    "math.sqrt": _math("__builtin_sqrtf", "__builtin_sqrt"),
    "math.rsqrt": _math("1.0f / __builtin_sqrtf", "1.0 / __builtin_sqrt"),
    "tt.precise_divf": _float2("/"),
    "tt.approx_divf": _float2("/"),  # allowed to be off by 2 ulp, which differs from GPU to GPU
    "tt.precise_sqrt": _math("__builtin_sqrtf", "__builtin_sqrt"),
    "math.sin": _math("sinf", "sin"),
    "math.cos": _math("cosf", "cos"),
    "math.erf": _math("erff", "erf"),
    "math.tanh": _math("tanhf", "tanh"),
    "math.floor": _math("__builtin_floorf", "__builtin_floor"),
    "math.ceil": _math("__builtin_ceilf", "__builtin_ceil"),
    "math.absf": _absf,
    "math.absi": lambda op, a: f"({_carrier(op)})({a[0]} < 0 ? 0 - {a[0]} : {a[0]})",
    "math.fma": _fma,
    "effattn.round_tf32": lambda op, a: f"round_tf32({a[0]})",
}

#: So cheap, or so simple in its indices, that computing it again at each use beats keeping it in memory.
CHEAP = frozenset(
    {
        "arith.addi",
        "arith.subi",
        "arith.muli",
        "arith.andi",
        "arith.ori",
        "arith.xori",
        "arith.shli",
        "arith.shrsi",
        "arith.shrui",
        "arith.maxsi",
        "arith.minsi",
        "arith.maxui",
        "arith.minui",
        "arith.cmpi",
        "arith.extsi",
        "arith.extui",
        "arith.trunci",
        "arith.index_cast",
        "arith.bitcast",
        "tt.bitcast",
        "tt.int_to_ptr",
        "tt.ptr_to_int",
        "tt.addptr",
    }
)

#: Rearrangements of indices: never computed by themselves.
VIEWS = frozenset(
    {
        "tt.splat",
        "tt.make_range",
        "tt.broadcast",
        "tt.expand_dims",
        "tt.trans",
        "tt.reshape",
        "tt.join",
        "tt.split",
        "tt.cat",
        "ub.poison",
        "effattn.scaled",
    }
)
