"""The comparison with published criteria: each computes what its source computes, on examples small enough to check by hand."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from effattn import zoo
from effattn.case import Case, Inputs
from effattn.methods.base import Output
from effattn.tolerances.numerics import for_dtype

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ("fp16", "bf16", "fp32")


def imported(name: str) -> ModuleType:
    """A module of benchmarks/, which is no package."""
    import importlib

    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


published = imported("published_criteria")
inputs_of = imported("criteria_inputs")
benchmark = imported("criteria")


def trial(case: Case, tensors: Inputs, **changes: Any) -> Any:
    """What an exact method gives, rounded once, with `changes` made to it."""
    references = published.References(case, tensors)
    wide = published.by_formula(case, tensors, None, torch.float64)
    lse = wide.lse.float()
    right = Output(wide.out.to(case.torch_dtype), lse, wide.to(case.torch_dtype).gradients or None)
    return published.Trial(case, replace(right, **changes), for_dtype(case.dtype), references)


def problem(dtype: str, *, backward: bool = False) -> tuple[Case, Inputs]:
    case = Case(
        heads=2, q_len=33, kv_len=65, head_dim=32, dtype=dtype, causal="bottom-right", backward=backward
    )
    return case, case.tensors()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", published.CRITERIA)
def test_each_accepts_an_exact_result_that_is_rounded_once(name: str, dtype: str) -> None:
    criterion = published.CRITERIA[name]
    for backward in (False, True):
        assert criterion.objects(trial(*problem(dtype, backward=backward))) is None


#: what accepts zeros in place of N(0, 1)-like outputs, and why
ACCEPTS_ZEROS = {
    "PyTorch, tolerances": "the reference crosses 0, so some relative error, and with it rtol, is above 1",
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", published.CRITERIA)
def test_zeros_are_rejected_by_all_but_those_whose_rule_cannot(name: str, dtype: str) -> None:
    case, tensors = problem(dtype)
    zeros = trial(
        case, tensors, out=torch.zeros(case.batch, case.heads, case.q_len, case.v_dim, dtype=case.torch_dtype)
    )
    accepted = published.CRITERIA[name].objects(zeros) is None
    assert accepted == (name in ACCEPTS_ZEROS and tolerates_everything(zeros)), name


def tolerates_everything(zeros: Any) -> bool:
    """Whether PyTorch's rtol is at least 1 here, or makes up for the rest with its atol."""
    wide, low = zeros.references.wider.out, zeros.references.math.out
    atol, rtol = published.pytorch_tolerances(wide, low, 1.0)
    return bool(((1.0 - rtol) * wide.abs() <= atol).all())


def test_pytorchs_relative_tolerance_accepts_zeros_where_the_reference_crosses_zero() -> None:
    atol, rtol = published.pytorch_tolerances(
        torch.tensor([1.0, 1e-6]), torch.tensor([1.0, 3e-6]).half(), 1.0
    )
    assert atol == 1e-3
    assert rtol == pytest.approx(2.0, rel=0.05)
    torch.testing.assert_close(torch.zeros(2), torch.tensor([1.0, 1e-6]), atol=atol, rtol=rtol)
    # Zero over zero counts as the default; what is over 1e30 too.
    assert published.pytorch_tolerances(torch.zeros(2), torch.zeros(2).half(), 2.0) == pytest.approx(
        (2e-3, 2e-3)
    )
    assert published.pytorch_tolerances(torch.zeros(2), torch.ones(2).half(), 1.0) == pytest.approx(
        (1.0, 1e-3)
    )


def test_the_continuous_integration_of_fla_only_warns_below_an_error_of_0_3() -> None:
    case, tensors = problem("bf16")
    tensors = Inputs(tensors.q, tensors.k, tensors.v * 0.05, extras=tensors.extras)
    zeros = trial(case, tensors, out=torch.zeros_like(trial(case, tensors).output.out))
    assert published.CRITERIA["flash-linear-attention"].objects(zeros) == "out: ratio 1"
    assert published.CRITERIA["flash-linear-attention, CI"].objects(zeros) is None


def test_the_ratio_of_fla_squares_in_the_dtype_of_the_tensors() -> None:
    expected = torch.full((4,), 1e-3)
    got = expected + torch.tensor([1.2e-4, -1.2e-4, 1.2e-4, -1.2e-4])
    assert published.error_ratio(expected, got) == pytest.approx(0.12, rel=1e-3)
    assert published.error_ratio(expected.half(), got.half()) == 0.0


def test_nan_matches_in_flashinfer_benchs_statistics_and_is_rejected_before() -> None:
    got = torch.tensor([1.0, math.nan, 1.5, 0.001])
    assert published.matched_ratio(got, torch.tensor([1.0, 1.0, 1.0, 0.002])) == 0.75
    case, tensors = problem("fp16")
    out = trial(case, tensors).output.out.clone()
    out[0, 0, 0, 0] = math.nan
    assert published.CRITERIA["flashinfer-bench"].objects(trial(case, tensors, out=out)) == "out: not finite"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", published.CRITERIA)
