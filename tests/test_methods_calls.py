"""Methods: which arguments a user's function is given, what it declares, and what its results may look like."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import effattn
from effattn import exact, methods
from effattn.case import Case
from effattn.errors import NotSupported, RequestError, WrongReturn
from effattn.judge import Outcome, judge
from effattn.methods import torch_sdpa
from effattn.methods.base import Output, as_output
from effattn.methods.user import KEYWORDS, UserFunction
from effattn.tolerances import numerics


def case(**fields: Any) -> Case:
    return Case(**{"q_len": 5, "kv_len": 7, "head_dim": 8, "heads": 2, "dtype": "fp32", **fields})


# Signatures and declarations


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("q, k, v", set()),
        ("a, b, c, /", set()),
        ("q, k, v, causal, scale", {"causal", "scale"}),
        ("q, k, v, *, scale, dropout=0.0", {"scale"}),
        ("q, k, v, **options", {"causal", "scale", "causal_alignment"}),
        ("*tensors, causal=True", {"causal"}),
        ("*tensors, **options", {"causal", "scale", "causal_alignment"}),
        ("q, k, v, *, causal=False, causal_alignment='top-left'", {"causal", "causal_alignment"}),
    ],
)
def test_function_gets_the_keywords_of_its_signature(signature: str, expected: set[str]) -> None:
    calls: list[dict[str, Any]] = []
    scope: dict[str, Any] = {"calls": calls}
    exec(
        f"def function({signature}):\n    calls.append(dict(locals()))\n    return calls[-1].get('q')", scope
    )
    function = scope["function"]
    method = UserFunction(function, spec="m:function")
    assert method.keywords == expected
    given = case(causal="top-left", scale=0.25)
    inputs = given.tensors()
    with pytest.raises(WrongReturn) if "q, k" not in signature else _nothing():
        method(given, inputs)
    seen = calls[0] | calls[0].get("options", {})
    offered = {"causal": True, "scale": 0.25, "causal_alignment": "top-left"}
    assert {name: seen[name] for name in expected} == {name: offered[name] for name in expected}
    assert not (set(seen) & set(KEYWORDS)) - expected


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("default", [None, 1.0])
def test_function_is_left_to_its_own_scale_where_the_case_names_none(default: float | None) -> None:
    seen: list[float | None] = []

    def function(q, k, v, *, scale=default):
        seen.append(scale)
        return q

    for given in (case(head_dim=16), case(head_dim=16, scale=0.5)):
        UserFunction(function)(given, given.tensors())
    # A default that is a number is the function's business only where nobody says otherwise.
    assert seen == [None if default is None else 0.25, 0.5]


def test_wrong_scale_of_a_function_s_own_is_found() -> None:
    def function(q, k, v, *, scale=None):
        own = 16**-0.5 if scale is None else scale  # of the padded head_dim
        return exact.attention(q, k, v, scale=own).out.to(q.dtype)

    verdict = judge(case(head_dim=7, q_len=33, kv_len=40), UserFunction(function))
    assert verdict.outcome == "inaccurate"


def test_module_gets_the_keywords_of_its_forward() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q, k, v, causal=False):
            return q

    assert UserFunction(Attention(), spec="mine.py:attention").keywords == {"causal"}


def test_options_always_get_scale_and_alignment_is_never_none() -> None:
    seen: dict[str, Any] = {}

    def function(q, k, v, **options):
        seen.update(options)
        return q

    given = case(head_dim=16)
    UserFunction(function)(given, given.tensors())
    assert seen == {"causal": False, "scale": 0.25, "causal_alignment": "bottom-right"}


def test_cases_that_need_a_missing_keyword_are_not_supported() -> None:
    def bare(q, k, v):
        return q

    def causal(q, k, v, *, causal=False):
        return q

    def aligned(q, k, v, *, causal=False, causal_alignment="bottom-right"):
        return q

    top_left = effattn.method(causal_alignment="top-left")(lambda q, k, v, causal: q)
    rows = [
        # function, case, reason
        (bare, case(), None),
        (bare, case(scale=1 / math.sqrt(8)), None),
        (bare, case(scale=0.1), "no keyword `scale`"),
        (bare, case(causal="bottom-right"), "no keyword `causal`"),
        (causal, case(causal="bottom-right"), None),
        (causal, case(causal="top-left"), "causal means bottom-right to the function.*the case is top-left"),
        (causal, case(causal="top-left", q_len=7), None),
        (top_left, case(causal="top-left"), None),
        (top_left, case(causal="bottom-right"), "causal means top-left to the function"),
        (top_left, case(causal="bottom-right", q_len=7), None),
        (aligned, case(causal="top-left"), None),
        (aligned, case(causal="bottom-right"), None),
    ]
    for function, given, reason in rows:
        answer = UserFunction(function).unsupported(given)
        if reason is None:
            assert answer is None
        else:
            assert answer is not None
            assert re.search(reason, answer)


def test_declaration_is_taken_over_and_leaves_the_function_as_it_was() -> None:
    def attention(q, k, v):
        return q

    loose = numerics.for_dtype("fp16").replace(score="fp16")
    declare = effattn.method(
        name="mine", numerics=loose, supports=lambda c: c.head_dim <= 8 or "head_dim up to 8"
    )
    assert declare(attention) is attention
    method = UserFunction(attention)
    assert method.name == "mine"
    assert method.numerics(case()) is loose
    assert method.unsupported(case()) is None
    assert method.unsupported(case(head_dim=9)) == "head_dim up to 8"

    def other(q, k, v):
        return q

    effattn.method(numerics="torch-math", supports=lambda c: False)(other)
    assert UserFunction(other).numerics(case(dtype="bf16")) == numerics.for_dtype("bf16", "torch-math")
    assert "declares" in UserFunction(other).unsupported(case())
    effattn.method(numerics=lambda c: numerics.for_dtype(c.dtype, "torch-math"))(other)
    assert UserFunction(other).numerics(case(dtype="fp16")) == numerics.for_dtype("fp16", "torch-math")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"causal_alignment": "middle"},
            "causal_alignment is 'middle'; expected 'bottom-right' or 'top-left'",
        ),
        ({"causal_alignment": 1}, "causal_alignment is 1; expected a string"),
        ({"name": ""}, "name is ''; expected a string"),
        ({"name": "a\x00b\x1b[31m"}, r"name is 'a\\x00b\\x1b\[31m'; .* without control characters"),
        ({"name": "a\nb"}, "without control characters"),
        ({"name": "a\u202eb"}, "without control characters"),
        ({"numerics": "flsh"}, "unknown numerics 'flsh'.*did you mean 'flash'"),
        ({"numerics": 3}, "numerics is 3; expected a Numerics"),
        ({"supports": True}, "supports is True; expected a function"),
    ],
)
def test_wrong_declaration_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        effattn.method(**arguments)


def test_declared_functions_must_answer_in_kind() -> None:
    function = effattn.method(supports=lambda c: None, numerics=lambda c: "flash")(lambda q, k, v: q)
    with pytest.raises(RequestError, match="`supports` returned None; expected True, False or a reason"):
        UserFunction(function).unsupported(case())
    with pytest.raises(RequestError, match="`numerics` function returned a str; expected a Numerics"):
        UserFunction(function).numerics(case())


def test_what_cannot_be_marked_is_named() -> None:
    with pytest.raises(RequestError, match="cannot mark <built-in function len>"):
        effattn.method()(len)


# Results


class Pair(NamedTuple):
    out: torch.Tensor
    lse: torch.Tensor | None = None


class Triple(NamedTuple):
    attention: Any
    out: torch.Tensor
    lse: torch.Tensor


@dataclasses.dataclass
class Record:
    out: Any
    extra: int = 0


OUT = torch.zeros(1, 2, 5, 8)
LSE = torch.zeros(1, 2, 5)


@pytest.mark.parametrize(
    ("result", "with_lse"),
    [
        (OUT, False),
        ((OUT, LSE), True),
        ((OUT, None), False),
        ({"out": OUT}, False),
        ({"out": OUT, "lse": LSE}, True),
        (Pair(OUT, LSE), True),
        (Triple(None, OUT, LSE), True),
        (Record(OUT), False),
        (Output(OUT, LSE), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_output_is_found_in_every_form(result: Any, with_lse: bool) -> None:
    output = as_output(result)
    assert output.out is OUT
    assert output.lse is (LSE if with_lse else None)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "it returned None; expected a tensor `out` or a tuple"),
        ([OUT, LSE], "it returned a list of 2; expected"),
        ((), "a tuple of 0"),
        ((OUT,), "a tuple of 1"),
        ((OUT, LSE, LSE), "a tuple of 3"),
        ((None, LSE), "it returned None as `out`"),
        ((OUT, 1.0), "it returned a float as `lse`; expected a torch.Tensor or None"),
        (np.zeros(3), r"it returned a numpy.ndarray; expected"),
        ((np.zeros(3), LSE), r"it returned a numpy.ndarray as `out`"),
        ({}, "a dict of 0 with no keys"),
        ({"output": OUT}, "a dict of 1 with 'output'"),
        ({"out": OUT, "weights": OUT}, "with 'out', 'weights'"),
        ({1: OUT, "out": OUT}, "a dict of 2 with"),
        (Record(None), "it returned None as `out`"),
        (torch, "it returned a module"),
        ("out", "it returned a str"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_result_without_output_is_typed(result: Any, message: str) -> None:
    with pytest.raises(WrongReturn, match=message):
        as_output(result)
    given = case()
    with pytest.raises(WrongReturn, match=message):
        UserFunction(lambda q, k, v: result)(given, given.tensors())


@pytest.mark.parametrize("error", [NotSupported("no"), NotImplementedError("no"), ZeroDivisionError("no")])
def test_what_a_function_raises_reaches_the_caller(error: Exception) -> None:
    def function(q, k, v):
        raise error

    given = case()
    with pytest.raises(type(error)) as caught:
        UserFunction(function)(given, given.tensors())
    assert caught.value is error


# torch and exact


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_exact_is_the_reference_rounded_once(dtype: str) -> None:
    given = case(dtype=dtype, causal="top-left", kv_heads=1, scale=-0.5)
    inputs = given.tensors()
    output = methods.get("exact")(given, inputs)
    expected = exact.attention(*inputs, causal="top-left", scale=-0.5)
    assert torch.equal(output.out, expected.out.to(given.torch_dtype))
    assert torch.equal(output.lse, expected.lse.float())


@pytest.mark.parametrize("causal", ["none", "bottom-right", "top-left"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(5, 7), (7, 5), (6, 6), (0, 3), (3, 0), (1, 9)])
def test_torch_means_the_same_mask_heads_and_scale(q_len: int, kv_len: int, causal: str) -> None:
    given = case(q_len=q_len, kv_len=kv_len, causal=causal, heads=4, kv_heads=2, scale=0.4, v_dim=3)
    method = methods.get("torch")
    assert method.unsupported(given) is None
    inputs = given.tensors()
    output = method(given, inputs)
    assert output.lse is None
    expected = exact.attention(*inputs, causal=causal, scale=0.4).out
    # A wrong mask, head or scale is off by 0.1 or more; fp32 rounding by 1e-6.
    assert output.out.shape == expected.shape
    assert torch.all((output.out - expected).abs() < 1e-5)


def test_torch_says_which_of_its_kernels_runs() -> None:
    """`fused` predicts from the case what torch decides from the tensors, but for strides that keep it from its fused kernel."""
    answers = set()
    layouts = (
        "bhsd",
        "bshd",
        "bhds",
        "bdhs",
        "dhsb",
        "bhsd+step",
        "bhds+step",
        "bhsd+pad",
        "bhds+pad",
        "bhsd+offset",
    )
    layouts += ("bhsd+expand-h", "bhds+expand-s", "bshd+expand-b")
    for layout, (q_len, kv_len), v_dim, kv_heads in itertools.product(
        layouts, ((5, 7), (1, 1), (0, 4), (4, 0)), (8, 4), (1, 2)
    ):
        given = case(q_len=q_len, kv_len=kv_len, v_dim=v_dim, kv_heads=kv_heads, layout=layout)
        choice = torch._fused_sdp_choice(*given.tensors(), enable_gqa=kv_heads != 2)
        answers.add(choice)
        assert choice != 1 or torch_sdpa.fused(given), given.describe()
        if layout in ("bhsd", "bshd", "bhsd+pad", "bhsd+offset", "bhsd+expand-h", "bshd+expand-b"):
            assert (choice == 1) == torch_sdpa.fused(given), given.describe()
    assert len(answers) == 2


@pytest.mark.parametrize("bias", ["none", "bhqk"])
@pytest.mark.parametrize("seed", [3, 4])
def test_the_coarse_exp_of_torch_is_granted_with_and_without_a_bias(bias: str, seed: int) -> None:
    """It errs alike over the keys, so that the output is off along itself; torch's fused kernel declares as much."""
    given = Case(
        batch=3, heads=6, kv_heads=3, q_len=63, kv_len=33, head_dim=80, dtype="fp16", scale=0.5, bias=bias, seed=seed
    )  # fmt: skip
    verdict = judge(given, methods.get("torch"))
    assert verdict.outcome == Outcome.PASS, verdict.message


