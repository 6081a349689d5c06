"""The inputs of a study, and what is computed of each once: exact output, weights, spectrum."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from effattn.errors import RequestError
from effattn.study import measures

if TYPE_CHECKING:
    from effattn.study.engine import Job

#: up to this length, all weights are looked at: divergences, spectra, baselines
FULL = 1024


class Problem:
    """q, k, v (batch, heads, n, d) in a dtype, and exact attention of them in float64."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> None:
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not bool(torch.isfinite(x).all()):
                raise RequestError(f"{name} has NaN or infinite entries, of which no average can be taken")
        self.q, self.k, self.v, self.causal = q, k, v, causal

    @cached_property
    def exact(self) -> torch.Tensor:
        """softmax(q k^T / sqrt(d) + mask) v in float64."""
        from effattn import exact

        return exact.attention(self.q, self.k, self.v, causal=self.mask).out

    @property
    def mask(self) -> str:
        """The mask's name, see `effattn.case`."""
        return "bottom-right" if self.causal else "none"

    @cached_property
    def weights(self) -> torch.Tensor:
        """The matrices of weights, (batch, heads, n, n)."""
        return measures.exact_weights(self.q, self.k, causal=self.causal)

    @cached_property
    def svd(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U, S, V^T of the weights."""
        u, s, vt = torch.linalg.svd(self.weights, full_matrices=False)
        return u, s, vt

    @property
    def small(self) -> bool:
        """Whether everything quadratic can be afforded."""
        return self.q.shape[2] <= FULL


def problem(job: Job, *, seed: int, half: int | None = None) -> Problem:
    """The problem of a job. Synthetic inputs differ from draw to draw and agree between methods; a real model's
    inputs are what they are. `half` takes the first (0) or the second (1) n tokens of a real text."""
    point = job.point
    real = point.values.startswith("real:")
    number = 0 if real else (seed * 1_000_003 + job.draw) % (2**62)
    return _problem(
        point.n, point.head_dim, point.values, point.input_scale, point.dtype, point.causal, number, half
    )


@lru_cache(maxsize=2)
def _problem(
    n: int, head_dim: int, values: str, scale: float, dtype: str, causal: bool, seed: int, half: int | None
) -> Problem:
    from effattn.case import Case

    shape = real_shape(values) if values.startswith("real:") else Shape(1, 1, head_dim)
    length = n if half is None else 2 * n
    case = Case(
        q_len=length, kv_len=length, dtype=dtype, values=values, seed=seed, heads=shape.heads,
        kv_heads=shape.kv_heads, head_dim=shape.head_dim,
    )  # fmt: skip
    tensors = [x[:, :, (half or 0) * n : (half or 0) * n + n] for x in case.tensors()[:3]]
    if scale != 1.0:
        tensors[:2] = [(x.double() * scale).to(x.dtype) for x in tensors[:2]]
    return Problem(*tensors, causal=causal)


class Shape(NamedTuple):
    """What a case needs to know of a model."""

    heads: int
    kv_heads: int
    head_dim: int


def real_shape(values: str) -> Shape:
    """The shape of `real:MODEL/LAYER`. RequestError for an unknown one."""
    from effattn import real

    real.distribution(values)  # raises what is to be said
    model = real.MODELS[values.removeprefix("real:").partition("/")[0]]
    return Shape(model.heads, model.kv_heads, model.head_dim)
