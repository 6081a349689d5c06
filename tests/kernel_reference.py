"""Attention by its formula, in float64, with torch's own gradients, and what a kernel's rounding may change of both."""

from __future__ import annotations

from typing import Any

import torch


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) in float64. Differentiable in q, k, v, bias and sinks; for the options see `weights`."""
    kept, p = options.get("kept"), options.get("dropout_p", 0.0)
    w, lse = weights(q, k, **options)
    if kept is not None:
        w = w * kept / (1 - p)
    return w @ v.double().repeat_interleave(q.shape[1] // v.shape[1], 1), lse


def weights(
    q: torch.Tensor,
    k: torch.Tensor,
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
    """(weights before dropout, lse) in float64; `kept` is the dropout mask."""
    (batch, heads, q_len, head_dim), kv_len = q.shape, k.shape[2]
    group = heads // k.shape[1]
    q, k = q.double(), k.double().repeat_interleave(group, 1)
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
    return torch.where(some[..., None], scores.softmax(-1), 0.0)[..., :kv_len], lse


def bounds(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """What out, lse and the gradients of q, k, v, bias and sinks may differ by, for each element.

    Of first order, from: a score's relative error e = (head_dim + 20) u32 (1 + its largest size), which moves a weight by
    2 e of itself; a rounding of weights, of ds and of out to the dtype (u); sums in float32. So with absolute values
    everywhere, c = 4 u + 8 e of the sum of what is added. lse moves by a score's absolute error.
    """
    dtype = q.dtype
    u32, u = 2.0**-24, {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}[dtype]
    scale = options.get("scale") or q.shape[-1] ** -0.5
    size = float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) * abs(scale)
    for name, times in (("bias", 1), ("alibi_slopes", k.shape[2] + q.shape[2]), ("sinks", 1)):
        if options.get(name) is not None:
            size += times * float(options[name].detach().abs().max())
    e = (q.shape[-1] + 20) * u32 * (1 + size)
    c = 4 * u + 8 * e
    group = q.shape[1] // k.shape[1]
    w, lse = (x.detach() for x in weights(q, k, **options))
    q, k, v, g = (x.detach().double().abs() for x in (q, k, v, d_out))
    spread_k, spread_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    m = torch.ones_like(w) if options.get("kept") is None else options["kept"] / (1 - options["dropout_p"])
    out = (w * m) @ spread_v
    delta = (g * out).sum(-1, keepdim=True) + d_lse.double().abs()[..., None]
    ds = w * (m * (g @ spread_v.transpose(-1, -2)) + delta)
    share = torch.exp(torch.where(lse > -torch.inf, -lse, -torch.inf))
    found = {
        "out": c * out,
        "lse": torch.full_like(lse, e),
        "q": c * abs(scale) * ds @ spread_k,
        "k": c * abs(scale) * _per_key_head(ds.transpose(-1, -2) @ q, group),
        "v": c * _per_key_head((w * m).transpose(-1, -2) @ g, group),
    }
    if options.get("bias") is not None:
        found["bias"] = c * ds.sum_to_size(options["bias"].shape)
    if options.get("sinks") is not None:
        part = torch.exp(options["sinks"].detach().double())[:, None] * share * delta[..., 0]
        found["sinks"] = c * part.sum((0, 2))
    # Weights and ds of the 16-bit formats are also rounded by half of the smallest number that there is.
    least = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}[dtype]
    most = least / (1 - options.get("dropout_p", 0.0))
    found["out"] += most * (1 + spread_v.sum(-2, keepdim=True))
    found["q"] += most * (1 + abs(scale) * spread_k.sum(-2, keepdim=True))
    found["k"] += most * (1 + abs(scale) * _per_key_head(q.sum(-2, keepdim=True), group))
    found["v"] += most * (1 + _per_key_head(g.sum(-2, keepdim=True), group))
    return {name: bound + 2.0**-126 for name, bound in found.items()}


def _per_key_head(x: torch.Tensor, group: int) -> torch.Tensor:
    batch, heads, length, dim = x.shape
    return x.view(batch, heads // group, group, length, dim).sum(2)
