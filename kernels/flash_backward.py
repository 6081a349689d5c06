"""FlashAttention, backward: the gradients of q, k, v, bias and sinks from what the forward kept, with O(N d) memory.

With p[i, j] = exp(s[i, j] - lse[i]), the upstream gradients g = d out and e = d lse, and m the scaled dropout mask:

    delta[i]  = g[i] . out[i] - e[i]
    dv[j]     = sum_i p[i, j] m[i, j] g[i]
    ds[i, j]  = p[i, j] (m[i, j] g[i] . v[j] - delta[i])         = d bias[i, j]
    dq[i]     = scale * sum_j ds[i, j] cap'[i, j] k[j]            cap' = 1 - tanh(scale q . k / softcap)^2
    dk[j]     = scale * sum_i ds[i, j] cap'[i, j] q[i]
    d sink    = - sum_i exp(sink - lse[i]) delta[i]

(Dao, arXiv:2307.08691, algorithm 2.) Three kernels, each of which owns what it writes, so that nothing is added by
atomics and every sum has one order, whatever shares the launch:

- `_delta_kernel`: a program a block of queries;
- `_keys_kernel`: a program a block of keys of one key head. It walks over the query heads that share it and their
  queries, and keeps dk and dv;
- `_queries_kernel`: a program a block of queries of one head. It walks over the keys and keeps dq.

The price of two walks is that scores and g . v are computed twice. d bias has a kernel of its own, in
`effattn.kernels.flash_bias`.

What is hidden has no influence here either. Where a block is seen in part, what is not finite in q, k, v and g is taken
as 0 in the products; a query that sees it has an lse or a delta that is not finite, and so gets NaN all the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from effattn.kernels.arguments import Extras, Problem
from effattn.kernels.dropout import kept
from effattn.kernels.launch import (
    Launch,
    is_rich,
    is_wide,
    jit_twice,
    shared_arguments,
    shared_constants,
    stride_arguments,
)
from effattn.kernels.loads import finite, load_tile, only_finite, store_tile
from effattn.kernels.logits import LOG2_E, logits
from effattn.kernels.mask import extent, key_blocks, query_blocks, visible
from effattn.kernels.tiles import Tiles, backward_tiles, padded


def backward_launches(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    delta: torch.Tensor,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    *,
    device_type: str | None = None,
) -> list[Launch]:
    """The launches that fill delta, dk and dv, and dq, in this order.

    Tensors as for `forward_launch`; d_out has the shape of out, d_lse and delta that of lse; all with any strides.
    """
    device_type = device_type or q.device.type
    rich = is_rich(problem, extras)
    by_keys, by_queries = backward_tiles(problem.head_dim, problem.v_dim, q.dtype, device_type, rich=rich)
    scores = {
        "q": q,
        "k": k,
        "v": v,
        "lse": lse,
        "delta": delta,
        "d_out": d_out,
        "scale": problem.scale,
        "scale_log2": problem.scale * math.log2(math.e),
        **stride_arguments("q", q, "bhmd"),
        **stride_arguments("k", k, "bhnd"),
        **stride_arguments("v", v, "bhnd"),
        **stride_arguments("lse", lse, "bhm"),
        **stride_arguments("d_out", d_out, "bhmd"),
        **shared_arguments(problem, extras),
    }

    def constants(cut: Tiles) -> dict[str, Any]:
        m, n = cut.block_m, cut.block_n
        tensors = ((q, m), (d_out, m), (dq, m), (k, n), (v, n), (dk, n), (dv, n))
        wide = any(is_wide(t, block) for t, block in tensors)
        wide |= any(is_wide(t, m, n) for t in (extras.bias, extras.mask))
        return shared_constants(problem, block_m=m, block_n=n, wide=wide)

    block_dv = padded(problem.v_dim)
    block_m = 64 if device_type == "cpu" or block_dv <= 128 else 32
    options = {} if device_type == "cpu" else {"num_warps": 4, "enable_fp_fusion": True}
    delta_launch = Launch(
        kernel=delta_kernel[device_type],
        programs=triton.cdiv(problem.q_len, block_m) * problem.batch * problem.heads,
        arguments={
            "out": out,
            "d_out": d_out,
            "d_lse": d_lse,
            "delta": delta,
            "q_lengths": extras.q_lengths,
            **stride_arguments("out", out, "bhmd"),
            **stride_arguments("d_out", d_out, "bhmd"),
            **stride_arguments("d_lse", d_lse, "bhm"),
            **stride_arguments("lse", lse, "bhm"),
            "q_len": problem.q_len,
            "heads": problem.heads,
            "v_dim": problem.v_dim,
            "BLOCK_M": block_m,
            "BLOCK_DV": block_dv,
            "WIDE": is_wide(out, block_m) or is_wide(d_out, block_m),
            "PACKED": problem.packed,
        },
        options=options,
    )
    keys_launch = Launch(
        kernel=keys_kernel[device_type],
        programs=triton.cdiv(problem.kv_len, by_keys.block_n) * problem.batch * problem.kv_heads,
        arguments={
            **scores,
            "dk": dk,
            "dv": dv,
            **stride_arguments("dk", dk, "bhnd"),
            **stride_arguments("dv", dv, "bhnd"),
            **constants(by_keys),
        },
        options=by_keys.options,
    )
    queries_launch = Launch(
        kernel=queries_kernel[device_type],
        programs=triton.cdiv(problem.q_len, by_queries.block_m) * problem.batch * problem.heads,
        arguments={**scores, "dq": dq, **stride_arguments("dq", dq, "bhmd"), **constants(by_queries)},
        options=by_queries.options,
    )
    return [delta_launch, keys_launch, queries_launch]


def sink_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """d sinks (heads,), from lse and delta (batch, heads, q_len); summed in float64."""
    weight = torch.exp(sinks.double()[:, None] - lse.double())
    # Rows without an lse are padding, or see no key and have a sink of -inf: nothing depends on the sink there.
    share = torch.where(lse == -math.inf, 0.0, weight * delta.double())
    return -share.sum(dim=(0, 2)).float()


def _delta_kernel(
    out, d_out, d_lse, delta, q_lengths,
    out_stride_b, out_stride_h, out_stride_m, out_stride_d,
    d_out_stride_b, d_out_stride_h, d_out_stride_m, d_out_stride_d,
    d_lse_stride_b, d_lse_stride_h, d_lse_stride_m,
    lse_stride_b, lse_stride_h, lse_stride_m,
    q_len, heads, v_dim,
    BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """delta = g . out - d lse of BLOCK_M queries of one head; 0 in rows that are padding."""
    blocks = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    first_row = pid % blocks * BLOCK_M
    head = pid // blocks
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    q_start, q_rows = extent(q_lengths, b, q_len, PACKED)
    rows = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_DV)
    at = q_start + first_row
    out_tile = load_tile(
        out + b * out_stride_b + h * out_stride_h + at * out_stride_m,
        rows, columns, out_stride_m, out_stride_d, q_rows - first_row, v_dim, True, True, WIDE,
    )  # fmt: skip
    d_out_tile = load_tile(
        d_out + b * d_out_stride_b + h * d_out_stride_h + at * d_out_stride_m,
        rows, columns, d_out_stride_m, d_out_stride_d, q_rows - first_row, v_dim, True, True, WIDE,
    )  # fmt: skip
    total = tl.sum(out_tile.to(tl.float32) * d_out_tile.to(tl.float32), 1)
    inside = first_row + rows < q_rows
    if d_lse is not None:
        d_lse_block = d_lse + b * d_lse_stride_b + h * d_lse_stride_h + at * d_lse_stride_m
        total -= tl.load(d_lse_block + rows * d_lse_stride_m, mask=inside, other=0.0)
    written = inside if PACKED else first_row + rows < q_len
    delta_block = delta + b * lse_stride_b + h * lse_stride_h + at * lse_stride_m
    tl.store(delta_block + rows * lse_stride_m, total, mask=written)


delta_kernel = jit_twice(_delta_kernel, ("out", "d_out", "d_lse", "lse"))


def _keys_kernel(
    q, k, v, lse, delta, d_out, dk, dv, bias, mask, alibi_slopes, q_lengths, kv_lengths,
    scale, scale_log2, to_cap, cap_log2,
    q_stride_b, q_stride_h, q_stride_m, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_m,
    d_out_stride_b, d_out_stride_h, d_out_stride_m, d_out_stride_d,
    dk_stride_b, dk_stride_h, dk_stride_n, dk_stride_d,
    dv_stride_b, dv_stride_h, dv_stride_n, dv_stride_d,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    alibi_stride_b, alibi_stride_h,
    q_len, kv_len, bottom_right, left, right, heads, group, head_dim, v_dim,
    dropout_p, dropout_seed, dropout_offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one key head, over all queries that see any of them."""
    HAS_MASK: tl.constexpr = mask is not None
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    # Under a causal mask the first keys are seen by the most queries: they start first.
    blocks = tl.cdiv(kv_len, BLOCK_N)
    pid = tl.program_id(0)
    first_key = pid % blocks * BLOCK_N
    head = pid // blocks  # of all key heads of the batch
    kv_heads = heads // group
    b = (head // kv_heads).to(tl.int64)
    kv_h = (head % kv_heads).to(tl.int64)
    q_start, q_rows = extent(q_lengths, b, q_len, PACKED)
    kv_start, kv_rows = extent(kv_lengths, b, kv_len, PACKED)
    shift = (kv_rows - q_rows) * bottom_right
    place = (q_rows, kv_rows, shift, left, right)

    keys = tl.arange(0, BLOCK_N)
    at = kv_start + first_key
    k_tile = load_tile(
        k + b * k_stride_b + kv_h * k_stride_h + at * k_stride_n,
        keys, tl.arange(0, BLOCK_D), k_stride_n, k_stride_d, kv_rows - first_key, head_dim, True, PAD_D, WIDE,
    )  # fmt: skip
    v_tile = load_tile(
        v + b * v_stride_b + kv_h * v_stride_h + at * v_stride_n,
        keys, tl.arange(0, BLOCK_DV), v_stride_n, v_stride_d, kv_rows - first_key, v_dim, True, PAD_DV, WIDE,
    )  # fmt: skip
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    start, whole, whole_end, end = query_blocks(first_key, place, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_MASK)
    for member in range(group):
        h = kv_h * group + member
        q_at = (q + b * q_stride_b + h * q_stride_h + q_start * q_stride_m, q_stride_m, q_stride_d, head_dim)
        g_head = d_out + b * d_out_stride_b + h * d_out_stride_h + q_start * d_out_stride_m
        g_at = (g_head, d_out_stride_m, d_out_stride_d, v_dim)
        rows_head = b * lse_stride_b + h * lse_stride_h + q_start * lse_stride_m
        rows_at = (lse + rows_head, delta + rows_head, lse_stride_m)
        bias_at = (None, bias_stride_m, bias_stride_n)
        if bias is not None:
            bias_at = (bias + b * bias_stride_b + h * bias_stride_h, bias_stride_m, bias_stride_n)
        mask_at = (None, mask_stride_m, mask_stride_n)
        if mask is not None:
            mask_at = (mask + b * mask_stride_b + h * mask_stride_h, mask_stride_m, mask_stride_n)
        slope_log2 = 0.0
        if alibi_slopes is not None:
            slope_log2 = tl.load(alibi_slopes + b * alibi_stride_b + h * alibi_stride_h) * LOG2_E
        score = (scale_log2, to_cap, cap_log2, slope_log2)
        dropped = (dropout_p, dropout_seed, (b * heads + h) * q_len * kv_len + dropout_offset, kv_len)
        dk_acc, dv_acc = _walk_queries(
            dk_acc, dv_acc, k_tile, v_tile, q_at, g_at, rows_at, start, tl.minimum(whole, end), first_key, place,
            score, bias_at, mask_at, dropped,
            True, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
            INPUT_PRECISION,
        )  # fmt: skip
        if not HAS_MASK:
            dk_acc, dv_acc = _walk_queries(
                dk_acc, dv_acc, k_tile, v_tile, q_at, g_at, rows_at, whole, whole_end, first_key, place,
                score, bias_at, mask_at, dropped,
                False, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV,
                WIDE, INPUT_PRECISION,
            )  # fmt: skip
        dk_acc, dv_acc = _walk_queries(
            dk_acc, dv_acc, k_tile, v_tile, q_at, g_at, rows_at, whole_end, end, first_key, place,
            score, bias_at, mask_at, dropped,
            True, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
            INPUT_PRECISION,
        )  # fmt: skip

    # Padding is written, with the zeros that it got, so that nothing is left of what the memory held.
    inside = first_key + keys < (kv_rows if PACKED else kv_len)
    dk_block = dk + b * dk_stride_b + kv_h * dk_stride_h + at * dk_stride_n
    dv_block = dv + b * dv_stride_b + kv_h * dv_stride_h + at * dv_stride_n
    store_tile(
        dk_block,
        dk_acc * scale,
        keys,
        tl.arange(0, BLOCK_D),
        dk_stride_n,
        dk_stride_d,
        inside,
        head_dim,
        WIDE,
    )
    store_tile(dv_block, dv_acc, keys, tl.arange(0, BLOCK_DV), dv_stride_n, dv_stride_d, inside, v_dim, WIDE)


keys_kernel = jit_twice(_keys_kernel, ("q", "k", "v", "lse", "d_out", "dk", "dv"))


@triton.jit
def _walk_queries(
    dk_acc, dv_acc, k_tile, v_tile, q_at, g_at, rows_at, begin, end, first_key, place, score, bias_at, mask_at, dropped,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the queries begin <= i < end give to dk and dv. Scores lie here as (keys, queries): no transposes of p."""
    rows = tl.arange(0, BLOCK_M)
    for start in tl.range(begin, end, BLOCK_M, disable_licm=True):
        first_row = tl.cast(start, tl.int64)
        q_tile = load_tile(
            q_at[0] + first_row * q_at[1], rows, tl.arange(0, BLOCK_D), q_at[1], q_at[2],
            place[0] - start, q_at[3], MASKED, PAD_D, WIDE,
        )  # fmt: skip
        g_tile = load_tile(
            g_at[0] + first_row * g_at[1], rows, tl.arange(0, BLOCK_DV), g_at[1], g_at[2],
            place[0] - start, g_at[3], MASKED, PAD_DV, WIDE,
        )  # fmt: skip
        row_lse, row_delta = load_rows(rows_at, start, BLOCK_M, place, MASKED)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=INPUT_PRECISION)
        d_weights = tl.dot(v_tile, tl.trans(g_tile), input_precision=INPUT_PRECISION)
        _p, dropped_p, ds = pair_gradients(
            scores, d_weights, row_lse[None, :], row_delta[None, :], start, first_key, rows[None, :],
            tl.arange(0, BLOCK_N)[:, None], place, score, bias_at, mask_at, dropped,
            MASKED, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, WIDE,
        )  # fmt: skip
        if MASKED:
            # What is hidden has the weight 0, and 0 * NaN would be NaN.
            q_tile = only_finite(q_tile)
            g_tile = only_finite(g_tile)
        dv_acc = tl.dot(dropped_p.to(g_tile.dtype), g_tile, dv_acc, input_precision=INPUT_PRECISION)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision=INPUT_PRECISION)
    return dk_acc, dv_acc


def _queries_kernel(
    q, k, v, lse, delta, d_out, dq, bias, mask, alibi_slopes, q_lengths, kv_lengths,
    scale, scale_log2, to_cap, cap_log2,
    q_stride_b, q_stride_h, q_stride_m, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_m,
    d_out_stride_b, d_out_stride_h, d_out_stride_m, d_out_stride_d,
    dq_stride_b, dq_stride_h, dq_stride_m, dq_stride_d,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    alibi_stride_b, alibi_stride_h,
    q_len, kv_len, bottom_right, left, right, heads, group, head_dim, v_dim,
    dropout_p, dropout_seed, dropout_offset,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, WIDE: tl.constexpr, PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq of BLOCK_M queries of one head, over all keys that any of them sees."""
    HAS_MASK: tl.constexpr = mask is not None
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    blocks = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    first_row = (blocks - 1 - pid % blocks) * BLOCK_M
    head = pid // blocks
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    kv_h = ((head % heads) // group).to(tl.int64)
    q_start, q_rows = extent(q_lengths, b, q_len, PACKED)
    kv_start, kv_rows = extent(kv_lengths, b, kv_len, PACKED)
    shift = (kv_rows - q_rows) * bottom_right
    place = (q_rows, kv_rows, shift, left, right)

    rows = tl.arange(0, BLOCK_M)
    at = q_start + first_row
    q_tile = load_tile(
        q + b * q_stride_b + h * q_stride_h + at * q_stride_m,
        rows, tl.arange(0, BLOCK_D), q_stride_m, q_stride_d, q_rows - first_row, head_dim, True, PAD_D, WIDE,
    )  # fmt: skip
    g_tile = load_tile(
        d_out + b * d_out_stride_b + h * d_out_stride_h + at * d_out_stride_m,
        rows, tl.arange(0, BLOCK_DV), d_out_stride_m, d_out_stride_d, q_rows - first_row, v_dim, True, PAD_DV, WIDE,
    )  # fmt: skip
    rows_head = b * lse_stride_b + h * lse_stride_h + q_start * lse_stride_m
    row_lse, row_delta = load_rows(
        (lse + rows_head, delta + rows_head, lse_stride_m), first_row, BLOCK_M, place, True
    )
    k_at = (k + b * k_stride_b + kv_h * k_stride_h + kv_start * k_stride_n, k_stride_n, k_stride_d, head_dim)
    v_at = (v + b * v_stride_b + kv_h * v_stride_h + kv_start * v_stride_n, v_stride_n, v_stride_d, v_dim)
    bias_at = (None, bias_stride_m, bias_stride_n)
    if bias is not None:
        bias_at = (bias + b * bias_stride_b + h * bias_stride_h, bias_stride_m, bias_stride_n)
    mask_at = (None, mask_stride_m, mask_stride_n)
    if mask is not None:
        mask_at = (mask + b * mask_stride_b + h * mask_stride_h, mask_stride_m, mask_stride_n)
    slope_log2 = 0.0
    if alibi_slopes is not None:
        slope_log2 = tl.load(alibi_slopes + b * alibi_stride_b + h * alibi_stride_h) * LOG2_E
    score = (scale_log2, to_cap, cap_log2, slope_log2)
    dropped = (dropout_p, dropout_seed, (b * heads + h) * q_len * kv_len + dropout_offset, kv_len)

    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    start, whole, whole_end, end = key_blocks(first_row, place, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_MASK)
    if HAS_LEFT and not HAS_MASK:
        dq_acc = _walk_keys(
            dq_acc, q_tile, g_tile, row_lse, row_delta, k_at, v_at, start, tl.minimum(whole, end), first_row, place,
            score, bias_at, mask_at, dropped,
            True, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
            INPUT_PRECISION,
        )  # fmt: skip
    if not HAS_MASK:
        dq_acc = _walk_keys(
            dq_acc, q_tile, g_tile, row_lse, row_delta, k_at, v_at, whole, whole_end, first_row, place,
            score, bias_at, mask_at, dropped,
            False, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
            INPUT_PRECISION,
        )  # fmt: skip
    dq_acc = _walk_keys(
        dq_acc, q_tile, g_tile, row_lse, row_delta, k_at, v_at, whole_end, end, first_row, place,
        score, bias_at, mask_at, dropped,
        True, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
        INPUT_PRECISION,
    )  # fmt: skip

    # Rows of padding that share a block with others have walked along.
    dq_acc = tl.where((first_row + rows < q_rows)[:, None], dq_acc, 0.0)
    inside = first_row + rows < (q_rows if PACKED else q_len)
    dq_block = dq + b * dq_stride_b + h * dq_stride_h + at * dq_stride_m
    store_tile(
        dq_block,
        dq_acc * scale,
        rows,
        tl.arange(0, BLOCK_D),
        dq_stride_m,
        dq_stride_d,
        inside,
        head_dim,
        WIDE,
    )


queries_kernel = jit_twice(_queries_kernel, ("q", "k", "v", "lse", "d_out", "dq"))


@triton.jit
def _walk_keys(
    dq_acc, q_tile, g_tile, row_lse, row_delta, k_at, v_at, begin, end, first_row, place, score, bias_at, mask_at,
    dropped,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what the keys begin <= j < end give to dq."""
    keys = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=True):
        first_key = tl.cast(start, tl.int64)
        k_tile = load_tile(
            k_at[0] + first_key * k_at[1], keys, tl.arange(0, BLOCK_D), k_at[1], k_at[2],
            place[1] - start, k_at[3], MASKED, PAD_D, WIDE,
        )  # fmt: skip
        v_tile = load_tile(
            v_at[0] + first_key * v_at[1], keys, tl.arange(0, BLOCK_DV), v_at[1], v_at[2],
            place[1] - start, v_at[3], MASKED, PAD_DV, WIDE,
        )  # fmt: skip
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION)
        d_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision=INPUT_PRECISION)
        _, _, ds = pair_gradients(
            scores, d_weights, row_lse[:, None], row_delta[:, None], first_row, start,
            tl.arange(0, BLOCK_M)[:, None], keys[None, :], place, score, bias_at, mask_at, dropped,
            MASKED, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, WIDE,
        )  # fmt: skip
        if MASKED:
            k_tile = only_finite(k_tile)
        dq_acc = tl.dot(ds.to(k_tile.dtype), k_tile, dq_acc, input_precision=INPUT_PRECISION)
    return dq_acc


@triton.jit
def load_rows(rows_at, first_row, BLOCK_M: tl.constexpr, place, MASKED: tl.constexpr):
    """(lse in units of log2, delta) of BLOCK_M rows; +inf for an lse of -inf, so that such a row has the weights 0."""
    rows = first_row + tl.arange(0, BLOCK_M)
    at = rows.to(tl.int64) * rows_at[2]
    if MASKED:
        row_lse = tl.load(rows_at[0] + at, mask=rows < place[0], other=float("inf"))
        row_delta = tl.load(rows_at[1] + at, mask=rows < place[0], other=0.0)
    else:
        row_lse = tl.load(rows_at[0] + at)
        row_delta = tl.load(rows_at[1] + at)
    return tl.where(row_lse == float("-inf"), float("inf"), row_lse) * LOG2_E, row_delta


@triton.jit
def pair_gradients(
    products, d_weights, row_lse, row_delta, first_row, first_key, r, c, place, score, bias_at, mask_at, dropped,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """(d bias, weights of g in dv, gradient of scale * q . k) of a tile of pairs, in either orientation.

    products: q . k. d_weights: g . v. r and c count queries and keys from first_row and first_key on.
    """
    HAS_BIAS: tl.constexpr = bias_at[0] is not None
    if MASKED:
        seen = visible(first_row, first_key, r, c, place, mask_at, HAS_LEFT, WIDE)
    else:
        # Of a block that is seen whole, the last rows may still not be there.
        seen = first_row + r < place[0]
    scores, bent = logits(
        products, first_row, first_key, r, c, place[2], score, bias_at, seen, HAS_CAP, HAS_ALIBI, WIDE
    )
    p = tl.exp2(scores - row_lse)
    if MASKED:
        # A g that is not finite makes its row's delta so; what the row sees gets NaN, though g was taken as 0.
        p = tl.where(seen, tl.where(finite(row_delta), p, float("nan")), 0.0)
    weights = p
    if HAS_DROPOUT:
        index = dropped[2] + (first_row + r).to(tl.int64) * dropped[3] + (first_key + c)
        factor = tl.where(kept(dropped[1], index, dropped[0]), 1.0 / (1.0 - dropped[0]), 0.0)
        weights = p * factor
        d_weights = d_weights * factor
    d_bias = p * (d_weights - row_delta)
    if MASKED or HAS_BIAS:
        # 0 * NaN where the pair has no weight.
        d_bias = tl.where(p == 0, 0.0, d_bias)
    ds = d_bias
    if HAS_CAP:
        ds = d_bias * (1.0 - bent * bent)
        if MASKED:
            ds = tl.where(p == 0, 0.0, ds)
    return d_bias, weights, ds
