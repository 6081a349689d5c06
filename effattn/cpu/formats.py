"""How element types live in C: in expressions, in working buffers, in the user's memory."""

from __future__ import annotations

import math
import re
import struct

from effattn.cpu.ir import Type


class Unsupported(Exception):
    """An operation or type that this backend does not know: says what; whoever knows adds where."""


#: element type -> C type of values and of working buffers
_VALUE = {
    "i1": "uint8_t",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "index": "int64_t",
    "f16": "float",
    "bf16": "float",
    "f32": "float",
    "f64": "double",
}

#: element type -> (C type in the user's memory, load expression, store expression)
_MEMORY = {
    "i1": ("uint8_t", "(uint8_t)({} != 0)", "(uint8_t)({} != 0)"),
    "i8": ("int8_t", "{}", "{}"),
    "i16": ("int16_t", "{}", "{}"),
    "i32": ("int32_t", "{}", "{}"),
    "i64": ("int64_t", "{}", "{}"),
    "f16": ("uint16_t", "f16_load({})", "f16_store({})"),
    "bf16": ("uint16_t", "bf16_load({})", "bf16_store({})"),
    "f32": ("float", "{}", "{}"),
    "f64": ("double", "{}", "{}"),
}

#: element type -> rounding of a result computed in the carrier
_ROUND = {"f16": "round_f16({})", "bf16": "round_bf16({})"}

_SIZES = {
    "float": 4,
    "double": 8,
    "uint8_t": 1,
    "int8_t": 1,
    "int16_t": 2,
    "uint16_t": 2,
    "int32_t": 4,
    "int64_t": 8,
    "char *": 8,
}


def value_type(elem: str) -> str:
    """C type that carries values of an element type."""
    if elem.startswith("ptr<"):
        return "char *"
    try:
        return _VALUE[elem]
    except KeyError:
        raise Unsupported(f"the type {elem}") from None


def c_type_of_dot(a: str, b: str, result: str) -> str:
    """C type in which a product of tiles of these element types is summed."""
    kinds = (value_type(a), value_type(b), value_type(result))
    if kinds in (("float",) * 3, ("double",) * 3, ("int8_t", "int8_t", "int32_t")):
        return kinds[2]
    raise Unsupported(f"tt.dot of {a} and {b} into {result}")


def size_of(c_type: str) -> int:
    return _SIZES[c_type]


def memory_type(elem: str) -> str:
    """C type of an element in the user's tensors."""
    if elem.startswith("ptr<"):
        return "char *"
    try:
        return _MEMORY[elem][0]
    except KeyError:
        raise Unsupported(f"loads and stores of the type {elem}") from None


def load_expr(elem: str, expr: str) -> str:
    return expr if elem.startswith("ptr<") else _MEMORY[elem][1].format(expr)


def store_expr(elem: str, expr: str) -> str:
    return expr if elem.startswith("ptr<") else _MEMORY[elem][2].format(expr)


def memory_size(elem: str) -> int:
    return size_of(memory_type(elem))


def rounded(elem: str, expr: str) -> str:
    """`expr`, computed in the carrier of `elem`, rounded once to `elem`."""
    return _ROUND.get(elem, "{}").format(expr)


def c_int(value: int, c_type: str) -> str:
    if c_type == "int64_t":
        return "INT64_MIN" if value == -(1 << 63) else f"INT64_C({value})"
    if c_type == "int32_t" and value == -(1 << 31):
        return "INT32_MIN"
    return str(value)


#: fraction bits, exponent bias, codes of NaN
_EIGHT_BITS = {
    "f8E4M3FN": (3, 7, (0x7F, 0xFF)),
    "f8E4M3FNUZ": (3, 8, (0x80,)),
    "f8E5M2FNUZ": (2, 16, (0x80,)),
}


def _float_from_bits(bits: int, elem: str) -> float:
    if elem == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    if elem == "bf16":
        return struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    if elem == "f32":
        return struct.unpack("<f", struct.pack("<I", bits))[0]
    if elem == "f64":
        return struct.unpack("<d", struct.pack("<Q", bits))[0]
    if elem == "f8E5M2":
        return struct.unpack("<e", struct.pack("<H", bits << 8))[0]
    if elem in _EIGHT_BITS:
        fraction, bias, nan = _EIGHT_BITS[elem]
        code = bits & 0x7F
        if bits in nan:
            return math.nan
        e, m = code >> fraction, code & ((1 << fraction) - 1)
        value = math.ldexp(m + (1 << fraction if e else 0), max(e, 1) - bias - fraction)
        return -value if bits & 0x80 else value
    raise Unsupported(f"constants of the type {elem}")


def c_float(value: float, c_type: str) -> str:
    suffix = "f" if c_type == "float" else ""
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return ("-" if value < 0 else "") + f"__builtin_inf{suffix}()"
    if c_type == "float":
        value = struct.unpack("<f", struct.pack("<f", value))[0]
    return value.hex() + suffix


def literal(text: str, type_: Type) -> str:
    """A scalar literal of the printed IR (`42`, `true`, `1.5e+00`, `0xFF800000`) as a C expression."""
    text = text.strip()
    elem = type_.elem
    if type_.is_int or elem == "index":
        if text in ("true", "false"):
            return "1" if text == "true" else "0"
        value = int(text, 0)
        return str(value & 1) if elem == "i1" else c_int(value, value_type(elem))
    if type_.is_float:
        carrier = value_type(elem)
        number = _float_from_bits(int(text, 16), elem) if text.startswith(("0x", "0X")) else float(text)
        return c_float(number, carrier)
    raise Unsupported(f"constants of the type {elem}")


_SPLAT = re.compile(r"dense<([^\[\]<>\"]*)> : ")


def splat_literal(attr: str, type_: Type) -> str | None:
    """The literal of a scalar constant or of a dense splat; None for a dense constant that is not a splat."""
    if not type_.is_tensor:
        return literal(attr.rpartition(" : ")[0] or attr, type_)
    match = _SPLAT.match(attr)
    return literal(match.group(1), Type(type_.elem)) if match else None


def dense_literals(attr: str, type_: Type) -> list[str]:
    """The literals of a dense constant, row-major."""
    body = attr[attr.index("dense<") + 6 : attr.rindex("> : ")]
    if body.startswith('"0x'):
        return _from_bytes(bytes.fromhex(body[3:-1]), type_)
    return [literal(x, Type(type_.elem)) for x in re.findall(r"[^\[\],\s]+", body)]


def _from_bytes(data: bytes, type_: Type) -> list[str]:
    """MLIR prints long constants as their bytes, little-endian; i1 as one bit or one byte an element."""
    elem, count = Type(type_.elem), type_.numel
    width = len(data) // count
    if type_.elem == "i1" and width == 0:
        numbers = [data[i // 8] >> i % 8 & 1 for i in range(count)]
    else:
        numbers = [int.from_bytes(data[i * width : (i + 1) * width], "little") for i in range(count)]
    if type_.is_float:
        return [literal(f"0x{n:X}", elem) for n in numbers]
    sign = 1 << max(8 * width - 1, 0)
    return [literal(str(n - 2 * sign if width and n & sign and elem.bits > 1 else n), elem) for n in numbers]
