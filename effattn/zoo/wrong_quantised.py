"""Kernels whose operands are quantised, with a mistake in it; judged by what the right kernel declares."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch

from effattn.zoo import specimen
from effattn.zoo.eight_bits import CODES, E4M3, E5M2, INT8, EightBits, Scaled

if TYPE_CHECKING:
    from collections.abc import Callable

    from effattn.case import Case

_T = TypeVar("_T", bound=type[EightBits])

TENSOR, BLOCK = EightBits(), EightBits(scales="block")
INT8_BLOCK = EightBits(dtype=INT8, scales="block", v_dtype=None, p_dtype=None, offset=0.0)


def _several_blocks(case: Case) -> bool:
    return case.kv_len > 64 and case.q_len > 0


def _something(case: Case) -> bool:
    return case.kv_len > 1 and case.q_len > 0


def _many_rows(case: Case) -> bool:
    return case.batch * case.heads * case.q_len >= 128 and case.kv_len > 16


def wrong(
    name: str, right: EightBits, shows: Callable[[Case], bool] = _something, **changes: object
) -> Callable[[_T], _T]:
    """Register a kernel made as the right one is, with some parameters changed, and judged by what that declares."""

    def register(kernel: _T) -> _T:
        made = kernel(**{**vars(right), **changes})  # type: ignore[arg-type]
        made.__dict__["__doc__"] = kernel.__doc__
        specimen.quantised(name, right.numerics, is_right=False, shows=shows)(made)
        return kernel

    return register


def _with_scale(x: Scaled, scale: torch.Tensor) -> Scaled:
    return Scaled(x.codes, scale)


@wrong("k-scale-of-last-block-forgotten", BLOCK, _several_blocks)
class KScaleForgotten(EightBits):
    """The scores of the last block of keys are not multiplied by the scale of K."""

    def scores(self, q: Scaled, k: Scaled, factor: float) -> torch.Tensor:
        if k.codes.shape[2] < self.block:
            k = _with_scale(k, torch.ones_like(k.scale))
        return super().scores(q, k, factor)


@wrong("k-scale-of-the-block-before", BLOCK, _several_blocks)
class KScaleOfNeighbour(EightBits):
    """Each block of keys after the first is multiplied by the scale of the block before."""

    def expand(self, x: Scaled, group: int) -> Scaled:
        x = super().expand(x, group)
        if x.codes.shape[2] <= self.rows:
            return x
        first = x.scale[:, :, :1].expand(-1, -1, self.rows, -1)
        return _with_scale(x, torch.cat([first, x.scale[:, :, : -self.rows]], 2))


@wrong("v-scale-of-the-head-before", replace(TENSOR, scales="kv-head"), lambda case: case.kv_heads > 1)
class VScaleOfOtherHead(EightBits):
    """V is multiplied by the scale of another head."""

    def values(self, v: torch.Tensor) -> Scaled:
        x = super().values(v)
        return _with_scale(x, x.scale.roll(1, 1))


@wrong("q-scale-of-first-block", BLOCK, lambda case: case.q_len > 64 and case.kv_len > 1)
class QScaleOfFirst(EightBits):
    """All queries are multiplied by the scale of the first block."""

    def scores(self, q: Scaled, k: Scaled, factor: float) -> torch.Tensor:
        return super().scores(_with_scale(q, q.scale[:, :, :1]), k, factor)


@wrong("quantised-twice", BLOCK, _many_rows)
class QuantisedTwice(EightBits):
    """Q, K and V become codes with a scale per tensor, and these become codes with a scale per block."""

    def quantise(self, x: torch.Tensor, dtype: torch.dtype, scales: str, group: int = 1) -> Scaled:
        first = super().quantise(x, dtype, "tensor", group)
        return super().quantise(first.codes.float() * first.scale, dtype, scales, group)


@wrong("k-quantised-from-bf16", TENSOR, lambda case: _many_rows(case) and case.dtype == "fp16")
class FromBF16(EightBits):
    """What is rounded to codes was rounded to bf16 before."""

    def encode(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return super().encode((x / scale).bfloat16().float(), torch.ones_like(scale), dtype)


def _toward_zero(x: torch.Tensor) -> torch.Tensor:
    """Not negative fp32 cut off to e4m3."""
    spacing = torch.exp2(torch.floor(torch.log2(x.clamp(min=2.0**-6))) - 3.0)
    return ((x / spacing).floor() * spacing).to(E4M3)


@wrong("p-toward-zero", TENSOR, _many_rows)
class PTowardZero(EightBits):
    """P is cut off to e4m3 instead of rounded."""

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return _toward_zero(p)


@wrong("p-saturates", TENSOR, _many_rows)
class PSaturates(EightBits):
    """An offset of 2^9: the largest weights are 512, and e4m3 ends at 448."""

    def exponent(self) -> float:
        return 9.0

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return p.clamp(max=448.0).to(E4M3)

    def finish(
        self, total: torch.Tensor, acc: torch.Tensor, top: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().finish(0.5 * total, 0.5 * acc, top, dtype)


@wrong("p-offset-forgotten", TENSOR)
class OffsetForgotten(EightBits):
    """The output is not divided by the offset of P."""

    def finish(
        self, total: torch.Tensor, acc: torch.Tensor, top: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(total, acc, top, dtype)
        return (out.float() * 2.0**self.offset).to(dtype), lse


@wrong("p-offset-in-lse", TENSOR)
class OffsetInLSE(EightBits):
    """The offset of P stays in the log-sum-exp."""

    def finish(
        self, total: torch.Tensor, acc: torch.Tensor, top: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(total, acc, top, dtype)
        return out, lse + self.offset * math.log(2.0)


@wrong("p-without-offset", TENSOR, lambda case: _many_rows(case) and case.kv_len > 128)
class NoOffset(EightBits):
    """P is rounded without its offset: weights below 2^-10 of the largest are lost."""

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return ((p * 2.0**-self.offset).to(E4M3).float() * 2.0**self.offset).to(E4M3)


@wrong("p-in-e5m2", TENSOR, _many_rows, p_dtype=E5M2)
class PInE5M2(EightBits):
    """P as e5m2, one bit less than declared."""


@wrong("k-in-e5m2", TENSOR, _many_rows)
class KInE5M2(EightBits):
    """The codes are those of e5m2 where e4m3 is declared."""

    def quantise(self, x: torch.Tensor, dtype: torch.dtype, scales: str, group: int = 1) -> Scaled:
        return super().quantise(x, E5M2, scales, group)


@wrong("codes-toward-zero", INT8_BLOCK, _many_rows)
class CodesCut(EightBits):
    """Codes are cut off instead of rounded."""

    def encode(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (x / scale).trunc().to(dtype)


@wrong("codes-wrap", INT8_BLOCK, _several_blocks)
class CodesWrap(EightBits):
    """The scale is amax / 128: the largest entries become 128, which is -128 in 8 bits."""

    def scale_of(self, largest: torch.Tensor, top: float) -> torch.Tensor:
        return super().scale_of(largest, 128.0)

    def encode(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        codes = (x / scale).round().int()
        return torch.where(codes == 128, -128, codes).to(dtype)


@wrong("scale-is-a-power-of-two", BLOCK, _many_rows)
class PowerOfTwo(EightBits):
    """Scales are rounded up to powers of two, which is not what is declared."""

    def scale_of(self, largest: torch.Tensor, top: float) -> torch.Tensor:
        return torch.exp2(torch.ceil(torch.log2(super().scale_of(largest, top))))


@wrong("scale-of-codes-in-bf16", TENSOR, _many_rows)
class ScaleInBF16(EightBits):
    """Scales are rounded to bf16, so some codes are others."""

    def scale_of(self, largest: torch.Tensor, top: float) -> torch.Tensor:
        return super().scale_of(largest, top).bfloat16().float()


@wrong("amax-of-first-rows", TENSOR, lambda case: _many_rows(case) and case.q_len > 16)
class AmaxOfFirstRows(EightBits):
    """The largest magnitude is that of the first 16 rows; larger entries saturate."""

    def largest(self, x: torch.Tensor, scales: str, group: int) -> torch.Tensor:
        return super().largest(x[:, :, :16], scales, group)


@wrong("scores-in-input-dtype-of-codes", replace(BLOCK, p_dtype=None, v_dtype=None, offset=0.0), _many_rows)
class ScoresRounded(EightBits):
    """Scores rounded to fp16 before they are multiplied by the scales."""

    def scores(self, q: Scaled, k: Scaled, factor: float) -> torch.Tensor:
        product = (q.codes.float() @ k.codes.float().mT * 2.0**-8).half().float() * 2.0**8
        return product * (q.scale * factor) * k.scale.mT


assert CODES[E4M3][1] == torch.finfo(E4M3).max
