"""The float64 reference against ball arithmetic: it is near enough, and references that are wrong are found."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn import exact
from effattn.case import Case, Inputs
from effattn.certify import ALLOWED, certify, float64_reference, some_dropout
from effattn.certify.balls import MOST_PRODUCTS, Enclosures, enclose, ends
from effattn.certify.rounding import decided, round_fraction
from effattn.cli import cli
from effattn.errors import RequestError
from effattn.exact import Exact, Options
from effattn.properties import menus, strategies
from effattn.tolerances import formats
from effattn.tolerances.envelope import forward_envelope
from effattn.tolerances.gradients import gradient_envelopes
from effattn.tolerances.numerics import FLASH

#: every option at once, with gradients, and rows and a batch entry that see nothing
EVERYTHING = Case(
    batch=3, heads=4, kv_heads=2, q_len=9, kv_len=13, head_dim=8, v_dim=5, dtype="bf16", causal="bottom-right",
    window=(6, 2), softcap=3.0, alibi="drawn", bias="hqk:fp32", mask="bqk", sinks=True, lengths="both", dropout=0.25,
    backward=True, seed=7,
)  # fmt: skip
ALL = {"out", "lse", "dq", "dk", "dv", "dbias", "dsinks"}


def small(dtype: str) -> st.SearchStrategy[Case]:
    return strategies.cases(
        dtype=dtype,
        most_length=20,
        most_head_dim=32,
        most_scores=1000,
        options=tuple(menus.OPTIONS),
        backward=True,
    )


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_reference_is_within_the_allowed_units_with_every_option(dtype: str) -> None:
    @given(small(dtype))
    def holds(case: Case) -> None:
        for quantity in certify(case):
            assert quantity.holds, quantity

    holds()


def test_every_quantity_of_a_case_with_everything_is_certified_and_decided() -> None:
    found = certify(EVERYTHING)
    assert {x.name for x in found} == ALL
    assert all(x.holds and x.count > 0 and x.open == x.decided for x in found)


def altered(name: str, change: Any) -> Any:
    def reference(case: Case, inputs: Inputs, keep: torch.Tensor | None) -> dict[str, Any]:
        got = float64_reference(case, inputs, keep)
        return got | {name: change(got[name])}

    return reference


@pytest.mark.parametrize("name", sorted(ALL))
def test_an_error_of_2_to_the_minus_40_is_found_in_every_quantity(name: str) -> None:
    found = certify(EVERYTHING, altered(name, lambda x: x * (1.0 + 2.0**-40)))
    assert [x.name for x in found if not x.holds] == [name]


WRONG_OPTIONS: dict[str, Any] = {
    "causal": "top-left", "window": (5, 2), "softcap": 3.0001, "alibi": "none", "bias": "none", "mask": "none",
    "sinks": False, "lengths": "kv",
}  # fmt: skip


@pytest.mark.parametrize("option", sorted(WRONG_OPTIONS))
def test_a_reference_with_another_option_is_found(option: str) -> None:
    """So the enclosures know each option."""

    def reference(case: Case, inputs: Inputs, keep: torch.Tensor | None) -> dict[str, Any]:
        other = replace(case, **{option: WRONG_OPTIONS[option]})
        drawn = other.tensors()
        same = Inputs(inputs.q, inputs.k, inputs.v, extras=replace(drawn.extras, d_out=inputs.extras.d_out))
        got = float64_reference(other, same, keep)
        return {name: x for name, x in got.items() if name in ("out", "lse")}

    assert any(not x.holds for x in certify(EVERYTHING, reference))


def test_a_forgotten_dropout_and_a_float32_softmax_are_found() -> None:
    def everything_kept(case: Case, inputs: Inputs, keep: torch.Tensor | None) -> dict[str, Any]:
        assert keep is not None
        return float64_reference(case, inputs, torch.ones_like(keep))

    assert any(not x.holds for x in certify(EVERYTHING, everything_kept))
    plain = Case(q_len=9, kv_len=9, head_dim=8, dtype="fp16")

    def single(case: Case, inputs: Inputs, _keep: torch.Tensor | None) -> dict[str, Any]:
        q, k, v = (x.float() for x in inputs)
        return {"out": ((q @ k.mT * case.softmax_scale).softmax(-1) @ v).double().numpy()}

    (out,) = certify(plain, single)
    assert out.units > 2.0**20


def test_ties_are_decided_by_their_form_and_near_ties_by_finer_balls() -> None:
    # Two equal weights: means of neighbours are ties, and balls of any precision hold both sides.
    tie = Case(q_len=1, kv_len=2, head_dim=3, dtype="bf16", scale=0.0)
    out = certify(tie)[0]
    assert (out.open, out.decided, out.wrong) == (2, 2, 0)
    # The lse is the largest score and a little, far below float64's spacing: float64 cannot tell which way it rounds.
    near = Case(
        heads=6, kv_heads=2, q_len=5, kv_len=5, head_dim=9, dtype="fp16", causal="bottom-right", scale=0.25,
        values="one-hot", seed=9,
    )  # fmt: skip
    lse = certify(near)[1]
    assert lse.open == lse.decided > 0
    assert lse.wrong > 0


@given(
    st.sampled_from(["fp16", "bf16", "fp32", "e4m3", "e5m2"]),
    st.floats(allow_nan=False, allow_infinity=False),
)
def test_rounding_in_integers_is_rounding_in_float64(name: str, x: float) -> None:
    fmt = formats.get(name)
    expected = float(fmt.round(np.array([x]))[0])
    got = round_fraction(Fraction(x), fmt)
    assert got == expected or (math.isnan(got) and math.isnan(expected))


def test_rounding_decides_between_neighbours_below_float64() -> None:
    fmt = formats.get("fp16")
    half = Fraction(1) + Fraction(1, 2**11)
    tiny = Fraction(1, 2**3000)
    assert round_fraction(half, fmt) == 1.0
    assert round_fraction(half + tiny, fmt) == 1.0 + 2.0**-10
    assert round_fraction(half - tiny, fmt) == 1.0
    assert round_fraction(-half - tiny, fmt) == -1.0 - 2.0**-10


def test_a_ball_around_a_tie_is_open_and_one_beside_it_is_decided() -> None:
    from flint import arb

    fmt = formats.get("fp16")
    assert decided(arb(1.0 + 2.0**-11, 2.0**-60), fmt) is None
    assert decided(arb(1.0 + 2.0**-11 + 2.0**-40, 2.0**-60), fmt) == 1.0 + 2.0**-10
    low, high = ends(arb(1.0, 2.0**-60))
    assert low < 1 - Fraction(1, 2**61)
    assert high > 1 + Fraction(1, 2**61)


def middles(found: Enclosures, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    low, high = found.limits(name)
    return torch.from_numpy(np.where(low == high, low, 0.5 * (low + high)).reshape(shape))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_bound_and_noise_are_those_of_the_certain_values(dtype: str) -> None:
    """An envelope made from the middles of the balls equals that made from the reference."""

    @settings(max_examples=15)
    @given(small(dtype))
    def equal(case: Case) -> None:
        inputs, keep = case.tensors(), some_dropout(case)
        found, options = enclose(case, inputs, keep=keep), Options.of(case, inputs, keep=keep)
        q, k, v = (x.double() for x in inputs)
        reference = exact.attention_with(q, k, v, options)
        certain = Exact(*(middles(found, name, x.shape) for name, x in reference._asdict().items()))
        numerics = FLASH[dtype].replace(normalise="any")
        both = [
            forward_envelope(q, k, v, numerics=numerics, exact=x, options=options)
            for x in (reference, certain)
        ]
        for name in ("out_bound", "out_sigma", "out_typical", "lse_bound", "lse_typical"):
            np.testing.assert_allclose(*(getattr(x, name) for x in both), rtol=1e-6, atol=1e-300)
        d_out = inputs.extras.d_out
        if d_out is None:
            return
        ours = exact.gradients(q, k, v, d_out, options, exact=reference, d_lse=inputs.extras.d_lse)
        fields = {
            name: middles(found, f"d{name}", x.shape) if x is not None else None
            for name, x in ours._asdict().items()
        }
        pairs = [
            gradient_envelopes(
                q, k, v, d_out, numerics=numerics, exact=x, gradients=g, forward=f, options=options,
                d_lse=inputs.extras.d_lse,
            )
            for x, g, f in ((reference, ours, both[0]), (certain, type(ours)(**fields), both[1]))
        ]  # fmt: skip
        for name, envelope in pairs[0].items():
            for quantity in ("bound", "sigma"):
                a, b = (getattr(x, quantity) for x in (envelope, pairs[1][name]))
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-300)

    equal()


def test_what_cannot_be_enclosed_is_refused() -> None:
    case = Case(q_len=3, kv_len=3, head_dim=2, dtype="fp32")
    q, k, v = case.tensors()
    k = k.clone()
    k[0, 0, 1, 1] = math.nan
    with pytest.raises(RequestError, match="k has elements that are not finite"):
        enclose(case, Inputs(q, k, v))
    dropping = Case(q_len=3, kv_len=3, head_dim=2, dtype="fp32", dropout=0.5)
    with pytest.raises(RequestError, match="give keep="):
        enclose(dropping, dropping.tensors())
    large = Case(q_len=1024, kv_len=1024, head_dim=64, dtype="fp16")
    with pytest.raises(RequestError, match=f"at most {MOST_PRODUCTS:,}"):
        certify(large)


def test_the_command_says_how_near_the_reference_is() -> None:
    result = CliRunner().invoke(cli, ["certify", EVERYTHING.to_json()], standalone_mode=False)
    assert result.return_value == 0, result.output
    for name in ALL:
        assert f"\n{name} " in result.output
    assert f"allowed: {ALLOWED:g} units of 2^-53" in result.output
