"""Random features for the softmax kernel SM(x, y) = exp(x . y), and the projections that they are made of.

A feature map phi has E[phi(x) . phi(y)] = SM(x, y) over the projections omega (except `relu`, whose kernel is
another one). Here z = x + y, and m is the number of projections; inputs are scaled already, x = sqrt(scale) q.

    positive       exp(w.x - |x|^2/2) / sqrt(m)                                        m features
    hyperbolic     exp(-|x|^2/2) [exp(w.x), exp(-w.x)] / sqrt(2m)                      2m features
    trigonometric  exp(|x|^2/2) [sin(w.x), cos(w.x)] / sqrt(m)                         2m features
    favor++        (1-4A)^(d/4) exp(A|w|^2 + sqrt(1-4A) w.x - |x|^2/2) / sqrt(m)       m features
    relu           (max(w.x, 0) + epsilon) / sqrt(m), a generalised kernel             m features

Sources: Choromanski et al., arXiv:2009.14794 (positive, hyperbolic, trigonometric, orthogonal, regularised,
generalised); Likhosherstov et al., arXiv:2205.15317 (favor++).

A map returns a mantissa and an exponent for each token, phi(x) = mantissa * exp(exponent), so that nothing
overflows whatever |x|, and nothing that one token needs depends on another token. Published implementations
subtract a maximum over all keys instead: together with a stabiliser this lets keys of the future into the past.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import torch

from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.methods.inputs import check_bool, check_choice, check_count, check_dtype, check_generator

#: the feature maps
FEATURES = ("positive", "hyperbolic", "trigonometric", "favor++", "relu")
#: how projections are drawn
PROJECTIONS = ("orthogonal", "iid", "regularised")
#: maps with two features for each projection
_PAIRED = ("hyperbolic", "trigonometric")
#: what Performer's authors add to ReLU features
RELU_EPSILON = 1e-3


class Features(NamedTuple):
    """phi(x) = mantissa * exp(exponent)."""

    mantissa: torch.Tensor  #: (..., length, features)
    exponent: torch.Tensor  #: (..., length)

    def value(self) -> torch.Tensor:
        """phi(x) itself, (..., length, features); may overflow."""
        return self.mantissa * self.exponent.exp()[..., None]


def projections_for(num_features: int, features: str) -> int:
    """How many projections a map with that many features takes.

    ArgumentError if the number is odd for a map whose features come in pairs.
    """
    check_choice("features", features, FEATURES)
    check_count("num_features", num_features)
    if features not in _PAIRED:
        return num_features
    if num_features % 2:
        raise ArgumentError(
            f"num_features must be even for {features} features, which come in pairs, got {num_features};"
            f" take {num_features + 1}"
        )
    return num_features // 2


def draw_projections(
    count: int,
    head_dim: int,
    *,
    generator: torch.Generator,
    kind: str = "orthogonal",
    partial: bool = False,
    shape: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Projections omega (*shape, count, head_dim), every row N(0, I) by itself, drawn from `generator` alone.

    kind
        "iid": independent rows. "orthogonal": in blocks of head_dim rows, directions from the Haar measure and
        lengths of independent normal vectors. "regularised": the same directions, all lengths sqrt(head_dim); its
        kernel is biased, 1 - 2 d^(-1/3) + o(d^(-1/3)) <= SM_reg / SM <= 1.
    partial
        Allow a single incomplete orthogonal block, count < head_dim.

    Directions are the Q of the QR decomposition of a normal matrix, with the signs that make R's diagonal
    positive. LAPACK's Q without them isn't Haar distributed: its first rows lean to one side, which makes
    positive features biased by 14 % at |z| = 1, head_dim 16 (F. Mezzadri, math-ph/0609050).

    Raises ArgumentError, ArgumentTypeError.
    """
    check_count("count", count)
    check_count("head_dim", head_dim)
    check_choice("kind", kind, PROJECTIONS)
    check_bool("partial", partial)
    check_dtype("dtype", dtype)
    check_generator(generator)
    if not isinstance(shape, tuple):
        raise ArgumentTypeError(f"shape must be a tuple of ints, got {shape!r}")
    for size in shape:
        check_count("shape", size)
    if kind != "iid" and count < head_dim and not partial:
        raise ArgumentError(
            f"{kind} projections come in blocks of head_dim = {head_dim} rows, and {count} are fewer than one"
            f" block; take {head_dim} or more, kind='iid', or partial=True for the first rows of a block"
        )

    def normal(*size: int) -> torch.Tensor:
        drawn = torch.randn(*shape, *size, generator=generator, dtype=torch.float64, device=generator.device)
        return drawn

    if kind == "iid":
        return normal(count, head_dim).to(dtype)
    blocks = -(-count // head_dim)
    directions = haar(normal(blocks, head_dim, head_dim)).reshape(*shape, blocks * head_dim, head_dim)
    directions = directions[..., :count, :]
    if kind == "regularised":
        return (directions * math.sqrt(head_dim)).to(dtype)
    return (directions * normal(count, head_dim).norm(dim=-1, keepdim=True)).to(dtype)


def haar(normal: torch.Tensor) -> torch.Tensor:
    """Orthogonal matrices from the Haar measure, (..., d, d), out of standard normal ones."""
    q, r = torch.linalg.qr(normal)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]


