"""Bound and noise of gradients and of options: held by correct kernels, reached by the worst, and what the tests find."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effattn import methods, values, zoo
from effattn.case import DTYPES, Case
from effattn.exact import Options, attention_with, gradients, scores
from effattn.judge import Outcome, Verdict, judge
from effattn.methods.user import UserFunction
from effattn.tolerances import formats, gradient_statistics
from effattn.tolerances.envelope import Envelope, forward_envelope
from effattn.tolerances.gradients import GradientEnvelope, _stored, gradient_envelopes
from effattn.tolerances.numerics import Numerics, for_dtype
from effattn.zoo.matrices import Setting, Whole
from effattn.zoo.specimen import Specimen

#: correct kernels of different design
RIGHT = ("whole-matrices", "whole-delta-of-unrounded-output", "whole-ds-scaled", "whole-heads-rounded")

#: fields of cases in which every option is, some alone, some together
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": "bottom-right", "window": (20, -1)},
    {"softcap": 5.0, "bias": "hqk"},
    {"alibi": "geometric", "lengths": "both"},
    {"mask": "bqk", "sinks": True},
    {"dropout": 0.25, "causal": "top-left"},
)


def method_of(kernel: Whole, dtypes: tuple[str, ...] = DTYPES) -> UserFunction:
    return Specimen(
        name="mine", right=True, what="", kernel=kernel, dtypes=dtypes, shows=lambda case: True  # type: ignore[arg-type]
    ).method()  # fmt: skip


def envelopes_of(
    case: Case, numerics: Numerics
) -> tuple[dict[str, torch.Tensor], dict[str, GradientEnvelope], Envelope]:
    inputs = case.tensors()
    d_out = inputs.extras.d_out
    assert d_out is not None
    options = Options.of(case, inputs)
    exact = attention_with(*inputs, options)
    forward = forward_envelope(*inputs, numerics=numerics, exact=exact, options=options)
    of = gradients(*inputs, d_out, options, exact=exact)
    found = gradient_envelopes(
        *inputs, d_out, numerics=numerics, exact=exact, gradients=of, forward=forward, options=options,
        bias_format=numerics.format("input"),
    )  # fmt: skip
    return of.present(), found, forward


def fractions(verdict: Verdict) -> dict[str, float]:
    return {q.name: q.fraction for q in verdict.quantities if q.fraction is not None}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_name", values.names())
def test_correct_kernels_pass_with_all_values(value_name: str, dtype: str) -> None:
    for seed, options in enumerate(OPTIONS):
        case = Case(
            batch=2, heads=4, kv_heads=2, q_len=41, kv_len=67, head_dim=16, v_dim=12, dtype=dtype, values=value_name,
            backward=True, seed=seed, **options,
        )  # fmt: skip
        verdict = judge(case, zoo.get(RIGHT[seed % len(RIGHT)]).method())
        assert verdict.outcome is Outcome.PASS, f"{case.describe()}\n{verdict.message}"
        assert {q.name for q in verdict.quantities} >= {"out", "lse", "dq", "dk", "dv"}


@pytest.mark.parametrize("dtype", DTYPES)
def test_errors_of_gradients_have_the_predicted_size(dtype: str) -> None:
    """z pooled over cases for each quantity; seeds are fixed, so this is no matter of luck."""
    squares: dict[str, list[tuple[int, float]]] = {}
    largest = []
    for seed, options in enumerate(OPTIONS):
        case = Case(
            heads=2, q_len=64, kv_len=96, head_dim=32, dtype=dtype, backward=True, seed=seed, **options
        )
        verdict = judge(case, zoo.get("whole-matrices").method())
        for q in verdict.quantities:
            assert q.z_rms is not None
            assert q.z_max is not None
            squares.setdefault(q.name, []).append((q.count, q.z_rms**2))
            largest.append(abs(q.z_max))
    rms = {name: math.sqrt(sum(n * z for n, z in x) / sum(n for n, _ in x)) for name, x in squares.items()}
    low = 0.8 if dtype != "fp32" else 0.65
    assert all(low < rms[name] < 1.1 for name in ("out", "dq", "dk", "dv")), rms
    assert (0.8 if dtype != "fp32" else 0.35) < rms["dbias"] < 1.1, rms
    assert max(largest) < 5.5


@pytest.mark.parametrize("dtype", ["fp32"])
def test_what_a_row_has_in_common_is_summed_over_its_keys_before_absolute_values(dtype: str) -> None:
    """A log-sum-exp off by its bound scales dQ, and is allowed; as much in each weight, against the sum, is not."""
    case = Case(heads=2, q_len=48, kv_len=160, head_dim=32, dtype=dtype, backward=True, seed=3)
    exact, found, forward = envelopes_of(case, for_dtype(dtype))
    q, k, v = (x.double() for x in case.tensors())
    d_out = case.tensors().extras.d_out
    assert d_out is not None
    s = q @ k.mT * case.softmax_scale
    w, d_p = s.softmax(-1), d_out.double() @ v.mT
    d_s = w * (d_p - (w * d_p).sum(-1, keepdim=True))
    off = torch.from_numpy(forward.lse_bound)[..., None]
    common = (torch.exp(-off) * d_s @ k) * case.softmax_scale - exact["q"]
    assert np.all(common.abs().numpy() <= found["q"].bound)
    assert np.any(common.abs().numpy() > 0.01 * found["q"].bound)
    # The same size with the sign of each term of the first column of dQ.
    against = torch.sign(d_s * k[..., 0][:, :, None])
    apart = ((torch.exp(off * against) * d_s) @ k)[..., 0] * case.softmax_scale - exact["q"][..., 0]
    share = apart.numpy() / found["q"].bound[..., 0]
    assert share.max() > 0.6
    assert share.max() > 8.0 * (common.abs().numpy() / found["q"].bound).mean()
    # dK takes one such error from each query, so nothing of it cancels: the bound has room for all of them.
    keys = ((torch.exp(off * torch.sign(d_s * q[..., 0][..., None])) * d_s).mT @ q)[
        ..., 0
    ] * case.softmax_scale
    assert np.all((keys - exact["k"][..., 0]).abs().numpy() <= found["k"].bound[..., 0])


@pytest.mark.parametrize(
    ("dtype", "name", "least"), [("fp32", "dq", 0.01), ("fp32", "dk", 0.003), ("fp32", "dv", 0.005)]
)
def test_the_bound_of_fp32_is_as_tight_as_derived(dtype: str, name: str, least: float) -> None:
    found = [
        fractions(
            judge(
                Case(heads=2, q_len=64, kv_len=96, head_dim=32, dtype=dtype, backward=True, seed=seed),
                zoo.get("whole-matrices").method(),
            )
        )[name]
        for seed in range(5)
    ]
    assert np.median(found) > least, found


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_bound_of_gradients_is_not_far_off(dtype: str) -> None:
    for name in ("dq", "dk", "dv"):
        found = []
        for seed, options in enumerate(OPTIONS):
            case = Case(
                heads=2, q_len=64, kv_len=96, head_dim=32, dtype=dtype, backward=True, seed=seed, **options
            )
            found.append(fractions(judge(case, zoo.get("whole-matrices").method()))[name])
        assert np.median(found) > 0.05, name


class WorstDs(Whole):
    """Every dS is rounded to the neighbour that moves dQ up the most: up to twice what rounding to nearest allows."""

    def cast_ds(self, d_s: torch.Tensor, dtype: torch.dtype, setting: Setting) -> torch.Tensor:
        bits = 16 if dtype == torch.bfloat16 else 13
        below = (d_s.contiguous().view(torch.int32) >> bits << bits).view(torch.float32)
        spacing = torch.exp2(torch.floor(torch.log2(d_s.abs().clamp(min=1e-30))) - (23 - bits))
        above = torch.where(d_s != below, below + torch.copysign(spacing, d_s), below)
        return torch.maximum(below, above)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_worst_allowed_rounding_comes_near_the_bound_and_not_beyond(dtype: str) -> None:
    case = Case(
        heads=2, q_len=32, kv_len=64, head_dim=1, v_dim=16, scale=1.0, dtype=dtype, backward=True, seed=3
    )
    inputs = case.tensors()
    # With K > 0 each dS rounded up moves dQ up.
    inputs = type(inputs)(inputs.q, inputs.k.abs(), inputs.v, extras=inputs.extras)
    d_out = inputs.extras.d_out
    assert d_out is not None
    options = Options.of(case, inputs)
    exact = attention_with(*inputs, options)
    of = gradients(*inputs, d_out, options, exact=exact)
    # Nothing but dS is rounded.
    numerics = for_dtype(dtype).replace(p="fp32", delta_of="unrounded")
    forward = forward_envelope(*inputs, numerics=numerics, exact=exact, options=options)
    found = gradient_envelopes(
        *inputs, d_out, numerics=numerics, exact=exact, gradients=of, forward=forward, options=options
    )["q"]
    q, k, v = (x.float() for x in inputs)
    setting, kernel = Setting(scale=1.0), WorstDs()
    p = kernel.weights(kernel.scores(setting, q, k, None)[0], exact.lse.float())
    g = d_out.float()
    d_s = p * (g @ v.mT - (g * exact.out.float()).sum(-1, keepdim=True))
    d_q = (kernel.cast_ds(d_s, inputs.q.dtype, setting).double() @ k.double()).numpy()
    error = (d_q - of.q.numpy()) / 2.0
    assert (np.abs(error) <= found.reach).all()
    assert np.median(error / found.reach) > 0.3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS[:5], ids=lambda o: "-".join(o) or "plain")
def test_blocks_do_not_change_the_envelopes(
    options: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(
        batch=2, heads=4, kv_heads=2, q_len=31, kv_len=37, head_dim=8, dtype=dtype, backward=True, **options
    )
    of, whole, forward = envelopes_of(case, for_dtype(dtype))
    monkeypatch.setattr(scores, "_BLOCK_SCORES", 37 * 7)
    of_blocks, blocks, forward_blocks = envelopes_of(case, for_dtype(dtype))
    for name, x in of.items():
        assert torch.allclose(x, of_blocks[name], rtol=1e-9, atol=1e-13), name
    for name, x in whole.items():
        for field, y in vars(x).items():
            # Differences of sums, such as `cast`, have the size of these sums to be compared with.
            assert np.allclose(y, getattr(blocks[name], field), rtol=1e-6, atol=1e-9 * np.abs(y).max()), (
                name,
                field,
            )
    for field in ("out_bound", "out_sigma", "out_typical", "lse_bound", "lse_typical"):
        assert np.allclose(getattr(forward, field), getattr(forward_blocks, field), rtol=1e-7), field


@pytest.mark.parametrize("dtype", DTYPES)
def test_options_that_change_nothing_leave_the_envelope_nearly_as_it_is(dtype: str) -> None:
    """The path for options against that for plain problems: a window wider than the problem."""
    case = Case(heads=4, kv_heads=2, q_len=40, kv_len=50, head_dim=16, dtype=dtype, causal="bottom-right")
    numerics = for_dtype(dtype)
    both = []
    for window in (None, (10_000, 10_000)):
        inputs = case.tensors()
        options = Options(causal=case.causal, scale=case.softmax_scale, window=window)
        exact = attention_with(*inputs, options)
        both.append(forward_envelope(*inputs, numerics=numerics, exact=exact, options=options))
    plain, general = both
    assert plain.seen is None
    assert general.seen is not None
    # Where P is rounded, the plain path bounds the scores' errors by a product of lengths.
    assert (general.out_bound <= plain.out_bound * (1 + 1e-9)).all()
    assert np.median(general.out_bound / plain.out_bound) > 0.95
    assert np.allclose(general.out_sigma, plain.out_sigma, rtol=0.01)


def test_a_sink_alone_is_known_as_well_as_any_log_sum_exp() -> None:
    """Rows that see no key have the sink's logit for theirs: its noise is a few roundings, as in the other rows."""
    case = Case(
        heads=2,
        q_len=24,
        kv_len=8,
        head_dim=16,
        dtype="fp32",
        causal="bottom-right",
        sinks=True,
        backward=True,
    )
    _, found, forward = envelopes_of(case, for_dtype("fp32", "flash"))
    alone, others = np.sqrt(forward.lse_noise[:, :, :16]), np.sqrt(forward.lse_noise[:, :, 16:])
    assert alone.max() < 3.0 * others.max()
    assert forward.lse_typical[:, :, :16].max() < 3.0 * forward.lse_typical[:, :, 16:].max()
    assert (found["sinks"].typical <= found["sinks"].sigma).all()


