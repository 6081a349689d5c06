"""Closed forms of what random projections do, for the curves beside the measurements and for the laws.

SM = exp(x . y), z = x + y, d the head dimension, m the number of projections (`performer_features`: hyperbolic and
trigonometric maps have two features for each). All functions take plain numbers or NumPy arrays.

Sources: arXiv:2009.14794 (lemma 2 and theorem 2; positive, hyperbolic, trigonometric, orthogonal),
arXiv:2205.15317 (favor++), Isserlis' theorem for R^T R.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def mean_square_error(features: str, x: Any, y: Any, m: int, *, a: float = 0.0) -> Any:
    """E (phi(x).phi(y) - SM)^2 for iid projections; x, y (..., d). ValueError for a map without a closed form."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    d = x.shape[-1]
    sm = np.exp(np.sum(x * y, -1))
    z2 = np.sum((x + y) ** 2, -1)
    if features == "trigonometric":
        difference = np.sum((x - y) ** 2, -1)
        return np.exp(z2) * sm**-2 * np.expm1(-difference) ** 2 / (2 * m)
    if features == "positive":
        return np.exp(z2) * sm**2 * -np.expm1(-z2) / m
    if features == "hyperbolic":
        return -np.expm1(-z2) / 2 * (np.exp(z2) * sm**2 * -np.expm1(-z2) / m)
    if features == "favor++":
        rho = 1 / (1 - 8 * a)
        squares = np.sum(x * x, -1) + np.sum(y * y, -1)
        # E f^2 = ((1-4A)^2 / (1-8A))^(d/2) exp(2 (1-4A)/(1-8A) |z|^2 - squares), and (1-4A)/(1-8A) = (1+rho)/2.
        second = ((1 + rho) / (2 * np.sqrt(rho))) ** d * np.exp((1 + rho) * z2 - squares)
        return (second - sm**2) / m
    raise ValueError(f"no closed form for {features!r} features")


def orthogonal_margin(x: Any, y: Any, m: int) -> Any:
    """By how much orthogonal positive features have a smaller mean square error than iid ones, at least; m <= d.

    2 (m - 1) / (m (d + 2)) (SM - exp(-(|x|^2 + |y|^2) / 2))^2.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    d = x.shape[-1]
    sm = np.exp(np.sum(x * y, -1))
    rest = np.exp(-(np.sum(x * x, -1) + np.sum(y * y, -1)) / 2)
    return 2 * (m - 1) / (m * (d + 2)) * (sm - rest) ** 2


def projected_product_variance(x: Any, y: Any, k: int) -> Any:
    """Variance of x R^T R y, R (k, n) with entries N(0, 1/k): (|x|^2 |y|^2 + (x.y)^2) / k."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return (np.sum(x * x, -1) * np.sum(y * y, -1) + np.sum(x * y, -1) ** 2) / k


def output_error(weights: Any, x: Any, y: Any, values: Any, m: int) -> tuple[float, float]:
    """First-order mean square error of Performer's output with positive features and m iid projections.

    weights (rows, n) exact attention of the rows, x (rows, d) and y (n, d) scaled queries and keys, values (n, d_v).
    The relative errors of two entries of a row correlate, since keys share projections: with z_j = x + y_j their
    covariance is (exp(z_j . z_l) - 1) / m. With a_j = w_j (v_j - o), which sum to zero over j,

        E |delta o|^2 = sum_jl (a_j . a_l) exp(z_j . z_l) / m.

    It holds where m >> exp(|z|^2), and is an upper guess elsewhere. Returns the sums over rows of E |delta o|^2 and of
    |o|^2; the root of their quotient is the relative error.
    """
    w, x, y, v = (np.asarray(t, np.float64) for t in (weights, x, y, values))
    out = w @ v
    square = 0.0
    with np.errstate(over="ignore", invalid="ignore"):  # infinite for large |z|, and then says what it should
        gram = np.exp(y @ y.T)
        for row, query, mean in zip(w, x, out, strict=True):
            a = (row * np.exp(query @ query / 2 + y @ query))[:, None] * (v - mean)
            square += float(np.sum(a * (gram @ a)))
    return square / m, float(np.sum(out * out))


def floor(singular_values: Any, k: int) -> float:
    """Eckart-Young: the least relative Frobenius error of a matrix of rank k, sqrt(sum_{i>k} s_i^2 / sum s_i^2)."""
    s = np.asarray(singular_values, np.float64)
    return float(np.sqrt(np.sum(s[k:] ** 2) / np.sum(s**2)))
