"""Conversions between floats on the CPU backend, against integer arithmetic on their codes.

Formats of 8 and 16 bits are converted from all of their codes. From fp32 and fp64: every number of the narrower format,
every midpoint of two neighbours and what lies next to both, both signs, the overflow threshold, the source's own
subnormals, infinities, NaN, and random codes. Rounding is monotone, so a format's boundaries decide all of its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import recording
import torch
import triton
import triton.language as tl

BLOCK = 1024
REFERENCE = "integer arithmetic on the codes"


@dataclass(frozen=True)
class Layout:
    """A binary format by its encoding. `kind`: "ieee" has infinities and many NaNs; "fn" one NaN of each sign, no infinity;
    "fnuz" one NaN where -0 would be, no infinity."""

    dtype: torch.dtype
    bits: int
    fraction: int
    kind: str = "ieee"

    @property
    def sign(self) -> int:
        return 1 << (self.bits - 1)

    @property
    def bias(self) -> int:
        return (1 << (self.bits - self.fraction - 2)) - (self.kind != "fnuz")

    @property
    def least(self) -> int:
        """The exponent of the smallest subnormal."""
        return 1 - self.bias - self.fraction

    @property
    def largest(self) -> int:
        """The code of the largest finite number."""
        top = self.sign - 1
        return {"ieee": (top >> self.fraction << self.fraction) - 1, "fn": top - 1, "fnuz": top}[self.kind]

    def is_nan(self, codes: np.ndarray) -> np.ndarray:
        if self.kind == "fnuz":
            return codes == self.sign
        return (codes & (self.sign - 1)) > self.largest + (self.kind == "ieee")

    def is_inf(self, codes: np.ndarray) -> np.ndarray:
        return (codes & (self.sign - 1) == self.largest + 1) & (self.kind == "ieee")


FORMATS = {
    "e4m3fn": Layout(torch.float8_e4m3fn, 8, 3, "fn"),
    "e5m2": Layout(torch.float8_e5m2, 8, 2),
    "e4m3fnuz": Layout(torch.float8_e4m3fnuz, 8, 3, "fnuz"),
    "e5m2fnuz": Layout(torch.float8_e5m2fnuz, 8, 2, "fnuz"),
    "fp16": Layout(torch.float16, 16, 10),
    "bf16": Layout(torch.bfloat16, 16, 7),
    "fp32": Layout(torch.float32, 32, 23),
    "fp64": Layout(torch.float64, 64, 52),
}


def bit_length(n: np.ndarray) -> np.ndarray:
    return np.frexp(n.astype(np.float64))[1].astype(np.int64)  # n < 2^53


def converted(codes: np.ndarray, source: Layout, target: Layout) -> tuple[np.ndarray, np.ndarray]:
    """(codes, where NaN) of the numbers with these codes, rounded once to nearest even. Formats of 8 bits saturate."""
    codes = codes.astype(np.uint64).view(np.int64)
    negative = codes < 0 if source.bits == 64 else codes & source.sign != 0
    size = codes & (source.sign - 1)
    exponent, fraction = size >> source.fraction, size & ((1 << source.fraction) - 1)
    m = np.where(exponent > 0, fraction | (1 << source.fraction), fraction)
    e = np.maximum(exponent, 1) - 1 + source.least
    q = np.maximum(bit_length(m) + e - (target.fraction + 1), target.least)
    down, up = np.clip(q - e, 0, 62), np.clip(e - q, 0, 62)
    n, rest = (m >> down) << up, m & ((1 << down) - 1)
    half = np.where(down > 0, np.int64(1) << np.maximum(down - 1, 0), 0)
    n += (down > 0) & ((rest > half) | ((rest == half) & (n & 1 == 1)))
    out = ((q - target.least) << target.fraction) + n  # a carry goes into the exponent, as it should
    out = np.where(m == 0, 0, out)
    saturates = target.bits == 8
    limit = target.largest if saturates else target.largest + 1
    out = np.where((out > target.largest) | source.is_inf(codes), limit, out)
    nan = source.is_nan(codes) if source.kind == "fnuz" else source.is_nan(size)
    out = np.where(
        negative & ~((out == 0) & (target.kind == "fnuz")),
        out | np.int64(-(1 << 63) if target.bits == 64 else target.sign),
        out,
    )
    return out.view(np.uint64), nan


def boundaries(source: Layout, target: Layout) -> np.ndarray:
    """Codes of a wide format around everything at which rounding to a narrow one changes its result."""
    g = np.random.default_rng(11)
    top = source.sign - 1
    inf = top >> source.fraction << source.fraction
    found = [
        np.array(
            [
                0,
                1,
                2,
                (1 << source.fraction) - 1,
                1 << source.fraction,
                inf - 1,
                inf,
                inf + 1,
                top,
                top - (top >> 5),
            ]
        ),
        g.integers(0, top, 20_000, dtype=np.int64),
    ]
    wide: Any = np.float32 if source.bits == 32 else np.float64
    if target.bits <= 16:
        values = np.arange(target.largest + 1)
    else:  # fp32: some of each binade, subnormals included
        some = np.concatenate(
            [
                [0, 1, 2, 3],
                (1 << target.fraction) - np.array([1, 2, 3]),
                g.integers(0, 1 << target.fraction, 40),
            ]
        )
        values = ((np.arange(255)[:, None] << target.fraction) | some[None, :]).reshape(-1)
        values = np.unique(np.append(values, target.largest))
    numbers, _ = converted(values, target, FORMATS["fp64"])
    below = numbers.view(np.float64)
    after, _ = converted(values + 1, target, FORMATS["fp64"])
    above = np.where(
        values == target.largest,
        below + np.ldexp(1.0, np.frexp(below)[1] - target.fraction - 1),
        after.view(np.float64),
    )
    with np.errstate(over="ignore"):
        points = np.concatenate([below, (below + above) / 2]).astype(wide)
    near = np.concatenate([points, np.nextafter(points, wide(0)), np.nextafter(points, wide(np.inf))])
    found.append(near.view(f"int{source.bits}").astype(np.int64) & top)
    codes = np.unique(np.concatenate(found)).astype(np.uint64)
    return np.concatenate([codes, codes | np.uint64(source.sign)])


@triton.jit
def convert(x, y, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


def as_tensor(codes: np.ndarray, layout: Layout) -> torch.Tensor:
    raw = codes.astype(f"uint{layout.bits}").view(f"int{layout.bits}")
    return torch.from_numpy(np.pad(raw, (0, -len(raw) % BLOCK))).view(layout.dtype)


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_every_conversion_rounds_once(source: str, target: str) -> None:
    a, b = FORMATS[source], FORMATS[target]
    codes = (
        np.arange(1 << a.bits) if a.bits <= 16 else boundaries(a, b if b.bits < a.bits else FORMATS["fp16"])
    )
    x = as_tensor(codes, a)
    y = torch.zeros(len(x), dtype=b.dtype)
    convert[(len(x) // BLOCK,)](x, y, BLOCK=BLOCK)
    got = y.view(getattr(torch, f"int{b.bits}")).numpy().view(f"uint{b.bits}")[: len(codes)].astype(np.uint64)
    want, nan = converted(codes, a, b)
    if source == target:  # nothing is computed, so not even a NaN changes
        want, nan = codes.astype(np.uint64), np.zeros(len(codes), bool)
    is_nan = b.is_nan(got) if b.kind == "fnuz" else b.is_nan(got & np.uint64(b.sign - 1))
    wrong = np.where(nan, ~is_nan, got != want)
    first = int(np.flatnonzero(wrong)[0]) if wrong.any() else 0
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {len(codes)} wrong, first {int(codes[first]):#x}: "
        f"got {int(got[first]):#x}, expected {int(want[first]):#x}"
    )
    recording.compared("conversion", f"{source} to {target}", REFERENCE, len(codes))


def test_the_reference_agrees_with_numpy_and_rejects_a_second_rounding() -> None:
    codes = boundaries(FORMATS["fp64"], FORMATS["fp16"])
    want, nan = converted(codes, FORMATS["fp64"], FORMATS["fp16"])
    with np.errstate(all="ignore"):
        once = codes.view(np.float64).astype(np.float16).view(np.uint16)
        twice = codes.view(np.float64).astype(np.float32).astype(np.float16).view(np.uint16)
    assert (once == want)[~nan].all()
    assert (twice != want)[~nan].sum() > 100, "what rounds through fp32 is told apart"


def test_the_sample_has_the_overflow_threshold_and_its_neighbours() -> None:
    sample = set(boundaries(FORMATS["fp32"], FORMATS["fp16"]).tolist())
    threshold = int(np.float32(65520).view(np.uint32))
    assert {threshold - 1, threshold, threshold + 1} <= sample
    assert {int(np.float32(2.0**-25).view(np.uint32)) + d for d in (-1, 0, 1)} <= sample
