"""Which keys a query sees: the one definition that the forward and the backward kernels share.

Positions decide first. Query i sees the keys first <= j < end,

    first = max(i + shift - left, 0)
    end   = min(i + shift + right + 1, kv_len)

where shift aligns the two sequences: kv_len - q_len puts the last query at the last key, 0 the first at the first. A
causal mask is right = 0, a sliding window has both sides, and a side without limit is given as a number that no
position reaches, so that one compiled kernel serves all of them. A tensor of booleans may hide more.

From the two bounds follows which blocks of keys a block of queries needs at all (`key_blocks`), and the other way round
(`query_blocks`); what lies outside is never read. Blocks that are seen whole are told apart from those at an edge, since
only the latter have to look at each pair.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def extent(lengths, b, length, PACKED: tl.constexpr):
    """Member b of the batch: where its rows start on a packed axis, and how many it has.

    `lengths` is None (all have `length`), one length a member, or, PACKED, the batch + 1 cumulative lengths.
    """
    if PACKED:
        start = tl.load(lengths + b)
        return start.to(tl.int64), tl.load(lengths + b + 1) - start
    elif lengths is not None:
        return tl.zeros([], tl.int64), tl.load(lengths + b)
    else:
        return tl.zeros([], tl.int64), length


@triton.jit
def key_range(i, place):
    """The keys first <= j < end that each query of `i` sees by its position; rows beyond q_len see none."""
    q_len, kv_len, shift, left, right = place
    first = tl.maximum(i + shift - left, 0)
    end = tl.minimum(i + shift + right + 1, kv_len)
    return first, tl.where(i < q_len, end, 0)


@triton.jit
def visible(first_row, first_key, r, c, place, mask_at, HAS_LEFT: tl.constexpr, WIDE: tl.constexpr):
    """Whether query first_row + r sees key first_key + c, for broadcastable r and c.

    place: (q_len, kv_len, shift, left, right). mask_at: (the boolean mask at query 0 and key 0, or None; its strides).
    """
    first, end = key_range(first_row + r, place)
    j = first_key + c
    seen = j < end
    if HAS_LEFT:
        seen = seen & (j >= first)
    if mask_at[0] is not None:
        # Only what positions leave is looked up, so nothing beyond the mask's last element is.
        pointers = tile_of(mask_at, first_row, first_key, r, c, WIDE)
        seen = seen & (tl.load(pointers, mask=seen, other=0) != 0)
    return seen


@triton.jit
def tile_of(matrix, first_row, first_key, r, c, WIDE: tl.constexpr):
    """Pointers into (first element, row stride, column stride): 64 bits to the tile, 32 inside it unless WIDE."""
    tile = matrix[0] + (first_row.to(tl.int64) * matrix[1] + first_key.to(tl.int64) * matrix[2])
    if WIDE:
        r = r.to(tl.int64)
        c = c.to(tl.int64)
    return tile + (r * matrix[1] + c * matrix[2])


@triton.jit
def key_blocks(
    first_row, place,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """(start, whole, whole_end, end): the keys that the queries from first_row on need.

    Blocks from `start` to `whole` and from `whole_end` to `end` are seen in part; those between, by every query whole.
    All but `end` are multiples of BLOCK_N, so a row's keys are cut in the same places whatever it can see.
    """
    q_len, kv_len, shift, left, right = place
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    end = tl.where(last_row < first_row, 0, tl.minimum(last_row + shift + right + 1, kv_len))
    end = tl.maximum(end, 0)
    whole_end = tl.maximum(tl.minimum(first_row + shift + right + 1, kv_len), 0) // BLOCK_N * BLOCK_N
    if HAS_LEFT:
        start = tl.minimum(tl.maximum(first_row + shift - left, 0), end) // BLOCK_N * BLOCK_N
        whole = tl.cdiv(tl.maximum(last_row + shift - left, 0), BLOCK_N) * BLOCK_N
        whole = tl.minimum(whole, tl.cdiv(end, BLOCK_N) * BLOCK_N)
    else:
        start = 0
        whole = 0
    if HAS_MASK:
        whole = start
        whole_end = start
    else:
        whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    return start, whole, whole_end, end


@triton.jit
def query_blocks(
    first_key, place,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """(start, whole, whole_end, end): the queries that see some of the keys from first_key on; see `key_blocks`."""
    q_len, kv_len, shift, left, right = place
    last_key = tl.minimum(first_key + BLOCK_N, kv_len) - 1
    start = tl.maximum(first_key - shift - right, 0) // BLOCK_M * BLOCK_M
    whole = tl.cdiv(tl.maximum(last_key - shift - right, 0), BLOCK_M) * BLOCK_M
    end = q_len
    whole_end = q_len // BLOCK_M * BLOCK_M
    if HAS_LEFT:
        end = tl.minimum(last_key + left - shift + 1, q_len)
        whole_end = tl.maximum(tl.minimum(first_key + left - shift + 1, q_len), 0) // BLOCK_M * BLOCK_M
    # Keys that are not there are seen by nobody.
    end = tl.where(last_key < first_key, 0, end)
    whole_end = tl.where(first_key + BLOCK_N > kv_len, 0, whole_end)
    start = tl.minimum(start, tl.maximum(end, 0) // BLOCK_M * BLOCK_M)
    if HAS_MASK:
        whole = start
        whole_end = start
    else:
        whole = tl.minimum(tl.maximum(whole, start), tl.cdiv(tl.maximum(end, 0), BLOCK_M) * BLOCK_M)
        whole_end = tl.maximum(whole_end, whole)
    return start, whole, whole_end, end
