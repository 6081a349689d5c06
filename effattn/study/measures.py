"""Error measures, and the baselines and controls that stand beside every approximation.

All in float64. An approximation is compared with exact attention; what it is worth is seen beside a floor (the best
matrix of its rank), other methods (Nystroemformer, top-k) and controls that know nothing (zero, uniform, shuffled V).
"""

from __future__ import annotations

import math

import torch

from effattn.errors import RequestError

#: name -> what it says
MEASURES = {
    "error": "relative Frobenius error of the output, |O' - O|_F / |O|_F",
    "row_p50": "median over rows of |o' - o| / |o|",
    "row_p99": "99th percentile over rows",
    "row_max": "worst row",
    "cosine": "mean over rows of the cosine between o' and o",
    "mse": "mean square error of the output's elements",
    "rounding": "relative Frobenius distance of the dtype's output from that of the same features in float64",
    "kl": "mean over rows of KL(exact weights | implied weights); empty where an implied weight isn't positive",
}


def output_errors(out: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """The measures of an output (..., rows, v_dim) against the exact one; NaN where the output has one."""
    out, exact = out.double(), exact.double()
    difference = (out - exact).norm(dim=-1)
    size = exact.norm(dim=-1)
    rows = (difference / size).flatten()
    quantiles = (
        torch.quantile(rows[: 1 << 23], torch.tensor([0.5, 0.99], dtype=torch.float64))
        if bool(torch.isfinite(rows).all())
        else torch.full((2,), math.nan)
    )
    return {
        "error": float(difference.norm() / size.norm()),
        "row_p50": float(quantiles[0]),
        "row_p99": float(quantiles[1]),
        "row_max": float(rows.max()),
        "cosine": float(torch.nn.functional.cosine_similarity(out, exact, dim=-1).mean()),
        "mse": float((out - exact).square().mean()),
    }


def divergence(weights: torch.Tensor, exact: torch.Tensor, hidden: torch.Tensor | None) -> float:
    """Mean KL divergence of implied from exact weights (..., rows, keys); NaN if a weight isn't positive."""
    kept = torch.ones_like(exact, dtype=torch.bool) if hidden is None else ~hidden.expand_as(exact)
    if not bool((weights[kept] > 0).all()):
        return math.nan
    ratio = torch.where(
        kept & (exact > 0), (exact / weights).clamp_min(torch.finfo(torch.float64).tiny).log(), 0.0
    )
    return float((exact * ratio).sum(-1).mean())


def causal_mask(rows: int, keys: int) -> torch.Tensor:
    """True where a row doesn't see a key; the last row sees the last key."""
    return torch.ones(rows, keys, dtype=torch.bool).triu(keys - rows + 1)


def exact_weights(q: torch.Tensor, k: torch.Tensor, *, causal: bool) -> torch.Tensor:
    """softmax(q k^T / sqrt(d) + mask) in float64, (batch, heads, rows, keys); O(N^2) memory."""
    group = q.shape[1] // k.shape[1]
    scores = q.double() @ k.double().repeat_interleave(group, 1).mT / math.sqrt(q.shape[-1])
    if causal:
        scores.masked_fill_(causal_mask(*scores.shape[-2:]), -math.inf)
    return scores.softmax(-1)


def apply(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights (batch, heads, rows, keys) times v (batch, kv_heads, keys, v_dim)."""
    return weights @ v.double().repeat_interleave(weights.shape[1] // v.shape[1], 1)


# -- baselines and controls --------------------------------------------------------------------------------


def truncated(svd: tuple[torch.Tensor, torch.Tensor, torch.Tensor], k: int) -> torch.Tensor:
    """The best matrices of rank k: singular value decompositions (U, S, V^T), truncated."""
    u, s, vt = svd
    return (u[..., :k] * s[..., None, :k]) @ vt[..., :k, :]


def top_k(weights: torch.Tensor, k: int) -> torch.Tensor:
    """Only the k largest weights of each row, which then sum to one."""
    values, places = weights.topk(min(k, weights.shape[-1]), dim=-1)
    return torch.zeros_like(weights).scatter_(-1, places, values / values.sum(-1, keepdim=True))


def nystroem(q: torch.Tensor, k: torch.Tensor, landmarks: int) -> torch.Tensor:
    """Nystroemformer's matrix: softmax(q k~^T) pinv(softmax(q~ k~^T)) softmax(q~ k^T), landmarks averages of segments.

    Xiong et al., arXiv:2102.03902, with the exact pseudo-inverse instead of its iteration, which is a further error.
    """
    n = q.shape[2]
    if landmarks > min(n, k.shape[2]):
        raise RequestError(
            f"{landmarks} landmarks of {min(n, k.shape[2])} tokens: expected at most one for each"
        )
    group = q.shape[1] // k.shape[1]
    q, k = q.double(), k.double().repeat_interleave(group, 1)
    scale = 1 / math.sqrt(q.shape[-1])
    few_q, few_k = (torch.nn.functional.adaptive_avg_pool1d(x.flatten(0, 1).mT, landmarks).mT for x in (q, k))
    few_q, few_k = few_q.unflatten(0, q.shape[:2]), few_k.unflatten(0, q.shape[:2])
    first = (q @ few_k.mT * scale).softmax(-1)
    middle = (few_q @ few_k.mT * scale).softmax(-1)
    last = (few_q @ k.mT * scale).softmax(-1)
    return first @ torch.linalg.pinv(middle) @ last


def uniform(v: torch.Tensor, heads: int, *, causal: bool) -> torch.Tensor:
    """The average of the values that a row sees, (batch, heads, n, v_dim)."""
    v = v.double().repeat_interleave(heads // v.shape[1], 1)
    if not causal:
        return v.mean(2, keepdim=True).expand(v.shape)
    return v.cumsum(2) / torch.arange(1, v.shape[2] + 1, dtype=torch.float64)[:, None]
