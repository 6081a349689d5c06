"""What stands beside approximations in `effattn study model`: methods that are told exact scores, and controls.

Each takes q (batch, heads, n, d), k and v with as many heads or fewer, a mask of tokens (batch, n) or None and the scale, and
gives (batch, heads, n, d). Rows of padding are of no use to anybody, and have whatever comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from effattn.study import measures

#: method -> whether it has a size
BASELINES = {
    "truncated SVD": True,
    "Nystroemformer": True,
    "top-k": True,
    "uniform": False,
    "shuffled V": False,
    "zero": False,
}

Mask = torch.Tensor | None
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mask, float], torch.Tensor]


def attention(method: str, *, size: int, causal: bool, seed: int) -> Attention:
    """The baseline of that name, with heads of k and v repeated for it. `seed` is for what is shuffled."""
    function = {
        "truncated SVD": _truncated, "Nystroemformer": _nystroem, "top-k": _largest, "uniform": _uniform,
        "shuffled V": _shuffled, "zero": _zero,
    }[method]  # fmt: skip

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Mask, scale: float) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return function(q, k, v, mask, scale, size=size, causal=causal, seed=seed)

    return attend


def _scores(q: torch.Tensor, k: torch.Tensor, mask: Mask, scale: float, causal: bool) -> torch.Tensor:
    scores = scale * (q @ k.mT)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    return scores


def _truncated(q, k, v, mask, scale, *, size, causal, seed):
    """The best weights of that rank."""
    weights = _scores(q, k, mask, scale, causal).softmax(-1)
    if size >= weights.shape[-1]:
        return weights @ v
    u, s, vt = torch.linalg.svd(weights, full_matrices=False)
    return (u[..., :size] * s[..., None, :size]) @ (vt[..., :size, :] @ v)


def _nystroem(q, k, v, mask, scale, *, size, causal, seed):
    """Of the tokens that are there, sequence by sequence; landmarks are averages over all positions, so not causal."""
    assert not causal
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        here = slice(None) if mask is None else mask[b].nonzero().flatten()
        # Its own scale is d^-1/2.
        rows, keys = q[b : b + 1, :, here] * (scale * q.shape[-1] ** 0.5), k[b : b + 1, :, here]
        weights = measures.nystroem(rows, keys, min(size, keys.shape[2]))
        out[b : b + 1, :, here] = (weights @ v[b : b + 1, :, here].double()).to(q.dtype)
    return out


def _largest(q, k, v, mask, scale, *, size, causal, seed):
    """The largest weights of each row, which then sum to one."""
    scores = _scores(q, k, mask, scale, causal)
    smallest = scores.topk(min(size, k.shape[2]), sorted=True).values[..., -1:]
    return scores.masked_fill(scores < smallest, -math.inf).softmax(-1) @ v


def _uniform(q, k, v, mask, scale, *, size, causal, seed):
    """The average of the values that a row sees."""
    here = torch.ones(v.shape[0], v.shape[2], dtype=v.dtype) if mask is None else mask.to(v.dtype)
    if causal:
        sums, counts = (here[:, None, :, None] * v).cumsum(2), here.cumsum(1)
        return sums / counts.clamp(min=1)[:, None, :, None]
    mean = torch.einsum("bn,bhnd->bhd", here, v) / here.sum(-1)[:, None, None]
    return mean[:, :, None].expand(q.shape[:3] + v.shape[3:])


def _shuffled(q, k, v, mask, scale, *, size, causal, seed):
    """Exact attention to the values of the tokens that are there, in another order."""
    generator = torch.Generator().manual_seed(seed)
    v = v.clone()
    for b in range(v.shape[0]):
        here = torch.arange(v.shape[2]) if mask is None else mask[b].nonzero().flatten()
        v[b, :, here] = v[b, :, here[torch.randperm(len(here), generator=generator)]]
    return _scores(q, k, mask, scale, causal).softmax(-1) @ v


def _zero(q, k, v, mask, scale, *, size, causal, seed):
    return q.new_zeros((*q.shape[:3], v.shape[3]))