def test_nan_is_accepted_by_none(name: str, dtype: str) -> None:
    case, tensors = problem(dtype)
    out = trial(case, tensors).output.out.clone()
    out[0, 1, 2, 3] = math.nan
    assert published.CRITERIA[name].objects(trial(case, tensors, out=out)) is not None


class Given:
    """References with given numbers."""

    def __init__(self, expected: list[float], low: list[float], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.single = self.wider = published.Answer(torch.tensor(expected), None, {})
        self.rounded = self.single.to(dtype)
        self.low = self.math = published.Answer(torch.tensor(low, dtype=dtype), None, {})
        self.torch = self.rounded


@pytest.mark.parametrize(
    ("name", "error", "accepted"),
    [
        # The reference is off by 1/64: twice that is allowed, four times by PyTorch.
        ("FlashAttention-2", 2 / 64, True),
        ("FlashAttention-2", 2 / 64 + 1 / 512, False),
        ("FlashAttention-3", 2 / 64, True),
        ("FlashAttention-3", 2 / 64 + 1 / 512, False),
        ("PyTorch, errors", 4 / 64, True),
        ("PyTorch, errors", 4 / 64 + 1 / 512, False),
        ("PyTorch, tolerances", 1 / 64, True),
        ("PyTorch, tolerances", 4 / 64, False),
        ("TransformerEngine", 1 / 64, True),  # which is the error of what it compares with
        ("TransformerEngine", 0.0, False),
        ("assert_close", 1 / 1024, True),
        ("assert_close", 2 / 1024, False),
        ("xformers", 4 / 1024, True),
        ("xformers", 5 / 1024, False),
        ("KernelBench", 0.02, True),
        ("KernelBench", 0.0225, False),
        ("flashinfer-bench", 0.0098, True),
        ("flashinfer-bench", 0.0225, False),
    ],
)
def test_a_rule_draws_the_line_where_its_source_does(name: str, error: float, accepted: bool) -> None:
    case = Case(q_len=2, kv_len=2, head_dim=8, v_dim=1, dtype="fp16")
    references = Given([1.0, 1.0], [1.0 + 1 / 64, 1.0], torch.float16)
    got = torch.tensor([1.0 + error, 1.0]).half()
    made = published.Trial(case, Output(got), for_dtype("fp16"), references)
    assert (published.CRITERIA[name].objects(made) is None) == accepted


def test_flash_attention_3_adds_what_arithmetic_on_the_reference_costs() -> None:
    x = torch.tensor([0.1]).half()
    more = 2 * float((x + 0.3 - 0.3 - x).abs())
    assert more > 0.0
    case = Case(q_len=1, kv_len=1, head_dim=8, v_dim=1, dtype="fp16")
    references = Given(x.tolist(), [float(x) + 1 / 64], torch.float16)
    for error, accepted in ((2 / 64 + more, True), (2 / 64 + more + 2.0**-13, False)):
        made = published.Trial(case, Output((x.double() - error).half()), for_dtype("fp16"), references)
        assert (published.CRITERIA["FlashAttention-3"].objects(made) is None) == accepted
        # Without this term the error is too large in both.
        assert published.CRITERIA["FlashAttention-2"].objects(made) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formula_agrees_with_torch_and_with_exact_attention(dtype: str) -> None:
    from effattn import exact

    case, tensors = problem(dtype, backward=True)
    mine = published.by_formula(case, tensors, None, torch.float64)
    wide = Inputs(*(x.double() for x in tensors), extras=tensors.extras)
    torch.testing.assert_close(
        mine.out, exact.attention(*wide, causal=case.causal).out, rtol=1e-12, atol=1e-13
    )
    references = published.References(case, tensors)
    unit = {"fp16": 2.0**-10, "bf16": 2.0**-7, "fp32": 2.0**-18}[dtype]
    for name in "qkv":
        scale = float(mine.gradients[name].abs().max())
        for answer in (references.math, references.single, references.low):
            error = (answer.gradients[name].double() - mine.gradients[name]).abs().max()
            assert float(error) < 16 * unit * scale


def test_the_formula_knows_every_option() -> None:
    from effattn import exact

    options = ({"window": (20, 3)}, {"softcap": 2.0}, {"alibi": "drawn"}, {"bias": "bhqk"}, {"mask": "bhqk"},
               {"sinks": True}, {"lengths": "both"}, {"causal": "top-left"},
               {"causal": "bottom-right", "lengths": "kv"})  # fmt: skip
    for option in options:
        fields = {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 33, "kv_len": 20, "head_dim": 16} | option
        case = Case(**fields, dtype="fp32")
        tensors = case.tensors()
        wide = Inputs(*(x.double() for x in tensors), extras=tensors.extras)
        expected = exact.attention_with(*wide, exact.Options.of(case, wide))
        mine = published.by_formula(case, tensors, None, torch.float64)
        torch.testing.assert_close(
            mine.out, expected.out, rtol=1e-9, atol=1e-9, msg=lambda text, o=option: f"{o}: {text}"
        )
        torch.testing.assert_close(mine.lse, expected.lse, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", inputs_of.RECIPES)
def test_every_project_has_inputs_that_kernels_take(name: str) -> None:
    recipe = inputs_of.RECIPES[name]
    assert name in published.CRITERIA
    for dtype in published.CRITERIA[name].dtypes:
        for case, tensors in recipe.problems(dtype, backward=True):
            assert max(case.q_len, case.kv_len) <= 512
            assert tuple(tensors.q.shape) == (case.batch, case.heads, case.q_len, case.head_dim)
            assert tuple(tensors.k.shape) == (case.batch, case.kv_heads, case.kv_len, case.head_dim)
            assert {x.dtype for x in tensors} == {case.torch_dtype}
            assert case.backward == (recipe.d_out is not None)


def test_a_count_is_of_kernels_that_were_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(heads=2, q_len=64, kv_len=64, head_dim=16, dtype="fp16")
    monkeypatch.setattr(benchmark, "problems", lambda inputs, dtype, chosen: [(case, case.tensors())])
    kernels = [
        benchmark.Subject(name, zoo.get(name).method(), zoo.get(name))
        for name in ("flash", "zeros", "output-times-1-001", "bias-ignored")
    ]
    names = ["effattn", "KernelBench"]
    found = benchmark.judge_all(kernels, "any", names, ["fp16"]).summary(kernels)
    assert found["effattn"]["right"] == found["KernelBench"]["right"] == {"flash": ["fp16"]}
    assert found["effattn"]["wrong"] == {"zeros": ["fp16"], "output-times-1-001": ["fp16"]}
    assert found["effattn"]["missed"] == {}
    assert found["KernelBench"]["missed"] == {"output-times-1-001": ["fp16"]}
    assert found["effattn"]["alarms"] == found["KernelBench"]["alarms"] == {}


def test_an_objection_to_a_right_kernel_is_an_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(heads=2, q_len=64, kv_len=64, head_dim=16, dtype="fp16")
    monkeypatch.setattr(benchmark, "problems", lambda inputs, dtype, chosen: [(case, case.tensors())])
    # Right in name only: the summary takes the register's word.
    wrong = zoo.get("zeros")
    kernel = benchmark.Subject("zeros", wrong.method(), replace(wrong, right=True))
    found = benchmark.judge_all([kernel], "any", ["KernelBench"], ["fp16"]).summary([kernel])
    assert found["KernelBench"]["alarms"] == {"zeros": {"fp16": [1, 1, "out"]}}


def test_what_is_recorded_counts_every_kernel_of_the_zoo() -> None:
    recorded = json.loads((ROOT / "docs/measurements/criteria.json").read_text())
    assert set(recorded["kernels"]) == {s.name for s in benchmark.subjects()}
    assert {s.name for s in zoo.specimens()} - set(recorded["kernels"]) == benchmark.NEVER_SHOWN
    assert set(recorded["inputs"]["smoke"]) == set(published.CRITERIA)
    for result in recorded["inputs"]["smoke"].values():
        assert set(result["missed"]) <= set(result["wrong"])
        assert set(result["alarms"]) <= set(result["right"])
    assert recorded["inputs"]["smoke"]["effattn"]["alarms"] == {}


@pytest.mark.parametrize("seed", range(3))
def test_flash_and_a_baseline_in_fp16_are_ordered_as_in_flash_attention_3s_table_3(seed: int) -> None:
    """arXiv 2407.08608, table 3: RMSE 3.2e-4 of a baseline in fp16, 1.9e-4 of FlashAttention, for N(0, 1) and outliers."""
    from effattn import exact

    case = Case(heads=2, q_len=256, kv_len=256, head_dim=64, dtype="fp16", values="outliers", seed=seed)
    tensors = case.tensors()
    expected = exact.attention(*(x.double() for x in tensors)).out
    baseline = published.by_formula(case, tensors, None, torch.float16).out
    flash = zoo.get("flash").method()(case, tensors).out
    rmse = [float((x.double() - expected).square().mean().sqrt()) for x in (baseline, flash)]
    assert 1.5 < rmse[0] / rmse[1] < 6.0


def test_a_repeated_maximum_biases_sums_in_bf16_and_not_flash() -> None:
    """arXiv 2510.04212: several weights are 1, V has one sign, and each addition in low precision rounds one way."""
    from effattn import exact

    case = Case(heads=2, q_len=64, kv_len=256, head_dim=32, dtype="bf16", values="repeated-max")
    tensors = case.tensors()
    expected = exact.attention(*(x.double() for x in tensors)).out
    ulp = 2.0 ** (expected.abs().log2().floor() - 7)

    def mean_error(out: torch.Tensor) -> float:
        return float(((out.double() - expected) / ulp).mean())

    p = torch.softmax((tensors.q.float() * case.softmax_scale) @ tensors.k.float().mT, -1)
    p = p / p.amax(-1, keepdim=True)
    total = torch.zeros_like(expected, dtype=torch.bfloat16)
    for j in range(case.kv_len):
        total = total + (p[..., j : j + 1] * tensors.v[:, :, j : j + 1].float()).bfloat16()
    assert abs(mean_error(zoo.get("flash").method()(case, tensors).out)) < 0.1
    assert mean_error(total.float() / p.sum(-1, keepdim=True)) > 0.25
