"""Exact attention with every option, and its gradients, in float64 with O(N d) memory.

With w the weights, r the factors of dropout (0 or 1 / (1 - p), or 1), g = dO the upstream gradient of the output and
c that of the log-sum-exp:

    out_i = sum_j w_ij r_ij v_j                      dV_j = sum_i w_ij r_ij g_i
    dP_ij = r_ij g_i.v_j                             delta_i = g_i.out_i = sum_j w_ij dP_ij
    dS_ij = w_ij (dP_ij - delta_i + c_i)             the gradient of the score, so that of the bias
    dQ_i  = scale sum_j dS_ij slope_ij k_j           dK_j = scale sum_i dS_ij slope_ij q_i

slope is the derivative of the softcap. The sink's logit has the gradient sum_i w_sink,i (c_i - delta_i). Gradients of
what is shared (K and V by the heads of a group, bias along its axes of length 1) are summed.

Hidden pairs have no influence, NaN and infinities included. A row that sees a value that is not finite has gradients
NaN, and so have the keys that it sees.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from effattn.exact.forward import Exact
from effattn.exact.scores import Block, Options, score_blocks


class Gradients(NamedTuple):
    """Float64; None for what there is not."""

    #: shapes of q, k and v
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    #: shape of the bias
    bias: torch.Tensor | None
    #: (heads,)
    sinks: torch.Tensor | None

    def present(self) -> dict[str, torch.Tensor]:
        """name -> gradient, of those that there are."""
        return {name: x for name, x in self._asdict().items() if x is not None}


@torch.no_grad()
def attention_with(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, *, most_scores: int | None = None
) -> Exact:
    """Output and log-sum-exp with any options, by the rules at the head of `effattn.exact.forward`.

    A row that sees no key has output 0 and log-sum-exp -inf, or that of the sink alone; padding has 0 and -inf.
    """
    out = q.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.float64)
    lse = q.new_empty(q.shape[:3], dtype=torch.float64)
    for block in score_blocks(q, k, v, options, most_scores=most_scores):
        top = _top(block)
        base = torch.where(top == -math.inf, 0.0, top)
        p = torch.exp(block.scores - base)
        total = p.sum(-1, keepdim=True)
        if block.sink is not None:
            total = total + torch.exp(block.sink - base)
        weights = block.weighted(p)
        finite = block.v.isfinite()
        o = torch.bmm(weights, torch.where(finite, block.v, 0.0)) / torch.where(total == 0.0, 1.0, total)
        if not bool(finite.all()):
            o = _infinite(o, block, finite)
        s = base + total.log()
        if block.rows is not None:
            s = s.masked_fill(~block.rows, -math.inf)
            o = o.masked_fill(~block.rows, 0.0)
        block.write(out, o)
        block.write(lse, s)
    return Exact(out, lse)


def _top(block: Block) -> torch.Tensor:
    """The largest logit of each row, that of the sink included, (P, m, 1)."""
    if block.scores.shape[-1] == 0:
        top = block.scores.new_full((*block.scores.shape[:2], 1), -math.inf)
    else:
        top = block.scores.amax(-1, keepdim=True)
    return top if block.sink is None else torch.maximum(top, block.sink)


def _infinite(out: torch.Tensor, block: Block, finite: torch.Tensor) -> torch.Tensor:
    """Values that are not finite show in the rows that give them a weight, as IEEE sums have it."""
    weighs = (block.visible & (block.scores != -math.inf)).double()
    if block.factor is not None:
        weighs = weighs * (block.factor > 0.0)
    plus, minus, undefined = (
        torch.bmm(weighs, x.double()) > 0.0
        for x in (block.v == math.inf, block.v == -math.inf, block.v.isnan())
    )
    out = torch.where(plus, out + math.inf, out)
    out = torch.where(minus, out - math.inf, out)
    return torch.where(undefined, math.nan, out)


class HeadSums:
    """Sums over the queries of each head, (batch * heads, n, c), and over the axes that a bias does not have."""

    def __init__(self, q: torch.Tensor, options: Options) -> None:
        self._pairs, self._options = q.shape[0] * q.shape[1], options
        self._heads = q.shape[1]
        self._shape = tuple(q.shape[:3])
        self.per_key: dict[str, torch.Tensor] = {}
        self.bias: dict[str, torch.Tensor] = {}

    def add(self, name: str, block: Block, values: torch.Tensor) -> None:
        """Adds (P, n, c), which belongs to the keys of the block's heads."""
        if name not in self.per_key:
            self.per_key[name] = values.new_zeros((self._pairs, *values.shape[1:]))
        self.per_key[name][block.pairs] += values

    def add_bias(self, name: str, block: Block, values: torch.Tensor) -> None:
        """Adds (P, m, n) over the axes along which the bias is constant."""
        bias = self._options.bias
        assert bias is not None
        if name not in self.bias:
            self.bias[name] = torch.zeros(bias.shape, dtype=torch.float64, device=values.device)
        if bias.shape[2] == 1 and self._shape[2] != 1:
            values = values.sum(1, keepdim=True)
        if bias.shape[3] == 1:
            values = values.sum(2, keepdim=True)
        index = torch.arange(block.pairs.start, block.pairs.stop, device=values.device)
        b = index // self._heads if bias.shape[0] > 1 else index * 0
        h = index % self._heads if bias.shape[1] > 1 else index * 0
        target = self.bias[name]
        if bias.shape[2] > 1:
            target = target[:, :, block.queries]
        target.index_put_((b, h), values, accumulate=True)

    def grouped(self, name: str, batch: int, kv_heads: int) -> torch.Tensor:
        """The sum over the query heads of each KV head: (batch, kv_heads, n, c)."""
        x = self.per_key[name]
        return x.unflatten(0, (batch, kv_heads, -1)).sum(2)


