"""The laws: what keeps them passes, each finds what breaks it, and what cannot show them says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import effattn
from effattn import laws, methods
from effattn.case import DTYPES, Case
from effattn.errors import RequestError
from effattn.expected import ACCURACY, expected_failures
from effattn.judge import judge
from effattn.methods.user import UserFunction
from effattn.properties import catalogue, law_draws
from effattn.properties.law import FAMILIES, LAWS, Law, get
from effattn.properties.visible import visible
from effattn.run import store
from effattn.verdict import Outcome
from effattn.zoo import lawless
from effattn.zoo.dense import Dense

ALL = list(catalogue.all_laws().values())
BY_NAME = catalogue.all_laws()
TORCH = Path(__file__).parent.parent / "properties" / "expected" / "torch.toml"


def dense(kernel: type[Dense] = Dense, name: str = "dense") -> UserFunction:
    return UserFunction(lawless.function_of(kernel, name), spec=f"effattn.zoo:{name.replace('-', '_')}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_a_right_kernel_keeps_the_law(law: Law, dtype: str) -> None:
    tried = laws.try_law(law, dense(), dtype=dtype)
    assert tried.failure is None, laws.explain(tried)
    assert tried.judged, tried.why_not


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_that_wrong_ones_are_made_of_is_right(dtype: str) -> None:
    tried = laws.try_accuracy(dense(), dtype=dtype, shrinking=False)
    assert tried.failure is None, laws.explain(tried)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_torch_keeps_the_law(law: Law, dtype: str) -> None:
    tried = laws.try_law(law, methods.get("torch"), dtype=dtype, profile="brief")
    known = [entry for entry in expected_failures(TORCH) if entry.covers(law.name, dtype)]
    assert tried.failure is None or known, laws.explain(tried)


@pytest.mark.parametrize("name", lawless.LAWLESS)
def test_a_kernel_that_breaks_a_law_is_found_by_it(name: str) -> None:
    kernel = lawless.LAWLESS[name]
    law = get(lawless.BROKEN_LAW[name])
    for dtype in ("fp16", "fp32"):
        tried = laws.try_law(law, dense(kernel, name), dtype=dtype)
        if tried.failure is not None:
            assert tried.failure.outcome in (Outcome.LAW_BROKEN, Outcome.WRONG_SHAPE)
            assert law.sentence in laws.explain(tried) or tried.failure.outcome == Outcome.WRONG_SHAPE
            return
    pytest.fail(f"{law.name} does not find {name}")


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_laws_are_sentences_with_a_statement_in_a_family(law: Law) -> None:
    assert law.family in FAMILIES
    assert len(law.statement) > 25
    assert law.statement.endswith(".") or law.statement.endswith(")")


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_cases_of_a_law_are_drawn_the_same_and_are_what_it_speaks_of(law: Law) -> None:
    for dtype in ("fp16", "bf16"):
        cases = laws.cases_of(law, "smoke", dtype)
        assert cases == laws.cases_of(law, "smoke", dtype)
        assert len(cases) >= 2
        assert all(law.holds(case) and case.dtype == dtype for case in cases)


def test_every_option_is_drawn_by_the_laws_in_smoke() -> None:
    reached = {
        option
        for law in ALL
        for case in laws.cases_of(law, "smoke", "fp16")
        for option in law_draws.ALL_OPTIONS
        if getattr(case, option) not in (None, "none", False)
    }
    assert reached == set(law_draws.ALL_OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_of_the_laws_is_that_of_the_reference(dtype: str) -> None:
    from effattn.exact import Options
    from effattn.exact.scores import score_blocks

    compared = 0
    for law in ALL:
        for case in laws.cases_of(law, "smoke", dtype)[:2]:
            inputs = case.tensors()
            seen = visible(case, inputs).flatten(0, 1)
            wide = [x.double() for x in inputs]
            for block in score_blocks(*wide, Options.of(case, inputs)):
                assert bool((block.visible == seen[block.pairs, block.queries]).all()), case
                compared += 1
    assert compared > 50


def test_what_a_method_raises_is_its_crash_and_what_a_law_raises_is_not() -> None:
    def raising(q, k, v, *, causal=False, scale=None):
        raise ZeroDivisionError("by the kernel")

    case = Case(q_len=5, kv_len=9, head_dim=16, dtype="fp16")
    for name in ("columns_of_v_do_not_mix", "outputs_lie_in_memory_of_their_own"):
        verdict = laws.judge_law(get(name), case, UserFunction(raising))
        assert verdict.outcome == Outcome.CRASHED
        assert "ZeroDivisionError: by the kernel" in verdict.message
    broken = dataclasses.replace(get("columns_of_v_do_not_mix"), check=lambda it: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        laws.judge_law(broken, case, dense())


@pytest.mark.parametrize("law", ALL, ids=lambda law: law.name)
def test_a_law_takes_the_empty_cases_that_shrinking_makes(law: Law) -> None:
    for case in laws.cases_of(law, "smoke", "fp16")[:2]:
        for changes in ({"q_len": 0}, {"kv_len": 0}, {"q_len": 0, "kv_len": 0}, {"q_len": 1, "kv_len": 1}):
            smaller = dataclasses.replace(case, **changes)
            verdict = laws.judge_law(law, smaller, dense())
            assert not laws.failed(verdict), verdict.message


def test_an_unknown_law_is_answered_with_those_like_it() -> None:
    with pytest.raises(RequestError, match=r"did you mean .*future_keys_have_no_influence"):
        get("future_keys_have_influence")


# -- for third parties ---------------------------------------------------------------------------------------------

PLAIN = """
import torch

