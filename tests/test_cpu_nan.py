"""What becomes of NaN and of signed zeros on the CPU backend: docs/cpu-backend.md, "NaN".

Where a value is only moved, every bit of it stays, of signalling NaNs too. Negation and abs touch the sign alone. What
is computed from a NaN is a NaN of which nothing else is promised.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import recording
import torch
import triton
import triton.language as tl

N = 256
FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
FRACTION = {"fp16": 10, "bf16": 7, "fp32": 23, "fp64": 52}


def bits(x: torch.Tensor) -> np.ndarray:
    width = 8 * x.element_size()
    return x.view(getattr(torch, f"int{width}")).numpy().view(f"uint{width}")


def nans(name: str) -> torch.Tensor:
    """N different codes: quiet and signalling NaNs of both signs, and a few numbers among them."""
    dtype = FLOATS[name]
    width, fraction = 8 * torch.empty((), dtype=dtype).element_size(), FRACTION[name]
    g = np.random.default_rng(5)
    payload = g.permutation((1 << min(fraction, 20)) - 1)[: N // 2].astype(np.uint64) + np.uint64(1)
    payload = np.resize(payload, N // 2) << np.uint64(fraction - min(fraction, 20))
    exponent = np.uint64(((1 << (width - 1 - fraction)) - 1) << fraction)
    codes = np.concatenate([exponent | payload, exponent | payload | np.uint64(1 << (width - 1))])
    codes[:8] = [0, 1 << (width - 1), exponent, exponent | np.uint64(1 << (width - 1)), 1, 2, 3, 4]
    raw = codes.astype(f"uint{width}").view(f"int{width}")
    return torch.from_numpy(raw.copy()).view(dtype)


@triton.jit
def moves(x, y, o, N: tl.constexpr):
    i = tl.arange(0, N)
    v, w = tl.load(x + i), tl.load(y + i)
    tl.store(o + i, v)
    tl.store(o + N + i, tl.where(i % 3 == 0, v, w))
    tl.store(o + 2 * N + i, tl.load(x + i, mask=i % 2 == 0, other=w))
    tl.store(o + 3 * N + i, tl.reshape(tl.trans(tl.reshape(v, (N // 16, 16))), (N,)))
    tl.store(
        o + 4 * N + i,
        tl.interleave(tl.reshape(v, (N // 2, 2)).split()[1], tl.reshape(w, (N // 2, 2)).split()[0]),
    )
    tl.store(o + 5 * N + i, tl.broadcast_to(tl.load(x + 9), (N,)))
    tl.store(o + 6 * N + i, tl.gather(v, N - 1 - i, 0))
    kept = v
    for k in range(3):
        kept = tl.where(i > k, kept, w)
    tl.store(o + 7 * N + i, kept)


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_only_moved_keeps_every_bit(name: str) -> None:
    x = nans(name)
    y = x.flip(0).contiguous()
    out = torch.zeros(8 * N, dtype=x.dtype)
    moves[(1,)](x, y, out, N=N)
    v, w, i = bits(x), bits(y), np.arange(N)
    want = [
        v, np.where(i % 3 == 0, v, w), np.where(i % 2 == 0, v, w), v.reshape(N // 16, 16).T.reshape(-1),
        np.stack([v[1::2], w[0::2]], 1).reshape(-1), np.full(N, v[9]), v[::-1], np.where(i > 2, v, w),
    ]  # fmt: skip
    for k, (got, expected) in enumerate(zip(bits(out).reshape(8, N), want, strict=True)):
        np.testing.assert_array_equal(got, expected, err_msg=f"move {k}")
    recording.compared(
        "moves (load, store, where, other, trans, join, gather, loops)", name, "the same bits", 8 * N
    )


@triton.jit
def signs(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(o + i, -v)
    tl.store(o + N + i, tl.abs(v))


@pytest.mark.parametrize("name", FLOATS)
def test_negation_and_abs_touch_the_sign_alone(name: str) -> None:
    x = nans(name)
    out = torch.zeros(2 * N, dtype=x.dtype)
    compiled = signs[(1,)](x, out, N=N)
    sign = bits(-torch.zeros(1, dtype=x.dtype))[0]
    negated, absolute = bits(out).reshape(2, N)
    np.testing.assert_array_equal(absolute, bits(x) & ~sign)
    if "arith.negf" in compiled.asm["ttir"]:
        np.testing.assert_array_equal(negated, bits(x) ^ sign)
    recording.compared("negation, abs of NaN", name, "the sign bit", 2 * N)


@triton.jit
def computed(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    one = (i * 0 + 1).to(v.dtype)
    tl.store(o + i, v + one)
    tl.store(o + N + i, one - v)
    tl.store(o + 2 * N + i, v * one)
    tl.store(o + 3 * N + i, one / v)
    tl.store(o + 4 * N + i, tl.fma(one, v, one))
    tl.store(o + 5 * N + i, tl.maximum(v, one, propagate_nan=tl.PropagateNan.ALL))
    tl.store(o + 6 * N + i, tl.maximum(v, one))
    tl.store(o + 7 * N + i, tl.minimum(one, v))
    tl.store(o + 8 * N + i, (v == v).to(v.dtype))
    tl.store(o + 9 * N + i, (v != v).to(v.dtype))
    tl.store(o + 10 * N + i, ((v < one) | (v >= one)).to(v.dtype))


@pytest.mark.parametrize("name", FLOATS)
def test_what_is_computed_from_nan(name: str) -> None:
    x = nans(name)
    out = torch.zeros(11 * N, dtype=x.dtype)
    computed[(1,)](x, out, N=N)
    rows, nan = out.reshape(11, N).double(), x.double().isnan()
    for k in range(6):
        assert rows[k][nan].isnan().all(), f"operation {k} loses a NaN"
    for k, value in ((6, 1.0), (7, 1.0), (8, 0.0), (9, 1.0), (10, 0.0)):
        assert (rows[k][nan] == value).all(), f"operation {k}: a NaN is no number, and compares as none"
    recording.compared("arithmetic and comparison of NaN", name, "NaN, or false", 11 * int(nan.sum()))


@triton.jit
def atomics(x, y, old, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(old + i, tl.atomic_xchg(y + i, tl.load(x + i)))


def test_an_exchange_moves_every_bit() -> None:
    x = nans("fp32")
    y, old = x.flip(0).contiguous(), torch.zeros(N)
    before = bits(y).copy()
    atomics[(1,)](x, y, old, N=N)
    np.testing.assert_array_equal(bits(y), bits(x))
    np.testing.assert_array_equal(bits(old), before)


@triton.jit
def reduced(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + tl.program_id(0) * N + i)
    tl.store(o + tl.program_id(0) * 4, tl.sum(v, 0))
    tl.store(o + tl.program_id(0) * 4 + 1, tl.max(v, 0))
    tl.store(o + tl.program_id(0) * 4 + 2, tl.sum(v * 0.0, 0))
    tl.store(o + tl.program_id(0) * 4 + 3, tl.cumsum(v, 0).to(tl.float32).sum() * 0.0)


def test_reductions_and_scans_of_nan_and_of_zeros() -> None:
    rows = torch.ones(4, 32)
    rows[0, 7] = float("nan")
    rows[1] = -0.0
    rows[2, 3], rows[2, 4] = float("inf"), -float("inf")
    out: Any = torch.zeros(4, 4)
    reduced[(4,)](rows, out, N=32)
    assert out[0].isnan().tolist() == [True, False, True, True]
    assert out[0, 1] == 1.0
    assert torch.signbit(out[1, 0]), "a sum of -0 is -0: it starts from its first element, not from 0"
    assert out[2].isnan().tolist() == [True, False, True, True], "infinities of both signs"
    assert out[3].tolist() == [32.0, 1.0, 0.0, 0.0]
