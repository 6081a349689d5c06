"""The generators of cases reach what they promise: tests of the tests."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from effattn.case import CAUSAL, DTYPES, Case
from effattn.errors import RequestError
from effattn.judge import judge
from effattn.methods.user import UserFunction
from effattn.properties import menus, profiles, regimes
from effattn.properties.strategies import cases, head_dims, layouts, lengths
from effattn.verdict import Outcome

#: The list of cases of each profile. A change of the menus or of a profile changes it, and with it every
#: recorded run and the figures in the README: such a change is meant, or it is a mistake.
RECORDED = {"smoke": "bb7e152673d07b40", "ci": "4caac7d3a60ee885"}

#: The same of the cases without options and gradients.
RECORDED_PLAIN = {"smoke": "0c92cde23eea2422", "ci": "f2986f7726e8876d"}


def padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


@pytest.mark.parametrize("profile", profiles.PROFILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_regime_is_reached(profile: str, dtype: str) -> None:
    reached = Counter(name for case in profiles.cases(profile, dtype=dtype) for name in regimes.of(case))
    missed = {
        regime.name: reached[regime.name] for regime in regimes.all_regimes() if reached[regime.name] < 2
    }
    assert not missed


@pytest.mark.parametrize("profile", profiles.PROFILES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_option_is_reached(profile: str, dtype: str) -> None:
    drawn = profiles.cases(profile, dtype=dtype)
    alone = {regimes.options_of(case) + ("backward",) * case.backward for case in drawn}
    assert alone >= {(name,) for name in menus.OPTIONS} | {(name, "backward") for name in menus.OPTIONS} | {
        ("backward",)
    }
    assert any(len(regimes.options_of(case)) == 2 and case.backward for case in drawn)
    assert {case.causal for case in drawn} == set(CAUSAL)
    assert {case.values for case in drawn} == set(menus.value_names())
    assert {suffix for case in drawn for suffix in case.layout.split("+")[1:]} == {
        "pad", "offset", "step", "expand-b", "expand-h", "expand-s",
    }  # fmt: skip
    assert {case.dtype for case in drawn} == {dtype}
    assert len({case.id for case in drawn}) == len(drawn), "a case is drawn twice"


def test_the_first_cases_of_a_long_profile_have_every_option_with_gradients() -> None:
    first = profiles.cases("ci", dtype="bf16")[:50]
    assert {regimes.options_of(case) for case in first if case.backward} >= {
        (name,) for name in menus.OPTIONS
    } | {()}
    assert sum(case.plain and not case.backward for case in first) == 25


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_windows_cut_and_alignments_differ_where_a_mistake_in_them_has_to_show(profile: str) -> None:
    drawn = profiles.cases(profile, dtype="fp32")
    for case in drawn:
        if case.window is not None:
            assert regimes.cuts(case.window, case.q_len, case.kv_len), case
        if case.alibi != "none":
            assert case.q_len != case.kv_len, case
        if "b" not in case.bias.split(":")[0] and case.bias != "none":
            assert case.batch > 1, case


@pytest.mark.parametrize(
    ("window", "q_len", "kv_len", "cut"),
    [((7, 40), 65, 65, True), ((7, 40), 65, 41, False), ((64, 64), 65, 64, False), ((8, -1), 1, 9, False),
     ((8, -1), 1, 10, True), ((-1, 0), 1, 9, False), ((-1, 0), 2, 9, True)],
)  # fmt: skip
def test_what_a_window_cuts(window: tuple[int, int], q_len: int, kv_len: int, cut: bool) -> None:
    left, right = window
    at = [i + kv_len - q_len for i in range(q_len)]
    hidden_left = left < 0 or any(0 <= place - left - 1 < kv_len for place in at)
    hidden_right = right < 0 or any(0 <= place + right + 1 < kv_len and place >= 0 for place in at)
    assert regimes.cuts(window, q_len, kv_len) == (hidden_left and hidden_right) == cut


@pytest.mark.parametrize(("profile", "least", "most"), [("smoke", 100, 125), ("ci", 400, 600)])
def test_number_of_cases(profile: str, least: int, most: int) -> None:
    assert least <= len(profiles.cases(profile, dtype="fp16")) <= most


def test_smoke_compiles_few_kernels() -> None:
    # A kernel is compiled for padded head dimensions, and some kernels for each kind of mask.
    kinds = {
        (padded(case.head_dim), padded(case.v_dim), case.causal != "none")
        for case in profiles.cases("smoke", dtype="fp16")
    }
    assert len(kinds) <= 12


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_profile_ends_with_cases_of_thousands_of_keys(dtype: str) -> None:
    drawn, count = profiles.cases("ci", dtype=dtype), 2 * len(profiles.CI.longest) + 1
    before, long = drawn[:-count], drawn[-count:]
    assert max(case.kv_len for case in before) < 1024 < min(case.kv_len for case in long)
    assert {(case.q_len, case.kv_len) for case in long} == {
        (m, n) for n in (1031, 2053, 4099) for m in (1, 17, 65)
    }
    assert {case.head_dim for case in long} == {64, 40}
    assert [(case.q_len, case.kv_len) for case in long if case.backward] == [(65, 1031)]
    assert max(case.heads * case.q_len * case.kv_len for case in long) <= profiles.CI.most_scores
    assert profiles.cases(replace(profiles.CI, longest=()), dtype=dtype) == before


def test_a_kernel_that_forgets_keys_beyond_some_length_is_found() -> None:
    def short(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x[:, :, : short.end].repeat_interleave(q.shape[1] // x.shape[1], 1).double() for x in (k, v))
        return ((q.double() @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).to(q.dtype)

    cases = [
        case for case in profiles.cases("ci", dtype="fp16") if case.kv_len > 1024 and case.causal == "none"
    ]
    cases = [case for case in cases if not case.backward]
    method = UserFunction(short, spec="made:short")
    for short.end in (1024, 2048, 4090, 4099):  # type: ignore[attr-defined]
        for case in cases:
            right = judge(case, method).outcome == Outcome.PASS
            assert right == (case.kv_len <= short.end), case  # type: ignore[attr-defined]


@pytest.mark.parametrize("profile", profiles.PROFILES)
def test_profile_is_the_recorded_one(profile: str) -> None:
    drawn = profiles.cases(profile, dtype="fp16")
    plain = [case for case in drawn if case.plain and not case.backward]
    for cases_of, recorded in ((plain, RECORDED_PLAIN), (drawn, RECORDED)):
        lines = "\n".join(case.to_json() for case in cases_of)
        assert hashlib.sha256(lines.encode()).hexdigest()[:16] == recorded[profile]


def test_profile_has_the_same_shapes_in_every_dtype() -> None:
    fp16, fp32 = (
        # A bias in fp32 is one in the dtype of q there.
        [
            {**case.to_dict(), "dtype": "", "bias": case.bias.removesuffix(":fp32")}
            for case in profiles.cases("smoke", dtype=dtype)
        ]
        for dtype in ("fp16", "fp32")
    )
    assert fp16 == fp32


def test_profile_does_not_need_hypothesis() -> None:
    # Its list must not depend on a version of Hypothesis.
    code = (
        "import sys; from effattn.properties import profiles; profiles.cases('smoke', dtype='fp16');"
        "sys.exit('hypothesis' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("name", "words"), [("quick", "smoke, ci"), ("nightly", "reserved")])
def test_unknown_profile_is_named(name: str, words: str) -> None:
    with pytest.raises(RequestError, match=name) as raised:
        profiles.cases(name, dtype="fp16")
    assert words in str(raised.value)


def test_with_values_keeps_shapes_and_drops_repetitions() -> None:
    drawn = profiles.cases("smoke", dtype="bf16")
    changed = profiles.with_values(drawn, ["outliers", "constant"])
    assert {case.values for case in changed} == {"outliers", "constant"}
    assert len({case.id for case in changed}) == len(changed)
    assert {(case.q_len, case.kv_len) for case in changed} == {(case.q_len, case.kv_len) for case in drawn}


def test_hypothesis_reaches_every_regime() -> None:
    reached: Counter[str] = Counter()

    @settings(max_examples=600, derandomize=True, database=None)
    @given(case=cases())
    def draw_plain(case: Case) -> None:
        reached.update(regimes.of(case))

    # Apart, and more of them: what Hypothesis draws depends on what else the process has imported, and each option with
    # gradients is a small part of the cases.
    @settings(max_examples=1600, derandomize=True, database=None)
    @given(case=cases(options=tuple(menus.OPTIONS), backward=True))
    def draw(case: Case) -> None:
        reached.update(regimes.of(case))

    draw_plain()
    draw()
    missed = [r.name for r in regimes.all_regimes() if not reached[r.name] and not r.large]
    assert not missed


@given(case=cases(dtype="bf16", causal=["top-left"], values=["outliers"], most_length=50, most_head_dim=20))
def test_strategy_draws_what_is_asked_for(case: Case) -> None:
    assert case.dtype == "bf16"
    assert case.causal == "top-left"
    assert case.values == "outliers"
    assert max(case.q_len, case.kv_len) <= 50
    assert max(case.head_dim, case.v_dim) <= 20


@given(case=cases(most_length=100, most_scores=20_000))
def test_strategy_keeps_to_its_limit_of_work(case: Case) -> None:
    assert case.batch * case.heads * case.q_len * case.kv_len <= 20_000


@given(layout=layouts())
def test_layouts_are_layouts(layout: str) -> None:
    Case(q_len=3, kv_len=4, head_dim=2, dtype="fp16", layout=layout)


@pytest.mark.parametrize(
    "impossible",
    [
        lambda: cases(dtype="fp8"),
        lambda: cases(causal=["left"]),
        lambda: cases(causal=[]),
        lambda: cases(values=[]),
        lambda: cases(options=["windows"]),
        lambda: cases(most_length=300, most_scores=100),
        lambda: lengths(least=5, most=4),
        lambda: head_dims(most=0),
        lambda: head_dims(most=257),
    ],
)
def test_impossible_arguments_raise(impossible: Callable[[], object]) -> None:
    with pytest.raises(RequestError):
        impossible()
