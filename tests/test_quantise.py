"""Operands as codes: declarations that contradict themselves, and what a method multiplies, known from the inputs alone."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effattn.case import Case, Inputs
from effattn.errors import RequestError
from effattn.tolerances import formats
from effattn.tolerances.codes import SCALES, Codes
from effattn.tolerances.numerics import Numerics, for_dtype
from effattn.tolerances.quantise import BOUNDARY, SCALE_ERROR, amax, multiplied

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


# Declarations


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "e4m4"}, "format 'e4m4': expected one of e4m3, e5m2, int8; did you mean 'e4m3'"),
        ({"format": "float8_e4m3fn"}, "did you mean 'e4m3'"),
        ({"scale": "channels"}, "did you mean 'channel'"),
        ({"format": "fp16"}, "format 'fp16'"),
        ({"scale": "row"}, "scale 'row': expected what shares a scale, one of tensor, kv-head, head, block"),
        ({"scale": "block"}, "scale 'block' and rows None"),
        ({"scale": "tensor", "rows": 64}, "scale 'tensor' and rows 64"),
        ({"scale": "block", "rows": 0}, "blocks of 0 rows: expected 1 or more"),
        ({"scale": "block", "rows": 1.5}, "blocks of 1.5 rows"),
        ({"scale": "block", "rows": True}, "blocks of True rows"),
        ({"format": "int8", "scale": "none"}, "int8 without a scale"),
        ({"scale": "none", "top": 448.0}, "top 448.0 without a scale"),
        ({"top": 449.0}, "from 1 to 448, the largest of e4m3"),
        ({"format": "int8", "top": 128.0}, "from 1 to 127, the largest of int8"),
        ({"top": math.nan}, "top nan"),
        ({"top": 0.5}, "top 0.5"),
    ],
)
def test_codes_that_contradict_themselves_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Codes(**given)


TENSOR = Codes(scale="tensor")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": "e4m3"}, r"q is 'e4m3'; expected a Codes"),
        ({"k": Codes(scale="channel")}, "k has a scale per channel, which cannot be taken out of a sum"),
        ({"q": Codes(scale="channel")}, "q has a scale per channel"),
        (
            {"input": "fp32", "output": "fp32", "operand": "tf32", "k": TENSOR},
            "tf32 and codes exclude each other",
        ),
        ({"p": "e4m3", "p_scale": 512.0}, "p_scale is 512.0; .* at most 448, the largest of e4m3"),
        ({"p_scale": 0.0}, "p_scale is 0.0"),
        ({"p_scale": math.nan}, "p_scale is nan"),
        ({"p_scale": math.inf}, "p_scale is inf"),
        ({"p": "int8"}, "rounded to int8 without a p_scale would be 0 or 1; declare p_scale=127"),
        ({"output": "int8"}, "output is 'int8', a format of codes"),
        ({"score": "int8"}, "score is 'int8', a format of codes"),
    ],
)
def test_numerics_whose_codes_contradict_the_rest_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        for_dtype("fp16").replace(**changes)


def test_a_contradiction_in_a_decorator_ends_a_gate_with_exit_code_2(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from effattn.cli import main

    (tmp_path / "mine.py").write_text(
        "import effattn\n"
        "from effattn.tolerances.numerics import for_dtype\n"
        "@effattn.method(numerics=lambda case: for_dtype(case.dtype, 'fp8-tensor').replace(p_scale=1e3))\n"
        "def attention(q, k, v): return v\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["gate", "mine.py:attention", "--dtype", "fp16", "--no-isolation"]) == 2
    assert "p_scale is 1000.0" in capsys.readouterr().err


def test_presets_say_what_is_quantised() -> None:
    tensor, block, int8 = (for_dtype("bf16", name) for name in ("fp8-tensor", "fp8-block", "int8-block"))
    assert (tensor.p, tensor.p_scale, tensor.quantised, tensor.narrow_p) == ("e4m3", 256.0, True, True)
    assert tensor.v is not None
    assert tensor.v.text == "e4m3, a scale per tensor"
    assert block.k is not None
    assert block.k.text == "e4m3, a scale per 64 rows"
    assert (int8.p, int8.v, int8.quantised, int8.narrow_p) == ("bf16", None, True, False)
    assert not for_dtype("bf16").quantised
    # Codes on Hopper's unit are summed in fewer bits than bf16 is; e4m3 has 32 products a step.
    hopper = tensor.replace(dot="hopper")
    assert hopper.dot_block is not None
    assert (hopper.dot_block.terms, hopper.dot_block.bits) == (32, 13)
    assert hopper.value_block == hopper.dot_block
    assert for_dtype("bf16", "fa3").dot_block != hopper.dot_block


# What is multiplied


def inputs_of(values: torch.Tensor, *, kv_heads: int = 1) -> Inputs:
    """The same values for k and v; for q with two heads for each."""
    k = values.reshape(values.shape[0], kv_heads, -1, values.shape[-1])
    return Inputs(k.repeat_interleave(2, 1), k, k.clone())


def by_torch(x: torch.Tensor, scale: torch.Tensor, fmt: str, how: str) -> torch.Tensor:
    """What the codes of fp32 arithmetic stand for, as float64, in one of the ways in which kernels compute them."""
    x, scale = x.float(), scale.float()
    if how == "prescaled":  # as Q times softmax scale and log2(e), a constant
        x, scale = x * 0.18033688, scale * 0.18033688
    y = x / scale if how == "division" else x * (1.0 / scale)
    if fmt == "int8":
        codes = (y + torch.where(y < 0.0, -0.5, 0.5)).trunc()
    else:
        codes = y.clamp(-formats.get(fmt).largest, formats.get(fmt).largest).to(TORCH[fmt])
    stands_for = codes.double() * scale.double()
    return stands_for / float(torch.tensor(0.18033688)) if how == "prescaled" else stands_for


@given(
    seed=st.integers(0, 2**31),
    fmt=st.sampled_from(["e4m3", "e5m2", "int8"]),
    shared=st.sampled_from(["tensor", "head", "kv-head", "block", "channel"]),
    how=st.sampled_from(["division", "reciprocal", "prescaled"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    kind=st.sampled_from(["normal", "few digits", "outlier"]),
)
def test_codes_formed_in_fp32_in_any_way_are_within_the_radius(
    seed: int, fmt: str, shared: str, how: str, dtype: torch.dtype, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2, 2, 19, 5), generator=generator)
    if kind == "few digits":  # many entries lie half-way between two codes
        x = (7.0 * x).round() * 0.375
    elif kind == "outlier":
        x[0, 1, 3] *= 100.0
    x = x.to(dtype)
    codes = Codes(format=fmt, scale=shared, rows=7 if shared == "block" else None)
    declared = for_dtype("fp16").replace(
        **({"v": codes} if shared == "channel" else {"q": codes, "k": codes, "v": codes})
    )
    inputs = inputs_of(x, kv_heads=2)
    read = multiplied(inputs, declared)
    assert read.unknown is None
    for name, entries, got in zip("qkv", inputs, read.inputs, strict=True):
        if getattr(declared, name) is None:
            assert torch.equal(got, entries.double())
            continue
        scale = amax(entries.double(), codes, 2 if name == "q" else 1) / codes.top_code
        want = by_torch(entries, torch.where(scale > 0.0, scale, 1.0), fmt, how)
        radius = torch.zeros_like(got) if read.radius is None else getattr(read.radius, name)
        assert bool(((want - got).abs() <= radius + SCALE_ERROR * want.abs()).all())
        if kind == "normal" and dtype == torch.float32:
            assert float((radius > 0.0).double().mean()) < 0.01


def test_an_entry_half_way_between_two_codes_may_be_either_and_any_other_may_not() -> None:
    # With the largest 7, 5.25 is 336 and in the middle of 320 and 352; 5.2 is 332.8, so 320, which stands for 5.
    x = torch.tensor([7.0, 5.25, 5.2, -5.25]).reshape(1, 1, 4, 1)
    read = multiplied(inputs_of(x), for_dtype("fp16").replace(k=TENSOR))
    assert read.radius is not None
    assert read.radius.k.flatten().tolist() == [0.0, 0.25, 0.0, 0.25]
    assert read.inputs.k.flatten().tolist() == [7.0, 5.25, 5.0, -5.25]
    assert not read.radius.q.any()
    off = multiplied(inputs_of(x * torch.tensor([1.0, 1.0 + 2.0 * BOUNDARY]).repeat(2).reshape(1, 1, 4, 1)),
                     for_dtype("fp16").replace(k=TENSOR))  # fmt: skip
    assert off.radius is None


@pytest.mark.parametrize("shared", sorted(set(SCALES) - {"none"}))
def test_what_shares_a_scale_is_what_is_declared(shared: str) -> None:
    x = torch.randn((2, 6, 10, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = amax(x, Codes(scale=shared, rows=4 if shared == "block" else None), 3).expand_as(x)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 1), (1, 3, 4, 2), (0, 5, 9, 3)):
        part = {
            "tensor": x,
            "head": x[b, h],
            "kv-head": x[b, h // 3 * 3 : h // 3 * 3 + 3],
            "block": x[b, h, i // 4 * 4 : i // 4 * 4 + 4],
            "channel": x[b, h, :, j],
        }[shared]
        assert found[b, h, i, j] == part.abs().max()


def test_without_a_scale_codes_are_the_nearest_ones_of_the_entries() -> None:
    x = torch.tensor([0.3, 1.0625, 449.0, 2.0**-10]).reshape(1, 1, 4, 1)
    declared = for_dtype("fp16").replace(k=Codes(scale="none"))
    beyond = multiplied(inputs_of(x), declared)
    assert (
        beyond.unknown == "the codes of K are not determined: 1 entries are beyond 448, the largest of e4m3"
    )
    inside = multiplied(inputs_of(x.clamp(max=400.0)), declared)
    assert inside.radius is None
    assert torch.equal(inside.inputs.k.flatten(), x.clamp(max=400.0).flatten().to(TORCH["e4m3"]).double())


@pytest.mark.parametrize(
    ("entry", "message"),
    [(math.nan, "not all entries are finite"), (math.inf, "not all entries"), (1e-37, "a scale is 2.2e-40")],
)
def test_where_no_scale_says_what_is_right_the_case_is_not_judged(entry: float, message: str) -> None:
    x = torch.zeros((1, 1, 2, 2))
    x[..., 0] = entry
    read = multiplied(inputs_of(x), for_dtype("fp16").replace(v=TENSOR))
    assert read.unknown is not None
    assert message in read.unknown
    assert read.unknown.startswith("the codes of V are not determined")


def test_zeros_and_nothing_have_codes_whatever_the_scale() -> None:
    for shape in ((1, 1, 3, 2), (1, 1, 0, 2)):
        for shared in sorted(set(SCALES) - {"channel"}):
            codes = Codes(scale=shared, rows=2 if shared == "block" else None)
            read = multiplied(inputs_of(torch.zeros(shape)), for_dtype("fp16").replace(q=codes, k=codes))
            assert (read.unknown, read.radius) == (None, None)
            assert not read.inputs.k.any()


# Verdicts


def numerics(case: Case) -> Numerics:
    return for_dtype(case.dtype, "fp8-tensor")


def test_gradients_of_quantised_operands_are_not_judged_by_name() -> None:
    from effattn.judge import judge, judge_output
    from effattn.methods.base import Output
    from effattn.methods.user import UserFunction
    from effattn.verdict import Outcome
    from effattn.zoo.eight_bits import EightBits

    case = Case(q_len=8, kv_len=8, head_dim=8, dtype="bf16", backward=True)
    method = UserFunction(lambda q, k, v: EightBits()(q, k, v), spec="mine:attention")
    method.numerics = numerics  # type: ignore[method-assign]
    verdict = judge(case, method)
    assert verdict.outcome == Outcome.NOT_JUDGED
    assert verdict.message.startswith("not judged: no bound of gradients is known for quantised operands")
    with pytest.raises(RequestError, match="gradients of quantised operands are not judged"):
        judge_output(case, case.tensors(), Output(case.tensors().q), numerics(case))


def test_a_verdict_says_how_far_the_output_is_from_attention_on_the_inputs() -> None:
    from effattn import methods, zoo
    from effattn.exact import attention
    from effattn.judge import judge
    from effattn.verdict import Verdict
    from effattn.zoo.eight_bits import EightBits

    case = Case(heads=2, q_len=64, kv_len=96, head_dim=32, dtype="fp16")
    verdict = judge(case, zoo.get("fp8-tensor").method())
    inputs = case.tensors()
    exact = attention(*inputs).out
    out = EightBits()(*inputs)[0].double()
    off = float((out - exact).square().mean().sqrt() / exact.square().mean().sqrt())
    assert verdict.accuracy is not None
    assert verdict.accuracy == pytest.approx((off, verdict.accuracy[1]), rel=1e-12)
    assert 0.01 < verdict.accuracy[1] < off < 0.1
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))).accuracy == verdict.accuracy
    plain = judge(case, methods.get("flash@flash"))
    assert plain.accuracy is None
    assert "accuracy" not in plain.to_dict()


def test_the_gate_shows_accuracy_below_its_table_and_in_the_summary(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from effattn.cli import main

    (tmp_path / "mine.py").write_text(
        "import effattn\n"
        "from effattn.zoo.eight_bits import EightBits\n"
        "@effattn.method(numerics='fp8-tensor', supports=lambda case: case.q_len * case.kv_len < 2000)\n"
        "def attention(q, k, v): return EightBits()(q, k, v)\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["gate", "mine.py:attention", "--dtype", "fp16", "--no-isolation", "--out", "run"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.startswith("fp16: out is "))
    assert line.endswith("% without any rounding after that, in the median case")
    assert line.removesuffix(", in the median case") in (tmp_path / "run" / "summary.md").read_text()


def test_laws_allow_what_quantising_does_to_what_they_compare() -> None:
    from effattn.properties.allowance import bounds
    from effattn.properties.law import SetAside
    from effattn.zoo.eight_bits import EightBits

    case = Case(heads=2, q_len=20, kv_len=40, head_dim=16, dtype="fp16")
    inputs = case.tensors()
    changed = Inputs(inputs.q, inputs.k, inputs.v.clone())
    changed.v[0, 0, 0, 0] = 20.0  # one head only, but the scale is that of the tensor
    answers = [EightBits()(*x)[0].double()[:, 1] for x in (inputs, changed)]
    difference = (answers[0] - answers[1]).abs()
    assert float(difference.max()) > 0.0
    allowed = sum(bounds(case, x, numerics(case))["out"][:, 1] for x in (inputs, changed))
    assert bool((difference <= allowed).all())
    flash = sum(bounds(case, x, for_dtype("fp16", "flash"))["out"][:, 1] for x in (inputs, changed))
    assert not bool((difference <= flash).all())
    backward = Case(q_len=2, kv_len=2, head_dim=4, dtype="fp16", backward=True)
    with pytest.raises(SetAside, match="no bound of gradients"):
        bounds(backward, backward.tensors(), numerics(backward))
