"""Kernels whose formula is right and whose arithmetic is worse than they declare."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from effattn.zoo.specimen import HALF, wrong
from effattn.zoo.tiled import LOG2E, Flash, State
from effattn.zoo.wrong_kernels import _OtherScale, _several_blocks, _something

if TYPE_CHECKING:
    from effattn.case import Case

_BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23}


def _many_rows(case: Case) -> bool:
    """Enough rows for a direction to be told from chance."""
    return case.batch * case.heads * case.q_len >= 128 and case.kv_len >= 8


def truncate(x: torch.Tensor, bits: int) -> torch.Tensor:
    """fp32 rounded toward zero to so many bits after the leading one."""
    return (x.contiguous().view(torch.int32) >> (23 - bits) << (23 - bits)).view(torch.float32)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    return truncate(x.float(), 10)


@wrong("scores-in-input-dtype", HALF, _many_rows)
class ScoresRounded(Flash):
    """Scores rounded to the inputs' dtype."""

    def scores(self, q: torch.Tensor, k: torch.Tensor, factor: float) -> torch.Tensor:
        return self.dot(q, k.mT).to(q.dtype).float() * factor


@wrong(
    "scaled-q-in-input-dtype",
    HALF,
    lambda case: _many_rows(case) and math.frexp(case.softmax_scale)[0] != 0.5,
)
class ScaledQueries(Flash):
    """Q times scale, rounded to the inputs' dtype."""

    def scores(self, q: torch.Tensor, k: torch.Tensor, factor: float) -> torch.Tensor:
        return self.dot((q.float() * (factor / LOG2E)).to(q.dtype), k.mT) * LOG2E


@wrong("accumulator-in-input-dtype", HALF, lambda case: _many_rows(case) and case.kv_len > 192)
class AccumulatorRounded(Flash):
    """The accumulator is stored in the inputs' dtype after each block."""

    def part(self, *args: object, **options: object) -> State:
        object.__setattr__(self, "dtype", args[2].dtype)  # type: ignore[attr-defined]
        return super().part(*args, **options)  # type: ignore[arg-type]

    def keep(self, acc: torch.Tensor) -> torch.Tensor:
        return acc.to(self.__dict__["dtype"]).float()


@wrong("p-truncated", HALF, _many_rows)
class Truncated(Flash):
    """P rounded toward zero instead of to nearest."""

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return truncate(p, _BITS[dtype])


