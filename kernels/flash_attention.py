"""FlashAttention, forward: exact attention in one pass over the keys, with O(N d) memory.

Read `flash_attention_forward` for what is computed and `_forward_kernel` for how. The algorithm is
FlashAttention-2 (Dao, arXiv:2307.08691, algorithm 1), which reorders FlashAttention (Dao et al.,
arXiv:2205.14135) so that one program owns one block of queries and walks over the keys, with the softmax
normalised once at the end. Nothing here is particular to one device: the same source runs on CUDA and,
through `effattn.cpu`, on the CPU.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from effattn.kernels.arguments import Problem, check_forward

#: log2(e) and log(2), rounded once from the exact value
_LOG2_E = 1.4426950408889634
_LN_2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a launch is cut up. The numbers change rounding and speed, never the meaning of the result."""

    block_m: int  #: queries a program owns
    block_n: int  #: keys a step of its loop takes
    #: what else a launch says to Triton
    options: dict[str, Any] = field(default_factory=dict)


def tiles(head_dim: int, v_dim: int, dtype: torch.dtype, device_type: str = "cuda") -> Tiles:
    """Block sizes for a head dimension, a dtype and a kind of device.

    The lengths and the batch are left out on purpose: a row's sum over the keys is then cut in the same
    places whatever shares the launch with it, and comes out with the same bits.

    CPU: a step costs a fixed overhead, so tiles are large; 64 x 64 keeps scores and accumulator in the L1 and
    L2 caches for every head_dim up to 256. GPU: Q and two or three stages of K and V have to fit the 99 to
    227 KB of shared memory that one block may take, and the fp32 accumulator and scores have to fit 255
    registers a thread; both shrink as the head dimension grows. fp32 in IEEE precision has no matrix unit to
    go to: its products run on scalar units out of registers, so its tiles are small and shared by 8 warps.
    Each entry compiles without spilling for compute capability 80, 90 and 100.
    """
    if device_type == "cpu":
        return Tiles(block_m=64, block_n=64)
    width = max(_padded(head_dim), _padded(v_dim))
    if dtype == torch.float32:
        if width <= 64:
            return _gpu_tiles(64, 32, num_warps=8, num_stages=2)
        if width <= 128:
            return _gpu_tiles(32, 16, num_warps=8, num_stages=2)
        return _gpu_tiles(16, 32, num_warps=8, num_stages=2)
    if width <= 64:
        return _gpu_tiles(128, 64, num_warps=4, num_stages=3)
    if width <= 128:
        return _gpu_tiles(128, 64, num_warps=8, num_stages=3)
    return _gpu_tiles(64, 32, num_warps=8, num_stages=2)


def _gpu_tiles(block_m: int, block_n: int, *, num_warps: int, num_stages: int) -> Tiles:
    # Fused multiply-adds make the scaled score minus its maximum one instruction, and round once less. Triton
    # 3.9 warns where this is left to its default.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return Tiles(block_m=block_m, block_n=block_n, options=options)


