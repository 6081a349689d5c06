"""The record of a method's arithmetic: presets, and declarations that contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest

from effattn.case import DTYPES
from effattn.errors import RequestError
from effattn.tolerances import numerics
from effattn.tolerances.numerics import Numerics


@pytest.mark.parametrize(
    ("preset", "dtype"), [(name, dtype) for name in numerics.PRESETS for dtype in numerics.dtypes_of(name)]
)
def test_presets_exist_for_each_dtype(preset: str, dtype: str) -> None:
    found = numerics.for_dtype(dtype, preset)
    assert (found.input, found.output, found.acc) == (dtype, dtype, "fp32")
    assert dtype in found.name


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_rounds_p_to_the_inputs_dtype_and_torch_math_does_not(dtype: str) -> None:
    assert numerics.for_dtype(dtype, "flash").p == dtype
    assert numerics.for_dtype(dtype, "flash").rounds_p == (dtype != "fp32")
    assert not numerics.for_dtype(dtype, "torch-math").rounds_p


@pytest.mark.parametrize(
    ("dtype", "operand", "exact"),
    [
        ("fp16", None, True),
        ("bf16", None, True),
        ("fp32", None, False),
        ("fp32", "tf32", True),
        ("fp32", "fp32", False),
    ],
)
def test_products_of_short_formats_are_exact_in_fp32(dtype: str, operand: str | None, exact: bool) -> None:
    declared = numerics.for_dtype(dtype).replace(operand=operand)
    assert declared.exact_products == exact
    assert (declared.operand_format is None) == (operand in (None, dtype))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score": "fp33"}, "unknown number format 'fp33'.*did you mean 'fp32'"),
        ({"acc": "bf16"}, "score is fp32, wider than the accumulator bf16"),
        ({"p": "fp64"}, "p is fp64, wider than the accumulator fp32"),
        ({"output": "fp64"}, "output is fp64, wider than the accumulator"),
        ({"operand": "fp32", "input": "fp16"}, "operands of fp32 are wider than the input fp16"),
        ({"normalise": "during"}, "normalise is 'during'; expected after or before or any"),
        ({"sum_of": "squares"}, "sum_of is 'squares'; expected unrounded or rounded"),
        ({"exp_ulps": 0.25}, "exp_ulps is 0.25; .* at least 0.5"),
        ({"exp_ulps": float("nan")}, "exp_ulps is nan"),
        ({"exp_ulps": 1e30}, r"exp_ulps is 1e\+30; .* and below 1048576"),
        ({"tanh_error": 2.0**20}, "tanh_error is 1048576.0; .* at least 1 and below 1048576"),
        (
            {"name": "mine\x1b[31m"},
            r"numerics 'mine\\x1b\[31m': .* expected a string without control characters",
        ),
        ({"name": "two\nlines"}, "without control characters"),
        ({"name": None}, "expected a string"),
        ({"smallest_block": 0}, "smallest_block is 0; expected 1 or more keys"),
        ({"smallest_block": None}, "smallest_block is None"),
        ({"sum_block": 1.5}, "sum_block is 1.5"),
        ({"scores": "fp32"}, "numerics has no field 'scores'.*did you mean 'score'"),
    ],
)
def test_a_contradiction_is_refused_and_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        numerics.for_dtype("fp16").replace(**changes)


def test_unknown_presets_and_dtypes_are_refused() -> None:
    with pytest.raises(
        RequestError, match=r"unknown numerics 'flsh': expected one of .* did you mean 'flash'"
    ):
        numerics.for_dtype("fp16", "flsh")
    with pytest.raises(RequestError, match=r"no numerics for dtype 'fp8'"):
        numerics.for_dtype("fp8")


def test_a_record_cannot_be_changed_behind_the_judges_back() -> None:
    declared = numerics.for_dtype("fp16")
    with pytest.raises(AttributeError):
        declared.p = "fp32"  # type: ignore[misc]
    assert isinstance(declared, Numerics)


# Presets


def test_a_method_is_judged_by_the_preset_behind_its_name() -> None:
    from effattn import methods, zoo
    from effattn.case import Case
    from effattn.judge import judge
    from effattn.verdict import Outcome

    case = Case(heads=4, q_len=64, kv_len=192, head_dim=32, dtype="fp16")
    coarse = "effattn.zoo:exp2_of_degree_3"
    # Declared as FlashAttention-4 does it, a coarse exponential is no fault. In fp16 it drowns in P's rounding either way,
    # but for the log-sum-exp, which is fp32.
    assert judge(case, methods.get(f"{coarse}@fa4")).outcome == Outcome.PASS
    assert methods.get(f"{coarse}@fa4").spec == f"{coarse}@fa4"
    full = judge(case, methods.get(f"{zoo.get('p-in-e4m3').method().spec}@fa4"))
    assert full.outcome in (Outcome.INACCURATE, Outcome.BIASED)
    single = judge(Case(q_len=8, kv_len=8, head_dim=8, dtype="fp32"), methods.get("flash@fa4"))
    assert single.message == "not supported: the preset 'fa4' is for fp16, bf16"
    with pytest.raises(RequestError, match=r"unknown numerics 'fa5': expected one of .*; did you mean 'fa4'"):
        methods.get("flash@fa5")


@pytest.mark.parametrize("preset", sorted(numerics.PRESETS))
def test_the_error_of_the_exponential_of_each_preset_is_allowed(preset: str) -> None:
    """The largest error that a preset declares for exp is below its bound of the log-sum-exp of equal scores."""
    import torch

    from effattn.exact import attention
    from effattn.tolerances.envelope import forward_envelope

    for dtype, declared in numerics.PRESETS[preset].items():
        q, k, v = (torch.ones(1, 1, n, 16, dtype=torch.float64) for n in (2, 64, 64))
        envelope = forward_envelope(q, k, v, numerics=declared, exact=attention(q, k, v))
        assert envelope.lse_bound.min() > declared.exp_ulps * 2.0**-23, dtype
