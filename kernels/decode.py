"""Decoding: one or a few queries against a long cache of keys, which may lie in pages.

    out[i] = sum_s w[s, i] out[s, i],   w[s, i] = exp(lse[s, i] - lse[i]),   lse[i] = log(exp(sink) + sum_s exp(lse[s, i]))

One query block a head leaves a GPU idle, so the keys are cut into parts s, each of which is a small attention of its own
with its own lse (flash decoding: Dao, Haziza, Massa and Sizov, 2023), and a second kernel merges them. The query heads
that share a key head are rows of one block, so that each key is read once. A part that a query sees nothing of has the
lse -inf and the weight 0.

The parts have a fixed size, so where a row's sums are cut depends on its own keys alone: its bits do not change with the
batch or with how much room the cache has.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.kernels.arguments import (
    check_extra,
    check_extras,
    check_flag,
    check_lengths,
    check_no_tangents,
    check_numbers,
    check_shapes,
    check_tensors,
    problem_of,
)
from effattn.kernels.launch import Launch, jit_twice, shared_arguments, stride_arguments
from effattn.kernels.loads import finite, only_finite, spoilage
from effattn.kernels.logits import LN_2, LOG2_E, logits
from effattn.kernels.mask import extent, key_range, visible
from effattn.kernels.tiles import decode_tiles, padded

#: keys of a part where nothing else is asked for: a compromise between filling a GPU and what the merge has to read
SPLIT_SIZE = 512


def flash_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_lengths: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: tuple[int, int] | int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    input_precision: str = "ieee",
    num_splits: int | None = None,
    split_size: int | None = None,
    check_values: bool = True,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attention` of few queries and many keys; the last query is aligned with the last key. No gradient.

    Shapes
        q (batch, heads, q_len, head_dim); k (batch, kv_heads, kv_len, head_dim) and v (batch, kv_heads, kv_len, v_dim)
        or, with page_table, (pages, kv_heads, page_size, head_dim) and (pages, kv_heads, page_size, v_dim), any strides.
        page_table: int32 (batch, most pages a member): key j of member b is row j % page_size of page
        page_table[b, j // page_size]. Pages may be shared; entries beyond a member's length are not read.
        kv_lengths: int32 (batch,); all keys that there is room for if None.

    Returns out (batch, heads, q_len, v_dim) or, with `return_lse`, (out, lse) with lse (batch, heads, q_len), float32.

    num_splits: into how many parts the room for keys is cut; split_size: how many keys a part has, 512 if neither is
    given. With a split size, a row has the same bits whatever else is in the batch.
    check_values: whether lengths and used page table entries are checked, for which a GPU is waited for. Without it, one
    that is out of range is read from whatever lies there.

    The other options are those of `flash_attention`. Raises what it raises, and ArgumentError for tensors that require a
    gradient or carry a tangent.
    """
    for name, x in (("q", q), ("k", k), ("v", v), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            raise ArgumentError(
                f"{name} requires a gradient, which flash_decode does not offer; call it under torch.no_grad(), or call"
                " flash_attention"
            )
    check_no_tangents("flash_decode", q, k, v, alibi_slopes, sinks)
    check_tensors(q=q, k=k, v=v)
    check_flag("check_values", check_values)
    given = check_numbers(
        q.shape[3] or 1,
        causal=causal,
        scale=scale,
        window=window,
        softcap=softcap,
        input_precision=input_precision,
    )
    size = _split_size(num_splits, split_size, _room(k, page_table))
    left, right, scale, cap = given.left, given.right, given.scale, given.softcap
    out, lse = decode_op(
        q, k, v, kv_lengths, page_table, alibi_slopes, sinks, left, right, scale, cap, input_precision, size, check_values
    )  # fmt: skip
    return (out, lse) if return_lse else out


@torch.library.custom_op("effattn::flash_decode", mutates_args=())
def decode_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    kv_lengths: torch.Tensor | None,
    page_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    input_precision: str,
    split_size: int,
    check_values: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv_len = _room(k, page_table)
    if page_table is None:
        check_shapes(q, k, v)
    else:
        _check_paged(q, k, v, page_table)
    extras = check_extras(q, kv_len, alibi_slopes=alibi_slopes, sinks=sinks, kv_lengths=kv_lengths)
    if check_values:
        check_lengths("kv_lengths", extras.kv_lengths, kv_len)
        if page_table is not None:
            _check_pages(page_table, extras.kv_lengths, k.shape[0], k.shape[2])
    out, lse = _outputs(q, v)
    if lse.numel() == 0:
        return out, lse
    problem = problem_of(
        q, k, v, bottom_right=True, left=left, right=right, scale=scale, softcap=softcap, input_precision=input_precision,
        lengths=(q.shape[2], kv_len),
    )  # fmt: skip
    parts = max(1, -(-kv_len // split_size))
    shape = (parts, *out.shape)
    part_out = torch.empty(shape, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(shape[:-1], dtype=torch.float32, device=q.device)
    for launch in decode_launches(
        problem, q, k, v, extras, page_table, part_out, part_lse, out, lse, split_size
    ):
        launch.run(q)
    return out, lse


@decode_op.register_fake
def _(q: Any, k: Any, v: Any, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _outputs(q, v)


def decode_launches(
    problem: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Any,
    page_table: torch.Tensor | None,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    split_size: int,
    *,
    device_type: str | None = None,
) -> list[Launch]:
    """The launches that fill the parts, float32 and contiguous, and merge them into out and lse, contiguous too."""
    device_type = device_type or q.device.type
    together = problem.group * problem.q_len  # rows that read the same keys
    cut = decode_tiles(together, problem.head_dim, problem.v_dim, q.dtype, device_type)
    row_blocks = triton.cdiv(together, cut.block_m)
    parts = part_lse.shape[0]
    shared = shared_arguments(problem, extras)
    names = (
        "alibi_slopes", "alibi_stride_b", "alibi_stride_h", "kv_lengths", "to_cap", "cap_log2", "q_len", "kv_len", "left",
        "right", "heads", "group", "head_dim", "v_dim",
    )  # fmt: skip
    block_d, block_dv = padded(problem.head_dim), padded(problem.v_dim)
    attend = Launch(
        kernel=decode_kernel[device_type],
        programs=parts * row_blocks * problem.batch * problem.kv_heads,
        arguments={
            "q": q,
            "k": k,
            "v": v,
            "page_table": page_table,
            "part_out": part_out,
            "part_lse": part_lse,
            "scale_log2": problem.scale * math.log2(math.e),
            **stride_arguments("q", q, "bhmd"),
            **stride_arguments("k", k, "bhnd"),
            **stride_arguments("v", v, "bhnd"),
            "table_stride": 0 if page_table is None else page_table.stride(0),
            "page_size": k.shape[2],
            "parts": parts,
            "split_size": split_size,
            **{name: shared[name] for name in names},
            "BLOCK_M": cut.block_m,
            "BLOCK_N": cut.block_n,
            "BLOCK_D": block_d,
            "BLOCK_DV": block_dv,
            "HAS_LEFT": problem.has_left,
            "HAS_CAP": problem.softcap > 0,
            "INPUT_PRECISION": problem.input_precision,
        },
        options=cut.options,
    )
    block = 16
    merge = Launch(
        kernel=merge_kernel[device_type],
        programs=triton.cdiv(lse.numel(), block),
        arguments={
            "part_out": part_out,
            "part_lse": part_lse,
            "sinks": extras.sinks,
            "out": out,
            "lse": lse,
            "rows": lse.numel(),
            "parts": parts,
            "q_len": problem.q_len,
            "heads": problem.heads,
            "v_dim": problem.v_dim,
            "BLOCK_M": block,
            "BLOCK_DV": block_dv,
        },
        options={} if device_type == "cpu" else {"num_warps": 4, "enable_fp_fusion": True},
    )
    return [attend, merge]


def _decode_kernel(
    q, k, v, page_table, part_out, part_lse, alibi_slopes, kv_lengths,
    scale_log2, to_cap, cap_log2,
    q_stride_b, q_stride_h, q_stride_m, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    alibi_stride_b, alibi_stride_h, table_stride,
    page_size, parts, split_size, q_len, kv_len, left, right, heads, group, head_dim, v_dim,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one part of the keys of one key head, for BLOCK_M of the rows that share it."""
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    together = group * q_len
    row_blocks = tl.cdiv(together, BLOCK_M)
    kv_heads = heads // group
    pid = tl.program_id(0)
    part = pid % parts
    row_block = pid // parts % row_blocks
    head = pid // parts // row_blocks
    b = (head // kv_heads).to(tl.int64)
    kv_h = (head % kv_heads).to(tl.int64)
    _kv_start, kv_rows = extent(kv_lengths, b, kv_len, False)
    shift = kv_rows - q_len
    place = (q_len, kv_rows, shift, left, right)

    # Row r is query r % q_len of the head r // q_len of those that share the keys.
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    there = rows < together
    h = kv_h * group + tl.where(there, rows // q_len, 0)
    i = tl.where(there, rows % q_len, q_len)  # a row that is not there sees nothing
    dims = tl.arange(0, BLOCK_D)
    columns = tl.arange(0, BLOCK_DV)
    q_rows = q + b * q_stride_b + h * q_stride_h + i.to(tl.int64) * q_stride_m
    q_tile = tl.load(
        q_rows[:, None] + (dims * tl.cast(q_stride_d, tl.int64))[None, :],
        mask=there[:, None] & (dims < head_dim)[None, :],
        other=0.0,
    )
    slope_log2 = 0.0
    if HAS_ALIBI:
        slopes = tl.load(alibi_slopes + b * alibi_stride_b + h * alibi_stride_h, mask=there, other=0.0)
        slope_log2 = slopes[:, None] * LOG2_E
    score = (scale_log2, to_cap, cap_log2, slope_log2)
    nowhere = (None, 0, 0)

    first, end = key_range(i, place)
    stop = tl.minimum(tl.minimum((part + 1) * split_size, kv_rows), tl.maximum(tl.max(end, 0), 0))
    begin = part * split_size
    if HAS_LEFT:
        # Blocks begin at multiples of BLOCK_N, as split_size does.
        begin = tl.maximum(begin, tl.min(tl.where(there, first, kv_rows), 0) // BLOCK_N * BLOCK_N)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    keys = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, stop, BLOCK_N, disable_licm=True):
        j = start + keys
        inside = j < kv_rows
        if page_table is not None:
            page = tl.load(page_table + b * table_stride + j // page_size, mask=inside, other=0).to(tl.int64)
            k_rows = k + page * k_stride_b + kv_h * k_stride_h + (j % page_size).to(tl.int64) * k_stride_n
            v_rows = v + page * v_stride_b + kv_h * v_stride_h + (j % page_size).to(tl.int64) * v_stride_n
        else:
            k_rows = k + b * k_stride_b + kv_h * k_stride_h + j.to(tl.int64) * k_stride_n
            v_rows = v + b * v_stride_b + kv_h * v_stride_h + j.to(tl.int64) * v_stride_n
        k_tile = tl.load(
            k_rows[:, None] + (dims * tl.cast(k_stride_d, tl.int64))[None, :],
            mask=inside[:, None] & (dims < head_dim)[None, :],
            other=0.0,
        )
        seen = visible(0, start, i[:, None], keys[None, :], place, nowhere, HAS_LEFT, False)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION)
        scores, _bent = logits(
            scores,
            0,
            start,
            i[:, None],
            keys[None, :],
            shift,
            score,
            nowhere,
            seen,
            HAS_CAP,
            HAS_ALIBI,
            False,
        )
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)
        weights = tl.exp2(scores - safe[:, None])
        decay = tl.exp2(row_max - safe)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        v_tile = tl.load(
            v_rows[:, None] + (columns * tl.cast(v_stride_d, tl.int64))[None, :],
            mask=inside[:, None] & (columns < v_dim)[None, :],
            other=0.0,
        )
        spoilt = tl.max(tl.max((~finite(v_tile)).to(tl.int32), 1), 0)
        acc = tl.dot(
            weights.to(v_tile.dtype),
            only_finite(v_tile),
            acc * decay[:, None],
            input_precision=INPUT_PRECISION,
        )
        if spoilt:
            acc += spoilage(v_tile, seen)

    total = tl.where(row_sum == 0, 1.0, row_sum)
    acc = acc / total[:, None]
    # (part, b, h, i), as the parts are contiguous.
    batch = tl.num_programs(0) // parts // row_blocks // kv_heads
    at = ((part.to(tl.int64) * batch + b) * heads + h) * q_len + i
    tl.store(part_lse + at, (row_max + tl.log2(total)) * LN_2, mask=there)
    tl.store(
        part_out + at[:, None] * v_dim + columns[None, :],
        acc,
        mask=there[:, None] & (columns < v_dim)[None, :],
    )


decode_kernel = jit_twice(_decode_kernel, ("q", "k", "v"))


def _merge_kernel(
    part_out,
    part_lse,
    sinks,
    out,
    lse,
    rows,
    parts,
    q_len,
    heads,
    v_dim,
    BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """BLOCK_M rows of all parts; the parts in their order, so that there is one result."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    there = row < rows
    columns = tl.arange(0, BLOCK_DV)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        row_max = tl.load(sinks + row // q_len % heads, mask=there, other=0.0) * LOG2_E
        row_sum += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for part in range(parts):
        at = tl.cast(part, tl.int64) * rows + row
        part_max = tl.load(part_lse + at, mask=there, other=float("-inf")) * LOG2_E
        values = tl.load(
            part_out + at[:, None] * v_dim + columns[None, :],
            mask=there[:, None] & (columns < v_dim)[None, :],
            other=0.0,
        )
        new_max = tl.maximum(row_max, part_max, propagate_nan=tl.PropagateNan.ALL)
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(row_max - safe)
        weight = tl.exp2(part_max - safe)
        row_sum = row_sum * decay + weight
        acc = acc * decay[:, None] + values * weight[:, None]
        row_max = new_max
    total = tl.where(row_sum == 0, 1.0, row_sum)
    tl.store(lse + row, (row_max + tl.log2(total)) * LN_2, mask=there)
    tl.store(
        out + row[:, None] * v_dim + columns[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=there[:, None] & (columns < v_dim)[None, :],
    )


merge_kernel = jit_twice(_merge_kernel, ())


def _outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)


def _room(k: torch.Tensor, page_table: Any) -> int:
    """Keys that a member can have."""
    if page_table is None:
        return k.shape[2]
    if not isinstance(page_table, torch.Tensor) or page_table.dim() != 2:
        given = tuple(page_table.shape) if isinstance(page_table, torch.Tensor) else type(page_table).__name__
        raise ArgumentError(
            f"page_table must be a tensor of the shape (batch, pages of a member), got {given}"
        )
    return page_table.shape[1] * k.shape[2]


def _split_size(num_splits: Any, split_size: Any, room: int) -> int:
    """A multiple of 128, and so of every block of keys."""
    for name, value in (("num_splits", num_splits), ("split_size", split_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ArgumentTypeError(
                f"{name} must be an int or None, got {value!r} of type {type(value).__name__}"
            )
        if value is not None and value < 1:
            raise ArgumentError(f"{name} must be at least 1, got {value}")
    if num_splits is not None and split_size is not None:
        raise ArgumentError(f"give num_splits or split_size, not both, got {num_splits} and {split_size}")
    if num_splits is not None:
        split_size = max(1, -(-room // num_splits))
    return -(-(split_size or SPLIT_SIZE) // 128) * 128


def _check_paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, page_table: torch.Tensor) -> None:
    check_extra("page_table", page_table, (torch.int32,), q)
    if page_table.shape[0] != q.shape[0]:
        raise ArgumentError(
            f"page_table must have a row for each of {q.shape[0]} members, got {page_table.shape[0]}"
        )
    if page_table.shape[1] and page_table.stride(1) != 1:
        raise ArgumentError("the rows of page_table must be contiguous; call .contiguous()")
    if k.shape[0] != v.shape[0]:
        raise ArgumentError(f"k and v must have the same pages (axis 0), got {k.shape[0]} and {v.shape[0]}")
    # The rest is as if one page were all.
    pages = k.shape[0]
    if pages and q.shape[0]:
        check_shapes(q[:1], k[:1], v[:1])


def _check_pages(
    page_table: torch.Tensor, kv_lengths: torch.Tensor | None, pages: int, page_size: int
) -> None:
    """The entries in use name pages that there are. Reads them: on a GPU this waits for it."""
    used = torch.arange(page_table.shape[1], device=page_table.device)[None, :]
    if kv_lengths is not None:
        used = torch.where(used * page_size < kv_lengths[:, None], used, -1)
    wrong = (used >= 0) & ((page_table < 0) | (page_table >= pages))
    if bool(wrong.any()):
        b, at = (int(index) for index in wrong.nonzero()[0])
        raise ArgumentError(
            f"page_table names page {int(page_table[b, at])} for member {b}, entry {at}; there are {pages} pages"
        )