def test_rows_that_are_not_judged_set_their_gradients_aside() -> None:
    case = Case(batch=2, heads=2, q_len=4, kv_len=8, head_dim=64, dtype="fp32", scale=2.0**12, backward=True)
    _, found, forward = envelopes_of(case, for_dtype("fp32"))
    assert not forward.judged.any()
    for x in found.values():
        assert not x.judged.any()
        assert np.isinf(x.bound).all()


def test_what_sees_nothing_is_allowed_no_error() -> None:
    case = Case(
        batch=3, heads=2, q_len=9, kv_len=11, head_dim=8, dtype="fp16", lengths="both", backward=True, seed=1
    )
    inputs = case.tensors()
    _, found, forward = envelopes_of(case, for_dtype("fp16"))
    extras = inputs.extras
    assert extras.q_lengths is not None
    assert extras.kv_lengths is not None
    for b in range(3):
        m, n = int(extras.q_lengths[b]), int(extras.kv_lengths[b])
        assert (found["q"].bound[b, :, m:] == 0.0).all()
        assert (found["k"].bound[b, :, n:] == 0.0).all()
        assert (forward.out_bound[b, :, m:] == 0.0).all()
        if m and n:
            assert (found["k"].bound[b, :, :n] > 0.0).all()
            assert (found["q"].bound[b, :, :m] > 0.0).all()


