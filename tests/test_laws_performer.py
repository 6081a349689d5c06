"""Laws of Performer, each with a wrong variant that it rejects. Errors of sampling are bounded by stated rates.

Where a law is statistical, the seed is fixed and the statistic is z = (mean - expected) / standard error over
independent draws. `LIMIT` = 5 is passed by a right method except with probability 6e-7 a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.methods.performer import PerformerAttention, performer_attention
from effattn.methods.performer_features import (
    FEATURES,
    draw_projections,
    feature_map,
    haar,
    optimal_a,
    projections_for,
)
from effattn.study import theory

LIMIT = 5.0
D = 16
Draw = Callable[[int, int], torch.Tensor]  # draws, projections -> (draws, projections, D)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(kind: str, seed: int = 0) -> Draw:
    def draw(draws: int, m: int) -> torch.Tensor:
        return draw_projections(
            m, D, generator=generator(seed), kind=kind, partial=True, shape=(draws,), dtype=torch.float64
        )

    return draw


def unsigned_qr(draws: int, m: int) -> torch.Tensor:
    """Wrong: LAPACK's Q as it comes."""
    normal = torch.randn(draws, D, D, generator=generator(), dtype=torch.float64)
    lengths = torch.randn(draws, m, D, generator=generator(1), dtype=torch.float64).norm(dim=-1, keepdim=True)
    return torch.linalg.qr(normal).Q[:, :m] * lengths


def givens_with_replacement(draws: int, m: int) -> torch.Tensor:
    """Wrong: a product of random Givens rotations whose rows are then picked with replacement, as published."""
    random = np.random.default_rng(0)
    q = torch.eye(D, dtype=torch.float64).repeat(draws, 1, 1)
    for _ in range(3 * D):
        i, j = random.choice(D, 2, replace=False)
        angle = torch.from_numpy(random.uniform(0, 2 * math.pi, (draws, 1)))
        a, b = q[:, i].clone(), q[:, j].clone()
        q[:, i], q[:, j] = angle.cos() * a + angle.sin() * b, angle.cos() * b - angle.sin() * a
    rows = torch.from_numpy(random.integers(0, D, (draws, m)))
    return q.gather(1, rows[..., None].expand(-1, -1, D)) * math.sqrt(D)


