"""The gradient of the bias: ds of `effattn.kernels.flash_backward`, summed over what the bias is broadcast along.

A program owns a tile of the bias and visits, in one order, every member of the batch, every head and every block of
scores that the tile was added to. So there are no atomics, no tensor of the size of the scores, and one result for one
input. A bias that is shared by everything has few tiles, and few programs: that is the price.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from effattn.kernels.arguments import Extras, Problem
from effattn.kernels.flash_backward import load_rows, pair_gradients
from effattn.kernels.launch import (
    Launch,
    is_wide,
    jit_twice,
    shared_arguments,
    shared_constants,
    stride_arguments,
)
from effattn.kernels.loads import load_tile
from effattn.kernels.logits import LOG2_E
from effattn.kernels.mask import extent, key_blocks
from effattn.kernels.tiles import bias_tiles


def bias_launch(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    lse: torch.Tensor,
    delta: torch.Tensor,
    d_out: torch.Tensor,
    d_bias: torch.Tensor,
    *,
    device_type: str | None = None,
) -> Launch:
    """The launch that fills d_bias, float32, with 4 axes of which any are 1 where the bias is broadcast."""
    device_type = device_type or q.device.type
    cut = bias_tiles(problem.head_dim, problem.v_dim, q.dtype, device_type)
    m, n = cut.block_m, cut.block_n
    wide = any(is_wide(t, block) for t, block in ((q, m), (d_out, m), (k, n), (v, n)))
    wide |= any(is_wide(t, m, n) for t in (extras.bias, extras.mask, d_bias))
    shared_b, shared_h, rows, columns = d_bias.shape
    reduce_m, reduce_n = rows == 1, columns == 1
    tiles = (1 if reduce_m else triton.cdiv(rows, m)) * (1 if reduce_n else triton.cdiv(columns, n))
    return Launch(
        kernel=bias_kernel[device_type],
        programs=tiles * shared_b * shared_h,
        arguments={
            "q": q,
            "k": k,
            "v": v,
            "lse": lse,
            "delta": delta,
            "d_out": d_out,
            "d_bias": d_bias,
            "scale_log2": problem.scale * math.log2(math.e),
            **stride_arguments("q", q, "bhmd"),
            **stride_arguments("k", k, "bhnd"),
            **stride_arguments("v", v, "bhnd"),
            **stride_arguments("lse", lse, "bhm"),
            **stride_arguments("d_out", d_out, "bhmd"),
            **stride_arguments("d_bias", d_bias, "bhmn"),
            "repeat_b": problem.batch // shared_b,
            "repeat_h": problem.heads // shared_h,
            **shared_arguments(problem, extras),
            **shared_constants(problem, block_m=m, block_n=n, wide=wide),
            "REDUCE_M": reduce_m,
            "REDUCE_N": reduce_n,
        },
        options=cut.options,
    )


def _bias_kernel(
    q, k, v, lse, delta, d_out, d_bias, bias, mask, alibi_slopes, q_lengths, kv_lengths,
    scale_log2, to_cap, cap_log2,
    q_stride_b, q_stride_h, q_stride_m, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_m,
    d_out_stride_b, d_out_stride_h, d_out_stride_m, d_out_stride_d,
    d_bias_stride_b, d_bias_stride_h, d_bias_stride_m, d_bias_stride_n,
    repeat_b, repeat_h,  # members of the batch and heads that share one element of the bias
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    alibi_stride_b, alibi_stride_h,
    q_len, kv_len, bottom_right, left, right, heads, group, head_dim, v_dim,
    dropout_p, dropout_seed, dropout_offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
    REDUCE_M: tl.constexpr, REDUCE_N: tl.constexpr,
):  # fmt: skip
    """One program: a tile of d bias, one row high where the bias has one row, one column wide where it has one."""
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    row_blocks = tl.cdiv(q_len, BLOCK_M)
    column_blocks = tl.cdiv(kv_len, BLOCK_N)
    tile_rows = 1 if REDUCE_M else row_blocks
    tile_columns = 1 if REDUCE_N else column_blocks
    inner_rows = row_blocks if REDUCE_M else 1
    inner_columns = column_blocks if REDUCE_N else 1
    pid = tl.program_id(0)
    tile_column = pid % tile_columns
    tile_row = pid // tile_columns % tile_rows
    shared = pid // tile_columns // tile_rows  # which (batch, head) of the bias
    shared_heads = heads // repeat_h
    shared_b = shared // shared_heads
    shared_h = shared % shared_heads

    rows = tl.arange(0, BLOCK_M)
    keys = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, repeat_b * repeat_h * inner_rows * inner_columns, disable_licm=True):
        first_key = (tile_column + step % inner_columns) * BLOCK_N
        first_row = (tile_row + step // inner_columns % inner_rows) * BLOCK_M
        member = step // inner_columns // inner_rows
        b = (shared_b * repeat_b + member // repeat_h).to(tl.int64)
        h = (shared_h * repeat_h + member % repeat_h).to(tl.int64)
        kv_h = h // group
        q_start, q_rows = extent(q_lengths, b, q_len, PACKED)
        kv_start, kv_rows = extent(kv_lengths, b, kv_len, PACKED)
        place = (q_rows, kv_rows, (kv_rows - q_rows) * bottom_right, left, right)
        start, _whole, _whole_end, end = key_blocks(
            first_row, place, BLOCK_M, BLOCK_N, HAS_LEFT, mask is not None
        )
        if (first_key >= start) & (first_key < end):
            q_tile = load_tile(
                q + b * q_stride_b + h * q_stride_h + (q_start + first_row) * q_stride_m,
                rows, tl.arange(0, BLOCK_D), q_stride_m, q_stride_d, q_rows - first_row, head_dim, True, PAD_D, WIDE,
            )  # fmt: skip
            g_tile = load_tile(
                d_out + b * d_out_stride_b + h * d_out_stride_h + (q_start + first_row) * d_out_stride_m,
                rows, tl.arange(0, BLOCK_DV), d_out_stride_m, d_out_stride_d, q_rows - first_row, v_dim, True, PAD_DV,
                WIDE,
            )  # fmt: skip
            k_tile = load_tile(
                k + b * k_stride_b + kv_h * k_stride_h + (kv_start + first_key) * k_stride_n,
                keys, tl.arange(0, BLOCK_D), k_stride_n, k_stride_d, kv_rows - first_key, head_dim, True, PAD_D, WIDE,
            )  # fmt: skip
            v_tile = load_tile(
                v + b * v_stride_b + kv_h * v_stride_h + (kv_start + first_key) * v_stride_n,
                keys, tl.arange(0, BLOCK_DV), v_stride_n, v_stride_d, kv_rows - first_key, v_dim, True, PAD_DV, WIDE,
            )  # fmt: skip
            rows_head = b * lse_stride_b + h * lse_stride_h + q_start * lse_stride_m
            rows_at = (lse + rows_head, delta + rows_head, lse_stride_m)
            row_lse, row_delta = load_rows(rows_at, first_row, BLOCK_M, place, True)
            bias_at = (bias + b * bias_stride_b + h * bias_stride_h, bias_stride_m, bias_stride_n)
            mask_at = (None, mask_stride_m, mask_stride_n)
            if mask is not None:
                mask_at = (mask + b * mask_stride_b + h * mask_stride_h, mask_stride_m, mask_stride_n)
            slope_log2 = 0.0
            if alibi_slopes is not None:
                slope_log2 = tl.load(alibi_slopes + b * alibi_stride_b + h * alibi_stride_h) * LOG2_E
            score = (scale_log2, to_cap, cap_log2, slope_log2)
            dropped = (dropout_p, dropout_seed, (b * heads + h) * q_len * kv_len + dropout_offset, kv_len)
            ds, _weights, _d_product = pair_gradients(
                tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION),
                tl.dot(g_tile, tl.trans(v_tile), input_precision=INPUT_PRECISION),
                row_lse[:, None], row_delta[:, None], first_row, first_key, rows[:, None], keys[None, :], place,
                score, bias_at, mask_at, dropped, True, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, WIDE,
            )  # fmt: skip
            acc += ds

    top = tile_row * BLOCK_M + rows[:, None]
    side = tile_column * BLOCK_N + keys[None, :]
    if REDUCE_M:
        acc = tl.sum(acc, 0, keep_dims=True)
        top = tl.zeros([1, 1], tl.int32)
    if REDUCE_N:
        acc = tl.sum(acc, 1, keep_dims=True)
        side = tl.zeros([1, 1], tl.int32)
    inside = (top < q_len) & (side < kv_len)
    tile = d_bias + shared_b.to(tl.int64) * d_bias_stride_b + shared_h.to(tl.int64) * d_bias_stride_h
    tl.store(
        tile + (top.to(tl.int64) * d_bias_stride_m + side.to(tl.int64) * d_bias_stride_n), acc, mask=inside
    )


bias_kernel = jit_twice(_bias_kernel, ("q", "k", "v", "lse", "d_out", "d_bias"))
