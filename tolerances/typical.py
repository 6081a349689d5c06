"""The deviation to expect of most kernels: what z = error / deviation is reported in. No test rests on it.

`envelope` grants every kernel of the numerics enough variance: sums from the first term on, equal terms all rounded to one
side, constants with unlucky mantissas. Most kernels need less, and this is what:

1. The first addition of a sum is exact, and so are additions of 1 (P at the maximum) to a normaliser.
2. Equal terms t, m of them in a running sum, are rounded alike only within a binade of the sum: m / 2 additions in the last
   one, m / 4 in that before with half the spacing, ...; (m^2 / 4) / (1 - 1/16) in place of m^2, relative to random roundings
   with (m / 2) / (1 - 1/8): 0.47 m times their variance.
3. fl(a + b) is off by at most min(|a|, |b|), since both are numbers of the format. So sums with one dominant term are off by no
   more than all others together.
4. Equal keys have equal errors, and those that differ in the last places a part of them. exp(0) = 1 is exact.
5. A last rounding of something that is known far better than to its spacing is known as well. It is spread evenly else.
   Where output and accumulators have one format, the division by l is the last rounding.
6. A constant, rounded once, has the variance of any rounding.

The part in 4 (`sums.EqualKeys.share`) and the width of the limit in `_scores` are estimates from measured errors; the rest is
derived.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from effattn.tolerances import dots
from effattn.tolerances.sums import ALIKE, ROUNDING_VARIANCE

if TYPE_CHECKING:
    from types import SimpleNamespace

    from numpy.typing import NDArray

    from effattn.tolerances.formats import Format
    from effattn.tolerances.numerics import Numerics
    from effattn.tolerances.sums import ScoreErrors

    Floats = NDArray[np.float64]

#: spacings: what is known to within this is rounded to one number, or lies in the middle between two, as far from either
_KNOWN = 0.01


def rounded(fmt: Format, exact: Floats, variance: Floats) -> Floats:
    """The mean square of R(x + e) - x for x = `exact` and e of that variance, of the shape of `exact`."""
    step = fmt.ulp(np.abs(exact))
    square = step * step
    known = variance < square * _KNOWN**2
    square *= 1.0 / 12.0
    if known.any():
        x = exact[known]
        with np.errstate(invalid="ignore", over="ignore"):
            off = np.square(fmt.round(x) - x)
        square[known] = np.where(np.isfinite(off), off, square[known])
    square += variance
    return square


def deviations(
    x: SimpleNamespace,
    numerics: Numerics,
    errors: ScoreErrors,
    *,
    granted: Floats | None,
    running: dict[str, tuple[Floats, Floats]],
    q_norm: Floats,
    o: Floats,
    lse: Floats,
    other: Floats,
    other_lse: Floats | float,
    along_scale: Floats,
    dropout: bool,
    sinks: bool,
) -> tuple[Floats, Floats]:
    """Deviations of output and log-sum-exp from the sums over the keys (`sums.collect`).

    `granted`: what errors of scores are granted to do to the output, where they were judged one by one, else None;
    `running`: coefficients of a running sum over the keys, for "l" and "acc" (`envelope.running_sum`); `q_norm` |scale q|^2;
    `other` and `other_lse` the variance that does not come from the accumulators' format: P's, codes'.
    """
    acc, out, input_ = (numerics.format(name) for name in ("acc", "output", "input"))
    if numerics.v is not None:
        input_ = numerics.multiplied("v")
    var = ROUNDING_VARIANCE * acc.unit_roundoff**2
    n: Floats = x.count
    top = x.top
    # P is 1 at the maximum, unless a sink is the maximum or it is multiplied by something else.
    ones = numerics.normalise == "after" and not dropout and not sinks
    equal = hasattr(x, "equal_w2_v2")
    alike = getattr(x, "top_size", 1.0) if ones else 1.0  # keys where P is 1
    scores, of_lse = _scores(x, errors, granted, q_norm=q_norm, o=o, lse=lse, spare=ones and not equal)
    several = n > 1.0
    a_terms, a_sum = running["acc"]
    pairs = 1.0 + ALIKE * (getattr(x, "same_pairs", 1.0) - 1.0)
    exact_pv = numerics.format("p").precision + input_.precision <= acc.precision
    more = 1.0 if dropout or numerics.normalise == "before" else 0.0  # roundings of P

    l_terms, l_sum = running["l"]
    same = getattr(x, "same_keys", 1.0)
    if ones:
        same = np.maximum((same * n - alike * alike) / np.maximum(n - alike, 1.0), 1.0)
    total = var * (
        np.maximum(l_terms - 1.0 / n, 0.0) * np.maximum(x.w2 - (alike * top * top if ones else 0.0), 0.0)
        + np.where(several, l_sum, 0.0) * (1.0 - alike / n if ones else 1.0)
    )
    total = total * (1.0 + ALIKE * (same - 1.0))

    # Coefficients of sum w^2 v^2 and of o^2: the sum of the products, the products, the sum of the weights, the division.
    of_terms, of_sum = (
        var * pairs * np.maximum(a_terms - 1.0 / n, 0.0),
        var * pairs * np.where(several, a_sum, 0.0),
    )
    of_product = 0.0 if exact_pv else var
    of_others = var * (1.0 if out.precision < acc.precision else 0.0)
    if numerics.normalise == "any":
        of_others = of_others + 2.0 * var * lse * lse
    o2 = o * o
    others = np.maximum(1.0 - top, 0.0)
    dominated = not equal and not sinks and bool((others * others < 10.0 * total).any())
    if dominated:
        rest = np.maximum(x.w_abs - top * np.abs(x.top_v), 0.0)
        sums = np.minimum(x.w2_v2 * of_terms + o2 * of_sum, rest * rest)
        total = np.minimum(total, others * others)
        noise = sums + x.w2_v2 * (of_product + more * var) + o2 * (total + of_others)
    else:
        noise = x.w2_v2 * (of_terms + of_product + more * var) + o2 * (of_sum + total + of_others)
    if of_product and ones:
        noise -= top * top * np.square(x.top_v) * var
    # Sums are those of P, larger than w by 1 / top where P is 1 at the maximum.
    floor = acc.smallest_subnormal * (top if ones else 1.0)
    noise += n * (floor * floor / 12.0) * getattr(x, "same_pairs", 1.0)
    noise += along_scale * along_scale * (2.0 * var)
    noise += other
    noise += scores
    if numerics.dot_block is not None:
        noise += np.square(along_scale * dots.dot_sigma(numerics.dot_block, errors.features))
        of_lse = of_lse / np.maximum(x.w2, 1e-300)  # all scores of a row may be cut alike
    if numerics.value_block is not None:
        noise += np.square(0.5 * (x.w_abs + np.abs(o)) * dots.dot_sigma(numerics.value_block, n))
    noise = np.maximum(noise, 0.0, out=noise)

    # The maximum with its constants, the logarithm, their sum; the product with ln 2 is the last rounding.
    peak = x.peak if hasattr(x, "peak") else lse + np.log(np.maximum(top, 1e-300))
    log_l = lse - peak
    of_lse = of_lse + total + other_lse + var * (2.0 * peak * peak + log_l * log_l + lse * lse)
    return np.sqrt(rounded(out, o, noise)), np.sqrt(rounded(numerics.format("lse"), lse, of_lse))


def _scores(
    x: SimpleNamespace,
    errors: ScoreErrors,
    granted: Floats | None,
    *,
    q_norm: Floats,
    o: Floats,
    lse: Floats,
    spare: bool,
) -> tuple[Any, Any]:
    """What errors of scores do to the output and to the log-sum-exp."""
    if granted is None:
        # One score stands for all: its size is that of the mean, its features are as in an unstructured product.
        d, var = errors.features, errors.gap
        terms, square = q_norm * x.k_most / d, x.ws * x.ws
        each = terms * errors.terms + square * errors.each + (x.ws - lse) ** 2 * var + errors.exp
        partial = (d + 1.0) * (terms / 6.0 + square / 3.0)  # sum of the squares of the partial sums
        # A product of two numbers of p bits is a multiple of 2^(2 - 2 p) of its binade, a partial sum rounded to multiples
        # of 2^-23 of its own: to nothing, where those are smaller. Products are of all sizes, hence no sharp limit.
        steps = partial / np.maximum(terms, 1e-300) * errors.quantum**2
        exact = 1.0 / (1.0 + 16.0 * steps)
        rest = each - var * partial
        product = var * partial * (1.0 - exact) * (1.0 + errors.alike)
        w2_v2, w2 = getattr(x, "equal_w2_v2", x.w2_v2), getattr(x, "equal_w2", x.w2)
        # sum w^2 (v - o)^2, where o is no more like v than chance makes it but for the largest weight.
        o2 = o * o
        size, total = (x.top_size, x.seen_sum) if hasattr(x, "seen_sum") else (1.0, x.top_v)
        largest = x.top * x.top * (-2.0 * size * o * total)
        return (
            np.maximum(product * (w2_v2 + o2 * w2 + largest) + rest * (x.w2_v2 + o2 * x.w2 + largest), 0.0),
            product * w2 + rest * x.w2,
        )
    if hasattr(x, "equal_g"):
        alone = np.maximum(x.g_v2 - 2.0 * o * x.g_v + o * o * x.g, 0.0)
        together = np.maximum(x.equal_g_v2 - 2.0 * o * x.equal_g_v + o * o * x.equal_g, 0.0)
        scores = x.alike * together + (1.0 - x.alike) * alone
        of_lse = x.alike * x.equal_g + (1.0 - x.alike) * x.g
    else:
        scores, of_lse = granted, x.g
    of_lse = of_lse - getattr(x, "g_less", 0.0)
    if spare:
        exp = errors.exp * x.top * x.top
        scores, of_lse = scores - exp * np.square(x.top_v - o), of_lse - exp
    return np.maximum(scores, 0.0), np.maximum(of_lse, 0.0)