def attention(q, k, v, *, causal=False, scale=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).float() for x in (k, v))
    scores = q.float() @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        q_len, kv_len = scores.shape[-2:]
        hidden = torch.ones(q_len, kv_len, dtype=torch.bool).triu(kv_len - q_len + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num()
    return (weights @ v).to(q.dtype)
"""


def _function(text: str, name: str = "attention") -> Callable[..., Any]:
    space: dict[str, Any] = {"__name__": "tests.made"}
    exec(text, space)
    return space[name]


#: laws that a function with causal and scale alone can be asked
BASIC = (
    "future_keys_have_no_influence",
    "a_row_that_sees_no_key_is_zero",
    "the_diagonal_is_seen",
    "dv_and_the_output_agree",
    "gradients_are_derivatives_of_the_output",
    "rows_that_see_no_key_have_no_gradient",
    "future_keys_do_not_reach_dq",
)


@pytest.mark.parametrize("name", BASIC)
def test_a_plain_signature_is_asked_as_many_cases_as_any(name: str) -> None:
    method = UserFunction(_function(PLAIN))
    cases = laws.cases_of(get(name), "smoke", "bf16", method)
    assert cases == laws.cases_of(get(name), "smoke", "bf16", method)
    assert len(cases) == 4
    assert all(method.unsupported(case) is None for case in cases)
    if "row_that_sees_no_key" in name:
        assert all(case.q_len > case.kv_len for case in cases)


def test_the_alignment_that_is_declared_is_asked() -> None:
    for alignment in ("bottom-right", "top-left"):
        method = UserFunction(effattn.method(causal_alignment=alignment)(_function(PLAIN)))
        cases = laws.cases_of(get("future_keys_have_no_influence"), "smoke", "fp32", method)
        assert len(cases) == 4
        assert all(case.causal == alignment or case.q_len == case.kv_len for case in cases)


def test_what_cannot_be_asked_is_one_case_that_says_why() -> None:
    method = UserFunction(_function(PLAIN))
    for name, keyword in (
        ("keys_that_nobody_sees_have_no_gradient", "mask"),
        ("appended_hidden_keys_change_nothing", "kv_lengths"),
        ("alibi_is_its_bias", "alibi_slopes"),
    ):
        tried = laws.try_law(get(name), method, dtype="fp32")
        assert [v.outcome for v in tried.verdicts] == [Outcome.NOT_SUPPORTED]
        assert f"no keyword `{keyword}`" in tried.why_not


def test_a_method_that_answers_by_raising_is_asked_other_cases() -> None:
    dense_function = lawless.function_of(Dense, "dense")

    def short(q, k, v, *, causal=False, scale=None):
        if q.shape[2] > 64:
            raise NotImplementedError("more than 64 queries")
        return dense_function(q, k, v, causal=causal, scale=scale)

    tried = laws.try_law(get("columns_of_v_do_not_mix"), UserFunction(short), dtype="fp32")
    assert tried.judged == 4, tried.verdicts
    assert len(tried.verdicts) > 4


def test_nan_behind_the_mask_is_found_and_named() -> None:
    for name in ("future_keys_have_no_influence", "future_keys_do_not_reach_dq"):
        with pytest.raises(AssertionError, match=r"0 \* NaN .* in a masked tile.*nan_safe=False"):
            effattn.check(_function(PLAIN), laws=[name], dtypes=["fp32"], accuracy=False)
        declared = effattn.method(nan_safe=False, same_bits=False)(_function(PLAIN))
        assert effattn.check(declared, laws=[name], dtypes=["fp32"], accuracy=False) == {name: 4}


def test_check_judges_a_function_and_counts() -> None:
    function = lawless.function_of(Dense, "dense")
    judged = effattn.check(function, laws=["one_key_returns_its_value"], dtypes=["fp32"], accuracy=False)
    assert judged == {"one_key_returns_its_value": 4}


def test_check_raises_with_the_law_where_got_expected_and_the_lines_that_repeat_it() -> None:
    function = lawless.function_of(lawless.LAWLESS["empty-rows-nan"], "empty-rows-nan")
    with pytest.raises(AssertionError) as caught:
        effattn.check(function, laws=["a_row_that_sees_no_key_is_zero"], dtypes=["fp16"], accuracy=False)
    text = str(caught.value)
    assert "a row that sees no key is zero" in text
    assert "out[0, 0, 0, 0] is nan; expected 0.0" in text
    assert "effattn replay" in text
    assert "--law a_row_that_sees_no_key_is_zero" in text


def test_check_refuses_a_request_of_which_nothing_was_judged() -> None:
    with pytest.raises(RequestError, match="nothing was judged"):
        effattn.check(_function(PLAIN), laws=["alibi_is_its_bias"], dtypes=["fp16"], accuracy=False)


def test_a_difference_in_bits_that_is_rounding_says_what_to_declare() -> None:
    function = lawless.function_of(lawless.LAWLESS["a-split-by-the-batch"], "a-split-by-the-batch")
    names = ["a_row_does_not_depend_on_its_neighbours_in_the_batch"]
    with pytest.raises(AssertionError, match=r"all of them are within rounding.*same_bits=False"):
        effattn.check(function, laws=names, dtypes=["fp32"], accuracy=False)
    declared = effattn.method(same_bits=False)(function)
    assert effattn.check(declared, laws=names, dtypes=["fp32"], accuracy=False)


@pytest.mark.parametrize(
    "name", ["keys_beyond_the_length_have_no_influence", "nan_in_a_value_reaches_the_rows_that_see_it"]
)
def test_nan_of_a_hidden_value_says_what_to_mend_or_declare(name: str) -> None:
    kernel = "hidden-values-times-zero"
    function = lawless.function_of(lawless.LAWLESS[kernel], kernel)
    with pytest.raises(AssertionError, match=r"a weight of 0 does not hide a value.*nan_safe=False"):
        effattn.check(function, laws=[name], dtypes=["fp32"], profile="ci", accuracy=False)
    declared = effattn.method(nan_safe=False)(function)
    assert effattn.check(declared, laws=[name], dtypes=["fp32"], profile="ci", accuracy=False)


TEST_FILE = """
import effattn
from kernel import attention

@effattn.parametrize_with_laws(attention, laws={laws!r}, dtypes=["fp16"], accuracy=False, expected={expected!r})
def test_attention(check):
    check()
"""


def _run(
    pytester: pytest.Pytester, kernel: str, *, names: list[str], expected: str | None = None
) -> pytest.RunResult:
    pytester.makepyfile(kernel=kernel, test_kernel=TEST_FILE.format(laws=names, expected=expected))
    pytester.syspathinsert()
    return pytester.runpytest_subprocess("-q", "--junitxml=out.xml", "-p", "no:cacheprovider")


def test_a_test_of_five_lines_gets_the_suite(pytester: pytest.Pytester) -> None:
    result = _run(pytester, PLAIN, names=["values", "alibi_is_its_bias"])
    outcome = result.parseoutcomes()
    assert outcome.get("failed", 0) == 0
    assert outcome["passed"] >= 8
    assert outcome["skipped"] >= 1
    result.stdout.fnmatch_lines(["*effattn: laws*", "*attention fp16: * laws judged on * cases, 0 broken;*"])
    result.stdout.fnmatch_lines(
        ["*not judged, the function has no keyword `alibi_slopes`: alibi_is_its_bias"]
    )
    xml = (pytester.path / "out.xml").read_text()
    assert 'name="effattn_law" value="one_key_returns_its_value"' in xml


def test_the_triton_kernel_of_the_page_gets_the_suite_by_its_five_lines(pytester: pytest.Pytester) -> None:
    examples = Path(__file__).parent.parent / "docs" / "examples"
    test = (
        (examples / "test_my_attention.py")
        .read_text()
        .replace("my_attention import", "triton_attention import")
    )
    pytester.makepyfile(triton_attention=(examples / "triton_attention.py").read_text(), test_it=test)
    result = pytester.runpytest_subprocess(
        "-q", "--effattn-dtype", "fp32", "-k", "one_key or dominant_key or strides_do or alibi_is", "-p", "no:cacheprovider",
    )  # fmt: skip
    outcome = result.parseoutcomes()
    assert (outcome["passed"], outcome["skipped"], outcome.get("failed", 0)) == (3, 1, 0)
    result.stdout.fnmatch_lines(
        ["*triton_attention:attention fp32: 3 laws judged on 12 cases, 0 broken; 1 not judged"]
    )


def test_a_broken_law_fails_its_test_and_no_other(pytester: pytest.Pytester) -> None:
    wrong = PLAIN.replace("(weights @ v)", "(weights @ v).abs()")
    result = _run(
        pytester,
        wrong,
        names=["negated_values_negate_the_output", "one_hot_values_show_weights_that_sum_to_one"],
    )
    result.assert_outcomes(failed=1, passed=1)
    result.stdout.fnmatch_lines(["*law broken: negated values negate the output*"])


def test_expected_failures_have_reasons_and_must_happen(pytester: pytest.Pytester) -> None:
    wrong = PLAIN.replace("(weights @ v)", "(weights @ v).abs()")
    names = ["negated_values_negate_the_output", "one_hot_values_show_weights_that_sum_to_one"]
    path = pytester.path / "expected.toml"
    path.write_text('[[expected]]\nlaw = "negated_values_negate_the_output"\nreason = "takes the size"\n')
    result = _run(pytester, wrong, names=names, expected=str(path))
    result.assert_outcomes(passed=1, xfailed=1)
    result = _run(pytester, PLAIN, names=names, expected=str(path))
    result.assert_outcomes(passed=1, failed=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[expected]]\nlaw = "no_such_law"\nreason = "x"\n', "unknown law"),
        ('[[expected]]\nlaw = "alibi_is_its_bias"\n', "expected law, reason"),
        ('[[expected]]\nlaw = "alibi_is_its_bias"\nreason = " "\n', "has no reason"),
        ('[[expected]]\nlaw = "alibi_is_its_bias"\nreason = "x"\ndtype = "bf16"\n', "matches no test"),
        ("[[expected", "Expected TOML"),
        ('[[expected]]\nlaw = "alibi_is_its_bias"\nreason = "x"\ndtype = "half"\n', "dtype 'half'"),
        ("[other]\n", "expected \\[\\[expected\\]\\] entries only"),
    ],
)
def test_wrong_files_of_expected_failures_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "expected.toml"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        effattn.parametrize_with_laws(len, laws=["alibi_is_its_bias"], dtypes=["fp16"], expected=path)


def test_the_suite_runs_without_a_test_file(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(kernel=PLAIN)
    result = pytester.runpytest_subprocess(
        "--pyargs", "effattn.suite", "--effattn-method", "kernel.py:attention", "--effattn-dtype", "fp32", "-q",
        "-k", "one_key or dominant_key", "-p", "no:cacheprovider",
    )  # fmt: skip
    result.assert_outcomes(passed=2, deselected=result.parseoutcomes()["deselected"])
    result = pytester.runpytest_subprocess("--pyargs", "effattn.suite", "-q", "-p", "no:cacheprovider")
    result.stdout.fnmatch_lines(["*which method?*"])


# -- the command line ------------------------------------------------------------------------------------------------


def test_laws_are_listed_and_explained(effattn_command: Callable[..., tuple[int, str, str]]) -> None:
    code, out, _ = effattn_command("laws")
    assert code == 0
    assert all(law.name in out for law in ALL)
    code, out, _ = effattn_command("laws", "one_key_returns_its_value")
    assert code == 0
    assert "exp(0) / exp(0) = 1" in " ".join(out.split())
    code, _, err = effattn_command("laws", "one_key")
    assert code == 2
    assert "one_key_returns_its_value" in err


def test_the_gate_tries_laws_and_a_broken_one_fails_it(
    effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    arguments = ("--dtype", "fp16", "--laws", "a_row_that_sees_no_key_is_zero")
    code, out, _ = effattn_command(
        "gate", "effattn.zoo:empty_rows_nan", *arguments, "--out", tmp_path / "run"
    )
    assert code == 1
    assert "law broken, a row that sees no key is zero," in " ".join(out.split())
    assert "--law a_row_that_sees_no_key_is_zero" in out
    assert "laws fp16: 0 of 1 hold" in out


def test_the_gate_names_each_law_that_it_did_not_judge_with_the_reason(
    effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text(PLAIN)
    names = "alibi_is_its_bias,one_key_returns_its_value,slopes_of_zero_change_nothing,masked_keys_have_no_influence"
    code, out, _ = effattn_command(
        "gate",
        f"{kernel}:attention",
        "--dtype",
        "fp32",
        "--laws",
        names,
        "--out",
        tmp_path / "run",
        "--no-isolation",
    )
    assert code == 0, out
    assert "laws fp32: 1 of 1 hold, on 4 cases; 3 not supported" in out
    lines = [line for line in out.splitlines() if line.startswith("law")]
    assert lines[1:] == [
        "laws not supported, 2: the function has no keyword `alibi_slopes`",
        "law not supported, 1: the function has no keyword `mask`: masked_keys_have_no_influence",
    ]
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "`alibi_is_its_bias`, `slopes_of_zero_change_nothing`" in summary


def test_a_law_that_compares_nothing_in_any_case_is_no_pass(
    effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "the_diagonal_is_seen"
    monkeypatch.setitem(LAWS, name, dataclasses.replace(get(name), check=lambda it: None))
    arguments = ("--dtype", "fp32", "--laws", f"{name},values", "--out", tmp_path / "run", "--no-isolation")
    code, out, _ = effattn_command("gate", "torch", *arguments)
    assert code == 2
    assert f"law not judged, 1: there was nothing to compare: {name}" in out
    assert f"Nothing was judged of the law {name}: that is not a pass." in out


def test_laws_are_part_of_a_profile_unless_other_cases_or_instruments_are_asked_for(
    effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        PLAIN.replace(
            "import torch", "import torch, effattn\n@effattn.method(supports=lambda case: False)", 1
        )
    )
    for number, (arguments, tried) in enumerate(
        {
            (): True,
            ("--laws", "none"): False,
            ("--values", "normal"): False,
            ("--laws", "values", "--values", "normal"): True,
        }.items()
    ):
        folder = tmp_path / str(number)
        code, _, _ = effattn_command(
            "gate", f"{kernel}:attention", "--dtype", "fp16", *arguments, "--out", folder
        )
        assert code == 2
        laws_tried = {v.law for v in store.read_verdicts(folder) if v.law is not None}
        assert bool(laws_tried) == tried
        if not arguments:
            assert laws_tried == set(BY_NAME)


def test_expected_failures_are_shown_and_do_not_fail_a_gate(
    effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    gate = ("gate", "torch", "--dtype", "fp32", "--laws", "nan_in_a_query_reaches_its_row_alone,values")
    code, out, _ = effattn_command(*gate, "--out", tmp_path / "1")
    assert code == 1
    assert "It breaks 1 law." in out
    code, out, _ = effattn_command(*gate, "--out", tmp_path / "2", "--expected", TORCH)
    assert code == 0, out
    assert "as expected, nan_in_a_query_reaches_its_row_alone failed in 1 case (pytorch #141128" in out
    assert "and failed 1 as expected." in out
    held = tmp_path / "held.toml"
    held.write_text(TORCH.read_text() + '[[expected]]\nlaw = "one_key_returns_its_value"\nreason = "none"\n')
    code, out, _ = effattn_command(*gate, "--out", tmp_path / "3", "--expected", held)
    assert code == 0, out
    assert "expected to fail, and held: one_key_returns_its_value" in out
    assert "failed in 1 cases, as expected" in (tmp_path / "3" / "summary.md").read_text()
    # One that this gate does not try, or that cannot be asked of the method, is neither met nor held.
    elsewhere = ('law = "alibi_is_its_bias"\n', 'law = "one_key_returns_its_value"\ndtype = "fp16"\n')
    held.write_text("".join(f'[[expected]]\n{text}reason = "x"\n' for text in elsewhere))
    code, out, _ = effattn_command(*gate, "--out", tmp_path / "4", "--expected", held)
    assert code == 1
    assert "expected to fail, and not judged here: alibi_is_its_bias (x)" in out
    assert "fp16, expected to fail, and not judged here: one_key_returns_its_value (x)" in out
    assert "was not judged: x" in (tmp_path / "4" / "summary.md").read_text()
    held.write_text(f'[[expected]]\nlaw = "{ACCURACY}"\nreason = "x"\n')
    code, _, err = effattn_command(*gate, "--out", tmp_path / "5", "--expected", held)
    assert code == 2
    assert "compares with exact attention whatever is expected" in err


def test_replay_tries_a_law(effattn_command: Callable[..., tuple[int, str, str]]) -> None:
    law = get("a_row_that_sees_no_key_is_zero")
    case = Case(q_len=5, kv_len=2, head_dim=16, dtype="fp16", causal="bottom-right")
    code, out, _ = effattn_command("replay", case.to_json(), "effattn.zoo:empty_rows_nan", "--law", law.name)
    assert code == 1
    assert "law broken" in out
    code, out, _ = effattn_command("replay", case.to_json(), "effattn.zoo:empty_rows_mean", "--law", law.name)
    assert code == 1
    code, out, _ = effattn_command("replay", case.to_json(), "flash", "--law", law.name)
    assert code == 0


@pytest.mark.parametrize(("rows", "expected"), [(16, 1), (2048, 2)], ids=["small", "large"])
def test_small_cases_get_one_thread_from_the_judge_and_from_laws_alike(rows: int, expected: int) -> None:
    seen: list[int] = []

    class Counting(Dense):
        def __call__(self, *arguments: Any, **keywords: Any) -> Any:
            seen.append(torch.get_num_threads())
            return super().__call__(*arguments, **keywords)

    case = Case(q_len=rows, kv_len=rows, head_dim=32, dtype="fp32")
    method = dense(Counting, "counting")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert judge(case, method).outcome == Outcome.PASS
        verdict = laws.judge_law(get("the_same_call_twice_gives_the_same_bits"), case, method)
        assert verdict.outcome == Outcome.PASS
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert len(seen) >= 3
    assert set(seen) == {expected}
