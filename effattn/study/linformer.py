"""`effattn study linformer`: the error of projected keys and values against their number k.

Parts: `error`; `spectrum`, the share of the singular values that the first k carry (figure 1 of the paper, which adds
the values, not their squares); `lemma`, how often the printed Johnson-Lindenstrauss bound holds; `construction`, the
matrices of the proof of theorem 2, beside an output of zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from effattn.methods.linformer import linformer_attention
from effattn.methods.linformer_projections import (
    Projection,
    Sample,
    fit,
    fit_values,
    gaussian,
    mean_pooling,
    singular,
)
from effattn.study import measures, own
from effattn.study.performer import baseline
from effattn.study.problems import Problem, problem

if TYPE_CHECKING:
    from effattn.study.engine import Job

#: method -> what it is
METHODS: dict[str, str] = {
    "gaussian": "E = F, entries N(0, 1/k)",
    "gaussian, E and F": "two independent draws",
    "mean pooling": "E = F, averages of n/k neighbours",
    "singular vectors": "E = F, first right singular vectors of calibration attention",
    "pooling, F fitted": "E averages; F by least squares on calibration inputs",
    "E and F fitted": "by gradient from averages on calibration inputs",
}
#: those that depend on a draw even where the inputs don't
RANDOM = ("gaussian", "gaussian, E and F")
FIT_STEPS = 60


def measure(job: Job, *, seed: int, divergence: bool = True) -> Mapping[str, float]:
    """One draw: new inputs (unless real), new random projections. `divergence` of the weights: of a user's own."""
    point = job.point
    if point.part == "spectrum":
        return spectrum(job, seed=seed)
    if point.part == "lemma":
        return lemma(job)
    # Fitted projections are judged on inputs that they were not fitted to: of a real text, the other half.
    real = point.values.startswith("real:")
    data = problem(job, seed=seed, half=1 if real else None)
    if point.part == "construction":
        return construction(job, data)
    if own.is_own(point.method):
        return own.measure(job, data, divergence=divergence)
    if point.method not in METHODS:
        return baseline(data, point.method, point.size, job)
    e, f = projections(job, data, seed=seed)
    exact = data.exact
    wide = linformer_attention(data.q.double(), data.k.double(), data.v.double(), e, f)
    if point.dtype == "fp64":
        return measures.output_errors(wide, exact)
    narrow = linformer_attention(data.q, data.k, data.v, e, f, compute_dtype=data.q.dtype).double()
    found = measures.output_errors(narrow, exact)
    found["approximation"] = measures.output_errors(wide, exact)["error"]
    found["rounding"] = float((narrow - wide).norm() / wide.norm())
    return found


def projections(job: Job, data: Problem, *, seed: int) -> tuple[Projection, Projection]:
    """E and F of a method for the sizes of a job."""
    point = job.point
    method, size, n = point.method, point.size, point.n
    if method in RANDOM:
        generator = torch.Generator().manual_seed(job.seed(method, size))
        e = gaussian(size, n, generator=generator, dtype=torch.float64)
        return e, e if method == "gaussian" else gaussian(size, n, generator=generator, dtype=torch.float64)
    if method == "mean pooling":
        e = mean_pooling(size, n, dtype=torch.float64)
        return e, e
    known = _calibration(
        point.n, point.head_dim, point.values, point.input_scale, point.dtype, seed, job.draw
    )
    return _fitted(method, size, known)


