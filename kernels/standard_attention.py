"""Attention as the textbook has it, in three kernels with the N x N matrix in between: what FlashAttention saves.

    S = scale q k^T        one program a tile, O(N^2) written
    P = softmax(S)         one program a row, O(N^2) read and written
    out = P v              one program a block of rows, O(N^2) read

It is here to be measured against, in traffic and in time, not to be used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from effattn.errors import ArgumentError
from effattn.kernels.arguments import check_tensors, on_device

BLOCK = 64


def standard_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, block: int = BLOCK
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) v for q, k, v (batch, heads, n, d) of one shape, float32, without gaps.

    n a multiple of `block`, d a power of two from 16 to 256. Elements moved for each head, exactly:
    4 n^2 + n d + 3 n^2 d / block. Raises ArgumentError.
    """
    check_tensors(q=q, k=k, v=v)
    batch, heads, n, d = q.shape
    if not q.shape == k.shape == v.shape or q.dtype != torch.float32:
        raise ArgumentError(
            f"expected q, k and v of one shape in float32, got {tuple(q.shape)}, {tuple(k.shape)}"
        )
    if n % block or d & (d - 1) or not 16 <= d <= 256:
        raise ArgumentError(
            f"expected n a multiple of {block} and d a power of two from 16 to 256, got {n} and {d}"
        )
    q, k, v = (x.contiguous() for x in (q, k, v))
    scores = torch.empty((batch * heads, n, n), dtype=torch.float32, device=q.device)
    weights, out = torch.empty_like(scores), torch.empty_like(q)
    tiles = n // block
    with on_device(q):
        _scores[(batch * heads * tiles * tiles,)](q, k, scores, d**-0.5, n, D=d, BLOCK=block)
        _softmax[(batch * heads * n,)](scores, weights, n, WIDTH=triton.next_power_of_2(n))
        _output[(batch * heads * tiles,)](weights, v, out, n, D=d, BLOCK=block)
    return out


@triton.jit
def _scores(q, k, scores, scale, n, D: tl.constexpr, BLOCK: tl.constexpr):
    """One tile of S: it reads BLOCK rows of q and of k."""
    tiles = n // BLOCK
    pid = tl.program_id(0)
    head = (pid // (tiles * tiles)).to(tl.int64)
    rows = pid // tiles % tiles * BLOCK + tl.arange(0, BLOCK)
    columns = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    q_tile = tl.load(q + head * n * D + rows[:, None] * D + d[None, :])
    k_tile = tl.load(k + head * n * D + columns[:, None] * D + d[None, :])
    tile = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
    tl.store(scores + head * n * n + rows[:, None] * n + columns[None, :], tile)


@triton.jit
def _softmax(scores, weights, n, WIDTH: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    x = tl.load(scores + row * n + columns, mask=columns < n, other=float("-inf"))
    x = tl.exp(x - tl.max(x, 0))
    tl.store(weights + row * n + columns, x / tl.sum(x, 0), mask=columns < n)


@triton.jit
def _output(weights, v, out, n, D: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK rows: it reads all of v."""
    tiles = n // BLOCK
    head = (tl.program_id(0) // tiles).to(tl.int64)
    rows = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, n, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        p_tile = tl.load(weights + head * n * n + rows[:, None] * n + columns[None, :])
        v_tile = tl.load(v + head * n * D + columns[:, None] * D + d[None, :])
        acc = tl.dot(p_tile, v_tile, acc, input_precision="ieee")
    tl.store(out + head * n * D + rows[:, None] * D + d[None, :], acc)