class RowTouched(Whole):
    """One element of dQ in a row of padding is not 0."""

    def scaled(self, x: torch.Tensor, setting: Setting, of: str) -> torch.Tensor:
        x = super().scaled(x, setting, of)
        if of == "q":
            x[:, 0, -1, 0] += 1e-7
        return x


def test_a_gradient_in_padding_is_found_however_small() -> None:
    case = Case(q_len=40, kv_len=40, head_dim=8, dtype="fp32", lengths="both", backward=True, seed=2)
    assert judge(case, method_of(Whole())).outcome is Outcome.PASS
    verdict = judge(case, method_of(RowTouched()))
    assert verdict.outcome is Outcome.INACCURATE
    assert "dQ[0, 0, 39, 0] is 1" in verdict.message
    assert "allowed is 0: nothing that is visible takes part in this gradient" in verdict.message


def test_messages_name_the_gradient_and_the_allowance() -> None:
    case = Case(heads=2, q_len=64, kv_len=64, head_dim=32, dtype="fp16", backward=True)
    verdict = judge(case, zoo.get("dq-not-scaled").method())
    assert verdict.outcome is Outcome.INACCURATE
    assert verdict.message.startswith("dQ[")
    assert "P from the log-sum-exp, dP and delta in fp32, dS rounded to fp16 (u = 2^-11)" in verdict.message
    verdict = judge(
        Case(heads=8, q_len=256, kv_len=256, head_dim=64, dtype="bf16", backward=True),
        zoo.get("ds-truncated").method(),
    )
    assert verdict.outcome is Outcome.BIASED
    assert "the errors of dQ are not those of rounding" in verdict.message