def test_torch_negative_scale_under_a_causal_mask_is_really_wrong() -> None:
    """The one thing that is declared unsupported: if torch repairs it, the declaration has to go."""
    given = case(q_len=16, kv_len=16, causal="top-left", scale=-0.3)
    method = methods.get("torch")
    assert "negative" in (method.unsupported(given) or "")
    inputs = given.tensors()
    error = method(given, inputs).out - exact.attention(*inputs, causal="top-left", scale=-0.3).out
    assert not error.abs().max() < 0.1
    for other in (
        given.__class__.from_dict({**given.to_dict(), "scale": 0.3}),
        given.__class__.from_dict({**given.to_dict(), "causal": "none"}),
        given.__class__.from_dict({**given.to_dict(), "v_dim": 4}),
    ):
        assert method.unsupported(other) is None
        inputs = other.tensors()
        exactly = exact.attention(*inputs, causal=other.causal, scale=other.softmax_scale).out
        assert torch.all((method(other, inputs).out - exactly).abs() < 1e-5)
        assert math.isfinite(float(exactly.sum()))


EVERYTHING = Case(
    batch=2, heads=4, kv_heads=2, q_len=9, kv_len=11, head_dim=8, dtype="fp32", causal="top-left", window=(3, -1),
    softcap=5.0, alibi="drawn", bias="hqk", mask="bk", sinks=True, lengths="both", dropout=0.25, backward=True, seed=5,
)  # fmt: skip


