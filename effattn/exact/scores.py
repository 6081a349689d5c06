"""Scores with every option: softcap, bias, ALiBi, window, lengths, mask, sinks and dropout, block by block.

A block has some queries of some heads against all keys, so its rows are whole: nothing is rescaled, and whatever needs
one look at every pair (the output, the gradients, bounds) is plain algebra on matrices. Blocks are cut so that memory
stays O(N d), whatever the number of queries: a row of scores is as long as a column of K.

    score = softcap(scale q.k) + bias - slope |i + shift - j|          of query i and key j, hidden ones -inf

`effattn.exact.blocks` does the same for plain problems, with tiles of keys and without copies for each head; it is
quicker there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from effattn.errors import RequestError
from effattn.exact.blocks import check_shapes

if TYPE_CHECKING:
    from effattn.case import Case, Inputs

#: scores in a block: 2 MiB of float64
_BLOCK_SCORES = 1 << 18


@dataclass(frozen=True, kw_only=True, eq=False)
class Options:
    """What attention is asked for besides q, k and v; `effattn.case` has the meaning, `effattn.options` the shapes."""

    causal: str = "none"
    #: None means head_dim ** -0.5
    scale: float | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    q_lengths: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    #: (batch, heads, q_len, kv_len) bool: the weights that dropout keeps, divided by 1 - dropout
    keep: torch.Tensor | None = None
    dropout: float = 0.0

    @classmethod
    def of(cls, case: Case, inputs: Inputs, *, keep: torch.Tensor | None = None) -> Options:
        """Those of a case; `keep` is what the judged method's dropout keeps."""
        extras = {name: x for name, x in inputs.extras.present().items() if name not in ("d_out", "d_lse")}
        return cls(
            causal=case.causal,
            scale=case.softmax_scale,
            window=case.window,
            softcap=case.softcap,
            keep=keep,
            dropout=case.dropout,
            **extras,
        )

    @property
    def plain(self) -> bool:
        """Whether nothing but the causal mask and the scale is asked for."""
        others = (self.window, self.softcap, self.alibi_slopes, self.bias, self.mask, self.sinks, self.keep)
        return all(x is None for x in (*others, self.q_lengths, self.kv_lengths))

    def scale_for(self, head_dim: int) -> float:
        """The scale in effect."""
        return 1.0 / math.sqrt(head_dim) if self.scale is None else self.scale


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some queries of some heads against all keys; P (batch, head) pairs, m queries, n keys, all float64."""

    #: the pairs' places among batch * heads
    pairs: slice
    queries: slice
    #: (P, m, head_dim), (P, n, head_dim), (P, n, v_dim)
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    #: (P, m, n): scale q.k, 0 for hidden pairs; the score, -inf where the pair is hidden; whether it is not
    product: torch.Tensor
    scores: torch.Tensor
    visible: torch.Tensor
    #: (P, m, n): derivative of the score by scale q.k; None for 1
    slope: torch.Tensor | None
    #: (P, m, n): |bias| + |ALiBi|; None for 0
    added: torch.Tensor | None
    #: (P, m, n): 0 for dropped weights, 1 / (1 - dropout) for others; None for 1
    factor: torch.Tensor | None
    #: (P, 1, 1): the sink's logit; None for none
    sink: torch.Tensor | None
    #: (P, m, 1) bool: rows that are no padding; None for all
    rows: torch.Tensor | None

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """This block's part of (batch, heads, q_len[, c]) as (P, m, c), c = 1 for those without columns."""
        part = x.flatten(0, 1)[self.pairs, self.queries]
        return part if part.dim() == 3 else part.unsqueeze(-1)

    def write(self, x: torch.Tensor, values: torch.Tensor) -> None:
        """Puts (P, m, c) into a contiguous (batch, heads, q_len[, c])."""
        x.flatten(0, 1)[self.pairs, self.queries] = values.squeeze(-1) if x.dim() == 3 else values

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights after dropout."""
        return weights if self.factor is None else weights * self.factor

    def weights(self, lse: torch.Tensor) -> torch.Tensor:
        """exp(score - lse) for lse (P, m, 1); 0 for hidden pairs and where a row has no normaliser."""
        return torch.exp(self.scores - torch.where(lse == -math.inf, 0.0, lse)).masked_fill_(
            ~self.visible, 0.0
        )

    def normalised(self, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the keys and of the sink that sum to 1 to their last digits.

        The rounding of lse is common to a row. Without it the mean of dP is one, and equal weights are 1/n.
        """
        w, sink = self.weights(lse), self.sink_weight(lse)
        total = w.sum(-1, keepdim=True) + sink
        total = torch.where(total > 0.0, total, 1.0)
        return w / total, sink / total

    def sink_weight(self, lse: torch.Tensor) -> torch.Tensor:
        """That of the sink, (P, m, 1)."""
        if self.sink is None:
            return torch.zeros_like(lse)
        weight = torch.exp(self.sink - torch.where(lse == -math.inf, math.inf, lse))
        return weight if self.rows is None else weight.masked_fill(~self.rows, 0.0)


def score_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, *, most_scores: int | None = None
) -> Iterator[Block]:
    """All rows, in blocks of at most `most_scores` scores, at least one row.

    q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_dim), any
    dtype and strides, one device. RequestError, at once, for shapes that don't go together.
    """
    check_shapes(q, k, v, options.causal)
    _check_options(q, k, options)
    return _score_blocks(q, k, v, options, _BLOCK_SCORES if most_scores is None else most_scores)


