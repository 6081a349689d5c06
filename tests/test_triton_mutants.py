"""Wrong Triton kernels, compiled and run as a user's would be, must fail; what they come from must pass."""

from __future__ import annotations

import itertools

import pytest

from effattn import methods
from effattn.case import Case
from effattn.errors import RequestError
from effattn.judge import Outcome, judge
from effattn.zoo import triton_mutants

WRONG = {Outcome.INACCURATE, Outcome.BIASED, Outcome.NON_FINITE}
PAIRS = [(mutant.name, dtype) for mutant in triton_mutants.mutants() for dtype in mutant.dtypes]


@pytest.mark.parametrize(("name", "dtype"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_wrong_triton_kernel_is_rejected(name: str, dtype: str) -> None:
    mutant = triton_mutants.get(name)
    method = methods.get(f"effattn.zoo.triton_mutants:{name}")
    verdict = judge(Case(**mutant.case, dtype=dtype), method)
    assert verdict.outcome in WRONG, f"{mutant.what}: {verdict.message}"


@pytest.mark.parametrize("dtype", triton_mutants.ALL)
def test_the_kernel_itself_passes_every_case_of_the_mutants(dtype: str) -> None:
    cases = {Case(**mutant.case, dtype=dtype) for mutant in triton_mutants.mutants()}
    assert len(cases) > 5
    for case in cases:
        verdict = judge(case, methods.get("flash"))
        assert verdict.outcome is Outcome.PASS, verdict.message


def test_mutants_differ_from_the_kernel_and_from_each_other() -> None:
    sources = [triton_mutants.edited(m.edits, name=m.name) for m in triton_mutants.mutants()]
    sources.append(triton_mutants.edited((), name="none"))
    assert all(a != b for a, b in itertools.combinations(sources, 2))


@pytest.mark.parametrize(("text", "times"), [("no such text", 0), ("tl.dot(", 2)])
def test_an_edit_that_no_longer_fits_the_source_is_refused(text: str, times: int) -> None:
    with pytest.raises(RequestError, match=rf"mutant 'mine'.*occurs {times} times.*the kernel has changed"):
        triton_mutants.edited(((text, ""),), name="mine")


def test_unknown_mutant_is_answered_with_the_right_ones() -> None:
    with pytest.raises(RequestError, match=r"unknown mutant 'tf23'.*did you mean 'tf32'"):
        triton_mutants.get("tf23")
    with pytest.raises(RequestError, match="has no function 'tf23'"):
        methods.get("effattn.zoo.triton_mutants:tf23")
