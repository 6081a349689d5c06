"""The projections E and F of Linformer, (k, n) matrices that turn n keys, or values, into k slots.

    gaussian       entries N(0, 1/k), so that x R^T R y is unbiased for x . y, with the variance
                   (|x|^2 |y|^2 + (x . y)^2) / k
    mean_pooling   averages of n/k neighbours
    convolution    one kernel of length n/k, stride n/k, for all slots
    singular       the first k right singular vectors of attention matrices
    fit_values     F by least squares, for a given E
    fit            E and F by gradient

The first three know nothing of the data; the others are fitted to calibration inputs. A Gaussian E makes scores of
random sums of keys: with it the error of the output does not fall with k, not even at k = n. Pooling and fitted
projections converge.

Source: Wang et al., arXiv:2006.04768. Its lemma that bounds the error of x R^T R y relative to x . y doesn't hold as
printed; relative to |x| |y| it does.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.methods.inputs import (
    check_bool,
    check_count,
    check_dtype,
    check_finite,
    check_generator,
    check_scale,
)


class Projection(NamedTuple):
    """A projection of n tokens to k slots."""

    matrix: torch.Tensor  #: (k, n), or (kv_heads, k, n) for one per head
    #: (k, n), none negative: the averages that its rows are, or that training started them from. Where tokens are
    #: absent, the others make up for their share of these weights; a slot of whose share nothing is left is absent
    pooling: torch.Tensor | None = None


def gaussian(
    k: int,
    n: int,
    *,
    generator: torch.Generator,
    heads: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Projection:
    """Entries N(0, 1/k): standard deviation k^-1/2, so a shorter k needs a new draw, not a slice of a longer one."""
    _check_sizes(k, n)
    check_generator(generator)
    check_dtype("dtype", dtype)
    shape = (k, n) if heads is None else (check_count("heads", heads), k, n)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
    return Projection((drawn / k**0.5).to(dtype))


def mean_pooling(k: int, n: int, *, dtype: torch.dtype = torch.float32) -> Projection:
    """Slot s is the average of the tokens s n/k <= j < (s + 1) n/k, rounded down where k doesn't divide n."""
    _check_sizes(k, n)
    check_dtype("dtype", dtype)
    slot = torch.arange(n) * k // n
    matrix = torch.zeros(k, n, dtype=torch.float64)
    matrix[slot, torch.arange(n)] = 1.0
    averages = (matrix / matrix.sum(-1, keepdim=True)).to(dtype)
    return Projection(averages, pooling=averages)