class Halved(Whole):
    """All gradients are half of what they should be."""

    def gradients(self, *arguments: Any) -> Any:
        return [0.5 * x if isinstance(x, torch.Tensor) else x for x in super().gradients(*arguments)]


def test_the_allowance_of_a_gradient_is_that_of_the_declared_numerics() -> None:
    case = Case(heads=4, kv_heads=2, q_len=64, kv_len=64, head_dim=32, dtype="fp16", backward=True)
    method = method_of(Halved())
    declared = {"dp": "fp16", "stored_keys": 32, "stored_queries": 16, "group_sum": "input", "score": "fp16"}
    method.numerics = lambda case: for_dtype("fp16", "flash").replace(**declared)  # type: ignore[method-assign]
    title = ", ".join(
        f"{name}={declared[name]}" for name in ("score", "dp", "group_sum", "stored_keys", "stored_queries")
    )
    lines = judge(case, method).message.splitlines()
    start = "P from the log-sum-exp, scores kept in fp16 (u = 2^-11), "
    dp = "dP kept in fp16 (u = 2^-11), delta in fp32, dS rounded to fp16 (u = 2^-11), "
    group = ", that of each query head rounded to fp16 before they are added up"
    for at, words in (
        ("dQ[", f"{start}{dp}dQ kept in fp16, rounded after every 16 keys"),
        ("dK[", f"{start}{dp}dK kept in fp16, rounded after every 32 queries{group}"),
        ("dV[", f"{start}sums in fp32, P rounded to fp16 (u = 2^-11), dV kept in fp16, rounded after every 32 queries{group}"),
    ):  # fmt: skip
        (place,) = (i for i, line in enumerate(lines) if line.startswith(at))
        assert lines[place + 1].endswith(f"{words} (numerics 'flash fp16' with {title})")


