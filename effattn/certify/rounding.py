"""The correctly rounded value of a number that is known as a ball: decided, or said to be open."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from effattn.certify.balls import ends

if TYPE_CHECKING:
    from flint import arb

    from effattn.tolerances.formats import Format


def round_fraction(x: Fraction, fmt: Format) -> float:
    """x rounded to nearest, ties to even, in integers: the definition, IEEE 754-2019, 4.3.1."""
    if x == 0:
        return 0.0
    size = abs(x)
    binade = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** binade > size:
        binade -= 1
    exponent = max(binade, fmt.emin) - fmt.precision + 1
    steps = size / Fraction(2) ** exponent
    whole = steps.numerator // steps.denominator
    rest = steps - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2):
        whole += 1
    value = Fraction(whole) * Fraction(2) ** exponent
    if value > Fraction(fmt.largest):
        return math.copysign(math.inf, x) if fmt.has_inf else math.nan
    return math.copysign(float(value), x)


def decided(ball: arb, fmt: Format) -> float | None:
    """What every number of the ball rounds to; None where they do not all round to one number."""
    low, high = (round_fraction(end, fmt) for end in ends(ball))
    return low if low == high else None