@torch.no_grad()
def gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    options: Options,
    *,
    exact: Exact,
    d_lse: torch.Tensor | None = None,
    most_scores: int | None = None,
) -> Gradients:
    """Exact gradients; `exact` is the exact attention of the same inputs and options.

    d_out (batch, heads, q_len, v_dim), d_lse (batch, heads, q_len), any dtype. RequestError for shapes that don't go
    together.
    """
    scale = options.scale_for(q.shape[3])
    dq = q.new_zeros(q.shape, dtype=torch.float64)
    sums = HeadSums(q, options)
    sinks = None if options.sinks is None else torch.zeros(q.shape[:2], dtype=torch.float64, device=q.device)
    sums.per_key["k"] = q.new_zeros((q.shape[0] * q.shape[1], k.shape[2], k.shape[3]), dtype=torch.float64)
    sums.per_key["v"] = q.new_zeros((q.shape[0] * q.shape[1], v.shape[2], v.shape[3]), dtype=torch.float64)
    for block in score_blocks(q, k, v, options, most_scores=most_scores):
        lse, g = block.read(exact.lse), block.read(d_out).double()
        w, w_sink = block.normalised(lse)
        d_s, _ = score_gradient(block, w, g, None if d_lse is None else block.read(d_lse).double())
        if options.bias is not None:
            sums.add_bias("bias", block, d_s)
        if sinks is not None:
            common = -(g * block.read(exact.out)).sum(-1, keepdim=True)
            if d_lse is not None:
                common = common + block.read(d_lse).double()
            sinks.view(-1)[block.pairs] += (w_sink * common).sum((1, 2))
        d_t = d_s if block.slope is None else d_s * block.slope
        d_t = d_t * scale
        block.write(dq, torch.bmm(d_t, _seen(block.k)))
        sums.add("k", block, torch.bmm(d_t.mT, _seen(block.q)))
        sums.add("v", block, torch.bmm(block.weighted(w).mT, g))
    return Gradients(
        q=dq,
        k=sums.grouped("k", k.shape[0], k.shape[1]),
        v=sums.grouped("v", v.shape[0], v.shape[1]),
        bias=None
        if options.bias is None
        else sums.bias.get("bias", torch.zeros(options.bias.shape, dtype=torch.float64)),
        sinks=None if sinks is None else sinks.sum(0),
    )


def _seen(x: torch.Tensor) -> torch.Tensor:
    """Zeros for what is not finite: 0 times NaN is NaN. What such a query sees, or who sees such a key, is NaN anyway."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def score_gradient(
    block: Block, w: torch.Tensor, g: torch.Tensor, d_lse: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dS, dP - delta + d_lse) of a block, (P, m, n): what is hidden is 0. w the weights, g = dO."""
    d_p = torch.bmm(g, _seen(block.v).mT)
    bad = ~block.v.isfinite().all(-1)[:, None]
    if bool(bad.any()):
        d_p = torch.where(bad & block.visible, math.nan, d_p)
    d_p = block.weighted(d_p)
    difference = d_p - (w * d_p.masked_fill(~block.visible, 0.0)).sum(-1, keepdim=True)
    if d_lse is not None:
        difference = difference + d_lse
    difference = difference.masked_fill(~block.visible, 0.0)
    return w * difference, difference
