"""What a correct kernel of declared numerics may do to each output: a hard bound, and the noise to expect.

Notation: s_j scores of a row (natural units), m their maximum, w_j = exp(s_j - lse) the exact weights, o = sum w_j v_j,
N keys visible, u the unit roundoff of the accumulators, u_p that of P, gamma_n = n u / (1 - n u).

What is computed, to the letter (every relation exact, Higham, Accuracy and Stability, 2.2 and 3.1):

1. A score carries an absolute error of at most b_j, so that its weight is off by a factor 1 + t_j, |t_j| <= e^b_j - 1.
2. P is w_j (1 + t_j)(1 + r_j), |r_j| <= u_p, plus what underflow takes; products and their sum add (1 + a_j).
3. l is sum w_j (1 + t_j)(1 + c_j).

Hence o^ - o = [sum w_j t_j (v_j - o) + sum w_j (1 + t_j)((1 + r_j)(1 + a_j) - 1) v_j - o sum w_j (1 + t_j) c_j] / (l^ / l),
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
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import torch

from effattn.exact import Exact
from effattn.exact.blocks import Rows, row_blocks, rows_without_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from effattn.tolerances.numerics import Numerics

    Floats = NDArray[np.float64]

#: variance of a rounding to nearest relative to (u x)^2, for a log-uniform mantissa
ROUNDING_VARIANCE = 0.125 / math.log(2.0)

#: a row whose weights may be off by more than this factor is not judged: the first-order picture ends there
LARGEST_WEIGHT_ERROR = 0.5

#: PTX: lg2.approx.f32 is within 2^-22 (absolute) near 1
LOG_ERROR = 2.0**-22


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """Per element, numpy float64: (batch, heads, q_len, v_dim) for out, (batch, heads, q_len) for what belongs to a row.

    Rows that see no key have bound 0 and deviation 0: their output is exactly 0.
    """

    #: largest |got - exact| of a correct kernel, the rounding of the output included; inf where not judged
    out_bound: Floats
    #: the same before the output is rounded
    out_reach: Floats
    #: expected standard deviation of got - exact, the rounding of the output included
    out_sigma: Floats
    #: expected variance before the output is rounded
    out_noise: Floats
    #: the part of `out_noise` that comes from the accumulators' format: everything but the rounding of P
    out_inner: Floats
    #: what may add up to one side without being a fault: accumulated roundings of equal terms, flushed weights
    out_steady: Floats
    #: bound and deviation of the log-sum-exp
    lse_bound: Floats
    lse_sigma: Floats
    #: largest |scale| |q_i| |k_j| over the keys: relative errors of the inputs come out in the weights so many times
    condition: Floats
    #: bool: False where the weights may be off by more than `LARGEST_WEIGHT_ERROR`
    judged: NDArray[np.bool_]
    #: direction in which a wrong scale moves the output: sum w s (v - o)
    along_scale: Floats
    #: direction in which an error of the largest weight against all others moves it: w (v - o) of that key
    along_top: Floats
    #: leading rows of each head that see no key
    empty_rows: int


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
) -> Envelope:
    """Bound and noise of the forward pass, in one pass over the keys with O(N d) memory.

    q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_dim) on any
    device, `exact` the exact attention of the same inputs and options. `block` as in `exact.attention`.
    RequestError for shapes that don't go together.
    """
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[3])
    shape, dim = tuple(q.shape[:3]), v.shape[3]
    empty = rows_without_keys(q.shape[2], k.shape[2], causal)
    fields: dict[str, Floats] = {}
    fine = _fine(numerics)
    alike = _alike(q, k, v) if fine else None
    errors = _ScoreErrors.of(numerics, q.shape[-1], min(_repeats(q), _repeats(k)) if fine else 1.0)
    for rows in row_blocks(q, k, v, causal=causal, block=block):
        result = _row_block(rows, numerics, errors, exact, scale, alike)
        if result["judged"].size == math.prod(shape):
            whole = {name: x.reshape(*shape, *x.shape[2:]) for name, x in result.items()}
            return Envelope(**whole, empty_rows=0)  # pyright: ignore[reportArgumentType]
        for name, x in result.items():
            if name not in fields:
                fields[name] = np.zeros((*shape, *x.shape[2:]), dtype=x.dtype)
            rows.write(torch.from_numpy(fields[name]), torch.from_numpy(x))
    for name in () if fields else _FIELDS:
        wide = name.startswith(("out", "along"))
        fields[name] = np.zeros((*shape, dim) if wide else shape)
    if empty or not fields["judged"].any():
        fields["judged"] = fields["judged"].astype(bool)
        fields["judged"][:, :, :empty] = True
    return Envelope(**fields, empty_rows=empty)  # pyright: ignore[reportArgumentType]


#: the fields of an Envelope that are arrays
_FIELDS = (
    "out_bound", "out_reach", "out_sigma", "out_noise", "out_inner", "out_steady", "lse_bound", "lse_sigma",
    "condition", "judged", "along_scale", "along_top",
)  # fmt: skip


@dataclass
class _Sums:
    """What one pass over the keys collects for a block of rows; (pairs, rows, 1) or (pairs, rows, v_dim)."""

    #: sum w |v|, sum w^2 v^2
    w_abs: torch.Tensor
    w2_v2: torch.Tensor
    #: sum w^2
    w2: torch.Tensor
    #: smallest and largest score
    low: torch.Tensor
    high: torch.Tensor
    #: largest weight, the values of its key
    top: torch.Tensor
    top_v: torch.Tensor
    #: keys visible
    count: torch.Tensor
    #: largest |v| of a column
    v_most: torch.Tensor
    #: sum min(w, half the smallest subnormal of P) over weights that may be subnormal in P
    flushed: torch.Tensor
    #: largest |k|^2 and largest k^2 of a pair
    k_most: torch.Tensor
    k_peak: torch.Tensor
    #: sum w s v and sum w s
    ws_v: torch.Tensor
    ws: torch.Tensor
    #: where scores are judged one by one (see `_fine`): sum w b |v|, sum w b, largest b,
    #: sum w^2 var v^2, sum w^2 var v, sum w^2 var, sum w var
    wb_abs: torch.Tensor | None = None
    wb: torch.Tensor | None = None
    b_most: torch.Tensor | None = None
    g_v2: torch.Tensor | None = None
    g_v: torch.Tensor | None = None
    g: torch.Tensor | None = None
    w_var: torch.Tensor | None = None

    def add(self, other: _Sums) -> None:
        """Takes in the sums of more keys."""
        later = other.top > self.top
        self.top_v = torch.where(later, other.top_v, self.top_v)
        for name, mine in vars(self).items():
            more = getattr(other, name)
            if mine is None or name == "top_v":
                continue
            if name == "low":
                mine = torch.minimum(mine, more)
            elif name in ("high", "top", "v_most", "k_most", "k_peak", "b_most"):
                mine = torch.maximum(mine, more)
            else:
                mine = mine + more
            setattr(self, name, mine)

    def numpy(self) -> dict[str, Floats]:
        """All of it on the host, where many small operations cost less."""
        return {name: x.cpu().numpy() for name, x in vars(self).items() if x is not None}


def _fine(numerics: Numerics) -> bool:
    """Whether the scores' errors matter beside the rounding of P, and are worth a variance for each pair.

    They do where P is not rounded (fp32 inputs), or where scores or operands lose bits on the way.
    """
    return (
        not (numerics.rounds_p and numerics.exact_products)
        or numerics.format("score").precision < numerics.format("acc").precision
        or numerics.operand_format is not None
    )


@dataclass(frozen=True)
class _ScoreErrors:
    """Coefficients of a score's error, for one row block; every size below is that of |scale| q.k.

    bound    b   = dot (A + |s|) / 2 + factors A + rounded |s| + shifted |s - lse| + common
    variance var = terms T + each s^2 + gap (s - lse)^2 + exp

    with A = |scale| |q|.|k| and T = scale^2 sum q^2 k^2. Derivation:
    - the dot product by any tree: dot = gamma_d; as noise (d + 1) / 6 T + (d + 1) / 3 s^2, times 0.18 u^2;
    - a product that is not exact in the accumulator, inputs rounded to a narrower operand format, and q or k
      scaled before the product (a constant, a product): factors of A;
    - the scale, with log2(e) folded in: a constant, its product, the multiplication;
    - the format the score is kept in;
    - s - m, or a fused multiply-add with a rounded m: u |s - m| and 2 u max |s| for the row; |s - m| <= |s - lse|;
    - exp: `exp_ulps`, each at most 2 u, for the weight itself and for each of R + 2 rescalings of its block.
    """

    dot: float
    factors: float
    rounded: float
    shifted: float
    terms: float
    each: float
    gap: float
    exp: float

    @classmethod
    def of(cls, numerics: Numerics, d: int, repeats: float) -> _ScoreErrors:
        u = numerics.format("acc").unit_roundoff
        keep, acc = numerics.format("score"), numerics.format("acc")
        u_keep = keep.unit_roundoff if keep.precision < acc.precision else 0.0
        operand = numerics.operand_format
        # Tensor cores truncate operands, hence twice the unit roundoff.
        u_operand = 2.0 * operand.unit_roundoff if operand is not None else 0.0
        var = ROUNDING_VARIANCE * u * u * repeats
        inexact = 0.0 if numerics.exact_products else 1.0
        return cls(
            dot=_gamma(d, u) * (1.0 + 2.0 * _gamma(d, u)),
            factors=2.0 * u * inexact + 4.0 * u + 2.0 * u_operand + u_operand**2,
            rounded=5.0 * u + u_keep,
            shifted=3.0 * u,
            terms=var * ((d + 1) / 6.0 + inexact) + 2.0 * ROUNDING_VARIANCE * u_operand**2,
            each=var * ((d + 1) / 3.0 + 1.0) + ROUNDING_VARIANCE * u_keep**2,
            gap=ROUNDING_VARIANCE * u * u,
            exp=ROUNDING_VARIANCE * u * u * max(1.0, numerics.exp_ulps**2),
        )


def _gamma(n: float, u: float) -> float:
    return n * u / (1.0 - n * u) if n * u < 0.5 else math.inf


def _alike(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor | None:
    """How many keys are the same as a key on the average, key and value alike, (batch, heads, q_len); None for 1.

    Their scores have the same error, and equal terms of a sum are rounded to one side, so that m equal keys make the
    variance of all that is done in the accumulators' format m times as large as the sum over m different ones.
    """
    if k.shape[2] < 2:
        return None
    # A fixed projection of each row: equal rows have equal ones, different rows hardly ever.
    mark = 0.0
    for x in (k, v):
        angles = torch.arange(1, x.shape[3] + 1, dtype=torch.float64, device=x.device)
        mark = mark + (x.to(torch.float64) * torch.cos(angles * angles + x.shape[3])).sum(-1)
    assert isinstance(mark, torch.Tensor)
    ordered = mark.sort(dim=-1).values
    if not bool((ordered[..., 1:] == ordered[..., :-1]).any()):
        return None
    count = k.shape[2]
    pairs = ordered.reshape(-1, count)
    squares = [float(row.unique(return_counts=True)[1].double().square().sum()) for row in pairs]
    mean = torch.tensor(squares, dtype=torch.float64, device=q.device).view(*k.shape[:2]) / count
    return mean.repeat_interleave(q.shape[1] // k.shape[1], 1)[:, :, None].expand(q.shape[:3])


def _repeats(x: torch.Tensor) -> float:
    """The same for the terms of a dot product: an upper limit from the entries of a row that are equal, zero apart."""
    if x.shape[-1] < 2 or x.numel() == 0:
        return 1.0
    ordered = x.sort(dim=-1).values
    equal = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != 0.0)
    pairs = float(equal.sum(-1).max())
    # So many equal neighbours make at most one run of pairs + 1.
    return 1.0 + pairs * (pairs + 1.0) / x.shape[-1]


def _row_block(
    rows: Rows, numerics: Numerics, errors: _ScoreErrors, exact: Exact, scale: float, alike: torch.Tensor | None
) -> dict[str, Floats]:
    q = rows.q * scale
    lse = rows.read(exact.lse).unsqueeze(-1)
    squares = (q.abs(), q.square()) if _fine(numerics) else None
    sums: _Sums | None = None
    for tile in rows.tiles():
        s = torch.bmm(q, tile.k.mT)
        low, high = torch.aminmax(s, dim=-1, keepdim=True)
        w = (s - lse).exp_()
        if tile.hidden is not None:
            w.masked_fill_(tile.hidden, 0.0)
            count = (~tile.hidden).sum(-1, dtype=torch.float64)[None, :, None]
        else:
            count = torch.full((1, 1, 1), float(tile.k.shape[1]), dtype=torch.float64, device=s.device)
        v, v_abs = tile.v, tile.v.abs()
        v2 = v * v
        w2 = w * w
        k2 = tile.k * tile.k
        top, key = w.max(dim=-1, keepdim=True)
        ws = w * s
        more = _Sums(
            w_abs=torch.bmm(w, v_abs),
            w2_v2=torch.bmm(w2, v2),
            w2=w2.sum(-1, keepdim=True),
            low=low,
            high=high,
            top=top,
            top_v=torch.gather(v, 1, key.expand(-1, -1, v.shape[-1])),
            count=count,
            v_most=v_abs.amax(1, keepdim=True),
            flushed=_flushed(w, low - lse, numerics, count),
            k_most=k2.sum(-1, keepdim=True).amax(1, keepdim=True),
            k_peak=k2.amax((1, 2), keepdim=True),
            ws_v=torch.bmm(ws, v),
            ws=ws.sum(-1, keepdim=True),
        )
        if squares is not None:
            gap = s - lse
            b = torch.bmm(squares[0], tile.k.abs().mT).mul_(0.5 * errors.dot + errors.factors)
            b.add_(s.abs(), alpha=0.5 * errors.dot + errors.rounded).sub_(gap, alpha=errors.shifted)
            var = torch.bmm(squares[1], k2.mT).mul_(errors.terms)
            var.addcmul_(s, s, value=errors.each).addcmul_(gap, gap, value=errors.gap).add_(errors.exp)
            if tile.hidden is not None:
                b.masked_fill_(tile.hidden, 0.0)
            more.b_most = b.amax(-1, keepdim=True)
            wb, g = b.mul_(w), w2.mul_(var)
            more.wb_abs, more.wb = torch.bmm(wb, v_abs), wb.sum(-1, keepdim=True)
            more.g_v2, more.g_v, more.g = torch.bmm(g, v2), torch.bmm(g, v), g.sum(-1, keepdim=True)
            more.w_var = var.mul_(w).sum(-1, keepdim=True)
        if sums is None:
            sums = more
        else:
            sums.add(more)
    assert sums is not None, "every row of a block sees key 0"
    with np.errstate(over="ignore", invalid="ignore"):  # rows that are not judged
        return _finish(
            SimpleNamespace(**sums.numpy()),
            numerics,
            errors,
            q2=(q * q).cpu().numpy(),
            o=rows.read(exact.out).cpu().numpy(),
            lse=lse.cpu().numpy(),
            alike=1.0 if alike is None else rows.read(alike).unsqueeze(-1).cpu().numpy(),
        )


def _flushed(w: torch.Tensor, low: torch.Tensor, numerics: Numerics, count: torch.Tensor) -> torch.Tensor:
    """Most that underflow takes from the weights of a row, in units of w; `low` the smallest log w.

    A weight below the normal range of P's format moves by at most half its smallest subnormal number, and by no
    more than itself. P is at least w, for its maximum is at most lse, so weights of normal size are safe. Formats
    with fp32's range come near that only where it does not matter, and get the limit for all keys.
    """
    p, acc = numerics.format("p"), numerics.format("acc")
    floor = acc.smallest_normal if numerics.flush else acc.smallest_subnormal / 2.0
    if p.emin == acc.emin:
        return count * (floor + p.smallest_subnormal / 2.0)
    if float(low.min()) > math.log(p.smallest_normal):
        return count * floor
    small = torch.clamp(w, max=p.smallest_subnormal / 2.0).masked_fill_(w >= p.smallest_normal, 0.0)
    return small.sum(-1, keepdim=True) + count * floor


def _finish(
    x: SimpleNamespace,
    numerics: Numerics,
    errors: _ScoreErrors,
    *,
    q2: Floats,
    o: Floats,
    lse: Floats,
    alike: Floats | float,
) -> dict[str, Floats]:
    """Bound and noise from the sums over the keys; q2 is (scale q)^2, `alike` as in `_alike`."""
    acc, p, out, input_ = (numerics.format(name) for name in ("acc", "p", "output", "input"))
    u = acc.unit_roundoff
    u_p = p.unit_roundoff if numerics.rounds_p else 0.0
    operand = numerics.operand_format
    u_v = 0.0 if operand is None else 2.0 * operand.unit_roundoff
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
    fine = hasattr(x, "wb")
    if fine:
        b_most, wb = x.b_most + common, x.wb + common
        wb_abs = x.wb_abs + common * x.w_abs
    else:
        # |s| and A are at most |q| |k|: crude, but these errors are small beside u_p.
        b_most = condition * (errors.dot + errors.factors + errors.rounded + errors.shifted)
        b_most = wb = b_most + common + errors.shifted * log_n
        wb_abs = b_most * x.w_abs
    adds = (n + rescales + 3.0) * u
    worst = np.expm1(b_most)
    stretch = worst / b_most
    total = worst + adds
    judged = total <= LARGEST_WEIGHT_ERROR
    growth = (1.0 + total) * (1.0 + u_p) / (1.0 - total - total * total)
    growth[~judged] = math.inf
    sum_of = u_p if numerics.sum_of == "rounded" else 0.0
    product = u_p + u_v + (0.0 if exact_pv else u) + (2.0 * u if before else 0.0)
    flush = x.flushed * x.v_most
    steady = x.w_abs * (0.5 * adds) + o_abs * (1.5 * adds + 4.0 * u) + flush + n * acc.smallest_subnormal
    reach = wb_abs + o_abs * wb
    reach *= stretch
    reach += x.w_abs * product + steady
    if sum_of:
        reach += o_abs * sum_of
    reach *= growth
    bound = out.ulp(o_abs + reach)
    bound *= 0.5
    bound += reach

    # Noise.
    if fine:
        g, lse_scores = x.g, x.w_var
        inner = np.maximum(x.g_v2 - 2.0 * o * x.g_v + o * o * g, 0.0)
    else:
        # sum q^2 k^2 is at most the largest q^2 times |k|^2, and the other way round.
        t2 = np.minimum(q2.max(-1, keepdims=True) * x.k_most, q_norm * x.k_peak)
        lse_scores = t2 * errors.terms + s_most * s_most * errors.each + log_n * log_n * errors.gap + errors.exp
        inner = np.sqrt(x.w2_v2) + o_abs * np.sqrt(x.w2)
        inner *= inner
        inner *= lse_scores
    l_terms, l_sum = _running_sum(n, numerics.sum_block)
    a_terms, a_sum = _running_sum(n, numerics.product_block)
    a_terms = a_terms + (0.0 if exact_pv else 1.0) + (1.0 if before and not u_p else 0.0)
    l_var = l_terms * x.w2 + l_sum
    inner += x.w2_v2 * (var * a_terms)
    inner += o * o * (var * (a_sum + l_var))
    inner += n * (acc.smallest_subnormal**2 / 12.0)
    inner *= alike
    inner += o * o * (2.0 * var)
    # The scale's constants are rounded once for all pairs: three roundings, u^2 / 3 each with unlucky mantissas.
    along_scale = x.ws_v - o * x.ws
    inner += along_scale * along_scale * (u * u)
    # Underflow is as likely up as down, at most half a spacing a key: variance a third of that squared.
    noise = inner + flush * (x.v_most * (p.smallest_subnormal / 6.0))
    if u_v:
        noise += x.w2_v2 * (ROUNDING_VARIANCE * u_v * u_v)
    if u_p:
        cast = ROUNDING_VARIANCE * u_p * u_p
        cast_sum = x.w2_v2 * cast
        if numerics.normalise != "any":
            # P is 1 at the maximum, exactly. Or it is w, and one within u of 1 rounds to 1 and is off by 1 - w only.
            spared = x.top * x.top * cast
            if before:
                spared = np.maximum(spared - (1.0 - x.top) ** 2, 0.0)
            cast_sum -= spared * x.top_v * x.top_v
            np.maximum(cast_sum, 0.0, out=cast_sum)
        noise += cast_sum
    sigma = out.ulp(o_abs)
    sigma *= sigma
    sigma *= 1.0 / 12.0
    sigma += noise
    np.sqrt(sigma, out=sigma)

    # Log-sum-exp: the weights' errors on the average, the sum, the logarithm, its product and the sum with m. Keys
    # that are alike have the same error of the score, so these errors count as one.
    lse_abs = np.abs(lse)
    lse_format = numerics.format("lse")
    lse_reach = wb * stretch + adds + sum_of + LOG_ERROR + u * (6.0 * s_most + 4.0 * log_n + 2.0 * lse_abs)
    lse_reach *= growth
    lse_bound = lse_reach + 0.5 * lse_format.ulp(lse_abs + lse_reach)
    lse_var = lse_scores + var * (l_var + 3.0 * s_most * s_most + lse_abs * lse_abs) + LOG_ERROR**2 / 12.0
    lse_var += (2.0 * u * s_most) ** 2  # constants, as above, and ln 2
    lse_var += lse_format.ulp(lse_abs) ** 2 / 12.0
    if sum_of:
        lse_var += ROUNDING_VARIANCE * u_p * u_p * x.w2
    return {
        "out_bound": bound,
        "out_reach": reach,
        "out_sigma": sigma,
        "out_noise": noise,
        "out_inner": inner,
        "out_steady": steady,
        "lse_bound": lse_bound[..., 0],
        "lse_sigma": np.sqrt(lse_var)[..., 0],
        "condition": condition[..., 0],
        "judged": judged[..., 0],
        "along_scale": along_scale,
        "along_top": x.top * (x.top_v - o),
    }


def _running_sum(n: Floats, block: int | None) -> tuple[Floats, Floats]:
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