def pair(square: float, direction: torch.Tensor, split: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y (1, D) along `direction` with |x + y|^2 = square, x having `split` of z."""
    z = direction / direction.norm() * math.sqrt(square)
    return (split * z)[None], ((1 - split) * z)[None]


def estimates(
    x: torch.Tensor, y: torch.Tensor, omega: torch.Tensor, features: str = "positive", **kw
) -> torch.Tensor:
    """phi(x) . phi(y) for each draw."""
    fx, fy = (feature_map(t, omega, features, **kw) for t in (x, y))
    return ((fx.mantissa * fy.mantissa).sum(-1) * (fx.exponent + fy.exponent).exp()).squeeze(-1)


def z_score(sample: torch.Tensor, expected: float) -> float:
    """(mean - expected) / standard error of a sample of independent draws."""
    return float((sample.mean() - expected) / (sample.std() / math.sqrt(sample.numel())))


ONES = torch.ones(D, dtype=torch.float64)


def bias(draw: Draw, features: str = "positive", *, square: float = 1.0, draws: int = 20_000, **kw) -> float:
    """The largest z-score of estimate / SM - 1 along +1 and -1."""
    omega = draw(draws, D)
    scores = []
    for sign in (1.0, -1.0):
        x, y = pair(square, sign * ONES, 0.3)
        sm = float((x * y).sum().exp())
        scores.append(z_score(estimates(x, y, omega, features, **kw) / sm, 1.0))
    return max(scores, key=abs)


# -- unbiasedness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["iid", "orthogonal"])
@pytest.mark.parametrize("features", ["positive", "hyperbolic", "trigonometric", "favor++"])
def test_features_are_unbiased_along_directed_z(features: str, kind: str) -> None:
    a = {"a": -0.05} if features == "favor++" else {}
    assert abs(bias(drawn(kind), features, **a)) < LIMIT


def test_qr_without_the_sign_fix_is_found_by_directed_z_and_by_no_random_one() -> None:
    assert abs(bias(unsigned_qr)) > 4 * LIMIT
    omega = unsigned_qr(20_000, D)
    z = torch.randn(20_000, 1, D, generator=generator(7), dtype=torch.float64)
    z = z / z.norm(dim=-1, keepdim=True)
    sm = (0.25 * z * z).sum((-1, -2)).exp()
    assert abs(z_score(estimates(z / 2, z / 2, omega) / sm, 1.0)) < LIMIT


def test_the_bias_of_qr_without_the_sign_fix_is_as_published_measurements_have_it() -> None:
    omega = unsigned_qr(20_000, D)
    for square, plus, minus in ((1.0, 0.856, 1.144), (4.0, 0.722, 1.264)):
        for sign, expected in ((1, plus), (-1, minus)):
            x, y = pair(square, sign * ONES)
            ratio = estimates(x, y, omega) / math.exp(square / 4)
            assert abs(float(ratio.mean()) - expected) < 0.03


def test_a_stabiliser_biases_and_is_found() -> None:
    """Adding 1e-4 to features, as the usual code does, is found where features are small: |x|^2 = |y|^2 = 16."""
    assert abs(_stabilised(None)) < LIMIT
    assert abs(_stabilised(1e-4)) > 10 * LIMIT


def _stabilised(stabiliser: float | None) -> float:
    # x = -y, so z = 0, where positive features have no variance at all without a stabiliser but for rounding.
    omega = drawn("iid")(200, D)
    x = ONES[None] * 1.0
    got = estimates(x, -x, omega, stabiliser=stabiliser) / float((-x * x).sum().exp())
    error = float((got - 1).abs().max())
    return error / 1e-12


def test_the_stabiliser_is_off_by_default() -> None:
    x = torch.randn(1, D, generator=generator(), dtype=torch.float64)
    omega = drawn("iid")(1, 8)
    assert torch.equal(feature_map(x, omega).mantissa, feature_map(x, omega, stabiliser=None).mantissa)
    assert not torch.equal(feature_map(x, omega).mantissa, feature_map(x, omega, stabiliser=1e-6).mantissa)


# -- second moments ----------------------------------------------------------------------------------------

GRID = [(square, split) for square in (0.1, 0.25, 0.5, 0.75, 1.0) for split in (0.6, 0.7, 0.9, 1.1)]


def _moments(features: str, *, draws: int = 300_000, size: float = 1.0, **kw) -> np.ndarray:
    """For each of 20 points the z-score of measured against theoretical mean square error, and the half-width of its
    99.9 % interval as a part of it. `size` is the deviation of the projections' entries."""
    d = 4  # the closed forms hold in every dimension
    omega = size * draw_projections(
        1, d, generator=generator(3), kind="iid", shape=(draws,), dtype=torch.float64
    )
    direction = torch.linspace(-1, 1, d, dtype=torch.float64) + 0.3
    rows = []
    for square, split in GRID:
        x, y = pair(square, direction, split)
        expected = float(theory.mean_square_error(features, x.numpy(), y.numpy(), 1, **kw)[0])
        error = (estimates(x, y, omega, features, **kw) - float((x * y).sum().exp())).square()
        rows.append((z_score(error, expected), 3.29 * float(error.std()) / math.sqrt(draws) / expected))
    return np.array(rows)


@pytest.mark.parametrize("features", ["positive", "hyperbolic", "trigonometric", "favor++"])
def test_second_moments_are_those_of_the_closed_forms(features: str) -> None:
    """Up to |z|^2 = 1: the relative variance of an empirical second moment is (exp(4 |z|^2) - 1) / draws."""
    a = {"a": -0.03} if features == "favor++" else {}
    scores, widths = _moments(features, **a).T
    assert widths.max() < 0.07
    # 20 intervals of 99.9 %, of the same draws: more than two outside have a probability below 2e-4.
    assert (np.abs(scores) > 3.29).sum() <= 2
    assert np.abs(scores).max() < LIMIT


@pytest.mark.parametrize("features", ["positive", "trigonometric"])
def test_second_moments_reject_projections_of_a_wrong_variance(features: str) -> None:
    scores, _ = _moments(features, size=1.03).T
    assert np.abs(scores).max() > 2 * LIMIT


# -- orthogonality -----------------------------------------------------------------------------------------


def _margin(draw: Draw) -> float:
    """z-score of MSE_iid - margin - MSE: positive where the theorem's bound holds with room."""
    m = D
    x, y = pair(1.0, torch.linspace(-1, 1, D, dtype=torch.float64) + 0.3)
    sm = float((x * y).sum().exp())
    allowed = float(
        (
            theory.mean_square_error("positive", x.numpy(), y.numpy(), m)
            - theory.orthogonal_margin(x.numpy(), y.numpy(), m)
        )[0]
    )
    return -z_score((estimates(x, y, draw(40_000, m)) - sm).square(), allowed)


def test_orthogonal_projections_have_an_error_below_iid_by_the_theorems_margin() -> None:
    assert _margin(drawn("orthogonal")) > -LIMIT
    # The margin is a bound, so a wrong variant is one above it.
    assert _margin(drawn("iid", 5)) < -LIMIT


def _offdiagonal(omega: torch.Tensor) -> float:
    rows = omega / omega.norm(dim=-1, keepdim=True)
    return float((rows @ rows.mT - torch.eye(rows.shape[1], dtype=rows.dtype)).abs().max())


@pytest.mark.parametrize("kind", ["orthogonal", "regularised"])
def test_rows_of_a_block_are_orthogonal(kind: str) -> None:
    omega = draw_projections(3 * D + 5, D, generator=generator(), kind=kind, shape=(50,), dtype=torch.float64)
    for start in range(0, 3 * D + 5, D):
        assert _offdiagonal(omega[:, start : start + D]) < 1e-12
    assert _offdiagonal(omega[:, D // 2 : D // 2 + D]) > 0.1  # across two blocks they are not


def test_givens_rotations_with_replacement_are_not_orthogonal() -> None:
    assert _offdiagonal(givens_with_replacement(50, D)) > 0.9


def test_directions_are_spread_evenly() -> None:
    """First entries of Haar matrices have mean 0; of unsigned Q they have not."""
    normal = torch.randn(20_000, D, D, generator=generator(), dtype=torch.float64)
    assert abs(z_score(haar(normal)[:, 0, 0], 0.0)) < LIMIT
    assert abs(z_score(torch.linalg.qr(normal).Q[:, 0, 0], 0.0)) > 10 * LIMIT


def test_regularised_projections_stay_within_their_bounds() -> None:
    """1 - 2 d^(-1/3) <= SM_reg / SM <= 1, and below 1 by more than chance."""
    omega = drawn("regularised")(20_000, D)
    x, y = pair(1.0, ONES)
    ratio = estimates(x, y, omega) / float((x * y).sum().exp())
    assert 1 - 2 * D ** (-1 / 3) < float(ratio.mean()) < 1
    assert z_score(ratio, 1.0) < -LIMIT


# -- rates -------------------------------------------------------------------------------------------------


def _slope(scale: float, sizes: tuple[int, ...] = (64, 256, 1024), features: str = "positive") -> float:
    """Slope of log(relative error of the output) against log m."""
    q, k, v = (torch.randn(1, 8, 128, D, generator=generator(i), dtype=torch.float64) for i in range(3))
    q, k = scale * q, scale * k
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    errors = []
    for m in sizes:
        omega = draw_projections(m, D, generator=generator(m), kind="iid", shape=(8,), dtype=torch.float64)
        out = performer_attention(q, k, v, omega, features=features)
        errors.append(float(((out - exact).norm(dim=(-1, -2)) / exact.norm(dim=(-1, -2))).log().mean()))
    return float(np.polyfit(np.log(sizes), errors, 1)[0])


def test_the_error_falls_with_the_square_root_of_m_where_m_is_large_enough() -> None:
    """|z|^2 has the mean 2 s^2 sqrt(d) = 0.72 at s = 0.3, so exp(|z|^2) << m. At s = 1.5 no rate is claimed."""
    assert abs(_slope(0.3) + 0.5) < 0.1
    assert _slope(1.5) > -0.3
    assert abs(_slope(0.3, features="relu") + 0.5) > 0.2  # another kernel: it converges to something else


# -- attention ---------------------------------------------------------------------------------------------


def problem(q_len: int = 40, kv_len: int = 40, *, seed: int = 0, scale: float = 1.0, dtype=torch.float64):
    g = generator(seed)
    q = torch.randn(2, 4, q_len, 8, generator=g, dtype=torch.float64) * scale
    k = torch.randn(2, 2, kv_len, 8, generator=g, dtype=torch.float64) * scale
    v = torch.randn(2, 2, kv_len, 5, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype), v.to(dtype)


OMEGA = draw_projections(16, 8, generator=generator(9), dtype=torch.float64)


def quadratic(q, k, v, omega=OMEGA, *, shift: int | None = None, mask=None, features="positive", **kw):
    """The same features, all pairs at once, the textbook formula."""
    group = q.shape[1] // k.shape[1]
    root = q.shape[-1] ** -0.25
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    pairs = (
        feature_map(q * root, omega, features, **kw).value()
        @ feature_map(k * root, omega, features, **kw).value().mT
    )
    if shift is not None:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        pairs = pairs.masked_fill(j > i + shift, 0.0)
    if mask is not None:
        pairs = pairs.masked_fill(~mask[:, None, None, :], 0.0)
    total = pairs.sum(-1, keepdim=True)
    return (pairs @ v) / total.masked_fill(total == 0, 1.0)


SETTINGS = [(40, 40), (17, 40), (40, 17), (1, 40)]


@pytest.mark.parametrize(("q_len", "kv_len"), SETTINGS)
@pytest.mark.parametrize("features", FEATURES)
def test_causal_sums_equal_the_masked_quadratic_evaluation(features: str, q_len: int, kv_len: int) -> None:
    """Outputs and gradients, with and without padding, in both alignments."""
    a = {"a": -0.1} if features == "favor++" else {}
    q, k, v = (x.requires_grad_() for x in problem(q_len, kv_len, scale=0.5))
    weight = torch.randn(2, 4, q_len, 5, generator=generator(3), dtype=torch.float64)
    padding = torch.arange(kv_len) % 3 != torch.arange(2)[:, None]
    for alignment, shift in (("bottom-right", kv_len - q_len), ("top-left", 0), (None, None)):
        for mask in (None, padding):
            out = performer_attention(
                q, k, v, OMEGA, features=features, causal=alignment is not None, padding_mask=mask,
                causal_alignment=alignment or "bottom-right", block=16, **a,
            )  # fmt: skip
            expected = quadratic(q, k, v, shift=shift, mask=mask, features=features, **a)
            torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
            got = torch.autograd.grad((out * weight).sum(), (q, k, v))
            wanted = torch.autograd.grad((expected * weight).sum(), (q, k, v))
            for x, y in zip(got, wanted, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(1 + y.abs().max()))


def test_projections_have_gradients_too() -> None:
    q, k, v = problem()
    omega = OMEGA.clone().requires_grad_()
    for causal in (False, True):
        out = performer_attention(q, k, v, omega, causal=causal, block=16).square().sum()
        expected = quadratic(q, k, v, omega, shift=0 if causal else None).square().sum()
        got, wanted = (torch.autograd.grad(x, omega)[0] for x in (out, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def global_key_maximum(q, k, v, omega, stabiliser: float = 1e-4):
    """Wrong: the published stabiliser, a maximum over all positions of the keys, and causal by prefix sums."""
    root = q.shape[-1] ** -0.25
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    fq = feature_map(q * root, omega).mantissa + stabiliser
    y = k * root
    dash = y @ omega.mT - y.square().sum(-1, keepdim=True) / 2
    fk = (dash - dash.amax((-1, -2), keepdim=True)).exp() + stabiliser
    state = (fk[..., :, None] * v[..., None, :]).cumsum(2)
    return (fq[..., None, :] @ state).squeeze(-2) / (fq * fk.cumsum(2)).sum(-1, keepdim=True)


def _leaks(method) -> bool:
    """Whether a row changes in any bit when later keys and values do."""
    q, k, v = problem(seed=4)
    k2, v2 = k.clone(), v.clone()
    k2[:, :, 23:] *= 3.0
    v2[:, :, 23:] += 1.0
    before, after = method(q, k, v)[:, :, :23], method(q, k2, v2)[:, :, :23]
    return not torch.equal(before, after)


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("stabiliser", [None, 1e-4])
def test_the_future_never_changes_a_row(features: str, stabiliser: float | None) -> None:
    if features == "trigonometric" and stabiliser is not None:
        stabiliser = None
    a = -0.1 if features == "favor++" else None
    for block in (8, 16, 64):
        assert not _leaks(
            lambda q, k, v, block=block: performer_attention(
                q, k, v, OMEGA, features=features, causal=True, stabiliser=stabiliser, a=a, block=block
            )
        )


def test_a_key_maximum_over_all_positions_leaks_and_is_found() -> None:
    assert _leaks(lambda q, k, v: global_key_maximum(q, k, v, OMEGA))
    assert _leaks(lambda q, k, v: performer_attention(q, k, v, OMEGA))  # not causal at all


@pytest.mark.parametrize("causal", [False, True])
def test_a_row_does_not_depend_on_the_batch(causal: bool) -> None:
    q, k, v = problem()
    whole = performer_attention(q, k, v, OMEGA, causal=causal, block=16)
    alone = performer_attention(q[1:], k[1:], v[1:], OMEGA, causal=causal, block=16)
    torch.testing.assert_close(whole[1:], alone, rtol=1e-13, atol=1e-13)
    # A published redraw takes its seed from the data, and then even one other sequence changes everything.
    seeds = [int(abs(float(x.sum())) * 1e6) for x in (q, q[1:])]
    outs = [
        performer_attention(
            q[1:], k[1:], v[1:], draw_projections(16, 8, generator=generator(s), dtype=q.dtype)
        )
        for s in seeds
    ]
    assert float((outs[0] - outs[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stabiliser", [None, 1e-2])
def test_values_of_one_give_one(causal: bool, dtype: torch.dtype, stabiliser: float | None) -> None:
    """Also for inputs so large that the features themselves, exp of up to 200, overflow."""
    for scale in (1.0, 6.0):
        q, k, v = problem(scale=scale, dtype=dtype)
        out = performer_attention(
            q, k, torch.ones_like(v), OMEGA, causal=causal, stabiliser=stabiliser, block=16
        )
        assert float((out.float() - 1).abs().max()) <= 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("features", ["positive", "trigonometric", "hyperbolic", "relu"])
def test_sums_over_many_keys_and_features_fit_fp16(features: str, causal: bool) -> None:
    """256 keys times 1,024 features of about 1 are more than 65,504."""
    q, k, v = (0.25 * torch.randn(1, 1, 256, 8, generator=generator(s)) for s in range(3))
    omega = draw_projections(
        512 if features in ("trigonometric", "hyperbolic") else 1024, 8, generator=generator(3)
    )

    def out(dtype: torch.dtype) -> torch.Tensor:
        tensors = (x.to(dtype) for x in (q, k, v))
        return performer_attention(
            *tensors, omega, features=features, causal=causal, compute_dtype=dtype
        ).double()

    exact = out(torch.float64)
    assert float((out(torch.float16) - exact).norm() / exact.norm()) < 4e-3


def test_an_epsilon_in_the_denominator_only_is_found_by_values_of_one() -> None:
    q, k, v = problem()
    root = 8**-0.25
    fq = feature_map(q * root, OMEGA).value()
    fk = feature_map(k.repeat_interleave(2, 1) * root, OMEGA).value()
    ones = torch.ones_like(v).repeat_interleave(2, 1)
    out = (fq @ (fk.mT @ ones)) / ((fq * fk.sum(-2, keepdim=True)).sum(-1, keepdim=True) + 1e-3)
    assert float((out - 1).abs().max()) > 1e-6


@pytest.mark.parametrize("causal", [False, True])
def test_padding_has_no_influence(causal: bool) -> None:
    q, k, v = problem()
    mask = torch.arange(40) < torch.tensor([[31], [0]])
    k2, v2 = k.clone(), v.clone()
    k2[~mask[:, None].expand(-1, 2, -1)] = 50.0
    v2[~mask[:, None].expand(-1, 2, -1)] = -7.0
    one, two = (
        performer_attention(q, k, v, OMEGA, causal=causal, padding_mask=mask) for k, v in ((k, v), (k2, v2))
    )
    assert torch.equal(one, two)
    assert not one[1].any()  # no token: 0
    # A mask that is taken and ignored:
    ignoring = [performer_attention(q, k, v, OMEGA, causal=causal) for k, v in ((k, v), (k2, v2))]
    assert not torch.equal(*ignoring)


def test_long_inputs_keep_their_accuracy_in_float32() -> None:
    """4,096 rows against the same features in float64. A backward by subtraction of prefix sums loses 100 times more."""
    q, k, v = (torch.randn(1, 1, 4096, 8, generator=generator(i)) for i in range(3))
    wide = performer_attention(q.double(), k.double(), v.double(), OMEGA, causal=True)
    narrow = performer_attention(q, k, v, OMEGA, causal=True)
    assert float((narrow - wide).abs().max()) < 1e-5

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        x = [t.to(dtype).requires_grad_() for t in (q, k, v)]
        out = performer_attention(x[0], x[1], x[2], OMEGA, causal=True)
        return torch.autograd.grad(out[..., -512:, :].sum(), x[1])[0].double()

    exact = gradient(torch.float64)
    assert float((gradient(torch.float32) - exact).norm() / exact.norm()) < 1e-5


# -- module and bad input ----------------------------------------------------------------------------------


def test_the_module_computes_what_the_function_does_and_redraws_from_its_generator() -> None:
    q, k, v = problem(dtype=torch.float32)
    module = PerformerAttention(8, 32, generator=generator(1), features="hyperbolic", causal=True, kv_heads=2)
    assert module.omega.shape == (2, 16, 8)
    expected = performer_attention(q, k, v, module.omega, features="hyperbolic", causal=True)
    assert torch.equal(module(q, k, v), expected)
    again = PerformerAttention(8, 32, generator=generator(2), features="hyperbolic", causal=True, kv_heads=2)
    module.redraw(generator(2))
    assert torch.equal(module.omega, again.omega)
    assert not torch.equal(module(q, k, v), expected)
    again.load_state_dict(module.state_dict())


def test_the_optimal_a_beats_positive_features_by_what_the_closed_form_says() -> None:
    x, y = (t.numpy() for t in pair(10.3, ONES))
    a = optimal_a(10.3, D)
    gain = theory.mean_square_error("positive", x, y, 1) / theory.mean_square_error("favor++", x, y, 1, a=a)
    assert 80 < float(gain[0]) < 120
    assert optimal_a(0.0, D) == 0.0


BAD = [
    (
        lambda q, k, v: performer_attention(q, k, v, OMEGA, stabiliser=0.0),
        "stabiliser must be finite and above 0, got 0.0",
    ),
    (
        lambda q, k, v: performer_attention(q, k, v, OMEGA, features="trigonometric", stabiliser=1e-4),
        "both signs",
    ),
    (lambda q, k, v: performer_attention(q * math.nan, k, v, OMEGA), "q has NaN or infinite entries"),
    (lambda q, k, v: performer_attention(q, k, v, OMEGA[:, :7]), r"omega must have the shape \(m, 8\)"),
    (
        lambda q, k, v: performer_attention(q[:, :3], k, v, OMEGA),
        r"heads of q \(3\) must be a positive multiple",
    ),
    (lambda q, k, v: performer_attention(q, k, v[:, :, :-1], OMEGA), "same heads and length"),
    (lambda q, k, v: performer_attention(q.float(), k, v, OMEGA), "one dtype"),
    (lambda q, k, v: performer_attention(q, k, v, OMEGA, features="favor++"), "need a number a"),
    (lambda q, k, v: performer_attention(q, k, v, OMEGA, features="favor++", a=0.2), "below 1/8"),
    (lambda q, k, v: performer_attention(q, k, v, OMEGA, a=0.1), "a is a parameter of 'favor"),
    (
        lambda q, k, v: performer_attention(q, k, v, OMEGA, features="exp"),
        "features must be one of 'positive'",
    ),
    (
        lambda q, k, v: performer_attention(q, k, v, OMEGA, padding_mask=torch.ones(2, 40)),
        "must be a bool tensor",
    ),
    (
        lambda q, k, v: performer_attention(q, k, v, OMEGA, padding_mask=torch.ones(2, 3, dtype=torch.bool)),
        "kv_len",
    ),
    (lambda q, k, v: performer_attention(q, k, v, OMEGA, scale=math.inf), "scale must be finite"),
    (lambda q, k, v: performer_attention(q, k, v, OMEGA, block=0), "block must be at least 1"),
    (lambda q, k, v: projections_for(15, "trigonometric"), "must be even .* take 16"),
    (lambda q, k, v: draw_projections(8, 16, generator=generator()), "fewer than one block"),
    (lambda q, k, v: draw_projections(8, 16, generator=0), "generator must be a torch.Generator"),  # pyright: ignore
    (lambda q, k, v: draw_projections(0, 16, generator=generator()), "count must be at least 1"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:28] for _, message in BAD])
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        call(*problem())
