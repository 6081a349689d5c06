"""Bound and noise: held by correct kernels, reached by the worst of them, and the formulas against plain sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from effattn import exact, values, zoo
from effattn.case import DTYPES, Case
from effattn.tolerances import sums, typical
from effattn.tolerances.envelope import FLOAT32_SUMS, Envelope, forward_envelope, running_sum
from effattn.tolerances.numerics import Numerics, for_dtype
from effattn.zoo.tiled import Flash, State

RIGHT = (
    "flash",
    "flash-block-16",
    "flash-reversed",
    "flash-split-kv",
    "flash-two-pass",
    "fp32-matmul-softmax",
)


def envelope_of(case: Case, numerics: Numerics, **options: Any) -> tuple[exact.Exact, Envelope]:
    inputs = case.tensors()
    reference = exact.attention(*inputs, causal=case.causal, scale=case.softmax_scale)
    return reference, forward_envelope(
        *inputs, numerics=numerics, exact=reference, causal=case.causal, scale=case.softmax_scale, **options
    )


def errors_of(kernel: Any, case: Case, reference: exact.Exact) -> np.ndarray:
    out = kernel(*case.tensors(), causal=case.causal, scale=case.softmax_scale)
    out = out[0] if isinstance(out, tuple) else out
    return (out.double() - reference.out).numpy()


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_correct_kernels_stay_within_the_bound_on_all_values(name: str, dtype: str) -> None:
    kernel = zoo.get(name).kernel
    for seed, value_name in enumerate(values.names()):
        case = Case(
            heads=4, kv_heads=2, q_len=33, kv_len=129, head_dim=24, v_dim=16, dtype=dtype,
            values=value_name, causal=("none", "bottom-right", "top-left")[seed % 3], seed=seed,
        )  # fmt: skip
        reference, envelope = envelope_of(case, for_dtype(dtype))
        error = np.abs(errors_of(kernel, case, reference))
        assert (error <= envelope.out_bound).all(), case.describe()


class WorstP(Flash):
    """Every weight is rounded to the neighbour that moves the output up the most: allowed, and never seen."""

    def step(self, state: State, s: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
        # For one column of V, whose sign says which way is up.
        up = (v[..., 0].float() > 0)[:, :, None, :]
        top = self.growth(s, state.top)
        p = self.weights(s, top)
        decay = self.decay(state.top, top)
        bits = 16 if dtype == torch.bfloat16 else 13
        below = (p.view(torch.int32) >> bits << bits).view(torch.float32)
        spacing = torch.exp2(torch.floor(torch.log2(p)) - (23 - bits))
        above = torch.where(p > below, below + spacing, p)
        state.acc = state.acc * decay[..., None] + torch.where(up, above, below) @ v.float()
        state.total = state.total * decay + p.sum(-1)
        state.top = top


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_worst_allowed_rounding_comes_near_the_bound_and_not_beyond(dtype: str) -> None:
    # P to either neighbour is up to 2 u off where rounding to nearest allows u, so half of the error is allowed.
    case = Case(heads=2, q_len=64, kv_len=64, head_dim=16, v_dim=1, dtype=dtype, seed=5)
    reference, envelope = envelope_of(case, for_dtype(dtype))
    inputs = case.tensors()
    out = Flash.finish(
        WorstP(), WorstP().part(*inputs, (0, 64), "none", WorstP().scale(inputs.q, None)), torch.float64
    )
    error = (out[0].double() - reference.out).numpy() / 2.0
    assert (np.abs(error) <= envelope.out_reach).all()
    assert np.median(error / envelope.out_reach) > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", ["none", "bottom-right", "top-left"])
@pytest.mark.parametrize("value_name", ["normal", "repeated-max"])
def test_tiles_do_not_change_the_envelope(dtype: str, causal: str, value_name: str) -> None:
    case = Case(
        batch=2,
        heads=4,
        kv_heads=2,
        q_len=41,
        kv_len=67,
        head_dim=8,
        dtype=dtype,
        causal=causal,
        values=value_name,
    )
    _, whole = envelope_of(case, for_dtype(dtype))
    _, tiled = envelope_of(case, for_dtype(dtype), block=(7, 11))
    for name, x in vars(whole).items():
        if name == "seen":
            assert x is vars(tiled)[name] is None
            continue
        if name == "along_top" and value_name == "repeated-max":
            continue  # which of equal keys is the largest is anybody's guess
        # Differences of nearly equal sums, as in directions, have only their own scale to be compared with.
        size = np.abs(x[np.isfinite(x)]).max() if name.startswith("along") else 0.0
        assert np.allclose(x, vars(tiled)[name], rtol=1e-7, atol=1e-12 * size), name


def plain_noise(case: Case, numerics: Numerics, reference: exact.Exact) -> np.ndarray:
    """The variance before the output is rounded, without blocks, squares expanded or anything clever: fp32 inputs."""
    q, k, v = (x.double() for x in case.tensors())
    s = case.softmax_scale * q @ k.mT
    w = torch.exp(s - reference.lse[..., None])
    u2 = 0.125 / math.log(2.0) * numerics.format("acc").unit_roundoff ** 2
    d, n = q.shape[-1], k.shape[2]
    terms = case.softmax_scale**2 * (q[:, :, :, None] ** 2 * k[:, :, None] ** 2).sum(-1)
    gap = s - reference.lse[..., None]
    var = u2 * ((d + 1) / 6 * terms + terms + ((d + 1) / 3 + 1) * s**2 + gap**2 + numerics.exp_ulps**2)
    away = v[:, :, None] - reference.out[..., None, :]
    scores = (w[..., None] ** 2 * away**2 * var[..., None]).sum(3)
    t2 = (w[..., None] ** 2 * v[:, :, None] ** 2).sum(3)
    acc = u2 * (((n + 1) / 6 + 2) * t2 + (n + 1) / 3 * reference.out**2)
    total = u2 * reference.out**2 * ((n + 1) / 6 * (w**2).sum(-1, keepdim=True) + (n + 1) / 3 + 2)
    scale = (w[..., None] * s[..., None] * away).sum(3) * numerics.format("acc").unit_roundoff
    return (scores + acc + total + scale**2).numpy()


def test_noise_is_the_sum_that_the_formula_says() -> None:
    case = Case(heads=2, q_len=9, kv_len=13, head_dim=5, v_dim=3, dtype="fp32", seed=1)
    numerics = for_dtype("fp32")
    reference, envelope = envelope_of(case, numerics)
    assert np.allclose(envelope.out_noise, plain_noise(case, numerics, reference), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize(
    "fields", [{"values": "outliers"}, {"scale": 14.0}, {"scale": 90.0}, {"values": "near-ties"}]
)
def test_a_pass_in_float32_agrees_with_float64_and_bounds_are_no_smaller(
    monkeypatch: pytest.MonkeyPatch, dtype: str, fields: dict[str, Any]
) -> None:
    case = Case(heads=2, q_len=64, kv_len=70, head_dim=16, dtype=dtype, causal="bottom-right", **fields)
    _, wide = envelope_of(case, for_dtype(dtype))
    monkeypatch.setattr(sums, "_WORTH", 0)
    reference, narrow = envelope_of(case, for_dtype(dtype))
    q, k, _ = case.tensors()
    precision = sums.Precision.of(q, k, reference.lse, case.softmax_scale)
    assert precision.sums == torch.float32
    assert (precision.scores == torch.float32) == (fields != {"scale": 90.0})
    for name in ("out_bound", "out_sigma", "out_inner", "lse_bound", "lse_typical"):
        assert np.allclose(getattr(narrow, name), getattr(wide, name), rtol=1e-3), name
        assert not np.array_equal(getattr(narrow, name), getattr(wide, name)), "float32 was not used"
    assert np.array_equal(narrow.judged, wide.judged)
    # What float32 loses has been added to bounds, in either precision.
    for name in ("out_bound", "out_reach", "lse_bound"):
        lost = getattr(wide, name) / getattr(narrow, name) - 1.0
        assert lost[narrow.judged].max() <= FLOAT32_SUMS, name


def test_error_of_a_score_in_float32_is_within_its_bound() -> None:
    for seed in range(20):
        case = Case(heads=2, q_len=40, kv_len=50, head_dim=(8, 64, 256)[seed % 3], dtype="fp32", seed=seed)
        q, k, v = (x.double() for x in case.tensors())
        scale, lse = case.softmax_scale, exact.attention(q, k, v).lse
        log_w = scale * (q @ k.mT) - lse[..., None]
        s = (q * scale).float() @ k.float().mT
        w = torch.exp(s - lse[..., None].float())
        longest = float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) * scale
        allowed = sums.score_error(case.head_dim, np.asarray(longest), lse.numpy())[..., None]
        off = (w.double().log() - log_w).abs().numpy()
        assert (off <= allowed).all()
        assert off.max() > 1e-3 * allowed.min(), "nothing was lost, so nothing was tried"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_partial_sums_in_random_order_have_the_mean_square_of_the_formula(n: int) -> None:
    terms = np.array([0.3, -1.2, 2.0, 0.7, -0.4])[:n]
    orders = [np.cumsum(order) for order in itertools.permutations(terms)]
    a, c = running_sum(np.array([float(n)]), None)
    expected = a[0] * (terms**2).sum() + c[0] * terms.sum() ** 2
    assert np.mean([(order**2).sum() for order in orders]) == pytest.approx(expected)


def test_partial_sums_of_blocks_have_the_mean_square_of_the_formula() -> None:
    terms, block = np.array([0.3, -1.2, 2.0, 0.7, -0.4, 1.1]), 2
    squares = []
    for order in itertools.permutations(terms):
        inside = np.cumsum(np.reshape(order, (-1, block)), axis=1)
        squares.append((inside**2).sum() + (np.cumsum(inside[:, -1]) ** 2).sum())
    a, c = running_sum(np.array([6.0]), block)
    assert np.mean(squares) == pytest.approx(a[0] * (terms**2).sum() + c[0] * terms.sum() ** 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_correct_kernels_have_the_predicted_size(dtype: str) -> None:
    """z pooled over kernels and cases: each distribution, then all. Seeds are fixed, so this is no matter of luck."""
    pooled = {}
    for value_name in (
        "normal",
        "uniform",
        "outliers",
        "large-logits",
        "growing-max",
        "low-rank",
        "smooth-keys",
    ):
        case = Case(heads=2, q_len=64, kv_len=128, head_dim=32, dtype=dtype, values=value_name, seed=2)
        reference, envelope = envelope_of(case, for_dtype(dtype, "flash"))
        z = [errors_of(zoo.get(name).kernel, case, reference) / envelope.out_sigma for name in RIGHT]
        if dtype != "fp32":
            z.pop()  # P is not rounded in that kernel: fewer errors than declared
        pooled[value_name] = rms(np.array(z))
        assert np.abs(np.array(z)).max() < 6.5, value_name
    low = {"fp16": 0.75, "bf16": 0.75, "fp32": 0.4}[dtype]
    assert all(low < z < 1.1 for z in pooled.values()), pooled


def test_a_single_key_leaves_nothing_but_the_rounding_of_the_output() -> None:
    case = Case(heads=2, q_len=8, kv_len=1, head_dim=16, dtype="bf16")
    reference, envelope = envelope_of(case, for_dtype("bf16", "flash"))
    assert np.allclose(
        envelope.out_sigma, np.sqrt(for_dtype("bf16").format("output").ulp(reference.out.numpy()) ** 2 / 12)
    )
    assert (np.sqrt(envelope.out_noise) < 1e-5 * np.abs(reference.out.numpy()) + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["one-hot", "constant"])
def test_errors_that_are_known_have_no_deviation(values: str, dtype: str) -> None:
    """One weight is 1, or all P are, so that nothing is rounded but what the inputs say; a kernel has just these errors."""
    case = Case(heads=2, q_len=12, kv_len=32, head_dim=16, dtype=dtype, values=values)
    reference, envelope = envelope_of(case, for_dtype(dtype, "flash"))
    output = for_dtype(dtype).format("output")
    step = output.ulp(np.abs(reference.out.numpy()))
    if values == "one-hot" or dtype != "fp32":
        assert (envelope.out_typical < 0.02 * step).all()
        assert (np.abs(errors_of(zoo.get("flash").kernel, case, reference)) < 0.02 * step).all()
    assert (envelope.out_sigma > 0.2 * step).all(), "this much is granted all the same"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_rounding_is_spread_evenly_or_known(dtype: str) -> None:
    fmt = for_dtype(dtype).format("output")
    rng = np.random.default_rng(5)
    for at in (1.0 + 0.3 * fmt.unit_roundoff, 1.5, 1.25 + 0.9 * fmt.unit_roundoff):
        for spacings in (0.001, 1.0, 3.0):
            x, step = np.array([at]), fmt.ulp(np.array([at]))[0]
            drawn = fmt.round(at + rng.normal(size=20_000) * spacings * step) - at
            predicted = typical.rounded(fmt, x, np.array([(spacings * step) ** 2]))[0]
            assert np.mean(drawn**2) == pytest.approx(predicted, rel=0.06, abs=1e-5 * step**2)


def test_rows_without_keys_are_allowed_no_error() -> None:
    case = Case(heads=2, q_len=7, kv_len=3, head_dim=4, dtype="fp16", causal="bottom-right")
    _, envelope = envelope_of(case, for_dtype("fp16"))
    assert envelope.empty_rows == 4
    assert (envelope.out_bound[:, :, :4] == 0.0).all()
    assert (envelope.lse_bound[:, :, :4] == 0.0).all()
    assert (envelope.out_bound[:, :, 4:] > 0.0).all()
    assert envelope.judged.all()


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_queries_or_no_keys_make_an_envelope_of_the_right_shape(q_len: int, kv_len: int) -> None:
    case = Case(batch=2, heads=3, q_len=q_len, kv_len=kv_len, head_dim=4, v_dim=6, dtype="bf16")
    _, envelope = envelope_of(case, for_dtype("bf16"))
    assert envelope.out_bound.shape == (2, 3, q_len, 6)
    assert envelope.judged.shape == (2, 3, q_len)
    assert envelope.judged.all()


def test_what_rounding_may_turn_upside_down_is_not_judged() -> None:
    case = Case(q_len=4, kv_len=8, head_dim=64, dtype="fp32", scale=2.0**12)
    _, envelope = envelope_of(case, for_dtype("fp32"))
    assert not envelope.judged.any()
    assert np.isinf(envelope.out_bound).all()
    assert envelope.condition.min() > 1e4


@pytest.mark.parametrize("name", ["score", "p"])
def test_a_coarser_declaration_allows_more(name: str) -> None:
    case = Case(heads=2, q_len=32, kv_len=64, head_dim=32, dtype="fp16")
    fine = for_dtype("fp16").replace(p="fp32")
    _, before = envelope_of(case, fine)
    _, after = envelope_of(case, fine.replace(**{name: "fp16"}))
    assert (after.out_bound > before.out_bound).all()
    assert (after.out_noise > 100.0 * before.out_noise).all()


def test_weights_that_underflow_in_fp16_are_allowed_for() -> None:
    # One key far above 4,000 others, whose weights are near the smallest numbers of fp16, and V of one sign.
    case = Case(q_len=4, kv_len=4097, head_dim=1, v_dim=4, dtype="fp16", scale=1.0)
    k = torch.zeros(1, 1, 4097, 1, dtype=torch.float16)
    k[0, 0, 0] = 17.0
    inputs = (torch.ones(1, 1, 4, 1, dtype=torch.float16), k, case.tensors().v.abs() + 0.5)
    reference = exact.attention(*inputs, scale=1.0)
    envelope = forward_envelope(*inputs, numerics=for_dtype("fp16"), exact=reference, scale=1.0)
    out = Flash()(*inputs, scale=1.0)[0].double()
    error = np.abs((out - reference.out).numpy())
    assert (error <= envelope.out_bound).all()
    # A format with fp32's range does not lose them: half the smallest subnormal number of fp16, 4,096 times.
    wide = forward_envelope(*inputs, numerics=for_dtype("fp16").replace(p="fp32"), exact=reference, scale=1.0)
    lost = 4096 * 2.0**-25 * inputs[2].double().amax(2).numpy()
    assert np.allclose(envelope.out_steady - wide.out_steady, lost[:, :, None], rtol=1e-6)
    assert (error > 0.1 * lost.min()).any()


def test_keys_that_are_there_many_times_may_round_alike() -> None:
    case = Case(q_len=16, kv_len=128, head_dim=16, dtype="bf16", layout="bhsd+expand-s", values="normal")
    _, together = envelope_of(case, for_dtype("bf16"))
    inputs = case.tensors()
    moved = (
        inputs.k
        + 2.0**-6 * torch.randn(inputs.k.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    )
    reference = exact.attention(inputs.q, moved, inputs.v)
    apart = forward_envelope(inputs.q, moved, inputs.v, numerics=for_dtype("bf16"), exact=reference)
    # 128 equal roundings of weights 1/128 have the variance of one of weight 1.
    assert np.median(together.out_noise / apart.out_noise) == pytest.approx(128.0, rel=0.2)