@pytest.mark.parametrize("name", ["p", "ds", "dp"])
def test_a_coarser_declaration_allows_more(name: str) -> None:
    case = Case(heads=2, q_len=32, kv_len=64, head_dim=32, dtype="fp16", backward=True)
    fine = for_dtype("fp16").replace(p="fp32", ds="fp32")
    _, before, _ = envelopes_of(case, fine)
    _, after, _ = envelopes_of(case, fine.replace(**{name: "fp16"}))
    for gradient in {"p": ("v",), "ds": ("q", "k"), "dp": ("q", "k")}[name]:
        assert (after[gradient].bound > before[gradient].bound).all()
        assert (after[gradient].sigma > before[gradient].sigma).all()
    if name != "p":  # which the output has in it, and so delta
        assert np.array_equal(after["v"].sigma, before["v"].sigma)


def test_sums_that_are_stored_in_the_input_dtype_must_be_declared() -> None:
    case = Case(heads=4, q_len=256, kv_len=64, head_dim=32, dtype="bf16", backward=True)
    specimen = zoo.get("key-sums-in-input-dtype")
    assert judge(case, specimen.method()).outcome is not Outcome.PASS
    declared = UserFunction(specimen.function, spec="mine:stored")
    declared.numerics = lambda case: for_dtype(case.dtype).replace(stored_keys=16)  # type: ignore[method-assign]
    verdict = judge(case, declared)
    assert verdict.outcome is Outcome.PASS, verdict.message
    rms = {q.name: q.z_rms for q in verdict.quantities}
    assert 0.7 < rms["dk"] < 1.1  # type: ignore[operator]
    assert 0.7 < rms["dv"] < 1.1  # type: ignore[operator]


