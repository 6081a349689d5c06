"""Kernels that are only there to be timed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_3(x, o, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(o + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def copy_17(x, o, a, b, c, d, e, f, g, h, i0, j, k, m, p, q, n, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(o + i, tl.load(x + i, mask=i < n), mask=i < n)


@triton.jit
def chain(x, o, TURNS: tl.constexpr, N: tl.constexpr):
    """Steps of a running softmax, each written out."""
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    v = tl.load(x + at)
    for _ in tl.static_range(TURNS):
        w = tl.load(x + at, mask=at < N * N - 1, other=0.0)
        m = tl.max(v + w, 1)
        p = tl.exp2((v - m[:, None]) * 0.5)
        v = v * 0.5 + p / tl.sum(p, 1)[:, None]
        v = tl.dot(v, w, v * 0.25, input_precision="ieee")
    tl.store(o + at, v)
