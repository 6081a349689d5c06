"""Conversions, arithmetic and functions of the CPU backend, bit for bit against references that share no code with it.

Numbers of 16 bits are rounded by looking for the nearest in the table of all their codes; integers are Python's; fused
operations are fractions. Any NaN equals any NaN, except where a value is only moved.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import recording
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from number_reference import (
    ALL,
    BLOCK,
    FLOAT,
    SIGNED,
    TYPE,
    UNSIGNED,
    bits_of,
    codes_of,
    cross,
    expect_codes,
    from_codes,
    nearest,
    pairs,
    record,
    rounded_fraction,
    some_codes,
    special_codes,
    table,
    to_int,
    wrap,
)

# -------------------------------------------------------------------------------------------- conversions


@triton.jit(do_not_specialize=["n"])
def convert(x, f64, f32, f16, bf16, i64, i32, i16, i8, u64, u32, u16, u8, i1, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i)
    tl.store(f64 + i, v.to(tl.float64))
    tl.store(f32 + i, v.to(tl.float32))
    tl.store(f16 + i, v.to(tl.float16))
    tl.store(bf16 + i, v.to(tl.bfloat16))
    tl.store(i64 + i, v.to(tl.int64))
    tl.store(i32 + i, v.to(tl.int32))
    tl.store(i16 + i, v.to(tl.int16))
    tl.store(i8 + i, v.to(tl.int8))
    tl.store(u64 + i, v.to(tl.uint64))
    tl.store(u32 + i, v.to(tl.uint32))
    tl.store(u16 + i, v.to(tl.uint16))
    tl.store(u8 + i, v.to(tl.uint8))
    tl.store(i1 + i, v.to(tl.int1))


TARGETS = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u64", "u32", "u16", "u8")


def converted(x: torch.Tensor) -> dict[str, torch.Tensor]:
    out = {name: torch.zeros(len(x), dtype=ALL[name]) for name in TARGETS}
    i1 = torch.zeros(len(x), dtype=torch.bool)
    convert[(len(x) // BLOCK,)](x, *out.values(), i1, len(x), BLOCK=BLOCK)
    return {**out, "i1": i1}


def float_sources(name: str) -> np.ndarray:
    """Codes: everything for 16 bits; else the rounding boundaries of the narrower formats, and random ones."""
    if bits_of(name) == 16:
        return np.arange(1 << 16)
    found = [np.array(special_codes(name), dtype=np.uint64), some_codes(name, 20000, 5)]
    edges = []
    for narrow in ("f16", "bf16"):
        values = table(narrow)
        edges.append(np.concatenate([values, (values[1:] + values[:-1]) / 2]))
    if name == "f64":
        g = np.random.default_rng(9)
        singles = from_codes("f32", g.integers(0, 0x7F7FFFFF, 20000)).double().numpy()
        after = np.nextafter(singles.astype(np.float32), np.float32(np.inf)).astype(np.float64)
        edges.append((singles + after) / 2)
        edges.append(np.array([2.0**128 - 2.0**103, 2.0**-150, 2.0**-149 * 1.5]))
    powers = 2.0 ** np.array([7, 8, 15, 16, 31, 32, 63, 64])  # integers end there
    edges += [powers, powers - 1, powers + 1, powers - 0.5]
    x = np.concatenate(edges)
    dtype = np.float32 if name == "f32" else np.float64
    with np.errstate(over="ignore"):
        y = x.astype(dtype)
    around = np.concatenate([y, np.nextafter(y, dtype(0)), np.nextafter(y, dtype(np.inf))])
    codes = around.view(f"uint{bits_of(name)}").astype(np.uint64)
    return np.concatenate([*found, codes, codes | np.uint64(1 << (bits_of(name) - 1))])


@pytest.mark.parametrize("source", FLOAT)
def test_conversions_of_floats(source: str) -> None:
    x = from_codes(source, float_sources(source))
    out = converted(x)
    # Every number of every format is one of float64; torch widens exactly.
    wide = x.double().numpy()
    with np.errstate(all="ignore"):
        want: dict[str, Any] = {
            "f64": wide,
            "f32": wide.astype(np.float32).view(np.uint32),
            "f16": nearest("f16", wide),
            "bf16": nearest("bf16", wide),
        }
    for name in TARGETS[4:]:
        want[name] = to_int(name, wide)
    for name in TARGETS:
        expect_codes(out[name], want[name], what=f"{source} to {name}")
    np.testing.assert_array_equal(out["i1"].numpy(), wide != 0)
    for name in (*TARGETS[4:], "i1"):
        recording.compared("conversion", f"{TYPE[source]} to {name}", "numpy, saturating", len(x))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_a_copy_keeps_every_bit(name: str) -> None:
    x = from_codes(name, np.arange(1 << 16))
    np.testing.assert_array_equal(codes_of(converted(x)[name]), np.arange(1 << 16))
    recording.compared("load and store", TYPE[name], "all codes, NaNs included", 1 << 16)


@pytest.mark.parametrize("source", [*SIGNED, *UNSIGNED])
def test_conversions_of_integers(source: str) -> None:
    bits = bits_of(source)
    codes = np.arange(1 << bits) if bits == 8 else some_codes(source, 3000, 3)
    near = [2**k + d for k in range(1, bits) for d in (-1, 0, 1)] + [
        2**k + 2 ** (k - 8) + d for k in range(9, bits - 1) for d in (-1, 0, 1)
    ]
    codes = np.concatenate(
        [codes, np.array([n & (2**bits - 1) for n in [*near, *[-n for n in near]]], dtype=np.uint64)]
    )
    x = from_codes(source, codes)
    numbers = [wrap(int(c), source) for c in codes_of(x).tolist()]
    out = converted(x)
    for name in TARGETS[:4]:
        want = np.array([rounded_fraction(name, Fraction(n)) for n in numbers])
        expect_codes(out[name], want, what=f"{source} to {name}")
    for name in TARGETS[4:]:
        expect_codes(out[name], [wrap(n, name) for n in numbers], what=f"{source} to {name}")
    np.testing.assert_array_equal(out["i1"].numpy(), np.array(numbers, dtype=object) != 0)
    for name in TARGETS:
        recording.compared(
            "conversion", f"{source} to {TYPE.get(name, name)}", "Python's integers and fractions", len(x)
        )


@triton.jit(do_not_specialize=["n"])
def reinterpret(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i).to(y.dtype.element_ty, bitcast=True)
    tl.store(y + i, v)
    tl.store(z + i, v.to(z.dtype.element_ty, bitcast=True))


@pytest.mark.parametrize(("name", "other"), [("f16", "i16"), ("bf16", "f16"), ("f32", "i32"), ("f64", "i64")])
def test_bitcasts_keep_every_bit(name: str, other: str) -> None:
    codes = np.arange(1 << 16) if bits_of(name) == 16 else some_codes(name, 5000, 4)
    x = from_codes(name, codes)
    y, z = torch.zeros(len(x), dtype=ALL[other]), torch.zeros(len(x), dtype=ALL[name])
    reinterpret[(len(x) // BLOCK,)](x, y, z, len(x), BLOCK=BLOCK)
    np.testing.assert_array_equal(codes_of(y), codes_of(x))
    np.testing.assert_array_equal(codes_of(z), codes_of(x))
    recording.compared(
        "bitcast", f"{TYPE[name]} to {TYPE.get(other, other)} and back", "the same bits", len(x)
    )


# ----------------------------------------------------------------------------------------------- integers


@triton.jit
def _integer_ops(a, b, o, i, n):
    kind: tl.constexpr = o.dtype.element_ty
    tl.store(o + i, a + b)
    tl.store(o + n + i, a - b)
    tl.store(o + 2 * n + i, a * b)
    tl.store(o + 3 * n + i, a // b)
    tl.store(o + 4 * n + i, a % b)
    tl.store(o + 5 * n + i, a & b)
    tl.store(o + 6 * n + i, a | b)
    tl.store(o + 7 * n + i, a ^ b)
    tl.store(o + 8 * n + i, a << b)
    tl.store(o + 9 * n + i, a >> b)
    tl.store(o + 10 * n + i, tl.maximum(a, b))
    tl.store(o + 11 * n + i, tl.minimum(a, b))
    tl.store(o + 12 * n + i, (a < b).to(kind))
    tl.store(o + 13 * n + i, (a <= b).to(kind))
    tl.store(o + 14 * n + i, (a > b).to(kind))
    tl.store(o + 15 * n + i, (a >= b).to(kind))
    tl.store(o + 16 * n + i, (a == b).to(kind))
    tl.store(o + 17 * n + i, (a != b).to(kind))
    tl.store(o + 18 * n + i, tl.where(a < b, a, b + 1))
    tl.store(o + 19 * n + i, tl.abs(a))
    tl.store(o + 20 * n + i, ~a)
    tl.store(o + 21 * n + i, ((a < b) ^ (a == 0)).to(kind) + ((a < b) & (b != 0)).to(kind))


@triton.jit(do_not_specialize=["n"])
def integer_tensors(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _integer_ops(tl.load(x + i), tl.load(y + i), o, i, n)


@triton.jit(do_not_specialize=["n"])
def integer_scalars(x, y, o, n):
    i = tl.program_id(0)
    _integer_ops(tl.load(x + i), tl.load(y + i), o, i, n)


def _divide(a: int, b: int, name: str) -> int:
    if b == 0:
        return -1  # all ones
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _shift(a: int, b: int, name: str, left: bool) -> int:
    amount = b & ((1 << bits_of(name)) - 1)
    if amount >= bits_of(name):
        return 0 if left or a >= 0 else -1
    return a << amount if left else a >> amount


#: what `_integer_ops` and `_float_ops` store, in order
INTEGER_NAMES = [
    *(
        "+",
        "-",
        "*",
        "//",
        "%",
        "&",
        "|",
        "^",
        "<<",
        ">>",
        "maximum",
        "minimum",
        "<",
        "<=",
        ">",
        ">=",
        "==",
        "!=",
    ),
    *("where", "abs", "~", "predicates"),
]
FLOAT_NAMES = [
    *("+", "-", "*", "/", "fma", "maximum", "minimum", "maximum (NaN wins)", "minimum (NaN wins)"),
    *(
        "<",
        "<=",
        ">",
        ">=",
        "==",
        "!=",
        "where",
        "negation",
        "abs",
        "predicates",
        "sqrt",
        "floor",
        "ceil",
        "%",
    ),
    *("a * b + c, not fused", "div_rn", "sqrt_rn", "clamp", "clamp (NaN wins)", "rsqrt"),
]
INTEGER_OPS: list[Any] = [
    lambda a, b, t: a + b,
    lambda a, b, t: a - b,
    lambda a, b, t: a * b,
    _divide,
    lambda a, b, t: a - b * _divide(a, b, t) if b else a,
    lambda a, b, t: a & b,
    lambda a, b, t: a | b,
    lambda a, b, t: a ^ b,
    lambda a, b, t: _shift(a, b, t, True),
    lambda a, b, t: _shift(a, b, t, False),
    lambda a, b, t: max(a, b),
    lambda a, b, t: min(a, b),
    lambda a, b, t: a < b,
    lambda a, b, t: a <= b,
    lambda a, b, t: a > b,
    lambda a, b, t: a >= b,
    lambda a, b, t: a == b,
    lambda a, b, t: a != b,
    lambda a, b, t: a if a < b else b + 1,
    lambda a, b, t: abs(a),
    lambda a, b, t: ~a,
    lambda a, b, t: ((a < b) ^ (a == 0)) + ((a < b) & (b != 0)),
]


def check_integers(name: str, a: Any, b: Any, *, scalars: bool = False) -> None:
    x, y = from_codes(name, a), from_codes(name, b)
    n = len(x)
    out = torch.zeros(len(INTEGER_OPS) * n, dtype=ALL[name])
    if scalars:
        integer_scalars[(n,)](x, y, out, n)
    else:
        integer_tensors[(n // BLOCK,)](x, y, out, n, BLOCK=BLOCK)
    left, right = ([wrap(int(c), name) for c in codes_of(t).tolist()] for t in (x, y))
    for k, op in enumerate(INTEGER_OPS):
        want = [wrap(int(op(p, q, name)), name) for p, q in zip(left, right, strict=True)]
        expect_codes(out[k * n : (k + 1) * n], want, what=f"{name}, {INTEGER_NAMES[k]}")
    record(INTEGER_NAMES, name, "Python's integers", n)


@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
def test_integer_operations(name: str) -> None:
    check_integers(name, *cross(name))


@pytest.mark.parametrize("name", ["i8", "i32", "u32", "i64"])
def test_integer_operations_on_scalars(name: str) -> None:
    check_integers(name, *cross(name), scalars=True)


@settings(max_examples=30)
@given(st.data())
def test_integer_operations_drawn(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*SIGNED, *UNSIGNED]))
    drawn = data.draw(pairs(name))
    check_integers(name, [p for p, _ in drawn], [q for _, q in drawn])


@triton.jit(do_not_specialize=["n"])
def high_products(x, y, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(o + i, tl.umulhi(tl.load(x + i), tl.load(y + i)))


@pytest.mark.parametrize("name", ["u32", "i32", "u64", "i64"])
def test_high_half_of_products(name: str) -> None:
    a, b = cross(name)
    x, y = from_codes(name, a), from_codes(name, b)
    out = torch.zeros(len(x), dtype=ALL[name])
    high_products[(len(x) // BLOCK,)](x, y, out, len(x), BLOCK=BLOCK)
    numbers = zip(codes_of(x).tolist(), codes_of(y).tolist(), strict=True)
    expect_codes(out, [p * q >> bits_of(name) for p, q in numbers], what=name)
    recording.compared("umulhi", name, "Python's integers", len(x))


# ------------------------------------------------------------------------------------------------- floats


@triton.jit
def _float_ops(a, b, c, o, i, n):
    kind: tl.constexpr = o.dtype.element_ty
    tl.store(o + i, a + b)
    tl.store(o + n + i, a - b)
    tl.store(o + 2 * n + i, a * b)
    tl.store(o + 3 * n + i, a / b)
    tl.store(o + 4 * n + i, tl.fma(a, b, c))
    tl.store(o + 5 * n + i, tl.maximum(a, b))
    tl.store(o + 6 * n + i, tl.minimum(a, b))
    tl.store(o + 7 * n + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(o + 8 * n + i, tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(o + 9 * n + i, (a < b).to(kind))
    tl.store(o + 10 * n + i, (a <= b).to(kind))
    tl.store(o + 11 * n + i, (a > b).to(kind))
    tl.store(o + 12 * n + i, (a >= b).to(kind))
    tl.store(o + 13 * n + i, (a == b).to(kind))
    tl.store(o + 14 * n + i, (a != b).to(kind))
    tl.store(o + 15 * n + i, tl.where(a < b, a, b))
    tl.store(o + 16 * n + i, -a)
    tl.store(o + 17 * n + i, tl.abs(a))
    tl.store(o + 18 * n + i, (~(a < b)).to(kind) + (not_less(a, b)).to(kind))
    if kind == tl.float32 or kind == tl.float64:
        tl.store(o + 19 * n + i, tl.sqrt(a))
        tl.store(o + 20 * n + i, tl.floor(a))
        tl.store(o + 21 * n + i, tl.ceil(a))
        tl.store(o + 22 * n + i, a % b)
        tl.store(o + 23 * n + i, a * b + c)  # not fused
    if kind == tl.float32:
        tl.store(o + 24 * n + i, tl.div_rn(a, b))
        tl.store(o + 25 * n + i, tl.sqrt_rn(a))
        tl.store(o + 26 * n + i, tl.clamp(a, -1.0, 2.0))
        tl.store(o + 27 * n + i, tl.clamp(a, -1.0, 2.0, propagate_nan=tl.PropagateNan.ALL))
        tl.store(o + 28 * n + i, tl.rsqrt(a))


@triton.jit
def not_less(a, b):
    return (a < b) == 0


@triton.jit(do_not_specialize=["n"])
def float_tensors(x, y, z, o, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c = tl.load(x + i), tl.load(y + i), tl.load(z + i)
    _float_ops(a, b, c, o, i, n)


@triton.jit(do_not_specialize=["n"])
def float_scalars(x, y, z, o, n):
    i = tl.program_id(0)
    _float_ops(tl.load(x + i), tl.load(y + i), tl.load(z + i), o, i, n)


def exact_fma(name: str, a: float, b: float, c: float) -> float:
    if not all(map(np.isfinite, (a, b, c))):
        return (
            float(np.float64(a) * np.float64(b) + np.float64(c))
            if np.isfinite(a) and np.isfinite(b)
            else a * b + c
        )
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return (
            (a * b if a == 0 or b == 0 else np.copysign(0.0, a) * np.copysign(1.0, b)) + c
            if a * b == 0 and c == 0
            else 0.0
        )
    value = rounded_fraction(name, exact)
    return value or float(np.copysign(0.0, float(exact > 0) - 0.5))


def float_references(name: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> dict[int, Any]:
    """Codes or numbers by operation; float64 in, each operation rounded once."""
    kind = np.float64 if name == "f64" else np.float32

    def once(x: np.ndarray) -> Any:
        return nearest(name, x) if bits_of(name) == 16 else x.astype(np.float64)

    # 16 bits: float64 has more than twice the bits, so rounding its result is rounding the exact one.
    p, q, r = (a, b, c) if bits_of(name) == 16 else (a.astype(kind), b.astype(kind), c.astype(kind))
    with np.errstate(all="ignore"):
        # Not np.fmax: the C library's returns NaN for a number and a signalling NaN.
        greater = np.where(np.isnan(a) | (b > a), b, a)
        smaller = np.where(np.isnan(a) | (b < a), b, a)
        nan = np.isnan(a) | np.isnan(b)
        ordered = np.where((a == b) & (a == 0), np.where(np.signbit(a) & np.signbit(b), -0.0, 0.0), greater)
        ordered_min = np.where(
            (a == b) & (a == 0), np.where(np.signbit(a) | np.signbit(b), -0.0, 0.0), smaller
        )
        want = {
            0: once(p + q), 1: once(p - q), 2: once(p * q), 3: once(p / q),
            4: np.array([exact_fma(name, *t) for t in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)]),
            5: greater, 6: smaller, 7: np.where(nan, np.nan, ordered), 8: np.where(nan, np.nan, ordered_min),
            9: (a < b) * 1.0, 10: (a <= b) * 1.0, 11: (a > b) * 1.0, 12: (a >= b) * 1.0, 13: (a == b) * 1.0,
            14: (a != b) * 1.0, 15: np.where(a < b, a, b), 16: -a, 17: np.abs(a), 18: ~(a < b) * 2.0,
        }  # fmt: skip
        if name in ("f32", "f64"):
            want |= {
                19: once(np.sqrt(p)),
                20: np.floor(a),
                21: np.ceil(a),
                22: once(np.fmod(p, q)),
                23: once(p * q + r),
            }
        if name == "f32":
            clamped = np.fmin(np.fmax(a, -1.0), 2.0)
            inverse = np.float32(1.0) / np.sqrt(p)
            want |= {
                24: want[3],
                25: want[19],
                26: clamped,
                27: np.where(np.isnan(a), np.nan, clamped),
                28: once(inverse),
            }
    return want


def check_floats(name: str, a: Any, b: Any, c: Any, *, scalars: bool = False) -> None:
    x, y, z = (from_codes(name, codes) for codes in (a, b, c))
    n = len(x)
    want = float_references(name, *(t.double().numpy() for t in (x, y, z)))
    out = torch.zeros(len(want) * n, dtype=ALL[name])
    if scalars:
        compiled = float_scalars[(n,)](x, y, z, out, n)
    else:
        compiled = float_tensors[(n // BLOCK,)](x, y, z, out, n, BLOCK=BLOCK)
    if "arith.negf" not in compiled.asm["ttir"]:
        with np.errstate(invalid="ignore"):
            want[16] = 0.0 + want[16]  # older versions of Triton write -a as 0 - a
    for k, expected in want.items():
        expect_codes(
            out[k * n : (k + 1) * n], expected, what=f"{name}, {FLOAT_NAMES[k]}", zero_sign=k not in (5, 6)
        )
    record([FLOAT_NAMES[k] for k in want], TYPE[name], "numpy and fractions, rounded once", n)


@pytest.mark.parametrize("scalars", [False, True], ids=["tensors", "scalars"])
@pytest.mark.parametrize("name", FLOAT)
def test_float_operations(name: str, scalars: bool) -> None:
    a, b = cross(name)
    c = np.roll(some_codes(name, len(a), 6), 3)
    check_floats(name, a, b, c, scalars=scalars)


@settings(max_examples=30)
@given(st.data())
def test_float_operations_drawn(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([*FLOAT]))
    drawn = data.draw(pairs(name))
    third = data.draw(
        st.lists(st.sampled_from(special_codes(name)), min_size=len(drawn), max_size=len(drawn))
    )
    check_floats(name, [p for p, _ in drawn], [q for _, q in drawn], third)