def test_options_are_handed_over_as_the_case_has_them() -> None:
    seen: dict[str, Any] = {}

    @effattn.method(
        dropout_mask=lambda b, h, m, n, p, seed, offset, device: torch.ones((b, h, m, n), dtype=torch.bool)
    )
    def function(
        q, k, v, *, causal=False, scale=None, causal_alignment=None, window=None, softcap=None, alibi_slopes=None,
        bias=None, mask=None, sinks=None, q_lengths=None, kv_lengths=None, dropout_p=0.0, dropout_seed=0,
        dropout_offset=0, return_lse=False,
    ):  # fmt: skip
        seen.update(locals())
        return q.sum() + k.sum() + v.sum() + bias.sum() + sinks.sum() + torch.zeros(2, 4, 9, 8)

    method = UserFunction(function)
    assert method.unsupported(EVERYTHING) is None
    inputs = EVERYTHING.tensors()
    method(EVERYTHING, inputs)
    assert (seen["causal"], seen["causal_alignment"], seen["window"], seen["softcap"]) == (
        True,
        "top-left",
        (3, -1),
        5.0,
    )
    assert (seen["dropout_p"], seen["dropout_seed"], seen["dropout_offset"], seen["return_lse"]) == (
        0.25,
        5,
        0,
        True,
    )
    for name, x in inputs.extras.present().items():
        if name in ("d_out", "d_lse"):
            continue
        assert torch.equal(seen[name], x), name
        assert seen[name].stride() == x.stride()
    assert seen["bias"].requires_grad
    assert seen["q"].requires_grad
    assert method.dropout_mask(EVERYTHING, torch.device("cpu")).all()
    plain = dataclasses.replace(
        EVERYTHING, window=None, softcap=None, alibi="none", bias="none", mask="none", sinks=False, lengths="none",
        dropout=0.0, backward=False,
    )  # fmt: skip
    seen.clear()
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'sum'"):
        method(plain, plain.tensors())
    assert all(
        seen[name] is None
        for name in ("window", "softcap", "alibi_slopes", "bias", "mask", "sinks", "q_lengths")
    )


