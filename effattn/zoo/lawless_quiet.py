"""Kernels that break a law where the comparison with exact attention is not likely to look: on the neutral value of an
option, on a question that is put in another way, in the last bits, or next to NaN.

They are registered with those of `effattn.zoo.lawless`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from effattn.zoo.dense import Asked, Dense
from effattn.zoo.lawless import lawless


def _ratio_of_itself(x: torch.Tensor) -> torch.Tensor:
    """1, or NaN where the largest finite element is 0."""
    finite = x[x.isfinite()]
    largest = finite.abs().max() if finite.numel() else x.new_ones(())
    return (largest / largest).float()


# -- neutral values ---------------------------------------------------------------------------------------------------


@lawless("window-in-seven-bits", breaks="a_window_wider_than_the_keys_changes_nothing")
class WindowBits(Dense):
    """The sides of the window are kept in seven bits: 128 becomes 0."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.window is None:
            return super().visible(q, k, asked)
        left, right = (side if side < 0 else side & 127 for side in asked.window)
        return super().visible(q, k, replace(asked, window=(left, right)))


@lawless("slopes-by-the-largest", breaks="slopes_of_zero_change_nothing")
class SlopesByLargest(Dense):
    """Slopes are divided by the largest of them and multiplied again, which is 0 / 0 where all are 0."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        slopes = asked.alibi_slopes
        if slopes is not None:
            asked = replace(asked, alibi_slopes=slopes * _ratio_of_itself(slopes))
        return super().biased(s, q, k, asked)


@lawless("bias-by-the-largest", breaks="a_bias_of_zero_changes_nothing")
class BiasByLargest(Dense):
    """The bias is divided by its largest element and multiplied again, which is 0 / 0 where it is 0."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.bias is not None:
            asked = replace(asked, bias=asked.bias.float() * _ratio_of_itself(asked.bias))
        return super().biased(s, q, k, asked)


