"""Correct kernels that are written differently. None of them may ever be called wrong."""

from __future__ import annotations

import math

import torch

from effattn.errors import NotSupported
from effattn.methods.torch_sdpa import FLUSHES, flushes_bf16
from effattn.zoo.specimen import right
from effattn.zoo.tiled import LOG2E, Flash, State


def _plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: str,
    scale: float | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (masked, in dtype), V for each head, and which rows see a key."""
    flash = Flash()
    heads = q.shape[1]
    k, v = flash.expand(k, heads), flash.expand(v, heads)
    s = q.to(dtype) @ k.to(dtype).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    visible = flash.visible(q.shape[2], k.shape[2], torch.arange(k.shape[2], device=q.device), causal)
    return s.masked_fill(~visible, -math.inf), v, visible.any(-1)


@right("flash")
class _Flash(Flash):
    """The tile-by-tile kernel with 64 keys a step."""


@right("flash-block-16")
def _block_16(*args: torch.Tensor, **options: object) -> object:
    """16 keys a step."""
    return Flash(block=16)(*args, **options)  # type: ignore[arg-type]


@right("flash-block-256")
def _block_256(*args: torch.Tensor, **options: object) -> object:
    """256 keys a step."""
    return Flash(block=256)(*args, **options)  # type: ignore[arg-type]


@right("flash-reversed")
def _reversed(*args: torch.Tensor, **options: object) -> object:
    """The last block of keys first."""
    return Flash(block=32, reverse=True)(*args, **options)  # type: ignore[arg-type]


@right("flash-split-kv")
def _split(*args: torch.Tensor, **options: object) -> object:
    """Four parts of the keys, each by itself, merged by their log-sum-exp; parts may be empty."""
    return Flash(splits=4)(*args, **options)  # type: ignore[arg-type]


@right("flash-two-pass")
def _two_pass(*args: torch.Tensor, **options: object) -> object:
    """The maximum over all keys first, then the weights: nothing is ever rescaled."""
    return Flash(two_pass=True)(*args, **options)  # type: ignore[arg-type]


@right("flash-key-by-key")
def _key_by_key(*args: torch.Tensor, **options: object) -> object:
    """One key a step, as in the online softmax of Milakov and Gimelshein."""
    return Flash(block=1)(*args, **options)  # type: ignore[arg-type]


@right("base-e")
class _BaseE(Flash):
    """exp instead of exp2, without log2(e)."""

    def scale(self, q: torch.Tensor, scale: float | None) -> float:
        return super().scale(q, scale) / LOG2E

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(x)

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, _ = super().finish(state, dtype)
        lse = state.top + torch.log(state.total)
        return out, torch.where(state.total == 0, -math.inf, lse)


@right("scaled-q")
class _ScaledQ(Flash):
    """Q scaled in fp32 before the product."""

    def scores(self, q: torch.Tensor, k: torch.Tensor, factor: float) -> torch.Tensor:
        return (q.float() * factor) @ k.float().mT


@right("term-by-term")
class _TermByTerm(Flash):
    """Dot products one term at a time, product and sum rounded separately: no fused multiply-add."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.float(), b.float()
        total = torch.zeros((*a.shape[:-1], b.shape[-1]), dtype=torch.float32, device=a.device)
        for i in range(a.shape[-1]):
            total = total + a[..., i, None] * b[..., i, None, :]
        return total


