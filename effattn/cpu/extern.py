"""Functions of libdevice that kernels name (`tl.extra.libdevice`), as C expressions.

The value is that of the C library or of a formula in double precision: at least as near to the true one as libdevice's
documented error allows. The `fast` variants give the accurate result. Conversions and directed roundings are exact.
"""

from __future__ import annotations

from effattn.cpu.formats import Unsupported, value_type
from effattn.cpu.ir import Op


def _pairs() -> dict[str, str]:
    """__nv_NAME for double and __nv_NAMEf for float, from the C library's own functions."""
    out = {}
    one = "acos acosh asin asinh atan atanh cbrt ceil cos cosh erf erfc exp10 expm1 fabs floor lgamma log log10 log1p log2 logb"
    one += " nearbyint rint round sin sinh sqrt tan tanh tgamma trunc"
    two = "atan2 copysign fdim fmod hypot nextafter pow remainder"
    for names, args in ((one, "{0}"), (two, "{0}, {1}"), ("fma", "{0}, {1}, {2}")):
        for name in names.split():
            out[name] = f"__builtin_{name}({args})"
            out[f"{name}f"] = f"__builtin_{name}f({args})"
    return out


def _doubles() -> dict[str, str]:
    """__nv_NAME for double; __nv_NAMEf is the same formula, computed in double and rounded."""
    formulas = {
        "cospi": "cos_pi({0})",
        "sinpi": "sin_pi({0})",
        "cyl_bessel_i0": "bessel_i_f64(0, {0})",
        "cyl_bessel_i1": "bessel_i_f64(1, {0})",
        "erfcinv": "erfcinv_f64({0})",
        "erfcx": "erfcx_f64({0})",
        "erfinv": "erfinv_f64({0})",
        "j0": "j0({0})",
        "j1": "j1({0})",
        "jn": "jn({0}, {1})",
        "y0": "y0({0})",
        "y1": "y1({0})",
        "yn": "yn({0}, {1})",
        "norm3d": "__builtin_hypot(__builtin_hypot({0}, {1}), {2})",
        "norm4d": "__builtin_hypot(__builtin_hypot({0}, {1}), __builtin_hypot({2}, {3}))",
        "normcdf": "normcdf_f64({0})",
        "normcdfinv": "normcdfinv_f64({0})",
        "powi": "__builtin_pow({0}, (double){1})",
        "rcbrt": "(double)(1.0L / cbrt_refined({0}))",
        "rhypot": "1.0 / __builtin_hypot({0}, {1})",
        "rnorm3d": "1.0 / __builtin_hypot(__builtin_hypot({0}, {1}), {2})",
        "rnorm4d": "1.0 / __builtin_hypot(__builtin_hypot({0}, {1}), __builtin_hypot({2}, {3}))",
        "rsqrt": "1.0 / __builtin_sqrt({0})",
    }
    out = {}
    for name, text in formulas.items():
        out[name] = text
        wide = text
        for i in range(4):
            if name not in ("jn", "yn") or i == 1:
                wide = wide.replace(f"{{{i}}}", f"(double){{{i}}}")
        out[f"{name}f"] = f"(float)({wide})"
    return out


def _directed() -> dict[str, str]:
    """Functions whose name ends in the direction of their rounding."""
    out = {}
    for mode in ("rn", "rz", "ru", "rd"):
        for kind, one in (("f", "1.0f"), ("d", "1.0")):
            for name in ("add", "sub", "mul", "div"):
                out[f"{kind}{name}_{mode}"] = f"{kind}{name}_{mode}({{0}}, {{1}}, 0)"
            out[f"{kind}sqrt_{mode}"] = f"{kind}sqrt_{mode}({{0}}, 0, 0)"
            out[f"{kind}rcp_{mode}"] = f"{kind}div_{mode}({one}, {{0}}, 0)"
        out[f"fmaf_{mode}"] = f"ffma_{mode}({{0}}, {{1}}, {{2}})"
        out[f"fma_{mode}"] = f"dfma_{mode}({{0}}, {{1}}, {{2}})"
        out[f"double2float_{mode}"] = f"double2float_{mode}({{0}}, 0, 0)"
        whole = {"rn": "rint", "rz": "trunc", "ru": "ceil", "rd": "floor"}[mode]
        for source in ("float", "double"):
            for target, kind in (("int", "i32"), ("uint", "u32"), ("ll", "i64"), ("ull", "u64")):
                out[f"{source}2{target}_{mode}"] = f"fptosi_{kind}(__builtin_{whole}((double){{0}}))"
        for source, cast, helper in (
            ("int", "(int32_t)", "ll"), ("uint", "(uint32_t)", "ull"), ("ll", "(int64_t)", "ll"), ("ull", "(uint64_t)", "ull"),
        ):  # fmt: skip
            for target in ("float", "double"):
                out[f"{source}2{target}_{mode}"] = f"{helper}2{target}_{mode}({cast}{{0}}, 0, 0)"
    out["frsqrt_rn"] = "(float)(1.0 / __builtin_sqrt((double){0}))"
    return out