@lru_cache(maxsize=1)
def _calibration(
    n: int, head_dim: int, values: str, scale: float, dtype: str, seed: int, draw: int
) -> tuple[Sample, ...]:
    """All heads of inputs that nothing is judged on."""
    from effattn.study.engine import Job, Point

    real = values.startswith("real:")
    draws = [draw] if real else [10_000 + 2 * draw, 10_001 + 2 * draw]
    samples = []
    for number in draws:
        point = Point(n=n, head_dim=head_dim, values=values, input_scale=scale, dtype=dtype, method="")
        data = problem(Job(point=point, draw=number), seed=seed, half=0 if real else None)
        group = data.q.shape[1] // data.k.shape[1]
        samples += [
            Sample(data.q[0, h], data.k[0, h // group], data.v[0, h // group]) for h in range(data.q.shape[1])
        ]
    return tuple(samples)


@lru_cache(maxsize=4)
def _fitted(method: str, size: int, samples: tuple[Sample, ...]) -> tuple[Projection, Projection]:
    n = samples[0].k.shape[0]
    pooled = mean_pooling(size, n, dtype=torch.float64)
    if method == "singular vectors":
        weights = torch.stack(
            [measures.exact_weights(s.q[None, None], s.k[None, None], causal=False) for s in samples]
        )
        e = singular(weights, size)
        return e, e
    if method == "pooling, F fitted":
        return pooled, fit_values(samples, pooled)
    return fit(samples, pooled, steps=FIT_STEPS)


# -- what the paper says -----------------------------------------------------------------------------------


def spectrum(job: Job, *, seed: int) -> Mapping[str, float]:
    """The share of the sum of singular values that the first k carry, averaged over heads, as `error`; the floor of
    the relative Frobenius error, from the squares, as `row_p50`."""
    data = problem(job, seed=seed)
    s = data.svd[1]
    k = job.point.size
    share = s[..., :k].sum(-1) / s.sum(-1)
    floor = (s[..., k:].square().sum(-1) / s.square().sum(-1)).sqrt()
    return {"error": float(share.mean()), "row_p50": float(floor.mean())}


#: draws of R in one draw of the lemma's job
LEMMA_DRAWS = 20


def lemma(job: Job) -> Mapping[str, float]:
    """How often |x R^T R y - x.y| <= eps b holds for eps = 1/2: with b = |x.y|, as printed, `error`; with |x| |y|,
    `row_p50`. x and y are random with x.y = -3.8, R is k x n, n = k = size."""
    n = job.point.size
    g = torch.Generator().manual_seed(job.seed("lemma", n))
    x, y = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    y -= (x @ y + 3.8) / (x @ x) * x
    printed = norms = 0
    for _ in range(LEMMA_DRAWS):
        r = gaussian(n, n, generator=g, dtype=torch.float64).matrix
        error = float(((r @ x) @ (r @ y) - x @ y).abs())
        printed += error <= 0.5 * float((x @ y).abs())
        norms += error <= 0.5 * float(x.norm() * y.norm())
    return {"error": printed / LEMMA_DRAWS, "row_p50": norms / LEMMA_DRAWS}


def construction(job: Job, data: Problem) -> Mapping[str, float]:
    """Theorem 2's proof: E = delta R, F = exp(-delta) R, R (k, n), delta = 1/2^n in the proof, here 2^-20.

    Its own metric is max |error of a row| <= eps |softmax row| |V|, `row_max`; `method` "zero" is an output of zeros.
    """
    v = data.v.double()
    if job.point.method == "zero":
        out = torch.zeros_like(data.exact)
    else:
        delta = 2.0**-20
        generator = torch.Generator().manual_seed(job.seed("construction", job.point.size))
        r = gaussian(job.point.size, job.point.n, generator=generator, dtype=torch.float64).matrix
        # The proof's kernel is exp(Q (E K)^T) (F V) without a normaliser of its own: that of exact attention is used.
        group = data.q.shape[1] // data.k.shape[1]
        k, v = data.k.double().repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = data.q.double() @ k.mT / math.sqrt(data.q.shape[-1])
        kernel = (scores @ (delta * r).mT).exp() @ (math.exp(-delta) * r)
        out = (kernel @ v) / scores.exp().sum(-1, keepdim=True)
    found = measures.output_errors(out, data.exact)
    allowed = data.weights.norm(dim=-1) * v.flatten(2).norm(dim=-1).amax()
    found["row_max"] = float(((out - data.exact).norm(dim=-1) / allowed).max())
    return found
