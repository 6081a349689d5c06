"""Random numbers that are the same, bit for bit, on every machine and with every version of numpy.

numpy promises the raw words of a bit generator, but not what its `Generator` makes of them. So only
the words are taken from it (Philox 4x64, ten rounds), and the way from words to uniform and normal
numbers is spelled out here in additions, multiplications, divisions and square roots, which IEEE 754
defines to the last bit. No function of the C library is called: its last bit differs between systems.
Nothing here may use a sum over an axis or a matrix product, whose order of additions is not fixed.
"""

from __future__ import annotations

import hashlib
from math import prod
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

#: elements worked on at a time, so that the temporaries stay in the cache
_CHUNK = 1 << 14

# M. J. Wichura, Algorithm AS 241 (PPND16), Applied Statistics 37 (1988) 477-484: the inverse of the
# normal distribution function with a relative error of about 1e-16. Coefficients from the constant up.
_CENTRE = (
    (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
     4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3),
    (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
     2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3),
)  # fmt: skip
_MIDDLE = (
    (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0,
     3.64784832476320460504e0, 1.27045825245236838258e0, 2.41780725177450611770e-1,
     2.27238449892691845833e-2, 7.74545014278341407640e-4),
    (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
     1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4,
     1.05075007164441684324e-9),
)  # fmt: skip
_FAR = (
    (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0,
     2.96560571828504891230e-1, 2.65321895265761230930e-2, 1.24266094738807843860e-3,
     2.71155556874348757815e-5, 2.01033439929228813265e-7),
    (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
     7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7,
     2.04426310338993978564e-15),
)  # fmt: skip


def _ratio(x: Floats, coefficients: tuple[tuple[float, ...], tuple[float, ...]]) -> Floats:
    """A rational function by Horner's rule. numpy rounds after each operation; nothing is fused."""
    values = []
    for polynomial in coefficients:
        y = np.full_like(x, polynomial[-1])
        for c in polynomial[-2::-1]:
            y *= x
            y += c
        values.append(y)
    return values[0] / values[1]


def _log(x: Floats) -> Floats:
    """Natural logarithm of positive normal numbers, to about 2 ulp, from elementary operations only."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, 2.0 * mantissa, mantissa)
    exponent = exponent - low
    t = (mantissa - 1.0) / (mantissa + 1.0)
    square = t * t
    # log m = 2 atanh t = 2 t (1 + t^2/3 + t^4/5 + ...); |t| < 0.1716, so 11 terms leave less than 2^-56
    series = np.full_like(t, 1.0 / 21.0)
    for n in range(19, 0, -2):
        series *= square
        series += 1.0 / n
    return exponent * 0.6931471805599453 + 2.0 * t * series


def normal_quantile(u: Floats) -> Floats:
    """The inverse of the standard normal distribution function, for 0 < u < 1 (AS 241)."""
    q = u - 0.5
    inside = np.abs(q) <= 0.425
    result = np.where(inside, q, 0.0)
    result *= _ratio(0.180625 - result * result, _CENTRE)
    outside = np.flatnonzero(~inside)
    if outside.size:
        side = q[outside]
        tail = np.sqrt(-_log(np.where(side < 0.0, u[outside], 1.0 - u[outside])))
        size = _ratio(tail - 1.6, _MIDDLE)
        far = np.flatnonzero(tail > 5.0)
        if far.size:
            size[far] = _ratio(tail[far] - 5.0, _FAR)
        result[outside] = np.where(side < 0.0, -size, size)
    return result


class Source:
    """A stream of random numbers named by its parts: the same parts give the same stream, for good."""

    def __init__(self, *parts: str | int) -> None:
        name = "/".join(("effattn", "1", *map(str, parts)))
        digest = hashlib.sha256(name.encode()).digest()
        key = np.array(
            [int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")], np.uint64
        )
        self._generator = np.random.Philox(key=key, counter=0)

    def words(self, count: int) -> NDArray[np.uint64]:
        """The next `count` raw 64-bit words."""
        return self._generator.random_raw(count)

    def uniform(self, shape: tuple[int, ...], low: float = 0.0, high: float = 1.0) -> Floats:
        """Float64 numbers strictly between 0 and 1, on the odd multiples of 2^-53, moved to [low, high]."""
        u = (self.words(prod(shape)) >> np.uint64(12)).astype(np.float64)
        u += 0.5
        u *= 2.0**-52
        if (low, high) != (0.0, 1.0):
            u *= high - low
            u += low
        return u.reshape(shape)

    def sign(self, shape: tuple[int, ...]) -> Floats:
        """-1.0 or 1.0, each with probability one half."""
        bit = self.words(prod(shape)) >> np.uint64(63)
        return (1.0 - 2.0 * bit.astype(np.float64)).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> Floats:
        """Standard normal float64 numbers; none is larger than 8.21 in magnitude."""
        u = self.uniform((prod(shape),))
        for start in range(0, u.size, _CHUNK):
            u[start : start + _CHUNK] = normal_quantile(u[start : start + _CHUNK])
        return u.reshape(shape)
