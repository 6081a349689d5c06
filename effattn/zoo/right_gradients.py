"""Correct kernels with every option and gradients, written differently. None of them may ever be called wrong."""

from __future__ import annotations

import torch

from effattn.zoo.matrices import Setting, Whole
from effattn.zoo.specimen import right


@right("whole-matrices")
class _Whole(Whole):
    """Whole matrices with the roundings of flash kernels, forward and backward."""


@right("whole-delta-of-unrounded-output")
class _Unrounded(Whole):
    """delta from the output before it is rounded."""

    def output_for_delta(self, out: torch.Tensor, unrounded: torch.Tensor) -> torch.Tensor:
        return unrounded


@right("whole-base-e")
class _BaseE(Whole):
    """exp and log without log2(e)."""

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    def lse(self, base: torch.Tensor, total: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return base + torch.log(total)


@right("whole-heads-rounded")
class _HeadsRounded(Whole):
    """dK and dV of each query head in the inputs' dtype before they are summed over the group, as in FlashAttention-2."""

    def to_group(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        if x.shape[1] == kv_heads:
            return x
        return super().to_group(x.to(dtype).float(), kv_heads, dtype)


@right("whole-ds-scaled")
class _DsScaled(Whole):
    """dS is scaled before it is rounded."""

    def cast_ds(self, d_s: torch.Tensor, dtype: torch.dtype, setting: Setting) -> torch.Tensor:
        return (d_s * setting.scale).to(dtype).float()

    def scaled(self, x: torch.Tensor, setting: Setting, of: str) -> torch.Tensor:
        return x


@right("whole-blocks-reversed")
class _Reversed(Whole):
    """Sums over queries in blocks of 16, the last block first."""

    def sum_over_queries(self, d_s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((*d_s.shape[:2], d_s.shape[3], q.shape[3]), device=q.device)
        for start in reversed(range(0, q.shape[2], 16)):
            total = total + self.dot(d_s[:, :, start : start + 16].mT, q[:, :, start : start + 16])
        return total


@right("whole-terms-one-by-one")
class _OneByOne(Whole):
    """Sums over queries term by term, product and sum rounded separately."""

    def sum_over_queries(self, d_s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((*d_s.shape[:2], d_s.shape[3], q.shape[3]), device=q.device)
        for i in range(q.shape[2]):
            total = total + d_s[:, :, i].float()[..., None] * q[:, :, i].float()[:, :, None]
        return total


@right("autograd-fp32")
class _Autograd(Whole):
    """Everything in fp32 by torch's softmax and matmul, differentiated by torch; no gradient through the log-sum-exp."""

    def attention(self, q, k, v, *, causal=False, scale=None, causal_alignment="bottom-right", window=None,
                  softcap=None, alibi_slopes=None, bias=None, mask=None, sinks=None, q_lengths=None, kv_lengths=None,
                  dropout_p=0.0, dropout_seed=0, dropout_offset=0):  # fmt: skip
        setting = Setting(
            scale=q.shape[-1] ** -0.5 if scale is None else scale, causal=causal, alignment=causal_alignment, window=window,
            softcap=softcap, slopes=alibi_slopes, mask=mask, q_lengths=q_lengths, kv_lengths=kv_lengths,
            dropout=dropout_p, seed=dropout_seed + dropout_offset,
        )  # fmt: skip
        s, _, seen = self.scores(setting, q, k, bias)
        empty = ~seen.any(-1, keepdim=True)
        s = s.masked_fill(empty, 0.0)
        if sinks is not None:
            s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], -1)
        p = self.dropped(s.softmax(-1)[..., : k.shape[2]].masked_fill(empty, 0.0), setting)
        out = (p @ self.expand(v, q.shape[1]).float()).to(q.dtype)
        return out
