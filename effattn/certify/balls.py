"""Attention and its gradients in ball arithmetic: for each element an interval that certainly holds the exact value.

Arb (F. Johansson, arXiv 1611.02831) carries a midpoint and a radius through every operation, so what comes out is a
theorem about the inputs' very numbers. Everything is written out from the conventions of `effattn.case`, pair by pair,
on whole matrices; nothing is shared with `effattn.exact`, which it is held against. It is meant for small cases.

Products q.k are formed as integers and so are exact. Scores that are equal are one and the same ball, and their
difference from the maximum is exactly 0, so that equal weights are equal: balls alone could never tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import flint
import numpy as np
from flint import arb, arb_mat, fmpz_mat

from effattn.errors import RequestError

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from effattn.case import Case, Inputs

    Floats = NDArray[np.float64]

#: bits of the midpoints to begin with; the result has nearly twice those of float64
PRECISION = 128
#: every number of fp16, bf16 and fp32 is a multiple of 2 ** -UNIT
UNIT = 149
#: the most products of two numbers that a case may need; about a minute
MOST_PRODUCTS = 1 << 25


class Score(NamedTuple):
    """What decides a score besides the scale and the cap, exactly."""

    #: q.k in units of 2 ** (-2 UNIT)
    product: int
    #: bias and ALiBi
    added: Fraction
    #: the score itself where it is a fraction; scores are equal where this is, or else the other two
    total: Fraction | None

    @property
    def key(self) -> object:
        """Equal for equal scores."""
        return self[:2] if self.total is None else self.total


@dataclass
class Row:
    """One query of one head: what it sees, with its weights."""

    keys: list[int]
    scores: list[Score]
    #: softmax weights before dropout, of the keys, and of the sink
    weights: list[arb]
    sink: arb | None
    lse: arb | None
    #: derivative of each score by scale q.k
    slopes: list[arb]


@dataclass
class Enclosures:
    """Quantity ("out", "lse", "dq", "dk", "dv", "dbias", "dsinks") -> balls, as an object array of its shape.

    The log-sum-exp of a row without any key or sink is None: minus infinity.
    """

    balls: dict[str, NDArray[Any]] = field(default_factory=dict)
    rows: dict[tuple[int, int, int], Row] = field(default_factory=dict)

    def limits(self, name: str) -> tuple[Floats, Floats]:
        """Lower and upper limits of each element in float64, rounded outwards."""
        pairs = [_limits(x) for x in self.balls[name].ravel()]
        both = np.array(pairs, dtype=np.float64).reshape(*self.balls[name].shape, 2)
        return both[..., 0], both[..., 1]


@contextmanager
def precision(bits: int) -> Iterator[None]:
    """Balls of so many bits inside."""
    before = flint.ctx.prec
    flint.ctx.prec = bits
    try:
        yield
    finally:
        flint.ctx.prec = before


def enclose(
    case: Case, inputs: Inputs, *, keep: torch.Tensor | None = None, bits: int = PRECISION
) -> Enclosures:
    """Output, log-sum-exp and, where the case asks for them, all gradients, of the inputs of the case.

    `keep` (batch, heads, q_len, kv_len) bool: the weights that dropout keeps; needed where the case has dropout.
    RequestError for inputs that are not finite, and for a case that is too large.
    """
    products = case.batch * case.heads * case.q_len * case.kv_len * (case.head_dim + case.v_dim)
    if products > MOST_PRODUCTS:
        raise RequestError(
            f"case {case.describe()} needs {products:,} products: ball arithmetic is for at most {MOST_PRODUCTS:,}."
            " Take a smaller case."
        )
    with precision(bits):
        return _Problem(case, inputs, keep).solve()


class Rational:
    """Elements that are fractions by their form, which no interval decides where they are ties.

    A row whose scores are all equal has equal weights. Otherwise, if the keys of each score that occurs have the same
    mean value after dropout, that mean is the output, whatever the weights are; a sink has the value 0. Gradients are
    fractions where the weights, the scale and the slopes are.
    """

    def __init__(self, case: Case, inputs: Inputs, keep: torch.Tensor | None, found: Enclosures) -> None:
        self.case, self.rows, self.group = case, found.rows, case.heads // case.kv_heads
        self.keep = None if keep is None else keep.numpy()
        self.kept = 1 / (1 - Fraction(case.dropout))
        self.q, self.k, self.v = (x.double().numpy() for x in inputs)
        extras = inputs.extras
        self.d_out = None if extras.d_out is None else extras.d_out.double().numpy()
        self.d_lse = None if extras.d_lse is None else extras.d_lse.double().numpy()
        self.scale = rational_scale(case)

    def value(self, name: str, at: tuple[int, ...]) -> Fraction | None:
        """The element, or None where it is not seen to be a fraction."""
        if name == "out":
            return self._out(*at)
        if name == "dq":
            b, h, i, d = at
            return self._dot(self._d_products(b, h, i), self.k[b, h // self.group, :, d])
        if name not in ("dk", "dv"):
            return None
        b, g, j, d = at
        total = Fraction(0)
        for h in range(g * self.group, (g + 1) * self.group):
            for i in range(self.case.q_len):
                if j not in self.rows[b, h, i].keys:
                    continue
                if name == "dv":
                    assert self.d_out is not None
                    factors, other = self._weights(b, h, i), self.d_out[b, h, i, d]
                else:
                    factors, other = self._d_products(b, h, i), self.q[b, h, i, d]
                if other == 0.0:
                    continue
                if factors is None:
                    return None
                total += (
                    factors[j] * (self._factor(b, h, i, j) if name == "dv" else 1) * Fraction(float(other))
                )
        return total

    def _factor(self, b: int, h: int, i: int, j: int) -> Fraction:
        """0 for dropped weights, else 1 / (1 - dropout)."""
        return self.kept if self.keep is None or bool(self.keep[b, h, i, j]) else Fraction(0)

    def _out(self, b: int, h: int, i: int, d: int) -> Fraction | None:
        row = self.rows[b, h, i]
        values: dict[object, list[Fraction]] = {} if row.sink is None else {None: [Fraction(0)]}
        for j, score in zip(row.keys, row.scores, strict=True):
            value = Fraction(float(self.v[b, h // self.group, j, d]))
            values.setdefault(score.key, []).append(self._factor(b, h, i, j) * value)
        means = {sum(given, Fraction(0)) / len(given) for given in values.values()}
        return means.pop() if len(means) == 1 else None

    def _weights(self, b: int, h: int, i: int) -> dict[int, Fraction] | None:
        """key -> weight of a row with equal scores."""
        row = self.rows[b, h, i]
        if row.sink is not None or len({score.key for score in row.scores}) > 1:
            return None
        return {j: Fraction(1, len(row.keys)) for j in row.keys}

    def _d_products(self, b: int, h: int, i: int) -> dict[int, Fraction] | None:
        """key -> gradient of q.k."""
        weights = self._weights(b, h, i)
        if weights is None or self.scale is None or self.case.softcap is not None:
            return None
        assert self.d_out is not None
        g = [Fraction(x) for x in self.d_out[b, h, i].tolist()]
        values = self.v[b, h // self.group]
        d_p = {
            j: self._factor(b, h, i, j)
            * sum((x * Fraction(y) for x, y in zip(g, values[j].tolist(), strict=True)), Fraction(0))
            for j in weights
        }
        delta = sum((weights[j] * d_p[j] for j in weights), Fraction(0))
        upstream = Fraction(0) if self.d_lse is None else Fraction(float(self.d_lse[b, h, i]))
        return {j: self.scale * w * (d_p[j] - delta + upstream) for j, w in weights.items()}

    @staticmethod
    def _dot(factors: dict[int, Fraction] | None, column: Floats) -> Fraction | None:
        if factors is None:
            return None
        return sum((x * Fraction(float(column[j])) for j, x in factors.items()), Fraction(0))


def rational_scale(case: Case) -> Fraction | None:
    """The scale of the case if it is a fraction: given, or the root of a square."""
    if case.scale is not None:
        return Fraction(case.scale)
    root = math.isqrt(case.head_dim)
    return Fraction(1, root) if root * root == case.head_dim else None


def ends(ball: arb) -> tuple[Fraction, Fraction]:
    """The ends of the interval, exactly. (`lower` and `upper` round to the precision of the moment.)"""
    middle, radius = _fraction(ball.mid()), _fraction(ball.rad())
    return middle - radius, middle + radius


def _fraction(exact: arb) -> Fraction:
    mantissa, exponent = exact.man_exp()
    return Fraction(int(mantissa)) * Fraction(2) ** int(exponent)


class _Problem:
    def __init__(self, case: Case, inputs: Inputs, keep: torch.Tensor | None) -> None:
        self.case = case
        extras = inputs.extras
        tensors = dict(zip("qkv", inputs, strict=True)) | extras.present()
        arrays = {name: _array(name, x) for name, x in tensors.items()}
        self.q, self.k, self.v = (arrays[name] for name in "qkv")
        self.full = (case.batch, case.heads, case.q_len, case.kv_len)
        self.bias_shape = arrays["bias"].shape if "bias" in arrays else None
        self.bias = np.broadcast_to(arrays["bias"], self.full) if "bias" in arrays else None
        self.mask = np.broadcast_to(arrays["mask"], self.full) if "mask" in arrays else None
        self.sinks = arrays.get("sinks")
        self.slopes = arrays.get("alibi_slopes")
        if self.slopes is not None:
            self.slopes = np.broadcast_to(self.slopes, self.full[:2])
        self.q_lengths, self.kv_lengths = arrays.get("q_lengths"), arrays.get("kv_lengths")
        self.d_out, self.d_lse = arrays.get("d_out"), arrays.get("d_lse")
        self.keep = None if keep is None else keep.cpu().numpy()
        if case.dropout and self.keep is None:
            raise RequestError("a case with dropout is enclosed for the weights that it kept; give keep=.")
        #: 1 / (1 - dropout)
        self.kept = 1 / (1 - Fraction(case.dropout))
        self.scale = arb(case.head_dim).rsqrt() if case.scale is None else arb(case.scale)
        self.rational_scale = rational_scale(case)
        self.group = case.heads // case.kv_heads

    def solve(self) -> Enclosures:
        case, found = self.case, Enclosures()
        shape = (*self.full[:3], case.v_dim)
        balls = {"out": _zeros(shape), "lse": np.full(self.full[:3], None, dtype=object)}
        if self.d_out is not None:
            balls |= {"dq": _zeros(self.q.shape), "dk": _zeros(self.k.shape), "dv": _zeros(self.v.shape)}
            if self.bias_shape is not None:
                balls["dbias"] = _zeros(self.bias_shape)
            if self.sinks is not None:
                balls["dsinks"] = _zeros(self.sinks.shape)
        found.balls = balls
        for b in range(case.batch):
            for h in range(case.heads):
                self._head(b, h, found)
        return found

    def visible(self, b: int, h: int, i: int) -> list[int]:
        """The keys that the query sees."""
        case = self.case
        m = case.q_len if self.q_lengths is None else int(self.q_lengths[b])
        n = case.kv_len if self.kv_lengths is None else int(self.kv_lengths[b])
        if i >= m:
            return []
        at = i + self._shift(b)
        first, last = 0, n - 1
        if case.causal != "none":
            last = min(last, at)
        if case.window is not None:
            left, right = case.window
            first = max(first, at - left) if left >= 0 else first
            last = min(last, at + right) if right >= 0 else last
        return [
            j
            for j in range(first, last + 1)
            if (self.mask is None or self.mask[b, h, i, j])
            and (self.bias is None or self.bias[b, h, i, j] != -np.inf)
        ]

    def _shift(self, b: int) -> int:
        if self.case.causal == "top-left":
            return 0
        m = self.case.q_len if self.q_lengths is None else int(self.q_lengths[b])
        n = self.case.kv_len if self.kv_lengths is None else int(self.kv_lengths[b])
        return n - m

    def _added(self, b: int, h: int, i: int, j: int) -> Fraction:
        added = Fraction(0)
        if self.bias is not None:
            added += Fraction(float(self.bias[b, h, i, j]))
        if self.slopes is not None:
            added -= Fraction(float(self.slopes[b, h])) * abs(i + self._shift(b) - j)
        return added

    def _exactly(self, b: int, h: int, i: int, j: int, product: int) -> Score:
        added, total = self._added(b, h, i, j), None
        if self.rational_scale is not None and self.case.softcap is None:
            total = self.rational_scale * product / 4**UNIT + added
        return Score(product, added, total)

    def _score(self, exactly: Score) -> tuple[arb, arb]:
        """The score and its derivative by scale q.k."""
        score, slope = self.scale * arb(exactly.product) * arb(2) ** (-2 * UNIT), arb(1)
        if self.case.softcap is not None:
            cap = arb(self.case.softcap)
            tanh = (score / cap).tanh()
            score, slope = cap * tanh, 1 - tanh * tanh
        return score + _ball(exactly.added), slope

    def _row(
        self, b: int, h: int, i: int, products: fmpz_mat | None, known: dict[object, tuple[arb, arb]]
    ) -> Row:
        """`known`: Score.key -> score and slope, of the head."""
        keys = self.visible(b, h, i)
        scores = []
        if products is not None:
            scores = [self._exactly(b, h, i, j, int(products[i, j])) for j in keys]
        for score in scores:
            if score.key not in known:
                known[score.key] = self._score(score)
        padding = self.q_lengths is not None and i >= int(self.q_lengths[b])
        sink = None if self.sinks is None or padding else arb(float(self.sinks[h]))
        if not keys and sink is None:
            return Row(keys, scores, [], None, None, [])
        # Any number may be taken off; the largest keeps the exponentials from overflowing.
        top = max((score.key for score in scores), key=lambda key: known[key][0].mid(), default=None)
        base = sink if top is None else known[top][0]
        assert base is not None
        p = [arb(1) if score.key == top else (known[score.key][0] - base).exp() for score in scores]
        p_sink = None if sink is None else (sink - base).exp()
        total = sum(p, arb(0) if p_sink is None else p_sink)
        return Row(
            keys,
            scores,
            [x / total for x in p],
            None if p_sink is None else p_sink / total,
            base + total.log(),
            [known[score.key][1] for score in scores],
        )

    def _head(self, b: int, h: int, found: Enclosures) -> None:
        case, g = self.case, h // self.group
        products = None
        if case.q_len and case.kv_len:
            products = _integers(self.q[b, h]) * _integers(self.k[b, g]).transpose()
        known: dict[object, tuple[arb, arb]] = {}
        rows = [self._row(b, h, i, products, known) for i in range(case.q_len)]
        values = _matrix(self.v[b, g])
        out = found.balls["out"]
        for i, row in enumerate(rows):
            found.rows[b, h, i] = row
            found.balls["lse"][b, h, i] = row.lse
            if row.keys:
                w = arb_mat(1, case.kv_len, self._spread(row, self._dropped(b, h, i, row)))
                out[b, h, i] = (w * values).entries()
        if self.d_out is not None:
            self._backward(b, h, rows, found)

    def _dropped(self, b: int, h: int, i: int, row: Row) -> list[arb]:
        """Weights after dropout, of the keys."""
        if self.keep is None:
            return row.weights
        kept = _ball(self.kept)
        return [
            w * kept if self.keep[b, h, i, j] else arb(0) for w, j in zip(row.weights, row.keys, strict=True)
        ]

    def _spread(self, row: Row, of_keys: list[arb]) -> list[arb]:
        """With a 0 for each key that is not seen."""
        line = [arb(0)] * self.case.kv_len
        for j, x in zip(row.keys, of_keys, strict=True):
            line[j] = x
        return line

    def _backward(self, b: int, h: int, rows: list[Row], found: Enclosures) -> None:
        case, g, balls = self.case, h // self.group, found.balls
        assert self.d_out is not None
        m, n = case.q_len, case.kv_len
        if not m:
            return
        d_out = _matrix(self.d_out[b, h])
        d_p = d_out * _matrix(self.v[b, g]).transpose() if n else None
        weights, d_scores = [], []
        for i, row in enumerate(rows):
            upstream = arb(0) if self.d_lse is None else arb(float(self.d_lse[b, h, i]))
            dropped = self._dropped(b, h, i, row)
            delta = arb(0)
            for j, w in zip(row.keys, dropped, strict=True):
                assert d_p is not None
                delta += w * d_p[i, j]
            if row.sink is not None and "dsinks" in balls:
                balls["dsinks"][h] += row.sink * (upstream - delta)
            d_score = []
            for j, w, r in zip(row.keys, row.weights, dropped, strict=True):
                assert d_p is not None
                d_score.append(r * d_p[i, j] + w * (upstream - delta))
            if "dbias" in balls:
                for j, x in zip(row.keys, d_score, strict=True):
                    at = tuple(
                        0 if size == 1 else place
                        for size, place in zip(balls["dbias"].shape, (b, h, i, j), strict=True)
                    )
                    balls["dbias"][at] += x
            weights += self._spread(row, dropped)
            sloped = [x * s * self.scale for x, s in zip(d_score, row.slopes, strict=True)]
            d_scores += self._spread(row, sloped)
        if not n:
            return
        p, d_s = arb_mat(m, n, weights), arb_mat(m, n, d_scores)
        for name, at, product in (
            ("dq", (b, h), d_s * _matrix(self.k[b, g])),
            ("dk", (b, g), d_s.transpose() * _matrix(self.q[b, h])),
            ("dv", (b, g), p.transpose() * d_out),
        ):
            entries = np.array(product.entries(), dtype=object)
            balls[name][at] += entries.reshape(balls[name][at].shape)


def _array(name: str, x: torch.Tensor) -> NDArray[Any]:
    import torch

    array = x.detach().cpu()
    array = array.double().numpy() if array.is_floating_point() else array.to(torch.int64).numpy()
    if array.dtype == np.float64 and not (np.isfinite(array) | ((array == -np.inf) & (name == "bias"))).all():
        raise RequestError(
            f"{name} has elements that are not finite: there is no interval around what they give. Take other values."
        )
    return array


def _zeros(shape: tuple[int, ...]) -> NDArray[Any]:
    zeros = np.empty(shape, dtype=object)
    zeros.fill(arb(0))
    return zeros


def _entries(x: NDArray[Any], convert: Callable[[float], Any]) -> list[Any]:
    return [convert(value) for value in x.ravel().tolist()]


def _matrix(x: Floats) -> arb_mat:
    rows, columns = x.shape
    return arb_mat(rows, columns, _entries(x, arb))


def _integers(x: Floats) -> fmpz_mat:
    """In units of 2 ** -UNIT."""
    rows, columns = x.shape
    return fmpz_mat(rows, columns, _entries(x, lambda value: int(Fraction(value) * 2**UNIT)))


def _ball(x: Fraction) -> arb:
    return arb(x.numerator) / arb(x.denominator)


def _limits(ball: arb | None) -> tuple[float, float]:
    """The ends in float64, rounded outwards."""
    if ball is None:
        return -np.inf, -np.inf
    low, high = ends(ball)
    below, above = float(low), float(high)
    return (
        below if below <= low else float(np.nextafter(below, -np.inf)),
        above if above >= high else float(np.nextafter(above, np.inf)),
    )
