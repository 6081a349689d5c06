"""Likely causes: each usual mistake is named, and nothing is named for what is none of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from effattn import causes
from effattn.case import DTYPES, Case, Inputs
from effattn.judge import judge
from effattn.methods.base import Method, Output
from effattn.tolerances.numerics import Numerics, for_dtype
from effattn.verdict import Outcome

Command = Callable[..., tuple[int, str, str]]
Problem = dict[str, Any]


def attend(p: Problem) -> torch.Tensor:
    """Attention in float64, every option in its plainest form."""
    q, k, v = (p[name].double() for name in "qkv")
    group = q.shape[1] // k.shape[1]
    heads = torch.arange(q.shape[1])
    of = p.get("head_of", heads // group)
    k, v = k[:, of], v[:, of]
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    shift = k.shape[2] - q.shape[2]
    scores = p["scale"] * (q @ k.mT)
    if p["softcap"]:
        scores = p["softcap"] * torch.tanh(scores / p["softcap"])
    if p["bias"] is not None:
        scores = scores + p.get("bias_factor", 1.0) * p["bias"].double()
    if p["alibi_slopes"] is not None:
        scores = (
            scores
            - p.get("alibi_sign", 1.0) * p["alibi_slopes"].view(-1, q.shape[1], 1, 1) * (i + shift - j).abs()
        )
    seen = torch.ones(scores.shape, dtype=torch.bool)
    if p["causal"] != "none":
        seen &= j <= i + (shift if p["causal"] == "bottom-right" else 0) + p.get("right", 0)
    if p["window"] is not None:
        left, right = p["window"]
        seen &= (left < 0) | (j >= i + shift - left)
        seen &= (right < 0) | (j <= i + shift + right)
    if p["mask"] is not None:
        seen &= p["mask"] ^ p.get("mask_turned", False)
    seen &= (j >= p.get("first", 0)) & (j < p.get("end", k.shape[2]))
    scores = scores.masked_fill(~seen, -math.inf)
    top = scores.amax(-1, keepdim=True).clamp(min=-1e300)
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True) + p.get("zeros", 0) * (-top).exp()
    if p["sinks"] is not None:
        total = total + (p["sinks"].double().view(1, -1, 1, 1) - top).exp()
    return torch.where(total > 0, weights / total.clamp(min=1e-300), 0.0) @ v


class Mistaken(Method):
    """Attention of a problem that `mistake` has changed, rounded once."""

    name = spec = "mistaken"

    def __init__(self, mistake: Callable[[Problem], Problem]) -> None:
        self.mistake = mistake

    def numerics(self, case: Case) -> Numerics:
        return for_dtype(case.dtype)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        extras = {name: getattr(inputs.extras, name) for name in ("bias", "mask", "alibi_slopes", "sinks")}
        problem = {
            "q": inputs.q, "k": inputs.k, "v": inputs.v, "scale": case.softmax_scale, "causal": case.causal,
            "window": case.window, "softcap": case.softcap, **extras,
        }  # fmt: skip
        return Output(attend(problem | self.mistake(problem)).to(inputs.q.dtype))


def verdict(mistake: Callable[[Problem], Problem], dtype: str = "fp16", **fields: Any) -> Any:
    sizes = {
        "batch": 2,
        "heads": 4,
        "kv_heads": 2,
        "q_len": 21,
        "kv_len": 37,
        "head_dim": 24,
        "dtype": dtype,
        "seed": 1,
    }
    return judge(Case(**sizes | fields), Mistaken(mistake), explain=True)


MISTAKES: dict[str, tuple[dict[str, Any], Callable[[Problem], Problem]]] = {
    "whose causal mask is aligned top-left, not bottom-right": ({"causal": "bottom-right"}, lambda p: {"causal": "top-left"}),
    "whose causal mask is aligned bottom-right, not top-left": ({"causal": "top-left"}, lambda p: {"causal": "bottom-right"}),
    "without the causal mask": ({"causal": "bottom-right"}, lambda p: {"causal": "none"}),
    "with a causal mask (top-left)": ({}, lambda p: {"causal": "top-left"}),
    "whose causal mask lets through one key too many": ({"causal": "bottom-right"}, lambda p: {"right": 1}),
    "whose causal mask hides the query's own key": ({"causal": "bottom-right"}, lambda p: {"right": -1}),
    "without a scale": ({}, lambda p: {"scale": 1.0}),
    "with the scale 1 / sqrt(head_dim) = 0.204124 instead": ({"scale": 0.5}, lambda p: {"scale": 24**-0.5}),
    "with the scale applied twice": ({}, lambda p: {"scale": p["scale"] ** 2}),
    "with the scale times ln 2: exp2 of what was meant for exp": ({}, lambda p: {"scale": p["scale"] * math.log(2)}),
    "with the scale 1 / sqrt(v_dim)": ({"v_dim": 16}, lambda p: {"scale": 0.25}),
    "with the scale negated": ({}, lambda p: {"scale": -p["scale"]}),
    "without the window": ({"window": (9, 4)}, lambda p: {"window": None}),
    "whose window has one key more on the left": ({"window": (9, 4)}, lambda p: {"window": (10, 4)}),
    "whose window has one key less on the right": ({"window": (9, 4)}, lambda p: {"window": (9, 3)}),
    "whose window has its sides exchanged": ({"window": (9, 4)}, lambda p: {"window": (4, 9)}),
    "without the softcap": ({"softcap": 2.0}, lambda p: {"softcap": None}),
    "without ALiBi": ({"alibi": "drawn"}, lambda p: {"alibi_slopes": None}),
    "with ALiBi added instead of taken away": ({"alibi": "drawn"}, lambda p: {"alibi_sign": -1.0}),
    "without the bias": ({"bias": "bhqk"}, lambda p: {"bias": None}),
    "with the bias multiplied by the scale": ({"bias": "bhqk"}, lambda p: {"bias_factor": p["scale"]}),
    "without the mask": ({"mask": "bhqk"}, lambda p: {"mask": None}),
    "with the mask turned round: True hides": ({"mask": "bhqk"}, lambda p: {"mask_turned": True}),
    "without the sinks": ({"sinks": True}, lambda p: {"sinks": None}),
    "without the last key": ({}, lambda p: {"end": 36}),
    "without the first key": ({}, lambda p: {"first": 1}),
    "without the last 5 keys, a partial block of 16 or 32": ({}, lambda p: {"end": 32}),
    "in which 11 keys of zeros fill up a block of 16": ({}, lambda p: {"zeros": 11}),
    "in which query head h reads key head h % kv_heads": ({}, lambda p: {"head_of": torch.arange(4) % 2}),
    "in which all heads read K and V of the first": ({}, lambda p: {"head_of": torch.zeros(4, dtype=torch.long)}),
    "in which all of the batch read K and V of its first member": ({}, lambda p: {n: p[n][:1].expand_as(p[n]) for n in "kv"}),
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_each_usual_mistake_is_named_and_nothing_else(words: str) -> None:
    fields, mistake = MISTAKES[words]
    assert verdict(lambda p: {}, **fields).outcome == Outcome.PASS
    found = verdict(mistake, **fields)
    assert found.outcome == Outcome.INACCURATE
    named = [line for line in found.message.splitlines() if line.startswith("likely cause:")]
    assert len(named) == 1
    assert named[0].startswith(f"likely cause: the output is right for attention {words}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_cause_is_named_for_other_mistakes(dtype: str) -> None:
    assert "likely cause" not in verdict(lambda p: {"scale": 1.1 * p["scale"]}, dtype).message
    # Right but for one head.
    assert (
        "likely cause"
        not in verdict(lambda p: {"v": p["v"] * torch.tensor([1.0, 1.5])[:, None, None]}, dtype).message
    )
    assert "scale applied twice" in verdict(lambda p: {"scale": p["scale"] ** 2}, dtype).message


def test_a_constant_factor_is_named() -> None:
    assert "out is 2 times what it should be (counted twice)" in verdict(lambda p: {"v": 2 * p["v"]}).message
    assert (
        "out is -1 times what it should be (the sign is wrong)" in verdict(lambda p: {"v": -p["v"]}).message
    )
    assert "out is 1.5 times what it should be\n" in verdict(lambda p: {"v": 1.5 * p["v"]}).message + "\n"
    # A factor next to 1 is told with its digits, and no name is made up for it: at head_dim 1, 1 / scale is 1.
    close = verdict(lambda p: {"v": 1.002 * p["v"]}, "fp32").message
    assert "likely cause: out is 1.002 times what it should be" in close
    assert "is missing" not in close
    assert "likely cause: out is 0 everywhere" in verdict(lambda p: {"v": 0 * p["v"]}).message


def test_factors_of_gradients_and_of_the_log_sum_exp_are_named() -> None:
    from effattn.methods.user import UserFunction

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
            ctx.factor = factor
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
            return grad * ctx.factor, None

    def in_base_2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = 0.25 * (q.float() @ k.float().mT)
        return (scores.softmax(-1) @ v.float()).to(q.dtype), scores.logsumexp(-1) * math.log2(math.e)

    def unscaled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k = Scaled.apply(q, 4.0), Scaled.apply(k, 0.9)
        scores = 0.25 * (q.float() @ k.float().mT)
        return (scores.softmax(-1) @ v.float()).to(q.dtype)

    case = Case(heads=2, q_len=33, kv_len=40, head_dim=16, dtype="fp32", seed=1)
    message = judge(case, UserFunction(in_base_2), explain=True).message
    assert "likely cause: lse is 1.443 times what it should be (log2(e): in base 2, not e)" in message
    found = judge(replace(case, backward=True), UserFunction(unscaled), explain=True)
    assert found.outcome == Outcome.INACCURATE
    for words in (
        "dQ is 4 times what it should be (1 / scale: the scale is missing)",
        "dK is 0.9 times what it should be",
    ):
        assert f"likely cause: {words}" in found.message
    assert "dV is" not in found.message


class Off(Mistaken):
    """Right, but for `change`, made to the float64 output or log-sum-exp before they are rounded."""

    def __init__(self, change: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__(lambda p: {})
        self.change = change

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        from effattn.exact import attention

        exact = attention(*inputs, causal=case.causal, scale=case.softmax_scale)
        out, lse = exact.out.clone(), exact.lse.clone()
        self.change(out, lse)
        return Output(out.to(inputs.q.dtype), lse.float())


def test_a_question_whose_answer_hardly_differs_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def last_column(out: torch.Tensor, lse: torch.Tensor) -> None:
        out[..., -1] = out[..., -1].bfloat16().double()

    # Keys of one score: another scale moves the answer by little, and allows a little more.
    sizes = {"heads": 6, "kv_heads": 3, "q_len": 128, "kv_len": 257, "head_dim": 56, "v_dim": 24, "seed": 4}
    case = Case(**sizes, dtype="fp16", values="repeated-max")
    found = judge(case, Off(last_column), explain=True)
    assert found.outcome == Outcome.INACCURATE
    assert "likely cause" not in found.message
    # It is how little it explains that keeps it from being named.
    monkeypatch.setattr(causes, "MOST_LEFT", math.inf)
    assert (
        "with the scale of a head_dim that is a power of two"
        in judge(case, Off(last_column), explain=True).message
    )


@pytest.mark.parametrize(("heads", "q_len", "named"), [(1, 2, False), (1, 7, False), (2, 8, True)])
def test_a_factor_is_named_where_enough_elements_have_it(heads: int, q_len: int, named: bool) -> None:
    def grow(out: torch.Tensor, lse: torch.Tensor) -> None:
        lse *= 1.0001

    case = Case(heads=heads, q_len=q_len, kv_len=40, head_dim=16, dtype="fp32", seed=1)
    found = judge(case, Off(grow), explain=True)
    assert found.outcome == Outcome.INACCURATE
    assert ("likely cause: lse is 1.0001 times what it should be" in found.message) == named
    assert ("likely cause" in found.message) == named


def test_a_factor_that_explains_little_is_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from effattn.exact import attention
    from effattn.tolerances.envelope import forward_envelope

    case = Case(heads=2, q_len=33, kv_len=40, head_dim=16, dtype="fp32", seed=1)
    inputs = case.tensors()
    exact = attention(*inputs, scale=case.softmax_scale)
    bound = torch.from_numpy(forward_envelope(*inputs, numerics=for_dtype("fp32"), exact=exact).lse_bound)

    def noise_and_a_little(out: torch.Tensor, lse: torch.Tensor) -> None:
        sign = 1.0 - 2.0 * (torch.arange(lse.numel()) % 2).view(lse.shape)
        lse *= 1.0 + 0.4 * float((bound / lse).min())
        lse += 0.7 * bound * sign

    monkeypatch.setattr(causes, "FEWEST_MULTIPLES", 0)
    found = judge(case, Off(noise_and_a_little), explain=True)
    assert found.outcome == Outcome.INACCURATE
    assert "likely cause" not in found.message
    monkeypatch.setattr(causes, "MOST_LEFT_BY_FACTOR", 1.0)
    assert "times what it should be" in judge(case, Off(noise_and_a_little), explain=True).message


def test_large_cases_are_not_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(causes, "MOST_PAIRS", 2 * 4 * 21 * 37 - 1)
    assert "likely cause" not in verdict(lambda p: {"scale": 1.0}).message


FILE = """
import torch

