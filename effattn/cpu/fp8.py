"""Floats of 8 bits: e4m3fn and e5m2, and AMD's fnuz kinds.

Values are carried in floats that are exactly representable. A conversion to one of these rounds once to nearest even (or
toward zero where the kernel says so) and saturates: what is too large, infinity included, becomes the largest finite value
and NaN stays NaN, as the conversion instructions of NVIDIA GPUs do (PTX `cvt.rn.satfinite`). An infinity of e5m2 that is
loaded and stored without a conversion stays one. Arithmetic is not defined on them; `tl.dot` multiplies them exactly.
"""

from __future__ import annotations

from effattn.cpu import elementwise, formats
from effattn.cpu.formats import Unsupported, rounded
from effattn.cpu.ir import Op

#: element type -> name of its helpers in extras.h
FORMATS = {"f8E4M3FN": "e4m3fn", "f8E5M2": "e5m2", "f8E4M3FNUZ": "e4m3fnuz", "f8E5M2FNUZ": "e5m2fnuz"}

#: type of a PTX conversion -> (from bits, to bits with rounding)
PTX = {
    "e4m3": ("e4m3fn_load((uint8_t){})", "e4m3fn_store(round_e4m3fn({}))"),
    "e5m2": ("e5m2_load((uint8_t){})", "e5m2_store(round_e5m2({}))"),
    "e2m1": ("e2m1_load((uint8_t){})", "e2m1_store({})"),
}

RTZ = 0


def load_expr(elem: str, text: str) -> str:
    return f"{FORMATS[elem]}_load({text})"


def store_expr(elem: str, text: str) -> str:
    return f"{FORMATS[elem]}_store({text})"


def register() -> None:
    """Make the types known to the rest of the backend."""
    for elem, name in FORMATS.items():
        formats._VALUE[elem] = "float"
        formats._MEMORY[elem] = ("uint8_t", f"{name}_load({{}})", f"{name}_store({{}})")
        formats._ROUND[elem] = f"round_{name}({{}})"
    plain_bitcast = elementwise.RULES["tt.bitcast"]
    plain_fp_to_fp = elementwise.RULES["tt.fp_to_fp"]

    def bitcast(op: Op, a: list[str]) -> str:
        source, target = op.operands[0].type.elem, op.results[0].type.elem
        if source == target or not (source in FORMATS or target in FORMATS):
            return plain_bitcast(op, a)
        bits = store_expr(source, a[0]) if source in FORMATS else f"(uint8_t){a[0]}"
        return (
            load_expr(target, bits) if target in FORMATS else f"({formats.value_type(target)})(int8_t){bits}"
        )

    def fp_to_fp(op: Op, a: list[str]) -> str:
        source, target = op.operands[0].type.elem, op.results[0].type.elem
        if op.int_attr("rounding", 1) == RTZ:
            x = f"truncate_f64_f32({a[0]})" if source == "f64" else a[0]
            if target in FORMATS:
                return f"truncate_{FORMATS[target]}({x})"
            if target in ("f16", "bf16"):
                return f"truncate_{target}({x})"
            if target == "f32":
                return x
            raise Unsupported(f"tt.fp_to_fp to {target} toward zero")
        if target in FORMATS and source == "f64":
            return rounded(target, f"odd_f32({a[0]})")
        return plain_fp_to_fp(op, a)

    elementwise.RULES["tt.bitcast"] = elementwise.RULES["arith.bitcast"] = bitcast
    elementwise.RULES["tt.fp_to_fp"] = fp_to_fp