@given(
    seen=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=3),
    block=st.integers(1, 70),
)
def test_partial_sums_are_stored_as_often_as_blocks_end_between_terms(
    seen: list[tuple[int, int]], block: int
) -> None:
    length = max(start + count for start, count in seen)
    n = torch.tensor([[float(sum(count for _, count in seen))]], dtype=torch.float64)
    one = torch.ones_like(n)
    blocks = {(head, i // block) for head, (start, m) in enumerate(seen) for i in range(start, start + m)}
    fmt = formats.get("bf16")

    def stores(contiguous: bool) -> float:
        most, _ = _stored(block, n, len(seen), length, contiguous, one, 0.0 * one, one, fmt)
        return float(most) / (0.5 * fmt.unit_roundoff + 0.5 * fmt.smallest_subnormal)

    # Every block that is met but the last is the end of a partial sum, and it is not allowed for much more often.
    assert len(blocks) - 1 <= stores(True) * (1 + 1e-12) <= stores(False) * (1 + 1e-12)
    assert stores(True) <= len(blocks) - 1 + 2 * len(seen)


def test_two_terms_may_lie_in_two_blocks() -> None:
    # A key that two queries see, the 31st and the 32nd, between which torch rounds dV to bf16.
    case = Case(
        batch=3, q_len=33, kv_len=129, head_dim=64, dtype="bf16", causal="top-left", lengths="kv", backward=True,
        values="uniform", seed=439,
    )  # fmt: skip
    verdict = judge(case, methods.get("torch"))
    assert verdict.outcome is Outcome.PASS, verdict.message


@pytest.mark.parametrize("n", [1.0, 8.0, 500.0])
@pytest.mark.parametrize("probability", [1e-3, 1e-11])
def test_the_limit_of_a_mean_square_is_where_the_bound_says(n: float, probability: float) -> None:
    x = gradient_statistics.limit(n, probability)
    assert x > 1.0
    assert math.exp(-n * (x - 1.0 - math.log(x)) / 2.0) == pytest.approx(probability, rel=1e-6)


def _made(
    rows: int, *, factor: float = 1.0, common: float = 0.0, seed: int = 0
) -> gradient_statistics.GradientErrors:
    """Errors of the predicted size times `factor`, a part of whose variance is common to all rows."""
    random = np.random.default_rng(seed)
    columns = 16
    exact = random.normal(size=(rows, columns))
    ones = np.ones_like(exact)
    own = random.normal(size=(rows, 1)) * np.sqrt(1.0 - common)  # all elements of a row alike: allowed
    error = 1e-3 * factor * (own + np.sqrt(common) * random.normal(size=(1, 1))) * ones
    return gradient_statistics.GradientErrors(
        name="dk", error=error, exact=exact, sigma=1e-3 * ones, common=common * 1e-6 * ones, delta=0.0 * ones,
        inner=1e-9 * ones, cast=0.9e-6 * ones, format=for_dtype("bf16").format("acc"), heads=4,
        head=np.arange(rows) * 4 // rows, known=lambda: iter(()),
        places=lambda: np.arange(rows, dtype=float)[:, None] * 10.0,
    )  # fmt: skip


@pytest.mark.parametrize("common", [0.0, 0.01, 0.5, 1.0])
def test_correlated_errors_of_the_predicted_size_raise_no_alarm(common: float) -> None:
    for seed in range(300):
        assert not gradient_statistics.examine(_made(200, common=common, seed=seed), alarm=1e-6)


def test_errors_too_large_are_found_where_little_is_common() -> None:
    found = gradient_statistics.examine(_made(400, factor=1.6, common=0.001), alarm=1e-10)
    assert [f.name for f in found] == ["dk size"]
    assert found[0].statistic == pytest.approx(1.6, rel=0.1)
    # Of errors that all rows share there is one sample only.
    assert not gradient_statistics.examine(_made(400, factor=1.6, common=1.0), alarm=1e-10)


def test_errors_in_proportion_are_found() -> None:
    errors = _made(400)
    object.__setattr__(errors, "error", 3e-4 * errors.exact)
    assert [f.name for f in gradient_statistics.examine(errors, alarm=1e-10)] == ["dk output"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sink_above_all_scores_leaves_no_weight_exact(dtype: str) -> None:
    """P is 1 at the maximum of the keys only where no sink is larger: one key, whose weight is rounded."""
    method = UserFunction(zoo.get("whole-matrices").function)
    method.numerics = lambda case: for_dtype(case.dtype, "flash")  # type: ignore[method-assign]
    for seed in range(6):
        case = Case(heads=4, q_len=33, kv_len=1, head_dim=62, dtype=dtype, sinks=True, seed=seed)
        verdict = judge(case, method)
        assert verdict.outcome is Outcome.PASS, verdict.message
