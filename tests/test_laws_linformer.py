"""Laws of Linformer, each with a wrong variant that it rejects."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effattn.errors import ArgumentError, ArgumentTypeError, NotSupported
from effattn.methods.linformer import (
    KINDS,
    LinformerAttention,
    LinformerProjections,
    linformer_attention,
)
from effattn.methods.linformer_projections import (
    Projection,
    Sample,
    convolution,
    fit,
    fit_values,
    gaussian,
    mean_pooling,
    singular,
)
from effattn.study import theory

N = 48


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(n: int = N, *, seed: int = 0, dtype=torch.float64):
    g = generator(seed)
    q = torch.randn(2, 4, 20, 8, generator=g, dtype=torch.float64)
    k = torch.randn(2, 2, n, 8, generator=g, dtype=torch.float64)
    v = torch.randn(2, 2, n, 5, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def exact(q, k, v, mask=None):
    mask = None if mask is None else mask[:, None, None, :]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).nan_to_num()


def identity(n: int = N) -> Projection:
    return Projection(torch.eye(n, dtype=torch.float64))


# -- projections -------------------------------------------------------------------------------------------


def _product_scores(matrices: torch.Tensor, k: int) -> tuple[float, float]:
    """z-scores of the mean and of the variance of x R^T R y, over draws (draws, k, n)."""
    x = torch.linspace(-1, 1, matrices.shape[-1], dtype=torch.float64)
    y = torch.cos(3 * x)
    products = ((matrices @ x) * (matrices @ y)).sum(-1)
    expected = float(theory.projected_product_variance(x.numpy(), y.numpy(), k))
    root = math.sqrt(products.numel())
    mean = (products.mean() - x @ y) / products.std() * root
    squares = (products - x @ y).square()
    return float(mean), float((squares.mean() - expected) / squares.std() * root)


def test_products_of_gaussian_projections_are_unbiased_with_the_variance_of_theory() -> None:
    matrices = gaussian(8, 24, generator=generator(), heads=40_000, dtype=torch.float64).matrix
    assert max(map(abs, _product_scores(matrices, 8))) < 5


@pytest.mark.parametrize(
    ("wrong", "factor"),
    [("standard deviation 1/k", 8**-0.5), ("variance 1/(3k)", 3**-0.5)],
)
def test_gaussian_projections_of_a_wrong_size_are_found(wrong: str, factor: float) -> None:
    matrices = gaussian(8, 24, generator=generator(), heads=4_000, dtype=torch.float64).matrix * factor
    assert max(map(abs, _product_scores(matrices, 8))) > 10, wrong


def test_a_slice_of_a_larger_gaussian_projection_is_found() -> None:
    matrices = gaussian(16, 24, generator=generator(), heads=4_000, dtype=torch.float64).matrix[:, :8]
    assert max(map(abs, _product_scores(matrices, 8))) > 10


def test_the_lemma_of_the_paper_fails_as_printed_and_holds_with_the_norms() -> None:
    """|x R^T R y - x.y| <= eps |x.y| with probability near 1 is what is printed, for any x and y."""
    n, eps = 512, 0.5
    g = generator(1)
    x, y = (torch.randn(n, generator=g, dtype=torch.float64) for _ in range(2))
    y -= (x @ y + 3.8) / (x @ x) * x  # x.y = -3.8: small beside |x| |y|
    matrices = gaussian(n, n, generator=g, heads=40, dtype=torch.float32).matrix.double()
    products = ((matrices @ x) * (matrices @ y)).sum(-1)
    error = (products - x @ y).abs()
    assert float((error <= eps * (x @ y).abs()).double().mean()) < 0.2
    assert bool((error <= eps * x.norm() * y.norm()).all())


def test_pooling_averages_and_convolution_with_equal_weights_is_pooling() -> None:
    pooled = mean_pooling(6, N, dtype=torch.float64)
    weights = torch.full((8,), 1 / 8, dtype=torch.float64)
    assert torch.equal(pooled.matrix, convolution(6, N, weights).matrix)
    assert torch.allclose(mean_pooling(7, N).matrix.sum(-1), torch.ones(7))
    assert bool((mean_pooling(7, N).matrix.sum(0) > 0).all())  # every token goes somewhere


def test_singular_vectors_span_the_best_subspace() -> None:
    """The residual of the rows outside of the span is the Eckart-Young floor; outside of another span it is more."""
    q, k, _ = problem()
    a = torch.softmax(q[0, 0] @ k[0, 0].mT, -1)
    e = singular(a, 5).matrix
    residual = float((a - a @ e.mT @ e).norm() / a.norm())
    assert residual == pytest.approx(theory.floor(torch.linalg.svdvals(a).numpy(), 5), rel=1e-8)
    other = torch.linalg.qr(torch.randn(N, 5, generator=generator(), dtype=torch.float64)).Q
    assert float((a - a @ other @ other.mT).norm() / a.norm()) > 1.5 * residual


# -- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", [identity(), mean_pooling(N, N, dtype=torch.float64)])
def test_it_is_exact_with_as_many_slots_as_tokens(projection: Projection) -> None:
    q, k, v = problem()
    torch.testing.assert_close(
        linformer_attention(q, k, v, projection), exact(q, k, v), rtol=1e-12, atol=1e-12
    )
    rotated = Projection(torch.linalg.qr(torch.randn(N, N, generator=generator(), dtype=torch.float64)).Q)
    assert float((linformer_attention(q, k, v, rotated) - exact(q, k, v)).abs().max()) > 0.1


def test_a_gaussian_projection_does_not_converge_and_pooling_does() -> None:
    q, k, v = problem()
    wanted = exact(q, k, v)

    def error(e: Projection) -> float:
        return float((linformer_attention(q, k, v, e) - wanted).norm() / wanted.norm())

    for slots in (12, 24, N):
        assert error(gaussian(slots, N, generator=generator(slots), dtype=torch.float64)) > 1.0
    errors = [error(mean_pooling(slots, N, dtype=torch.float64)) for slots in (6, 24, N)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 1.0
    assert errors[2] < 1e-12


def _effective(q: torch.Tensor, k: torch.Tensor, e: Projection, f: Projection) -> torch.Tensor:
    """The matrix that is applied to V: values that are the unit vectors."""
    eye = torch.eye(k.shape[2], dtype=k.dtype).expand(k.shape[0], k.shape[1], -1, -1)
    return linformer_attention(q, k, eye, e, f)


@pytest.mark.parametrize("slots", [2, 5, 11])
def test_no_projection_is_below_the_floor(slots: int) -> None:
    """The floor belongs to a rank of k; with one more slot it can be broken."""
    q, k, v = problem()
    sample = Sample(q[0, 0], k[0, 0], v[0, 0])
    a = torch.softmax(sample.q @ sample.k.mT * 8**-0.5, -1)
    least = theory.floor(torch.linalg.svdvals(a).numpy(), slots)
    pooled = mean_pooling(slots, N, dtype=torch.float64)
    fitted = fit(sample_list := [sample], pooled, steps=30)
    choices = {
        "gaussian": (gaussian(slots, N, generator=generator(), dtype=torch.float64),) * 2,
        "pooling": (pooled, pooled),
        "least squares": (pooled, fit_values(sample_list, pooled)),
        "gradient": fitted,
        "gradient, then least squares": (fitted[0], fit_values(sample_list, fitted[0])),
        "singular": (singular(a, slots),) * 2,
    }
    for name, (e, f) in choices.items():
        got = _effective(q[:1, :1], k[:1, :1], e, f)[0, 0]
        assert float((got - a).norm() / a.norm()) >= least * (1 - 1e-12), name
    # Truncation reaches the floor, so an error below it would be one of the measurement: a rank more is seen.
    u, s, vt = torch.linalg.svd(a, full_matrices=False)
    more = (u[:, : slots + 1] * s[: slots + 1]) @ vt[: slots + 1]
    assert float((more - a).norm() / a.norm()) < least


def test_fitting_improves_on_where_it_starts() -> None:
    q, k, v = problem()
    samples = [Sample(q[0, h], k[0, h // 2], v[0, h // 2]) for h in range(4)]

    def error(e: Projection, f: Projection) -> float:
        outs = [linformer_attention(*(t[None, None] for t in s), e, f)[0, 0] for s in samples]
        wanted = [exact(*(t[None, None] for t in s))[0, 0] for s in samples]
        return float((torch.cat(outs) - torch.cat(wanted)).norm() / torch.cat(wanted).norm())

    e = mean_pooling(8, N, dtype=torch.float64)
    start = error(e, e)
    assert error(e, fit_values(samples, e)) < start
    fitted = fit(samples, e, steps=40)
    assert error(*fitted) < 0.8 * start
    shared = fit(samples, e, steps=10, shared=True)
    assert torch.equal(shared[0].matrix, shared[1].matrix)


def padding() -> torch.Tensor:
    """Three tokens of four, in the second sequence the first 30."""
    return torch.stack([torch.arange(N) % 4 != 1, torch.arange(N) < 30])


@pytest.mark.parametrize("slots", [7, 16])
@pytest.mark.parametrize("kind", ["gaussian", "mean-pooling"])
def test_padding_has_no_influence(kind: str, slots: int) -> None:
    q, k, v = problem()
    e = gaussian(slots, N, generator=generator()) if kind == "gaussian" else mean_pooling(slots, N)
    k2, v2 = k.clone(), v.clone()
    hidden = ~padding()[:, None].expand(-1, 2, -1)
    k2[hidden], v2[hidden] = 40.0, -9.0
    one, two = (linformer_attention(q, k, v, e, padding_mask=padding()) for k, v in ((k, v), (k2, v2)))
    assert torch.equal(one, two)
    # A mask that is taken and ignored:
    assert not torch.equal(*(linformer_attention(q, k, v, e) for k, v in ((k, v), (k2, v2))))


def test_padding_with_as_many_slots_as_tokens_is_masked_attention() -> None:
    q, k, v = problem()
    got = linformer_attention(q, k, v, identity(), padding_mask=padding())
    torch.testing.assert_close(got, exact(q, k, v, padding()), rtol=1e-12, atol=1e-12)
    nothing = torch.zeros(2, N, dtype=torch.bool)
    assert not linformer_attention(q, k, v, identity(), padding_mask=nothing).any()
    # Rows that are zeroed but whose slots stay take weight exp(0):
    zeroed = k.masked_fill(~padding()[:, None, :, None], 0), v.masked_fill(~padding()[:, None, :, None], 0)
    assert float((linformer_attention(q, *zeroed, identity()) - got).abs().max()) > 0.05


@pytest.mark.parametrize("length", [1, 13, 40, N])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_of_one_give_one_for_averages_of_any_length(length: int, dtype: torch.dtype) -> None:
    q, k, v = problem(length, dtype=dtype)
    e = mean_pooling(7, N)
    out = linformer_attention(q, k, torch.ones_like(v), e, padding_mask=None)
    assert float((out.float() - 1).abs().max()) <= 2 * torch.finfo(dtype).eps


def test_slices_of_averages_that_are_not_rescaled_are_found_by_values_of_one() -> None:
    q, k, v = problem(40)
    sliced = Projection(mean_pooling(7, N).matrix[:, :40])
    out = linformer_attention(q, k, torch.ones_like(v), sliced)
    assert float((out - 1).abs().max()) > 0.02


@pytest.mark.parametrize("kind", ["mean-pooling", "convolution"])
def test_a_module_of_averages_gives_one_for_values_of_one_under_padding(kind: str) -> None:
    q, k, v = problem(dtype=torch.float32)
    attention = LinformerAttention(LinformerProjections(N, 8, kind=kind))
    out = attention(q, k, torch.ones_like(v), padding_mask=padding())
    assert float((out.detach() - 1).abs().max()) <= 1e-6
    e, _ = attention.projections()
    bare = linformer_attention(q, k, torch.ones_like(v), Projection(e.matrix), padding_mask=padding())
    assert float((bare.detach() - 1).abs().max()) > 0.02


def test_trained_averages_are_not_divided_by_what_is_left_of_trained_weights() -> None:
    """Present weights that cancel, or nearly, leave output and gradients as large as the weights are."""
    q, k, v = problem(dtype=torch.float32)
    projections = LinformerProjections(N, 8, kind="mean-pooling")
    attention = LinformerAttention(projections)
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[:, 2:6] = False  # two of six tokens of the first window are left
    with torch.no_grad():
        projections.e[0] = 0.0
        projections.e[0, :4] = torch.tensor([1.0, -1.0 + 1e-6, 1.0, 1.0])
    out = attention(q, k, v, padding_mask=mask)
    out.square().sum().backward()
    assert float(out.detach().abs().max()) < 9 * float(v.abs().max())
    assert projections.e.grad is not None
    assert float(projections.e.grad.abs().max()) < 1e4
    share = projections.e.detach()[0, mask[0]].sum() / projections.e.detach()[0].sum()
    assert 0 < abs(float(share)) < 1e-6  # what dividing by it would have made of it


def test_a_slot_whose_window_is_absent_stays_absent_when_training_has_filled_its_row() -> None:
    q, k, v = problem(dtype=torch.float32)
    projections = LinformerProjections(N, 8, kind="mean-pooling")
    mask = torch.ones(2, N, dtype=torch.bool)
    mask[:, :6] = False
    attention = LinformerAttention(projections)
    before = attention(q, k, v, padding_mask=mask).detach()
    with torch.no_grad():
        projections.e += 1e-7
    after = attention(q, k, v, padding_mask=mask)
    torch.testing.assert_close(after.detach(), before, rtol=1e-4, atol=1e-4)
    unmasked = Projection(projections.e.detach())
    other = linformer_attention(q, k, v, unmasked, padding_mask=mask)
    assert float((other - before).abs().max()) > 1e-2  # it is attended to there
    after.sum().backward()
    assert projections.e.grad is not None
    assert bool(projections.e.grad.isfinite().all())


def test_a_row_does_not_depend_on_the_batch() -> None:
    q, k, v = problem()
    e = gaussian(16, N, generator=generator())
    whole = linformer_attention(q, k, v, e, padding_mask=padding())
    alone = linformer_attention(q[1:], k[1:], v[1:], e, padding_mask=padding()[1:])
    torch.testing.assert_close(whole[1:], alone, rtol=1e-13, atol=1e-13)


def test_causal_is_refused_since_slots_leak() -> None:
    q, k, v = problem()
    with pytest.raises(NotSupported, match="each of its slots is a sum over keys of all positions"):
        linformer_attention(q, k, v, mean_pooling(8, N), causal=True)

    def over_slots(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Wrong, as published: a triangular mask over projected keys."""
        e = gaussian(8, N, generator=generator(), dtype=torch.float64).matrix
        scores = q @ (e @ k).mT.repeat_interleave(2, 1)
        scores = scores.masked_fill(torch.arange(8) > torch.arange(20)[:, None], -math.inf)
        return scores.softmax(-1) @ (e @ v).repeat_interleave(2, 1)

    later = v.clone()
    later[:, :, 20:] += 1.0
    assert not torch.equal(over_slots(k, v)[:, :, 0], over_slots(k, later)[:, :, 0])


