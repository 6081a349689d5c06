"""Kernels whose operands are quantised: right ones pass, wrong ones are found, and tests alarm no more often than they say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from scipy import stats

from effattn import methods, zoo
from effattn.case import Case
from effattn.errors import RequestError
from effattn.judge import Outcome, judge
from effattn.properties import profiles

HALF = ("fp16", "bf16")
FAILED = {Outcome.INACCURATE, Outcome.BIASED, Outcome.NON_FINITE}
RIGHT = [s.name for s in zoo.specimens(right=True, quantised=True)]
WRONG = [s.name for s in zoo.specimens(right=False, quantised=True)]

#: a level that can be checked by simulation
LEVEL = 1e-2


def drawn(dtype: str, repeats: int) -> list[Case]:
    """Small cases of every regime without gradients, drawn under a name that no profile has."""
    smaller: dict[str, Any] = {
        "lengths": (1, 2, 5, 8, 15, 16, 17, 31, 33),
        "long_lengths": (129, 211, 257),
        "most_scores": 12_000,
        "option_lengths": (1, 2, 5, 16, 17, 33, 97),
        "option_dims": ((33, None), (7, None)),
        "most_option_scores": 5_000,
    }
    profile = replace(profiles.get("smoke"), name="quantised", repeats=repeats, **smaller)
    return [case for case in profiles.cases(profile, dtype=dtype) if not case.backward]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", RIGHT)
def test_no_right_kernel_is_called_wrong(name: str, dtype: str) -> None:
    method, outcomes = zoo.get(name).method(), Counter[Outcome]()
    for case in drawn(dtype, 2):
        verdict = judge(case, method)
        outcomes[verdict.outcome] += 1
        assert verdict.outcome not in FAILED, f"{case.to_json()}: {verdict.message}"
        assert verdict.outcome in (Outcome.PASS, Outcome.NOT_SUPPORTED, Outcome.NOT_JUDGED), verdict.message
    assert outcomes[Outcome.PASS] >= 55
    assert outcomes[Outcome.NOT_JUDGED] <= 10


def without_lse(specimen: zoo.Specimen) -> Any:
    """The same kernel where nobody asks for the log-sum-exp, which is fp32 and shows most mistakes at once."""
    method = specimen.method()
    whole = method.function  # type: ignore[attr-defined]

    def out(*args: Any, **keywords: Any) -> Any:
        return whole(*args, **keywords)[0]

    method.function = out  # type: ignore[attr-defined]
    return method


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_kernel_is_found_within_50_cases_of_the_ci_profile(name: str, dtype: str) -> None:
    specimen = zoo.get(name)
    method = specimen.method() if name == "p-offset-in-lse" else without_lse(specimen)
    outcomes = Counter[Outcome]()
    for case in islice(profiles.cases("ci", dtype=dtype), 50):
        outcomes[judge(case, method).outcome] += 1
        if FAILED & set(outcomes):
            return
    pytest.fail(f"{name} in {dtype}: {outcomes}")


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-block-32", "int8-fp8"])
def test_tests_alarm_no_more_often_than_they_say(name: str) -> None:
    """At a level that can be counted, over cases with new inputs each: all that P and codes share is in them."""
    alarms, cases = Counter[str](), 0
    for seed in range(150):
        for recipe in (
            {"heads": 4, "q_len": 33, "kv_len": 65, "head_dim": 16},
            {"heads": 2, "kv_heads": 1, "q_len": 50, "kv_len": 80, "head_dim": 8, "values": "uniform"},
        ):
            case = Case(dtype="bf16", seed=1000 + seed, **recipe)  # type: ignore[arg-type]
            cases += 1
            alarms.update(findings(case, zoo.get(name).method()))
    limit = stats.binom.ppf(1.0 - 1e-6, cases, LEVEL)
    assert all(n <= limit for n in alarms.values()), (alarms, limit)


def findings(case: Case, method: Any) -> list[str]:
    """The names of the tests that alarm at `LEVEL`."""
    from effattn import exact as reference
    from effattn.exact import Options
    from effattn.judgement import Judgement
    from effattn.tolerances.envelope import forward_envelope
    from effattn.tolerances.quantise import multiplied
    from effattn.tolerances.statistics import examine

    declared, inputs = method.numerics(case), case.tensors()
    read = multiplied(inputs, declared)
    options = Options.of(case, read.inputs)
    exact = reference.attention(*read.inputs, scale=case.softmax_scale)
    envelope = forward_envelope(
        *read.inputs, numerics=declared, exact=exact, options=options, radius=read.radius
    )
    judgement = Judgement(case, read.inputs, method(case, inputs), declared, options, exact, envelope)
    errors = judgement._errors_of_out()
    assert errors is not None
    return [finding.name for finding in examine(errors, alarm=LEVEL)]


def test_an_error_that_all_rows_share_is_no_alarm_where_it_may_be() -> None:
    """One entry of V between two codes, and all rows put nearly all weight on it: all errors are one error."""
    v = np.zeros((1, 1, 3, 1))
    v[0, 0, :, 0] = (7.0, 5.25, 1.0)
    import torch

    from effattn.case import Inputs
    from effattn.judge import judge_output
    from effattn.methods.base import Output
    from effattn.tolerances.codes import Codes
    from effattn.tolerances.numerics import for_dtype

    case = Case(q_len=512, kv_len=3, head_dim=1, dtype="fp16", scale=1.0)
    generator = torch.Generator().manual_seed(3)
    q = (8.0 + 0.25 * torch.rand((1, 1, 512, 1), generator=generator)).half()
    k = torch.tensor([-1.0, 1.0, 0.0]).reshape(1, 1, 3, 1).half()
    inputs = Inputs(q, k, torch.from_numpy(v).half())
    declared = for_dtype("fp16", "flash").replace(v=Codes(scale="tensor"))
    weights = (q.double() @ k.double().mT).softmax(-1)
    for code, outcome in ((320.0, Outcome.PASS), (352.0, Outcome.PASS), (384.0, Outcome.INACCURATE)):
        stands_for = torch.tensor([448.0, code, 64.0], dtype=torch.float64).reshape(1, 1, 3, 1) * (
            7.0 / 448.0
        )
        out = (weights @ stands_for).half()
        assert judge_output(case, inputs, Output(out), declared).outcome == outcome


@pytest.mark.parametrize("name", RIGHT + WRONG)
def test_kernels_say_what_they_do_and_have_names_for_the_command_line(name: str) -> None:
    specimen = zoo.get(name)
    assert specimen.what.endswith(".")
    assert len(specimen.what) > 10
    method = methods.get(specimen.method().spec)
    assert method.spec == "effattn.zoo:" + name.replace("-", "_")
    assert method.declares
    full = Case(q_len=2, kv_len=2, head_dim=4, dtype="fp32")
    assert judge(full, method).message == "not supported: the kernel is for fp16, bf16"


def test_they_are_not_among_the_kernels_that_declare_nothing() -> None:
    assert not set(RIGHT + WRONG) & {s.name for s in zoo.specimens()}
    with pytest.raises(RequestError, match="Did you mean fp8-tensor"):
        zoo.get("fp8-tensr")
