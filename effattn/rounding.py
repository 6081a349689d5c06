"""Float64 to fp16, bf16 and fp32 with one rounding, to nearest, ties to even.

torch converts float64 to its 16-bit types by way of float32. That rounds twice, and the second
rounding sees a tie where there was none: 1 + 2^-11 + 2^-40 becomes 1 in fp16 instead of 1 + 2^-10.
The values of a case are rounded once, so this is done here, in integer arithmetic on the float32
rounded to odd: its last bit remembers that something was cut off.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: the bit pattern of a quiet NaN in each dtype
QUIET_NAN = {"fp16": 0x7E00, "bf16": 0x7FC0, "fp32": 0x7FC00000}


def _odd_float32_bits(x: NDArray[np.float64]) -> NDArray[np.uint32]:
    """`x` rounded to odd in float32: exact where possible, else the neighbour whose last bit is 1.

    A later rounding to nearest in a format with at least two bits fewer then gives what rounding `x`
    itself would have given (S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums",
    IEEE Trans. Computers 57, 2008).
    """
    with np.errstate(over="ignore", under="ignore"):
        nearest = x.astype(np.float32)
    back = nearest.astype(np.float64)
    bits = nearest.view(np.uint32).copy()
    # One below in magnitude is one less as an integer, also from infinity to the largest number.
    bits -= np.abs(back) > np.abs(x)
    bits |= back != x  # a NaN stays one
    return bits


def round_bits(x: NDArray[np.float64], dtype: str) -> NDArray[np.uint16 | np.uint32]:
    """The bit patterns of `x` rounded once to `dtype` ("fp16", "bf16" or "fp32"); NaN becomes a quiet NaN.

    Beyond the largest number by half a spacing or more, the result is an infinity, as IEEE 754 has it.
    """
    if dtype == "fp32":
        with np.errstate(over="ignore", under="ignore"):
            return x.astype(np.float32).view(np.uint32)
    bits = _odd_float32_bits(x)
    if dtype == "bf16":
        rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
        rounded[np.isnan(x)] = QUIET_NAN["bf16"]
        return rounded
    if dtype == "fp16":
        with np.errstate(over="ignore", under="ignore"):
            return bits.view(np.float32).astype(np.float16).view(np.uint16)
    raise ValueError(f"no rounding to {dtype!r}; there are fp16, bf16 and fp32")
