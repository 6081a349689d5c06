"""What judges knows of matrix units: the bound on their truncation, its one-sided size, and verdicts under a dot model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

import effattn.cpu
from effattn.case import Case
from effattn.cpu import models
from effattn.errors import RequestError
from effattn.judge import judge, judge_output
from effattn.methods.base import as_output
from effattn.methods.user import UserFunction
from effattn.tolerances import dots
from effattn.tolerances.numerics import for_dtype
from effattn.verdict import Outcome

#: names of the formats in the two tables
FORMATS = {"fp16": "f16", "bf16": "bf16", "tf32": "tf32", "e4m3": "f8E4M3FN", "e5m2": "f8E5M2"}
UNITS = [name for name in dots.MODELS if name != dots.ANY]


@triton.jit
def _scores(q, k, s, M, N, D, BLOCK: tl.constexpr, DIM: tl.constexpr):
    b, i, j, d = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BLOCK), tl.arange(0, DIM)
    i += tl.program_id(1) * BLOCK
    j += tl.program_id(2) * BLOCK
    x = tl.load(
        q + (b * M + i[:, None]) * D + d[None, :], mask=(i[:, None] < M) & (d[None, :] < D), other=0.0
    )
    y = tl.load(
        k + (b * N + j[None, :]) * D + d[:, None], mask=(j[None, :] < N) & (d[:, None] < D), other=0.0
    )
    at = (b * M + i[:, None]) * N + j[None, :]
    tl.store(s + at, tl.dot(x, y), mask=(i[:, None] < M) & (j[None, :] < N))


def product(a: Any, b: Any) -> Any:
    """(..., m, d) by (..., d, n), in fp32, by tl.dot."""
    (m, d), n = a.shape[-2:], b.shape[-1]
    a, b = a.contiguous(), b.mT.contiguous()
    out = torch.empty(*a.shape[:-1], n)
    batch = a.numel() // max(m * d, 1)
    _scores[(batch, -(-m // 32), -(-n // 32))](a, b, out, m, n, d, 32, max(16, triton.next_power_of_2(d)))
    return out


def attention(q: Any, k: Any, v: Any, *, scale: float, keep: bool = False) -> Any:
    """Of as many heads of k and v; the output stays in fp32 where it is to be kept so."""
    s = product(q, k.mT) * scale
    p = (s - s.amax(-1, keepdim=True)).exp()
    out = product(p.to(q.dtype), v) / p.sum(-1, keepdim=True)
    return out if keep else out.to(q.dtype)


def test_the_judges_table_is_that_of_the_backend() -> None:
    """Written twice, since what judges shares no code with what is judged."""
    for name in UNITS:
        model = models.get(name)
        for fmt, block in dots.get(name).items():
            elem = FORMATS[fmt]
            assert (block.terms, block.bits) == (model.block[elem], model.bits_for(elem)), (name, fmt)
            assert block.kept == (13 if block.bits == 13 else 23)
        assert {FORMATS[fmt] for fmt in dots.get(name)} == set(model.block)


def test_an_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"unknown dot model 'hoper'.*did you mean 'hopper'"):
        for_dtype("fp16").replace(dot="hoper")


def _sums(name: str, kind: str, n: int) -> tuple[Any, Any, Any]:
    """(error, exact sum, P) of 64 x 64 products of n terms in fp16 on a unit."""
    g = np.random.default_rng(n)
    a, b = g.standard_normal((64, n)), g.standard_normal((n, 64))
    if kind == "positive":
        a, b = np.abs(a), np.abs(b)
    elif kind == "just cut":
        # 1, and then terms that are all but one quantum too small to be kept, in each block.
        quantum = 2.0 ** -dots.get(name)["fp16"].bits
        a, b = np.ones((64, n)), np.full((n, 64), (1 - 2.0**-10) * quantum * 2.0**12)
        a[:, 1:] = 2.0**-12
        b[0] = 1.0
    x, y = torch.from_numpy(a).half(), torch.from_numpy(b).half()
    with effattn.cpu.active(dot_model=name):
        got = product(x, y).double().numpy()
    p, q = x.double().numpy(), y.double().numpy()
    exact, size = p @ q, np.abs(p) @ np.abs(q)
    return got - exact, exact, (size + np.abs(exact)) / 2


@pytest.mark.parametrize("name", UNITS)
def test_no_sum_of_a_unit_is_off_by_more_than_its_bound(name: str) -> None:
    block = dots.get(name)["fp16"]
    for n in (16, 64, 1024):
        for kind in ("normal", "positive", "just cut"):
            error, _, most = _sums(name, kind, n)
            assert (np.abs(error) <= dots.dot_bound(block, float(n)) * most).all(), (n, kind)
    # The bound is not idle: where all is cut that can be, a good part of it is reached.
    error, _, most = _sums(name, "just cut", 1024)
    assert (np.abs(error) / most).max() > 0.3 * dots.dot_bound(block, 1024.0)


@pytest.mark.parametrize("name", UNITS)
def test_the_expected_loss_of_sums_of_one_sign(name: str) -> None:
    """Between the mean and four times it: partial sums grow, so the average one is half of the last."""
    block = dots.get(name)["fp16"]
    error, exact, most = _sums(name, "positive", 1024)
    assert (error <= 0).all()
    assert (exact > 0).all()
    lost = float((-error / most).mean())
    assert lost < dots.dot_sigma(block, 1024.0) < 4 * lost


def test_no_unit_adds_nothing() -> None:
    assert dots.dot_bound(None, 100.0) == 0.0
    assert (dots.dot_sigma(None, np.array([1.0, 5.0])) == 0.0).all()


def _outcome(model: str, judged_as: str) -> Outcome:
    """Of a kernel with fp32 output that runs under a model, on V of one sign, judged as another."""
    case = Case(heads=2, q_len=64, kv_len=2048, head_dim=64, dtype="fp16", seed=3)
    inputs = case.tensors("cpu")
    inputs = type(inputs)(inputs.q, inputs.k, inputs.v.abs(), extras=inputs.extras)
    with effattn.cpu.active(dot_model=model):
        output = as_output(attention(inputs.q, inputs.k, inputs.v, scale=case.softmax_scale, keep=True))
    numerics = for_dtype("fp16").replace(output="fp32", dot=judged_as)
    return judge_output(case, inputs, output, numerics).outcome


@pytest.mark.parametrize("model", ["volta", "ampere", "hopper"])
def test_truncation_is_right_on_its_unit_and_a_fault_elsewhere(model: str) -> None:
    assert _outcome(model, model) == Outcome.PASS
    assert _outcome(model, dots.ANY) in (Outcome.BIASED, Outcome.INACCURATE)


def test_rounding_to_nearest_is_right_on_every_unit() -> None:
    assert _outcome("ieee", dots.ANY) == Outcome.PASS
    assert _outcome("ieee", "hopper") == Outcome.PASS


def _rounds_scores(q: Any, k: Any, v: Any, *, scale: float) -> Any:
    s = (product(q, k.mT) * scale).half().float()
    p = (s - s.amax(-1, keepdim=True)).exp()
    return (product(p.to(q.dtype), v) / p.sum(-1, keepdim=True)).to(q.dtype)


@pytest.mark.parametrize("model", ["hopper", "ampere"])
def test_a_wrong_kernel_is_found_under_a_model_too(model: str) -> None:
    """And `judge` takes the model that is selected into account by itself."""
    case = Case(heads=4, q_len=64, kv_len=256, head_dim=64, dtype="fp16", scale=0.125, seed=3)
    with effattn.cpu.active(dot_model=model):
        right = judge(case, UserFunction(attention, spec="a:right"))
        wrong = judge(case, UserFunction(_rounds_scores, spec="a:wrong"))
    assert right.outcome == Outcome.PASS
    assert wrong.outcome in (Outcome.BIASED, Outcome.INACCURATE)
    assert wrong.replay.endswith(f" --dot-model {model}")


def test_the_line_that_repeats_a_verdict_names_the_model(
    effattn_command: Callable[..., tuple[int, str, str]],
) -> None:
    case = '{"schema":1,"q_len":5,"kv_len":32,"head_dim":16,"dtype":"fp16"}'
    for model in ("ieee", "ampere"):
        code, out, _ = effattn_command("replay", case, "flash", "--no-isolation", "--dot-model", model)
        assert code == 0
        assert ("--dot-model ampere" in out) == (model == "ampere")
    assert models.selected() == "ieee"
    code, _, err = effattn_command("replay", case, "flash", "--device", "cuda", "--dot-model", "hopper")
    assert code == 2
    assert "--dot-model hopper says how the CPU multiplies" in err
    code, _, err = effattn_command("replay", case, "flash", "--dot-model", "hoper")
    assert code == 2
    assert "did you mean 'hopper'" in err
