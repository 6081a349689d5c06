"""Approximations of attention, right and wrong in one thing each, for the tests of the laws that they are held to."""

from __future__ import annotations

import math
from typing import Any

import torch

from effattn.methods.linformer import linformer_attention
from effattn.methods.linformer_projections import Projection, gaussian, mean_pooling
from effattn.methods.performer import performer_attention
from effattn.methods.performer_features import draw_projections, feature_map


def drawer(kind: str = "orthogonal", *, size: float = 1.0, pairs: bool = False):
    """`draw` of effattn's own projections, entries multiplied by `size`, half as many rows for `pairs`."""

    def draw(count: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
        rows = count // 2 if pairs else count
        return size * draw_projections(
            rows, head_dim, generator=generator, kind=kind, partial=True, dtype=torch.float64
        )

    return draw


def mapping(kind: str = "positive", **keywords: Any):
    """`features` of effattn's own maps."""
    return lambda x, omega: tuple(feature_map(x, omega, kind, **keywords))


def performer(kind: str = "positive", projections: str = "orthogonal", *claims: str, **keywords: Any) -> dict:
    """A right Performer."""
    pairs = kind in ("trigonometric", "hyperbolic")
    draw = drawer(projections, pairs=pairs)

    def attention(q, k, v, *, size, generator, causal=False, padding_mask=None):
        omega = draw(size, q.shape[-1], generator)
        return performer_attention(
            q, k, v, omega, features=kind, causal=causal, padding_mask=padding_mask, **keywords
        )

    return {"draw": draw, "features": mapping(kind, **keywords), "attention": attention, "CLAIMS": claims}


def linformer(*claims: str) -> dict:
    """A right Linformer with a Gaussian projection."""

    def slots(size: int, n: int, generator: torch.Generator) -> torch.Tensor:
        return gaussian(size, n, generator=generator, dtype=torch.float64).matrix

    def attention(q, k, v, *, size, generator, padding_mask=None):
        e = Projection(slots(size, k.shape[-2], generator))
        return linformer_attention(q, k, v, e, padding_mask=padding_mask)

    return {"slots": slots, "attention": attention, "CLAIMS": claims}


def weights(matrix, *, normalise: bool = True):
    """`attention` of a function of scaled q, k and projections that gives unnormalised weights."""

    def attention(q, k, v, *, size, generator):
        omega = drawer()(size, q.shape[-1], generator)
        root = q.shape[-1] ** -0.25
        a = matrix(q * root, k * root, omega)
        return (a / a.sum(-1, keepdim=True) if normalise else a) @ v

    return attention


def pairs(q: torch.Tensor, k: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """The estimates of the kernel for all pairs."""
    return feature_map(q, omega).value() @ feature_map(k, omega).value().mT


# -- projections and features that are wrong -----------------------------------------------------------------


def unsigned(count: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Q of LAPACK as it comes."""
    blocks = -(-count // head_dim)
    normal = torch.randn(blocks, head_dim, head_dim, generator=generator, dtype=torch.float64)
    lengths = torch.randn(count, head_dim, generator=generator, dtype=torch.float64).norm(
        dim=-1, keepdim=True
    )
    return torch.linalg.qr(normal).Q.reshape(-1, head_dim)[:count] * lengths


def givens_with_replacement(count: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """Rows of a product of rotations, picked with replacement."""
    q = torch.eye(head_dim, dtype=torch.float64)
    for _ in range(2 * head_dim):
        i, j = torch.randperm(head_dim, generator=generator)[:2].tolist()
        angle = float(torch.rand(1, generator=generator)) * 2 * math.pi
        a, b = q[i].clone(), q[j].clone()
        q[i], q[j] = math.cos(angle) * a + math.sin(angle) * b, math.cos(angle) * b - math.sin(angle) * a
    return q[torch.randint(head_dim, (count,), generator=generator)] * math.sqrt(head_dim)


def from_the_global_state(count: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """The generator is not what is drawn from."""
    return torch.randn(count, head_dim, dtype=torch.float64)


def always_the_same(count: int, head_dim: int, generator: torch.Generator) -> torch.Tensor:
    """A redraw that is none."""
    return drawer()(count, head_dim, torch.Generator().manual_seed(3))


def with_the_maximum_of_all(x: torch.Tensor, omega: torch.Tensor) -> torch.Tensor:
    """A maximum over all tokens is taken out, and a stabiliser added."""
    projected = x @ omega.mT - x.square().sum(-1, keepdim=True) / 2
    return ((projected - projected.max()).exp() + 1e-4) * projected.max().exp() / math.sqrt(len(omega))


def first_rows(size: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """The first rows of a larger projection, which have its standard deviation."""
    return gaussian(n, n, generator=generator, dtype=torch.float64).matrix[:size]


def small_entries(size: int, n: int, generator: torch.Generator) -> torch.Tensor:
    """Standard deviation 1 / size."""
    return gaussian(size, n, generator=generator, dtype=torch.float64).matrix / size**0.5


# -- causal sums ---------------------------------------------------------------------------------------------


def causal_sums(*, weights=None, diagonal: int = 0, epsilon: float = 0.0):
    """Causal sums in float64, rounded once, but for what is asked: weights stored in a dtype, another diagonal."""

    def prefix_sums(q, k, v):
        pairs = (q.double() @ k.double().mT).tril(diagonal)
        pairs = pairs if weights is None else pairs + (pairs.to(weights).double() - pairs).detach()
        total = pairs.sum(-1, keepdim=True)
        total = total + epsilon * total.detach().mean()
        return (pairs @ v.double() / total).to(v.dtype)

    return prefix_sums


def stored_in_the_dtype(q, k, v):
    """Weights stored in the dtype of the inputs."""
    return causal_sums(weights=q.dtype)(q, k, v)


class _Subtracting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return causal_sums()(q, k, v)

    @staticmethod
    def backward(ctx, d_out):
        q, k, v = (x.float() for x in ctx.saved_tensors)
        pairs = (q.double() @ k.double().mT).tril()
        total = pairs.sum(-1, keepdim=True)
        g = (d_out.double() / total).float()
        h = -(g * (pairs @ v.double() / total).float()).sum(-1, keepdim=True)
        outer = k[..., :, None] * v[..., None, :]
        state = outer.sum(2, keepdim=True) - (outer.flip(2).cumsum(2).flip(2) - outer)
        sums = k.sum(2, keepdim=True) - (k.flip(2).cumsum(2).flip(2) - k)
        dq = (state @ g[..., None]).squeeze(-1) + h * sums
        d_pairs = (g.double() @ v.double().mT + h).tril()
        dtype = ctx.saved_tensors[0].dtype
        return dq.to(dtype), (d_pairs.mT @ q.double()).to(dtype), (pairs.mT @ g.double()).to(dtype)


def subtracting_backward(q, k, v):
    """Sums before a row are those of all rows less those from it on."""
    return _Subtracting.apply(q, k, v)


def float32_only(q, k, v):
    """Right, and takes one dtype."""
    if q.dtype != torch.float32:
        raise NotImplementedError("float32 only")
    return causal_sums()(q, k, v)


# -- attention that is wrong -----------------------------------------------------------------------------------


def epsilon(q, k, v, *, size, generator):
    """An epsilon in the denominator alone."""
    omega = drawer()(size, q.shape[-1], generator)
    root = q.shape[-1] ** -0.25
    fq, fk = feature_map(q * root, omega).value(), feature_map(k * root, omega).value()
    return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None] + 1e-6)


def slices_of_averages(q, k, v, *, size, generator):
    """Averages for 48 tokens, cut where there are fewer."""
    e = mean_pooling(size, 48, dtype=q.dtype).matrix[:, : k.shape[-2]]
    return torch.softmax(q @ (e @ k).mT, -1) @ (e @ v)


def zeroed_padding(q, k, v, *, size, generator, padding_mask=None):
    """Padding is zeroed, and counted."""
    if padding_mask is not None:
        k, v = (x.masked_fill(~padding_mask[:, None, :, None], 0.0) for x in (k, v))
    return performer()["attention"](q, k, v, size=size, generator=generator)


def ignored_padding(q, k, v, *, size, generator, padding_mask=None):
    """The mask is taken and ignored."""
    return performer()["attention"](q, k, v, size=size, generator=generator)


def bounded_values(q, k, v, *, size, generator):
    """Not linear in V."""
    return performer()["attention"](q, k, v.tanh(), size=size, generator=generator) / math.tanh(1)


def maximum_of_all_keys(q, k, v, *, size, generator, causal=False):
    """Causal, with a maximum over all positions and a stabiliser."""
    omega = drawer()(size, q.shape[-1], generator)
    root = q.shape[-1] ** -0.25
    fq = feature_map(q * root, omega).mantissa + 1e-4
    y = k * root
    dash = y @ omega.to(y.dtype).mT - y.square().sum(-1, keepdim=True) / 2
    fk = (dash - dash.amax((-1, -2), keepdim=True)).exp() + 1e-4
    if not causal:
        return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None])
    state = (fk[..., :, None] * v[..., None, :]).cumsum(2)
    return (fq[..., None, :] @ state).squeeze(-2) / (fq * fk.cumsum(2)).sum(-1, keepdim=True)


def slots_under_a_mask(q, k, v, *, size, generator, causal=False):
    """A triangular mask over projected keys."""
    e = gaussian(size, k.shape[-2], generator=generator, dtype=q.dtype).matrix
    scores = q @ (e @ k).mT
    if causal:
        scores = scores.masked_fill(torch.arange(size) > torch.arange(q.shape[-2])[:, None], -torch.inf)
    return scores.softmax(-1) @ (e @ v)


def without_the_diagonal(q, k, v, *, size, generator, causal=False):
    """Causal, and the first row but for itself: a row sees the keys before its own."""
    if not causal:
        return performer()["attention"](q, k, v, size=size, generator=generator)
    first, k0, v0 = q[:, :, :1], k[:, :, :1], v[:, :, :1]
    k, v = torch.cat([k0, k[:, :, :-1]], 2), torch.cat([v0, v[:, :, :-1]], 2)
    rest = performer()["attention"](q, k, v, size=size, generator=generator, causal=True)
    return torch.cat([v0.expand_as(first[..., : v.shape[-1]]), rest[:, :, 1:]], 2)


def seeded_by_the_data(q, k, v, *, size, generator):
    """Projections are drawn from the queries."""
    own = torch.Generator().manual_seed(int(abs(float(q.sum())) * 1e6))
    return performer()["attention"](q, k, v, size=size, generator=own)


def of_the_global_state(q, k, v, *, size, generator):
    """Projections are drawn from the global state."""
    omega = torch.randn(size, q.shape[-1], dtype=torch.float64)
    return performer_attention(q, k, v, omega)


def drawn_in_the_dtype(q, k, v, *, size, generator):
    """float32 and float64 draw other numbers."""
    omega = torch.randn(size, q.shape[-1], generator=generator, dtype=q.dtype)
    return performer_attention(q, k, v, omega)


def unscaled_features(q, k, v, *, size, generator):
    """Features as the formula has them, which underflow."""
    omega = drawer("iid")(size, q.shape[-1], generator).to(q.dtype)
    root = q.shape[-1] ** -0.25
    fq, fk = (feature_map(x * root, omega).value() for x in (q, k))
    return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None])


def constant_keys(q, k, v, *, size, generator):
    """The normaliser counts as a constant in the backward pass."""
    omega = drawer()(size, q.shape[-1], generator).to(q.dtype)
    root = q.shape[-1] ** -0.25
    a = pairs(q * root, k * root, omega)
    return (a / a.sum(-1, keepdim=True).detach()) @ v


def nearly(factor: float):
    """The gradient of the keys times a factor."""

    def attention(q, k, v, *, size, generator):
        return performer()["attention"](
            q, factor * k + (1 - factor) * k.detach(), v, size=size, generator=generator
        )

    return attention


def constant_under_padding(q, k, v, *, size, generator, padding_mask=None):
    """Where there is padding, keys have no gradient."""
    k = k if padding_mask is None else k.detach()
    return performer()["attention"](q, k, v, size=size, generator=generator, padding_mask=padding_mask)


def of_chunks_alone(q, k, v, *, size, generator, causal=False):
    """Causal, and the sums begin anew at every 128 rows."""
    state = generator.get_state()
    parts = []
    for start in range(0, q.shape[2], 128 if causal else q.shape[2]):
        generator.set_state(state)
        rows = slice(start, start + 128) if causal else slice(None)
        parts.append(
            performer()["attention"](
                q[:, :, rows], k[:, :, rows], v[:, :, rows], size=size, generator=generator, causal=causal
            )
        )
    return torch.cat(parts, 2)


def stabilised(q, k, v, *, size, generator):
    """A stabiliser that the file's features do not have."""
    omega = drawer()(size, q.shape[-1], generator)
    return performer_attention(q, k, v, omega, stabiliser=1e-2)


def wrong_scale(q, k, v, *, size, generator):
    """Scores are divided by head_dim^1/4."""
    omega = drawer()(size, q.shape[-1], generator)
    return performer_attention(q, k, v, omega, scale=q.shape[-1] ** -0.25)


def heads_rolled(q, k, v, *, size, generator):
    """Each head has the keys of the next."""
    return performer()["attention"](q, k.roll(1, 1), v, size=size, generator=generator)


def columns_flipped(q, k, v, *, size, generator):
    """The columns of the values come in reverse."""
    return performer()["attention"](q, k, v.flip(-1), size=size, generator=generator)


def tail_dropped(q, k, v, *, size, generator):
    """Tokens beyond the last whole window are left out."""
    n = k.shape[-2] // size * size
    e = mean_pooling(size, n, dtype=torch.float64)
    return linformer_attention(q, k[:, :, :n], v[:, :, :n], e)


def beyond_128_dropped(q, k, v, *, size, generator):
    """Keys beyond the first 128 are left out."""
    return performer()["attention"](q, k[:, :, :128], v[:, :, :128], size=size, generator=generator)


def nothing_without_tokens(q, k, v, *, size, generator, padding_mask=None):
    """0 / 0 where a sequence has no token."""
    out = performer()["attention"](q, k, v, size=size, generator=generator, padding_mask=padding_mask)
    if padding_mask is None:
        return out
    there = padding_mask.any(-1)[:, None, None, None].to(out.dtype)
    return out * there / there


def maximum_of_the_batch(q, k, v, *, size, generator):
    """The largest exponent is taken over all sequences."""
    omega = drawer()(size, q.shape[-1], generator).to(q.dtype)
    root = q.shape[-1] ** -0.25
    fq, (fk, e) = feature_map(q * root, omega).mantissa, feature_map(k * root, omega)
    fk = fk * (e - e.amax()).exp()[..., None]
    return (fq @ (fk.mT @ v)) / (fq @ fk.sum(-2)[..., None])


def one_seed(q, k, v, *, size, generator):
    """The generator is not asked."""
    return performer()["attention"](q, k, v, size=size, generator=torch.Generator().manual_seed(0))


def half_of_the_size(q, k, v, *, size, generator):
    """Half as many features as is said."""
    return performer()["attention"](q, k, v, size=size // 2, generator=generator)


def in_bfloat16(q, k, v, *, size, generator):
    """Right, in 16 bits."""
    omega = drawer()(size, q.shape[-1], generator)
    out = performer_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), omega)
    return out.to(q.dtype)


def float32_alone(q, k, v, *, size, generator, padding_mask=None):
    """Right, and takes float32 alone."""
    if not q.dtype == k.dtype == v.dtype == torch.float32:
        raise NotImplementedError("float32 only")
    return performer()["attention"](q, k, v, size=size, generator=generator, padding_mask=padding_mask)


def sums_of_128_features(q, k, v):
    """Features beyond the first 128 are left out."""
    return causal_sums()(q[..., :128], k[..., :128], v)


def states_of_the_next_sequence(q, k, v):
    """Sums of another sequence of the batch come before."""
    pairs = (q.double() @ k.double().mT).tril()
    total = pairs.sum(-1, keepdim=True)
    before = k.double().roll(1, 0)[:, :, :1] * 1e-2
    return ((pairs @ v.double() + (q.double() @ before.mT) @ v.double()[:, :, :1]) / total).to(v.dtype)


def least_denominator(q, k, v):
    """The denominator is at least 1e-6."""
    pairs = (q.double() @ k.double().mT).tril()
    return (pairs @ v.double() / pairs.sum(-1, keepdim=True).clamp_min(1e-6)).to(v.dtype)


def all_pairs(q, k, v, *, size, generator):
    """Exact attention, whatever the size."""
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


def rotated_slots(q, k, v, *, size, generator):
    """An orthogonal E, which is not the identity at size = n."""
    n = k.shape[-2]
    e = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q[:size].to(q.dtype)
    return torch.softmax(q @ (e @ k).mT * q.shape[-1] ** -0.5, -1) @ (e @ v)
