"""FlashAttention, forward: exact attention in one pass over the keys, with O(N d) memory.

Read `flash_attention_forward` for what is computed and `_forward_kernel` for how. The algorithm is
FlashAttention-2 (Dao, arXiv:2307.08691, algorithm 1), which reorders FlashAttention (Dao et al.,
arXiv:2205.14135) so that one program owns one block of queries and walks over the keys, with the softmax
normalised once at the end. Nothing here is particular to one device: the same source runs on CUDA and,
through `effattn.cpu`, on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from effattn.kernels.arguments import (
    Extras,
    Problem,
    check_block,
    check_extras,
    check_lengths,
    check_numbers,
    check_shapes,
    check_tensors,
    problem_of,
)
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
from effattn.kernels.loads import finite, load_tile, only_finite, spoilage, store_tile
from effattn.kernels.logits import LN_2, LOG2_E, logits
from effattn.kernels.mask import extent, key_blocks, key_range, visible
from effattn.kernels.tiles import tiles

#: log2(e), rounded once from the exact value
_LOG2_E = 1.4426950408889634


def flash_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    causal_alignment: str = "bottom-right",
    window: tuple[int, int] | int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    q_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    input_precision: str = "ieee",
    block_m: int | None = None,
    block_n: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention and the logarithm of its normaliser, without the N x N matrix of scores.

        s[i, j] = cap(scale * q[i] . k[j]) + bias[i, j] - slope |i + shift - j|     for the keys j that i sees
        out[i]  = sum_j exp(s[i, j] - lse[i]) v[j]
        lse[i]  = log(exp(sink) + sum_j exp(s[i, j]))                               natural logarithm

    Query i sees every key; with `causal`, those with j <= i + kv_len - q_len (`causal_alignment`
    "bottom-right": the last query sees the last key, as FlashAttention from 2.1 on) or j <= i ("top-left", as
    torch's `is_causal`). A query that sees no key has out = 0 and lse = -inf (the sink, where there is one). This is
    the forward pass alone; `effattn.kernels.flash_attention` is the one to call, has gradients, and explains the other
    options.

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
        5. one division at the end, and one rounding to the output's dtype.
        Scores that overflow float32 give NaN.

    What is hidden has no influence on any bit: neither a key that no query sees nor, where one query of a block sees a
    key and another does not, what that key and its value are, NaN and infinity included.

    Raises
        ArgumentTypeError (a TypeError) for a wrong type, dtype or device; ArgumentError (a ValueError) for a
        wrong shape or value. Both say which argument, what it was, and what is accepted.

    Sources: arXiv:2307.08691, algorithm 1 and section 3.1 (one rescaling, the saved logsumexp, masked blocks
    apart from full ones); arXiv:2205.14135 (tiling and the running softmax); Milakov and Gimelshein,
    arXiv:1805.02867 (the running softmax's recurrence).
    """
    check_tensors(q=q, k=k, v=v)
    check_shapes(q, k, v)
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        check_block(name, block)
    given = check_numbers(
        q.shape[3],
        causal=causal,
        causal_alignment=causal_alignment,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        input_precision=input_precision,
    )
    extras = check_extras(
        q,
        k.shape[2],
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        q_lengths=q_lengths,
        kv_lengths=kv_lengths,
    )
    check_lengths("q_lengths", extras.q_lengths, q.shape[2])
    check_lengths("kv_lengths", extras.kv_lengths, k.shape[2])
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    problem = problem_of(q, k, v, **given._asdict())
    forward_launch(problem, q, k, v, extras, out, lse, block_m=block_m, block_n=block_n).run(q)
    return out, lse