def convolution(k: int, n: int, weight: torch.Tensor) -> Projection:
    """A strided convolution without overlap: weight (n/k,) is applied to every window of n/k tokens. Differentiable."""
    _check_sizes(k, n)
    if n % k:
        raise ArgumentError(
            f"convolution needs k to divide n, got k={k} and n={n}; take a divisor or mean pooling"
        )
    _check_tensor("weight", weight)
    if tuple(weight.shape) != (n // k,):
        raise ArgumentError(f"weight must have the shape (n/k,) = ({n // k},), got {tuple(weight.shape)}")
    return Projection(torch.kron(torch.eye(k, dtype=weight.dtype, device=weight.device), weight[None, :]))


def singular(attention: torch.Tensor, k: int) -> Projection:
    """The first k right singular vectors of attention matrices (..., q_len, n), stacked over all but the last axis."""
    _check_tensor("attention", attention)
    if attention.dim() < 2:
        raise ArgumentError(f"attention must have the axes (..., q_len, n), got {tuple(attention.shape)}")
    n = attention.shape[-1]
    _check_sizes(k, n)
    check_finite("attention", attention)
    rows = attention.reshape(-1, n).double()
    # The eigenvectors of A^T A are n x n, however many matrices there are.
    _, vectors = torch.linalg.eigh(rows.mT @ rows)
    return Projection(vectors.flip(-1)[:, :k].mT.contiguous().to(attention.dtype))


class Sample(NamedTuple):
    """Calibration inputs of one head: q (q_len, head_dim), k (n, head_dim), v (n, v_dim)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def fit_values(samples: Sequence[Sample], e: Projection, *, scale: float | None = None) -> Projection:
    """The F that minimises the sum of |A - P F|_F^2 over samples, A exact attention and P that over the slots of E.

    Linear least squares; of all solutions the smallest, for where P has a lower rank than k. Raises ArgumentError,
    ArgumentTypeError.
    """
    _check_samples(samples, "e", e)
    check_scale(scale, 1)
    projected, wanted = [], []
    for sample in samples:
        a, p = _attention(sample, e.matrix, scale)
        projected.append(p)
        wanted.append(a)
    solution = torch.linalg.lstsq(torch.cat(projected), torch.cat(wanted), driver="gelsd").solution
    return Projection(solution.to(e.matrix.dtype))


def fit(
    samples: Sequence[Sample],
    start: Projection,
    *,
    steps: int = 100,
    learning_rate: float = 0.02,
    shared: bool = False,
    scale: float | None = None,
) -> tuple[Projection, Projection]:
    """E and F that make sum |A V - P F V|^2 / |A V|^2 small over samples, by Adam from `start` for both.

    `shared` keeps E = F. Deterministic. The gradient's minimum is local; `fit_values` afterwards improves F only.
    Raises ArgumentError, ArgumentTypeError.
    """
    _check_samples(samples, "start", start)
    check_count("steps", steps)
    check_bool("shared", shared)
    check_scale(scale, 1)
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, numbers.Real):
        raise ArgumentTypeError(f"learning_rate must be a real number, got {learning_rate!r}")
    if not 0 < learning_rate < math.inf:
        raise ArgumentError(f"learning_rate must be finite and above 0, got {learning_rate!r}")
    # In units in which every row has norm 1, a step means as much to a row of small entries as to one of large.
    size = start.matrix.double().norm(dim=-1, keepdim=True)
    e = (start.matrix.double() / size).clone().requires_grad_()
    f = e if shared else (start.matrix.double() / size).clone().requires_grad_()
    wanted = []
    for sample in samples:
        a, _ = _attention(sample, start.matrix, scale)
        wanted.append(a @ sample.v.double())
    optimiser = torch.optim.Adam([e] if shared else [e, f], lr=learning_rate)
    best, found = torch.inf, (start.matrix.double(), start.matrix.double())
    for _ in range(steps):
        optimiser.zero_grad()
        loss = torch.zeros((), dtype=torch.float64)
        for sample, target in zip(samples, wanted, strict=True):
            p = torch.softmax(_scores(sample, e * size, scale), -1)
            loss = loss + (p @ (f * size @ sample.v.double()) - target).square().sum() / target.square().sum()
        reached = float(loss.detach())
        if reached < best:
            best, found = reached, ((e * size).detach().clone(), (f * size).detach().clone())
        loss.backward()
        optimiser.step()
    dtype = start.matrix.dtype
    return Projection(found[0].to(dtype)), Projection(found[1].to(dtype))


def _scores(sample: Sample, e: torch.Tensor, scale: float | None) -> torch.Tensor:
    factor = sample.q.shape[-1] ** -0.5 if scale is None else scale
    return sample.q.double() @ (e.double() @ sample.k.double()).mT * factor


def _attention(sample: Sample, e: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    factor = sample.q.shape[-1] ** -0.5 if scale is None else scale
    exact = torch.softmax(sample.q.double() @ sample.k.double().mT * factor, -1)
    return exact, torch.softmax(_scores(sample, e, scale), -1)


def _check_sizes(k: int, n: int) -> None:
    check_count("n", n)
    check_count("k", k, most=n, why=f", the number of tokens n = {n}: more slots than tokens save nothing")


def _check_tensor(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor) or not x.dtype.is_floating_point:
        raise ArgumentTypeError(f"{name} must be a floating tensor, got {type(x).__name__}")


def _check_samples(samples: Sequence[Sample], name: str, projection: Any) -> None:
    """What is fitted, and what to."""
    if not isinstance(projection, Projection):
        raise ArgumentTypeError(f"{name} must be a Projection, got {type(projection).__name__}")
    if projection.matrix.dim() != 2:
        raise ArgumentError(
            f"{name} must have the shape (k, n), one head's, got {tuple(projection.matrix.shape)}; fit each head by itself"
        )
    n = projection.matrix.shape[-1]
    if not samples:
        raise ArgumentError("fitting needs at least one calibration sample")
    for sample in samples:
        if not isinstance(sample, Sample):
            raise ArgumentTypeError(
                f"a calibration sample must be a Sample(q, k, v), got {type(sample).__name__}"
            )
        for part, x in zip(("q", "k", "v"), sample, strict=True):
            _check_tensor(f"{part} of a calibration sample", x)
            if not bool(torch.isfinite(x).all()):
                raise ArgumentError(
                    f"{part} of a calibration sample has NaN or infinite entries; replace or drop it"
                )
        if sample.k.dim() != 2 or sample.k.shape[0] != n or sample.v.shape[0] != n:
            raise ArgumentError(
                f"a calibration sample has k {tuple(sample.k.shape)} and v {tuple(sample.v.shape)}; expected the"
                f" {n} tokens that the projection is for"
            )
