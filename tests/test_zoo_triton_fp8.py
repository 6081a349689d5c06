"""An fp8 kernel in Triton, with `tl.dot` of e4m3, and the example of the documentation, on the CPU backend."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest

from effattn import methods
from effattn.case import Case
from effattn.judge import Outcome, judge

triton_fp8 = importlib.import_module("effattn.zoo.triton_fp8")

HALF = ("fp16", "bf16")
FAILED = {Outcome.INACCURATE, Outcome.BIASED, Outcome.NON_FINITE}

#: head dimensions that are padded alike, so that little is compiled
CASES: tuple[dict[str, Any], ...] = (
    {"heads": 2, "q_len": 1, "kv_len": 1, "head_dim": 32},
    {"heads": 2, "q_len": 0, "kv_len": 5, "head_dim": 32},
    {"heads": 2, "q_len": 70, "kv_len": 0, "head_dim": 32},
    {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 65, "kv_len": 200, "head_dim": 32},
    {"batch": 2, "heads": 4, "kv_heads": 1, "q_len": 130, "kv_len": 64, "head_dim": 24, "v_dim": 17},
    {"heads": 3, "q_len": 129, "kv_len": 257, "head_dim": 20, "causal": "bottom-right"},
    {"heads": 3, "q_len": 100, "kv_len": 70, "head_dim": 32, "causal": "bottom-right"},
    {"heads": 3, "q_len": 100, "kv_len": 170, "head_dim": 32, "values": "outliers"},
    {"heads": 3, "q_len": 100, "kv_len": 170, "head_dim": 32, "values": "large-logits"},
    {"heads": 3, "q_len": 100, "kv_len": 170, "head_dim": 32, "values": "growing-max", "scale": 0.3},
    {"heads": 8, "q_len": 256, "kv_len": 300, "head_dim": 32},
)


def cases(dtype: str) -> list[Case]:
    return [Case(dtype=dtype, seed=seed, **recipe) for seed, recipe in enumerate(CASES)]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "spec", ["effattn.zoo.triton_fp8:attention", "docs/examples/fp8_attention.py:attention"]
)
def test_the_right_kernels_pass(spec: str, dtype: str) -> None:
    method, outcomes = methods.get(spec), Counter[Outcome]()
    for case in cases(dtype):
        verdict = judge(case, method)
        assert verdict.outcome in (Outcome.PASS, Outcome.NOT_JUDGED), f"{case.describe()}: {verdict.message}"
        outcomes[verdict.outcome] += 1
    assert outcomes[Outcome.NOT_JUDGED] <= 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", triton_fp8.MUTANTS)
def test_every_wrong_one_is_found(name: str, dtype: str) -> None:
    method = methods.get(f"effattn.zoo.triton_fp8:{name}")
    outcomes = [judge(case, method).outcome for case in cases(dtype)[3:]]
    assert FAILED & set(outcomes), outcomes


def test_a_kernel_that_does_not_quantise_what_it_declares_is_told_so() -> None:
    case = Case(heads=2, q_len=64, kv_len=96, head_dim=32, dtype="fp16")
    verdict = judge(case, methods.get("flash@fp8-tensor"))
    assert verdict.outcome == Outcome.INACCURATE
    assert verdict.message.endswith("Q, K or V is not quantised as declared")
    other = judge(case, methods.get("effattn.zoo.triton_fp8:k_scale_forgotten"))
    assert other.outcome == Outcome.INACCURATE
    assert "not quantised as declared" not in other.message
