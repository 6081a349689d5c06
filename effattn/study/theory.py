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


def mean_entry_variance(z2: Any, m: int) -> Any:
    """Relative variance of one entry of positive features, (exp(|z|^2) - 1) / m."""
    return np.expm1(np.asarray(z2, np.float64)) / m


def output_error(weights: Any, values: Any, z2: Any, m: int) -> float:
    """First-order relative Frobenius error of Performer's output with positive features and iid projections.

    weights (n, n) exact attention, values (n, d_v), z2 (n, n) of |z_ij|^2. Two keys share their projections, so their
    errors correlate: with z_j = x + y_j, Cov of the relative errors of entries j, l is (exp(z_j.z_l) - 1)/m, and

        E |delta o_i|^2 = sum_jl w_ij w_il (v_j - o_i).(v_l - o_i) (exp(z_j.z_l) - 1) / m.

    Here only the diagonal is taken, which is what the sum comes to for values that are independent of the keys.
    It holds for m >> exp(|z|^2) only.
    """
    w, v = np.asarray(weights, np.float64), np.asarray(values, np.float64)
    out = w @ v
    spread = np.sum(v * v, -1)[None, :] - 2 * out @ v.T + np.sum(out * out, -1)[:, None]
    square = np.sum(w * w * spread * mean_entry_variance(z2, m))
    return float(np.sqrt(square / np.sum(out * out)))


def floor(singular_values: Any, k: int) -> float:
    """Eckart-Young: the least relative Frobenius error of a matrix of rank k, sqrt(sum_{i>k} s_i^2 / sum s_i^2)."""
    s = np.asarray(singular_values, np.float64)
    return float(np.sqrt(np.sum(s[k:] ** 2) / np.sum(s**2)))
