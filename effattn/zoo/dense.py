"""A plain kernel with every option and its gradients, which keeps every law; what breaks one is a change of it.

Scores are a matrix in float32; everything else runs key by key or row by row, so that the bits of a row depend on
nothing but what it sees. It is slow and made for small cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of one call."""

    causal: bool = False
    causal_alignment: str = "bottom-right"
    scale: float | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    q_lengths: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    dropout_p: float = 0.0
    dropout_seed: int = 0
    dropout_offset: int = 0


class Dense:
    """Right; each method is one step, for a subclass to get wrong."""

    def __init__(self) -> None:
        self.calls = 0

    # -- the mask ----------------------------------------------------------------------------------------------------

    def lengths(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        """Numbers of queries and of keys of each entry, (batch, 1, 1, 1)."""
        batch = q.shape[0]
        ends = []
        for given, full in ((asked.q_lengths, q.shape[2]), (asked.kv_lengths, k.shape[2])):
            end = torch.full((batch,), full, device=q.device) if given is None else given.long()
            ends.append(end.view(-1, 1, 1, 1))
        return ends[0], ends[1]

    def distance(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        """Position of the key less that of the query."""
        q_end, k_end = self.lengths(q, k, asked)
        shift = k_end - q_end if asked.causal_alignment == "bottom-right" else torch.zeros_like(k_end)
        rows = torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1)
        return torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1) - rows - shift

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        """(batch, heads, q_len, kv_len) bool."""
        q_end, k_end = self.lengths(q, k, asked)
        rows = torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1)
        seen = (torch.arange(k.shape[2], device=q.device).view(1, 1, 1, -1) < k_end) & (rows < q_end)
        far = self.distance(q, k, asked)
        if asked.causal:
            seen = seen & (far <= 0)
        if asked.window is not None:
            left, right = asked.window
            if left >= 0:
                seen = seen & (far >= -left)
            if right >= 0:
                seen = seen & (far <= right)
        if asked.mask is not None:
            seen = seen & asked.mask
        return seen.expand(*q.shape[:3], k.shape[2])

    # -- forward -----------------------------------------------------------------------------------------------------

    def scale(self, q: torch.Tensor, asked: Asked) -> float:
        """The factor of q.k."""
        return q.shape[-1] ** -0.5 if asked.scale is None else asked.scale

    def heads_of(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """K or V once for each query head."""
        return x.repeat_interleave(heads // x.shape[1], dim=1)

    def products(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """q.k, summed term by term."""
        total = torch.zeros(*q.shape[:3], k.shape[2], device=q.device)
        for d in range(q.shape[-1]):
            total = total + q[..., d].float().unsqueeze(-1) * k[..., d].float().unsqueeze(-2)
        return total

    def capped(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        """The softcap."""
        return s if asked.softcap is None else asked.softcap * _tanh(s / asked.softcap)

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        """Bias and ALiBi added."""
        if asked.bias is not None:
            s = s + asked.bias.float()
        if asked.alibi_slopes is not None:
            slopes = asked.alibi_slopes.view(-1, q.shape[1], 1, 1)
            s = s - slopes * self.distance(q, k, asked).abs().float()
        return s

    def hide(self, s: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """-inf where the key is hidden."""
        return torch.where(seen, s, -math.inf)

    def top(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        """The shift of each row's scores, (batch, heads, q_len, 1)."""
        top = s.amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:3], 1), -math.inf)
        if asked.sinks is not None:
            top = torch.maximum(top, asked.sinks.float().view(1, -1, 1, 1))
        return torch.where(top == -math.inf, 0.0, top)

    def total(self, p: torch.Tensor, top: torch.Tensor, asked: Asked) -> torch.Tensor:
        """The sum of a row's weights, key by key."""
        total = p.new_zeros((*p.shape[:3], 1))
        for j in range(p.shape[-1]):
            total = total + p[..., j : j + 1]
        return total if asked.sinks is None else total + _exp(asked.sinks.float().view(1, -1, 1, 1) - top)

    def keep(self, shape: torch.Size, asked: Asked, device: torch.device) -> torch.Tensor | None:
        """The weights that dropout keeps."""
        return (
            None if asked.dropout_p == 0.0 else keep_mask(shape, asked.dropout_p, asked.dropout_seed, device)
        )

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """sum p v, key by key; what is hidden is not touched."""
        out = p.new_zeros((*p.shape[:3], v.shape[-1]))
        for j in range(p.shape[-1]):
            here = seen[..., j : j + 1] & (p[..., j : j + 1] != 0.0)
            out = torch.where(here, out + p[..., j : j + 1] * v[:, :, j : j + 1].float(), out)
        return out

    def normalise(self, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Divided by the sum; rows that see nothing stay 0."""
        return out / torch.where(total == 0.0, 1.0, total)

    def lse(self, top: torch.Tensor, total: torch.Tensor, q: torch.Tensor, asked: Asked) -> torch.Tensor:
        """(batch, heads, q_len); -inf in rows that see nothing, and in padding."""
        lse = (top + total.double().log().float()).squeeze(-1)
        q_end, _ = self.lengths(q, q, asked)
        rows = torch.arange(q.shape[2], device=q.device).view(1, 1, -1)
        return torch.where(rows < q_end.squeeze(-1), lse, -math.inf)

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What is taken for q, k and v."""
        return q, k, v

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        """The output in the dtype of the inputs."""
        return out.to(q.dtype)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """out, lse, and what backward needs."""
        self.calls += 1
        q, k, v = self.read(q, k, v)
        heads = q.shape[1]
        k_all, v_all = self.heads_of(k, heads), self.heads_of(v, heads)
        seen = self.visible(q, k, asked)
        raw = self.products(q, k_all) * self.scale(q, asked)
        s = self.hide(self.biased(self.capped(raw, asked), q, k, asked), seen)
        top = self.top(s, asked)
        p = torch.where(s == -math.inf, 0.0, _exp(s - top))
        total = self.total(p, top, asked)
        keep = self.keep(p.shape, asked, q.device)
        kept = p if keep is None else torch.where(keep, p / (1.0 - asked.dropout_p), 0.0)
        out = self.normalise(self.average(kept, v_all, seen), total)
        q_end, _ = self.lengths(q, k, asked)
        rows = torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1)
        out = self.write(torch.where(rows < q_end, out, 0.0), q)
        lse = self.lse(top, total, q, asked)
        weights = p / torch.where(total == 0.0, 1.0, total)
        return (
            out,
            lse,
            {
                "q": q,
                "k": k_all,
                "v": v_all,
                "raw": raw,
                "w": weights,
                "seen": seen,
                "keep": keep,
                "top": top,
                "total": total,
            },
        )

    # -- backward ----------------------------------------------------------------------------------------------------

    def backward_keep(self, saved: dict[str, Any], asked: Asked) -> torch.Tensor | None:
        """Dropout's mask in backward."""
        return saved["keep"]

    def delta(self, g: torch.Tensor, w: torch.Tensor, dp: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        """sum_j w dP of each row, key by key."""
        total = dp.new_zeros((*dp.shape[:3], 1))
        for j in range(dp.shape[-1]):
            here = seen[..., j : j + 1]
            total = torch.where(here, total + w[..., j : j + 1] * dp[..., j : j + 1], total)
        return total

    def ds(
        self, w: torch.Tensor, dp: torch.Tensor, delta: torch.Tensor, d_lse: torch.Tensor | None
    ) -> torch.Tensor:
        """The gradient of the scores."""
        back = dp - delta if d_lse is None else dp - delta + d_lse.unsqueeze(-1)
        return torch.where(w == 0.0, 0.0, w * back)

    def through_cap(self, ds: torch.Tensor, raw: torch.Tensor, asked: Asked) -> torch.Tensor:
        """Through the softcap."""
        return ds if asked.softcap is None else ds * (1.0 - _tanh(raw / asked.softcap).square())

    def grouped(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """Summed over the heads that share K and V."""
        total = None
        for part in x.unflatten(1, (kv_heads, -1)).unbind(2):
            total = part if total is None else total + part
        assert total is not None
        return total

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        """What is taken for the gradient of the output."""
        return g.float()

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> dict[str, torch.Tensor | None]:
        """Gradients of q, k, v, bias and sinks."""
        q, k, v, w, seen = (saved[name] for name in ("q", "k", "v", "w", "seen"))
        g = self.gradient(g)
        rows = seen.any(-1, keepdim=True)
        g = torch.where(rows, g, 0.0)
        keep = self.backward_keep(saved, asked)
        factor = None if keep is None else keep.float() / (1.0 - asked.dropout_p)
        dp = torch.zeros_like(w)
        for d in range(v.shape[-1]):
            dp = dp + torch.where(seen, g[..., d].unsqueeze(-1) * v[..., d].float().unsqueeze(-2), 0.0)
        kept = w if factor is None else w * factor
        dp = dp if factor is None else dp * factor
        delta = self.delta(g, w, dp, seen)
        given = d_lse
        d_lse = None if d_lse is None else torch.where(rows.squeeze(-1), d_lse.float(), 0.0)
        ds = self.ds(w, dp, delta, d_lse)
        ds = torch.where(seen, ds, 0.0)
        scale = self.scale(q, asked)
        inner = self.through_cap(ds, saved["raw"], asked)
        inner = torch.where(seen, inner, 0.0)
        dq = q.new_zeros(q.shape, dtype=torch.float32)
        for j in range(k.shape[2]):
            here = seen[..., j : j + 1]
            dq = torch.where(here, dq + inner[..., j : j + 1] * k[:, :, j : j + 1].float(), dq)
        dk = k.new_zeros(k.shape, dtype=torch.float32)
        dv = v.new_zeros(v.shape, dtype=torch.float32)
        for i in range(q.shape[2]):
            here = seen[:, :, i, :, None]
            dk = torch.where(here, dk + inner[:, :, i, :, None] * q[:, :, i : i + 1].float(), dk)
            dv = torch.where(here, dv + kept[:, :, i, :, None] * g[:, :, i : i + 1], dv)
        d_bias = None if asked.bias is None else _sum_to(ds, asked.bias.shape)
        d_sinks = None
        if asked.sinks is not None:
            share = _exp(asked.sinks.float().view(1, -1, 1, 1) - saved["top"]) / saved["total"]
            # The log-sum-exp of a row that sees no key is the sink; of a padding row it is -inf.
            back = -delta if given is None else given.float().unsqueeze(-1) - delta
            q_end, _ = self.lengths(q, k, asked)
            there = torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1) < q_end
            d_sinks = torch.where(there, share * back, 0.0).sum((0, 2, 3))
        return {
            "q": self.dq(dq, scale),
            "k": self.dk(self.grouped(dk, kv_heads), scale),
            "v": self.dv(self.grouped(dv, kv_heads)),
            "bias": d_bias,
            "sinks": d_sinks,
        }

    def dq(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """The gradient of q."""
        return x * scale

    def dk(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        """The gradient of k."""
        return x * scale

    def dv(self, x: torch.Tensor) -> torch.Tensor:
        """The gradient of v."""
        return x

    # -- the call ----------------------------------------------------------------------------------------------------

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse, both differentiable."""
        out, lse = _Call.apply(q, k, v, asked.bias, asked.sinks, self, asked)  # pyright: ignore[reportGeneralTypeIssues]
        return out, lse


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, bias: Any, sinks: Any, kernel: Dense, asked: Asked) -> Any:
        out, lse, saved = kernel.forward(q, k, v, asked)
        ctx.saved, ctx.kernel, ctx.asked, ctx.kv_heads = saved, kernel, asked, k.shape[1]
        ctx.like = (q, k, v, bias, sinks)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        g, d_lse = upstream
        found = ctx.kernel.backward(ctx.saved, ctx.asked, g, d_lse, ctx.kv_heads)
        gradients = [
            None if x is None or like is None else x.to(like.dtype)
            for x, like in zip(found.values(), ctx.like, strict=True)
        ]
        return (*gradients, None, None)


def keep_mask(shape: torch.Size, p: float, seed: int, device: torch.device) -> torch.Tensor:
    """Which weights dropout keeps: from the seed and the place alone."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator) >= p).to(device)


def _exp(x: torch.Tensor) -> torch.Tensor:
    """Through float64: the vector code and the scalar code of torch differ in the last bit."""
    return x.double().exp().float()


def _tanh(x: torch.Tensor) -> torch.Tensor:
    return x.double().tanh().float()


def _sum_to(x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    for axis, n in enumerate(shape):
        if n == 1 and x.shape[axis] != 1:
            x = x.sum(axis, keepdim=True)
    return x
