"""Correct kernels whose operands are quantised, each judged by what it declares."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from effattn.zoo import specimen
from effattn.zoo.eight_bits import INT8, EightBits
from effattn.zoo.matrices import Setting, Whole

if TYPE_CHECKING:
    from collections.abc import Callable


def right(name: str, kernel: EightBits, what: str) -> None:
    """Register a kernel of those parameters."""
    specimen.quantised(name, kernel.numerics, is_right=True)(_documented(kernel, what))


def _documented(kernel: EightBits, what: str) -> Callable[..., Any]:
    def attention(*args: Any, **keywords: Any) -> Any:
        return kernel(*args, **keywords)

    attention.__doc__ = what
    return attention


right(
    "fp8-tensor",
    EightBits(),
    "FlashAttention-3 in e4m3: a scale per tensor, P as e4m3 after an offset of 2^8.",
)
right(
    "fp8-kv-head",
    EightBits(scales="kv-head", reciprocal=True, block=128),
    "A scale per (batch, KV head), codes by the scale's reciprocal, 128 keys a step.",
)
right(
    "fp8-block",
    EightBits(scales="block", reverse=True),
    "A scale for each 64 rows of Q, K and V; the last block of keys first.",
)
right(
    "fp8-block-32",
    EightBits(scales="block", rows=32, block=16, scaled_q=True),
    "A scale for each 32 rows, 16 keys a step, Q multiplied by the softmax scale before it is quantised.",
)
right(
    "fp8-row",
    EightBits(scales="block", rows=1, v_scales="tensor"),
    "A scale for each row of Q and K, one for V.",
)
right(
    "int8-block",
    EightBits(dtype=INT8, scales="block", v_dtype=None, p_dtype=None, offset=0.0, scaled_q=True),
    "SageAttention with sums in fp32: Q and K as int8 with a scale for each 64 rows, P and V in the inputs' dtype.",
)
right(
    "int8-fp8",
    EightBits(dtype=INT8, scales="block", v_scales="channel", offset=8.0),
    "SageAttention2: Q and K as int8 with a scale for each 64 rows, P and V as e4m3, V with a scale per channel.",
)
right(
    "int8-all",
    EightBits(
        dtype=INT8, scales="head", v_dtype=INT8, v_scales="channel", p_dtype=INT8, offset=math.log2(127.0)
    ),
    "Q, K, V and P as int8: a scale per head, per channel of V, and 127 for P.",
)
right(
    "fp8-cast",
    EightBits(scales="none"),
    "Q, K and V rounded to e4m3 as they are, without a scale.",
)


class _Dequantised(Whole):
    """With every option: codes are turned back to fp32 before they are multiplied."""

    def __init__(self, codes: EightBits, what: str) -> None:
        self.codes = codes
        self.__doc__ = what

    def forward(
        self, setting: Setting, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        codes, group = self.codes, q.shape[1] // k.shape[1]
        a, b, c = (
            x.codes.float() * x.scale
            for x in (
                codes.quantise(q.float(), codes.dtype, codes.scales, group),
                codes.quantise(k.float(), codes.dtype, codes.scales),
                codes.values(v),
            )
        )
        found = super().forward(setting, a, b, c, bias, sinks)
        out = found[2] / (1.0 - setting.dropout)
        return out.to(q.dtype), found[1], out

    def dropped(self, p: torch.Tensor, setting: Setting) -> torch.Tensor:
        """The factor of kept weights comes last: P multiplied by more than 1 would be beyond e4m3's largest number."""
        return p * self.keep(setting, tuple(p.shape), p.device) if setting.dropout else p

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        offset = 2.0**self.codes.offset
        return self.codes.cast(p * offset, dtype).float() / offset


for _name, _codes, _what in (
    (
        "fp8-tensor-options",
        EightBits(),
        "Every option; codes of e4m3, a scale per tensor, are turned back to fp32.",
    ),
    (
        "fp8-block-options",
        EightBits(scales="block", rows=16, v_scales="channel", offset=0.0),
        "Every option; codes of e4m3, a scale for each 16 rows or channel, turned back to fp32; P without an offset.",
    ),
):
    specimen.quantised(_name, _codes.numerics, is_right=True)(_Dequantised(_codes, _what))
