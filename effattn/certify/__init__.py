"""The reference certified: exact attention in float64 against intervals that hold the exact values.

`certify(case)` encloses every element of the output, the log-sum-exp and the gradients by ball arithmetic
(`effattn.certify.balls`) and says how far the float64 reference is from them, in units, and whether it rounds to the
same number of the dtype.

A unit is what relative perturbations of 2^-53 do to an element, to first order: one of each number that is formed, and
sqrt(n) of a sum of n terms, whose partial sums are rounded n times at random (N. J. Higham, T. Mary, SIAM J. Sci. Comput.
41, 2019). With A_ij = (2 + sqrt(head_dim)) |scale| sum_d |q_id k_jd| + 2 (|bias| + |ALiBi|) + 1 for a score and its
exponential, N keys, M queries of all heads of a group, r the factors of dropout, g = dO and c the gradient of the lse:

    out     sum_j w_ij A_ij |r_ij v_jd - o_id| + sqrt(N) (sum_j w_ij r_ij |v_jd| + |o_id|)
    lse     sum_j w_ij A_ij + sqrt(N) + |lse_i| = L_i
    dS      |dS_ij| (A_ij + L_i) + w_ij (sqrt(v_dim) r_ij sum_d |g_id v_jd| + D_i + |c_i|),  D_i = sum_d |g_id| unit(o_id)
    dQ      |scale| sum_j (unit(dS_ij) + sqrt(N) |dS_ij|) |k_jd|;  dK with M and q
    dV      sum_i w_ij r_ij (A_ij + L_i + sqrt(M)) |g_id|

Needs python-flint: `pip install 'effattn[certify]'`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from effattn.case import Case, Inputs
    from effattn.certify.balls import Enclosures
    from effattn.tolerances.formats import Format

    Floats = NDArray[np.float64]
    #: the case, its inputs and the weights that dropout keeps -> quantity -> float64 elements
    Reference = Callable[[Case, Inputs, torch.Tensor | None], dict[str, Floats]]

#: the most units that the reference may be off
ALLOWED = 4.0
#: unit roundoff of float64
U = 2.0**-53
#: bits at which an element whose rounding is still open is said to be so
MOST_BITS = 2048


@dataclass(frozen=True, kw_only=True)
class Certified:
    """One quantity of the reference beside its enclosure."""

    name: str
    count: int
    #: the largest distance of a float64 element from the far end of its enclosure, in units
    units: float
    #: where that is
    worst: tuple[int, ...] | None
    #: elements that float64, being off by `ALLOWED` units, cannot round to the dtype for certain
    open: int
    #: those of them that the enclosure decides, and those where float64 rounded to another number
    decided: int
    wrong: int

    @property
    def holds(self) -> bool:
        """Whether the reference is as near as it has to be."""
        return self.units <= ALLOWED


def check_installed() -> None:
    """RequestError where ball arithmetic is not installed."""
    if find_spec("flint") is None:
        raise RequestError(
            "certifying needs python-flint, which is not installed: pip install 'effattn[certify]'."
        )


def certify(case: Case, reference: Reference | None = None) -> list[Certified]:
    """The float64 reference of a small case, quantity by quantity; `reference` in place of effattn's own.

    RequestError where python-flint is missing, the case is too large, or its inputs are not finite.
    """
    check_installed()
    from effattn.certify.balls import enclose
    from effattn.tolerances import formats

    inputs = case.tensors()
    keep = some_dropout(case)
    found = enclose(case, inputs, keep=keep)
    got = (float64_reference if reference is None else reference)(case, inputs, keep)
    units = Units(case, inputs, found, keep)
    input_, fp32 = formats.get(case.dtype), formats.get("fp32")
    wide = {"lse", "dsinks", *(["dbias"] if case.bias.endswith(":fp32") else [])}
    decide = _Decider(case, inputs, keep, found)
    return [
        _compare(name, x, found, units.of(name), fp32 if name in wide else input_, decide)
        for name, x in got.items()
    ]


def float64_reference(case: Case, inputs: Inputs, keep: torch.Tensor | None) -> dict[str, Floats]:
    """effattn's own: exact attention and its gradients."""
    import torch

    from effattn import exact as reference
    from effattn.exact import Options

    options = Options.of(case, inputs, keep=keep)
    q, k, v = (x.detach().to(torch.float64) for x in inputs)
    exact = (
        reference.attention(q, k, v, causal=case.causal, scale=case.softmax_scale)
        if options.plain
        else reference.attention_with(q, k, v, options)
    )
    got = {"out": exact.out, "lse": exact.lse}
    extras = inputs.extras
    if extras.d_out is not None:
        gradients = reference.gradients(q, k, v, extras.d_out, options, exact=exact, d_lse=extras.d_lse)
        got |= {f"d{name}": x for name, x in gradients.present().items()}
    return {name: x.numpy() for name, x in got.items()}