@pytest.mark.parametrize(
    ("options", "keyword"),
    [
        ({"window": (3, 3)}, "`window`"),
        ({"softcap": 5.0}, "`softcap`"),
        ({"alibi": "geometric"}, "`alibi_slopes`"),
        ({"bias": "qk"}, "`bias`"),
        ({"mask": "qk"}, "`mask`"),
        ({"sinks": True}, "`sinks`"),
        ({"lengths": "kv"}, "`kv_lengths`"),
        ({"lengths": "both"}, "`q_lengths` and `kv_lengths`"),
        ({"dropout": 0.5}, "`dropout_p`"),
    ],
)
def test_a_case_with_an_option_that_the_function_lacks_is_not_supported(
    options: dict[str, Any], keyword: str
) -> None:
    case = Case(q_len=4, kv_len=4, head_dim=8, dtype="fp32", **options)
    verdict = judge(case, UserFunction(lambda q, k, v, *, causal=False, scale=None, **others: v))
    assert verdict.outcome == "not supported"
    assert verdict.message == f"not supported: the function has no keyword {keyword}"


def test_dropout_without_a_mask_is_not_supported_and_a_wrong_mask_is_said() -> None:
    case = Case(q_len=4, kv_len=4, head_dim=8, dtype="fp32", dropout=0.5)

    def function(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout_p: float = 0.0
    ) -> torch.Tensor:
        return v.clone()

    assert "declares no dropout_mask" in judge(case, UserFunction(function)).message
    effattn.method(dropout_mask=lambda *sizes: torch.ones(3))(function)
    verdict = judge(case, UserFunction(function))
    assert verdict.outcome == "wrong shape or dtype"
    assert (
        "dropout_mask returned a torch.float32 tensor (3,); expected a bool tensor (1, 1, 4, 4)"
        in verdict.message
    )
    with pytest.raises(RequestError, match="dropout_mask is 3; expected a function"):
        effattn.method(dropout_mask=3)  # type: ignore[arg-type]


