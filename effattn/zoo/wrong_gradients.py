"""Kernels with a mistake in an option or in a gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from effattn.zoo.matrices import Setting, Whole
from effattn.zoo.specimen import HALF, wrong

if TYPE_CHECKING:
    from effattn.case import Case


def _backward(case: Case) -> bool:
    return case.backward


@wrong("dp-rounded", dtypes=HALF, shows=_backward)
class DpRounded(Whole):
    """Rounds dP to the inputs' dtype before delta is subtracted."""

    def difference(self, d_p: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return d_p.to(dtype).float() - delta


@wrong("delta-forgotten", shows=_backward)
class DeltaForgotten(Whole):
    """dS = P dP, nothing subtracted."""

    def difference(self, d_p: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return d_p


@wrong("dv-of-unnormalised-weights", shows=_backward)
class UnnormalisedWeights(Whole):
    """dV of weights relative to the maximum, not divided by their sum."""

    def weights_of_v(self, p: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        top = s.amax(-1, keepdim=True)
        return self.exp(s - torch.where(top == -math.inf, 0.0, top))


@wrong("dq-not-scaled", shows=_backward)
class DqNotScaled(Whole):
    """dQ without the scale."""

    def scaled(self, x: torch.Tensor, setting: Setting, of: str) -> torch.Tensor:
        return x if of == "q" else super().scaled(x, setting, of)


@wrong("dk-times-1-005", dtypes=HALF, shows=_backward)
class DkTimes(Whole):
    """dK half a percent too large."""

    def scaled(self, x: torch.Tensor, setting: Setting, of: str) -> torch.Tensor:
        return super().scaled(x, setting, of) * (1.005 if of == "k" else 1.0)


@wrong("key-sums-in-input-dtype", dtypes=HALF, shows=_backward)
class KeySumsRounded(Whole):
    """dK and dV are accumulated in the inputs' dtype, block by block of 16 queries."""

    def sum_over_queries(self, d_s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((*d_s.shape[:2], d_s.shape[3], q.shape[3]), dtype=q.dtype, device=q.device)
        for i in range(0, q.shape[2], 16):
            total = (total.float() + self.dot(d_s[:, :, i : i + 16].mT, q[:, :, i : i + 16])).to(q.dtype)
        return total.float()


@wrong("ds-truncated", dtypes=HALF, shows=_backward)
class DsTruncated(Whole):
    """dS is cut off instead of rounded."""

    def cast_ds(self, d_s: torch.Tensor, dtype: torch.dtype, setting: Setting) -> torch.Tensor:
        bits = 16 if dtype == torch.bfloat16 else 13
        return (d_s.contiguous().view(torch.int32) >> bits << bits).view(torch.float32)


@wrong("ds-rounded-twice-as-coarse", dtypes=HALF, shows=_backward)
class DsCoarse(Whole):
    """dS keeps two bits less than the inputs' dtype has."""

    def cast_ds(self, d_s: torch.Tensor, dtype: torch.dtype, setting: Setting) -> torch.Tensor:
        mantissa, exponent = torch.frexp(d_s)
        scale = 2.0 ** (6 if dtype == torch.bfloat16 else 9)
        return torch.ldexp(torch.round(mantissa * scale) / scale, exponent)


@wrong("group-not-summed", shows=lambda case: case.backward and case.heads > case.kv_heads)
class GroupNotSummed(Whole):
    """dK and dV are those of the first query head of each group."""

    def to_group(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        return x.unflatten(1, (kv_heads, -1))[:, :, 0]


@wrong("gradient-through-lse-forgotten", shows=_backward)
class ThroughLseForgotten(Whole):
    """Takes the upstream gradient of the log-sum-exp for 0."""

    def through_lse(self, delta: torch.Tensor, d_lse: torch.Tensor) -> torch.Tensor:
        return delta


@wrong(
    "backward-top-left",
    shows=lambda case: case.backward and case.causal == "bottom-right" and case.q_len != case.kv_len,
)
class BackwardTopLeft(Whole):
    """The backward pass aligns its causal mask top-left."""

    def again(self, setting: Setting) -> Setting:
        return replace(setting, alignment="top-left")


@wrong("backward-without-lengths", shows=lambda case: case.backward and case.lengths != "none")
class BackwardWithoutLengths(Whole):
    """The backward pass takes padded keys for keys."""

    def again(self, setting: Setting) -> Setting:
        return replace(setting, kv_lengths=None)


@wrong("backward-without-mask", shows=lambda case: case.backward and case.mask != "none")
class BackwardWithoutMask(Whole):
    """The backward pass forgets the mask."""

    def again(self, setting: Setting) -> Setting:
        return replace(setting, mask=None)


@wrong("backward-drops-others", shows=lambda case: case.backward and case.dropout > 0.0)
class BackwardDropsOthers(Whole):
    """The backward pass draws its own dropout."""

    def again(self, setting: Setting) -> Setting:
        return replace(setting, seed=setting.seed + 1)


@wrong("dropout-not-divided", shows=lambda case: case.dropout > 0.0)
class DropoutNotDivided(Whole):
    """Kept weights are not divided by 1 - p."""

    def dropped(self, p: torch.Tensor, setting: Setting) -> torch.Tensor:
        return super().dropped(p, setting) * (1.0 - setting.dropout)


@wrong("cap-slope-forgotten", shows=lambda case: case.backward and case.softcap is not None)
class CapSlopeForgotten(Whole):
    """The derivative of the softcap is left out."""

    def cap_slope(self, s: torch.Tensor, setting: Setting) -> torch.Tensor | None:
        return None


@wrong(
    "cap-after-mask",
    shows=lambda case: case.softcap is not None and (case.causal != "none" or case.mask != "none"),
)
class CapAfterMask(Whole):
    """Caps the masked scores, so that hidden keys have a score of -softcap."""

    def masked(self, s: torch.Tensor, seen: torch.Tensor, setting: Setting) -> torch.Tensor:
        masked = super().masked(s, seen, setting)
        return masked if setting.softcap is None else masked.clamp(min=-setting.softcap)


@wrong("cap-before-scale", shows=lambda case: case.softcap is not None)
class CapBeforeScale(Whole):
    """Caps q.k, then scales."""

    def capped(self, s: torch.Tensor, setting: Setting) -> torch.Tensor:
        if setting.softcap is None:
            return s
        return super().capped(s / setting.scale, setting) * setting.scale


@wrong("window-one-key-too-many", shows=lambda case: case.window is not None and case.window[0] >= 0)
class WindowTooWide(Whole):
    """Sees one key more on the left."""

    def in_window(self, ahead: torch.Tensor, setting: Setting) -> torch.Tensor:
        assert setting.window is not None
        left, right = setting.window
        return super().in_window(ahead, replace(setting, window=(left + 1 if left >= 0 else left, right)))


@wrong(
    "window-sides-swapped", shows=lambda case: case.window is not None and case.window[0] != case.window[1]
)
class WindowSwapped(Whole):
    """Takes left for right."""

    def in_window(self, ahead: torch.Tensor, setting: Setting) -> torch.Tensor:
        return super().in_window(-ahead, setting)


def _sloped(case: Case) -> bool:
    return case.alibi != "none"


@wrong("alibi-sign", shows=_sloped)
class AlibiSign(Whole):
    """Adds what ALiBi takes away."""

    def alibi(self, setting: Setting, m: int, n: int, device: torch.device) -> torch.Tensor:
        return -super().alibi(setting, m, n, device)


@wrong(
    "alibi-from-the-first-key",
    shows=lambda case: _sloped(case) and case.q_len != case.kv_len and case.alignment == "bottom-right",
)
class AlibiFromFirst(Whole):
    """Distances as if the first query stood at the first key."""

    def alibi(self, setting: Setting, m: int, n: int, device: torch.device) -> torch.Tensor:
        return super().alibi(replace(setting, alignment="top-left"), m, n, device)


def _biased(case: Case) -> bool:
    return case.bias != "none"


@wrong("bias-ignored", shows=_biased)
class BiasIgnored(Whole):
    """Takes a bias and does nothing with it."""

    def biased(self, s: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return s


@wrong("bias-scaled", shows=_biased)
class BiasScaled(Whole):
    """Adds the bias before the scale is multiplied."""

    def biased(self, s: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return s if bias is None else s + 0.25 * bias.float()


@wrong(
    "dbias-of-one-entry",
    shows=lambda case: (
        _biased(case) and case.backward and "b" not in case.bias.split(":")[0] and case.batch > 1
    ),
)
class BiasOfOneEntry(Whole):
    """The gradient of a shared bias is that of the first batch entry."""

    def bias_gradient(self, d_s: torch.Tensor, bias: torch.Tensor, setting: Setting) -> torch.Tensor:
        return super().bias_gradient(d_s[:1], bias, setting)


@wrong("dbias-scaled", shows=lambda case: _biased(case) and case.backward)
class BiasGradientScaled(Whole):
    """The gradient of the bias with the scale of the scores."""

    def bias_gradient(self, d_s: torch.Tensor, bias: torch.Tensor, setting: Setting) -> torch.Tensor:
        return super().bias_gradient(d_s * setting.scale, bias, setting)


@wrong("sink-not-in-lse", shows=lambda case: case.sinks)
class SinkNotInLse(Whole):
    """Divides by a sum with the sink, and stores the log-sum-exp without it."""

    def lse(self, base: torch.Tensor, total: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        return super().lse(base, p.sum(-1, keepdim=True), p)


@wrong("dsinks-sign", shows=lambda case: case.sinks and case.backward)
class SinkSign(Whole):
    """The gradient of the sinks with the other sign."""

    def sink_gradient(self, p: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return -super().sink_gradient(p, delta)