def some_dropout(case: Case) -> torch.Tensor | None:
    """Some mask of dropout, drawn from the seed of the case."""
    if not case.dropout:
        return None
    import torch

    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, case.q_len, case.kv_len)
    return torch.rand(shape, generator=generator) >= case.dropout


def _compare(
    name: str, got: Floats, found: Enclosures, unit: Floats, fmt: Format, decide: _Decider
) -> Certified:
    import numpy as np

    low, high = found.limits(name)
    if not got.size:
        return Certified(name=name, count=0, units=0.0, worst=None, open=0, decided=0, wrong=0)
    with np.errstate(invalid="ignore"):
        off = np.maximum(np.abs(got - low), np.abs(high - got))
    off[(got == low) & (got == high)] = 0.0  # minus infinities among them
    with np.errstate(divide="ignore", invalid="ignore"):
        in_units = np.where(off == 0.0, 0.0, off / (unit * U))
    worst = np.unravel_index(int(in_units.argmax()), got.shape)
    reach = ALLOWED * U * unit
    finite = np.isfinite(got)
    got = np.where(finite, got, 0.0)
    uncertain = np.argwhere(finite & (fmt.round(got - reach) != fmt.round(got + reach)))
    right = [decide(name, tuple(map(int, at)), fmt) for at in uncertain]
    here = [float(fmt.round(got[tuple(at)][None])[0]) for at in uncertain]
    return Certified(
        name=name,
        count=got.size,
        units=float(in_units[worst]),
        worst=tuple(int(i) for i in worst),
        open=len(uncertain),
        decided=sum(x is not None for x in right),
        wrong=sum(x is not None and x != y for x, y in zip(right, here, strict=True)),
    )


class _Decider:
    """Rounds an element rightly: by its ball, by finer and finer ones, or because it is a tie by its form."""

    def __init__(self, case: Case, inputs: Inputs, keep: torch.Tensor | None, found: Enclosures) -> None:
        from effattn.certify.balls import PRECISION, Rational

        self.rational = Rational(case, inputs, keep, found)
        self.case, self.inputs, self.keep = case, inputs, keep
        self.finer = {PRECISION: found}

    def __call__(self, name: str, at: tuple[int, ...], fmt: Format) -> float | None:
        from effattn.certify.balls import PRECISION, enclose
        from effattn.certify.rounding import decided, round_fraction

        exactly = self.rational.value(name, at)
        if exactly is not None:
            return round_fraction(exactly, fmt)
        bits = PRECISION
        while bits <= MOST_BITS:
            if bits not in self.finer:
                self.finer[bits] = enclose(self.case, self.inputs, keep=self.keep, bits=bits)
            ball = self.finer[bits].balls[name][at]
            value = None if ball is None else decided(ball, fmt)
            if value is not None:
                return value
            bits *= 4
        return None


