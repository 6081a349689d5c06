"""Tiles of matrices: loading them, and keeping what is not finite away from those who do not see it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(
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


@triton.jit
def store_tile(
    tile, values, rows, columns, row_stride, column_stride, inside_rows, column_limit, WIDE: tl.constexpr
):
    """Store the rows of a tile that are inside, rounded to what the matrix holds."""
    mask = inside_rows[:, None] & (columns[None, :] < column_limit)
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    tl.store(
        tile + (rows[:, None] * row_stride + columns[None, :] * column_stride),
        values.to(tile.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def finite(x):
    """Whether each element is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")


@triton.jit
def only_finite(x):
    """x with 0 in place of what is not finite: a weight of 0 then hides it, which 0 * NaN would not."""
    return tl.where(finite(x), x, 0.0).to(x.dtype)


@triton.jit
def spoilage(values, seen):
    """(rows, columns): what the values (keys, columns) that are not finite add up to in the rows that see their keys.

    0, an infinity or NaN. Counts them with a product: +inf as 2^-10, -inf as 1, NaN as 2^10, exact in every dtype, and
    below 2^10 of each in a tile.
    """
    code = tl.where(values == float("inf"), 0.0009765625, tl.where(values == float("-inf"), 1.0, 1024.0))
    code = tl.where(finite(values), 0.0, code).to(values.dtype)
    count = tl.dot(seen.to(values.dtype), code, input_precision="ieee")
    plus = tl.where(count > tl.floor(count), float("inf"), 0.0)
    minus = tl.where(count >= 1.0, float("-inf"), 0.0)
    return tl.where(count >= 1024.0, float("nan"), plus + minus)
