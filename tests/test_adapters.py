"""Adapters: what runs here keeps the laws; what does not is called as its documentation says; what is missing is said."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from effattn import laws, methods
from effattn.case import DTYPES, Case
from effattn.errors import RequestError
from effattn.expected import expected_failures
from effattn.judge import judge
from effattn.run import store
from effattn.verdict import Outcome

FILES = Path(__file__).parent.parent / "properties" / "expected"
HERE = ("sdpa:math", "sdpa:flash", "flex:attention")
LAWS = (
    "one_key_returns_its_value",
    "future_keys_have_no_influence",
    "a_row_that_sees_no_key_is_zero",
    "the_diagonal_is_seen",
    "grouped_heads_equal_repeated_keys",
    "strides_do_not_matter",
    "dv_and_the_output_agree",
    "gradients_are_derivatives_of_the_output",
)
CASE: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 17, "kv_len": 33, "head_dim": 64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HERE)
def test_what_runs_here_is_right_and_keeps_the_laws(name: str, dtype: str) -> None:
    method = methods.get(f"effattn.adapters.{name}")
    # FlexAttention has gradients on a GPU only.
    backward = name != "flex:attention"
    verdict = judge(Case(**CASE, dtype=dtype, causal="top-left", backward=backward), method)
    assert verdict.outcome == Outcome.PASS, verdict.message
    judged = 0
    for law in laws.choose(LAWS):
        tried = laws.try_law(law, method, dtype=dtype, profile="brief")
        assert tried.failure is None, laws.explain(tried)
        judged += tried.judged
    assert judged >= 5


#: adapter, dtype -> arguments of the gate, the laws that are judged at least, and those that are broken as expected
EXPECTED: dict[tuple[str, str], tuple[str, tuple[str, ...], int, tuple[str, ...]]] = {
    ("sdpa:math", "fp16"): ("torch.toml", ("--laws", "gradients,options", "--values", "large-logits"), 20, ()),
    ("sdpa:flash", "fp32"): (
        "torch.toml", ("--laws", "numbers,masks", "--values", "large-logits"), 17, ("nan_in_a_query_reaches_its_row_alone",),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), EXPECTED)
def test_the_gate_passes_what_runs_here_but_for_what_is_expected(
    name: str, dtype: str, effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file, chosen, judged, known = EXPECTED[name, dtype]
    code, out, _ = effattn_command(
        "gate", f"effattn.adapters.{name}", "--dtype", dtype, *chosen, "--expected", FILES / file,
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, out
    assert "passed all" in out
    verdicts = list(store.read_verdicts(tmp_path / "run"))
    broken = {v.law for v in verdicts if laws.failed(v)}
    assert broken == set(known)
    assert len({v.law for v in verdicts if laws.says_something(v) and v.law}) >= judged


@pytest.mark.parametrize("dtype", DTYPES)
def test_flex_attention_breaks_no_law_of_numbers_but_as_expected(dtype: str) -> None:
    # Laws alone, and few: FlexAttention is traced again for every case. CPUs without AMX do not show what is expected.
    method = methods.get("effattn.adapters.flex:attention")
    known = [entry for entry in expected_failures(FILES / "flex.toml") if entry.dtype == dtype]
    judged = 0
    for law in laws.choose(("numbers", "alibi_is_its_bias", "lengths_are_their_boolean_mask")):
        tried = laws.try_law(law, method, dtype=dtype, profile="brief")
        assert tried.failure is None or any(entry.covers(law.name, dtype) for entry in known), laws.explain(
            tried
        )
        judged += tried.judged
    assert judged >= 10


ABSENT = {
    "flash_attn:fa2": ("flash_attn", "pip install flash-attn"),
    "flash_attn:fa3": ("flash_attn_interface", "hopper/"),
    "flash_attn:fa4": ("flash_attn.cute", "pip install"),
    "flashinfer:attention": ("flashinfer", "pip install flashinfer-python"),
    "xformers:attention": ("xformers.ops", "pip install xformers"),
    "fla:attention": ("fla.ops.attn.parallel", "pip install fla-core"),
    "sage:attention": ("sageattention", "pip install sageattention"),
    "transformer_engine:attention": ("transformer_engine.pytorch", "pip install transformer_engine"),
    "jax:attention": ("jax", "pip install jax"),
}


@pytest.mark.parametrize("name", ABSENT)
def test_what_is_not_installed_is_said_with_the_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, install = ABSENT[name]
    monkeypatch.setitem(sys.modules, module, None)
    square = {**CASE, "q_len": 33, "dtype": "fp16", "causal": "top-left"}
    with pytest.raises(RequestError, match=rf"needs the module '{module}'.*") as caught:
        judge(Case(**square), methods.get(f"effattn.adapters.{name}"))
    assert install in str(caught.value)


# What follows needs a GPU to run. The stand-ins below have the signatures of the libraries' documentation, and compute attention
# in their conventions: they show that an adapter hands over and takes back the right axes, not that the library is right.


def dense(q: Any, k: Any, v: Any, causal: bool, scale: float | None) -> tuple[Any, Any]:
    """(batch, length, heads, dim) bottom-right attention and its LSE (batch, heads, length)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).float() for x in (k, v))
    s = q.float() @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(s.shape[-1] - s.shape[-2] + 1)
        s = s.masked_fill(hidden, -math.inf)
    return (s.softmax(-1) @ v).to(q.dtype).transpose(1, 2), s.logsumexp(-1)