class Units:
    """The units of every quantity, in float64; dense, for small cases."""

    def __init__(self, case: Case, inputs: Inputs, found: Enclosures, keep: torch.Tensor | None) -> None:
        import numpy as np

        self.case = case
        q, k, v = (np.abs(x.double().numpy()) for x in inputs)
        group = case.heads // case.kv_heads
        values = np.repeat(inputs.v.double().numpy(), group, 1)
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scale = abs(case.softmax_scale)
        out = _middles(found.balls["out"])
        w, size = self._weights(found, scale * np.einsum("bhid,bhjd->bhij", q, k))
        w_sink, sink_size = self._sink(found, inputs)
        r = np.ones(w.shape) if keep is None else keep.numpy() / (1.0 - case.dropout)
        keys, queries = math.sqrt(case.kv_len + 1.0), math.sqrt(case.q_len * group)
        lse = np.array([0.0 if x is None else abs(float(x.mid())) for x in found.balls["lse"].ravel()])
        l_unit = np.einsum("bhij,bhij->bhi", w, size) + w_sink * sink_size
        l_unit += lse.reshape(l_unit.shape) + keys
        moved = np.abs(r[..., None] * values[:, :, None] - out[..., None, :])
        o_unit = np.einsum("bhij,bhijd->bhid", w * size, moved)
        o_unit += keys * np.einsum("bhij,bhjd->bhid", w * r, v)
        o_unit += np.abs(out) * (keys + (w_sink * sink_size)[..., None])
        self._units: dict[str, Floats] = {"out": o_unit, "lse": l_unit}
        extras = inputs.extras
        if extras.d_out is None:
            return
        g = extras.d_out.double().numpy()
        c = np.zeros(l_unit.shape) if extras.d_lse is None else extras.d_lse.double().numpy()
        delta = np.einsum("bhid,bhid->bhi", g, out)
        delta_unit = np.einsum("bhid,bhid->bhi", np.abs(g), o_unit)
        whole = size + l_unit[..., None]
        d_s = np.abs(w * (r * np.einsum("bhid,bhjd->bhij", g, values) + (c - delta)[..., None]))
        d_p = math.sqrt(case.v_dim) * r * np.einsum("bhid,bhjd->bhij", np.abs(g), v)
        s_unit = d_s * whole + w * (d_p + (delta_unit + np.abs(c))[..., None])
        self._units |= {
            "dq": scale * np.einsum("bhij,bhjd->bhid", s_unit + keys * d_s, k),
            "dk": self._of_group(scale * np.einsum("bhij,bhid->bhjd", s_unit + queries * d_s, q)),
            "dv": self._of_group(np.einsum("bhij,bhid->bhjd", w * r * (whole + queries), np.abs(g))),
        }
        if extras.bias is not None:
            axes = tuple(i for i, n in enumerate(extras.bias.shape) if n == 1)
            terms = math.sqrt(math.prod(d_s.shape) / max(1, extras.bias.numel()))
            self._units["dbias"] = (s_unit + terms * d_s).sum(axes, keepdims=True)
        if extras.sinks is not None:
            moved = np.abs(c - delta) * (sink_size + l_unit) + np.abs(c) + delta_unit
            self._units["dsinks"] = (w_sink * moved).sum((0, 2))

    def of(self, name: str) -> Floats:
        """Of the shape of the quantity."""
        return self._units[name]

    def _of_group(self, x: Floats) -> Floats:
        case = self.case
        return x.reshape(case.batch, case.kv_heads, case.heads // case.kv_heads, *x.shape[2:]).sum(2)

    def _weights(self, found: Enclosures, products: Floats) -> tuple[Floats, Floats]:
        """w and A, (batch, heads, q_len, kv_len)."""
        import numpy as np

        w, size = np.zeros(products.shape), np.zeros(products.shape)
        root = 2.0 + math.sqrt(self.case.head_dim)  # the score itself, rounded when it is kept, is no larger
        for (b, h, i), row in found.rows.items():
            for j, score, weight in zip(row.keys, row.scores, row.weights, strict=True):
                w[b, h, i, j] = float(weight.mid())
                size[b, h, i, j] = root * products[b, h, i, j] + 2.0 * abs(float(score.added)) + 1.0
        return w, size

    def _sink(self, found: Enclosures, inputs: Inputs) -> tuple[Floats, Any]:
        import numpy as np

        w = np.zeros((self.case.batch, self.case.heads, self.case.q_len))
        for at, row in found.rows.items():
            w[at] = 0.0 if row.sink is None else float(row.sink.mid())
        sinks = inputs.extras.sinks
        return w, 1.0 if sinks is None else np.abs(sinks.double().numpy())[None, :, None] + 1.0


def _middles(balls: NDArray[Any]) -> Floats:
    import numpy as np

    return np.array([float(x.mid()) for x in balls.ravel()], dtype=np.float64).reshape(balls.shape)
