"""Where tiles lie and in what order: transposed tiles, results that take the place of what they are made of."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@triton.jit
def multiplied(q, k, o, stride, rows, columns, other, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr):
    m, n, d = tl.arange(0, M), tl.arange(0, N), tl.arange(0, D)
    a = tl.load(q + m[:, None] * D + d[None, :])
    b = tl.load(
        k + n[:, None] * stride + d[None, :], mask=(n[:, None] < rows) & (d[None, :] < columns), other=other
    )
    tl.store(o + m[:, None] * N + n[None, :], tl.dot(a, tl.trans(b), input_precision="ieee"))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("n", "d"), [(16, 16), (64, 32), (32, 128), (8, 16), (64, 8)])
def test_a_tile_that_is_only_multiplied_as_its_transpose(dtype: str, n: int, d: int) -> None:
    generator = torch.Generator().manual_seed(n * d)
    q = torch.randint(-8, 9, (16, d), generator=generator).to(DTYPES[dtype])
    k = torch.randint(-8, 9, (n, d + 3), generator=generator).to(DTYPES[dtype])
    for rows, columns in ((n, d), (n - 3, d), (n, d - 5), (n - 1, 1), (0, d)):
        o = torch.full((16, n), float("nan"))
        compiled = multiplied[(1,)](q, k, o, d + 3, rows, columns, 2.0, M=16, N=n, D=d)
        b = torch.full((n, d), 2.0)
        b[:rows, :columns] = k[:rows, :columns].float()
        assert torch.equal(o, q.float() @ b.T), (rows, columns)
    # Strips of 16 rows are turned in registers; where they do not fill the tile, its elements are stored one by one.
    assert ("effattn_turn_f32(" in compiled.asm["c"].split("/* ---- kernel")[1]) == (n >= 16 and d >= 16)


@triton.jit
def chained(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a = tl.load(x + at)
    b = tl.exp2(a - tl.max(a, 1)[:, None])
    c = b / tl.sum(b, 1)[:, None]
    tl.store(o + at, c * tl.sum(c, 0)[None, :])


@triton.jit
def needed_later(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a = tl.load(x + at)
    b = tl.exp2(a - tl.max(a, 1)[:, None])
    c = b / tl.sum(b, 1)[:, None]
    tl.store(o + at, c * tl.sum(c, 0)[None, :] + a)


@triton.jit
def crossed(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a = tl.load(x + at)
    b = tl.exp2(tl.trans(a)) + a
    tl.store(o + at, b * tl.sum(b, 0)[None, :])


def test_a_result_takes_the_place_of_a_tile_that_is_not_needed_any_more() -> None:
    n = 64
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0))
    softmax = torch.exp2(x - x.max(1).values[:, None])
    softmax = softmax / softmax.sum(1)[:, None]
    crossed_sum = torch.exp2(x.T) + x
    tile = n * n * 4
    for kernel, expected, tiles in (
        (chained, softmax * softmax.sum(0), 1),
        (needed_later, softmax * softmax.sum(0) + x, 2),
        (crossed, crossed_sum * crossed_sum.sum(0), 2),
    ):
        o = torch.zeros(n, n)
        arena = kernel[(1,)](x, o, N=n).metadata.cpu_arena
        torch.testing.assert_close(o, expected)
        assert tiles * tile <= arena < tiles * tile + 16 * n * 4, kernel
