"""Number formats as data, correct rounding into them, and distances inside them.

Each row of `FORMATS` gives a format's precision and exponent range; everything else (unit roundoff, largest
value, smallest subnormal) follows from those and is computed by the formula that defines it, so that no constant
can disagree with another.

torch converts float64 to fp16 and bf16 through fp32, which rounds twice and is wrong for values that fp32 rounds
onto a tie. `round_to` rounds once.

Functions of arrays take torch tensors on any device and numpy arrays, and give back the same kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    #: float64 values, in either kind of array
    Array = TypeVar("Array", torch.Tensor, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True)
class Format:
    """A binary floating-point format: values +-m * 2**(e - precision + 1), m an integer below 2**precision."""

    #: short name, as in a case's `dtype`
    name: str
    #: significant bits, the hidden one included
    precision: int
    #: exponent of the smallest normal number, 2**emin
    emin: int
    #: exponent of the largest binade
    emax: int
    #: attribute of `torch` that names the dtype, or None where torch has no such dtype
    torch_name: str | None
    #: where torch has no dtype: the one that holds every value of this format
    holder: str | None = None
    #: False where the top code is NaN instead of infinity, so values beyond the largest become NaN
    has_inf: bool = True
    #: True for integers, which have one spacing everywhere: every one lies in or below the only binade
    integer: bool = False

    @property
    def unit_roundoff(self) -> float:
        """u = 2**-precision: half the distance from 1 to the next larger number."""
        return 2.0**-self.precision

    @property
    def unit_roundoff_text(self) -> str:
        """The expression behind `unit_roundoff`, for messages."""
        return f"2^-{self.precision}"

    @property
    def largest(self) -> float:
        """The largest finite number; formats without infinity give up the last code of the top binade to NaN."""
        steps = 1 if self.has_inf else 2
        return (2.0 - steps * 2.0 ** (1 - self.precision)) * 2.0**self.emax

    @property
    def smallest_normal(self) -> float:
        """2**emin."""
        return 2.0**self.emin

    @property
    def smallest_subnormal(self) -> float:
        """2**(emin - precision + 1), the spacing of the numbers below 2**emin."""
        return 2.0 ** (self.emin - self.precision + 1)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype that holds the format's values (fp32 for tf32)."""
        import torch

        return getattr(torch, self.torch_name or self.holder or "float64")

    def ulp(self, x: Array) -> Array:
        """The spacing of the format at |x|: 2**(max(floor(log2 |x|), emin) - precision + 1).

        x: float64 of any shape. At 0 and below the normal range this is the smallest subnormal; beyond the largest
        number it is the spacing of the top binade; NaN gives the same (test for NaN beforehand).
        """
        spacing: Any = _binade(x, self)
        spacing *= 2.0 ** (1 - self.precision)
        return spacing

    def round(self, x: Array) -> Array:
        """x (float64) rounded to nearest, ties to even, once; the result stays float64.

        Values that round beyond the largest number become infinite (NaN in a format without infinity);
        the sign of zero, infinities and NaN are kept.
        """
        if self.name == "fp64":
            return x + 0.0
        # Adding 1.5 * 2**52 spacings makes one float64 ulp equal to one spacing of the format, so that
        # float64's own rounding (nearest, ties to even) does the work; subtracting again is exact.
        shift: Any = _binade(x, self)
        shift *= 1.5 * 2.0 ** (53 - self.precision)
        rounded: Any = x + shift
        rounded -= shift
        beyond = abs(rounded) > self.largest
        if beyond.any():
            rounded[beyond] = float("inf") if self.has_inf else float("nan")
        return _library(x).copysign(rounded, x)

    def order(self, x: Array) -> Array:
        """The number's place in the format's order, 0 at zero: neighbours differ by 1, infinity follows the largest.

        x: float64 values that belong to the format. Exact in float64 for precisions up to 42 bits.
        """
        binade: Any = _binade(x, self)
        # In the lowest binade the significand runs from 0 (subnormals) to 2, in every other one from 1 to 2. With
        # the exponent read off the bits, place = (exponent - emin + |significand|) 2^(precision - 1).
        exponent = binade.view(_library(x).int64) >> 52
        place: Any = abs(x).clip(max=2.0 * 2.0**self.emax) / binade
        place += exponent - (self.emin + 1023)
        place *= 2.0 ** (self.precision - 1)
        return _library(x).copysign(place, x)

    def distance(self, a: Array, b: Array) -> Array:
        """How many steps of the format lie between a and b; +0 and -0 are the same number, NaN gives NaN.

        a, b: float64 values that belong to the format. Infinity counts as one step beyond the largest number.
        """
        steps: Any = self.order(a) - self.order(b)
        return abs(steps)


