"""Kernels with a plain mistake: a wrong index, mask, factor or part of the softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from effattn.zoo.specimen import ALL, HALF, wrong
from effattn.zoo.tiled import LOG2E, Flash, State

if TYPE_CHECKING:
    from effattn.case import Case


def _several_blocks(case: Case) -> bool:
    return case.kv_len > 64 and case.q_len > 0


def _causal(case: Case) -> bool:
    return case.causal != "none" and min(case.q_len, case.kv_len) > 1


def _oblong(case: Case) -> bool:
    return case.causal != "none" and case.q_len != case.kv_len and min(case.q_len, case.kv_len) > 0


def _partial_block(case: Case) -> bool:
    return case.kv_len % 64 != 0 and case.q_len > 0 and case.kv_len > 0


def _something(case: Case) -> bool:
    return case.kv_len > 1 and case.q_len > 0


@wrong("zeros", shows=_something)
class Zeros(Flash):
    """Writes nothing but zeros."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(out)


@wrong("mean-of-v", shows=_something)
class MeanOfV(Flash):
    """Averages V and ignores Q and K."""

    def scores(self, q: torch.Tensor, k: torch.Tensor, factor: float) -> torch.Tensor:
        return torch.zeros_like(super().scores(q, k, factor))


@wrong("noise", shows=_something)
class Noise(Flash):
    """Uniform noise with the output's size."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        size = out.float().square().mean().sqrt() * math.sqrt(3.0)
        random = torch.rand(out.shape, generator=torch.Generator().manual_seed(3)).to(out.device)
        return ((2.0 * random - 1.0) * size).to(out.dtype)


class _Shifted(Flash):
    shift = 0

    def visible(self, m: int, n: int, columns: torch.Tensor, causal: str) -> torch.Tensor:
        return super().visible(m, n, columns - self.shift if causal != "none" else columns, causal)


@wrong("causal-one-key-too-many", shows=_causal)
class CausalTooMany(_Shifted):
    """Sees one key of the future."""

    shift = 1


@wrong("causal-one-key-too-few", shows=_causal)
class CausalTooFew(_Shifted):
    """Does not see the key at its own position."""

    shift = -1


@wrong("causal-ignored", shows=_causal)
class CausalIgnored(Flash):
    """Takes the flag and does nothing with it."""

    def visible(self, m: int, n: int, columns: torch.Tensor, causal: str) -> torch.Tensor:
        return super().visible(m, n, columns, "none")


@wrong("other-alignment", shows=_oblong)
class OtherAlignment(Flash):
    """Top-left for bottom-right and the other way round."""

    def visible(self, m: int, n: int, columns: torch.Tensor, causal: str) -> torch.Tensor:
        other = {"bottom-right": "top-left", "top-left": "bottom-right", "none": "none"}
        return super().visible(m, n, columns, other[causal])


@wrong("last-partial-block-dropped", shows=_partial_block)
class PartialBlockDropped(Flash):
    """Divides the number of keys by the block and forgets the rest."""

    def tiles(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        for a, b in super().tiles(begin, end):
            if b - a == self.block:
                yield a, b


class _Padded(Flash):
    """Keys up to a multiple of the block, all zero."""

    def read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = -k.shape[2] % self.block
        return q, torch.nn.functional.pad(k, (0, 0, 0, rest)), torch.nn.functional.pad(v, (0, 0, 0, rest))


@wrong("padding-attended", shows=lambda case: _partial_block(case) and case.causal == "none")
class PaddingAttended(_Padded):
    """Keys beyond kv_len count with score 0 and value 0."""


@wrong("padding-in-l", shows=lambda case: _partial_block(case) and case.causal == "none")
class PaddingInSum(_Padded):
    """Only the normaliser counts the padded keys, with the weight of the maximum."""

    def summed(self, p: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
        return super().summed(p, cast) + 1e-3


@wrong("first-key-dropped", shows=_something)
class FirstKeyDropped(Flash):
    """Starts at key 1."""

    def spans(self, n: int) -> list[tuple[int, int]]:
        return [(min(1, n), n)]


@wrong("last-key-dropped", shows=lambda case: _something(case) and case.causal == "none")
class LastKeyDropped(Flash):
    """Stops one key too early."""

    def spans(self, n: int) -> list[tuple[int, int]]:
        return [(0, max(0, n - 1))]


@wrong("no-rescale-of-acc", shows=_several_blocks)
class NoRescale(Flash):
    """Never rescales the accumulator to a new maximum."""

    def carry(self, acc: torch.Tensor, decay: torch.Tensor, state: State) -> torch.Tensor:
        return acc


@wrong("rescale-missed-once", shows=_several_blocks)
class RescaleMissedOnce(Flash):
    """Does not rescale the accumulator after the first block."""

    def carry(self, acc: torch.Tensor, decay: torch.Tensor, state: State) -> torch.Tensor:
        return acc if state.blocks == 1 else super().carry(acc, decay, state)


@wrong("no-rescale-of-l", shows=_several_blocks)
class NoRescaleOfSum(Flash):
    """Rescales the accumulator, not l."""

    def carry_sum(self, total: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return total


@wrong("rescaled-twice", shows=_several_blocks)
class RescaledTwice(Flash):
    """Multiplies the accumulator by the decay squared."""

    def carry(self, acc: torch.Tensor, decay: torch.Tensor, state: State) -> torch.Tensor:
        return acc * (decay * decay)[..., None]


@wrong("late-rescale-forgets-l", shows=_several_blocks)
class LateRescaleForgetsSum(Flash):
    """Rescales only after growth by more than 1, and then the accumulator only."""

    def growth(self, s: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        new = super().growth(s, top)
        return torch.where((new > top + 1.0) | (top == -math.inf), new, top)

    def carry_sum(self, total: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return total


@wrong(
    "no-maximum", shows=lambda case: case.values in ("large-logits", "negative-logits") and _something(case)
)
class NoMaximum(Flash):
    """Does not subtract the maximum: exp overflows."""

    def growth(self, s: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        return torch.where(s.amax(-1) == -math.inf, top, 0.0)


@wrong("splits-averaged", shows=_something)
class SplitsAveraged(Flash):
    """Merges two halves of the keys as if they weighed the same."""

    def spans(self, n: int) -> list[tuple[int, int]]:
        return [(0, n // 2), (n // 2, n)]

    def merge(self, parts: list[State]) -> State:
        state = super().merge(parts)
        means = [p.acc / torch.where(p.total == 0, 1.0, p.total)[..., None] for p in parts]
        return State(state.top, state.total, sum(means) / len(means) * state.total[..., None])


@wrong(
    "gqa-interleaved",
    shows=lambda case: case.kv_heads > 1 and case.heads > case.kv_heads and _something(case),
)
class Interleaved(Flash):
    """Query head h takes KV head h modulo their number."""

    def expand(self, t: torch.Tensor, heads: int) -> torch.Tensor:
        return t.repeat(1, heads // t.shape[1], 1, 1)


@wrong("next-head", shows=lambda case: case.kv_heads > 1 and _something(case))
class NextHead(Flash):
    """Every head reads the keys and values of the next one."""

    def expand(self, t: torch.Tensor, heads: int) -> torch.Tensor:
        return super().expand(t.roll(-1, 1), heads)


@wrong("first-batch-only", shows=lambda case: case.batch > 1 and _something(case))
class FirstBatchOnly(Flash):
    """No batch offset for V."""

    def read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return q, k, v[:1].expand_as(v)


def _as_if_contiguous(x: torch.Tensor) -> torch.Tensor:
    """The same memory read with the strides of a contiguous tensor (around the end where it is too short)."""
    size = x.untyped_storage().nbytes() // x.element_size()
    memory = torch.as_strided(x, (size,), (1,), 0)
    return memory[(x.storage_offset() + torch.arange(x.numel(), device=x.device)) % size].reshape(x.shape)


@wrong(
    "strides-ignored",
    shows=lambda case: case.layout != "bhsd" and "+offset" not in case.layout and _something(case),
)
class StridesIgnored(Flash):
    """Takes every tensor for contiguous."""

    def read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _as_if_contiguous(q), _as_if_contiguous(k), _as_if_contiguous(v)


class _OtherScale(Flash):
    def other(self, scale: float, d: int) -> float:
        return scale

    def scale(self, q: torch.Tensor, scale: float | None) -> float:
        d = q.shape[-1]
        return self.other(d**-0.5 if scale is None else scale, d) * LOG2E


def _odd_dim(case: Case) -> bool:
    return case.head_dim & (case.head_dim - 1) != 0 and case.scale is None and _something(case)


@wrong("scale-of-padded-head-dim", shows=_odd_dim)
class PaddedScale(_OtherScale):
    """The scale of head_dim rounded up to a power of two."""

    def other(self, scale: float, d: int) -> float:
        return scale * math.sqrt(d / (1 << (d - 1).bit_length()))


@wrong("scale-ignored", shows=lambda case: case.scale is not None and _something(case))
class ScaleIgnored(_OtherScale):
    """Always head_dim^-1/2."""

    def other(self, scale: float, d: int) -> float:
        return d**-0.5


@wrong("scale-times-1-1", shows=_something)
class ScaleTimes(_OtherScale):
    """Ten percent more."""

    def other(self, scale: float, d: int) -> float:
        return scale * 1.1


@wrong("lse-in-base-2", shows=lambda case: case.q_len > 0 and case.kv_len > 0)
class BaseTwo(Flash):
    """The log-sum-exp in log2."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(state, dtype)
        return out, lse * LOG2E


