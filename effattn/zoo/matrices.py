"""Attention with every option, forward and backward, on whole matrices in torch, with the roundings of flash kernels.

Scores, weights and sums are fp32; P is rounded to the inputs' dtype for P V and dV, dS for dQ and dK; delta = dO.O comes
from the rounded output; P is computed again from the stored log-sum-exp. Each step is a method of `Whole`, so that a
kernel of the zoo, right or wrong, is a subclass that changes one step.

This shares no code with `effattn.exact` and `effattn.tolerances`, which it is judged by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

LOG2E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a call was asked for."""

    scale: float
    causal: bool = False
    alignment: str = "bottom-right"
    window: tuple[int, int] | None = None
    softcap: float | None = None
    slopes: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    q_lengths: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    dropout: float = 0.0
    seed: int = 0
    #: whether this is the second time that scores are computed, for the gradients
    backward: bool = False


def dropout_mask(
    batch: int, heads: int, q_len: int, kv_len: int, p: float, seed: int, offset: int, device: torch.device
) -> torch.Tensor:
    """What the kernels of this module keep."""
    generator = torch.Generator().manual_seed(seed + offset)
    return (torch.rand((batch, heads, q_len, kv_len), generator=generator) >= p).to(device)


class Whole:
    """The kernel as it should be. `attention` has the signature of a user's function."""

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        causal_alignment: str = "bottom-right",
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        alibi_slopes: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        q_lengths: torch.Tensor | None = None,
        kv_lengths: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        dropout_seed: int = 0,
        dropout_offset: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor] | torch.Tensor:
        setting = Setting(
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            causal=causal,
            alignment=causal_alignment,
            window=window,
            softcap=softcap,
            slopes=alibi_slopes,
            mask=mask,
            q_lengths=q_lengths,
            kv_lengths=kv_lengths,
            dropout=dropout_p,
            seed=dropout_seed + dropout_offset,
        )
        return _Function.apply(self, setting, q, k, v, bias, sinks)

    # Scores.

    def expand(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.repeat_interleave(heads // x.shape[1], 1)

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b, operands exact in fp32, accumulated in fp32."""
        return a.float() @ b.float()

    def shift(self, setting: Setting, m: int, n: int, device: torch.device) -> torch.Tensor:
        """(batch or 1, 1, 1, 1): how far query 0 stands from key 0."""
        if setting.alignment == "top-left":
            return torch.zeros((1, 1, 1, 1), dtype=torch.int64, device=device)
        rows = torch.tensor([m], device=device) if setting.q_lengths is None else setting.q_lengths.long()
        keys = torch.tensor([n], device=device) if setting.kv_lengths is None else setting.kv_lengths.long()
        return (keys - rows)[:, None, None, None]

    def visible(self, setting: Setting, m: int, n: int, device: torch.device) -> torch.Tensor:
        """Broadcasts to (batch, heads, m, n): which keys a row sees."""
        i, j = torch.arange(m, device=device)[:, None], torch.arange(n, device=device)
        place = i + self.shift(setting, m, n, device)
        seen = torch.ones((1, 1, m, n), dtype=torch.bool, device=device)
        if setting.causal:
            seen = seen & (j <= place)
        if setting.window is not None:
            seen = seen & self.in_window(j - place, setting)
        if setting.kv_lengths is not None:
            seen = seen & (j < setting.kv_lengths[:, None, None, None])
        if setting.q_lengths is not None:
            seen = seen & (i < setting.q_lengths[:, None, None, None])
        return seen if setting.mask is None else seen & setting.mask

    def in_window(self, ahead: torch.Tensor, setting: Setting) -> torch.Tensor:
        """Which keys are in the window, `ahead` of the query's own position."""
        assert setting.window is not None
        left, right = setting.window
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen = seen & (ahead >= -left)
        return seen & (ahead <= right) if right >= 0 else seen

    def capped(self, s: torch.Tensor, setting: Setting) -> torch.Tensor:
        return s if setting.softcap is None else setting.softcap * torch.tanh(s / setting.softcap)

    def cap_slope(self, s: torch.Tensor, setting: Setting) -> torch.Tensor | None:
        """Derivative of the softcap."""
        return None if setting.softcap is None else 1.0 - torch.tanh(s / setting.softcap).square()

    def alibi(self, setting: Setting, m: int, n: int, device: torch.device) -> torch.Tensor:
        assert setting.slopes is not None
        slopes = setting.slopes[None] if setting.slopes.dim() == 1 else setting.slopes
        place = torch.arange(m, device=device)[:, None] + self.shift(setting, m, n, device)
        return -slopes[:, :, None, None] * (place - torch.arange(n, device=device)).abs()

    def biased(self, s: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return s if bias is None else s + bias.float()

    def scores(
        self, setting: Setting, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Scores, -inf where hidden; the softcap's derivative; what is visible. All (batch, heads, m, n)."""
        m, n = q.shape[2], k.shape[2]
        products = self.dot(q, self.expand(k, q.shape[1]).mT) * setting.scale
        s = self.biased(self.capped(products, setting), bias)
        if setting.slopes is not None:
            s = s + self.alibi(setting, m, n, q.device)
        seen = self.visible(setting, m, n, q.device).expand(s.shape)
        return self.masked(s, seen, setting), self.cap_slope(products, setting), seen

    def masked(self, s: torch.Tensor, seen: torch.Tensor, setting: Setting) -> torch.Tensor:
        return s.masked_fill(~seen, -math.inf)

    # Forward.

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp2(x * LOG2E)

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return p.to(dtype)

    def keep(self, setting: Setting, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        b, h, m, n = shape
        return dropout_mask(b, h, m, n, setting.dropout, setting.seed, 0, device)

    def dropped(self, p: torch.Tensor, setting: Setting) -> torch.Tensor:
        if not setting.dropout:
            return p
        return p * self.keep(setting, tuple(p.shape), p.device) / (1.0 - setting.dropout)

    def forward(
        self, setting: Setting, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """out, lse, and out before it was rounded."""
        s, _, _ = self.scores(setting, q, k, bias)
        top = (
            s.amax(-1, keepdim=True)
            if s.shape[-1]
            else torch.full((*s.shape[:3], 1), -math.inf, device=s.device)
        )
        if sinks is not None:
            sinks = sinks[None, :, None, None]
            top = torch.maximum(top, sinks)
        base = torch.where(top == -math.inf, 0.0, top)
        p = self.exp(s - base)
        total = p.sum(-1, keepdim=True)
        total = total if sinks is None else total + self.exp(sinks - base)
        acc = self.dot(self.cast(self.dropped(p, setting), v.dtype), self.expand(v, q.shape[1]))
        out = acc / torch.where(total == 0.0, 1.0, total)
        lse = self.lse(base, total, p)[..., 0]
        if setting.q_lengths is not None:
            padding = torch.arange(q.shape[2], device=q.device) >= setting.q_lengths[:, None, None]
            lse = lse.masked_fill(padding, -math.inf)
        return out.to(q.dtype), lse, out

    def lse(self, base: torch.Tensor, total: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return base + torch.log2(total) / LOG2E

    # Backward.

    def output_for_delta(self, out: torch.Tensor, unrounded: torch.Tensor) -> torch.Tensor:
        return out.float()

    def again(self, setting: Setting) -> Setting:
        """What the backward pass takes the setting for."""
        return setting

    def weights(self, s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """P from the stored log-sum-exp."""
        return self.exp(s - torch.where(lse == -math.inf, 0.0, lse)[..., None])

    def weights_of_v(self, p: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return p

    def difference(self, d_p: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return d_p - delta

    def cast_ds(self, d_s: torch.Tensor, dtype: torch.dtype, setting: Setting) -> torch.Tensor:
        """dS as it is multiplied by Q and K, without the scale."""
        return d_s.to(dtype).float()

    def sum_over_keys(self, d_s: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.dot(d_s, k)

    def sum_over_queries(self, d_s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return self.dot(d_s.mT, q)

    def to_group(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        """The sum over the query heads of each KV head."""
        return x.unflatten(1, (kv_heads, -1)).sum(2)

    def scaled(self, x: torch.Tensor, setting: Setting, of: str) -> torch.Tensor:
        return x * setting.scale

    def bias_gradient(self, d_s: torch.Tensor, bias: torch.Tensor, setting: Setting) -> torch.Tensor:
        return d_s.sum_to_size(bias.shape).to(bias.dtype)

    def sink_gradient(self, p: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return -(p * delta).sum((0, 2))

    def through_lse(self, delta: torch.Tensor, d_lse: torch.Tensor) -> torch.Tensor:
        return delta - d_lse[..., None]

    def gradients(
        self,
        setting: Setting,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
        out: torch.Tensor,
        unrounded: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor,
    ) -> list[torch.Tensor | None]:
        """Those of q, k, v, bias and sinks."""
        setting, dtype, heads = self.again(replace(setting, backward=True)), q.dtype, q.shape[1]
        s, slope, _ = self.scores(setting, q, k, bias)
        p = self.weights(s, lse)
        g = d_out.float()
        delta = (g * self.output_for_delta(out, unrounded)).sum(-1, keepdim=True)
        delta = self.through_lse(delta, d_lse.float())
        dropped = self.dropped(self.weights_of_v(p, s), setting)
        d_v = self.to_group(self.sum_over_queries(self.cast(dropped, dtype), d_out), v.shape[1], dtype)
        d_p = self.dropped(self.dot(d_out, self.expand(v, heads).mT), setting)
        d_s = p * self.difference(d_p, delta, dtype)
        d_t = self.cast_ds(d_s if slope is None else d_s * slope, dtype, setting)
        d_q = self.scaled(self.sum_over_keys(d_t, self.expand(k, heads)), setting, "q")
        d_k = self.scaled(self.to_group(self.sum_over_queries(d_t, q), k.shape[1], dtype), setting, "k")
        d_bias = None if bias is None else self.bias_gradient(d_s, bias, setting)
        d_sinks = None
        if sinks is not None:
            at_sink = self.exp(sinks[None, :, None] - torch.where(lse == -math.inf, math.inf, lse))
            d_sinks = self.sink_gradient(at_sink, delta[..., 0])
        return [d_q.to(dtype), d_k.to(dtype), d_v.to(dtype), d_bias, d_sinks]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernel: Whole, setting: Setting, *tensors: torch.Tensor | None) -> Any:
        out, lse, unrounded = kernel.forward(setting, *tensors)  # type: ignore[arg-type]
        ctx.kernel, ctx.setting = kernel, setting
        ctx.save_for_backward(*tensors, out, unrounded, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> Any:
        return None, None, *ctx.kernel.gradients(ctx.setting, *ctx.saved_tensors, *upstream)
