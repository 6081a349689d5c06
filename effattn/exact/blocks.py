"""Attention tile by tile: which tiles of queries and keys there are, and which pairs in them count.

Whatever needs one look at every (query, key) pair goes through here: the exact output, and any bound that
is a sum over the keys. Memory stays O(N d), since one tile of scores exists at a time.

A row block has the queries of some (batch, kv head) pairs. The query heads that share a kv head are stacked
to rows, so keys and values are used as they are, not copied for each head. All numbers come in float64.

    for rows in row_blocks(q, k, v, causal="bottom-right"):
        for tile in rows.tiles():
            scores = rows.q @ tile.k.mT                          # (pairs, rows, cols)
            if tile.hidden is not None:
                scores.masked_fill_(tile.hidden, -math.inf)
            ...
        rows.write(out, result)

Rows that see no key are in no block; `rows_without_keys` says which they are. Every other row sees key 0 in
its first tile: both causal masks show a prefix of the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from effattn.errors import RequestError

#: the masks, see `effattn.case`
CAUSAL = ("none", "bottom-right", "top-left")

#: scores in a tile: 2 MiB of float64, so that a tile and its exponentials stay in a core's cache
_TILE_SCORES = 1 << 18

#: keys in a tile
_TILE_KEYS = 512


def diagonal(q_len: int, kv_len: int, causal: str) -> int | None:
    """Query i sees the keys j <= i + diagonal; None where it sees all of them."""
    if causal == "none":
        return None
    return kv_len - q_len if causal == "bottom-right" else 0


def rows_without_keys(q_len: int, kv_len: int, causal: str) -> int:
    """How many rows see no key. They are the first ones, or all."""
    if kv_len == 0:
        return q_len
    shift = diagonal(q_len, kv_len, causal)
    return 0 if shift is None else min(q_len, max(0, -shift))


@lru_cache(maxsize=16)
def _staircase(rows: int, cols: int, offset: int, group: int, device: torch.device) -> torch.Tensor:
    """The mask j > i + offset, for each of `group` stacked heads. All tiles on a diagonal have the same."""
    hidden = torch.ones((rows, cols), dtype=torch.bool, device=device).triu_(offset + 1)
    return hidden.repeat(group, 1) if group > 1 else hidden


class Tile(NamedTuple):
    """Some keys, and the values that go with them."""

    #: (pairs, cols, head_dim) float64
    k: torch.Tensor
    #: (pairs, cols, v_dim) float64
    v: torch.Tensor
    #: (rows, cols), True where the row doesn't see the key; None where every row sees every key. Shared
    #: with other tiles, so it must not be written to.
    hidden: torch.Tensor | None
    #: the keys' positions
    keys: slice
    #: what its user made of k and v alone and wants to find again: the tile of the same keys in the next block of rows has it
    made: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A block of rows: the same stretch of queries for every query head of some (batch, kv head) pairs.

    Row r of pair p is query head `r // n` of the pair's kv head, query `queries.start + r % n`, where n is
    the number of queries.
    """

    #: (pairs, rows, head_dim) float64
    q: torch.Tensor
    queries: slice
    _k: torch.Tensor
    _v: torch.Tensor
    _batch: slice
    _kv_heads: slice
    _group: int
    _shift: int | None
    _cols: int
    #: (first key, end) -> k, v and `made` of that tile; None where no other block has the same pairs
    _kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor, dict[str, Any]]] | None

    @property
    def _heads(self) -> slice:
        return slice(self._kv_heads.start * self._group, self._kv_heads.stop * self._group)

    @property
    def v_dim(self) -> int:
        """The length of a row of v."""
        return self._v.shape[3]

    def tiles(self) -> Iterator[Tile]:
        """The tiles of keys that at least one of the rows sees, from key 0 upwards."""
        kv_len = self._k.shape[2]
        first, last = self.queries.start, self.queries.stop - 1
        seen = kv_len if self._shift is None else min(kv_len, last + self._shift + 1)
        for start in range(0, seen, self._cols):
            keys = slice(start, min(start + self._cols, seen))
            hidden = None
            if self._shift is not None and keys.stop - 1 > first + self._shift:
                offset = first + self._shift - keys.start
                hidden = _staircase(
                    last + 1 - first, keys.stop - keys.start, offset, self._group, self.q.device
                )
            k, v, made = self._of(keys)
            yield Tile(k, v, hidden, keys, made)

    def _of(self, keys: slice) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        place = (keys.start, keys.stop)
        if self._kept is not None and place in self._kept:
            return self._kept[place]
        found = (self._pairs(self._k, keys), self._pairs(self._v, keys), {})
        if self._kept is not None:
            self._kept[place] = found
        return found

    def _pairs(self, x: torch.Tensor, keys: slice) -> torch.Tensor:
        x = _cut(x, self._batch, self._kv_heads, keys).double()
        return x.reshape(-1, x.shape[2], x.shape[3])

    def read(self, source: torch.Tensor) -> torch.Tensor:
        """This block's part of (batch, heads, q_len) or (batch, heads, q_len, n), as (pairs, rows[, n])."""
        part = _cut(source, self._batch, self._heads, self.queries)
        return part.reshape(*self.q.shape[:2], *source.shape[3:])

    def write(self, target: torch.Tensor, values: torch.Tensor) -> None:
        """Puts (pairs, rows[, n]) into this block's part of (batch, heads, q_len[, n])."""
        part = _cut(target, self._batch, self._heads, self.queries)
        part.copy_(values.reshape(part.shape))


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: str) -> None:
    """RequestError unless q (b, h, m, d), k (b, g, n, d) and v (b, g, n, e) go together, h a multiple of"
    " g."""
    if not q.ndim == k.ndim == v.ndim == 4:
        problem = "all three need four axes"
    elif k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        problem = "sizes of one name must agree"
    elif k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        problem = "heads must be a multiple of kv_heads"
    elif not q.device == k.device == v.device:
        raise RequestError(f"q on {q.device}, k on {k.device}, v on {v.device}: expected all on one device.")
    elif causal not in CAUSAL:
        raise RequestError(f"causal {causal!r}: expected one of {', '.join(CAUSAL)}.")
    else:
        return
    given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
    raise RequestError(
        f"{given}: expected q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim) and"
        f" v (batch, kv_heads, kv_len, v_dim); {problem}."
    )


