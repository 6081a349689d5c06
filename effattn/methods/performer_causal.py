"""Causal linear attention by blocked prefix sums: O(N) memory, and a backward that computes anew.

For every block of rows, with the state S = sum over earlier keys of phi(k) [v, 1]^T:

    within the block   (phi(q) phi(k)^T masked) [v, 1]
    before the block   phi(q) S

The features of one block exist at a time. The forward keeps the state at each border; the backward walks the blocks
from the last to the first, computes each again from its state and differentiates it. Published kernels walk back by
subtracting from the final state instead, which cancels: median relative error 1e-3, worst 5 in float32.

Scale. Key j has the exponent e_j (`performer_features.Features`). Row i works relative to the largest e_j with
j <= i, and the state relative to the largest so far: every factor is at most 1, and no row knows a later key.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from effattn.methods.inputs import without_autocast
from effattn.methods.performer_features import feature_map


class _Options(NamedTuple):
    features: str
    a: float | None
    stabiliser: float | None
    block: int
    shift: int  #: query i sees the keys j <= i + shift


def causal_linear_attention(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    omega: torch.Tensor,
    *,
    features: str,
    a: float | None,
    stabiliser: float | None,
    visible: torch.Tensor | None,
    block: int,
    before: bool,
) -> torch.Tensor:
    """out (batch, kv_heads, group, q_len, v_dim) for scaled x (batch, kv_heads, group, q_len, head_dim), y and values
    (batch, kv_heads, 1, kv_len, ...), omega (..., m, head_dim), visible (batch, 1, 1, kv_len) or None.

    Query i sees the keys j <= i + kv_len - q_len if `before`, else j <= i. A row that sees no key has output 0.
    """
    shift = y.shape[-2] - x.shape[-2] if before else 0
    options = _Options(features, a, stabiliser, block, shift)
    return _Causal.apply(x, y, values, omega, visible, options)  # pyright: ignore[reportReturnType]


class _State(NamedTuple):
    """What earlier keys leave."""

    sums: torch.Tensor  #: (batch, kv_heads, 1, features, v_dim + 1), of phi(k) [v, 1]^T exp(-top)
    top: torch.Tensor  #: (batch, kv_heads, 1), the largest exponent so far, -inf before the first visible key


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor,
        values: torch.Tensor,
        omega: torch.Tensor,
        visible: torch.Tensor | None,
        options: _Options,
    ) -> torch.Tensor:
        out = x.new_zeros((*x.shape[:-1], values.shape[-1]))
        state = _start(y, values, omega, options)
        states = []
        keep = any(ctx.needs_input_grad[:4])
        for queries, keys in _blocks(x.shape[-2], y.shape[-2], options):
            if keep:
                states.append(state)
            q, k, v, seen = _cut(x, y, values, visible, queries, keys)
            rows, state = _step(q, k, v, seen, omega, state, queries, keys, options)
            out[..., queries, :] = rows
        ctx.save_for_backward(x, y, values, omega, visible)
        ctx.states, ctx.options = states, options
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # It computes anew, and may be called where autocast is on.
        with without_autocast(d_out.device):
            return _backward(ctx, d_out)


def _backward(ctx: Any, d_out: torch.Tensor) -> Any:
    x, y, values, omega, visible = ctx.saved_tensors
    options = ctx.options
    needed = ctx.needs_input_grad[:4]
    wanted = [
        torch.zeros_like(t) if need else None for t, need in zip((x, y, values, omega), needed, strict=True)
    ]
    d_sums = torch.zeros_like(_start(y, values, omega, options).sums)
    ranges = list(_blocks(x.shape[-2], y.shape[-2], options))
    for (queries, keys), state in zip(reversed(ranges), reversed(ctx.states), strict=True):
        q, k, v, seen = _cut(x, y, values, visible, queries, keys)
        leaves = [t.detach().requires_grad_() for t in (q, k, v, omega, state.sums)]
        q, k, v, projections, sums = leaves
        with torch.enable_grad():
            rows, after = _step(q, k, v, seen, projections, _State(sums, state.top), queries, keys, options)
        got = torch.autograd.grad(
            [rows, after.sums], leaves, [d_out[..., queries, :], d_sums], allow_unused=True
        )
        for target, part, where in zip(wanted, got[:4], (queries, keys, keys, None), strict=True):
            if target is not None and part is not None:
                (target if where is None else target[..., where, :]).add_(part)
        d_sums = torch.zeros_like(d_sums) if got[4] is None else got[4]
    return (*wanted, None, None)


def _blocks(q_len: int, kv_len: int, options: _Options) -> list[tuple[slice, slice]]:
    """Which queries and keys a step takes. Positions are those of the keys; query i has the position i + shift."""
    end = max(kv_len, q_len + options.shift)
    first = min(0, options.shift)
    ranges = []
    for start in range(first, end, options.block):
        stop = min(start + options.block, end)
        queries = slice(max(start - options.shift, 0), min(max(stop - options.shift, 0), q_len))
        keys = slice(min(max(start, 0), kv_len), min(max(stop, 0), kv_len))
        ranges.append((queries, keys))
    return ranges


def _cut(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor | None,
    queries: slice,
    keys: slice,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    seen = None if visible is None else visible[..., keys]
    return x[..., queries, :], y[..., keys, :], values[..., keys, :], seen


def _start(y: torch.Tensor, values: torch.Tensor, omega: torch.Tensor, options: _Options) -> _State:
    features = omega.shape[-2] * (2 if options.features in ("trigonometric", "hyperbolic") else 1)
    return _State(
        y.new_zeros((*y.shape[:3], features, values.shape[-1] + 1)), y.new_full(y.shape[:3], -torch.inf)
    )


def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor | None,
    omega: torch.Tensor,
    state: _State,
    queries: slice,
    keys: slice,
    options: _Options,
) -> tuple[torch.Tensor, _State]:
    """The rows of one block, and the state after it."""
    kind = {"a": options.a, "stabiliser": options.stabiliser}
    fk = feature_map(k, omega, options.features, **kind)
    exponent = fk.exponent if seen is None else fk.exponent.masked_fill(~seen, -torch.inf)
    known = torch.cat([state.top[..., None], exponent.detach()], -1)
    running = known.cummax(-1).values  # [..., j]: the largest exponent before key j of the block
    # Before the first visible key there is no maximum, and -inf - -inf is NaN: take 0.
    base = running.masked_fill(running == -torch.inf, 0.0)
    with_one = torch.cat([v, torch.ones_like(v[..., :1])], -1)

    fq = feature_map(q, omega, options.features, **kind).mantissa
    # Row i of the block sees so many of its keys.
    rows = torch.arange(queries.start, queries.stop, device=q.device) + (options.shift + 1 - keys.start)
    count = rows.clamp(0, keys.stop - keys.start)
    own = base[..., count]  # (..., rows)
    hidden = torch.arange(keys.stop - keys.start, device=q.device) >= count[:, None]
    decay = (exponent[..., None, :] - own[..., None]).masked_fill(hidden, -torch.inf).exp()
    # A factor that cancels, a power of two: sums over keys times features would overflow fp16.
    shrink = 2.0 ** -math.ceil(math.log2(fq.shape[-1]))
    sums = ((fq @ fk.mantissa.mT) * (decay * shrink)) @ with_one
    sums = sums + (state.top[..., None] - own).exp()[..., None] * (fq @ (state.sums * shrink))
    nothing = running[..., count] == -torch.inf
    out = (sums[..., :-1] / sums[..., -1:].masked_fill(nothing[..., None], 1.0)).masked_fill(
        nothing[..., None], 0.0
    )

    top, base = running[..., -1], base[..., -1:]
    added = (fk.mantissa * (exponent - base).exp()[..., None]).mT @ with_one
    kept = (state.top[..., None] - base).exp()[..., None]
    return out, _State(state.sums * kept + added, top)
