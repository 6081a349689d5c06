"""Reductions, scans, products and rearrangements of tiles on the CPU backend, bit for bit in the documented order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import recording
import torch
import triton
import triton.language as tl

# -------------------------------------------------------------------------------------------- references


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)
    return torch.randint(-1000, 1000, shape, generator=g).to(dtype)


def documented_sum(x: np.ndarray, axis: int) -> np.ndarray:
    """fp32 and fp64: along the last axis of more than one element 16 lanes and then halves, else in order."""
    parts = np.moveaxis(x, axis, 0)
    n = len(parts)
    if any(k != 1 for k in x.shape[axis + 1 :]):
        total = parts[0].copy()
        for part in parts[1:]:
            total = total + part
        return total
    w = min(n, 16)
    lane = parts[:w].copy()
    for j in range(w, n, w):
        lane = lane + parts[j : j + w]
    while w > 1:
        w //= 2
        lane = lane[:w] + lane[w : 2 * w]
    return lane[0]


def chain(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + sum over k of a[k] b[k], one element of k after the other. The products must be exact in the type of c."""
    for k in range(a.shape[-1]):
        c = c + a[..., :, k : k + 1].astype(c.dtype) * b[..., k : k + 1, :].astype(c.dtype)
    return c


def same(got: torch.Tensor, want: Any) -> None:
    assert torch.equal(got, torch.as_tensor(want).reshape(got.shape).to(got.dtype)), (got, want)


# -------------------------------------------------------------------------------------------- reductions


@triton.jit
def _xor(a, b):
    return a ^ b


@triton.jit
def _last_of(a, b):
    return b


@triton.jit
def _span(low_a, high_a, low_b, high_b):
    return tl.minimum(low_a, low_b).to(low_a.dtype), tl.maximum(high_a, high_b).to(high_a.dtype)


