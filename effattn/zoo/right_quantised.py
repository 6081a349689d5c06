"""Correct kernels whose operands are quantised, each judged by what it declares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effattn.zoo import specimen
from effattn.zoo.eight_bits import INT8, EightBits

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
    "fp8-cast",
    EightBits(scales="none"),
    "Q, K and V rounded to e4m3 as they are, without a scale.",
)
