"""The one pass over the keys behind an envelope: sums of weights, weighted values, and errors of scores.

Memory is O(N d): one tile of scores exists at a time. What is summed, and why, is said in `envelope`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from effattn.tolerances import dots
from effattn.tolerances.quantise import SCALE_ERROR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from effattn.exact.blocks import Rows, Tile
    from effattn.tolerances.numerics import Numerics

    Floats = NDArray[np.float64]

#: variance of a rounding to nearest relative to (u x)^2, for a log-uniform mantissa: (u^2 / 3)(3 / (8 ln 2))
ROUNDING_VARIANCE = 0.125 / math.log(2.0)

#: times the variance of as many random roundings, for each of m equal terms of a running sum, see `typical`
ALIKE = (4.0 / 15.0) / (4.0 / 7.0)

#: sums of products and squares may be done in float32 where entries lie between these, by columns brought near 1
_NARROW = (1e-12, 1e12)

#: keys that differ by no more than this, relative to their largest entry, are rounded alike
NEAR = 2.0**-20

#: largest error of a score for which scores, and weights with them, may be had in float32 too
_SCORE_ERROR = 2.0**-10

#: pairs of query and key from which on that is quicker
_WORTH = 1 << 16


def gamma(n: float, u: float) -> float:
    """n u / (1 - n u), Higham's bound for n roundings."""
    return n * u / (1.0 - n * u) if n * u < 0.5 else math.inf


def is_fine(numerics: Numerics) -> bool:
    """Whether the scores' errors matter beside the rounding of P, and are worth a variance for each pair.

    They do where P is not rounded (fp32 inputs), or where scores or operands lose bits on the way.
    """
    return (
        not (numerics.rounds_p and numerics.exact_products)
        or numerics.format("score").precision < numerics.format("acc").precision
        or numerics.operand_format is not None
    )


