"""What tensor cores compute, in whole numbers: independent of the C that it is compared with.

The products of a block and the accumulator are aligned to the largest exponent among them (at least -126), truncated to F
fractional bits there, summed, and rounded. Sources: see effattn/cpu/models.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def parts(x: float, lowest: int) -> tuple[int, int]:
    """A finite number as m * 2^(e - 60), e its exponent, at least `lowest`."""
    if x == 0:
        return 0, -126 if lowest == -126 else -10_000
    top, bottom = abs(x).as_integer_ratio()
    e = max(
        top.bit_length()
        - bottom.bit_length()
        - ((top << 1100) < (bottom << (1100 + top.bit_length() - bottom.bit_length()))),
        lowest,
    )
    m, rest = divmod(top << 60, bottom << e) if e >= 0 else divmod(top << (60 - e), bottom)
    assert rest == 0
    return (m if x > 0 else -m), e


def toward_zero(n: int, d: int) -> int:
    return n // d if n >= 0 else -(-n // d)


def shifted(m: int, by: int) -> int:
    """m * 2^by, toward zero."""
    return m << by if by >= 0 else toward_zero(m, 1 << -by)


def rounded(m: int, e: int, to: str) -> float:
    """m * 2^e in fp32 or with 13 fraction bits, toward zero, or in fp16, to nearest even."""
    if m == 0:
        return 0.0
    fraction, lowest = {"f32": (23, -126), "e8m13": (13, -126), "f16": (10, -14)}[to]
    quantum = max(abs(m).bit_length() - 1 + e, lowest) - fraction
    if to == "f16":
        n = abs(m)
        keep = shifted(n, e - quantum)
        rest = (n << max(e, 0)) * 2 - (keep << 1 << max(quantum, 0)) if quantum <= e else 0
        if quantum > e:
            rest, half = n - (keep << (quantum - e)), 1 << (quantum - e - 1)
            keep += rest > half or (rest == half and keep % 2 == 1)
        value = keep * 2.0**quantum
        value = float("inf") if value >= 65536.0 else value
        return value if m > 0 else -value
    keep = shifted(m, e - quantum)
    return (
        float("inf" if m > 0 else "-inf") if abs(keep).bit_length() + quantum > 128 else keep * 2.0**quantum
    )


def element(a: Any, b: Any, c: float, block: int, bits: int, lows: tuple[int, int], to: str) -> float:
    """One element of a product: its blocks, each aligned, truncated, summed exactly and rounded."""
    low_c = -14 if to == "f16" else -126
    for start in range(0, len(a), block):
        x, y = a[start : start + block], b[start : start + block]
        with np.errstate(invalid="ignore"):
            total = float(np.sum(np.array(x) * np.array(y)) + c)
        if not np.isfinite(total):
            c = total
            continue
        terms = []
        for p, q in zip(x, y, strict=True):
            (m, e), (n, f) = parts(p, lows[0]), parts(q, lows[1])
            if m and n:
                terms.append((m * n, e + f, 120))
        m, e = parts(c, low_c)
        if m:
            terms.append((m, e, 60))
        top = max([-126, *(e for _, e, _ in terms)])
        # A term m * 2^(e - width) in units of 2^(top - bits).
        c = rounded(sum(shifted(m, e - width - top + bits) for m, e, width in terms), top - bits, to)
    return c


def defined(a: Any, b: Any, c: Any, block: int, bits: int, lows: tuple[int, int], to: str = "f32") -> Any:
    columns = b.T.tolist()
    return np.array(
        [
            [element(row, column, float(c[i, j]), block, bits, lows, to) for j, column in enumerate(columns)]
            for i, row in enumerate(a.tolist())
        ]
    )
