"""Numbers of every dtype by their codes, and references that share no code with the CPU backend: for test_cpu_numbers.py."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import numpy as np
import recording
import torch
from hypothesis import strategies as st

FLOAT = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}
SIGNED = {f"i{b}": getattr(torch, f"int{b}") for b in (8, 16, 32, 64)}
UNSIGNED = {f"u{b}": getattr(torch, f"uint{b}") for b in (8, 16, 32, 64)}
ALL = {**FLOAT, **SIGNED, **UNSIGNED}
#: how tables name them
TYPE = {"f16": "fp16", "bf16": "bf16", "f32": "fp32", "f64": "fp64"}
#: significant bits, exponent of the smallest subnormal, exponent beyond the largest number
FORMAT = {"f16": (11, -24, 16), "bf16": (8, -133, 128), "f32": (24, -149, 128), "f64": (53, -1074, 1024)}


#: elements that a program takes
BLOCK = 256


def bits_of(name: str) -> int:
    return 16 if name == "bf16" else int(name[1:])


# ---------------------------------------------------------------------------------------------- references


def from_codes(name: str, codes: Any) -> torch.Tensor:
    """A tensor whose elements have these bits, followed by zeros up to a multiple of what a program takes."""
    bits = bits_of(name)
    raw = np.asarray(codes, dtype=np.uint64).astype(f"uint{bits}").view(f"int{bits}")
    raw = np.pad(raw, (0, -len(raw) % BLOCK))
    return torch.from_numpy(raw.copy()).view(ALL[name])


def codes_of(x: torch.Tensor) -> np.ndarray:
    size = x.element_size()
    return x.contiguous().view(getattr(torch, f"int{8 * size}")).numpy().view(f"uint{8 * size}")


@functools.cache
def table(name: str) -> np.ndarray:
    """All non-negative numbers of a format of 16 bits in order, and the next power of two for infinity."""
    finite = from_codes(name, np.arange(0x8000)).double().numpy()[:0x8000]
    finite = finite[np.isfinite(finite)]
    return np.append(finite, 2.0 ** FORMAT[name][2])


def nearest(name: str, x: np.ndarray) -> np.ndarray:
    """Codes of float64 numbers rounded to a format of 16 bits: to nearest, ties to the even code."""
    values = table(name)
    a = np.abs(x)
    high = np.clip(np.searchsorted(values, a), 1, len(values) - 1)
    low = high - 1
    middle = (values[low] + values[high]) / 2
    code = np.where(a < middle, low, np.where(a > middle, high, low + (low & 1)))
    code = np.where(a >= values[-1], len(values) - 1, code)
    code = np.where(np.isnan(x), len(values), code)
    return (code | np.where(np.signbit(x), 0x8000, 0)).astype(np.uint16)


def rounded_fraction(name: str, x: Fraction) -> float:
    """A fraction rounded once to a format, to nearest even."""
    bits, least, beyond = FORMAT[name]
    if x == 0:
        return 0.0
    e = abs(x).numerator.bit_length() - abs(x).denominator.bit_length()
    if abs(x) < Fraction(2) ** e:
        e -= 1
    unit = Fraction(2) ** max(e - bits + 1, least)
    n = round(x / unit)  # ties to even
    value = n * unit
    if abs(value) >= Fraction(2) ** beyond:
        return float("inf") if value > 0 else float("-inf")
    return float(value)


def wrap(n: int, name: str) -> int:
    bits = bits_of(name)
    n &= (1 << bits) - 1
    return n - (1 << bits) if name[0] == "i" and n >> (bits - 1) else n


def limits(name: str) -> tuple[int, int]:
    bits = bits_of(name)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if name[0] == "i" else (0, (1 << bits) - 1)


def to_int(name: str, x: np.ndarray) -> np.ndarray:
    """Codes: toward zero; saturating; NaN to 0."""
    low, high = limits(name)
    y = np.trunc(np.where(np.isnan(x), 0.0, x))
    over, under = y >= float(high + 1), y < float(low)
    inside = np.where(over | under, 0.0, y)
    codes = inside.astype(np.uint64) if name == "u64" else inside.astype(np.int64).astype(np.uint64)
    mask = (1 << bits_of(name)) - 1
    codes = np.where(over, np.uint64(high), np.where(under, np.uint64(low & mask), codes & np.uint64(mask)))
    return codes.astype(f"uint{bits_of(name)}")


def expect_codes(got: torch.Tensor, want: Any, *, what: str, zero_sign: bool = True) -> None:
    """`want`: codes, or float64 numbers that the dtype of `got` holds."""
    name = next(k for k, v in ALL.items() if v == got.dtype)
    have = codes_of(got)
    if isinstance(want, np.ndarray) and want.dtype.kind == "f":
        want_codes = codes_of(torch.from_numpy(want.astype(np.float64)).to(got.dtype))
        assert name in FLOAT
    elif isinstance(want, np.ndarray):
        want_codes = want
    else:
        want_codes = np.asarray(
            [int(w) & ((1 << bits_of(name)) - 1) for w in want], dtype=f"uint{bits_of(name)}"
        )
    same = have == want_codes
    if name in FLOAT:
        a, b = got.double().numpy(), from_codes(name, want_codes).double().numpy()[: len(have)]
        same |= np.isnan(a) & np.isnan(b)
        if not zero_sign:
            same |= (a == 0) & (b == 0)
    assert same.all(), (
        f"{what}: {int((~same).sum())} of {same.size} wrong, first at {int(np.flatnonzero(~same)[0])}: "
        f"got {have[~same][0]:#x}, expected {want_codes[~same][0]:#x}"
    )


def record(names: list[str], types: str, reference: str, each: int) -> None:
    """Note what was compared, `each` values of every operation."""
    for name in names:
        recording.compared(name, types, reference, each)


# ------------------------------------------------------------------------------------------------- values


def special_codes(name: str) -> list[int]:
    bits = bits_of(name)
    if name not in FLOAT:
        low, high = limits(name)
        near = [
            0,
            1,
            2,
            3,
            5,
            7,
            8,
            15,
            16,
            31,
            32,
            33,
            63,
            64,
            65,
            low,
            low + 1,
            high,
            high - 1,
            -1,
            -2,
            -3,
            high // 2,
        ]
        return [n & ((1 << bits) - 1) for n in near]
    fraction = FORMAT[name][0] - 1
    sign, inf = 1 << (bits - 1), ((1 << (bits - 1 - fraction)) - 1) << fraction
    one = (inf >> 1) & ~((1 << fraction) - 1) & ((1 << (bits - 1)) - 1)
    unit, half = 1 << fraction, 1 << (fraction - 1)
    positive = [0, 1, 2, unit - 1, unit, unit + 1, one - 1, one, one + 1, one + unit, one + 3 * half]
    positive += [inf - 1, inf, inf + 1, inf + half, inf | (unit - 1)]
    return [c | s for c in positive for s in (0, sign)]


def some_codes(name: str, count: int, seed: int) -> np.ndarray:
    g = np.random.default_rng(seed)
    bits = bits_of(name)
    codes = (
        g.integers(0, 1 << bits, count, dtype=np.uint64)
        if bits < 64
        else g.integers(0, 1 << 64, count, dtype=np.uint64)
    )
    special = np.array(special_codes(name), dtype=np.uint64)
    pick = g.random(count) < 0.3
    codes[pick] = special[g.integers(0, len(special), int(pick.sum()))]
    if name in FLOAT:  # numbers of like size, so that sums cancel and round
        close = g.random(count) < 0.4
        values = torch.from_numpy(g.standard_normal(count) * 2.0 ** g.integers(-4, 5, count)).to(FLOAT[name])
        codes[close] = codes_of(values).astype(np.uint64)[close]
    elif bits > 8:
        small = g.random(count) < 0.4
        codes[small] = (g.integers(-100, 100, count) & ((1 << min(bits, 63)) - 1)).astype(np.uint64)[small]
    return codes


def cross(name: str) -> tuple[np.ndarray, np.ndarray]:
    s = np.array(special_codes(name), dtype=np.uint64)
    a, b = np.repeat(s, len(s)), np.tile(s, len(s))
    return np.concatenate([a, some_codes(name, 4000, 1)]), np.concatenate([b, some_codes(name, 4000, 2)])


def pairs(name: str) -> st.SearchStrategy[list[tuple[int, int]]]:
    code = st.one_of(st.sampled_from(special_codes(name)), st.integers(0, (1 << bits_of(name)) - 1))
    return st.lists(st.tuples(code, code), min_size=1, max_size=40)
