"""Exact attention: softmax(scale * q k^T + mask) v in float64, the reference that everything is held against.

Online softmax over tiles (M. Milakov, N. Gimelshein, arXiv 1805.02867; T. Dao et al., arXiv 2205.14135), so
memory is O(N d). No code is shared with what is judged.

For infinities and NaN in the inputs, the result is that of the formula, with these rules:

1. A hidden pair doesn't exist: what lies in k and v at a hidden key has no influence at all, NaN included.
2. A visible weight is positive, however far below float64's smallest number, unless its logit is -inf. So
   an infinite value at a visible key makes the output infinite; infinities of both signs make it NaN.
3. A logit of -inf has weight 0, and 0 times an infinite value is NaN, as in IEEE arithmetic.
4. A NaN logit, or one of +inf, makes the row NaN. With logits of +inf and no NaN the log-sum-exp is +inf.
5. A row whose visible logits are all -inf is 0/0: output NaN, log-sum-exp -inf. A row that sees no key has
   output 0.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from effattn.exact.blocks import Rows, Tile, row_blocks, rows_without_keys


class Exact(NamedTuple):
    """What attention gives, in float64."""

    #: (batch, heads, q_len, v_dim); 0 in rows that see no key
    out: torch.Tensor
    #: (batch, heads, q_len), natural logarithm of the sum of exp(logit); -inf in rows that see no key
    lse: torch.Tensor


@torch.no_grad()
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: str = "none",
    scale: float | None = None,
    block: tuple[int, int] | None = None,
) -> Exact:
    """Exact attention in float64 with O(N d) memory, on the device of the inputs.

    q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len,
    v_dim); any floating dtype, any strides, heads a multiple of kv_heads. `causal` is "none", "bottom-right"
    or "top-left" (see `effattn.case`), `scale` None means head_dim ** -0.5. `block` is the largest number of
    queries and of keys in a tile; results with different blocks differ by float64's rounding only.
    RequestError for shapes that don't go together.
    """
    blocks = row_blocks(q, k, v, causal=causal, block=block)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    shape = q.shape[:3]
    out = lse = None
    for rows in blocks:
        o, s = _finite(rows, scale)
        if not math.isfinite(float(o.sum())):
            # Something isn't finite, perhaps only behind the mask. Should a sum of finite numbers ever
            # overflow, this is just slower.
            o, s = _any(rows, scale)
        if s.numel() == math.prod(shape):
            return Exact(o.view(*shape, -1), s.view(shape))
        if out is None or lse is None:
            out = q.new_empty((*shape, v.shape[-1]), dtype=torch.float64)
            lse = q.new_empty(shape, dtype=torch.float64)
        rows.write(out, o)
        rows.write(lse, s)
    if out is None or lse is None:
        out = q.new_empty((*shape, v.shape[-1]), dtype=torch.float64)
        lse = q.new_empty(shape, dtype=torch.float64)
    empty = rows_without_keys(q.shape[2], k.shape[2], causal)
    out[:, :, :empty] = 0.0
    lse[:, :, :empty] = -math.inf
    return Exact(out, lse)


def _finite(rows: Rows, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a block of rows whose inputs are finite; if some aren't, out isn't."""
    q = rows.q * scale
    tiles = rows.tiles()
    tile = next(tiles)  # there is one: every row of a block sees key 0
    p = _scores(q, tile)
    top = p.amax(dim=-1, keepdim=True)
    p.sub_(top).exp_()
    total = p.sum(dim=-1, keepdim=True)
    acc = torch.bmm(p, tile.v)
    for tile in tiles:
        p = _scores(q, tile)
        highest = torch.maximum(top, p.amax(dim=-1, keepdim=True))
        p.sub_(highest).exp_()
        shrink = (top - highest).exp_()
        top = highest
        total.mul_(shrink).add_(p.sum(dim=-1, keepdim=True))
        acc.mul_(shrink).baddbmm_(p, tile.v)
    return acc.div_(total), total.log_().add_(top).squeeze(-1)


def _any(rows: Rows, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a block of rows by the rules at the head of this module."""
    q = rows.q * scale
    top = q.new_full((*q.shape[:2], 1), -math.inf)
    total = q.new_zeros((*q.shape[:2], 1))
    acc = q.new_zeros((*q.shape[:2], rows.v_dim))
    # How many values that aren't finite does a row use? Counts, so that a matrix product finds out.
    plus, minus, undefined = torch.zeros_like(acc), torch.zeros_like(acc), torch.zeros_like(acc)
    for tile in rows.tiles():
        scores = _scores(q, tile)
        visible = torch.ones_like(scores, dtype=torch.bool)
        if tile.hidden is not None:
            visible &= ~tile.hidden
        highest = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        # All logits so far may be -inf, and -inf - -inf isn't 0.
        base = torch.where(highest == -math.inf, 0.0, highest)
        p = (scores - base).exp_()
        shrink = (top - base).exp_()
        top = highest
        total = total * shrink + p.sum(dim=-1, keepdim=True)
        finite = tile.v.isfinite()
        acc = acc * shrink + torch.bmm(p, torch.where(finite, tile.v, 0.0))
        weighs = (visible & (scores != -math.inf)).to(torch.float64)
        weightless = (visible & (scores == -math.inf)).to(torch.float64)
        plus += torch.bmm(weighs, (tile.v == math.inf).to(torch.float64))
        minus += torch.bmm(weighs, (tile.v == -math.inf).to(torch.float64))
        undefined += torch.bmm(weighs, tile.v.isnan().to(torch.float64))
        undefined += torch.bmm(weightless, (~finite).to(torch.float64))
    out = acc / total
    out = torch.where(plus > 0, out + math.inf, out)
    out = torch.where(minus > 0, out - math.inf, out)
    out = torch.where(undefined > 0, math.nan, out)
    lse = torch.where(top == math.inf, math.inf, top + total.log())
    return out, lse.squeeze(-1)


def _scores(q: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The logits of a tile, -inf where the mask hides the pair, whatever the key."""
    scores = torch.bmm(q, tile.k.mT)
    if tile.hidden is not None:
        scores.masked_fill_(tile.hidden, -math.inf)
    return scores
