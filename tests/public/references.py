"""What the public kernels compute, as short formulas in the dtype of their arguments (float64 in the tests)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_mask(q_len: int, kv_len: int) -> Tensor:
    """True where a query may not look: the last query sees all keys."""
    return torch.ones(q_len, kv_len, dtype=torch.bool).triu(1 + kv_len - q_len)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """(batch, heads, length, dim); key heads are repeated for groups of query heads."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias
    if causal:
        s = s.masked_fill(causal_mask(q.shape[2], k.shape[2]), -torch.inf)
    return s.softmax(-1) @ v


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    bonus: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Linear attention, step by step: S_t = exp(decay_t) S_{t-1} + k_t v_t^T, o_t = scale q_t S_t. All (batch, time, heads, dim).

    `decay` per head (batch, time, heads) or per key dimension. `beta` (batch, time, heads): the delta rule, which writes
    beta_t (v_t - k_t S) instead of v_t. `bonus` (heads, dim): o_t = q_t (S_{t-1} + bonus k_t v_t^T), as RWKV-6.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    state = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    out = []
    for t in range(q.shape[1]):
        qt, kt, vt = q[:, t] * scale, k[:, t], v[:, t]
        if bonus is not None:
            out.append(torch.einsum("bhk,bhkv->bhv", qt, state + (bonus * kt)[..., None] * vt[..., None, :]))
        if decay is not None:
            keep = decay[:, t].exp()
            state = state * (keep[..., None, None] if keep.dim() == 2 else keep[..., None])
        if beta is not None:
            vt = beta[:, t][..., None] * (vt - torch.einsum("bhk,bhkv->bhv", kt, state))
        state = state + kt[..., None] * vt[..., None, :]
        if bonus is None:
            out.append(torch.einsum("bhk,bhkv->bhv", qt, state))
    return torch.stack(out, 1)


def gated_recurrence(x: Tensor, g: Tensor) -> Tensor:
    """HGRN: h_t = exp(g_t) h_{t-1} + x_t over (batch, time, dim)."""
    state, out = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = state * g[:, t].exp() + x[:, t]
        out.append(state)
    return torch.stack(out, 1)


def polynomial_attention(
    q: Tensor, k: Tensor, v: Tensor, *, constant: float, linear: float, square: float, eps: float
) -> Tensor:
    """Weights constant + linear s + square s^2 of the scores, causal, normalised; (batch, time, heads, dim)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    a = (constant + linear * s + square * s * s).tril()
    return (a @ v / (a.sum(-1, keepdim=True) + eps)).transpose(1, 2)


def forgetting_attention(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Causal softmax attention with scores lowered by what the gates between key and query forget; (batch, time, heads, dim)."""
    c = g.cumsum(1).transpose(1, 2)
    bias = c[..., :, None] - c[..., None, :]
    return softmax_attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, bias=bias).transpose(1, 2)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    y = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return y if weight is None else y * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of halves."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def angles(length: int, dim: int) -> Tensor:
    """Angles of the rotary embedding (length, dim / 2)."""
    return torch.arange(length, dtype=torch.float64)[:, None] * 10000 ** (
        -torch.arange(dim // 2, dtype=torch.float64) * 2 / dim
    )


def sparsemax(x: Tensor) -> Tensor:
    """The projection onto the simplex (Martins and Astudillo 2016)."""
    ordered = x.sort(-1, descending=True).values
    total = ordered.cumsum(-1)
    rank = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    size = (1 + rank * ordered > total).sum(-1, keepdim=True)
    return (x - (total.gather(-1, size - 1) - 1) / size).clamp(min=0)


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


def geglu(a: Tensor, b: Tensor) -> Tensor:
    return F.gelu(a, approximate="tanh") * b
