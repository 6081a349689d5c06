"""Tests of the tests: every wrong kernel of the zoo is found, and no right one is."""

from __future__ import annotations

import pytest

from effattn import methods, zoo
from effattn.case import DTYPES, Case
from effattn.errors import RequestError
from effattn.judge import Outcome, judge
from effattn.zoo import cases as modest

WRONG = [(s.name, dtype) for s in zoo.specimens(right=False) for dtype in s.dtypes]
RIGHT = [s.name for s in zoo.specimens(right=True)]
FAILED = {Outcome.INACCURATE, Outcome.BIASED, Outcome.NON_FINITE}

#: kernels that loop over keys or features in Python
SLOW = {"flash-key-by-key", "one-running-sum", "term-by-term"}


def listed(specimen: zoo.Specimen, dtype: str) -> list[Case]:
    """The cases that its kind of kernel offers."""
    return modest.option_cases(dtype) if specimen.offers_options else modest.cases(dtype)


@pytest.mark.parametrize(("name", "dtype"), WRONG)
def test_every_wrong_kernel_is_found(name: str, dtype: str) -> None:
    specimen = zoo.get(name)
    shown = [case for case in listed(specimen, dtype) if specimen.shows(case)]
    assert shown, "the list has no case for it"
    outcomes = []
    for case in shown:
        outcomes.append(judge(case, specimen.method()).outcome)
        if outcomes[-1] in FAILED:
            return
    pytest.fail(f"{name} in {dtype}: {outcomes}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RIGHT)
def test_no_right_kernel_is_called_wrong(name: str, dtype: str) -> None:
    method = zoo.get(name).method()
    for case in listed(zoo.get(name), dtype):
        if name in SLOW and case.q_len * case.kv_len > 128 * 128:
            continue
        verdict = judge(case, method)
        assert verdict.outcome == Outcome.PASS, f"{case.describe()}: {verdict.message}"


@pytest.mark.parametrize(
    ("name", "dtype"), [("scores-in-input-dtype", "fp32"), ("log2e-of-5-digits", "bf16")]
)
def test_a_kernel_that_makes_no_difference_in_a_dtype_passes_in_it(name: str, dtype: str) -> None:
    assert dtype not in zoo.get(name).dtypes
    for case in modest.cases(dtype)[:4]:
        assert judge(case, zoo.get(name).method()).outcome == Outcome.PASS


@pytest.mark.parametrize("specimen", zoo.specimens(), ids=lambda s: s.name)
def test_kernels_say_what_they_do_and_have_names_for_the_command_line(specimen: zoo.Specimen) -> None:
    assert len(specimen.what) > 10
    assert specimen.what.endswith(".")
    method = methods.get(specimen.method().spec)
    assert method.spec == "effattn.zoo:" + specimen.name.replace("-", "_")
    assert method.spec.split(":")[1].isidentifier()


def test_an_unknown_kernel_is_answered_with_those_like_it() -> None:
    with pytest.raises(
        RequestError, match=r"no kernel 'output-times-1-01'\. Did you mean output-times-1-001"
    ):
        zoo.get("output-times-1-01")
    with pytest.raises(AttributeError, match="no kernel 'flahs'"):
        _ = zoo.flahs
