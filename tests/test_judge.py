"""Verdicts: each outcome, what its message says, and that no method can make the judge raise."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import effattn
from effattn import laws, zoo
from effattn.case import DTYPES, Case, Inputs
from effattn.errors import NotSupported, RequestError
from effattn.judge import judge, judge_output
from effattn.methods.base import Method, Output
from effattn.methods.user import UserFunction
from effattn.properties.law import get
from effattn.tolerances.numerics import Numerics, for_dtype
from effattn.verdict import Outcome, Quantity, Verdict
from effattn.zoo import lawless
from effattn.zoo.dense import Asked, Dense
from effattn.zoo.tiled import Flash

CASE = Case(heads=2, q_len=33, kv_len=40, head_dim=16, dtype="fp16", seed=3)


class Altered(Method):
    """The zoo's correct kernel, its output changed afterwards."""

    name = spec = "altered"

    def __init__(
        self, change: Callable[[torch.Tensor, torch.Tensor], Any], numerics: Numerics | None = None
    ) -> None:
        self.change = change
        self.declared = numerics

    def numerics(self, case: Case) -> Numerics:
        return self.declared or for_dtype(case.dtype)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        out, lse = Flash()(*inputs, causal=case.causal, scale=case.softmax_scale)
        changed = self.change(out, lse)
        return changed if isinstance(changed, Output) else Output(changed, lse)


