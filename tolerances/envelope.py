"""What a correct kernel of declared numerics may do to each output: a hard bound, and the noise to expect.

Notation: s_j scores of a row (natural units), m their maximum, w_j = exp(s_j - lse) the exact weights, o = sum w_j v_j,
N keys visible, u the unit roundoff of the accumulators, u_p that of P, gamma_n = n u / (1 - n u).

What is computed, to the letter (every relation exact, Higham, Accuracy and Stability, 2.2 and 3.1):

1. A score carries an absolute error of at most b_j, so that its weight is off by a factor 1 + t_j, |t_j| <= e^b_j - 1.
2. P is w_j (1 + t_j)(1 + r_j), |r_j| <= u_p, plus what underflow takes; products and their sum add (1 + a_j).
3. l is sum w_j (1 + t_j)(1 + c_j).

Hence, with l^ the computed and l the exact sum,

    o^ - o = [sum w_j t_j (v_j - o) + sum w_j (1 + t_j)((1 + r_j)(1 + a_j) - 1) v_j - o sum w_j (1 + t_j) c_j] l / l^,

which is the bound once the absolute values are taken. What an error common to a row does to P and l alike cancels, so
neither the maximum that is subtracted nor the order of the blocks matters.

A sum of n terms by any tree of additions is off by at most u sum |node| over the n - 1 inner nodes, and no node is
larger than the sum of the terms of one sign, (sum |t| + |sum t|) / 2. This is half of gamma_n sum |t| or less, for
every order and block size.

The noise replaces each rounding by its variance. A rounding to nearest has relative variance 0.18 u^2 where the
mantissa is log-uniform: (u^2 / 3)(3 / (8 ln 2)). The partial sums of n terms in random order (sampling without
replacement) have E S_k^2 = k (n - k) / (n (n - 1)) T + k (k - 1) / (n (n - 1)) S^2, T = sum t^2, S = sum t, so that a
running sum collects 0.18 u^2 ((n + 1) / 6 T + (n + 1) / 3 S^2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import repeat
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn.exact import Exact
from effattn.exact.blocks import row_blocks, rows_without_keys
from effattn.exact.scores import Options, score_blocks
from effattn.tolerances import dots
from effattn.tolerances.pairs import collect_with_options
from effattn.tolerances.quantise import SCALE_ERROR
from effattn.tolerances.sums import (
    ROUNDING_VARIANCE,
    EqualKeys,
    Largest,
    Precision,
    ScoreErrors,
    collect,
    is_fine,
    score_error,
)
from effattn.tolerances.typical import deviations

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from effattn.tolerances.numerics import Numerics
    from effattn.tolerances.quantise import Radius

    Floats = NDArray[np.float64]

#: a row whose weights may be off by more than this factor is not judged: the first-order picture ends there
LARGEST_WEIGHT_ERROR = 0.5

#: relative error of sums that were done in float32; see `sums.Precision`
FLOAT32_SUMS = 1e-5

#: units in the last place of an exp whose errors have no steady part to speak of
FINE_EXP = 2.0

#: PTX: lg2.approx.f32 is within 2^-22 (absolute) near 1
LOG_ERROR = 2.0**-22


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """Per element, in numpy: (batch, heads, q_len, v_dim) for out, (batch, heads, q_len) for what belongs to a row.

    Rows that see no key have bound 0 and deviation 0: their output is exactly 0.
    """

    #: largest |got - exact| of a correct kernel, the rounding of the output included; inf where not judged
    out_bound: Floats
    #: the same before the output is rounded
    out_reach: Floats
    #: standard deviation of got - exact that is granted to every kernel of the numerics, the rounding of the output included
    out_sigma: Floats
    #: the one to expect of most, see `tolerances.typical`: what z is reported in, and no test rests on
    out_typical: Floats
    #: expected variance before the output is rounded
    out_noise: Floats
    #: the part of `out_noise` that comes from the accumulators' format: everything but the rounding of P
    out_inner: Floats
    #: what a single element may be off by without being a fault, as in the bound: sums of equal terms, lost weights
    out_steady: Floats
    #: the part of it that comes from weights lost to underflow, which has the sign of V in all rows
    out_lost: Floats
    #: bound of the log-sum-exp, and deviation to expect
    lse_bound: Floats
    lse_typical: Floats
    #: variance granted to it, without what the scale's constants do to all scores of a row, which P from scores and log-sum-exp
    #: does not see
    lse_noise: Floats
    #: largest |scale| |q_i| |k_j| over the keys: relative errors of the inputs come out in the weights so many times
    condition: Floats
    #: bool: False where the weights may be off by more than `LARGEST_WEIGHT_ERROR`
    judged: NDArray[np.bool_]
    #: direction in which a wrong scale moves the output: sum w s (v - o)
    along_scale: Floats
    #: direction in which an error of the largest weight against all others moves it: w (v - o) of that key
    along_top: Floats
    #: bool: rows that see a key; None where all but the first `empty_rows` of each head do
    seen: NDArray[np.bool_] | None = None
    #: leading rows of each head that see no key, where `seen` is None
    empty_rows: int

    @property
    def counted(self) -> NDArray[np.bool_] | None:
        """The rows that see a key and are judged; None for all."""
        if self.seen is not None:
            return self.seen & self.judged
        if not self.empty_rows and self.judged.all():
            return None
        counted = self.judged.copy()
        counted[:, :, : self.empty_rows] = False
        return counted


@torch.no_grad()
def forward_envelope(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    numerics: Numerics,
    exact: Exact,
    causal: str = "none",
    scale: float | None = None,
    block: tuple[int, int] | None = None,
    options: Options | None = None,
    radius: Radius | None = None,
) -> Envelope:
    """Bound and noise of the forward pass, in one pass over the keys with O(N d) memory.

    q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_dim) on any
    device, `exact` the exact attention of the same inputs and options. `block` as in `exact.attention`.
    `options` in place of `causal` and `scale` where there are more. Where operands are quantised, q, k and v are what is
    multiplied, and `radius` what they may be off by (`quantise.multiplied`).
    RequestError for shapes that don't go together.
    """
    if numerics.quantised or numerics.narrow_p:
        options = Options(causal=causal, scale=scale) if options is None else options
        return _with_options(q, k, v, numerics=numerics, exact=exact, options=options, radius=radius)
    if options is not None:
        if not options.plain:
            return _with_options(q, k, v, numerics=numerics, exact=exact, options=options)
        causal, scale = options.causal, options.scale
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    shape, dim = tuple(q.shape[:3]), v.shape[3]
    empty = rows_without_keys(q.shape[2], k.shape[2], causal)
    fields: dict[str, Floats] = {}
    blocks = row_blocks(q, k, v, causal=causal, block=block)
    errors = ScoreErrors.of(numerics, q, k)
    fine = is_fine(numerics)
    precision = Precision.of(q, k, exact.lse, scale)
    equal = EqualKeys.of(q, k, v)
    largest = Largest.of(k, v) if k.numel() else None
    grouped = repeat(None) if equal is None else row_blocks(q, k, equal.summed, causal=causal, block=block)
    for rows, groups in zip(blocks, grouped, strict=False):
        lse = rows.read(exact.lse).unsqueeze(-1)
        sums = collect(rows, lse, groups, numerics=numerics, errors=errors, scale=scale, precision=precision)
        assert largest is not None
        sums |= {name: x.cpu().numpy() for name, x in largest.read(rows, q.shape[1], q.shape[2]).items()}
        if equal is not None:
            sums["alike"] = np.asarray(equal.share)
            sums["same_keys"] = rows.read(equal.keys).unsqueeze(-1).cpu().numpy()
            sums["same_pairs"] = rows.read(equal.pairs).unsqueeze(-1).cpu().numpy()
            if causal != "none":
                # A row may not see all of a group, so only the key itself is known to be at the maximum.
                seen = sums["count"] / k.shape[2]
                sums["top_sum"], sums["top_squares"] = sums["top_v"], sums["top_v"] ** 2
                sums["top_size"], sums["seen_sum"] = (
                    np.maximum(sums["top_size"] * seen, 1.0),
                    sums["seen_sum"] * seen,
                )
        with np.errstate(over="ignore", invalid="ignore"):  # rows that are not judged
            result = _finish(
                SimpleNamespace(**sums),
                numerics,
                errors,
                q2=(rows.q * scale).square_().cpu().numpy(),
                o=rows.read(exact.out).cpu().numpy(),
                lse=lse.cpu().numpy(),
                fine=fine,
                scores_in_float32=precision.scores == torch.float32,
            )
        if result["judged"].size == math.prod(shape):
            whole = {name: x.reshape(*shape, *x.shape[2:]) for name, x in result.items()}
            return Envelope(**whole, empty_rows=0)  # pyright: ignore[reportArgumentType]
        for name, x in result.items():
            if name not in fields:
                fields[name] = np.zeros((*shape, *x.shape[2:]), dtype=x.dtype)
            # torch warns of arrays that cannot be written, such as broadcast ones.
            rows.write(torch.from_numpy(fields[name]), torch.from_numpy(x if x.flags.writeable else x.copy()))
    if not fields:  # no row sees a key
        for name in _FIELDS:
            fields[name] = np.zeros((*shape, dim) if name.startswith(("out", "along")) else shape)
        fields["judged"] = np.zeros(shape, dtype=bool)
    fields["judged"][:, :, :empty] = True
    return Envelope(**fields, empty_rows=empty)  # pyright: ignore[reportArgumentType]


def _with_options(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    numerics: Numerics,
    exact: Exact,
    options: Options,
    radius: Radius | None = None,
) -> Envelope:
    """The same from blocks of whole rows, every score judged by itself."""
    shape, dim = tuple(q.shape[:3]), v.shape[3]
    fields: dict[str, Floats] = {
        name: np.zeros((*shape, dim) if name.startswith(("out", "along")) else shape) for name in _FIELDS
    }
    fields["judged"], fields["seen"] = np.ones(shape, dtype=bool), np.zeros(shape, dtype=bool)
    if k.numel() and v.numel() and q.numel():
        errors = ScoreErrors.of(numerics, q, k)
        equal = EqualKeys.of(q, k, v)
        for block in score_blocks(q, k, v, options):
            lse = block.read(exact.lse)
            collected = collect_with_options(
                block, lse, equal, numerics=numerics, errors=errors, options=options, radius=radius
            )
            sums = SimpleNamespace(**collected)
            seen, known = sums.seen > 0.0, (lse > -math.inf).cpu().numpy()
            with np.errstate(over="ignore", invalid="ignore"):  # rows that are not judged
                result = _finish(
                    sums,
                    numerics,
                    errors,
                    q2=(block.q * options.scale_for(q.shape[3])).square_().cpu().numpy(),
                    o=block.read(exact.out).cpu().numpy(),
                    lse=torch.where(lse > -math.inf, lse, 0.0).cpu().numpy(),
                    fine=True,
                    dropout=options.keep is not None,
                    sinks=options.sinks is not None,
                )
            for name, x in result.items():
                x = x[..., None] if x.ndim == 2 else x
                # Without a key the output is 0 exactly; without a sink too, the log-sum-exp is -inf.
                there = known if name.startswith("lse") else seen
                x = x | ~there if name == "judged" else np.where(there, x, 0.0)
                block.write(torch.from_numpy(fields[name]), torch.from_numpy(np.ascontiguousarray(x)))
            block.write(torch.from_numpy(fields["seen"]), torch.from_numpy(seen))
    elif options.sinks is not None:
        # The sink alone is the log-sum-exp, up to its product with log2(e) and back.
        finite = np.where(np.isfinite(exact.lse.cpu().numpy()), np.abs(exact.lse.cpu().numpy()), 0.0)
        fields["lse_bound"] = 8.0 * numerics.format("acc").unit_roundoff * finite
        fields["lse_typical"] = fields["lse_bound"] / 8.0
    return Envelope(**fields, empty_rows=0)  # pyright: ignore[reportArgumentType]


#: the fields of an Envelope that are arrays
_FIELDS = (
    "out_bound", "out_reach", "out_sigma", "out_typical", "out_noise", "out_inner", "out_steady", "out_lost", "lse_bound",
    "lse_typical", "lse_noise", "condition", "judged", "along_scale", "along_top",
)  # fmt: skip


def _finish(
    x: SimpleNamespace,
    numerics: Numerics,
    errors: ScoreErrors,
    *,
    q2: Floats,
    o: Floats,
    lse: Floats,
    fine: bool,
    dropout: bool = False,
    sinks: bool = False,
    scores_in_float32: bool = False,
) -> dict[str, Floats]:
    """Bound and noise from the sums over the keys; q2 is (scale q)^2; `fine` whether scores were judged one by one."""
    acc, p, out, input_ = (numerics.format(name) for name in ("acc", "p", "output", "input"))
    u = acc.unit_roundoff
    u_p = p.unit_roundoff if numerics.rounds_p else 0.0
    narrow = numerics.narrow_p
    operand = numerics.operand_format
    u_v = 0.0 if operand is None else 2.0 * operand.unit_roundoff
    if numerics.v is not None:
        u_v, input_ = SCALE_ERROR, numerics.multiplied("v")
    var = ROUNDING_VARIANCE * u * u
    exact_pv = p.precision + input_.precision <= acc.precision
    before = numerics.normalise != "after"
    n: Floats = x.count
    log_n = np.log(n)
    o_abs = np.abs(o)
    q_norm = q2.sum(-1, keepdims=True)
    condition = np.sqrt(q_norm * x.k_most)
    s_most = np.maximum(x.high, -x.low)

    # Bound. R rescalings at most, two more for merging split keys; each costs an exp and a rounding of l and acc.
    rescales = np.ceil(n / numerics.smallest_block) + 2.0
    common = s_most * (6.0 * u) + rescales * (2.0 * numerics.exp_ulps * u)
    # What P is multiplied by is added to its exponent, and taken off the log-sum-exp again.
    offset = abs(math.log(numerics.p_scale))
    common = common + 3.0 * u * offset
    inexact = score_error(q2.shape[-1], condition, lse) if scores_in_float32 else np.zeros_like(condition)
    common = common + inexact * (6.0 * u + errors.dot + errors.rounded + errors.shifted)
    if fine:
        b_most, wb = x.b_most + common, x.wb + common
    else:
        # |s| and A are at most |q| |k|: crude, but these errors are small beside u_p.
        b_most = condition * (errors.dot + errors.factors + errors.rounded + errors.shifted)
        b_most = b_most + common + errors.shifted * log_n
        # On the average over the weights they are all that the log-sum-exp is off by, and worth a closer look.
        wb = (0.5 * errors.dot + errors.factors) * x.wa + (0.5 * errors.dot + errors.rounded) * x.ws_abs
        wb = np.minimum(wb + errors.shifted * np.maximum(lse - x.ws, 0.0) + common, b_most)
    adds = (n + rescales + 3.0) * u
    # A matrix unit's sums may be worse than one addition a term.
    cut = np.maximum(dots.dot_bound(numerics.value_block, n) - n * u, 0.0)
    worst = np.expm1(b_most)
    stretch = worst / b_most
    total = worst + adds + cut
    sum_of = 0.0
    if numerics.sum_of == "rounded":
        sum_of = x.p_sum if narrow else u_p
    judged = total + sum_of <= LARGEST_WEIGHT_ERROR
    growth = (1.0 + total) * (1.0 + u_p) / (1.0 - total - total * total - (1.0 + total) * sum_of)
    growth *= (1.0 + FLOAT32_SUMS) * (1.0 + 2.0 * inexact)  # exp(x) <= 1 + 2 x for such a small x
    growth[~judged] = math.inf
    product = (
        (0.0 if narrow else u_p)
        + u_v
        + (0.0 if exact_pv else u)
        + (2.0 * u if before else 0.0)
        + (3.0 * u if dropout else 0.0)
    )
    # What flush costs, the sums (half each sign), and the division; then the weights' errors and the products.
    flush = x.flushed * x.v_most
    p_abs = x.p_abs if narrow else 0.0  # sums and products have P as it was rounded
    steady = (x.w_abs + 2.0 * p_abs) * (0.5 * (adds + cut)) + o_abs * (1.5 * adds + 0.5 * cut + 4.0 * u)
    lost = flush + n * acc.smallest_subnormal
    steady += lost
    if fine:
        reach = (x.wb_abs + common * x.w_abs) * stretch + x.w_abs * product
    else:
        reach = x.w_abs * (b_most * stretch + product)
    reach += o_abs * (wb * stretch + sum_of)
    reach += steady
    if narrow:
        reach += p_abs * (1.0 + product)
        lost = lost + x.p_lost
        steady = steady + x.p_lost
    if hasattr(x, "off"):
        # Entries with two codes, which go one way in all rows: what they do to scores is in b already.
        shared = (x.off_abs + o_abs * x.off) * stretch + x.off_v
        reach += x.off_v
        lost = lost + shared
        steady = steady + shared
    else:
        shared = None
    reach *= growth
    bound = out.ulp(o_abs + reach)
    bound *= 0.5
    bound += reach

    # Noise. Equal keys may have equal errors, or not: the larger is granted.
    equal = hasattr(x, "equal_w2_v2")
    if fine:
        lse_scores, all_alike = (np.maximum(x.g, x.equal_g) if equal else x.g), x.w_var
        inner = np.maximum(x.g_v2 - 2.0 * o * x.g_v + o * o * x.g, 0.0)
        if equal:
            inner = np.maximum(inner, x.equal_g_v2 - 2.0 * o * x.equal_g_v + o * o * x.equal_g)
        if numerics.exp_ulps > FINE_EXP:
            # A coarse exp is off by much the same where arguments are alike, not by chance.
            together = np.sqrt(x.w2_v2) + o_abs * np.sqrt(x.w2)
            inner += errors.exp * together * together
    else:
        # sum q^2 k^2 is at most the largest q^2 times |k|^2, and the other way round.
        t2 = np.minimum(q2.max(-1, keepdims=True) * x.k_most, q_norm * x.k_peak)
        lse_scores = (
            t2 * errors.terms + s_most * s_most * errors.each + log_n * log_n * errors.gap + errors.exp
        )
        inner = np.sqrt(np.maximum(x.w2_v2, x.equal_w2_v2) if equal else x.w2_v2)
        inner += o_abs * np.sqrt(np.maximum(x.w2, x.equal_w2) if equal else x.w2)
        inner *= inner
        inner *= lse_scores
        all_alike = lse_scores
        lse_scores = all_alike * (np.maximum(x.w2, x.equal_w2) if equal else x.w2)
    by_scores = inner.copy() if fine else None
    l_terms, l_sum = running_sum(n, numerics.sum_block)
    a_terms, a_sum = running_sum(n, numerics.product_block)
    a_terms = a_terms + (0.0 if exact_pv else 1.0) + (1.0 if before and not u_p else 0.0)
    l_var = l_terms * x.w2 + l_sum
    same_keys, same_pairs = getattr(x, "same_keys", 1.0), getattr(x, "same_pairs", 1.0)
    inner += x.w2_v2 * (var * a_terms * same_pairs)
    inner += o * o * (var * (a_sum * same_pairs + l_var * same_keys))
    inner += n * (acc.smallest_subnormal**2 / 12.0) * same_pairs
    inner += o * o * (2.0 * var)
    if numerics.normalise == "any":
        # Parts of a split KV are merged with weights exp(lse_i - lse). Each lse is rounded once or twice at its own
        # size, which no longer cancels: an error relative to o as large as the absolute one of lse.
        inner += o * o * (2.0 * var * np.square(lse))
    # The scale's constants are rounded once for all pairs: three roundings, u^2 / 3 each with unlucky mantissas.
    along_scale = x.ws_v - o * x.ws
    inner += along_scale * along_scale * (u * u)
    # A matrix unit is one-sided: scores and sums are too small on the whole, in all rows alike.
    if numerics.dot_block is not None:
        inner += np.square(along_scale * dots.dot_sigma(numerics.dot_block, float(q2.shape[-1])))
    if numerics.value_block is not None:
        inner += np.square(0.5 * (x.w_abs + o_abs) * dots.dot_sigma(numerics.value_block, n))
    # Underflow is as likely up as down, at most half a spacing a key: variance a third of that squared.
    noise = inner + flush * (x.v_most * (p.smallest_subnormal / 6.0))
    if u_v:
        noise += x.w2_v2 * (ROUNDING_VARIANCE * u_v * u_v)
    if u_p:
        cast = ROUNDING_VARIANCE * u_p * u_p
        # P is 1 at the maximum, exactly. Or it is w, and one within u of 1 rounds to 1 and is off by 1 - w only.
        # A coarse exp gives something else at the maximum, which is rounded like any other weight.
        spared = x.top * x.top * max(0.0, 1.0 - errors.exp / cast)
        if before:
            spared = np.maximum(spared - (1.0 - x.top) ** 2 / cast, 0.0)
        # Where a sink is larger than all scores, P is 1 nowhere.
        if numerics.normalise == "any" or dropout or sinks:
            spared = np.zeros_like(spared)
        if narrow:
            # The same where each weight has a variance of its own; whichever key of equal ones is at the maximum.
            spared = spared / np.maximum(x.top * x.top, 1e-300) * x.p_top * (x.top_v * x.top_v)
            if p.round(np.array([numerics.p_scale]))[0] != numerics.p_scale:
                spared = 0.0 * spared
            rounded = np.maximum(x.p_v2, x.equal_p_v2) if equal else x.p_v2
            noise += np.maximum(rounded - spared, 0.0)
            if numerics.sum_of == "rounded":
                noise += o * o * x.p_2
        else:
            rounded = x.w2_v2 - spared * (x.top_squares if equal else x.top_v * x.top_v)
            if equal:
                rounded = np.maximum(rounded, x.equal_w2_v2 - spared * x.top_sum * x.top_sum)
            noise += np.maximum(rounded, 0.0, out=rounded) * cast
    if shared is not None:
        noise += np.square(shared)
    sigma = out.ulp(o_abs)
    sigma *= sigma
    sigma *= 1.0 / 12.0
    sigma += noise
    np.sqrt(sigma, out=sigma)

    # Log-sum-exp: the weights' errors on the average, the sum, the logarithm, its product and the sum with m. Where a matrix
    # unit or a coarse exp errs to one side, all weights may have the same error.
    if numerics.dot_block is not None:
        lse_scores = all_alike
    elif numerics.exp_ulps > FINE_EXP:
        lse_scores = lse_scores + errors.exp
    lse_abs = np.abs(lse)
    lse_format = numerics.format("lse")
    lse_reach = (
        wb * stretch + adds + sum_of + LOG_ERROR + u * (6.0 * s_most + 4.0 * (log_n + offset) + 2.0 * lse_abs)
    )
    lse_reach *= growth
    lse_bound = lse_reach + 0.5 * lse_format.ulp(lse_abs + lse_reach)
    largest = np.abs(x.peak) if hasattr(x, "peak") else s_most  # the maximum that is subtracted
    lse_noise = (
        lse_scores + var * (l_var + 3.0 * (largest**2 + offset**2) + lse_abs * lse_abs) + LOG_ERROR**2 / 12.0
    )
    lse_noise += lse_format.ulp(lse_abs) ** 2 / 12.0
    p_lse = 0.0
    if numerics.sum_of == "rounded":
        p_lse = x.p_2 if narrow else ROUNDING_VARIANCE * u_p * u_p * x.w2
    if shared is not None:
        p_lse = p_lse + np.square(x.off * stretch)
    lse_noise = lse_noise + p_lse
    typical, lse_typical = deviations(
        x,
        numerics,
        errors,
        granted=by_scores,
        running={"l": (l_terms, l_sum), "acc": running_sum(n, numerics.product_block)},
        q_norm=q_norm,
        o=o,
        lse=lse,
        other=np.maximum(noise - inner, 0.0),
        other_lse=p_lse,
        along_scale=along_scale,
        dropout=dropout,
        sinks=sinks,
    )
    return {
        "out_bound": bound,
        "out_reach": reach,
        "out_sigma": sigma,
        "out_typical": typical,
        "out_noise": noise,
        "out_inner": inner,
        "out_steady": steady,
        "out_lost": lost + np.zeros_like(steady),
        "lse_bound": lse_bound[..., 0],
        "lse_typical": lse_typical[..., 0],
        "lse_noise": lse_noise[..., 0],
        "condition": condition[..., 0],
        "judged": judged[..., 0],
        "along_scale": along_scale,
        "along_top": x.top * (x.top_v - o),
    }


def running_sum(n: Floats, block: int | None) -> tuple[Floats, Floats]:
    """Coefficients (a, c) with sum of E S_k^2 = a T + c S^2 over all partial sums of n terms in random order.

    With blocks of B terms, the partial sums inside a block start at 0, and those of the n / B block sums follow:
    E S_block^2 = B (n - B) / (n (n - 1)) T + B (B - 1) / (n (n - 1)) S^2.
    """
    if block is None or n.max() <= block:
        return (n + 1.0) / 6.0, (n + 1.0) / 3.0
    b = np.minimum(n, float(block))
    blocks = n / b
    pairs = np.maximum(n * (n - 1.0), 1.0)
    block_terms, block_sum = b * (n - b) / pairs, np.where(n > 1.0, b * (b - 1.0) / pairs, 1.0)
    across = blocks > 1.0
    # Inside: (b + 1) / 6 T + (b + 1) / 3 of all block sums squared; across: the same with block sums for terms.
    squares = (b + 1.0) / 3.0 * blocks + np.where(across, (blocks + 1.0) / 6.0 * blocks, 0.0)
    return (
        (b + 1.0) / 6.0 + squares * block_terms,
        squares * block_sum + np.where(across, (blocks + 1.0) / 3.0, 0.0),
    )