@dataclass(frozen=True)
class ScoreErrors:
    """Coefficients of a score's error; every size below is that of |scale| q.k.

    bound    b   = dot (A + |s|) / 2 + factors A + rounded |s| + shifted |s - lse| + common
    variance var = terms T + each s^2 + gap (s - a)^2 + exp      (a: what is taken off, the maximum or lse)

    with A = |scale| |q|.|k| and T = scale^2 sum q^2 k^2. Derivation:
    - the dot product by any tree: dot = gamma_d; as noise (d + 1) / 6 T + (d + 1) / 3 s^2, times 0.18 u^2;
    - a product that is not exact in the accumulator, inputs rounded to a narrower operand format, and q or k
      scaled before the product (a constant, a product): factors of A;
    - the scale, with log2(e) folded in: a constant, its product, the multiplication;
    - scales of codes (`quantise.SCALE_ERROR`), also factors of A;
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
    #: unit roundoff of the format that scores are kept in; 0 where it is that of the accumulators
    kept: float
    #: d
    features: float
    #: spacing of products of two inputs, relative to the spacing of the accumulators at the same size
    quantum: float
    #: by how much more partial sums are off since products are alike, in the first pair of query and key
    alike: float

    @classmethod
    def of(cls, numerics: Numerics, q: torch.Tensor, k: torch.Tensor) -> ScoreErrors:
        """For these queries and keys: their number of features, and how many of these are alike."""
        d = q.shape[-1]
        u = numerics.format("acc").unit_roundoff
        keep, acc = numerics.format("score"), numerics.format("acc")
        u_keep = keep.unit_roundoff if keep.precision < acc.precision else 0.0
        operand = numerics.operand_format
        # Tensor cores truncate operands, hence twice the unit roundoff.
        u_operand = 2.0 * operand.unit_roundoff if operand is not None else 0.0
        one = ROUNDING_VARIANCE * u * u
        repeats = _repeats(k) if is_fine(numerics) else 1.0
        var = one * (min(repeats, _repeats(q)) if repeats > 1.0 else 1.0)
        inexact = 0.0 if numerics.exact_products else 1.0
        # Scales of codes, each in fp32 and shared by what it scales: Q's and K's.
        u_scales = SCALE_ERROR * sum(codes is not None for codes in (numerics.q, numerics.k))
        unit = numerics.dot_block
        worst = max(gamma(d, u), dots.dot_bound(unit, float(d)))
        # The one-sided part, relative to a partial sum, whose square is about T + s^2.
        aligned = dots.dot_sigma(unit, float(d)) ** 2
        return cls(
            dot=worst * (1.0 + 2.0 * worst),
            factors=2.0 * u * inexact + 4.0 * u + 2.0 * u_operand + u_operand**2 + u_scales,
            rounded=5.0 * u + u_keep,
            shifted=3.0 * u,
            terms=var * ((d + 1) / 6.0 + inexact) + 2.0 * ROUNDING_VARIANCE * u_operand**2 + aligned,
            each=var * ((d + 1) / 3.0 + 1.0)
            + ROUNDING_VARIANCE * u_keep**2
            + aligned
            + (0.25 * u_scales) ** 2,
            gap=one,
            exp=one * max(1.0, numerics.exp_ulps**2),
            kept=u_keep,
            features=float(d),
            alike=ALIKE * (_repeats(q[:1, :1, :1].double() * k[:1, :1, :1].double()) - 1.0),
            quantum=2.0 ** (2 * numerics.format("input").precision - acc.precision - 1),
        )


def _repeats(x: torch.Tensor) -> float:
    """How many times larger the variance of a sum of products is because terms are equal: an upper limit.

    Equal terms are rounded to one side, so that m of them count m^2 times. Zeros are exact and count nothing.
    """
    if x.shape[-1] < 2 or x.numel() == 0:
        return 1.0
    ordered = np.sort(x.detach().to("cpu", torch.float64).numpy(), axis=-1)
    equal = ordered[..., 1:] == ordered[..., :-1]
    if not equal.any():
        return 1.0
    equal &= ordered[..., 1:] != 0.0
    pairs = float(equal.sum(-1).max())
    # So many equal neighbours make at most one run of pairs + 1.
    return 1.0 + pairs * (pairs + 1.0) / x.shape[-1]


@lru_cache(maxsize=32)
def _directions(size: int) -> Floats:
    """A fixed vector that no structure of the data is likely to be orthogonal to."""
    angles = np.arange(1.0, size + 1.0)
    return np.cos(angles * angles + size)


@dataclass(frozen=True)
class EqualKeys:
    """Keys that are there more than once in a head: their scores, weights and roundings are the same.

    So are some of those of keys that differ in the last places of fp32 only (`NEAR`): a product moves by a fraction of the
    spacing of the sums it is added to. So their errors may add up as one: sum over keys of w^2 (v - o)^2 becomes, for a group
    of m, w^2 (V - m o)^2 with V the sum of their values. With V^2 / m, V and m in place of v^2, v and 1, each sum over keys
    gives just that. They may as well not, where blocks or positions are treated differently, so the larger of both sums is
    granted.
    """

    #: (batch, kv_heads, kv_len, 2 v_dim + 1) float64: V, the sum of the squares of their values, m
    summed: torch.Tensor
    #: (batch, heads, q_len): how many keys are the same as a key, on the average: equal terms of l
    keys: torch.Tensor
    #: the same where the values are equal too: equal terms of the second product
    pairs: torch.Tensor
    #: the share of their errors that keys have in common: 1, or less where some are not quite equal
    share: float

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> EqualKeys | None:
        """None where all keys are different."""
        if k.shape[2] < 2:
            return None
        # A projection of each row, summed in the same order for each: equal rows have equal ones, others hardly ever.
        keys, marks = k.detach().to("cpu", torch.float64).numpy(), []
        for x in (k, v):
            wide = x.detach().to("cpu", torch.float64).numpy()
            marks.append(np.einsum("bhnd,d->bhn", wide, _directions(x.shape[3])))
        order = np.argsort(marks[0], axis=-1, kind="stable")
        ordered = np.take_along_axis(marks[0], order, -1)
        same = np.diff(ordered, axis=-1) <= NEAR * np.abs(marks[0]).max()
        if not same.any():
            return None
        equal = True
        for b, h, i in np.argwhere(same):
            one, other = keys[b, h, order[b, h, i]], keys[b, h, order[b, h, i + 1]]
            apart = np.abs(one - other).max()
            same[b, h, i] = apart <= NEAR * np.abs(one).max()
            equal &= bool(apart == 0.0 or not same[b, h, i])
        if not same.any():
            return None
        values = v.detach().to("cpu", torch.float64).numpy()
        dim = values.shape[3]
        summed = np.empty((*values.shape[:3], 2 * dim + 1))
        same_keys, same_pairs = np.empty(k.shape[:2]), np.empty(k.shape[:2])
        for place in np.ndindex(*k.shape[:2]):
            group = np.empty(k.shape[2], dtype=np.int64)
            group[order[place]] = np.concatenate([[0], np.cumsum(~same[place])])
            sizes = np.bincount(group)
            sums = np.zeros((len(sizes), 2 * dim))
            np.add.at(sums, group, np.concatenate([values[place], values[place] ** 2], axis=1))
            summed[(*place, slice(None), slice(-1))] = sums[group]
            summed[(*place, slice(None), -1)] = sizes[group]
            same_keys[place] = (sizes**2.0).sum() / k.shape[2]
            both = np.unique(np.stack([group, marks[1][place]]), axis=1, return_counts=True)[1]
            same_pairs[place] = (both**2.0).sum() / k.shape[2]

        def rows(x: Floats) -> torch.Tensor:
            per_head = torch.from_numpy(x).to(q.device).repeat_interleave(q.shape[1] // k.shape[1], 1)
            return per_head[:, :, None].expand(q.shape[:3])

        # Measured on the values near-ties: with all of them, and with none, z is far from 1. Nothing is granted by it.
        share = 1.0 if equal else 0.75
        return cls(torch.from_numpy(summed).to(q.device), rows(same_keys), rows(same_pairs), share)


class Precision(NamedTuple):
    """What the pass over the keys is done in; float32 is quicker for large problems."""

    #: sums of products and squares of weights
    sums: torch.dtype
    #: scores and weights
    scores: torch.dtype

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float) -> Precision:
        """float32 for sums where nothing can over- or underflow, for scores too where `score_error` is small in all rows.

        Such sums are off by a millionth or so, which `envelope` adds to the bound, as it does the error of the scores. GPUs
        are left to float64, since their float32 products may be something else.
        """
        wide = cls(torch.float64, torch.float64)
        if q.shape[:3].numel() * k.shape[2] < _WORTH:
            return wide
        low, high = _NARROW
        if scale != 0.0 and not low <= abs(scale) <= high:
            return wide
        longest = []
        for x in (q, k):
            if x.device.type != "cpu" or x.numel() == 0:
                return wide
            size = x.abs()
            if float(size.max()) > high or float(torch.where(size > 0.0, size, 1.0).min()) < low:
                return wide
            longest.append(float(torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).max()))
        condition = np.asarray(longest[0] * longest[1] * abs(scale))
        largest = lse.nan_to_num(neginf=0.0).abs().max()
        off = score_error(q.shape[3], condition, np.asarray(float(largest)))
        # A dtype wider than float32 loses more than these count.
        exact = all(x.dtype in (torch.float16, torch.bfloat16, torch.float32) for x in (q, k))
        return cls(torch.float32, torch.float32 if exact and float(off) <= _SCORE_ERROR else torch.float64)


def score_error(head_dim: int, condition: Floats, lse: Floats) -> Floats:
    """Most that log w = s - lse may be off by where it was had in float32; `condition` the largest |scale| |q| |k|.

    head_dim products of a scaled q are summed, gamma_(d + 1) |scale| |q| |k|; the sum, lse and their difference are rounded at
    their own size, at most |scale| |q| |k| + 2 |lse| together, and exp adds units in the last place.
    """
    u = 2.0**-24
    return gamma(head_dim + 2.0, u) * condition + 2.0 * u * np.abs(lse) + 4.0 * u


class Largest(NamedTuple):
    """Of all keys of a head, seen or not, (batch, kv_heads, ...): largest |k|^2, largest k^2, largest |v| by column."""

    k_most: torch.Tensor
    k_peak: torch.Tensor
    v_most: torch.Tensor

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor) -> Largest:
        k2 = k.to(torch.float64).square()
        return cls(
            k2.sum(-1).amax(-1, keepdim=True),
            k2.amax((2, 3)).unsqueeze(-1),
            v.abs().amax(2).to(torch.float64),
        )

    def read(self, rows: Rows, heads: int, q_len: int) -> dict[str, torch.Tensor]:
        """For a block of rows: (pairs, 1, ...)."""

        def part(x: torch.Tensor) -> torch.Tensor:
            if len(rows.q) == x.shape[0] * x.shape[1]:
                return x.reshape(len(rows.q), 1, -1)
            x = x.repeat_interleave(heads // x.shape[1], 1)[:, :, None]
            return rows.read(x.expand(-1, -1, q_len, -1))[:, :1]

        return {name: part(x) for name, x in self._asdict().items()}


def collect(
    rows: Rows,
    lse: torch.Tensor,
    groups: Rows | None,
    *,
    numerics: Numerics,
    errors: ScoreErrors,
    scale: float,
    precision: Precision,
) -> dict[str, Floats]:
    """The sums over the keys for a block of rows, on the host, (pairs, rows, v_dim) or (pairs, rows, 1):

    w_abs    sum w |v|              w2_v2, w2     sum w^2 v^2, sum w^2
    ws_v, ws sum w s v, sum w s     low, high     smallest and largest score
    ws_abs   sum w |s|              wa            sum w |scale| |q|.|k|  (both where scores are not judged one by one)
    count    keys visible           top, top_v    largest weight, the value of its key
    flushed  most that underflow takes from the weights of a row
    k_most, k_peak, v_most: see `Largest`

    and where scores are judged one by one (`is_fine`): wb_abs, wb sum w b |v|, sum w b; b_most largest b; g_v2, g_v,
    g sum w^2 var v^2, sum w^2 var v, sum w^2 var; w_var sum w var. lse (pairs, rows, 1). `groups`: the same rows with
    `EqualKeys.summed` for values; equal_... then are the sums with w^2 over groups of equal keys, and top_sum and
    top_squares those of v and v^2 in the group of the largest weight, top_size its size; seen_sum and top_size are scaled to
    what a row sees of it, on the average.
    """
    q, dtype = rows.q * scale, precision.sums
    squares = (q.abs().to(dtype), q.square().to(dtype)) if is_fine(numerics) else None
    size = None if squares is not None else q.abs().to(dtype)
    q, near = q.to(precision.scores), lse.to(precision.scores)
    total: dict[str, torch.Tensor] = {}
    grouped = iter(()) if groups is None else groups.tiles()
    for tile, group in zip_longest(rows.tiles(), grouped):
        equal = None if group is None else _Group.of(group.v)
        if squares is None:
            more = _coarse(q, size, near, tile, equal, numerics, dtype)
        else:
            more = _fine(q, squares, near, tile, equal, numerics, errors, total.get("top"))
        if not total:
            total = more
            continue
        later = more["top"] > total["top"]
        for name, x in more.items():
            if name.startswith(("top_", "seen_")):
                total[name] = torch.where(later, x, total[name])
            elif name == "low":
                total[name] = torch.minimum(total[name], x)
            elif name in ("high", "top", "b_most"):
                total[name] = torch.maximum(total[name], x)
            else:
                total[name] = total[name] + x
    return {name: x.cpu().numpy() for name, x in total.items()}


class _Group(NamedTuple):
    """For the keys of a tile, the sums over all keys equal to each: V, sum of v^2, m; (pairs, cols, v_dim or 1)."""

    v: torch.Tensor
    v2: torch.Tensor
    size: torch.Tensor

    @classmethod
    def of(cls, summed: torch.Tensor) -> _Group:
        dim = summed.shape[-1] // 2
        return cls(summed[..., :dim], summed[..., dim:-1], summed[..., -1:])


def _common(
    s: torch.Tensor, w: torch.Tensor, lse: torch.Tensor, tile: Tile, equal: _Group | None, numerics: Numerics
) -> dict[str, torch.Tensor]:
    """What both kinds of pass need; makes masked scores and weights 0. s, w and lse are of one dtype."""
    if tile.hidden is not None:
        s.masked_fill_(tile.hidden, 0.0)
        w.masked_fill_(tile.hidden, 0.0)
        count = (~tile.hidden).sum(-1, dtype=torch.float64)[None, :, None]
    else:
        count = torch.full((1, 1, 1), float(tile.k.shape[1]), dtype=torch.float64, device=s.device)
    low, high = s.amin(-1, keepdim=True), s.amax(-1, keepdim=True)  # several times as quick as torch.aminmax
    top, key = w.max(dim=-1, keepdim=True)
    place = key.expand(-1, -1, tile.v.shape[-1])
    sums = {}
    if equal is not None:
        sums["top_sum"] = torch.gather(equal.v, 1, place)
        sums["top_squares"] = torch.gather(equal.v2, 1, place)
        sums["top_size"], sums["seen_sum"] = torch.gather(equal.size, 1, key), sums["top_sum"]
    return sums | {
        "low": low.to(torch.float64),
        "high": high.to(torch.float64),
        "count": count,
        "top": top.to(torch.float64),
        "top_v": torch.gather(tile.v, 1, place),
        "flushed": flushed(w, low - lse, numerics, count),
    }


class _Keys(NamedTuple):
    """K of a tile, (pairs, cols, head_dim), in the precision of scores, and its sizes and squares in that of sums."""

    k: torch.Tensor
    abs: torch.Tensor
    square: torch.Tensor

    @classmethod
    def of(cls, tile: Tile, scores: torch.dtype, sums: torch.dtype) -> _Keys:
        if "keys" not in tile.made:
            k = tile.k.to(sums)
            tile.made["keys"] = cls(tile.k.to(scores), k.abs(), k * k)
        return tile.made["keys"]


class _Values(NamedTuple):
    """V of a tile, its columns brought near 1 by powers of two, so that their squares fit float32; (pairs, cols, v_dim)."""

    v: torch.Tensor
    abs: torch.Tensor
    square: torch.Tensor
    #: what each column was divided by, (pairs, 1, v_dim)
    unit: torch.Tensor

    @classmethod
    def of(cls, tile: Tile, dtype: torch.dtype) -> _Values:
        if "values" not in tile.made:
            tile.made["values"] = cls._of(tile.v, dtype)
        return tile.made["values"]

    @classmethod
    def _of(cls, v: torch.Tensor, dtype: torch.dtype) -> _Values:
        unit = torch.exp2(torch.floor(torch.log2(v.abs().amax(1, keepdim=True).clamp(min=1e-150))))
        v = (v / unit).to(dtype)
        return cls(v, v.abs(), v * v, unit)


def _product(x: torch.Tensor, y: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x, y).to(torch.float64).mul_(factor)


def _total(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1, keepdim=True).to(torch.float64)


def _coarse(
    q: torch.Tensor,
    q_abs: torch.Tensor | None,
    lse: torch.Tensor,
    tile: Tile,
    equal: _Group | None,
    numerics: Numerics,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    assert q_abs is not None
    keys, values = _Keys.of(tile, q.dtype, dtype), _Values.of(tile, dtype)
    s = torch.bmm(q, keys.k.mT)
    w = (s - lse).exp_()
    more = _common(s, w, lse, tile, equal, numerics)
    s, w, unit = s.to(dtype), w.to(dtype), values.unit
    wa = torch.bmm(w, keys.abs).mul_(q_abs)
    w2, ws = w * w, s.mul_(w)
    more |= {
        "w_abs": _product(w, values.abs, unit),
        "w2_v2": _product(w2, values.square, unit * unit),
        "w2": _total(w2),
        "ws_v": _product(ws, values.v, unit),
        "ws": _total(ws),
        "ws_abs": _total(ws.abs()),
        "wa": _total(wa),
    }
    if equal is not None:
        more["equal_w2_v2"] = torch.bmm(w2.double(), equal.v.square() / equal.size)
        more["equal_w2"] = torch.bmm(w2.double(), equal.size)
    return more


def _fine(
    q: torch.Tensor,
    squares: tuple[torch.Tensor, torch.Tensor],
    lse: torch.Tensor,
    tile: Tile,
    equal: _Group | None,
    numerics: Numerics,
    errors: ScoreErrors,
    top: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    q_abs, q2 = squares
    dtype = q_abs.dtype
    k, k_abs, k2 = _Keys.of(tile, q.dtype, dtype)
    s = torch.bmm(q, k.mT)
    gap = s - lse
    w = gap.exp()
    more = _common(s, w, lse, tile, equal, numerics)
    b = torch.bmm(q_abs, k_abs.mT)
    var = torch.bmm(q2, k2.mT)
    v, v_abs, v2, unit = _Values.of(tile, dtype)
    unit2 = unit * unit
    gap, w, s = gap.to(dtype), w.to(dtype), s.to(dtype)
    if tile.hidden is not None:
        gap.masked_fill_(tile.hidden, 0.0)
        b.masked_fill_(tile.hidden, 0.0)
    b.mul_(0.5 * errors.dot + errors.factors).add_(s.abs(), alpha=0.5 * errors.dot + errors.rounded)
    b.sub_(gap, alpha=errors.shifted)
    if numerics.normalise != "any":
        # The maximum so far is taken off, not the log-sum-exp. One that grows later makes these weights so small that the
        # larger gap does not count. Hidden pairs have no weight.
        highest = more["top"] if top is None else torch.maximum(more["top"], top)
        gap.sub_(highest.clamp(min=1e-300).log().to(dtype))
    # Variances in units of that of one rounding: their own size is too small for float32.
    var.mul_(errors.terms / errors.gap).addcmul_(s, s, value=errors.each / errors.gap).addcmul_(gap, gap)
    var.add_(errors.exp / errors.gap)
    b_most = b.amax(-1, keepdim=True)
    ws = s.mul_(w)
    wb = b.mul_(w)
    w_var = var.mul_(w)
    g = w_var * w
    w2 = w * w

    more |= {
        "w_abs": _product(w, v_abs, unit),
        "w2_v2": _product(w2, v2, unit2),
        "w2": _total(w2),
        "ws_v": _product(ws, v, unit),
        "ws": _total(ws),
        "b_most": b_most.to(torch.float64),
        "wb_abs": _product(wb, v_abs, unit),
        "wb": _total(wb),
        "g_v2": _product(g, v2, unit2 * errors.gap),
        "g_v": _product(g, v, unit * errors.gap),
        "g": _total(g).mul_(errors.gap),
        "w_var": _total(w_var).mul_(errors.gap),
    }
    if equal is not None:
        sums, count = (equal.v / unit).to(dtype), equal.size.to(dtype)
        more["equal_g_v2"] = _product(g, sums.square() / count, unit2 * errors.gap)
        more["equal_g_v"] = _product(g, sums, unit * errors.gap)
        more["equal_g"] = _product(g, count, torch.full_like(unit2[..., :1], errors.gap))
        more["equal_w2_v2"] = _product(w2, sums.square() / count, unit2)
        more["equal_w2"] = _product(w2, count, torch.ones_like(unit2[..., :1]))
    return more


def flushed(w: torch.Tensor, low: torch.Tensor, numerics: Numerics, count: torch.Tensor) -> torch.Tensor:
    """Most that underflow takes from the weights of a row, in units of w; `low` the smallest log w.

    A weight below the normal range of P's format moves by at most half its smallest subnormal number, and by no
    more than itself. P is at least w, for its maximum is at most lse, so weights of normal size are safe. Formats
    with fp32's range come near that only where it does not matter, and get the limit for all keys.
    """
    p, acc = numerics.format("p"), numerics.format("acc")
    floor = acc.smallest_normal if numerics.flush else acc.smallest_subnormal / 2.0
    if numerics.narrow_p:  # every rounding of P is looked at alone: `pairs.narrow_sums`
        return count * floor
    if p.emin == acc.emin:
        return count * (floor + p.smallest_subnormal / 2.0)
    if float(low.min()) > math.log(p.smallest_normal):
        return count * floor
    # With the sign turned, so that a threshold keeps what is below it: without a mask, which would take longer.
    small = torch.threshold_(-w, -p.smallest_normal, 0.0).clamp_(min=-p.smallest_subnormal / 2.0)
    return count * floor - small.sum(-1, keepdim=True)
