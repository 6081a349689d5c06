"""Loads and stores of the CPU backend: masks, strides, wrapping offsets, pointers that move, order of accesses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
]
GUARD = 77  # what surrounds every output


def numbers(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=g).to(dtype)
    return torch.randint(-100, 100, (count,), generator=g).to(dtype)


def c_code(kernel: Any, *args: Any, **constants: Any) -> str:
    """The C of a compiled kernel, without the prelude."""
    text = kernel.warmup(*args, grid=(1,), **constants).asm["c"]
    return text[text.index("/* ---- kernel") :]


# -------------------------------------------------------------------------------------------------- tiles


@triton.jit
def copy_tile(x, o, row, column, o_row, o_column, M: tl.constexpr, N: tl.constexpr):
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    tl.store(o + rows * o_row + columns * o_column, tl.load(x + rows * row + columns * column))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_of_any_stride_are_copied(dtype: torch.dtype) -> None:
    x = numbers(4096, dtype)
    for row, column in [(16, 1), (1, 8), (37, 3), (0, 1), (5, 0), (0, 0), (-40, 1), (20, -1), (-3, -20)]:
        start = 2000
        for o_row, o_column in [(16, 1), (1, 8), (50, 3)]:
            o = torch.zeros(1024, dtype=dtype)
            copy_tile[(1,)](x[start:], o, row, column, o_row, o_column, M=8, N=16)
            want = torch.zeros(1024, dtype=dtype)
            for i in range(8):
                for j in range(16):
                    want[i * o_row + j * o_column] = x[start + i * row + j * column]
            assert torch.equal(o, want), (row, column, o_row, o_column)


@triton.jit
def copy_where(
    x, mask, o, other, M: tl.constexpr, N: tl.constexpr, OTHER: tl.constexpr, TRANSPOSED: tl.constexpr
):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    on = tl.load(mask + at) != 0
    where = tl.arange(0, M)[:, None] + tl.arange(0, N)[None, :] * M if TRANSPOSED else at
    v = tl.load(x + where, mask=on, other=other) if OTHER else tl.load(x + where, mask=on)
    tl.store(o + at, v)
    tl.store(o + M * N + where, v + v, mask=on)


def masks(m: int, n: int) -> dict[str, np.ndarray]:
    rows, columns = np.arange(m)[:, None] + np.zeros((1, n)), np.zeros((m, 1)) + np.arange(n)
    g = np.random.default_rng(1)
    return {
        "none": rows < 0, "all": rows >= 0, "rows": rows < m // 2, "columns": columns < n - 3, "one row": rows == 3,
        "prefix": rows * n + columns < m * n // 2 + 3, "triangle": columns <= rows, "upper": columns >= rows,
        "scattered": g.random((m, n)) < 0.5, "hole": columns != 2, "last": (rows == m - 1) & (columns == n - 1),
    }  # fmt: skip


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64], ids=str)
def test_masked_elements_are_neither_read_nor_written(dtype: torch.dtype, transposed: bool) -> None:
    m, n = 8, 16
    x = numbers(m * n, dtype)
    for name, mask in masks(m, n).items():
        o = torch.full((2 * m * n,), GUARD, dtype=dtype)
        copy_where[(1,)](
            x, torch.from_numpy(mask.astype(np.int8)), o, 5, M=m, N=n, OTHER=True, TRANSPOSED=transposed
        )
        tile = x.reshape(n, m).T if transposed else x.reshape(m, n)
        v = np.where(mask, tile.numpy(), 5)
        np.testing.assert_array_equal(o[: m * n].reshape(m, n).numpy(), v, err_msg=name)
        second = o[m * n :].reshape(n, m).T if transposed else o[m * n :].reshape(m, n)
        np.testing.assert_array_equal(second.numpy(), np.where(mask, 2 * v, GUARD), err_msg=name)


@triton.jit(do_not_specialize=["rows", "columns"])
def copy_inside(x, o, rows, columns, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    on = (i < rows)[:, None] & (j < columns)[None, :]
    v = tl.load(x + i[:, None] * columns + j[None, :], mask=on, other=-1)
    tl.store(o + i[:, None] * columns + j[None, :], v, mask=on)
    only = tl.load(x + i[:, None] * 0 + j[None, :] * 0, mask=on)
    tl.store(o + rows * columns + i, tl.sum(tl.where(on, only - only, 1), 1))


@settings(max_examples=20)
@given(rows=st.integers(0, 9), columns=st.integers(0, 17))
def test_limits_of_rows_and_columns(rows: int, columns: int) -> None:
    # Exactly as much memory as is allowed to be touched: anything more is a neighbour's.
    x = numbers(max(min(rows, 8) * columns, 1) + 64, torch.float32)
    o = torch.full((rows * columns + 64,), float(GUARD))
    copy_inside[(1,)](x, o, rows, columns, M=8, N=16)
    want = torch.full_like(o, float(GUARD))
    for i in range(min(rows, 8)):
        for j in range(min(columns, 16)):
            want[i * columns + j] = x[i * columns + j]
    inside = min(columns, 16)
    for i in range(8):
        want[rows * columns + i] = 16 - (inside if i < rows else 0)
    assert torch.equal(o, want)


@triton.jit
def wrapped(x, o, start, stride, N: tl.constexpr, WIDE: tl.constexpr):
    i = tl.arange(0, N)
    if WIDE:
        i = i.to(tl.int64)
    offset = i * stride + start
    tl.store(o + tl.arange(0, N), tl.load(x + offset, mask=(offset >= 0) & (offset < 64), other=-1))
    tl.store(o + N + tl.arange(0, N), offset.to(tl.int32))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("start", [0, 2**31 - 5, -(2**31), 2**31 - 16])
@pytest.mark.parametrize("stride", [1, -1, 2**28, 2**31 - 1, 3])
def test_offsets_wrap_as_the_ir_says(start: int, stride: int, wide: bool) -> None:
    x = numbers(64, torch.int32)
    o = torch.zeros(32, dtype=torch.int32)
    wrapped[(1,)](x, o, start, stride, N=16, WIDE=wide)
    offsets = [i * stride + start for i in range(16)]
    narrow = [(v + 2**31) % 2**32 - 2**31 for v in offsets]
    used = offsets if wide else narrow
    assert o[:16].tolist() == [int(x[v]) if 0 <= v < 64 else -1 for v in used]
    assert o[16:].tolist() == narrow


# -------------------------------------------------------------------------------------------------- scalars


@triton.jit
def scalars(x, o, flag):
    pid = tl.program_id(0)
    v = tl.load(x + pid)
    w = tl.load(x + pid + 1, mask=pid < 2, other=9)
    tl.store(o + pid, v + w)
    tl.store(o + 4 + pid, v, mask=(pid % 2 == flag))


def test_scalar_loads_and_stores() -> None:
    x, o = numbers(8, torch.int32), torch.full((8,), GUARD, dtype=torch.int32)
    scalars[(4,)](x, o, 1)
    assert o[:4].tolist() == [int(x[i] + (x[i + 1] if i < 2 else 9)) for i in range(4)]
    assert o[4:].tolist() == [int(x[i]) if i % 2 == 1 else GUARD for i in range(4)]


@triton.jit
def through_memory(table, o, N: tl.constexpr):
    pid = tl.program_id(0)
    x = tl.load(table + pid).to(tl.pointer_type(tl.float32))
    tl.store(o + pid * N + tl.arange(0, N), tl.load(x + tl.arange(0, N)))


@triton.jit
def many_through_memory(table, o, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(table + i).to(tl.pointer_type(tl.float32))
    tl.store(o + i, tl.load(x + i))
    tl.store(x + i, -tl.load(x + i))


def test_pointers_that_are_stored_in_memory() -> None:
    parts = [torch.randn(16) for _ in range(16)]
    table = torch.tensor([p.data_ptr() for p in parts])
    o = torch.zeros(3 * 16)
    through_memory[(3,)](table, o, N=16)
    assert torch.equal(o, torch.cat(parts[:3]))
    before = [p.clone() for p in parts]
    many_through_memory[(1,)](table, o, N=16)
    assert torch.equal(o[:16], torch.stack(before).diagonal())
    for k, part in enumerate(parts):
        before[k][k] *= -1
        assert torch.equal(part, before[k])


# --------------------------------------------------------------------------------------- order of accesses


@triton.jit
def ordered(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(x + i, a + 1)
    b = tl.load(x + i)
    tl.store(x + (N - 1 - i), b * 2)
    c = tl.load(x + i)
    tl.store(o + i, a)
    tl.store(o + N + i, b)
    tl.store(o + 2 * N + i, c)
    tl.store(x, 100)
    tl.store(o + 3 * N + i, tl.load(x + i) + tl.load(x))


@triton.jit
def prefix_in_place(x, n):
    for i in range(1, n):
        tl.store(x + i, tl.load(x + i) + tl.load(x + i - 1))


def test_stores_and_loads_keep_their_order() -> None:
    x = numbers(16, torch.int32)
    a = x.clone()
    o = torch.zeros(64, dtype=torch.int32)
    ordered[(1,)](x, o, N=16)
    b = a + 1
    c = (b * 2).flip(0)
    last = c.clone()
    last[0] = 100
    assert torch.equal(o, torch.cat([a, b, c, last + 100]))
    y = numbers(50, torch.int64)
    want = y.cumsum(0)
    prefix_in_place[(1,)](y, 50)
    assert torch.equal(y, want)


# ---------------------------------------------------------------------------------------- pointers that move


@triton.jit(do_not_specialize=["k"])
def moving_pointers(a, b, o, k, stride, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    """The loop of nearly every public kernel."""
    rows, inner, columns = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    a_ptrs = a + rows[:, None] * k + inner[None, :]
    b_ptrs = b + inner[:, None] * stride + columns[None, :]
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, k, K):
        on = inner + start < k
        x = tl.load(a_ptrs, mask=on[None, :], other=0.0)
        y = tl.load(b_ptrs, mask=on[:, None], other=0.0)
        acc = tl.dot(x, y, acc)
        a_ptrs += K
        b_ptrs += K * stride
    tl.store(o + rows[:, None] * N + columns[None, :], acc)


def test_pointers_that_a_loop_moves() -> None:
    for k in (1, 16, 40, 64):
        a, b = numbers(16 * k, torch.float32, seed=k), numbers(24 * k, torch.float32, seed=k + 1)
        o = torch.zeros(256)
        moving_pointers[(1,)](a, b, o, k, 24, M=16, K=16, N=16)
        # Small whole numbers: every order of summation gives the same.
        assert torch.equal(o.reshape(16, 16), a.reshape(16, k) @ b.reshape(k, 24)[:, :16])


def test_moving_pointers_are_not_kept_as_tensors_of_addresses() -> None:
    t = torch.zeros(4096)
    code = c_code(moving_pointers, t, t, t, 32, 32, M=16, K=16, N=16)
    assert "char * *const" not in code  # no buffer of addresses
    assert "(float *)" in code  # rows are read as contiguous


@triton.jit
def pointers_there_and_back(x, o, n, N: tl.constexpr):
    i = tl.arange(0, N)
    p = x + i
    offsets = i + 2
    total = tl.zeros([N], tl.float32)
    for k in range(n):
        total += tl.load(p) * (k + 1)
        p += 3
        for _ in range(2):
            p -= 1
            offsets = offsets + k
            total += tl.load(x + offsets)
    tl.store(o + i, total)
    tl.store(o + N + i, tl.load(p))
    tl.store(o + 2 * N + i, offsets.to(tl.float32))


def test_pointers_and_offsets_moved_in_nested_loops() -> None:
    x = numbers(256, torch.float32)
    for n in (0, 1, 4):
        o = torch.zeros(48)
        pointers_there_and_back[(1,)](x, o, n, N=16)
        total, p, offset = torch.zeros(16), 0, 2
        for k in range(n):
            total += x[p : p + 16] * (k + 1)
            p += 3
            for _ in range(2):
                p -= 1
                offset += k
                total += x[offset : offset + 16]
        assert torch.equal(o[:16], total)
        assert torch.equal(o[16:32], x[p : p + 16])
        assert torch.equal(o[32:], torch.arange(16.0) + offset)


@triton.jit
def wrapping_induction(o, start, step, n, N: tl.constexpr):
    i = tl.arange(0, N) + start
    for _ in range(n):
        i += step
    tl.store(o + tl.arange(0, N), i)


def test_moving_integers_wrap() -> None:
    o = torch.zeros(8, dtype=torch.int32)
    wrapping_induction[(1,)](o, 2**31 - 4, 2**30 + 7, 5, N=8)
    assert o.tolist() == [(2**31 - 4 + i + 5 * (2**30 + 7) + 2**31) % 2**32 - 2**31 for i in range(8)]


@triton.jit
def pointers_by_condition(x, y, o, n, N: tl.constexpr):
    i = tl.arange(0, N)
    p, q = x + i, y + i
    total = tl.zeros([N], tl.float32)
    for k in range(n):
        if k == 2:
            p = y + i * 2
        total += tl.load(p) - 2 * tl.load(q)
        p, q = q, p
    tl.store(o + i, total)


def test_pointers_that_are_swapped_and_chosen() -> None:
    x, y = numbers(64, torch.float32, 1), numbers(64, torch.float32, 2)
    o = torch.zeros(16)
    pointers_by_condition[(1,)](x, y, o, 5, N=16)
    p, q, total = x[:16], y[:16], torch.zeros(16)
    for k in range(5):
        if k == 2:
            p = y[:32:2]
        total = total + p - 2 * q
        p, q = q, p
    assert torch.equal(o, total)


# ---------------------------------------------------------------------------------------- names and wide tensors


@triton.jit
def awkward_names(x, o, N: tl.constexpr):
    double = tl.arange(0, N)
    round_bf16 = tl.load(x + double)
    for count in range(2):
        head = round_bf16 + count
        i0 = head.to(tl.bfloat16)
        exp2 = tl.exp2(head * 0)
        int32_t = tl.maximum(i0.to(tl.float32), exp2)
        f32_of = tl.sum(int32_t, 0)
        round_bf16 = int32_t * f32_of
        tl.store(o + double + count * N, round_bf16)


def test_names_of_the_kernel_do_not_meet_names_of_the_generated_c() -> None:
    x = torch.arange(16.0) / 16
    o = torch.zeros(32)
    awkward_names[(1,)](x, o, N=16)
    v = x
    for count in range(2):
        w = (v + count).bfloat16().float().clamp(min=1.0)
        v = w * w.sum()
        assert torch.equal(o[16 * count : 16 * count + 16], v)


@triton.jit
def far_apart(x, o, stride, N: tl.constexpr):
    i = tl.arange(0, N).to(tl.int64)
    tl.store(o + i, tl.load(x + i * stride))


def test_strides_beyond_32_bits() -> None:
    # Virtual memory only: nothing but the touched pages exists.
    x = torch.from_numpy(np.zeros(5 << 30, np.int8))
    x[3 * (1 << 30)] = 7
    x[4 * (1 << 30)] = 9
    o = torch.zeros(4, dtype=torch.int8)
    far_apart[(1,)](x[1 << 30 :], o, 1 << 30, N=4)
    assert o.tolist() == [0, 0, 7, 9]