_INTEGERS = {
    "abs": "({0} < 0 ? 0 - {0} : {0})",
    "llabs": "({0} < 0 ? 0 - {0} : {0})",
    "brev": "bit_reverse32((uint32_t){0})",
    "brevll": "bit_reverse64((uint64_t){0})",
    "byte_perm": "byte_permute((uint32_t){0}, (uint32_t){1}, (uint32_t){2})",
    "clz": "count_leading32((uint32_t){0})",
    "clzll": "count_leading64((uint64_t){0})",
    "ffs": "__builtin_ffs({0})",
    "ffsll": "__builtin_ffsll({0})",
    "popc": "__builtin_popcount((uint32_t){0})",
    "popcll": "__builtin_popcountll((uint64_t){0})",
    "hadd": "(((int64_t){0} + {1}) >> 1)",
    "rhadd": "(((int64_t){0} + {1} + 1) >> 1)",
    "uhadd": "(((uint64_t)(uint32_t){0} + (uint32_t){1}) >> 1)",
    "urhadd": "(((uint64_t)(uint32_t){0} + (uint32_t){1} + 1) >> 1)",
    "mul24": "(signed24({0}) * signed24({1}))",
    "umul24": "(((uint32_t){0} & 0xffffffu) * ((uint32_t){1} & 0xffffffu))",
    "mulhi": "(((int64_t){0} * {1}) >> 32)",
    "umulhi": "(((uint64_t)(uint32_t){0} * (uint32_t){1}) >> 32)",
    "mul64hi": "(((__int128){0} * {1}) >> 64)",
    "umul64hi": "(((unsigned __int128)(uint64_t){0} * (uint64_t){1}) >> 64)",
    "sad": "(({0} > {1} ? (uint32_t){0} - (uint32_t){1} : (uint32_t){1} - (uint32_t){0}) + (uint32_t){2})",
    "usad": "(((uint32_t){0} > (uint32_t){1} ? (uint32_t){0} - (uint32_t){1} : (uint32_t){1} - (uint32_t){0}) + (uint32_t){2})",
}

_OTHERS = {
    "cbrt": "(double)cbrt_refined({0})",
    # the same polynomial as tl.exp and tl.exp2
    "exp": "exp({0})",
    "expf": "exp_f32({0})",
    "exp2": "exp2({0})",
    "exp2f": "exp2_f32({0})",
    "fast_expf": "exp_f32({0})",
    "fast_exp10f": "__builtin_exp10f({0})",
    "fast_cosf": "__builtin_cosf({0})",
    "fast_sinf": "__builtin_sinf({0})",
    "fast_tanf": "__builtin_tanf({0})",
    "fast_tanhf": "__builtin_tanhf({0})",
    "fast_logf": "__builtin_logf({0})",
    "fast_log2f": "__builtin_log2f({0})",
    "fast_log10f": "__builtin_log10f({0})",
    "fast_powf": "__builtin_powf({0}, {1})",
    "fast_fdividef": "({0} / {1})",
    "saturatef": "({0} > 1.0f ? 1.0f : ({0} > 0.0f ? {0} : 0.0f))",
    "finitef": "(__builtin_isfinite({0}) != 0)",
    "isfinited": "(__builtin_isfinite({0}) != 0)",
    "isinff": "(__builtin_isinf({0}) != 0)",
    "isinfd": "(__builtin_isinf({0}) != 0)",
    "isnanf": "({0} != {0})",
    "isnand": "({0} != {0})",
    "signbitf": "(bits_of({0}) >> 31)",
    "signbitd": "(bits64_of({0}) >> 63)",
    "ldexp": "__builtin_ldexp({0}, {1})",
    "ldexpf": "__builtin_ldexpf({0}, {1})",
    "scalbn": "__builtin_scalbn({0}, {1})",
    "scalbnf": "__builtin_scalbnf({0}, {1})",
    "ilogb": "__builtin_ilogb({0})",
    "ilogbf": "__builtin_ilogbf({0})",
    "llrint": "fptosi_i64(__builtin_rint({0}))",
    "llrintf": "fptosi_i64(__builtin_rint((double){0}))",
    "llround": "fptosi_i64(__builtin_round({0}))",
    "llroundf": "fptosi_i64(__builtin_round((double){0}))",
    "float_as_int": "bits_of({0})",
    "float_as_uint": "bits_of({0})",
    "int_as_float": "f32_of((uint32_t){0})",
    "uint_as_float": "f32_of((uint32_t){0})",
    "double_as_longlong": "bits64_of({0})",
    "longlong_as_double": "f64_of((uint64_t){0})",
    "double2hiint": "(bits64_of({0}) >> 32)",
    "double2loint": "bits64_of({0})",
    "hiloint2double": "f64_of((uint64_t)(uint32_t){0} << 32 | (uint32_t){1})",
    "rcp64h": "f64_of(bits64_of(1.0 / f64_of(bits64_of({0}) & 0xffffffff00000000u)) & 0xffffffff00000000u)",
}

#: name without __nv_ -> C expression of its arguments
FUNCTIONS: dict[str, str] = {**_pairs(), **_doubles(), **_directed(), **_INTEGERS, **_OTHERS}


def rule(op: Op, a: list[str]) -> str:
    """tt.extern_elementwise: the C expression of the function that it names."""
    symbol = op.attrs.get("symbol", "").strip('"')
    text = FUNCTIONS.get(symbol.removeprefix("__nv_")) if symbol.startswith("__nv_") else None
    if text is None:
        raise Unsupported(f"the library function {symbol}")
    return f"({value_type(op.results[0].type.elem)})({text.format(*a)})"
