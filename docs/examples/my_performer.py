"""An approximation of one's own, as a first version might be: random features, and attention by them.

effattn approximation docs/examples/my_performer.py
effattn study performer --method docs/examples/my_performer.py --method "positive, orthogonal"
"""

from __future__ import annotations

import torch

CLAIMS = ("positive", "orthogonal", "kernel", "consistent")


def draw(size: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Orthogonal projections, (size, head_dim). The mistake: Q as it comes from the QR decomposition leans to one side."""
    blocks = -(-size // head_dim)
    normal = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(normal).Q.reshape(-1, head_dim)[:size]
    lengths = torch.randn(size, head_dim, generator=generator, dtype=torch.float64).norm(dim=-1, keepdim=True)
    return directions * lengths


def features(x: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """phi(x) = mantissa * exp(exponent) with E[phi(x) . phi(y)] = exp(x . y); x (..., n, head_dim)."""
    projected = x @ omega.T.to(x.dtype)
    top = projected.amax(-1, keepdim=True)
    exponent = top - x.square().sum(-1, keepdim=True) / 2
    return (projected - top).exp() / omega.shape[0] ** 0.5, exponent


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    size: int,
    generator: torch.Generator,
    padding_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """q, k, v (batch, heads, n, head_dim). The mistake: an epsilon in the denominator alone."""
    omega = draw(size, q.shape[-1], generator)
    scale = q.shape[-1] ** -0.25
    fq, _ = features(q * scale, omega)
    fk, exponent = features(k * scale, omega)
    if padding_mask is not None:
        exponent = exponent.masked_fill(~padding_mask[:, None, :, None], -torch.inf)
        v = v.masked_fill(~padding_mask[:, None, :, None], 0.0)
    fk = fk * (exponent - exponent.amax(-2, keepdim=True)).exp()
    return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None] + 1e-3)