def _score_blocks(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, most_scores: int
) -> Iterator[Block]:
    batch, heads, q_len, _ = q.shape
    kv_len, group = k.shape[2], heads // k.shape[1]
    pairs, scale = batch * heads, options.scale_for(q.shape[3])
    m = max(1, min(q_len, most_scores // max(1, kv_len)))
    step = max(1, min(pairs, most_scores // max(1, m * kv_len)))
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    for first in range(0, pairs, step):
        at = slice(first, min(first + step, pairs))
        index = torch.arange(at.start, at.stop, device=q.device)
        of_kv = index // group
        keys, values = k[of_kv].double(), v[of_kv].double()
        b, h = index // heads, index % heads
        for i in range(0, q_len, m):
            queries = slice(i, min(i + m, q_len))
            rows = q[at, queries].double()
            yield _block(rows, keys, values, at, queries, b, h, (q_len, kv_len), scale, options)


def _block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pairs: slice, queries: slice, b: torch.Tensor, h: torch.Tensor,
    lengths: tuple[int, int], scale: float, options: Options,
) -> Block:  # fmt: skip
    product = torch.bmm(q * scale, k.mT)
    scores, slope, added = product, None, None
    if options.softcap is not None:
        capped = torch.tanh(product / options.softcap)
        scores, slope = options.softcap * capped, 1.0 - capped.square()

    def part(x: torch.Tensor) -> torch.Tensor:
        """Of four axes that broadcast to all pairs: (P, 1 or m, 1 or n)."""
        x = x.expand(x.shape[0] if x.shape[0] == 1 else -1, -1, -1, -1)
        x = x[b if x.shape[0] > 1 else b * 0, h if x.shape[1] > 1 else h * 0]
        return x[:, queries] if x.shape[1] > 1 else x

    i = torch.arange(queries.start, queries.stop, device=q.device)[:, None]
    j = torch.arange(lengths[1], device=q.device)
    q_lengths, kv_lengths = (
        None if x is None else x.to(torch.int64)[b][:, None, None]
        for x in (options.q_lengths, options.kv_lengths)
    )
    if options.causal == "top-left":
        place = i[None]
    else:
        place = i + (
            (lengths[1] if kv_lengths is None else kv_lengths)
            - (lengths[0] if q_lengths is None else q_lengths)
        )
        place = place if place.dim() == 3 else place[None]
    visible = torch.ones((1, len(i), lengths[1]), dtype=torch.bool, device=q.device)
    if options.causal != "none":
        visible = visible & (j <= place)
    if options.window is not None:
        left, right = options.window
        if left >= 0:
            visible = visible & (j >= place - left)
        if right >= 0:
            visible = visible & (j <= place + right)
    if kv_lengths is not None:
        visible = visible & (j < kv_lengths)
    rows = None if q_lengths is None else (i < q_lengths)
    if rows is not None:
        visible = visible & rows
    if options.mask is not None:
        visible = visible & part(options.mask)
    if options.bias is not None:
        bias = part(options.bias).double()
        # A bias of -inf is weight 0, whatever the key: as if it were hidden.
        visible = visible & (bias != -math.inf)
        bias = torch.where(bias == -math.inf, 0.0, bias)
        scores, added = scores + bias, bias.abs()
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.double()
        slopes = slopes[b, h] if slopes.dim() == 2 else slopes[h]
        alibi = slopes[:, None, None] * (place - j).abs()
        scores = scores - alibi
        added = alibi.abs() if added is None else added + alibi.abs()
    visible = visible.expand_as(product)
    factor = None
    if options.keep is not None:
        factor = part(options.keep).double() / (1.0 - options.dropout)
    return Block(
        pairs=pairs,
        queries=queries,
        q=q,
        k=k,
        v=v,
        product=product.masked_fill(~visible, 0.0),
        scores=torch.where(visible, scores, -math.inf),
        visible=visible,
        slope=None if slope is None else slope.masked_fill(~visible, 0.0),
        added=None if added is None else added.expand_as(product),
        factor=factor,
        sink=None if options.sinks is None else options.sinks.double()[h][:, None, None],
        rows=rows,
    )


def _check_options(q: torch.Tensor, k: torch.Tensor, options: Options) -> None:
    batch, heads, q_len, kv_len = (*q.shape[:3], k.shape[2])
    full = (batch, heads, q_len, kv_len)

    def refuse(name: str, x: torch.Tensor, expected: str) -> None:
        raise RequestError(f"{name} {tuple(x.shape)}: expected {expected} for scores {full}.")

    for name in ("bias", "mask", "keep"):
        x: Any = getattr(options, name)
        if x is not None and (
            x.dim() != 4 or any(n not in (1, m) for n, m in zip(x.shape, full, strict=True))
        ):
            refuse(name, x, "four axes that broadcast")
    slopes, sinks = options.alibi_slopes, options.sinks
    if slopes is not None and tuple(slopes.shape) not in ((heads,), (batch, heads)):
        refuse("alibi_slopes", slopes, "(heads,) or (batch, heads)")
    if sinks is not None and tuple(sinks.shape) != (heads,):
        refuse("sinks", sinks, "(heads,)")
    for name in ("q_lengths", "kv_lengths"):
        x = getattr(options, name)
        if x is not None and tuple(x.shape) != (batch,):
            refuse(name, x, "(batch,)")