def optimal_a(mean_square: float, head_dim: int) -> float:
    """FAVOR++'s A for data with the mean of |x + y|^2 over pairs of a query and a key (arXiv:2205.15317, eq. 9).

    It is at most 0, and 0 gives positive features. ArgumentError for a negative or non-finite mean, ArgumentTypeError
    for what is no number.
    """
    check_count("head_dim", head_dim)
    if isinstance(mean_square, bool) or not isinstance(mean_square, numbers.Real):
        raise ArgumentTypeError(f"mean_square must be a real number, got {mean_square!r}")
    if not (math.isfinite(mean_square) and mean_square >= 0):
        raise ArgumentError(f"mean_square must be finite and at least 0, got {mean_square!r}")
    p = mean_square / head_dim
    return (1.0 - 2.0 * p - math.sqrt((2.0 * p + 1.0) ** 2 + 8.0 * p)) / 16.0


def check_a(a: Any, features: str) -> float:
    """The A of favor++, which must be given there and nowhere else."""
    if features != "favor++":
        if a is not None:
            raise ArgumentError(f"a is a parameter of 'favor++' features, got a={a!r} with {features!r}")
        return 0.0
    if isinstance(a, bool) or not isinstance(a, (int, float)):
        raise ArgumentTypeError(f"favor++ features need a number a, such as optimal_a(...) gives, got {a!r}")
    if not (math.isfinite(a) and a < 0.125):
        raise ArgumentError(f"a must be below 1/8, where favor++ has a finite variance, got {a!r}")
    return float(a)


def check_stabiliser(stabiliser: Any, features: str) -> float:
    """The stabiliser as a number, 0.0 where it is off."""
    if stabiliser is None:
        return 0.0
    if isinstance(stabiliser, bool) or not isinstance(stabiliser, (int, float)):
        raise ArgumentTypeError(f"stabiliser must be a number or None (off), got {stabiliser!r}")
    if not (math.isfinite(stabiliser) and stabiliser > 0):
        raise ArgumentError(
            f"stabiliser must be finite and above 0, got {stabiliser!r}; None switches it off"
        )
    if features == "trigonometric":
        raise ArgumentError(
            "trigonometric features have both signs, so adding a stabiliser to them stabilises nothing; leave it"
            " out, or take positive features"
        )
    return float(stabiliser)


def feature_map(
    x: torch.Tensor,
    omega: torch.Tensor,
    features: str = "positive",
    *,
    a: float | None = None,
    stabiliser: float | None = None,
) -> Features:
    """phi(x) for x (..., length, head_dim) and omega (..., m, head_dim), which broadcast against each other.

    `a` belongs to favor++. `stabiliser`, off if None, is added to every feature relative to the largest one of the
    same token; it makes the estimate biased towards uniform attention, in numerator and denominator alike.
    Differentiable; the dtype is that of x and omega. Raises ArgumentError, ArgumentTypeError.
    """
    check_choice("features", features, FEATURES)
    if omega.shape[-1] != x.shape[-1]:
        raise ArgumentError(f"omega must have rows of head_dim {x.shape[-1]}, got {tuple(omega.shape)}")
    a = check_a(a, features)
    added = check_stabiliser(stabiliser, features)
    m = omega.shape[-2]
    head_dim = x.shape[-1]
    projected = x @ omega.mT
    if features == "relu":
        mantissa = (projected.relu() + RELU_EPSILON + added) / math.sqrt(m)
        return Features(mantissa, torch.zeros_like(mantissa[..., 0]))
    half_square = x.square().sum(-1) / 2
    if features == "trigonometric":
        return Features(torch.cat([projected.sin(), projected.cos()], -1), half_square - math.log(m) / 2)
    constant = -math.log(m) / 2
    if features == "hyperbolic":
        projected = torch.cat([projected, -projected], -1)
        constant = -math.log(2 * m) / 2
    elif features == "favor++":
        projected = projected * math.sqrt(1 - 4 * a) + a * omega.square().sum(-1)[..., None, :]
        constant += head_dim / 4 * math.log(1 - 4 * a)
    # Any number may be taken out of the mantissa and put into the exponent, so it counts as a constant.
    top = projected.detach().amax(-1, keepdim=True)
    mantissa = (projected - top).exp()
    if added:
        mantissa = mantissa + added
    return Features(mantissa, top.squeeze(-1) - half_square + constant)