@wrong("p-truncated-everywhere", HALF, _many_rows)
class TruncatedEverywhere(Truncated):
    """P rounded toward zero, and l the sum of that."""

    def summed(self, p: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
        return cast.float().sum(-1)

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return super().finish(state, dtype)[0], None  # type: ignore[return-value]


@wrong("p-in-e4m3", HALF, _many_rows)
class EightBitWeights(Flash):
    """P in 8 bits."""

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return p.to(torch.float8_e4m3fn).float()


@wrong("output-times-1-001", shows=_many_rows)
class OutputTimes(Flash):
    """The result times 1.001, then rounded."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        state.acc = state.acc * 1.001
        return super().finish(state, dtype)


@wrong("rounded-output-times-1-001", ("fp16", "fp32"), _many_rows)
class RoundedOutputTimes(Flash):
    """The rounded result times 1.001, rounded again; in bf16 that is the same number."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (out.float() * 1.001).to(out.dtype)


@wrong("output-truncated", HALF, _many_rows)
class OutputTruncated(Flash):
    """The output rounded toward zero."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(state, torch.float32)
        return truncate(out, _BITS[dtype]).to(dtype), lse


@wrong("output-through-bf16", ("fp16", "fp32"), _something)
class ThroughBf16(Flash):
    """The output rounded to bf16 before its dtype."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return out.to(torch.bfloat16).to(out.dtype)


@wrong("l-in-bf16", shows=_many_rows)
class SumInBf16(Flash):
    """The normaliser kept in bf16."""

    def carry_sum(self, total: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return super().carry_sum(total, decay).to(torch.bfloat16).float()

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        state.total = state.total.to(torch.bfloat16).float()
        return super().finish(state, dtype)[0], None  # type: ignore[return-value]


@wrong("tf32-products", ("fp32",), _something)
class Tf32(Flash):
    """Operands of both products cut to tf32 in fp32 mode."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return to_tf32(a) @ to_tf32(b)


@wrong("fp16-products", ("fp32",), _something)
class Fp16Products(Flash):
    """fp32 inputs rounded to fp16 for both products."""

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a.half().float() @ b.half().float()


@wrong("exp2-of-degree-3", ("fp32",), _something)
class ExpOfDegree3(Flash):
    """exp2 by FlashAttention-4's polynomial of degree 3: relative error 8.8e-5."""

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        whole = torch.floor(x).clamp(min=-200.0)
        f = torch.where(x == -math.inf, 0.0, x - whole)
        value = ((0.077119089 * f + 0.227564394) * f + 0.695146143) * f + 1.0
        return torch.where(x == -math.inf, 0.0, torch.ldexp(value, whole))


@wrong("log2e-of-5-digits", ("fp16", "fp32"), lambda case: _many_rows(case) and case.values != "uniform")
class ShortLog2e(Flash):
    """log2(e) = 1.4426."""

    def scale(self, q: torch.Tensor, scale: float | None) -> float:
        return super().scale(q, scale) / LOG2E * 1.4426

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return super().finish(state, dtype)[0], None  # type: ignore[return-value]


@wrong("scale-in-bf16", shows=lambda case: _many_rows(case) and case.head_dim in (7, 17, 33, 40, 80))
class ScaleInBf16(_OtherScale):
    """The scale rounded to bf16."""

    def other(self, scale: float, d: int) -> float:
        return float(torch.tensor(scale).to(torch.bfloat16))

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return super().finish(state, dtype)[0], None  # type: ignore[return-value]


@wrong("decay-in-input-dtype", HALF, lambda case: _many_rows(case) and _several_blocks(case))
class DecayRounded(Flash):
    """The factor of the accumulator rounded to the inputs' dtype, that of l not."""

    def part(self, *args: object, **options: object) -> State:
        object.__setattr__(self, "dtype", args[2].dtype)  # type: ignore[attr-defined]
        return super().part(*args, **options)  # type: ignore[arg-type]

    def carry(self, acc: torch.Tensor, decay: torch.Tensor, state: State) -> torch.Tensor:
        return super().carry(acc, decay.to(self.__dict__["dtype"]).float(), state)


@wrong("biased-along-v", shows=_many_rows)
class BiasedAlongV(Flash):
    """Half a unit roundoff of V's mean added to every row."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        u = 2.0 ** -(_BITS[dtype] + 1)
        state.acc = state.acc + 0.5 * u * state.acc.mean(2, keepdim=True)
        return super().finish(state, dtype)


@wrong("noise-of-1-5-deviations", HALF, lambda case: _many_rows(case) and case.kv_len > 30)
class NoisyOutput(Flash):
    """Rounding noise of 1.5 times the usual size."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(state, torch.float32)
        u = 2.0 ** -(_BITS[dtype] + 1)
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.device)
        return (out + 0.425 * u * 1.6 * out.square().mean(-1, keepdim=True).sqrt() * noise).to(dtype), lse


@wrong("one-element-wrong", shows=_something)
class OneElement(Flash):
    """One element is 5 percent (of the output's size) off."""

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        flat = out.reshape(-1)
        if flat.numel():
            flat[flat.numel() // 2] += 0.05 * out.float().abs().max().to(out.dtype)
        return flat.reshape(out.shape)


@wrong(
    "smallest-weights-dropped",
    shows=lambda case: _many_rows(case) and case.values == "normal" and case.kv_len > 30,
)
class SmallWeightsDropped(Flash):
    """Weights below 2^-6 of the largest count as nothing."""

    def weights(self, s: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        p = super().weights(s, top)
        return torch.where(p < 2.0**-6, 0.0, p)

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return super().finish(state, dtype)[0], None  # type: ignore[return-value]