def flash_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    causal_alignment: str = "bottom-right",
    input_precision: str = "ieee",
    block_m: int | None = None,
    block_n: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention and the logarithm of its normaliser, without the N x N matrix of scores.

        s[i, j] = scale * q[i] . k[j]                    for the keys j that query i sees
        out[i]  = sum_j exp(s[i, j] - lse[i]) v[j]
        lse[i]  = log(sum_j exp(s[i, j]))                natural logarithm

    Query i sees every key; with `causal`, those with j <= i + kv_len - q_len (`causal_alignment`
    "bottom-right": the last query sees the last key, as FlashAttention from 2.1 on) or j <= i ("top-left", as
    torch's `is_causal`). A query that sees no key has out = 0 and lse = -inf.

    Shapes
        q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len,
        v_dim); out (batch, heads, q_len, v_dim), lse (batch, heads, q_len). heads is a multiple of kv_heads,
        and query head h reads key head h // (heads // kv_heads). head_dim and v_dim are 1 to 256, each on its
        own; lengths start at 0. Any strides, 0 included: nothing is copied. out and lse are new and
        contiguous. Forward only: the result carries no gradient.

    Arguments
        scale: any finite number, 1/sqrt(head_dim) if None.
        input_precision: of the two matrix products if the tensors are float32: "ieee", "tf32", or another
        that
            `tl.dot` knows. Products of float16 and bfloat16 are exact in float32 whatever it says.
        block_m, block_n: powers of two of at least 16 that override `tiles`.

    Arithmetic
        q, k, v of one dtype: float16, bfloat16 or float32; out has it too, lse is float32. Scores, softmax
        and the accumulator are float32. This differs from the formula, evaluated exactly and rounded once,
        in:
        1. both products are summed in float32, block by block, in an order that the device chooses;
        2. scores are multiplied by float32(scale * log2(e)) and exponentiated by exp2;
        3. the weights, relative to the running maximum, are rounded to v's dtype for the second product. The
           normaliser sums them unrounded;
        4. accumulator and normaliser are multiplied by exp2(old - new maximum) when the maximum grows;
        5. one division at the end, and one rounding to the output's dtype. A NaN in a key reaches the queries
        that see it. One in v[j], or an infinity, can also reach queries that do not see j but share a block
        with one that does, since 0 * NaN is NaN; beyond kv_len nothing is read. Scores that overflow float32
        give NaN.

    Raises
        ArgumentTypeError (a TypeError) for a wrong type, dtype or device; ArgumentError (a ValueError) for a
        wrong shape or value. Both say which argument, what it was, and what is accepted.

    Sources: arXiv:2307.08691, algorithm 1 and section 3.1 (one rescaling, the saved logsumexp, masked blocks
    apart from full ones); arXiv:2205.14135 (tiling and the running softmax); Milakov and Gimelshein,
    arXiv:1805.02867 (the running softmax's recurrence).
    """
    problem = check_forward(
        q,
        k,
        v,
        causal=causal,
        scale=scale,
        causal_alignment=causal_alignment,
        input_precision=input_precision,
        block_m=block_m,
        block_n=block_n,
    )
    out = torch.empty(
        (problem.batch, problem.heads, problem.q_len, problem.v_dim), dtype=q.dtype, device=q.device
    )
    lse = torch.empty((problem.batch, problem.heads, problem.q_len), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse

    cut = tiles(problem.head_dim, problem.v_dim, q.dtype, q.device.type)
    block_m = block_m or cut.block_m
    block_n = block_n or cut.block_n
    # One axis, since only the first of a CUDA grid may pass 65,535.
    programs = triton.cdiv(problem.q_len, block_m) * problem.batch * problem.heads
    q_strides, k_strides, v_strides = _strides(q), _strides(k), _strides(v)
    kernel = forward_kernel_cpu if q.device.type == "cpu" else forward_kernel_gpu
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](
            q,
            k,
            v,
            out,
            lse,
            abs(problem.scale) * _LOG2_E,
            *q_strides,
            *k_strides,
            *v_strides,
            problem.q_len,
            problem.kv_len,
            problem.causal_shift,
            problem.heads,
            problem.group,
            problem.head_dim,
            problem.v_dim,
            **constants(
                problem,
                block_m=block_m,
                block_n=block_n,
                wide=any(_is_wide(t, block) for t, block in ((q, block_m), (k, block_n), (v, block_n))),
            ),
            **cut.options,
        )
    return out, lse


def constants(problem: Problem, *, block_m: int, block_n: int, wide: bool = False) -> dict[str, object]:
    """The kernel's compile-time arguments. Few on purpose: each combination is one more compilation."""
    block_d, block_dv = _padded(problem.head_dim), _padded(problem.v_dim)
    return {
        "SCALE_SIGN": (problem.scale > 0) - (problem.scale < 0),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "PAD_D": block_d != problem.head_dim,
        "PAD_DV": block_dv != problem.v_dim,
        "WIDE": wide,
        "INPUT_PRECISION": problem.input_precision,
    }


def _padded(dim: int) -> int:
    """The next power of two, at least 16: what `tl.arange` and `tl.dot` take."""
    return max(16, 1 << (dim - 1).bit_length())


def _strides(x: torch.Tensor) -> list[int]:
    """Strides; those of axes of length 1, on which no address depends, as they compile to the best code."""
    last = x.dim() - 1
    return [
        stride if size > 1 else int(axis == last)
        for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
    ]


def _is_wide(x: torch.Tensor, rows: int) -> bool:
    """Whether an offset inside one tile of `rows` rows, padding included, can pass 31 bits."""
    _, _, row_stride, column_stride = _strides(x)
    return (rows - 1) * row_stride + (_padded(x.shape[-1]) - 1) * column_stride >= 2**31


def _forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    scale_log2,  # |scale| * log2(e)
    q_stride_b,
    q_stride_h,
    q_stride_m,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    q_len,
    kv_len,
    causal_shift,  # query i sees the keys j <= i + causal_shift; kv_len if there is no mask
    heads,
    group,  # query heads that share a key head
    head_dim,
    v_dim,
    SCALE_SIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_DV: tl.constexpr,
    WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head against all the keys that any of them sees."""
    # Neighbouring programs share a head, so its K and V stay in cache, and under a causal mask the longest
    # blocks of queries start first, so that none is left running alone at the end.
    blocks = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    first_row = (blocks - 1 - pid % blocks) * BLOCK_M
    head = pid // blocks  # of all heads of the batch
    b = (head // heads).to(tl.int64)
    h = head % heads
    kv_h = (h // group).to(tl.int64)

    # Where a tile begins is computed in 64 bits; where an element lies inside it in 32 unless WIDE.
    q_block = q + b * q_stride_b + h.to(tl.int64) * q_stride_h + first_row.to(tl.int64) * q_stride_m
    k_head = k + b * k_stride_b + kv_h * k_stride_h
    v_head = v + b * v_stride_b + kv_h * v_stride_h
    rows = tl.arange(0, BLOCK_M)
    q_tile = _load(
        q_block,
        rows,
        tl.arange(0, BLOCK_D),
        q_stride_m,
        q_stride_d,
        q_len - first_row,
        head_dim,
        True,
        PAD_D,
        WIDE,
    )
    if SCALE_SIGN != 1:
        # The maximum below is taken before scaling, so the scale has to be positive. A change of sign is
        # exact; a scale of 0 makes every score 0 whatever it is multiplied by.
        q_tile = q_tile * SCALE_SIGN
        if SCALE_SIGN == 0:
            scale_log2 = 1.0

    # How many keys, counted from the first, each row sees; at least one row sees `some`, all rows see
    # `every`.
    seen = tl.minimum(first_row + rows + causal_shift + 1, kv_len)
    some = tl.minimum(tl.minimum(first_row + BLOCK_M, q_len) + causal_shift, kv_len)
    every = tl.maximum(tl.minimum(first_row + causal_shift + 1, kv_len), 0) // BLOCK_N * BLOCK_N

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of the scores in units of log2, so far
    row_sum = tl.zeros([BLOCK_M], tl.float32)  # of exp2(score - row_max)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # of exp2(score - row_max) * v
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q_tile, k_head, v_head, 0, every, seen, scale_log2, kv_len, head_dim, v_dim,
        k_stride_n, k_stride_d, v_stride_n, v_stride_d,
        False, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE, INPUT_PRECISION,
    )  # fmt: skip
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q_tile, k_head, v_head, every, some, seen, scale_log2, kv_len, head_dim, v_dim,
        k_stride_n, k_stride_d, v_stride_n, v_stride_d,
        True, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE, INPUT_PRECISION,
    )  # fmt: skip

    # A row that sees no key has summed nothing: out = 0 / 1, lse = -inf + log2(1).
    total = tl.where(seen > 0, row_sum, 1.0)
    acc = acc / total[:, None]
    row_lse = (row_max + tl.log2(total)) * _LN_2

    columns = tl.arange(0, BLOCK_DV)
    first = head.to(tl.int64) * q_len + first_row
    inside = first_row + rows < q_len
    tl.store(lse + first + rows, row_lse, mask=inside)
    tl.store(
        out + first * v_dim + (rows[:, None] * v_dim + columns[None, :]),
        acc.to(out.dtype.element_ty),
        mask=inside[:, None] & (columns[None, :] < v_dim),
    )


# One kernel, specialised twice. Triton compiles anew for every combination of integers that are 1 or, on a
# GPU, divisible by 16. There that decides how wide a load of a row may be, so strides and head sizes keep it.
# On a CPU it decides nothing, except that a last stride of 1 makes a load one of consecutive elements:
# compiling once for all shapes is worth more there.
_LENGTHS = ["q_len", "kv_len", "causal_shift", "heads", "group"]
_OUTER_STRIDES = [f"{x}_stride_{axis}" for x in "qkv" for axis in ("b", "h", "m" if x == "q" else "n")]
forward_kernel_gpu = triton.jit(_forward_kernel, do_not_specialize=_LENGTHS)
forward_kernel_cpu = triton.jit(
    _forward_kernel, do_not_specialize=[*_LENGTHS, *_OUTER_STRIDES, "head_dim", "v_dim"]
)


@triton.jit
def _attend(
    acc, row_sum, row_max, q_tile, k_head, v_head, begin, end, seen, scale_log2, kv_len, head_dim, v_dim,
    k_stride_n, k_stride_d, v_stride_n, v_stride_d,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAD_D: tl.constexpr, PAD_DV: tl.constexpr, WIDE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys begin <= j < end into the running softmax; `seen` masks them only if MASKED."""
    columns = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N):
        row = tl.cast(start, tl.int64)
        k_tile = _load(
            k_head + row * k_stride_n, columns, tl.arange(0, BLOCK_D), k_stride_n, k_stride_d,
            kv_len - start, head_dim, MASKED, PAD_D, WIDE,
        )  # fmt: skip
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION)
        if MASKED:
            scores = tl.where(start + columns[None, :] < seen[:, None], scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is NaN: shift it by 0 instead.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        weights = tl.exp2(scores * scale_log2 - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max

        v_tile = _load(
            v_head + row * v_stride_n, columns, tl.arange(0, BLOCK_DV), v_stride_n, v_stride_d,
            kv_len - start, v_dim, MASKED, PAD_DV, WIDE,
        )  # fmt: skip
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=INPUT_PRECISION)
    return acc, row_sum, row_max


@triton.jit
def _load(
    tile, rows, columns, row_stride, column_stride, row_limit, column_limit,
    MASK_ROWS: tl.constexpr, MASK_COLUMNS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of a matrix from its first element on; 0 where it is masked, since 0 * NaN would be NaN."""
    inside_rows = rows[:, None] < row_limit
    inside_columns = columns[None, :] < column_limit
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    pointers = tile + (rows[:, None] * row_stride + columns[None, :] * column_stride)
    if MASK_ROWS and MASK_COLUMNS:
        return tl.load(pointers, mask=inside_rows & inside_columns, other=0.0)
    elif MASK_ROWS:
        return tl.load(pointers, mask=inside_rows, other=0.0)
    elif MASK_COLUMNS:
        return tl.load(pointers, mask=inside_columns, other=0.0)
    else:
        return tl.load(pointers)
