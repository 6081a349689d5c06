"""`effattn study performer`: the error of random features against their number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from effattn import exact
from effattn.methods.performer import performer_attention
from effattn.methods.performer_features import draw_projections, feature_map, optimal_a, projections_for
from effattn.study import measures, own, theory
from effattn.study.problems import Problem, problem

if TYPE_CHECKING:
    from effattn.study.engine import Job

#: method -> (features, projections, stabiliser); "stabilised" is how public code comes
METHODS: dict[str, tuple[str, str, float | None]] = {
    "positive, iid": ("positive", "iid", None),
    "positive, orthogonal": ("positive", "orthogonal", None),
    "positive, regularised": ("positive", "regularised", None),
    "positive, orthogonal, stabiliser 1e-4": ("positive", "orthogonal", 1e-4),
    "hyperbolic, orthogonal": ("hyperbolic", "orthogonal", None),
    "trigonometric, iid": ("trigonometric", "iid", None),
    "trigonometric, orthogonal": ("trigonometric", "orthogonal", None),
    "favor++, orthogonal": ("favor++", "orthogonal", None),
    "relu, orthogonal": ("relu", "orthogonal", None),
}
#: what stands beside them at every size, up to `problems.FULL` tokens
BASELINES = ("truncated SVD", "Nystroemformer", "top-k")
QUADRATIC = ("theory", *BASELINES)
CONTROLS = ("zero", "uniform", "shuffled V")


def measure(job: Job, *, seed: int, divergence: bool = True) -> Mapping[str, float]:
    """One draw: new inputs (unless real) and new projections. The divergence of the weights takes most of the time."""
    if job.point.part == "moments":
        return moments(job)
    data = problem(job, seed=seed)
    method, size = job.point.method, job.point.size
    if own.is_own(method):
        return own.measure(job, data, divergence=divergence)
    if method in METHODS:
        return _approximation(job, data, *METHODS[method], divergence=divergence)
    return baseline(data, method, size, job)


def baseline(data: Problem, method: str, size: int, job: Job) -> Mapping[str, float]:
    """A baseline, a control, the theory's curve, in the same measures."""
    if method == "theory":
        return {"error": theory_error(data, size)}
    if method == "zero":
        return measures.output_errors(torch.zeros_like(data.exact), data.exact)
    if method == "uniform":
        return measures.output_errors(
            measures.uniform(data.v, data.q.shape[1], causal=data.causal), data.exact
        )
    if method == "shuffled V":
        generator = torch.Generator().manual_seed(job.seed("shuffle"))
        order = torch.randperm(data.v.shape[2], generator=generator)
        return measures.output_errors(
            exact.attention(data.q, data.k, data.v[:, :, order], causal=data.mask).out, data.exact
        )
    if method == "truncated SVD":
        weights = measures.truncated(data.svd, size)
    elif method == "top-k":
        weights = measures.top_k(data.weights, size)
    else:
        weights = measures.nystroem(data.q, data.k, size)
    return measures.output_errors(measures.apply(weights, data.v), data.exact)


#: rows that the theory's curve is computed for, evenly spaced: each takes n^2 d_v operations
THEORY_ROWS = 32


def theory_error(data: Problem, m: int) -> float:
    """The first-order prediction for iid positive features, see `theory.output_error`: a root mean square over draws."""
    x, y = (t.double() * data.q.shape[-1] ** -0.25 for t in (data.q, data.k))
    rows = torch.linspace(0, x.shape[2] - 1, min(THEORY_ROWS, x.shape[2])).long()
    group = x.shape[1] // y.shape[1]
    square = size = 0.0
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            error, norm = theory.output_error(
                data.weights[b, h, rows].numpy(), x[b, h, rows].numpy(), y[b, h // group].numpy(),
                data.v[b, h // group].double().numpy(), 1,
            )  # fmt: skip
            square, size = square + error, size + norm
    return math.sqrt(square / m / size)


def favor_a(data: Problem, features: str) -> float | None:
    """FAVOR++'s A for the data, None for other features. E|x + y|^2 over all pairs."""
    if features != "favor++":
        return None
    x, y = (t.double() * data.q.shape[-1] ** -0.25 for t in (data.q, data.k))
    mean = x.square().sum(-1).mean() + y.square().sum(-1).mean() + 2 * (x.mean((0, 1, 2)) @ y.mean((0, 1, 2)))
    return optimal_a(max(0.0, float(mean)), x.shape[-1])


def _approximation(
    job: Job, data: Problem, features: str, projections: str, stabiliser: float | None, *, divergence: bool
) -> Mapping[str, float]:
    point = job.point
    # The same normal numbers for every kind of projection, other ones for every number of features.
    generator = torch.Generator().manual_seed(
        job.seed(point.size, features in ("hyperbolic", "trigonometric"))
    )
    omega = draw_projections(
        projections_for(point.size, features), data.q.shape[-1], generator=generator, kind=projections,
        partial=True, dtype=torch.float64,
    )  # fmt: skip
    options = {
        "features": features, "causal": data.causal, "stabiliser": stabiliser, "a": favor_a(data, features),
    }  # fmt: skip
    wide = performer_attention(data.q.double(), data.k.double(), data.v.double(), omega, **options)
    if point.dtype == "fp64":
        return measures.output_errors(wide, data.exact)
    narrow = performer_attention(
        data.q, data.k, data.v, omega, compute_dtype=data.q.dtype, **options
    ).double()
    found = measures.output_errors(narrow, data.exact)
    found["approximation"] = measures.output_errors(wide, data.exact)["error"]
    found["rounding"] = float((narrow - wide).norm() / wide.norm())
    if divergence and data.small and features != "trigonometric":
        eye = torch.eye(data.k.shape[2], dtype=torch.float64).expand(*data.k.shape[:2], -1, -1)
        implied = performer_attention(data.q.double(), data.k.double(), eye, omega, **options)
        hidden = measures.causal_mask(*implied.shape[-2:]) if data.causal else None
        found["kl"] = measures.divergence(implied, data.weights, hidden)
    return found


#: draws of one estimate of a second moment
MOMENT_DRAWS = 1_000_000


def moments(job: Job) -> Mapping[str, float]:
    """Measured over theoretical mean square error of one kernel entry, as `error`; |z|^2 is size / 1000.

    One draw is an average over MOMENT_DRAWS independent projections, in two dimensions: the closed forms hold in all.
    """
    d = 2
    features = job.point.method
    square = job.point.size / 1000
    a = -0.03 if features == "favor++" else None
    z = torch.tensor([0.8, 0.6], dtype=torch.float64) * math.sqrt(square)
    x, y = 0.7 * z[None], 0.3 * z[None]
    generator = torch.Generator().manual_seed(job.seed("moments", features, job.point.size))
    omega = draw_projections(
        1, d, generator=generator, kind="iid", shape=(MOMENT_DRAWS,), dtype=torch.float64
    )
    fx, fy = (feature_map(t, omega, features, a=a) for t in (x, y))
    estimate = ((fx.mantissa * fy.mantissa).sum(-1) * (fx.exponent + fy.exponent).exp()).squeeze(-1)
    error = (estimate - float((x * y).sum().exp())).square().mean()
    expected = theory.mean_square_error(features, x.numpy(), y.numpy(), 1, a=a or 0.0)
    return {"error": float(error) / float(expected[0])}