class Raising(Altered):
    """Raises instead."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(lambda out, lse: out)
        self.error = error

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        raise self.error


def put(out: torch.Tensor, value: float, *index: int) -> torch.Tensor:
    out[index] = value
    return out


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_correct_output_passes_with_all_its_numbers(dtype: str) -> None:
    verdict = judge(replace(CASE, dtype=dtype), Altered(lambda out, lse: out))
    assert verdict.outcome == Outcome.PASS
    out, lse = verdict.quantities
    assert (out.name, out.count, out.set_aside, lse.name, lse.count) == ("out", 2 * 33 * 16, 0, "lse", 66)
    assert 0.0 < out.fraction < 1.0
    assert 0.3 < out.z_rms < 1.1
    assert abs(out.z_mean) < 0.2
    assert 2.0 < abs(out.z_max) < 6.0
    assert 0.0 <= out.ulp_p50 <= out.ulp_p99 <= out.ulp_max
    assert 0.0 < out.bit_equal < 1.0
    assert abs(out.got - out.exact) == pytest.approx(out.fraction * out.allowed)
    assert set(verdict.seconds) == {"inputs", "method", "exact", "envelope", "verdict"}
    assert verdict.findings == ()


def test_the_exact_output_rounded_once_is_equal_bit_for_bit() -> None:
    verdict = judge(CASE, zoo.get("fp64-inside").method())
    assert verdict.outcome == Outcome.PASS
    assert verdict.quantities[0].bit_equal == 1.0
    assert verdict.quantities[0].ulp_max == 0.0


def test_an_inaccurate_element_is_named_with_what_is_allowed_and_why() -> None:
    verdict = judge(CASE, Altered(lambda out, lse: put(out, 0.75, 0, 1, 5, 7)))
    assert verdict.outcome == Outcome.INACCURATE
    worst = verdict.quantities[0]
    assert (worst.worst, worst.got) == ((0, 1, 5, 7), 0.75)
    first, why = verdict.message.splitlines()
    assert first.startswith(f"out[0, 1, 5, 7] is 0.75, exact is {worst.exact!r}: the error ")
    assert f"is {worst.fraction:.3g} times what is allowed, {worst.allowed:.3g}" in first
    assert "for rounding to fp16" in why
    assert "scores of 16 terms and sums over 40 keys in fp32, weights rounded to fp16 (u = 2^-11)" in why
    assert verdict.replay == f"effattn replay '{CASE.to_json()}' altered"


def test_the_allowance_is_that_of_the_declared_numerics() -> None:
    flash = for_dtype("fp16", "flash")
    for changes, words in (
        ({}, "scores of 16 terms and sums over 40 keys in fp32, weights rounded to fp16 (u = 2^-11) (numerics 'flash fp16')"),
        (
            {"score": "fp16", "sum_of": "rounded"},
            "scores of 16 terms kept in fp16 (u = 2^-11), sums over 40 keys in fp32, weights rounded to fp16 (u = 2^-11), whose"
            " sum is that of the rounded ones (numerics 'flash fp16' with score=fp16, sum_of=rounded)",
        ),
        (
            {"p": "fp32", "exp_ulps": 1024.0, "name": "mine"},
            "sums over 40 keys in fp32, an exp within 1024 ulp, weights in fp32 (numerics 'mine')",
        ),
    ):  # fmt: skip
        verdict = judge(CASE, Altered(lambda out, lse: put(out, 0.75, 0, 1, 5, 7), flash.replace(**changes)))
        assert verdict.message.splitlines()[1].endswith(words)


def test_the_worst_element_is_by_bound_not_by_size() -> None:
    verdict = judge(CASE, zoo.get("zeros").method())
    assert verdict.outcome == Outcome.INACCURATE
    assert verdict.quantities[0].fraction > 100.0


def test_a_log_sum_exp_in_base_2_is_told_so() -> None:
    verdict = judge(CASE, zoo.get("lse-in-base-2").method())
    assert verdict.outcome == Outcome.INACCURATE
    assert "it would be right in base 2; expected the natural logarithm" in verdict.message


def test_base_2_is_told_only_where_all_wrong_elements_are_in_it() -> None:
    def some(out: torch.Tensor, lse: torch.Tensor) -> Output:
        lse[:, :, 7:] *= math.log2(math.e)
        return Output(out, lse)

    def and_another(out: torch.Tensor, lse: torch.Tensor) -> Output:
        lse[:, :, 3] += 0.5  # not the largest error
        return some(out, lse)

    verdict = judge(CASE, Altered(some))
    assert "it would be right in base 2" in verdict.message
    verdict = judge(CASE, Altered(and_another))
    assert verdict.outcome == Outcome.INACCURATE
    assert verdict.quantities[1].worst[2] != 3
    assert "base 2" not in verdict.message


def test_a_bias_is_explained_with_its_probability() -> None:
    case = replace(CASE, q_len=257, kv_len=129, heads=4)
    verdict = judge(case, zoo.get("p-truncated").method())
    assert verdict.outcome == Outcome.BIASED
    assert verdict.quantities[0].fraction < 1.0
    assert {"output"} <= {finding.name for finding in verdict.findings}
    assert "proportional to the output (t = -" in verdict.message
    assert "alarm below 1.4e-10" in verdict.message
    assert all(finding.p_value < finding.threshold for finding in verdict.findings)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    verdict = judge(CASE, Altered(lambda out, lse: put(out, value, 0, 0, 2, 1)))
    assert verdict.outcome == Outcome.NON_FINITE
    assert f"out[0, 0, 2, 1] is {value!r}, exact is " in verdict.message
    assert "1 of 1056 elements of out" in verdict.message


def test_a_log_sum_exp_that_is_not_a_number_never_passes() -> None:
    verdict = judge(CASE, Altered(lambda out, lse: Output(out, put(lse, math.nan, 0, 0, 2))))
    assert verdict.outcome == Outcome.NON_FINITE
    assert "lse[0, 0, 2] is nan" in verdict.message


def overflowing() -> Inputs:
    """V at the top of fp16: sums of it round to the largest number or beyond."""
    q, k, v = replace(CASE, q_len=2, kv_len=4).tensors()
    return Inputs(q, k, torch.full_like(v, 65504.0))


@pytest.mark.parametrize("value", [65504.0, math.inf])
def test_infinity_is_right_where_a_correct_kernel_may_overflow(value: float) -> None:
    case = replace(CASE, q_len=2, kv_len=4)
    out = torch.full((1, 2, 2, 16), value, dtype=torch.float16)
    assert judge_output(case, overflowing(), Output(out), for_dtype("fp16")).outcome == Outcome.PASS
    wrong = judge_output(case, overflowing(), Output(-out), for_dtype("fp16"))
    assert wrong.outcome == (Outcome.NON_FINITE if value == math.inf else Outcome.INACCURATE)


EMPTY_ROWS = replace(CASE, q_len=5, kv_len=3, causal="bottom-right")


def test_rows_without_keys_are_zero_and_minus_infinity_exactly() -> None:
    assert judge(EMPTY_ROWS, Altered(lambda out, lse: out)).outcome == Outcome.PASS
    tiny = judge(EMPTY_ROWS, Altered(lambda out, lse: put(out, 2.0**-24, 0, 0, 1, 0)))
    assert tiny.outcome == Outcome.INACCURATE
    assert "the error is 5.96e-08, and none is allowed" in tiny.message
    assert "the row sees no key, so its output is 0 and its lse -inf, exactly" in tiny.message
    finite = judge(EMPTY_ROWS, Altered(lambda out, lse: Output(out, put(lse, 0.0, 0, 1, 0))))
    assert finite.outcome == Outcome.NON_FINITE
    assert "lse[0, 1, 0] is 0.0, exact is -inf" in finite.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out, lse: out[:, :, :-1],
            r"out has shape \(1, 2, 32, 16\); expected \(1, 2, 33, 16\), \(batch, heads",
        ),
        (lambda out, lse: out.transpose(1, 2), r"out has shape \(1, 33, 2, 16\)"),
        (lambda out, lse: out.float(), "out has dtype float32; expected float16"),
        (lambda out, lse: out.to("meta"), "out is on meta; expected it where the inputs are, on cpu"),
        (lambda out, lse: out.to_sparse(), "out is a sparse_coo tensor; expected a dense one"),
        (lambda out, lse: Output(None), "out is NoneType; expected a torch.Tensor"),  # type: ignore[arg-type]
        (
            lambda out, lse: Output(out, lse[..., None]),
            r"lse has shape \(1, 2, 33, 1\); expected \(1, 2, 33\)",
        ),
        (lambda out, lse: Output(out, lse.half()), "lse has dtype float16; expected float32"),
    ],
)
def test_a_wrong_form_is_named(change: Any, message: str) -> None:
    verdict = judge(CASE, Altered(change))
    assert verdict.outcome == Outcome.WRONG_SHAPE
    assert re.search(message, verdict.message), verdict.message


@pytest.mark.parametrize(
    "change",
    [
        lambda out, lse: out.requires_grad_(),
        lambda out, lse: out.transpose(1, 2).contiguous().transpose(1, 2),
        lambda out, lse: Output(out, None),
    ],
)
def test_gradients_strides_and_a_missing_log_sum_exp_do_not_matter(change: Any) -> None:
    assert judge(CASE, Altered(change)).outcome == Outcome.PASS


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such tile"),
        KeyError("block"),
        AssertionError(),
        SystemExit(3),
        MemoryError(),
        RecursionError("deep"),
        GeneratorExit(),
        type("Own", (BaseException,), {"__module__": "builtins"})("mine"),
        type("Dumb", (BaseException,), {"__module__": "builtins", "__str__": lambda self: 1 / 0})(),
    ],
)
def test_whatever_is_raised_is_a_crash_with_its_name(error: BaseException) -> None:
    verdict = judge(CASE, Raising(error))
    assert verdict.outcome == Outcome.CRASHED
    assert verdict.message.startswith(f"the method raised {type(error).__name__}")
    assert "in __call__" in verdict.message
    assert verdict.quantities == ()
    law = laws.judge_law(get("columns_of_v_do_not_mix"), CASE, Raising(error))
    assert law.outcome == Outcome.CRASHED
    assert law.message.splitlines()[0] == verdict.message.splitlines()[0]


@pytest.mark.parametrize("error", [NotSupported("odd head_dim"), NotImplementedError("odd head_dim")])
def test_what_is_not_supported_is_no_failure(error: Exception) -> None:
    verdict = judge(CASE, Raising(error))
    assert verdict.outcome == Outcome.NOT_SUPPORTED
    assert verdict.message == "not supported: odd head_dim"


def test_the_user_may_interrupt() -> None:
    with pytest.raises(KeyboardInterrupt):
        judge(CASE, Raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        laws.judge_law(get("columns_of_v_do_not_mix"), CASE, Raising(KeyboardInterrupt()))


def test_numerics_that_contradict_themselves_are_the_requests_fault() -> None:
    method = Altered(lambda out, lse: out)
    method.numerics = lambda case: for_dtype("fp16").replace(p="fp64")  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="p is fp64, wider than the accumulator"):
        judge(CASE, method)


def test_inputs_that_are_written_to_are_found_and_do_not_spoil_the_reference() -> None:
    def scale_in_place(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> torch.Tensor:
        out, _ = Flash()(q, k, v, scale=scale)
        v.zero_()
        return out

    verdict = judge(CASE, UserFunction(scale_in_place))
    assert verdict.outcome == Outcome.INACCURATE
    assert verdict.message.startswith("the method wrote to its input v; expected it to be left as it was")


def test_an_output_that_is_the_input_is_judged_by_its_values() -> None:
    def values(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return v

    one_key = replace(CASE, q_len=1, kv_len=1)
    assert judge(one_key, UserFunction(values)).outcome == Outcome.PASS


@pytest.mark.parametrize(("q_len", "kv_len", "outcome"), [(0, 5, Outcome.PASS), (5, 0, Outcome.PASS)])
def test_empty_problems_are_judged_by_shape_and_zeros(q_len: int, kv_len: int, outcome: Outcome) -> None:
    case = replace(CASE, q_len=q_len, kv_len=kv_len)
    verdict = judge(case, Altered(lambda out, lse: out))
    assert verdict.outcome == outcome
    assert [q.count for q in verdict.quantities] == [2 * q_len * 16, 2 * q_len]
    wrong = judge(
        case, Altered(lambda out, lse: torch.ones(1, 2, q_len + (q_len == 0), 16, dtype=torch.float16))
    )
    assert wrong.outcome == (Outcome.WRONG_SHAPE if q_len == 0 else Outcome.INACCURATE)


def test_an_ill_conditioned_case_is_not_judged_and_says_how_ill() -> None:
    case = Case(q_len=8, kv_len=16, head_dim=64, dtype="fp32", scale=4096.0)
    verdict = judge(case, zoo.get("zeros").method())
    assert verdict.outcome == Outcome.NOT_JUDGED
    assert verdict.message.startswith("condition number ")
    assert float(verdict.message.split()[2].rstrip(":")) > 1e4
    assert verdict.quantities[0].count == 0
    assert verdict.quantities[0].set_aside == 8 * 64


def test_rows_that_can_be_judged_are_and_the_rest_is_counted() -> None:
    case = Case(q_len=8, kv_len=16, head_dim=64, dtype="fp32")
    q, k, v = case.tensors()
    q[:, :, :3] *= 1e5
    out, lse = Flash()(q, k, v)
    verdict = judge_output(case, Inputs(q, k, v), Output(out, lse), for_dtype("fp32"))
    assert verdict.outcome == Outcome.PASS
    assert (verdict.quantities[0].count, verdict.quantities[0].set_aside) == (5 * 64, 3 * 64)
    assert "192 elements set aside: condition number " in verdict.message
    out[0, 0, 4, 0] += 1.0
    assert (
        judge_output(case, Inputs(q, k, v), Output(out, lse), for_dtype("fp32")).outcome == Outcome.INACCURATE
    )


@pytest.mark.parametrize(
    "method",
    [
        Altered(lambda out, lse: out),
        Altered(lambda out, lse: put(out, math.nan, 0, 0, 0, 0)),
        Altered(lambda out, lse: put(out, 9.0, 0, 0, 0, 0)),
        zoo.get("output-truncated").method(),
        Raising(ValueError("x")),
    ],
)
def test_verdicts_survive_json(method: Method) -> None:
    verdict = judge(replace(CASE, q_len=200), method)
    text = json.dumps(verdict.to_dict(), allow_nan=False)
    # Times are kept to the microsecond.
    rounded = replace(verdict, seconds={stage: round(s, 6) for stage, s in verdict.seconds.items()})
    assert Verdict.from_dict(json.loads(text)) == rounded


def test_numbers_that_json_has_no_word_for_survive_it() -> None:
    quantity = Quantity(name="out", count=1, fraction=math.inf, z_max=-math.inf, worst=(0, 1))
    verdict = replace(judge(CASE, Altered(lambda out, lse: out)), quantities=(quantity,))
    data = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert data["quantities"][0]["fraction"] == "inf"
    assert Verdict.from_dict(data).quantities == (quantity,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: [], "a verdict given as list"),
        (lambda data: {}, "a verdict with the fields"),
        (lambda data: data | {"extra": 1}, "extra"),
        (lambda data: data | {"outcome": "fine"}, "'fine' is not a valid Outcome"),
        (lambda data: data | {"quantities": [{"name": "out", "count": "many"}]}, "cannot be read"),
        (lambda data: data | {"findings": [{"name": 3}]}, "3 where a text is expected"),
        (lambda data: data | {"case": {"schema": 1}}, "without q_len"),
    ],
)
def test_a_damaged_verdict_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    data = judge(CASE, Altered(lambda out, lse: out)).to_dict()
    with pytest.raises(RequestError, match=message):
        Verdict.from_dict(change(data))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 3e-4, 1e-3, 3e-3])
@pytest.mark.parametrize(
    "kernel", ["flash", "flash-block-16", "weights-normalised-first", "fp32-matmul-softmax"]
)
def test_weights_that_nearly_all_round_to_one_side_are_no_bias(dtype: str, scale: float, kernel: str) -> None:
    # With a scale near 0 all weights lie within a few spacings of 1, and V of one sign shows what they have in common.
    case = Case(
        heads=2,
        q_len=129,
        kv_len=300,
        head_dim=8,
        dtype=dtype,
        causal="top-left",
        scale=scale,
        values="uniform",
    )
    verdict = judge(case, zoo.get(kernel).method())
    assert verdict.outcome == Outcome.PASS, verdict.message


def test_roundings_of_p_that_are_known_are_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    # 700 weights between 0.999 and 1, which bf16 all rounds to 1: one error, 700 times, and of one sign.
    case = Case(q_len=64, kv_len=700, head_dim=64, dtype="bf16", scale=1e-4, values="uniform", seed=816440)
    assert judge(case, zoo.get("flash-two-pass").method()).outcome == Outcome.PASS
    monkeypatch.setattr("effattn.tolerances.predict.ORDERS", ())
    monkeypatch.setattr("effattn.tolerances.predict._OTHER_ORDERS", ())
    blind = judge(case, zoo.get("flash-two-pass").method())
    assert [finding.name for finding in blind.findings] == ["largest"]


@pytest.mark.parametrize("kernel", ["flash", "one-running-sum", "weights-normalised-first", "flash-reversed"])
def test_rows_that_share_their_partial_sums_share_their_luck(kernel: str) -> None:
    # Nearly equal weights: 256 rows, but one path of partial sums, which happens to be a long way from 0.
    case = Case(
        heads=4,
        kv_heads=1,
        q_len=64,
        kv_len=700,
        head_dim=2,
        dtype="fp32",
        scale=3e-4,
        values="outliers",
        seed=594419,
    )
    verdict = judge(case, zoo.get(kernel).method())
    assert verdict.outcome == Outcome.PASS, verdict.message


def test_an_output_of_another_dtype_than_declared_is_a_wrong_request() -> None:
    """Without a declaration it is a wrong output; with one, either may be wrong, and nothing else can be believed."""
    import effattn
    from effattn.methods.user import UserFunction
    from effattn.tolerances.numerics import for_dtype

    def single(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float())

    case = Case(q_len=4, kv_len=4, head_dim=8, dtype="fp16")
    assert judge(case, UserFunction(single)).outcome == Outcome.WRONG_SHAPE
    declared = effattn.method(numerics="flash")(single)
    with pytest.raises(
        RequestError, match="returned fp32, but its numerics 'flash fp16' declare an output of fp16"
    ):
        judge(case, UserFunction(declared))
    right = effattn.method(numerics=for_dtype("fp16").replace(output="fp32", p="fp32"))(single)
    assert judge(case, UserFunction(right)).outcome == Outcome.PASS


def _scores_kept(steps: str, kept: torch.dtype) -> UserFunction:
    """A kernel that rounds its scores after the named steps, and declares fp16 for them."""

    def rounded(x: torch.Tensor, step: str) -> torch.Tensor:
        return x.to(kept).float() if step in steps.split() else x

    class Kept(Dense):
        def capped(self, s: torch.Tensor, asked: Asked) -> torch.Tensor:
            return rounded(super().capped(rounded(s, "product"), asked), "cap")

        def biased(self, s: torch.Tensor, *rest: Any) -> torch.Tensor:
            return rounded(super().biased(s, *rest), "added")

    function = lawless.function_of(Kept, "kept")
    declared = effattn.method(
        numerics=lambda case: for_dtype(case.dtype).replace(score="fp16"),
        dropout_mask=lambda *_: None,
    )(function)
    return UserFunction(declared, spec="kept")


KEPT = [
    Case(heads=2, kv_heads=1, q_len=32, kv_len=48, head_dim=21, dtype="fp16", bias="bk", seed=1),
    Case(heads=2, q_len=65, kv_len=97, head_dim=40, dtype="fp16", bias="qk", softcap=2.0, seed=2),
    Case(heads=2, q_len=65, kv_len=97, head_dim=40, dtype="fp16", alibi="geometric", backward=True, seed=3),
    Case(heads=2, q_len=65, kv_len=97, head_dim=40, dtype="fp16", sinks=True, softcap=2.0, seed=4),
]


@pytest.mark.parametrize("steps", ["product", "cap", "added", "product cap added"])
@pytest.mark.parametrize("case", KEPT, ids=["bias", "softcap and bias", "alibi", "softcap and sinks"])
def test_scores_that_are_kept_in_fp16_may_be_rounded_at_each_step(case: Case, steps: str) -> None:
    verdict = judge(case, _scores_kept(steps, torch.float16))
    assert verdict.outcome == Outcome.PASS, verdict.message


@pytest.mark.parametrize("case", KEPT, ids=["bias", "softcap and bias", "alibi", "softcap and sinks"])
def test_scores_that_are_kept_in_bf16_are_found_where_fp16_is_declared(case: Case) -> None:
    verdict = judge(case, _scores_kept("product cap added", torch.bfloat16))
    assert verdict.outcome in (Outcome.INACCURATE, Outcome.BIASED), verdict.message