calls = 0


def attention(q, k, v, *, causal=False):
    scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril(SHIFT)
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1).nan_to_num() @ v.float()).to(q.dtype)


def unsteady(q, k, v):
    global calls
    calls += 1
    return attention(q, k, v) + (0.5 if calls % 7 == 3 else 0.0)
"""


def test_gate_and_replay_name_the_cause(
    effattn_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE.replace("SHIFT", "0"))
    code, out, err = effattn_command("gate", "mine.py:attention", "--dtype", "fp16", "--out", "run")
    assert code == 1, err
    cause = "likely cause: the output is right for attention whose causal mask is aligned top-left, not bottom-right"
    assert out.count("likely cause:") == out.count(cause) == 1
    assert cause in Path("run/summary.md").read_text()
    case = '{"schema":1,"q_len":20,"kv_len":33,"head_dim":16,"dtype":"fp16","causal":"bottom-right"}'
    code, out, _ = effattn_command("replay", case, "mine.py:attention")
    assert code == 1
    assert cause in out


def test_gate_says_where_the_same_inputs_give_another_output(
    effattn_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)
    code, out, _ = effattn_command(
        "gate", "mine.py:unsteady", "--dtype", "fp16", "--no-isolation", "--out", "run"
    )
    assert code == 1
    assert "judged again it came out as pass: the same inputs do not give the same output" in out