@triton.jit
def _offsets(A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    return (
        tl.arange(0, A)[:, None, None] * (B * C)
        + tl.arange(0, B)[None, :, None] * C
        + tl.arange(0, C)[None, None, :]
    )


@triton.jit
def reduce_all(x, o, oi, AXIS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """Each reduction of a tensor of rank 3, kept axes of length 1; `o` in the input's type, `oi` for indices."""
    at = _offsets(A, B, C)
    n: tl.constexpr = A * B * C
    # What is left of each index once the axis is gone.
    left = at * 0 + _offsets(A if AXIS != 0 else 1, B if AXIS != 1 else 1, C if AXIS != 2 else 1)
    v = tl.load(x + at)
    kind: tl.constexpr = x.dtype.element_ty
    tl.store(o + left, tl.sum(v, AXIS, keep_dims=True).to(kind))
    tl.store(o + n + left, tl.max(v, AXIS, keep_dims=True).to(kind))
    tl.store(o + 2 * n + left, tl.min(v, AXIS, keep_dims=True).to(kind))
    tl.store(o + 3 * n + left, tl.reduce(v, AXIS, _last_of, keep_dims=True))
    low, high = tl.reduce((v, v), AXIS, _span, keep_dims=True)
    tl.store(o + 4 * n + left, low)
    tl.store(o + 5 * n + left, high)
    tl.store(oi + left, tl.argmax(v, AXIS, keep_dims=True))
    tl.store(oi + n + left, tl.argmin(v, AXIS, keep_dims=True))
    top, where = tl.max(v, AXIS, return_indices=True, keep_dims=True)
    tl.store(o + 6 * n + left, top.to(kind))
    tl.store(oi + 2 * n + left, where)
    # The same values, computed instead of loaded: the order of a sum must not depend on it.
    tl.store(o + 7 * n + left, tl.sum(v * 1, AXIS, keep_dims=True).to(kind))
    if kind.is_int():
        tl.store(o + 8 * n + left, tl.xor_sum(v, AXIS, keep_dims=True))


SHAPES = [
    (1, 1, 1),
    (1, 1, 16),
    (1, 4, 8),
    (2, 32, 4),
    (8, 1, 64),
    (1, 512, 1),
    (16, 2, 2),
    (1, 2, 512),
    (4, 16, 1),
]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_reductions(dtype: torch.dtype, axis: int) -> None:
    for shape in SHAPES[: 9 if dtype == torch.float32 else 5]:
        check_reductions(shape, dtype, axis)


@pytest.mark.parametrize(
    ("dtype", "shape", "axis"),
    [
        (torch.float64, (1, 4, 32), 2),
        (torch.float64, (8, 4, 4), 0),
        (torch.float16, (2, 4, 32), 2),
        (torch.bfloat16, (2, 32, 4), 1),
        (torch.int64, (2, 4, 32), 2),
        (torch.int8, (2, 4, 32), 2),
        (torch.int16, (2, 32, 4), 1),
    ],
    ids=str,
)
def test_reductions_of_other_types(dtype: torch.dtype, shape: tuple[int, ...], axis: int) -> None:
    check_reductions(shape, dtype, axis)


def check_reductions(shape: tuple[int, ...], dtype: torch.dtype, axis: int) -> None:
    x = values(shape, dtype)
    if dtype == torch.int8:
        x = (x % 7).to(dtype)  # the sum fits
    x.view(-1)[: x.numel() // 2] = x.view(-1)[x.numel() // 2 :][: x.numel() // 2]  # ties
    n, left = x.numel(), [k if a != axis else 1 for a, k in enumerate(shape)]
    m = n // shape[axis]
    o, oi = torch.zeros(9 * n, dtype=dtype), torch.zeros(3 * n, dtype=torch.int32)
    reduce_all[(1,)](x, o, oi, AXIS=axis, A=shape[0], B=shape[1], C=shape[2])
    wide = x.double().numpy() if dtype.is_floating_point else x.numpy()
    if dtype in (torch.float32, torch.float64):
        total = documented_sum(x.numpy(), axis)
    elif dtype.is_floating_point:
        parts = x.unbind(axis)
        total = parts[0]
        for part in parts[1:]:
            total = total + part  # rounded to 16 bits each time
    else:
        total = wide.sum(axis, dtype=wide.dtype)
    top, low, last = wide.max(axis), wide.min(axis), wide.take(-1, axis)
    for k, want in enumerate([total, top, low, last, low, top, top, total]):
        same(o[k * n : k * n + m].reshape(left), want)
    for k, want in enumerate([wide.argmax(axis), wide.argmin(axis), wide.argmax(axis)]):
        same(oi[k * n : k * n + m].reshape(left), want)
    names = ["sum", "max", "min", "reduce (last of two)", "reduce (two results)", "argmax", "argmin"]
    if not dtype.is_floating_point:
        same(o[8 * n : 8 * n + m].reshape(left), np.bitwise_xor.reduce(x.numpy(), axis))
        names.append("xor_sum")
    for name in names:
        recording.compared(name, str(dtype).removeprefix("torch."), "numpy, in the documented order", n)


@triton.jit
def reduce_virtual(x, o, N: tl.constexpr, M: tl.constexpr):
    """Sums of computed, transposed and reshaped tiles, and of scalars' splats."""
    i, j = tl.arange(0, N), tl.arange(0, M)
    v = tl.load(x + i[:, None] * M + j[None, :])
    tl.store(o + j, tl.sum(tl.trans(v), 1))
    tl.store(o + M + j, tl.sum(v + 0.0, 0))
    tl.store(o + 2 * M, tl.sum(tl.reshape(v, (N * M,)), 0))
    tl.store(o + 2 * M + 1, tl.sum(tl.ravel(tl.trans(v)), 0))
    tl.store(o + 2 * M + 2, tl.max(tl.max(v, 1), 0))


def test_the_order_of_a_sum_does_not_depend_on_how_its_operand_is_kept() -> None:
    n, m = 64, 32
    x = values((n, m), torch.float32)
    o = torch.zeros(2 * m + 3)
    reduce_virtual[(1,)](x, o, N=n, M=m)
    a = x.numpy()
    same(o[:m], documented_sum(a.T, 1))
    same(o[m : 2 * m], documented_sum(a, 0))
    same(o[2 * m], documented_sum(a.reshape(-1), 0))
    same(o[2 * m + 1], documented_sum(a.T.reshape(-1), 0))
    same(o[2 * m + 2], a.max())


@triton.jit
def extremes(x, o, N: tl.constexpr):
    v = tl.load(x + tl.program_id(0) * N + tl.arange(0, N))
    at = o + tl.program_id(0) * 2
    tl.store(at, tl.max(v, 0))
    tl.store(at + 1, tl.min(v, 0))


@pytest.mark.parametrize("n", [4, 16, 64])
def test_extremes_ignore_nan_unless_there_is_nothing_else(n: int) -> None:
    inf, nan = float("inf"), float("nan")
    rows = torch.full((6, n), nan)
    rows[1, n - 1] = 3.0
    rows[2] = -inf
    rows[3, 0] = -inf
    rows[4, n // 2] = inf
    rows[5] = torch.arange(float(n)) - 2
    rows[5, 1] = nan
    o = torch.zeros(6, 2)
    extremes[(6,)](rows, o, N=n)
    want = torch.tensor([[nan, nan], [3, 3], [-inf, -inf], [-inf, -inf], [inf, inf], [n - 3, -2]])
    np.testing.assert_array_equal(o.numpy(), want.numpy())


# ------------------------------------------------------------------------------------------------- scans


@triton.jit
def _carry(a, x, b, y):
    return a * b, x * b + y


@triton.jit
def scan_all(
    x, o, AXIS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, REVERSE: tl.constexpr
):
    at = _offsets(A, B, C)
    n: tl.constexpr = A * B * C
    v = tl.load(x + at)
    tl.store(o + at, tl.cumsum(v, AXIS, reverse=REVERSE))
    tl.store(o + n + at, tl.associative_scan(v + 1, AXIS, _xor, reverse=REVERSE))
    a, b = tl.associative_scan((v, v + 2), AXIS, _carry, reverse=REVERSE)
    tl.store(o + 2 * n + at, a)
    tl.store(o + 3 * n + at, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((1, 1, 32), 2), ((2, 8, 4), 1), ((4, 2, 2), 0), ((1, 1, 1), 2)])
def test_scans(shape: tuple[int, ...], axis: int, reverse: bool) -> None:
    x = values(shape, torch.int32)
    n = x.numel()
    o = torch.zeros(4 * n, dtype=torch.int32)
    scan_all[(1,)](x, o, AXIS=axis, A=shape[0], B=shape[1], C=shape[2], REVERSE=reverse)
    v = np.moveaxis(x.numpy(), axis, 0)
    v = v[::-1] if reverse else v
    a, b = v.copy(), v + 2
    with np.errstate(over="ignore"):
        for k in range(1, len(v)):
            a[k], b[k] = a[k - 1] * v[k], b[k - 1] * v[k] + (v[k] + 2)
    for k, want in enumerate([v.cumsum(0, dtype=np.int32), np.bitwise_xor.accumulate(v + 1, 0), a, b]):
        want = want[::-1] if reverse else want
        same(o[k * n : (k + 1) * n].reshape(shape), np.moveaxis(want, 0, axis).copy())
    for name in ("cumsum", "associative_scan (xor)", "associative_scan (two results)"):
        recording.compared(name, "int32", "numpy, in order", n)


@triton.jit
def running_sum(x, o, N: tl.constexpr):
    tl.store(o + tl.arange(0, N), tl.cumsum(tl.load(x + tl.arange(0, N)), 0))


def test_a_scan_of_floats_goes_in_order() -> None:
    x = values((256,), torch.float32)
    o = torch.zeros(256)
    running_sum[(1,)](x, o, N=256)
    same(o, np.cumsum(x.numpy()))


# ------------------------------------------------------------------------------------------------ products


@triton.jit
def product(
    a,
    b,
    c,
    o,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    MODE: tl.constexpr,
    PRECISION: tl.constexpr = "ieee",
):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + i[:, None] * K + k[None, :])
    at = i[:, None] * N + j[None, :]
    if MODE == "transposed":
        y = tl.trans(tl.load(b + j[:, None] * K + k[None, :]))
    else:
        y = tl.load(b + k[:, None] * N + j[None, :])
    if MODE == "plain" or MODE == "transposed":
        tl.store(o + at, tl.dot(x, y, input_precision=PRECISION, out_dtype=o.dtype.element_ty))
    elif MODE == "added":
        z = tl.load(c + at)
        w = tl.dot(x, y, z, input_precision=PRECISION, out_dtype=o.dtype.element_ty)
        tl.store(o + at, w)
        tl.store(o + M * N + at, z)  # still what it was
    elif MODE == "carried":
        z = tl.load(c + at)
        for _ in range(3):
            z = tl.dot(x, y, z, input_precision=PRECISION, out_dtype=o.dtype.element_ty)
        tl.store(o + at, z)
    else:  # not in place: the last value is still read
        z = tl.load(c + at)
        w = z
        for _ in range(3):
            w = z
            z = tl.dot(x, y, z, input_precision=PRECISION, out_dtype=o.dtype.element_ty)
            w = w + z
        tl.store(o + at, w)


def short(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers whose products are exact in fp32: 12 significant bits."""
    x = values(shape, torch.float32, seed)
    return x.half().to(dtype) if dtype == torch.float32 else x.to(dtype)


@pytest.mark.parametrize("mode", ["plain", "transposed", "added", "carried", "kept"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products(dtype: torch.dtype, mode: str) -> None:
    shapes = [(16, 16, 16), (32, 64, 16)]
    if mode == "plain":
        shapes = [(1, 1, 1), (2, 4, 8), (4, 2, 256), (64, 64, 64), (16, 128, 32), (1, 256, 2), (8, 8, 4)]
    for m, n, k in shapes:
        a, b, c = short((m, k), dtype, 1), short((k, n), dtype, 2), values((m, n), torch.float32, 3)
        given = b.T.contiguous() if mode == "transposed" else b
        o = torch.zeros(2 * m * n)
        product[(1,)](a, given, c, o, M=m, N=n, K=k, MODE=mode)
        p, q, z = a.float().numpy(), b.float().numpy(), c.numpy()
        if mode in ("plain", "transposed"):
            want = chain(p, q, np.zeros_like(z))
        elif mode == "added":
            want = chain(p, q, z)
            same(o[m * n :], c)
        else:
            for _ in range(3):
                before, z = z, chain(p, q, z)
            want = z if mode == "carried" else before + z
        same(o[: m * n], want)
        recording.compared(
            "dot", f"{str(dtype).removeprefix('torch.')} to float32", "a chain of exact products", m * n
        )


def test_products_of_half_precision_accumulators_round_once() -> None:
    a, b, c = (short((32, 32), torch.float16, s) for s in (1, 2, 3))
    for mode in ("plain", "added", "carried"):
        o = torch.zeros(2 * 1024, dtype=torch.float16)
        product[(1,)](a, b, c, o, M=32, N=32, K=32, MODE=mode)
        z = np.zeros((32, 32), np.float32) if mode == "plain" else c.float().numpy()
        for _ in range(3 if mode == "carried" else 1):
            z = chain(a.float().numpy(), b.float().numpy(), z).astype(np.float16).astype(np.float32)
        same(o[:1024], z)


def test_products_of_integers() -> None:
    g = torch.Generator().manual_seed(0)
    for m, n, k in [(16, 16, 16), (32, 8, 64), (4, 64, 128)]:
        a, b = (torch.randint(-128, 128, s, generator=g, dtype=torch.int8) for s in ((m, k), (k, n)))
        c = torch.randint(-(2**31), 2**31, (m, n), generator=g).to(torch.int32)
        o = torch.zeros(2 * m * n, dtype=torch.int32)
        for mode in ("added", "carried"):
            product[(1,)](a, b, c, o, M=m, N=n, K=k, MODE=mode)
            turns = 3 if mode == "carried" else 1
            same(o[: m * n], (c.long() + turns * (a.long() @ b.long()) + 2**31) % 2**32 - 2**31)


def test_products_of_double_precision() -> None:
    a, b, c = (
        values((16, 32), torch.float32, 1),
        values((32, 8), torch.float32, 2),
        values((16, 8), torch.float64, 3),
    )
    o = torch.zeros(2 * 128, dtype=torch.float64)
    product[(1,)](a.double(), b.double(), c, o, M=16, N=8, K=32, MODE="added")
    same(o[:128], chain(a.double().numpy(), b.double().numpy(), c.numpy()))


def test_a_product_of_single_precision_is_fused() -> None:
    """c = fma(a, b, c): with K = 1 exact in float64 and rounded once."""
    a, b, c = (
        values((64, 1), torch.float32, 1),
        values((1, 64), torch.float32, 2),
        values((64, 64), torch.float32, 3),
    )
    c = -(a * b) + c * 2.0**-22  # cancels: what a first rounding lost would be the result
    o = torch.zeros(2 * 4096)
    product[(1,)](a, b, c, o, M=64, N=64, K=1, MODE="added")
    same(o[:4096], (a.double() * b.double() + c.double()).float())
    assert not torch.equal(o[:4096].reshape(64, 64), a * b + c)


def test_tf32_rounds_the_factors_to_ten_bits_ties_away_from_zero() -> None:
    a, b, c = (
        values((16, 16), torch.float32, 1),
        values((16, 16), torch.float32, 2),
        values((16, 16), torch.float32, 3),
    )
    a[0, 0], a[0, 1], a[1, 0] = 1 + 2.0**-11, -1 - 2.0**-11, float("inf")
    o = torch.zeros(512)
    product[(1,)](a, b, c, o, M=16, N=16, K=16, MODE="added", PRECISION="tf32")

    def tf32(x: torch.Tensor) -> np.ndarray:
        m, e = np.frexp(x.double().numpy())
        return np.ldexp(np.trunc(m * 2**11 + np.copysign(0.5, m)), e - 11).astype(np.float32)

    with np.errstate(invalid="ignore"):
        want = chain(tf32(a), tf32(b), c.numpy())
    np.testing.assert_array_equal(o[:256].reshape(16, 16).numpy(), want)


@triton.jit
def both_ways(a, o, N: tl.constexpr):
    """One tile as left factor, right factor and transposed, after an update of it in a loop."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x = tl.load(a + at)
    total = tl.zeros([N, N], tl.float32)
    for _ in range(2):
        y = x.to(tl.float16)
        total += tl.dot(y, tl.trans(y))
        total += tl.dot(tl.trans(y), y)
        total = tl.trans(total)
        x = x * 0.5
    tl.store(o + at, total)
    tl.store(o + N * N + at, tl.dot(x.to(tl.float16), tl.trans(x.to(tl.float16))))


def test_factors_that_are_used_straight_and_transposed() -> None:
    x = short((32, 32), torch.float32, 1)
    o = torch.zeros(2 * 1024)
    both_ways[(1,)](x, o, N=32)
    total, zero, a = np.zeros((32, 32), np.float32), np.zeros((32, 32), np.float32), x.numpy()
    for _ in range(2):
        # Triton turns a tensor plus a product into a product that starts from the tensor.
        total = chain(a.T, a, chain(a, a.T, total)).T
        a = a * np.float32(0.5)
    same(o[:1024], total.copy())
    same(o[1024:], chain(a, a.T, zero))


@triton.jit
def batched(a, b, o, S: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    s, i, j, k = tl.arange(0, S)[:, None, None], tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + s * M * K + i[None, :, None] * K + k[None, None, :])
    y = tl.load(b + s * K * N + k[None, :, None] * N + j[None, None, :])
    tl.store(o + s * M * N + i[None, :, None] * N + j[None, None, :], tl.dot(x, y))


def test_batches_of_products() -> None:
    a, b = short((4, 16, 32), torch.float16, 1), short((4, 32, 8), torch.float16, 2)
    o = torch.zeros(4, 16, 8)
    batched[(1,)](a, b, o, S=4, M=16, N=8, K=32)
    same(o, chain(a.float().numpy(), b.float().numpy(), np.zeros((4, 16, 8), np.float32)))


# ------------------------------------------------------------------------------------------ rearrangements


@triton.jit
def rearrange(x, o, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    n: tl.constexpr = A * B * C
    flat = tl.arange(0, n)
    v = tl.load(x + _offsets(A, B, C)) + 1
    tl.store(o + flat, tl.reshape(v, (n,)))
    tl.store(o + n + flat, tl.reshape(tl.permute(v, (2, 0, 1)), (n,)))
    tl.store(o + 2 * n + flat, tl.reshape(tl.trans(v, (1, 0, 2)), (n,)))
    tl.store(o + 3 * n + flat, tl.reshape(tl.permute(tl.reshape(v, (B, A * C)), (1, 0)), (n,)))
    a, b = tl.split(tl.reshape(v, (n // 2, 2)))
    half = tl.arange(0, n // 2)
    tl.store(o + 4 * n + half, a - b)
    tl.store(o + 5 * n + flat, tl.reshape(tl.join(b, a), (n,)))
    tl.store(o + 6 * n + flat, tl.interleave(a, b))
    tl.store(o + 7 * n + tl.arange(0, n), tl.sort(tl.interleave(b, a)))
    tl.store(o + 8 * n + flat, tl.flip(flat, 0))
    wide = tl.broadcast_to(tl.reshape(v, (A, B, C))[:, :, :, None], (A, B, C, 2))
    tl.store(o + 9 * n + tl.arange(0, 2 * n), tl.reshape(wide, (2 * n,)))


def test_rearrangements() -> None:
    a, b, c = 4, 2, 8
    x = torch.randperm(64).to(torch.int32).reshape(a, b, c)
    n = 64
    o = torch.zeros(11 * n, dtype=torch.int32)
    rearrange[(1,)](x, o, A=a, B=b, C=c)
    v = x + 1
    p, q = v.reshape(n // 2, 2).unbind(1)
    want = {
        0: v.reshape(-1), 1: v.permute(2, 0, 1).reshape(-1), 2: v.transpose(0, 1).reshape(-1),
        3: v.reshape(b, a * c).T.reshape(-1), 4: p - q, 5: torch.stack([q, p], 1).reshape(-1), 6: v.reshape(-1),
        7: v.reshape(-1).sort().values, 8: torch.arange(n - 1, -1, -1), 9: v.reshape(-1).repeat_interleave(2),
    }  # fmt: skip
    for k, expected in want.items():
        same(o[k * n : k * n + expected.numel()], expected)


@triton.jit
def long_chain(x, o, N: tl.constexpr):
    """Hundreds of cheap operations that use each other twice: neither the plan nor the C may grow without bound."""
    i = tl.arange(0, N)
    v = tl.load(x + i)
    for k in tl.static_range(120):
        v = (v << 1) ^ (v + k)
        v = v - (v >> 3)
    tl.store(o + i, v)


def test_long_chains_of_cheap_operations() -> None:
    x = values((64,), torch.int32)
    o = torch.zeros_like(x)
    long_chain[(1,)](x, o, N=64)
    v = x.numpy()
    with np.errstate(over="ignore"):
        for k in range(120):
            v = (v << 1) ^ (v + np.int32(k))
            v = v - (v >> 3)
    same(o, v)