BACKWARD = Case(heads=2, q_len=20, kv_len=30, head_dim=8, dtype="fp32", bias="qk", backward=True)


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def test_gradients_of_a_plain_function_are_those_of_autograd() -> None:
    verdict = judge(BACKWARD, UserFunction(_attention))
    assert verdict.outcome == "pass", verdict.message
    assert [q.name for q in verdict.quantities] == ["out", "dq", "dk", "dv", "dbias"]


@pytest.mark.parametrize(
    ("function", "outcome", "message"),
    [
        (
            lambda q, k, v, bias=None: _attention(q, k, v, bias=bias).detach(),
            "not supported",
            "its output has no gradient",
        ),
        (
            lambda q, k, v, bias=None: _attention(q, k, v, bias=bias.detach()),
            "not supported",
            "no gradient by bias",
        ),
        (
            lambda q, k, v, bias=None: _attention(q, k.detach(), v, bias=bias),
            "wrong shape or dtype",
            "does not depend on k for autograd",
        ),
        (
            lambda q, k, v, bias=None: _attention(q * 1.0, k, v, bias=bias)[..., :4],
            "wrong shape or dtype",
            r"out has shape \(1, 2, 20, 4\)",
        ),
        (
            lambda q, k, v, bias=None: (_attention(q, k, v, bias=bias), (q @ k.mT).logsumexp(-1)),
            "inaccurate",
            "lse",
        ),
    ],
)
def test_what_a_function_has_no_gradient_for_is_said(function: Any, outcome: str, message: str) -> None:
    verdict = judge(BACKWARD, UserFunction(function))
    assert verdict.outcome == outcome
    assert re.search(message, verdict.message)


def test_a_log_sum_exp_that_can_be_differentiated_is() -> None:
    case = dataclasses.replace(BACKWARD, bias="none")

    def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _attention(q, k, v), (q @ k.mT * q.shape[-1] ** -0.5).logsumexp(-1)

    def wrong(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(q, k, v)
        return out, lse.detach() + 0.0 * q[..., 0]

    def undifferentiated(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = right(q, k, v)
        return out, lse.detach()

    assert judge(case, UserFunction(right)).outcome == "pass"
    assert judge(case, UserFunction(undifferentiated)).outcome == "pass"
    assert judge(case, UserFunction(wrong)).outcome == "inaccurate"