def _library(x: Any) -> Any:
    """numpy for a numpy array, torch for a tensor: the functions used here have the same names."""
    import numpy as np

    if isinstance(x, np.ndarray):
        return np
    import torch

    return torch


def _binade(x: Any, fmt: Format) -> Any:
    """2**floor(log2 |x|) clamped to the format's normal range, read off the exponent bits of float64; writable."""
    import numpy as np

    low, high = 2.0**fmt.emin, 2.0**fmt.emax
    if isinstance(x, np.ndarray):
        bits = np.ascontiguousarray(x).view(np.int64) & 0x7FF0_0000_0000_0000
        binade = bits.view(np.float64)
        return np.minimum(np.maximum(binade, low, out=binade), high, out=binade)
    import torch

    bits = x.contiguous().view(torch.int64) & 0x7FF0_0000_0000_0000
    return bits.view(torch.float64).clamp_(min=low, max=high)


#: name -> format. IEEE 754 for fp64, fp32 and fp16; NVIDIA's PTX ISA for tf32 and bf16; the OCP 8-bit floating
#: point specification for e4m3 (which has no infinity) and e5m2. int8 is that of symmetric quantisation, -127 to 127: what
#: rounds beyond saturates where it is made, and here it becomes infinite, so that nobody takes it for a number.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format(name="fp64", precision=53, emin=-1022, emax=1023, torch_name="float64"),
        Format(name="fp32", precision=24, emin=-126, emax=127, torch_name="float32"),
        Format(name="tf32", precision=11, emin=-126, emax=127, torch_name=None, holder="float32"),
        Format(name="fp16", precision=11, emin=-14, emax=15, torch_name="float16"),
        Format(name="bf16", precision=8, emin=-126, emax=127, torch_name="bfloat16"),
        Format(name="e4m3", precision=4, emin=-6, emax=8, torch_name="float8_e4m3fn", has_inf=False),
        Format(name="e5m2", precision=3, emin=-14, emax=15, torch_name="float8_e5m2"),
        Format(name="int8", precision=7, emin=6, emax=6, torch_name=None, holder="float32", integer=True),
    )
}


def get(name: str) -> Format:
    """The format of that name.

    Raises RequestError, with the names that exist, for any other.
    """
    try:
        return FORMATS[name]
    except KeyError:
        close = get_close_matches(str(name), FORMATS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(
            f"unknown number format {name!r}: expected one of {', '.join(FORMATS)}{hint}"
        ) from None


def round_to(x: torch.Tensor, name: str) -> torch.Tensor:
    """x (float64, any shape) rounded once, to nearest even, into the named format, as a tensor of its dtype.

    tf32 comes back in float32. Subnormals, signed zeros, infinities and NaN are handled as IEEE 754 says;
    values beyond the largest number become infinite (NaN for e4m3).
    """
    fmt = get(name)
    if name in ("fp32", "fp64"):  # hardware conversion, already a single rounding
        return x.to(fmt.torch_dtype)
    return fmt.round(x).to(fmt.torch_dtype)  # exact: the value belongs to the format