@right("one-running-sum")
class _OneRunningSum(_TermByTerm):
    """The accumulator goes through all keys in turn, and so does l: the longest chain of roundings there is."""

    def step(self, state: State, s: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
        top = self.growth(s, state.top)
        safe = torch.where(top == -math.inf, 0.0, top)
        decay = self.decay(state.top, safe)
        p = self.weights(s, safe)
        cast = self.cast(p, dtype).float()
        total, acc = state.total * decay, state.acc * decay[..., None]
        for j in range(s.shape[-1]):
            total = total + p[..., j]
            acc = acc + cast[..., j, None] * v[..., j, None, :].float()
        state.total, state.acc, state.top = total, acc, top


@right("pairwise-sums")
class _PairwiseSums(Flash):
    """All sums over keys and features by halves."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a.float(), b.float()
        n = a.shape[-1]
        if n == 1:
            return a * b
        half = n // 2
        return self.dot(a[..., :half], b[..., :half, :]) + self.dot(a[..., half:], b[..., half:, :])


@right("compensated")
class _Compensated(Flash):
    """Kahan's sum for l and the accumulator over the blocks."""

    def part(self, *args: object, **options: object) -> State:
        self.__dict__["lost"] = None
        return super().part(*args, **options)  # type: ignore[arg-type]

    def step(self, state: State, s: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
        top = self.growth(s, state.top)
        safe = torch.where(top == -math.inf, 0.0, top)
        decay = self.decay(state.top, safe)
        p = self.weights(s, safe)
        lost = self.__dict__["lost"]
        lost = [torch.zeros_like(state.total), torch.zeros_like(state.acc)] if lost is None else lost
        new = []
        for i, (old, more, factor) in enumerate(
            ((state.total, p.sum(-1), decay), (state.acc, self.dot(self.cast(p, dtype), v), decay[..., None]))
        ):
            old, lack = old * factor, lost[i] * factor
            y = more - lack
            total = old + y
            lost[i] = (total - old) - y
            new.append(total)
        self.__dict__["lost"] = lost
        state.total, state.acc, state.top = new[0], new[1], top


@right("late-rescale")
class _LateRescale(Flash):
    """Rescales only if the maximum grew by more than 8 (FlashAttention-4): P and l reach 2^8 in between."""

    def growth(self, s: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        new = super().growth(s, top)
        return torch.where((new > top + 8.0) | (top == -math.inf), new, top)


@right("fp32-matmul-softmax")
def _fp32(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: str = "none", scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything in fp32 by torch's matmul and softmax, P included, one rounding at the end."""
    s, values, seen = _plain(q, k, v, causal, scale, torch.float32)
    out = torch.nan_to_num(s.softmax(-1)) @ values.float()
    return torch.where(seen[:, None], out, 0.0).to(q.dtype), s.logsumexp(-1)


@right("weights-normalised-first")
def _normalised_first(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: str = "none", scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax in fp32, then P rounded to the inputs' dtype for the product with V."""
    s, values, seen = _plain(q, k, v, causal, scale, torch.float32)
    p = torch.nan_to_num(s.softmax(-1)).to(q.dtype)
    out = p.float() @ values.float()
    return torch.where(seen[:, None], out, 0.0).to(q.dtype), s.logsumexp(-1)


@right("fp64-inside")
def _fp64(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: str = "none", scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Everything in fp64, the output rounded at the end."""
    s, values, seen = _plain(q, k, v, causal, scale, torch.float64)
    out = torch.nan_to_num(s.softmax(-1)) @ values.double()
    return torch.where(seen[:, None], out, 0.0).to(q.dtype), s.logsumexp(-1).float()


@right("torch-sdpa")
def _sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: str = "none", scale: float | None = None
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, whichever of its kernels it takes, with a mask where it is causal."""
    if q.dtype == torch.bfloat16 and flushes_bf16():
        smallest = torch.finfo(torch.bfloat16).smallest_normal
        if any(bool(((x != 0.0) & (x.abs() < smallest)).any()) for x in (q, k, v)):
            raise NotSupported(FLUSHES)
    m, n = q.shape[2], k.shape[2]
    mask = None
    if causal != "none":
        mask = Flash().visible(m, n, torch.arange(n, device=q.device), causal)
    flash = Flash()
    out = torch.nn.functional.scaled_dot_product_attention(
        q, flash.expand(k, q.shape[1]), flash.expand(v, q.shape[1]), attn_mask=mask, scale=scale
    )
    if mask is not None:
        out = torch.where(mask.any(-1)[:, None], out, 0.0)
    return out


@right("shuffled-keys")
def _shuffled(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: str = "none", scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys in random order, masked by their true positions."""

    class Shuffled(Flash):
        def visible(self, m: int, n: int, columns: torch.Tensor, causal: str) -> torch.Tensor:
            return super().visible(m, n, order[columns], causal)

    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(7)).to(k.device)
    return Shuffled()(q, k[:, :, order], v[:, :, order], causal=causal, scale=scale)