def fa2(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False):  # fmt: skip
    assert (dropout_p, window_size, softcap, alibi_slopes, return_attn_probs) == (
        0.0,
        (-1, -1),
        0.0,
        None,
        True,
    )
    return (*dense(q, k, v, causal, softmax_scale), None)


def fa3(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, deterministic=False):
    assert (window_size, softcap) == ((-1, -1), 0.0)
    return dense(q, k, v, causal, softmax_scale)[0]


def fa4(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, return_lse=False):
    assert (window_size, softcap, return_lse) == ((None, None), 0.0, True)
    return dense(q, k, v, causal, softmax_scale)


def prefill(q, k, v, *, causal=False, sm_scale=None, logits_soft_cap=None, return_lse=False):
    out, lse = dense(q[None], k[None], v[None], causal, sm_scale)
    assert (logits_soft_cap, return_lse) == (None, True)
    return out[0], lse[0].T / math.log(2.0)


def memory_efficient(query, key, value, attn_bias=None, p=0.0, scale=None):
    assert query.shape[2] == key.shape[2], "heads are repeated"
    return dense(query, key, value, attn_bias == "bottom-right", scale)[0]


def parallel(q, k, v, g=None, scale=None):
    return dense(q, k, v, True, scale)[0]


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None):
    assert tensor_layout == "HND"
    return dense(*(x.transpose(1, 2) for x in (q, k, v)), is_causal, sm_scale)[0].transpose(1, 2)


class Layer:
    def __init__(self, heads, channels, num_gqa_groups=None, attention_dropout=0.1, qkv_format="sbhd",
                 attn_mask_type="causal", softmax_scale=None):  # fmt: skip
        assert (attention_dropout, qkv_format) == (0.0, "bshd")
        self.causal, self.scale = attn_mask_type == "causal_bottom_right", softmax_scale

    def __call__(self, q, k, v):
        return dense(q, k, v, self.causal, self.scale)[0].flatten(-2)


MASKS = SimpleNamespace(attn_bias=SimpleNamespace(LowerTriangularFromBottomRightMask=lambda: "bottom-right"))
STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn:fa2": {"flash_attn_func": fa2},
    "flash_attn:fa3": {"flash_attn_func": fa3},
    "flash_attn:fa4": {"flash_attn_func": fa4},
    "flashinfer:attention": {"single_prefill_with_kv_cache": prefill},
    "xformers:attention": {"memory_efficient_attention": memory_efficient, "fmha": MASKS},
    "fla:attention": {"parallel_attn": parallel},
    "sage:attention": {"sageattn": sageattn},
    "transformer_engine:attention": {"DotProductAttention": Layer},
}


@pytest.mark.parametrize("causal", ["none", "bottom-right"])
@pytest.mark.parametrize("name", STAND_INS)
def test_an_adapter_speaks_the_conventions_of_its_library(
    name: str, causal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = ModuleType(ABSENT[name][0])
    vars(stand_in).update(STAND_INS[name])
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    if name == "fla:attention" and causal == "none":
        return  # causal only
    case = Case(**{**CASE, "q_len": 33}, dtype="fp16", causal=causal, scale=0.25)
    method = methods.get(f"effattn.adapters.{name}@default")
    output = method(case, case.tensors())
    verdict = judge(case, method)
    assert verdict.outcome == Outcome.PASS, verdict.message
    assert (output.lse is not None) == (name in ("flash_attn:fa2", "flash_attn:fa4", "flashinfer:attention"))