def forward_launch(
    problem: Problem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    extras: Extras,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_m: int | None = None,
    block_n: int | None = None,
    device_type: str | None = None,
) -> Launch:
    """The launch for checked arguments, into out and lse.

    All are (batch, heads, length, ...); of packed sequences, views with batch strides of 0.
    """
    device_type = device_type or q.device.type
    cut = tiles(problem.head_dim, problem.v_dim, q.dtype, device_type, rich=is_rich(problem, extras))
    block_m = block_m or cut.block_m
    block_n = block_n or cut.block_n
    wide = any(is_wide(t, block) for t, block in ((q, block_m), (k, block_n), (v, block_n), (out, block_m)))
    wide |= any(is_wide(t, block_m, block_n) for t in (extras.bias, extras.mask))
    return Launch(
        kernel=forward_kernel[device_type],
        programs=triton.cdiv(problem.q_len, block_m) * problem.batch * problem.heads,
        arguments={
            "q": q,
            "k": k,
            "v": v,
            "out": out,
            "lse": lse,
            "sinks": extras.sinks,
            "scale_log2": abs(problem.scale) * _LOG2_E,
            **stride_arguments("q", q, "bhmd"),
            **stride_arguments("k", k, "bhnd"),
            **stride_arguments("v", v, "bhnd"),
            **stride_arguments("out", out, "bhmd"),
            **stride_arguments("lse", lse, "bhm"),
            **shared_arguments(problem, extras),
            **constants(problem, block_m=block_m, block_n=block_n, wide=wide),
        },
        options=cut.options,
    )


def constants(problem: Problem, *, block_m: int, block_n: int, wide: bool = False) -> dict[str, Any]:
    """The kernel's compile-time arguments."""
    return {
        "SCALE_SIGN": (problem.scale > 0) - (problem.scale < 0),
        **shared_constants(problem, block_m=block_m, block_n=block_n, wide=wide),
    }