# -- module and bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sharing", "parameters"), [("none", 2), ("headwise", 2), ("key-value", 1), ("layerwise", 1)]
)
def test_the_module_trains_the_projections_that_its_sharing_says(
    kind: str, sharing: str, parameters: int
) -> None:
    if kind == "convolution" and sharing == "none":
        with pytest.raises(ArgumentError, match="for a convolution, whose kernel is shared"):
            LinformerProjections(N, 8, kind=kind, sharing=sharing, kv_heads=2)
        return
    projections = LinformerProjections(
        N, 8, kind=kind, sharing=sharing, kv_heads=2 if sharing == "none" else None, generator=generator()
    )
    layers = [LinformerAttention(projections) for _ in range(2)]
    q, k, v = problem(40, dtype=torch.float32)
    e, f = projections()
    assert torch.equal(layers[0](q, k, v), linformer_attention(q, k, v, e, f))
    sum(layer(q, k, v).square().sum() for layer in layers).backward()
    trained = list(projections.parameters())
    assert len(trained) == parameters
    assert all(bool(p.grad.abs().sum() > 0) for p in trained if p.grad is not None)
    assert all(p.grad is not None for p in trained)
    assert trained[0].dim() == {"convolution": 1}.get(kind, 3 if sharing == "none" else 2)