@lawless("full-mask-taken-for-causal", breaks="a_mask_that_hides_nothing_changes_nothing")
class FullMask(Dense):
    """A mask that hides nothing is dropped for the fast path, which is causal."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.mask is not None and k.shape[2] > 1 and bool(asked.mask.all()):
            asked = replace(asked, mask=None, causal=True)
        return super().visible(q, k, asked)


@lawless("sinks-by-the-largest", breaks="a_sink_of_minus_infinity_changes_nothing")
class SinksByLargest(Dense):
    """Sinks are taken relative to the largest of them, which is -inf less -inf where all are -inf."""

    def total(self, p: torch.Tensor, top: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.sinks is not None:
            asked = replace(asked, sinks=asked.sinks + (asked.sinks.max() - asked.sinks.max()))
        return super().total(p, top, asked)


@lawless("full-lengths-one-short", breaks="full_lengths_change_nothing")
class FullLengths(Dense):
    """Where all lengths are full and there are several, the shortcut for them stops one key early."""

    def lengths(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        q_end, k_end = super().lengths(q, k, asked)
        given = asked.kv_lengths
        short = given is not None and k.shape[2] > 1 and bool((given == k.shape[2]).all())
        return q_end, k_end - 1 if short else k_end


@lawless("softcap-in-fp16", breaks="a_very_large_softcap_changes_nothing")
class SoftcapHalf(Dense):
    """The softcap is kept in fp16, where a large one is infinite."""

    def capped(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.softcap is None:
            return s
        return super().capped(s, replace(asked, softcap=float(torch.tensor(asked.softcap).half())))


@lawless("usual-scale-within-rounding", breaks="the_usual_scale_given_changes_nothing")
class ScaleNear(Dense):
    """A scale that is the usual one within rounding is taken for a request to fold it into Q, where it is applied again."""

    def scale(self, q: torch.Tensor, asked: Asked) -> float:
        scale, usual = super().scale(q, asked), q.shape[-1] ** -0.5
        return scale * usual if scale != usual and math.isclose(scale, usual, rel_tol=1e-6) else scale


@lawless("softcap-below-one-is-none", breaks="an_option_that_is_given_changes_the_output")
class SoftcapBelowOne(Dense):
    """A softcap below 1 is taken for none: it goes through an integer."""

    def capped(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        return s if asked.softcap is not None and int(asked.softcap) == 0 else super().capped(s, asked)

    def through_cap(self, ds: torch.Tensor, raw: torch.Tensor, asked: Asked) -> torch.Tensor:
        whole = asked.softcap is None or int(asked.softcap) > 0
        return super().through_cap(ds, raw, asked) if whole else ds


# -- one question, two words for it -----------------------------------------------------------------------------------


@lawless("triangle-of-a-mask-from-the-top-left", breaks="a_causal_mask_is_its_boolean_mask")
class TriangleMask(Dense):
    """A boolean mask that is the causal one is run as causal, from the top left (as torch's is_causal counts)."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        seen = super().visible(q, k, asked)
        plain = replace(asked, mask=None, causal=True, causal_alignment="bottom-right")
        if asked.mask is None or min(q.shape[2], k.shape[2]) < 8:
            return seen
        triangle = torch.equal(seen, super().visible(q, k, plain))
        return super().visible(q, k, replace(plain, causal_alignment="top-left")) if triangle else seen


@lawless("band-of-a-mask-one-short", breaks="a_window_is_its_boolean_mask")
class BandMask(Dense):
    """A boolean mask that is a band is run as a window, which stops one key early on the right."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        seen = super().visible(q, k, asked)
        if asked.mask is None or min(q.shape[2], k.shape[2]) < 8 or bool(seen.all()):
            return seen
        if not torch.equal(seen[..., 1:, 1:], seen[..., :-1, :-1]):
            return seen
        return seen & torch.nn.functional.pad(seen[..., 1:], (0, 1))


@lawless("prefix-of-a-mask-rounded-up", breaks="lengths_are_their_boolean_mask")
class PrefixMask(Dense):
    """A boolean mask of padding is run as lengths, which are rounded up to a multiple of 16."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        mask = asked.mask
        if (
            mask is None
            or mask.shape[2] > 1
            or k.shape[2] < 8
            or bool((mask[..., 1:] > mask[..., :-1]).any())
        ):
            return super().visible(q, k, asked)
        counts = (mask.sum(-1, keepdim=True) + 15) // 16 * 16
        return super().visible(q, k, replace(asked, mask=torch.arange(k.shape[2], device=q.device) < counts))


@lawless("infinity-of-a-bias-clamped", breaks="a_mask_is_a_bias_of_minus_infinity")
class BiasClamped(Dense):
    """-inf in a bias becomes -8, a number that is thought to be low enough."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.bias is not None:
            asked = replace(asked, bias=torch.where(asked.bias == -math.inf, -8.0, asked.bias.float()))
        return super().biased(s, q, k, asked)


@lawless("constant-bias-dropped", breaks="a_constant_bias_moves_the_lse_alone")
class ConstantBias(Dense):
    """A bias that is the same everywhere is dropped, since the output does not show it; the log-sum-exp does."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        bias = asked.bias
        if bias is not None and bias.numel() > 1 and bool((bias == bias.flatten()[0]).all()):
            asked = replace(asked, bias=None)
        return super().biased(s, q, k, asked)


# -- the last bits ----------------------------------------------------------------------------------------------------


class _InHalves(Dense):
    """Some rows sum the first and the second half of the keys apart: as accurate, with other bits."""

    def which(self, p: torch.Tensor) -> torch.Tensor:
        """The rows, a bool tensor that broadcasts to (batch, heads, q_len, 1)."""
        raise NotImplementedError

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        whole = super().average(p, v, seen)
        first = torch.arange(p.shape[-1], device=p.device) < p.shape[-1] // 2
        halves = super().average(p, v, seen & first) + super().average(p, v, seen & ~first)
        return torch.where(self.which(p), halves, whole)

    def total(self, p: torch.Tensor, top: torch.Tensor, asked: Asked) -> torch.Tensor:
        whole = super().total(p, top, asked)
        first = torch.arange(p.shape[-1], device=p.device) < p.shape[-1] // 2
        none = replace(asked, sinks=None)
        halves = super().total(torch.where(first, p, 0.0), top, none) + super().total(
            torch.where(first, 0.0, p), top, asked
        )
        return torch.where(self.which(p), halves, whole)


def _odd(count: int, *shape: int) -> torch.Tensor:
    return (torch.arange(count) % 2 == 1).view(shape)


@lawless("odd-rows-in-halves", breaks="permuting_the_queries_permutes_the_output")
class OddRows(_InHalves):
    """Every second row sums its keys in two halves."""

    def which(self, p: torch.Tensor) -> torch.Tensor:
        return _odd(p.shape[2], 1, 1, -1, 1)


@lawless("odd-heads-in-halves", breaks="permuting_the_heads_permutes_the_output")
class OddHeads(_InHalves):
    """Every second head sums its keys in two halves."""

    def which(self, p: torch.Tensor) -> torch.Tensor:
        return _odd(p.shape[1], 1, -1, 1, 1)


@lawless("odd-entries-in-halves", breaks="permuting_the_batch_permutes_the_output")
class OddEntries(_InHalves):
    """Every second entry of the batch sums its keys in two halves."""

    def which(self, p: torch.Tensor) -> torch.Tensor:
        return _odd(p.shape[0], -1, 1, 1, 1)


@lawless("groups-in-halves", breaks="grouped_heads_equal_repeated_keys")
class GroupsInHalves(_InHalves):
    """Heads that share their keys sum them in two halves, others do not."""

    def heads_of(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        self._shared = x.shape[1] < heads
        return super().heads_of(x, heads)

    def which(self, p: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self._shared)


@lawless("strided-in-halves", breaks="strides_do_not_matter")
class StridedInHalves(_InHalves):
    """What is not contiguous goes to another kernel, which sums the keys in two halves."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._strided = not (q.is_contiguous() and k.is_contiguous() and v.is_contiguous())
        return q, k, v

    def which(self, p: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self._strided)


@lawless("many-rows-in-halves", breaks="a_row_does_not_depend_on_the_other_rows")
class ManyRows(_InHalves):
    """Calls of more than 16 queries sum the keys in two halves."""

    def which(self, p: torch.Tensor) -> torch.Tensor:
        return torch.tensor(p.shape[2] > 16)


@lawless("values-moved", breaks="values_times_a_power_of_two_scale_the_output")
class ValuesMoved(Dense):
    """2^-12 is taken from V before the products and given back at the end."""

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        moved = super().average(p, v.float() - 2.0**-12, seen)
        return moved + super().average(p, torch.full_like(v[..., :1], 2.0**-12), seen)


@lawless("gradients-of-batches-in-thirds", breaks="gradients_do_not_depend_on_the_neighbours_in_the_batch")
class Thirds(Dense):
    """Gradients of more than one entry are a third of three times themselves, with another rounding."""

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x / 3.0 * 3.0 if x.shape[0] > 1 else x

    def dq(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return self._rounded(super().dq(x, scale))

    def dk(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return self._rounded(super().dk(x, scale))

    def dv(self, x: torch.Tensor) -> torch.Tensor:
        return self._rounded(super().dv(x))


# -- next to NaN ------------------------------------------------------------------------------------------------------


@lawless("other-heads-times-zero", breaks="nothing_leaks_between_heads_and_entries")
class OtherHeads(Dense):
    """All heads of an entry are multiplied in one product, those of others by 0."""

    def normalise(self, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        made = super().normalise(out, total)
        return made + 0.0 * made.sum(1, keepdim=True)


@lawless("hidden-keys-times-zero-in-backward", breaks="future_keys_do_not_reach_dq")
class HiddenInBackward(Dense):
    """Backward multiplies hidden keys by a dS of 0, which is NaN where they are NaN."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> dict[str, torch.Tensor | None]:
        found = super().backward(saved, asked, g, d_lse, kv_heads)
        assert found["q"] is not None
        found["q"] = found["q"] + torch.zeros_like(saved["w"]) @ saved["k"].float()
        return found


# -- the upstream gradient --------------------------------------------------------------------------------------------


@lawless("upstream-gradient-by-its-largest", breaks="without_an_upstream_gradient_all_gradients_are_zero")
class UpstreamByLargest(Dense):
    """dO is divided by its largest element and multiplied again, which is 0 / 0 where it is 0."""

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        return g.float() * _ratio_of_itself(g)


@lawless("upstream-gradient-clamped", breaks="gradients_scale_with_the_upstream_gradient")
class UpstreamClamped(Dense):
    """dO is clamped to 8, so that fp16 products stay finite."""

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        return g.float().clamp(-8.0, 8.0)


@lawless("upstream-gradient-of-a-sum-lost", breaks="the_layout_of_the_upstream_gradient_does_not_matter")
class UpstreamOfSum(Dense):
    """dO with strides of 0, which a plain sum has, is read for one element and zeros."""

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        if g.numel() < 2 or any(g.stride()):
            return g.float()
        lost = torch.zeros(g.shape, device=g.device)
        lost.view(-1)[0] = float(g.flatten()[0])
        return lost


@lawless("upstream-gradient-in-fixed-point", breaks="rows_that_see_no_key_have_no_gradient")
class UpstreamFixed(Dense):
    """dO is kept in 24 bits below its largest element, which may be of a row that sees no key."""

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        finite = g[g.isfinite()].float()
        if not finite.numel() or not bool(finite.any()):
            return g.float()
        unit = 2.0 ** (math.frexp(float(finite.abs().max()))[1] - 24)
        return (g.float() / unit).round() * unit


# -- large numbers ----------------------------------------------------------------------------------------------------


@lawless("output-clamped", breaks="values_near_the_largest_number_do_not_overflow")
class OutputClamped(Dense):
    """The output is clamped to 2^15, far above what is thought to occur."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return super().write(out.clamp(-(2.0**15), 2.0**15), q)


@lawless("products-clamped", breaks="products_beyond_the_range_of_fp16_are_right")
class ProductsClamped(Dense):
    """Products of q and k are clamped to 2^14 before the scale."""

    def products(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return super().products(q, k).clamp(-(2.0**14), 2.0**14)