def _cut(x: torch.Tensor, *parts: slice) -> torch.Tensor:
    """x[parts], without the price of a view along axes that are taken whole."""
    for axis, part in enumerate(parts):
        if part.stop - part.start < x.shape[axis]:
            x = x.narrow(axis, part.start, part.stop - part.start)
    return x


def row_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: str,
    block: tuple[int, int] | None = None,
) -> Iterator[Rows]:
    """The rows that see a key, in blocks.

    q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len,
    v_dim), any dtype and strides, one device. `block` is the largest number of queries and of keys in a tile;
    None chooses one by the cache, and takes small problems in a single tile. RequestError, at once, for
    shapes that don't go together.
    """
    check_shapes(q, k, v, causal)
    if block is not None and min(block) < 1:
        raise RequestError(f"block {tuple(block)!r}: expected at least one query and one key in a tile.")
    return _row_blocks(q, k, v, causal, block)


def _row_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: str, block: tuple[int, int] | None
) -> Iterator[Rows]:
    batch, heads, q_len, _ = q.shape
    kv_heads, kv_len = k.shape[1], k.shape[2]
    group = heads // kv_heads
    empty = rows_without_keys(q_len, kv_len, causal)
    if q_len == empty or batch == 0:
        return
    if block is None:
        cols = min(kv_len, _TILE_KEYS)
        rows = min(q_len - empty, max(1, _TILE_SCORES // (group * cols)))
    else:
        rows, cols = min(block[0], q_len - empty), min(block[1], kv_len)
    pairs = max(1, _TILE_SCORES // (group * rows * cols))
    # Whole batch entries where they fit, else some heads of one at a time.
    head_step = min(kv_heads, pairs)
    batch_step = max(1, pairs // kv_heads) if head_step == kv_heads else 1
    shift = diagonal(q_len, kv_len, causal)
    for b in range(0, batch, batch_step):
        in_batch = slice(b, min(b + batch_step, batch))
        for h in range(0, kv_heads, head_step):
            in_heads = slice(h, min(h + head_step, kv_heads))
            # K and V once more in float64: O(N d) for the pairs at hand.
            kept = {} if q_len - empty > rows else None
            for i in range(empty, q_len, rows):
                queries = slice(i, min(i + rows, q_len))
                heads_of = slice(in_heads.start * group, in_heads.stop * group)
                part = _cut(q, in_batch, heads_of, queries).double()
                stacked = part.reshape(-1, group * part.shape[2], part.shape[3])
                yield Rows(
                    q=stacked,
                    queries=queries,
                    _k=k,
                    _v=v,
                    _batch=in_batch,
                    _kv_heads=in_heads,
                    _group=group,
                    _shift=shift,
                    _cols=cols,
                    _kept=kept,
                )