def _forward_kernel(
    q, k, v, out, lse, bias, mask, alibi_slopes, sinks, q_lengths, kv_lengths,
    scale_log2,  # |scale| * log2(e)
    to_cap,  # scale / softcap
    cap_log2,  # softcap * log2(e)
    q_stride_b, q_stride_h, q_stride_m, q_stride_d,
    k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    out_stride_b, out_stride_h, out_stride_m, out_stride_d,
    lse_stride_b, lse_stride_h, lse_stride_m,
    bias_stride_b, bias_stride_h, bias_stride_m, bias_stride_n,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    alibi_stride_b, alibi_stride_h,
    q_len, kv_len,
    bottom_right,  # 1 where the last query sees the last key under a causal mask, 0 where the first sees the first
    left, right,  # query i sees the keys i + shift - left <= j <= i + shift + right
    heads,
    group,  # query heads that share a key head
    head_dim, v_dim,
    dropout_p, dropout_seed, dropout_offset,
    SCALE_SIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr,
    WIDE: tl.constexpr, PACKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all the keys that any of them sees."""
    HAS_MASK: tl.constexpr = mask is not None
    HAS_ALIBI: tl.constexpr = alibi_slopes is not None
    # Neighbouring programs share a head, so its K and V stay in cache, and under a causal mask the longest
    # blocks of queries start first, so that none is left running alone at the end.
    blocks = tl.cdiv(q_len, BLOCK_M)
    pid = tl.program_id(0)
    first_row = (blocks - 1 - pid % blocks) * BLOCK_M
    head = pid // blocks  # of all heads of the batch
    b = (head // heads).to(tl.int64)
    h = (head % heads).to(tl.int64)
    kv_h = ((head % heads) // group).to(tl.int64)
    q_start, q_rows = extent(q_lengths, b, q_len, PACKED)
    kv_start, kv_rows = extent(kv_lengths, b, kv_len, PACKED)
    shift = (kv_rows - q_rows) * bottom_right
    place = (q_rows, kv_rows, shift, left, right)

    # Where a tile begins is computed in 64 bits; where an element lies inside it in 32 unless WIDE.
    q_block = q + b * q_stride_b + h * q_stride_h + (q_start + first_row) * q_stride_m
    k_head = k + b * k_stride_b + kv_h * k_stride_h + kv_start * k_stride_n
    v_head = v + b * v_stride_b + kv_h * v_stride_h + kv_start * v_stride_n
    k_at = (k_head, k_stride_n, k_stride_d, head_dim)
    v_at = (v_head, v_stride_n, v_stride_d, v_dim)
    bias_at = (None, bias_stride_m, bias_stride_n)
    if bias is not None:
        bias_at = (bias + b * bias_stride_b + h * bias_stride_h, bias_stride_m, bias_stride_n)
    mask_at = (None, mask_stride_m, mask_stride_n)
    if mask is not None:
        mask_at = (mask + b * mask_stride_b + h * mask_stride_h, mask_stride_m, mask_stride_n)
    slope_log2 = 0.0
    if alibi_slopes is not None:
        slope_log2 = tl.load(alibi_slopes + b * alibi_stride_b + h * alibi_stride_h) * LOG2_E
    # The first weight of this head in the numbering that dropout draws by; see `effattn.kernels.dropout`.
    first_index = (b * heads + h) * q_len * kv_len + dropout_offset
    dropped = (dropout_p, dropout_seed, first_index, kv_len)

    rows = tl.arange(0, BLOCK_M)
    q_tile = load_tile(
        q_block,
        rows,
        tl.arange(0, BLOCK_D),
        q_stride_m,
        q_stride_d,
        q_rows - first_row,
        head_dim,
        True,
        PAD_D,
        WIDE,
    )
    if SCALE_SIGN != 1:
        # The maximum below is taken before scaling, so the scale has to be positive. A change of sign is
        # exact; a scale of 0 makes every score 0 whatever it is multiplied by.
        q_tile = q_tile * SCALE_SIGN
        to_cap = to_cap * SCALE_SIGN
        if SCALE_SIGN == 0:
            scale_log2 = 1.0
    score = (scale_log2, to_cap, cap_log2, slope_log2)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)  # of the scores in units of log2, so far
    row_sum = tl.zeros([BLOCK_M], tl.float32)  # of exp2(score - row_max)
    if sinks is not None:
        # A key with this logit and the value 0, taken before all others.
        row_max = tl.full([BLOCK_M], 0.0, tl.float32) + tl.load(sinks + h) * LOG2_E
        row_sum += 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)  # of exp2(score - row_max) * v
    start, whole, whole_end, end = key_blocks(first_row, place, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_MASK)
    spoilt = 0  # whether a value in a block that is not seen whole is not finite
    if HAS_LEFT and not HAS_MASK:
        acc, row_sum, row_max, spoilt = _attend(
            acc, row_sum, row_max, spoilt, q_tile, k_at, v_at, start, tl.minimum(whole, end), first_row, place, score,
            bias_at, mask_at, dropped,
            True, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
            INPUT_PRECISION,
        )  # fmt: skip
    if not HAS_MASK:
        acc, row_sum, row_max, spoilt = _attend(
            acc, row_sum, row_max, spoilt, q_tile, k_at, v_at, whole, whole_end, first_row, place, score,
            bias_at, mask_at, dropped,
            False, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
            INPUT_PRECISION,
        )  # fmt: skip
    acc, row_sum, row_max, spoilt = _attend(
        acc, row_sum, row_max, spoilt, q_tile, k_at, v_at, whole_end, end, first_row, place, score,
        bias_at, mask_at, dropped,
        True, HAS_LEFT, HAS_CAP, HAS_ALIBI, HAS_DROPOUT, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PAD_D, PAD_DV, WIDE,
        INPUT_PRECISION,
    )  # fmt: skip
    if spoilt:
        if HAS_LEFT and not HAS_MASK:
            acc = _spoil(
                acc, v_at, start, tl.minimum(whole, end), first_row, place, mask_at,
                HAS_LEFT, BLOCK_M, BLOCK_N, BLOCK_DV, PAD_DV, WIDE,
            )  # fmt: skip
        acc = _spoil(
            acc, v_at, whole_end, end, first_row, place, mask_at,
            HAS_LEFT, BLOCK_M, BLOCK_N, BLOCK_DV, PAD_DV, WIDE,
        )  # fmt: skip

    # A row that sees no key has summed nothing: out = 0 / 1, lse = -inf + log2(1).
    first_seen, seen_end = key_range(first_row + rows, place)
    if HAS_MASK or bias is not None or sinks is not None:
        total = tl.where(row_sum == 0, 1.0, row_sum)
    else:
        total = tl.where(seen_end > first_seen, row_sum, 1.0)
    acc = acc / total[:, None]
    if HAS_DROPOUT:
        acc = acc * (1.0 / (1.0 - dropout_p))
    row_lse = (row_max + tl.log2(total)) * LN_2

    inside = first_row + rows < q_len
    if PACKED:
        inside = first_row + rows < q_rows
    elif q_lengths is not None:
        # Padding is written, so that nothing is left of what the memory held.
        acc = tl.where((first_row + rows < q_rows)[:, None], acc, 0.0)
        row_lse = tl.where(first_row + rows < q_rows, row_lse, float("-inf"))
    lse_block = lse + b * lse_stride_b + h * lse_stride_h + (q_start + first_row) * lse_stride_m
    tl.store(lse_block + rows * lse_stride_m, row_lse, mask=inside)
    out_block = out + b * out_stride_b + h * out_stride_h + (q_start + first_row) * out_stride_m
    store_tile(out_block, acc, rows, tl.arange(0, BLOCK_DV), out_stride_m, out_stride_d, inside, v_dim, WIDE)


forward_kernel = jit_twice(_forward_kernel, ("q", "k", "v", "out", "lse"))


@triton.jit
def _attend(
    acc, row_sum, row_max, spoilt, q_tile, k_at, v_at, begin, end, first_row, place, score, bias_at, mask_at, dropped,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAD_D: tl.constexpr, PAD_DV: tl.constexpr, WIDE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the keys begin <= j < end into the running softmax; who sees what is asked only if MASKED."""
    HAS_BIAS: tl.constexpr = bias_at[0] is not None
    kv_len = place[1]
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=True):
        first_key = tl.cast(start, tl.int64)
        k_tile = load_tile(
            k_at[0] + first_key * k_at[1], columns, tl.arange(0, BLOCK_D), k_at[1], k_at[2],
            kv_len - start, k_at[3], MASKED, PAD_D, WIDE,
        )  # fmt: skip
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=INPUT_PRECISION)
        if MASKED:
            seen = visible(first_row, start, rows, columns[None, :], place, mask_at, HAS_LEFT, WIDE)
        else:
            # Of a block that is seen whole, the last rows may still not be there.
            seen = first_row + rows < place[0]
        if HAS_CAP or HAS_BIAS or HAS_ALIBI:
            scores, _ = logits(
                scores, first_row, start, rows, columns[None, :], place[2], score, bias_at, seen,
                HAS_CAP, HAS_ALIBI, WIDE,
            )  # fmt: skip
            unit = 1.0
        else:
            unit = score[0]
        if MASKED:
            scores = tl.where(seen, scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
        # A row that has seen nothing yet has the maximum -inf, and -inf - -inf is NaN: shift it by 0 instead.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED or HAS_BIAS else new_max
        weights = tl.exp2(scores * unit - shift[:, None])
        decay = tl.exp2(row_max - shift)
        row_sum = row_sum * decay + tl.sum(weights, 1)
        row_max = new_max
        if HAS_DROPOUT:
            index = dropped[2] + (first_row + rows).to(tl.int64) * dropped[3] + (start + columns[None, :])
            weights = tl.where(kept(dropped[1], index, dropped[0]), weights, 0.0)

        v_tile = load_tile(
            v_at[0] + first_key * v_at[1], columns, tl.arange(0, BLOCK_DV), v_at[1], v_at[2],
            kv_len - start, v_at[3], MASKED, PAD_DV, WIDE,
        )  # fmt: skip
        if MASKED:
            spoilt |= tl.max(tl.max((~finite(v_tile)).to(tl.int32), 1), 0)
            v_tile = only_finite(v_tile)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=INPUT_PRECISION)
    return acc, row_sum, row_max, spoilt


@triton.jit
def _spoil(
    acc, v_at, begin, end, first_row, place, mask_at,
    HAS_LEFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, PAD_DV: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Add the values that are not finite, which `_attend` left out where it is MASKED, to the rows that see them."""
    rows = tl.arange(0, BLOCK_M)[:, None]
    columns = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, disable_licm=True):
        v_tile = load_tile(
            v_at[0] + tl.cast(start, tl.int64) * v_at[1], columns, tl.arange(0, BLOCK_DV), v_at[1], v_at[2],
            place[1] - start, v_at[3], True, PAD_DV, WIDE,
        )  # fmt: skip
        acc += spoilage(
            v_tile, visible(first_row, start, rows, columns[None, :], place, mask_at, HAS_LEFT, WIDE)
        )
    return acc
