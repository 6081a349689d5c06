"""Kernels that break a law: each is the plain kernel of `dense` with one step got wrong, most after a bug that shipped.

`LAWLESS` has them by name, those of `effattn.zoo.lawless_quiet` too; `effattn gate effattn.zoo:NAME --laws all` judges one.
They stand in one long file, since it is a list: each is a few lines beside the ones like it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from effattn.methods.declare import method
from effattn.zoo.dense import Asked, Dense, _sum_to, keep_mask

_C = TypeVar("_C", bound=type[Dense])

LAWLESS: dict[str, type[Dense]] = {}


def lawless(name: str, *, breaks: str | None = None) -> Callable[[_C], _C]:
    """Register a kernel that breaks a law, which BROKEN_LAW has if it is not given."""

    def add(kernel: _C) -> _C:
        assert name not in LAWLESS
        assert kernel.__doc__
        LAWLESS[name] = kernel
        if breaks is not None:
            BROKEN_LAW[name] = breaks
        return kernel

    return add


def function_of(kernel: type[Dense], name: str) -> Callable[..., Any]:
    """The kernel with the signature of a user's function."""
    made = kernel()

    def mask(
        batch: int, heads: int, q_len: int, kv_len: int, p: float, seed: int, offset: int, device: Any
    ) -> Any:
        asked = Asked(dropout_p=p, dropout_seed=seed, dropout_offset=offset)
        kept = made.keep(torch.Size((batch, heads, q_len, kv_len)), asked, device)
        assert kept is not None
        return kept

    declare = method(dropout_mask=mask)

    @declare
    def attention(
        q: Any,
        k: Any,
        v: Any,
        *,
        causal: bool = False,
        causal_alignment: str = "bottom-right",
        scale: float | None = None,
        window: tuple[int, int] | None = None,
        softcap: float | None = None,
        alibi_slopes: Any = None,
        bias: Any = None,
        mask: Any = None,
        sinks: Any = None,
        q_lengths: Any = None,
        kv_lengths: Any = None,
        dropout_p: float = 0.0,
        dropout_seed: int = 0,
        dropout_offset: int = 0,
    ) -> Any:
        asked = Asked(
            causal=causal,
            causal_alignment=causal_alignment,
            scale=scale,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            bias=bias,
            mask=mask,
            sinks=sinks,
            q_lengths=q_lengths,
            kv_lengths=kv_lengths,
            dropout_p=dropout_p,
            dropout_seed=dropout_seed,
            dropout_offset=dropout_offset,
        )
        return made(q, k, v, asked)

    attention.__name__ = attention.__qualname__ = name.replace("-", "_")
    attention.__module__ = "effattn.zoo"
    attention.__doc__ = " ".join((kernel.__doc__ or "").split())
    return attention


# -- what is hidden shows -------------------------------------------------------------------------------------------


class _Touches(Dense):
    """Multiplies hidden values by a weight of 0, which is NaN where they are NaN."""

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return super().average(p, v, torch.ones_like(seen)) + (p @ v.float()) * 0.0


@lawless("hidden-values-times-zero")
class HiddenTimesZero(_Touches):
    """0 * NaN: hidden V is multiplied by a weight of 0 (flash-attention #1745, flashinfer #941)."""


