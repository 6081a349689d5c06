"""Attention by its formula, in float64, with all options and torch's own gradients: what the kernels are tested against."""

from __future__ import annotations

from typing import Any

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    q_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    kept: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float64; `kept` is the dropout mask. Differentiable in q, k, v, bias and sinks."""
    (batch, heads, q_len, head_dim), kv_len = q.shape, k.shape[2]
    group = heads // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    rows = torch.full((batch,), q_len) if q_lengths is None else q_lengths.long()
    keys = torch.full((batch,), kv_len) if kv_lengths is None else kv_lengths.long()
    rows, keys = rows[:, None, None, None], keys[:, None, None, None]
    shift = keys - rows if causal_alignment == "bottom-right" else torch.zeros_like(keys)
    i, j = torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]
    seen: Any = (i < rows) & (j < keys)
    left, right = (-1, -1) if window is None else window
    if causal:
        right = 0
    if left >= 0:
        seen = seen & (j >= i + shift - left)
    if right >= 0:
        seen = seen & (j <= i + shift + right)
    if mask is not None:
        seen = seen & mask
    seen = seen.expand(batch, heads, q_len, kv_len)
    scores = q @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.double()
    if alibi_slopes is not None:
        slopes = alibi_slopes.double().expand(batch, heads)[:, :, None, None]
        scores = scores - slopes * (i + shift - j).abs()
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        logit = sinks.double()[None, :, None, None].masked_fill(i >= rows, -torch.inf)
        scores = torch.cat([scores, logit.expand(batch, heads, q_len, 1)], dim=-1)
    some = (scores > -torch.inf).any(-1)
    # Rows that see nothing are cut out of the graph: their softmax would be 0 / 0.
    scores = torch.where(some[..., None], scores, 0.0)
    lse = torch.where(some, scores.logsumexp(-1), -torch.inf)
    weights = torch.where(some[..., None], scores.softmax(-1), 0.0)[..., :kv_len]
    if kept is not None:
        weights = weights * kept / (1 - dropout_p)
    return weights @ v, lse