def test_gradients_are_those_of_finite_differences() -> None:
    q, k, v = (x[:1, :, :6].requires_grad_() for x in problem(6))
    e = mean_pooling(4, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False, True, True, False]])
    assert torch.autograd.gradcheck(
        lambda q, k, v: linformer_attention(q, k, v, e, padding_mask=mask), (q, k, v)
    )


BAD = [
    (lambda q, k, v: mean_pooling(N + 1, N), r"k must be at most 48, the number of tokens n = 48"),
    (lambda q, k, v: gaussian(0, N, generator=generator()), "k must be at least 1, got 0"),
    (lambda q, k, v: gaussian(4, N, generator=None), "generator must be a torch.Generator"),  # pyright: ignore
    (lambda q, k, v: convolution(7, N, torch.ones(6)), "needs k to divide n, got k=7"),
    (lambda q, k, v: convolution(6, N, torch.ones(6)), r"weight must have the shape \(n/k,\) = \(8,\)"),
    (
        lambda q, k, v: linformer_attention(q, k, v, mean_pooling(8, 40)),
        "projects 40 tokens, but there are 48 keys",
    ),
    (lambda q, k, v: linformer_attention(q, k, v, mean_pooling(8, N), mean_pooling(4, N)), "as many slots"),
    (lambda q, k, v: linformer_attention(q, k * math.inf, v, identity()), "k has NaN or infinite entries"),
    (lambda q, k, v: linformer_attention(q, k, v, identity().matrix), "must be a Projection"),  # pyright: ignore
    (
        lambda q, k, v: linformer_attention(q, k, v, Projection(torch.ones(3, 8, N))),
        r"\(k, n\) or \(2, k, n\)",
    ),
    (
        lambda q, k, v: linformer_attention(q, k, v, Projection(torch.ones(8, N), pooling=-torch.ones(8, N))),
        "no negative entries",
    ),
    (lambda q, k, v: LinformerProjections(N, 8, sharing="none", generator=generator()), "kv_heads goes with"),
    (lambda q, k, v: LinformerProjections(N, 8), "drawn from a generator"),
    (lambda q, k, v: LinformerProjections(N, 8, kind="learned"), "kind must be one of"),
    (lambda q, k, v: fit([], mean_pooling(8, N)), "at least one calibration sample"),
    (lambda q, k, v: fit_values([Sample(q, k, v)], mean_pooling(8, N)), "a calibration sample has k"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:28] for _, message in BAD])
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        call(*problem())


def test_the_floor_is_that_of_numpy() -> None:
    a = np.random.default_rng(0).normal(size=(20, 12))
    u, s, vt = np.linalg.svd(a)
    best = (u[:, :4] * s[:4]) @ vt[:4]
    assert theory.floor(s, 4) == pytest.approx(np.linalg.norm(a - best) / np.linalg.norm(a))