@lawless("hidden-scores-not-replaced")
class HiddenAdded(Dense):
    """The mask is added to the scores as -inf, so that NaN in a hidden key stays NaN."""

    def hide(self, s: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return s + torch.where(seen, 0.0, -math.inf)


@lawless("future-of-a-tile-visible")
class FutureOfTile(Dense):
    """The causal limit is rounded up to a tile of 16 keys."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        seen = super().visible(q, k, asked)
        if not asked.causal:
            return seen
        whole = torch.nn.functional.pad(seen, (0, -seen.shape[-1] % 16))
        whole = whole.unflatten(-1, (-1, 16)).any(-1, keepdim=True).expand(-1, -1, -1, -1, 16).flatten(-2)
        return whole[..., : seen.shape[-1]]


@lawless("length-rounded-up")
class LengthRounded(Dense):
    """Keys up to a multiple of 16 beyond the length are seen (flash-attention a4f148b6)."""

    def lengths(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        q_end, k_end = super().lengths(q, k, asked)
        return q_end, ((k_end + 15) // 16 * 16).clamp(max=k.shape[2])


@lawless("lengths-ignored")
class LengthsIgnored(Dense):
    """Lengths are taken and not used (flash-attention #2315, #2167)."""

    def lengths(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        return super().lengths(q, k, Asked())


@lawless("lengths-of-the-first-entry")
class LengthsOfFirst(Dense):
    """All entries of the batch get the lengths of the first."""

    def lengths(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        q_end, k_end = super().lengths(q, k, asked)
        return q_end[:1].expand_as(q_end), k_end[:1].expand_as(k_end)


class _Window(Dense):
    left, right = 0, 0

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.window is None:
            return super().visible(q, k, asked)
        left, right = (
            side + move if side >= 0 else side
            for side, move in zip(asked.window, (self.left, self.right), strict=True)
        )
        changed = Asked(**{**vars(asked), "window": (max(left, -1), max(right, -1))})
        return super().visible(q, k, changed)


@lawless("window-one-more-on-the-left")
class WindowLeft(_Window):
    """The window reaches one key too far back (TransformerEngine #1212)."""

    left = 1


@lawless("window-one-less-on-the-right")
class WindowRight(Dense):
    """The window stops one key early on the right."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        seen = super().visible(q, k, asked)
        if asked.window is None or asked.window[1] < 0:
            return seen
        return seen & (self.distance(q, k, asked) < asked.window[1])


@lawless("window-of-top-left")
class WindowTopLeft(Dense):
    """Window positions count from the top left whatever the alignment."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.window is None:
            return super().visible(q, k, asked)
        changed = Asked(**{**vars(asked), "causal_alignment": "top-left"})
        return super().visible(q, k, Asked(**{**vars(asked), "window": None})) & super().visible(
            q, k, Asked(**{**vars(changed), "causal": False})
        )


@lawless("bias-at-hidden-keys-added")
class BiasTouched(Dense):
    """The bias is added after the mask, so that NaN or +inf at a hidden key shows."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        return super().biased(s, q, k, Asked(**{**vars(asked), "bias": None}))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
        self._bias = asked.bias
        return super().forward(q, k, v, asked)

    def hide(self, s: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        s = super().hide(s, seen)
        return s if self._bias is None else s + self._bias.float()


# -- rows that see nothing ------------------------------------------------------------------------------------------


@lawless("empty-rows-nan")
class EmptyRowsNan(Dense):
    """A row that sees no key divides 0 by 0 (flash-attention c65b5106)."""

    def normalise(self, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return out / total


@lawless("empty-rows-mean")
class EmptyRowsMean(Dense):
    """A row that sees no key gets the mean of V: the mask is a large negative number, not -inf (pytorch #103963)."""

    def hide(self, s: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return torch.where(seen, s, -1.0e30)

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return super().average(p, v, torch.ones_like(seen))


@lawless("empty-rows-lse-zero")
class EmptyRowsLse(Dense):
    """The log-sum-exp of a row that sees no key is 0 (vllm #39148)."""

    def lse(self, top: torch.Tensor, total: torch.Tensor, q: torch.Tensor, asked: Asked) -> torch.Tensor:
        lse = super().lse(top, total, q, asked)
        return torch.where(lse == -math.inf, 0.0, lse)


@lawless("padding-rows-not-zero")
class PaddingRows(Dense):
    """Padding rows of the output are computed like others."""

    def lengths(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
        q_end, k_end = super().lengths(q, k, asked)
        return torch.full_like(q_end, q.shape[2]), k_end


@lawless("no-keys-left-as-found")
class NoKeysLeft(Dense):
    """With kv_len 0 the kernel returns early, and the output is what the memory held (vllm #37442)."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return out.to(q.dtype)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
        out, lse, saved = super().forward(q, k, v, asked)
        return (torch.full_like(out, 0.125) if k.shape[2] == 0 else out), lse, saved


@lawless("last-rows-unwritten")
class LastRows(Dense):
    """The rows of a last tile of fewer than 16 queries are never written (SageAttention #377)."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        made = torch.empty_like(out, dtype=q.dtype)
        written = q.shape[2] if q.shape[2] < 16 else q.shape[2] // 16 * 16
        made[:, :, :written] = out[:, :, :written].to(q.dtype)
        return made


# -- options --------------------------------------------------------------------------------------------------------


def _ignores(option: str, what: str) -> None:
    """A kernel that takes an option and does nothing with it."""

    class Ignores(Dense):
        def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
            plain = vars(Asked())[option]
            return super().__call__(q, k, v, Asked(**{**vars(asked), option: plain}))

    Ignores.__doc__ = what
    Ignores.__name__ = "Ignores" + option.title()
    lawless(f"{option.replace('_', '-')}-ignored")(Ignores)


_ignores("causal", "The causal flag is ignored (triton #4541, turned round).")
_ignores("window", "The window is ignored (flashinfer #1254).")
_ignores("softcap", "The softcap is ignored (sgl-kernel-xpu #491).")
_ignores("alibi_slopes", "ALiBi is ignored.")
_ignores("bias", "The bias is ignored.")
_ignores("mask", "The mask is ignored (pytorch #122753).")
_ignores("sinks", "Sinks are ignored.")
_ignores("scale", "The scale is ignored (flashinfer #1416).")


@lawless("softcap-after-bias")
class SoftcapLate(Dense):
    """The softcap comes after bias and ALiBi."""

    def capped(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        return s

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        return Dense.capped(self, super().biased(s, q, k, asked), asked)


@lawless("softcap-without-factor")
class SoftcapFactor(Dense):
    """tanh(s / cap) without the factor cap (flash-attention #2402)."""

    def capped(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        return s if asked.softcap is None else super().capped(s, asked) / asked.softcap


@lawless("alibi-sign")
class AlibiSign(Dense):
    """ALiBi is added with the wrong sign (attention-gym #86)."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        slopes = None if asked.alibi_slopes is None else -asked.alibi_slopes
        return super().biased(s, q, k, Asked(**{**vars(asked), "alibi_slopes": slopes}))


@lawless("alibi-from-top-left")
class AlibiTopLeft(Dense):
    """ALiBi counts distances from the top left (vllm #945)."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        return super().biased(s, q, k, Asked(**{**vars(asked), "causal_alignment": "top-left"}))


@lawless("alibi-of-the-first-head")
class AlibiFirst(Dense):
    """All heads get the slope of the first."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        slopes = asked.alibi_slopes
        if slopes is not None:
            slopes = slopes[..., :1].expand_as(slopes)
        return super().biased(s, q, k, Asked(**{**vars(asked), "alibi_slopes": slopes}))


@lawless("bias-of-the-first-head")
class BiasFirst(Dense):
    """All heads and entries get the bias of the first (pytorch #139462)."""

    def biased(self, s: torch.Tensor, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        bias = None if asked.bias is None else asked.bias[:1, :1]
        return super().biased(s, q, k, Asked(**{**vars(asked), "bias": bias}))


@lawless("mask-of-the-first-entry")
class MaskFirst(Dense):
    """All entries of the batch get the mask of the first."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        mask = None if asked.mask is None else asked.mask[:1]
        return super().visible(q, k, Asked(**{**vars(asked), "mask": mask}))


@lawless("sink-left-out-of-the-lse")
class SinkLse(Dense):
    """The sink takes its share of the weights, and the log-sum-exp does not know of it."""

    def lse(self, top: torch.Tensor, total: torch.Tensor, q: torch.Tensor, asked: Asked) -> torch.Tensor:
        if asked.sinks is not None:
            total = total - (asked.sinks.float().view(1, -1, 1, 1) - top).exp()
        return super().lse(top, total.clamp(min=0.0), q, asked)


@lawless("top-left-for-bottom-right")
class TopLeft(Dense):
    """Alignment is always top-left (jax bd9a10e4eb)."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        return super().visible(q, k, Asked(**{**vars(asked), "causal_alignment": "top-left"}))


@lawless("diagonal-hidden")
class Diagonal(Dense):
    """A causal query does not see the key at its own position."""

    def visible(self, q: torch.Tensor, k: torch.Tensor, asked: Asked) -> torch.Tensor:
        seen = super().visible(q, k, asked)
        return seen & (self.distance(q, k, asked) < 0) if asked.causal else seen


# -- structure ------------------------------------------------------------------------------------------------------


@lawless("heads-interleaved")
class Interleaved(Dense):
    """Query head h reads KV head h modulo the number of KV heads (flashinfer #3022)."""

    def heads_of(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.repeat(1, heads // x.shape[1], 1, 1)


@lawless("first-head-for-all")
class FirstHead(Dense):
    """The offset of the head is missing (flash-linear-attention #781)."""

    def heads_of(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x[:, :1].expand(-1, heads, -1, -1)


@lawless("strides-of-contiguous")
class StridesAssumed(Dense):
    """Strides are computed from the shape (flash-attention #818, #2665; pytorch #112577)."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q, k, _as_contiguous(v)


def _as_contiguous(x: torch.Tensor) -> torch.Tensor:
    strides = torch.empty(x.shape, device="meta").stride()
    size = x.untyped_storage().nbytes() // x.element_size()
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
    return x if last >= size or not x.numel() else x.as_strided(x.shape, strides)


@lawless("a-split-by-the-batch")
class SplitByBatch(Dense):
    """How many keys are summed at a time depends on the batch, and so do the bits (split KV by occupancy)."""

    def total(self, p: torch.Tensor, top: torch.Tensor, asked: Asked) -> torch.Tensor:
        size = 1 + 7 * p.shape[0] * p.shape[1]
        parts = [p[..., j : j + size].sum(-1, keepdim=True) for j in range(0, p.shape[-1], size)]
        total = sum(parts, torch.zeros_like(top))
        return total if asked.sinks is None else total + (asked.sinks.float().view(1, -1, 1, 1) - top).exp()

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        size = 1 + 7 * p.shape[0] * p.shape[1]
        out = p.new_zeros((*p.shape[:3], v.shape[-1]))
        for j in range(0, p.shape[-1], size):
            out = out + super().average(p[..., j : j + size], v[:, :, j : j + size], seen[..., j : j + size])
        return out


@lawless("rows-share-a-maximum")
class SharedMaximum(Dense):
    """The maximum is taken over a tile of 16 rows, so that a row's bits depend on its neighbours."""

    def top(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        top = super().top(s, asked)
        padded = torch.nn.functional.pad(top.squeeze(-1), (0, -top.shape[2] % 16), value=-math.inf)
        tile = padded.unflatten(-1, (-1, 16)).amax(-1, keepdim=True).expand(-1, -1, -1, 16).flatten(-2)
        return tile[..., : top.shape[2]].unsqueeze(-1)


@lawless("answers-from-a-cache")
class Cached(Dense):
    """A call of the same shape is answered from the last one."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[Any, Any] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
        key = (q.shape, k.shape, v.shape, q.dtype, asked.causal, asked.scale)
        if key not in self._last:
            self._last[key] = super().__call__(q, k, v, asked)
        return self._last[key]


@lawless("sums-in-random-order")
class RandomOrder(Dense):
    """Keys are summed in another order in every call, as atomics do (flash-attention #2158)."""

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        order = torch.roll(torch.arange(p.shape[-1], device=p.device), self.calls)
        return super().average(p[..., order], v[:, :, order], seen[..., order])


@lawless("empty-part-merges-to-nan")
class EmptyPart(Dense):
    """The keys are split in two and merged by LSE; two parts of -inf give NaN (flash-attention 26d7d92f)."""

    def normalise(self, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return torch.where(total == 0.0, math.nan, super().normalise(out, total))


# -- memory ---------------------------------------------------------------------------------------------------------


@lawless("scales-q-in-place")
class InPlace(Dense):
    """Q is scaled where it lies."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
        if q.numel() and 0 not in q.stride():
            with torch.no_grad():
                q.mul_(2.0)
        result = super().__call__(q, k, v, Asked(**{**vars(asked), "scale": self.scale(q, asked) / 2.0}))
        return result


@lawless("output-in-q")
class OutputInQ(Dense):
    """The output is written over Q where it fits."""

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
        out, lse = super().__call__(q, k, v, asked)
        if q.shape != out.shape or out.requires_grad or 0 in q.stride():
            return out, lse
        return q.copy_(out), lse


@lawless("one-buffer-for-all-calls")
class OneBuffer(Dense):
    """Every call of a shape returns the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers: dict[Any, torch.Tensor] = {}

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
        out, lse = super().__call__(q, k, v, asked)
        if out.requires_grad:
            return out, lse
        buffer = self._buffers.setdefault((out.shape, out.dtype), torch.empty_like(out))
        return buffer.copy_(out), lse


@lawless("reads-beyond-the-last-row")
class ReadsBeyond(Dense):
    """The last key is averaged with what lies behind it in memory."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = v.as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0)
        behind = v.storage_offset() + sum((n - 1) * s for n, s in zip(v.shape, v.stride(), strict=True)) + 1
        return (
            (q, k, v)
            if not v.numel() or behind >= flat.numel()
            else (q, k, v + flat[behind].to(v.dtype) * 0.0)
        )


@lawless("writes-beyond-the-last-row")
class WritesBeyond(Dense):
    """A zero is written behind the last row of V."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        flat = v.detach().as_strided((v.untyped_storage().nbytes() // v.element_size(),), (1,), 0)
        behind = v.storage_offset() + sum((n - 1) * s for n, s in zip(v.shape, v.stride(), strict=True)) + 1
        if v.numel() and behind < flat.numel():
            flat[behind] = 0.0
        return q, k, v


@lawless("offsets-of-32-bits")
class Offsets32(Dense):
    """Offsets of K and V wrap around at 2^31 elements (flash-attention #1500)."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        k, v = (x[:1].expand_as(x) if x.stride(0) >= 2**31 else x for x in (k, v))
        return q, k, v


@lawless("products-of-32-bits")
class Products32(Dense):
    """The offset of an entry, b * stride, is a product of 32 bits: it wraps around though the stride fits them."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return q, self._wrapped(k), self._wrapped(v)

    def _wrapped(self, x: torch.Tensor) -> torch.Tensor:
        """A stride beyond 32 bits is passed as 64, as Triton passes it; entries past 2^31 read the first one."""
        if x.stride(0) >= 2**31:
            return x
        return torch.stack([x[b] if b * x.stride(0) < 2**31 else x[0] for b in range(x.shape[0])])


@lawless("seeds-torch")
class SeedsTorch(Dense):
    """Each call sets the seed of torch."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        return q, k, v


# -- numbers --------------------------------------------------------------------------------------------------------


@lawless("no-maximum-subtracted")
class NoMaximum(Dense):
    """exp of the scores as they are (overflow beyond 88)."""

    def top(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        return torch.zeros_like(super().top(s, asked))


@lawless("missing-keys-have-score-0")
class ScoreZero(Dense):
    """Keys are padded to 64 with zeros, whose score of 0 counts where all others are very negative (pytorch #196678)."""

    def total(self, p: torch.Tensor, top: torch.Tensor, asked: Asked) -> torch.Tensor:
        rest = -p.shape[-1] % 64
        return super().total(p, top, asked) + (rest * (-top - 60.0).clamp(max=60.0).exp() if rest else 0.0)


@lawless("products-in-fp16")
class ProductsFp16(Dense):
    """Unscaled products are kept in the dtype of the inputs, and pass 65504 (pytorch #121558)."""

    def products(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return super().products(q, k).to(q.dtype).float()


@lawless("nan-swallowed")
class NanSwallowed(Dense):
    """NaN becomes 0."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return super().write(out.nan_to_num(0.0), q)


@lawless("nan-spreads-over-a-tile")
class NanSpreads(Dense):
    """NaN in a row makes NaN of all rows of its tile of 16."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        bad = out.isnan().any(-1)
        padded = torch.nn.functional.pad(bad, (0, -bad.shape[2] % 16))
        tile = padded.unflatten(-1, (-1, 16)).any(-1, keepdim=True).expand(-1, -1, -1, 16).flatten(-2)
        return super().write(out.masked_fill(tile[..., : bad.shape[2]].unsqueeze(-1), math.nan), q)


@lawless("first-tile-of-minus-infinity-nan")
class FirstTile(Dense):
    """A first tile of scores of -inf makes -inf - -inf = NaN (xformers #722, pytorch #110213)."""

    def normalise(self, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return torch.where(self._first, math.nan, super().normalise(out, total))

    def top(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
        first = (
            (s[..., :16] == -math.inf).all(-1, keepdim=True)
            if s.shape[-1]
            else s.new_zeros((*s.shape[:3], 1)).bool()
        )
        self._first = first & ~(s == -math.inf).all(-1, keepdim=True)
        return super().top(s, asked)


@lawless("subnormals-flushed")
class Flushed(Dense):
    """Subnormal inputs are taken for 0."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tiny = torch.finfo(v.dtype).tiny
        return q, k, torch.where(v.abs() < tiny, torch.zeros_like(v), v)


@lawless("truncates-p")
class TruncatesP(Dense):
    """P is truncated, not rounded, to bf16: with a repeated maximum and V of one sign, errors add up."""

    def average(self, p: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        cut = (p.view(torch.int32) & ~0xFFFF).view(torch.float32)
        return super().average(torch.where(p == 1.0, p, cut), v, seen)


@lawless("rounds-down")
class RoundsDown(Dense):
    """The output is rounded toward minus infinity."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        near = out.to(q.dtype)
        if q.dtype == torch.float32:
            return torch.nextafter(near, torch.full_like(near, -math.inf))
        down = torch.nextafter(near, torch.full_like(near, -math.inf))
        return torch.where(near.float() > out, down, near)


# -- values ---------------------------------------------------------------------------------------------------------


@lawless("columns-mixed")
class ColumnsMixed(Dense):
    """The last column of V is read for the one before it, where v_dim is no power of two (head_dim sweep)."""

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        n = v.shape[-1]
        return (
            (q, k, v)
            if n & (n - 1) == 0 or n < 2
            else (q, k, torch.cat([v[..., : n - 2], v[..., -1:], v[..., -1:]], -1))
        )


@lawless("normaliser-forgets-a-key")
class ForgetsKey(Dense):
    """The sum of the weights leaves out the last key."""

    def total(self, p: torch.Tensor, top: torch.Tensor, asked: Asked) -> torch.Tensor:
        return super().total(p[..., :-1] if p.shape[-1] > 1 else p, top, asked)


@lawless("sign-of-v-lost")
class Negative(Dense):
    """Negative outputs are made smaller by one part in 500."""

    def normalise(self, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        out = super().normalise(out, total)
        return torch.where(out < 0.0, out * (1.0 - 1.0 / 500.0), out)


@lawless("scale-folded-twice")
class ScaleTwice(Dense):
    """The default scale is applied on top of the one that is given."""

    def scale(self, q: torch.Tensor, asked: Asked) -> float:
        usual = q.shape[-1] ** -0.5
        return usual if asked.scale is None else asked.scale * usual


@lawless("scale-of-the-padded-head")
class ScalePadded(Dense):
    """The usual scale is that of head_dim rounded up to a power of two."""

    def scale(self, q: torch.Tensor, asked: Asked) -> float:
        padded = 1 << (q.shape[-1] - 1).bit_length()
        return padded**-0.5 if asked.scale is None else asked.scale


# -- gradients ------------------------------------------------------------------------------------------------------


@lawless("delta-forgotten")
class NoDelta(Dense):
    """dS = P dP: delta is left out."""

    def ds(
        self, w: torch.Tensor, dp: torch.Tensor, delta: torch.Tensor, d_lse: torch.Tensor | None
    ) -> torch.Tensor:
        return super().ds(w, dp, torch.zeros_like(delta), d_lse)


@lawless("upstream-gradient-ignored")
class UpstreamIgnored(Dense):
    """The gradient of the output is taken to be 1 (flash-linear-attention #963)."""

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(g, dtype=torch.float32)


@lawless("upstream-strides-assumed")
class UpstreamStrides(Dense):
    """dO is read as if it were contiguous."""

    def gradient(self, g: torch.Tensor) -> torch.Tensor:
        return _as_contiguous(g).float()


@lawless("dq-not-scaled")
class DqNotScaled(Dense):
    """dQ lacks the scale."""

    def dq(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        return x


@lawless("dk-of-the-last-head")
class DkLastHead(Dense):
    """dK and dV of shared keys are those of one head of the group, not the sum."""

    def grouped(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        return x.unflatten(1, (kv_heads, -1))[:, :, -1]


@lawless("dv-of-rounded-weights-twice")
class DvScaled(Dense):
    """dV is larger by one part in 300."""

    def dv(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 + 1.0 / 300.0)


@lawless("other-alignment-in-backward")
class BackwardAlignment(Dense):
    """Forward is bottom-right, backward top-left (ffpa-attn #300)."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        other = Asked(**{**vars(asked), "causal_alignment": "top-left"})
        seen = super().visible(saved["q"], saved["k"], other)
        return super().backward({**saved, "seen": seen}, asked, g, d_lse, kv_heads)


@lawless("backward-not-causal")
class BackwardNotCausal(Dense):
    """Backward computes with P of all keys, hidden ones included (triton #5660)."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        every = torch.ones_like(saved["seen"])
        raw = saved["raw"]
        w = torch.where(saved["seen"], saved["w"], (raw - raw.amax(-1, keepdim=True)).exp() * 0.01)
        return super().backward({**saved, "seen": every, "w": w}, asked, g, d_lse, kv_heads)


@lawless("another-dropout-in-backward")
class BackwardDropout(Dense):
    """Backward draws dropout's mask from another seed."""

    def backward_keep(self, saved: dict[str, Any], asked: Asked) -> torch.Tensor | None:
        if saved["keep"] is None:
            return None
        return keep_mask(saved["keep"].shape, asked.dropout_p, asked.dropout_seed + 1, saved["keep"].device)


@lawless("softcap-not-in-backward")
class BackwardSoftcap(Dense):
    """Backward forgets the derivative of the softcap."""

    def through_cap(self, ds: torch.Tensor, raw: torch.Tensor, asked: Asked) -> torch.Tensor:
        return ds


@lawless("gradients-in-random-order")
class GradientsRandom(Dense):
    """dK is summed in another order in every call (flash-attention #2510)."""

    def grouped(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        self.calls += 1
        return super().grouped(x, kv_heads) * (1.0 + (self.calls % 5) * 2.0**-22)


@lawless("padding-in-gradients")
class PaddingGradients(Dense):
    """Products of padding rows are formed and multiplied by 0, which is NaN for NaN (flash-attention #2421)."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        found = super().backward(saved, asked, g, d_lse, kv_heads)
        zero = (saved["k"].float() * 0.0).sum(2, keepdim=True)
        return {**found, "q": found["q"] + zero}


@lawless("tail-of-dk-unwritten")
class TailUnwritten(Dense):
    """dK of a last tile of fewer than 16 keys is never written (flash-linear-attention #892)."""

    def dk(self, x: torch.Tensor, scale: float) -> torch.Tensor:
        made = torch.full_like(x, 0.5)
        written = x.shape[2] if x.shape[2] < 16 else x.shape[2] // 16 * 16
        made[:, :, :written] = x[:, :, :written] * scale
        return made


# -- dropout --------------------------------------------------------------------------------------------------------


@lawless("dbias-of-the-first-entry")
class DbiasFirst(Dense):
    """dBias of a bias that the batch shares is that of its first entry, not the sum."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        found = super().backward(saved, asked, g, d_lse, kv_heads)
        if asked.bias is not None and asked.bias.shape[0] == 1:
            one = g.clone()
            one[1:] = 0.0
            found["bias"] = super().backward(saved, asked, one, None, kv_heads)["bias"]
        return found


@lawless("dbias-at-hidden-keys")
class DbiasHidden(Dense):
    """dBias of hidden keys is not cleared: it holds a hundredth."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        found = super().backward(saved, asked, g, d_lse, kv_heads)
        if found["bias"] is not None:
            hidden = (~saved["seen"]).float().expand(*g.shape[:3], -1)
            found["bias"] = found["bias"] + 0.01 * _sum_to(hidden, found["bias"].shape)
        return found


@lawless("dsinks-sign")
class DsinksSign(Dense):
    """The gradient of the sinks has the wrong sign."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        found = super().backward(saved, asked, g, d_lse, kv_heads)
        return found | {"sinks": None if found["sinks"] is None else -found["sinks"]}


@lawless("dsinks-left-over")
class DsinksLeftOver(Dense):
    """The gradient of the sinks is added to what the buffer held."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        found = super().backward(saved, asked, g, d_lse, kv_heads)
        return found | {"sinks": None if found["sinks"] is None else found["sinks"] + 0.01}


@lawless("dsinks-of-the-first-entry")
class DsinksFirst(Dense):
    """The gradient of the sinks is that of the first entry of the batch, not the sum."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        found = super().backward(saved, asked, g, d_lse, kv_heads)
        if found["sinks"] is not None:
            one, one_lse = g.clone(), None if d_lse is None else d_lse.clone()
            for x in (one, *(() if one_lse is None else (one_lse,))):
                x[1:] = 0.0
            found["sinks"] = super().backward(saved, asked, one, one_lse, kv_heads)["sinks"]
        return found


@lawless("sink-not-in-delta")
class SinkNotInDelta(Dense):
    """Backward normalises P without the sink: rows of dS no longer sum to what the sink takes."""

    def backward(
        self, saved: dict[str, Any], asked: Asked, g: torch.Tensor, d_lse: torch.Tensor | None, kv_heads: int
    ) -> Any:
        if asked.sinks is not None:
            w = saved["w"]
            saved = saved | {"w": w / w.sum(-1, keepdim=True).clamp(min=1e-30)}
        return super().backward(saved, asked, g, d_lse, kv_heads)


@lawless("dropout-keeps-p")
class KeepsP(Dense):
    """Keeps with probability p, drops with 1 - p."""

    def keep(self, shape: torch.Size, asked: Asked, device: torch.device) -> torch.Tensor | None:
        kept = super().keep(shape, asked, device)
        return None if kept is None else ~kept


@lawless("dropout-not-scaled")
class NotScaled(Dense):
    """Kept weights are not divided by 1 - p."""

    def normalise(self, out: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return super().normalise(out, total) * (1.0 - self._p)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: Asked) -> Any:
        self._p = asked.dropout_p
        return super().forward(q, k, v, asked)


@lawless("dropout-same-for-all-rows")
class SameRows(Dense):
    """All rows of a head drop the same keys."""

    def keep(self, shape: torch.Size, asked: Asked, device: torch.device) -> torch.Tensor | None:
        kept = super().keep(shape, asked, device)
        return None if kept is None else kept[:, :, :1].expand(shape)


@lawless("dropout-same-for-all-heads")
class SameHeads(Dense):
    """All heads drop the same weights."""

    def keep(self, shape: torch.Size, asked: Asked, device: torch.device) -> torch.Tensor | None:
        kept = super().keep(shape, asked, device)
        return None if kept is None else kept[:, :1].expand(shape)


@lawless("dropout-seed-ignored")
class SeedIgnored(Dense):
    """The seed does not matter."""

    def keep(self, shape: torch.Size, asked: Asked, device: torch.device) -> torch.Tensor | None:
        return super().keep(shape, Asked(**{**vars(asked), "dropout_seed": 7}), device)


@lawless("dropout-new-in-every-call")
class NewEveryCall(Dense):
    """The mask changes from call to call."""

    def keep(self, shape: torch.Size, asked: Asked, device: torch.device) -> torch.Tensor | None:
        return super().keep(
            shape, Asked(**{**vars(asked), "dropout_seed": asked.dropout_seed + 1000 * self.calls}), device
        )


#: kernel -> the law that it was made for; others may find it as well
BROKEN_LAW: dict[str, str] = {
    "hidden-values-times-zero": "keys_beyond_the_length_have_no_influence",
    "hidden-scores-not-replaced": "future_keys_have_no_influence",
    "future-of-a-tile-visible": "future_keys_have_no_influence",
    "length-rounded-up": "keys_beyond_the_length_have_no_influence",
    "lengths-ignored": "an_option_that_is_given_changes_the_output",
    "lengths-of-the-first-entry": "permuting_the_batch_permutes_the_output",
    "window-one-more-on-the-left": "the_edges_of_the_window_are_seen",
    "window-one-less-on-the-right": "the_edges_of_the_window_are_seen",
    "window-of-top-left": "a_window_is_its_boolean_mask",
    "bias-at-hidden-keys-added": "a_bias_at_hidden_keys_has_no_influence",
    "empty-rows-nan": "a_row_that_sees_no_key_is_zero",
    "empty-rows-mean": "a_row_that_sees_no_key_is_zero",
    "empty-rows-lse-zero": "merging_the_parts_of_split_keys_gives_the_whole",
    "padding-rows-not-zero": "padding_rows_of_q_have_no_influence",
    "no-keys-left-as-found": "without_keys_the_output_is_zero",
    "last-rows-unwritten": "every_element_of_the_output_is_written",
    "causal-ignored": "a_causal_mask_is_its_boolean_mask",
    "window-ignored": "keys_outside_the_window_have_no_influence",
    "softcap-ignored": "an_option_that_is_given_changes_the_output",
    "alibi-slopes-ignored": "an_option_that_is_given_changes_the_output",
    "bias-ignored": "a_logit_of_minus_infinity_has_no_weight",
    "mask-ignored": "masked_keys_have_no_influence",
    "sinks-ignored": "an_option_that_is_given_changes_the_output",
    "scale-ignored": "products_beyond_the_range_of_fp16_are_right",
    "softcap-after-bias": "a_constant_bias_moves_the_lse_alone",
    "softcap-without-factor": "a_very_large_softcap_changes_nothing",
    "alibi-sign": "alibi_is_its_bias",
    "alibi-from-top-left": "alibi_is_its_bias",
    "alibi-of-the-first-head": "alibi_is_its_bias",
    "bias-of-the-first-head": "alibi_is_its_bias",
    "mask-of-the-first-entry": "permuting_the_batch_permutes_the_output",
    "sink-left-out-of-the-lse": "a_sink_takes_its_share",
    "top-left-for-bottom-right": "the_last_queries_of_a_prefill_are_those_of_a_chunk",
    "diagonal-hidden": "the_diagonal_is_seen",
    "heads-interleaved": "grouped_heads_equal_repeated_keys",
    "first-head-for-all": "nothing_leaks_between_heads_and_entries",
    "strides-of-contiguous": "strides_do_not_matter",
    "a-split-by-the-batch": "a_row_does_not_depend_on_its_neighbours_in_the_batch",
    "rows-share-a-maximum": "a_row_does_not_depend_on_the_other_rows",
    "answers-from-a-cache": "no_state_is_kept_between_calls",
    "sums-in-random-order": "the_same_call_twice_gives_the_same_bits",
    "empty-part-merges-to-nan": "merging_the_parts_of_split_keys_gives_the_whole",
    "scales-q-in-place": "inputs_and_what_surrounds_them_are_not_written",
    "output-in-q": "outputs_lie_in_memory_of_their_own",
    "one-buffer-for-all-calls": "outputs_lie_in_memory_of_their_own",
    "reads-beyond-the-last-row": "nothing_outside_the_tensors_is_read",
    "writes-beyond-the-last-row": "inputs_and_what_surrounds_them_are_not_written",
    "offsets-of-32-bits": "offsets_beyond_two_to_the_31_are_right",
    "products-of-32-bits": "offsets_beyond_two_to_the_31_are_right",
    "seeds-torch": "the_state_of_torch_is_left_alone",
    "no-maximum-subtracted": "no_logit_is_too_large_for_the_output",
    "missing-keys-have-score-0": "very_negative_scores_are_scores_like_others",
    "products-in-fp16": "products_beyond_the_range_of_fp16_are_right",
    "nan-swallowed": "nan_in_a_query_reaches_its_row_alone",
    "nan-spreads-over-a-tile": "nan_in_a_query_reaches_its_row_alone",
    "first-tile-of-minus-infinity-nan": "a_logit_of_minus_infinity_has_no_weight",
    "subnormals-flushed": "subnormal_inputs_are_not_zero",
    "truncates-p": "a_repeated_maximum_leaves_no_one_sided_error",
    "rounds-down": "negated_values_negate_the_output",
    "columns-mixed": "columns_of_v_do_not_mix",
    "normaliser-forgets-a-key": "equal_values_are_returned",
    "sign-of-v-lost": "negated_values_negate_the_output",
    "scale-folded-twice": "a_power_of_two_moves_between_q_and_scale",
    "scale-of-the-padded-head": "the_usual_scale_given_changes_nothing",
    "delta-forgotten": "a_shift_of_all_keys_leaves_the_loss",
    "upstream-gradient-ignored": "gradients_scale_with_the_upstream_gradient",
    "upstream-strides-assumed": "the_layout_of_the_upstream_gradient_does_not_matter",
    "dq-not-scaled": "dq_and_dk_agree",
    "dk-of-the-last-head": "gradients_of_shared_keys_are_summed_over_the_group",
    "dv-of-rounded-weights-twice": "dv_and_the_output_agree",
    "other-alignment-in-backward": "dv_and_the_output_agree",
    "backward-not-causal": "future_keys_do_not_reach_dq",
    "another-dropout-in-backward": "backward_drops_the_weights_that_forward_dropped",
    "softcap-not-in-backward": "gradients_are_derivatives_of_the_output",
    "gradients-in-random-order": "gradients_twice_have_the_same_bits",
    "padding-in-gradients": "padding_does_not_reach_the_gradients",
    "tail-of-dk-unwritten": "without_an_upstream_gradient_all_gradients_are_zero",
    "dbias-of-the-first-entry": "gradients_of_bias_and_sinks_add_up_over_the_batch",
    "dbias-at-hidden-keys": "a_bias_at_hidden_keys_has_no_gradient",
    "dsinks-sign": "gradients_of_bias_and_sinks_are_derivatives_of_the_output",
    "dsinks-left-over": "gradients_of_bias_and_sinks_scale_with_the_upstream_gradient",
    "dsinks-of-the-first-entry": "gradients_of_bias_and_sinks_add_up_over_the_batch",
    "sink-not-in-delta": "a_shift_of_all_logits_leaves_the_loss",
    "dropout-keeps-p": "dropout_keeps_the_share_that_it_says",
    "dropout-not-scaled": "kept_weights_are_scaled_up",
    "dropout-same-for-all-rows": "weights_are_dropped_independently",
    "dropout-same-for-all-heads": "weights_are_dropped_independently",
    "dropout-seed-ignored": "another_seed_drops_other_weights",
    "dropout-new-in-every-call": "the_same_seed_drops_the_same_weights",
}

# Registers itself here, so that whoever asks for LAWLESS has all of them.
from effattn.zoo import lawless_quiet as lawless_quiet  # noqa: E402