@wrong("lse-without-maximum", shows=_something)
class LseWithoutMaximum(Flash):
    """Forgets to add the maximum back."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, _ = super().finish(state, dtype)
        return out, torch.log(state.total)


def _has_empty_rows(case: Case) -> bool:
    return case.q_len > 0 and (
        case.kv_len == 0 or (case.causal == "bottom-right" and case.q_len > case.kv_len)
    )


@wrong("empty-rows-nan", shows=_has_empty_rows)
class EmptyRowsNan(Flash):
    """0 / 0 in rows that see no key."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        _, lse = super().finish(state, dtype)
        return (state.acc / state.total[..., None]).to(dtype), lse


@wrong("empty-rows-lse-zero", shows=_has_empty_rows)
class EmptyRowsLse(Flash):
    """A log-sum-exp of 0 in rows that see no key."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(state, dtype)
        return out, torch.where(lse == -math.inf, 0.0, lse)


@wrong("last-rows-unwritten", shows=lambda case: case.q_len % 16 != 0 and _something(case))
class LastRowsUnwritten(Flash):
    """Writes whole tiles of 16 queries only."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        out[:, :, out.shape[2] // 16 * 16 :] = 0.0
        return out


@wrong("one-row-of-another-head", shows=lambda case: case.heads > 1 and _something(case))
class RowOfAnotherHead(Flash):
    """One row of the output comes from the next head."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        out[0, 0, -1] = out[0, 1, -1].clone()
        return out


@wrong("rows-shifted", shows=lambda case: case.q_len > 1 and case.kv_len > 1)
class RowsShifted(Flash):
    """Each row is written one place too low."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return out.roll(1, 2)


@wrong("stale-output", shows=_something)
class StaleOutput(Flash):
    """The output of inputs that were there before."""

    def read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return q.flip(2), k, v.flip(3) if v.shape[3] > 1 else v.flip(2)


@wrong("scores-capped", shows=lambda case: case.values == "large-logits" and _something(case))
class ScoresCapped(Flash):
    """Clamps scores at 50."""

    def scores(self, q: torch.Tensor, k: torch.Tensor, factor: float) -> torch.Tensor:
        return super().scores(q, k, factor).clamp(max=50.0)


__all__ = ["ALL", "HALF"]
