"""The gate: what it collects, what it finds, what it leaves behind."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from effattn import gate, zoo
from effattn.case import Case
from effattn.errors import RequestError
from effattn.gate import Request
from effattn.judge import Outcome, Verdict, judge
from effattn.properties import profiles
from effattn.report import markdown, summary, text
from effattn.run import store
from effattn.run.executor import Local

Command = Callable[..., tuple[int, str, str]]

#: Each of these must meet several cases of the profile that expose it, in every dtype where it differs.
WRONG = {specimen.name: specimen for specimen in zoo.specimens(right=False)}
#: Cases of smoke that must expose a wrong kernel. Some are wrong in one regime only, of which it has two cases.
EXPOSED = 2
#: A kernel that is wrong must be found before a tenth of the long profile is judged.
FIRST = 50


def request(method: str, **fields: object) -> Request:
    return Request(**{"judge": Local(method), "dtypes": ("fp32",), "profile": "smoke", **fields})  # type: ignore[arg-type]


def exposed(name: str, dtype: str, cases: list[Case], enough: int) -> int:
    """How many of the cases expose a wrong kernel, counted up to `enough`."""
    specimen, found = WRONG[name], 0
    for case in cases:
        if specimen.shows(case) and summary.failed(judge(case, specimen.method()).outcome):
            found += 1
            if found == enough:
                break
    return found


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in WRONG for dtype in WRONG[name].dtypes])
def test_smoke_exposes_every_wrong_kernel(name: str, dtype: str) -> None:
    found = exposed(name, dtype, profiles.cases("smoke", dtype=dtype), EXPOSED)
    assert found == EXPOSED, f"{name} ({WRONG[name].what}) was exposed by {found} cases in {dtype}"


@pytest.mark.parametrize(("name", "dtype"), [(name, dtype) for name in WRONG for dtype in WRONG[name].dtypes])
def test_the_first_cases_of_ci_expose_every_wrong_kernel(name: str, dtype: str) -> None:
    assert exposed(name, dtype, profiles.cases("ci", dtype=dtype)[:FIRST], 1), WRONG[name].what


# What is judged


def test_cases_of_each_dtype_are_those_of_the_profile() -> None:
    collected = [question.case for question in gate.collect(request("torch", dtypes=("bf16", "fp16")))]
    assert collected == profiles.cases("smoke", dtype="bf16") + profiles.cases("smoke", dtype="fp16")


def test_named_values_replace_those_of_the_profile() -> None:
    collected = [
        question.case for question in gate.collect(request("torch", values=("outliers", "constant")))
    ]
    assert {case.values for case in collected} == {"outliers", "constant"}
    assert len({case.id for case in collected}) == len(collected)


def test_unknown_values_and_profiles_are_refused() -> None:
    with pytest.raises(RequestError, match="'outlier'"):
        gate.collect(request("torch", values=("outlier",)))
    with pytest.raises(RequestError, match="'quick'"):
        gate.collect(request("torch", profile="quick"))


# What comes out


@pytest.fixture(scope="module")
def failed_result() -> gate.Result:
    wanted = request("effattn.zoo:last_partial_block_dropped")
    return gate.run_gate(wanted, gate.collect(wanted))


def test_failures_come_with_the_worst_and_a_small_case(failed_result: gate.Result) -> None:
    assert failed_result.exit_code == 1
    assert failed_result.failures
    for failure in failed_result.failures:
        assert failure.worst.case in [verdict.case for verdict in failure.verdicts]
        assert all(gate.severity(failure.worst) >= gate.severity(v) for v in failure.verdicts)
        small = failure.shrunk.verdict
        assert small.outcome == failure.worst.outcome
        assert small.case.heads <= 2
        assert small.case.kv_len <= 66
        assert small.case.layout == "bhsd"


def test_every_replay_line_repeats_its_verdict(failed_result: gate.Result, effattn_command: Command) -> None:
    for failure in failed_result.failures:
        for verdict in (failure.worst, failure.shrunk.verdict):
            program, *arguments = shlex.split(verdict.replay)
            assert program == "effattn"
            code, out, err = effattn_command(*arguments)
            assert code == 1, err
            assert str(verdict.outcome) in out
            for line in verdict.message.splitlines():
                assert line in out


def test_the_same_command_gives_the_same_verdicts(effattn_command: Command, tmp_path: Path) -> None:
    records = []
    for name in ("first", "second"):
        code, _, err = effattn_command(
            "gate",
            "effattn.zoo:accumulator_in_input_dtype",
            "--laws",
            "none",
            "--dtype",
            "bf16",
            "--out",
            tmp_path / name,
        )
        assert code == 1, err
        lines = (tmp_path / name / "verdicts.jsonl").read_text().splitlines()
        verdicts = [json.loads(line)["body"]["verdict"] for line in lines]
        records.append([{k: v for k, v in verdict.items() if k != "seconds"} for verdict in verdicts])
        records[-1].append(sorted(path.name for path in (tmp_path / name / "cases").iterdir()))
    assert records[0] == records[1]


def test_run_folder_holds_everything(effattn_command: Command, tmp_path: Path) -> None:
    code, out, _ = effattn_command(
        "gate",
        "effattn.zoo:zeros",
        "--dtype",
        "fp32",
        "--values",
        "uniform",
        "--by-values",
        "--out",
        tmp_path / "run",
    )
    assert code == 1
    assert str(tmp_path / "run") in out
    verdicts = list(store.read_verdicts(tmp_path / "run"))
    provenance = store.read_provenance(tmp_path / "run")
    assert provenance["cases"] == len(verdicts)
    assert provenance["dtypes"] == ["fp32"]
    assert provenance["values"] == ["uniform"]
    assert provenance["profile"] == "smoke"
    assert provenance["exit_code"] == 1
    assert shlex.split(provenance["command"])[:3] == ["effattn", "gate", "effattn.zoo:zeros"]
    assert provenance["started"] <= provenance["ended"]
    assert provenance["packages"]["torch"]
    assert "commit" in provenance["effattn"]
    failing = {v.case.id for v in verdicts if summary.failed(v.outcome)}
    files = {path.stem for path in (tmp_path / "run" / "cases").iterdir()}
    assert failing <= files
    assert len(files - failing) <= 1, "the failed cases and the shrunk one"
    written = (tmp_path / "run" / "summary.md").read_text()
    assert len(written) < 60_000
    for word in (
        "effattn gate",
        "| fp32 | uniform |",
        "inaccurate",
        "effattn replay",
        "python",
        provenance["started"],
    ):
        assert word in written


# Reports


def verdict(case: Case, outcome: Outcome, **fields: object) -> Verdict:
    return Verdict(case=case, outcome=outcome, **{"method": "m", "message": "", "replay": "", **fields})  # type: ignore[arg-type]


CASE = Case(q_len=3, kv_len=3, head_dim=3, dtype="fp16")


def test_nothing_judged_and_nothing_judged_of_a_dtype_are_no_pass() -> None:
    both = request("torch", dtypes=("fp16", "fp32"))
    unsupported = verdict(CASE, Outcome.NOT_SUPPORTED)
    passed = verdict(Case.from_dict({**CASE.to_dict(), "dtype": "fp32"}), Outcome.PASS)

    def result(*verdicts: Verdict, of: Request = both) -> gate.Result:
        return gate.Result(
            request=of,
            verdicts=verdicts,
            failures=(),
            nothing_judged=tuple(gate._nothing_judged(verdicts, of)),
        )

    assert result(unsupported).exit_code == 2
    assert result(unsupported, passed).exit_code == 2
    assert "fp16" in result(unsupported, passed).sentence
    assert result(unsupported, passed, of=request("torch")).exit_code == 0
    assert result(passed, of=request("torch", values=("normal",))).exit_code == 0
    assert result(passed, of=request("torch", values=("normal", "uniform"))).exit_code == 2


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("fp32-matmul-softmax", "fp16", True),
        ("fp32-matmul-softmax", "bf16", True),
        ("fp64-inside", "fp32", True),
        ("flash", "fp16", False),
        ("flash", "bf16", False),
        ("flash", "fp32", False),
    ],
)
def test_a_method_that_rounds_less_than_it_declares_passes_and_is_told(
    name: str, dtype: str, said: bool
) -> None:
    cases = [c for c in profiles.cases("smoke", dtype=dtype) if not c.backward][:60]
    verdicts = [judge(case, zoo.get(name).method()) for case in cases]
    assert not any(summary.failed(v.outcome) for v in verdicts)
    sentences = summary.understated(summary.rows(verdicts, by=lambda v: (v.case.dtype,)))
    assert len(sentences) == said
    assert all("the method rounds less than it declares" in sentence for sentence in sentences)
    few = summary.rows(verdicts[:10], by=lambda v: (v.case.dtype,))
    assert summary.understated(few) == [], "ten cases say nothing"


def test_nearly_all_elements_right_to_the_bit_say_that_weights_are_not_rounded() -> None:
    cases = [c for c in profiles.cases("smoke", dtype="fp16") if not c.backward][:30]
    (row,) = summary.rows(
        [judge(case, zoo.get("flash").method()) for case in cases], by=lambda v: (v.case.dtype,)
    )
    assert summary.understated([row]) == []
    assert len(summary.understated([replace(row, bit_equal=0.99)])) == 1
    assert summary.understated([replace(row, bit_equal=0.99, label=("fp32",))]) == [], (
        "nothing rounds P there"
    )


def test_rows_add_up() -> None:
    from effattn.verdict import Quantity

    def quantity(name: str, **fields: float) -> Quantity:
        return Quantity(name=name, **fields)  # type: ignore[arg-type]

    out = {"bit_equal": 1.0, "ulp_p50": 0.0, "ulp_p99": 1.0, "ulp_max": 2.0}
    verdicts = [
        verdict(
            CASE,
            Outcome.PASS,
            quantities=(
                quantity("out", count=1, fraction=0.5, z_rms=1.0, z_max=-3.0, **out),
                quantity("lse", count=9, fraction=0.75, z_rms=9.0, z_max=99.0),
            ),
            seconds={"method": 0.5, "exact": 0.25},
        ),
        verdict(
            CASE,
            Outcome.INACCURATE,
            quantities=(
                quantity(
                    "out",
                    count=3,
                    fraction=2.5,
                    z_rms=3.0,
                    z_max=2.0,
                    **{**out, "bit_equal": 0.2, "ulp_max": 7.0},
                ),
            ),
        ),
        verdict(CASE, Outcome.CRASHED),
        verdict(CASE, Outcome.NOT_SUPPORTED, quantities=(quantity("out", count=100, fraction=100.0),)),
        verdict(CASE, Outcome.NOT_JUDGED),
    ]
    row = summary.row(("fp16",), verdicts)
    assert (row.cases, row.judged, row.passed, row.not_supported, row.not_judged) == (5, 3, 1, 1, 1)
    assert row.failed == {"inaccurate": 1, "crashed": 1}
    assert row.fraction == 2.5
    assert row.z_rms == pytest.approx(((1 * 1 + 3 * 9) / 4) ** 0.5)
    assert row.z_max == -3.0
    assert row.bit_equal == pytest.approx((1.0 + 3 * 0.2) / 4)
    assert row.ulp_max == 7.0
    assert (row.seconds, row.method_seconds) == (0.75, 0.5)


def test_nan_is_shown_and_never_the_smaller_one() -> None:
    from effattn.verdict import Quantity

    nan = float("nan")
    row = summary.row(
        (), [verdict(CASE, Outcome.INACCURATE, quantities=(Quantity(name="out", count=2, fraction=nan),))]
    )
    assert text.number(row.fraction) == "nan"
    assert gate.severity(
        verdict(CASE, Outcome.INACCURATE, quantities=(Quantity(name="out", count=2, fraction=nan),))
    ) > gate.severity(
        verdict(CASE, Outcome.INACCURATE, quantities=(Quantity(name="out", count=2, fraction=1e300),))
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (0.0, "0.00"),
        (0.4123, "0.41"),
        (99.994, "99.99"),
        (123.4, "123"),
        (1e-9, "1.0e-09"),
        (4.1e7, "4.1e+07"),
        (7.3e299, "inf"),
    ],
)
def test_numbers(given: float, shown: str) -> None:
    assert text.number(given) == shown
    assert text.number(-given) == (shown if given == 0 else "-" + shown)


def test_shares_are_never_rounded_up_to_all() -> None:
    assert text.share(1.0) == "100.0 %"
    assert text.share(0.99999) == "99.9 %"
    assert text.share(None) == "-"


@pytest.mark.parametrize(
    ("given", "shown"), [(0.0, "0"), (1.5, "1.5"), (85.4, "85"), (29743.0, "29743"), (5.1e6, "5e6")]
)
def test_ulps(given: float, shown: str) -> None:
    assert text.ulps(given) == shown


HOSTILE = "m|<img src=x onerror=alert(1)>`[a](javascript:b)*_\x1b[31m\u202e\n# head"


def test_names_of_users_do_nothing_in_markdown() -> None:
    shown = text.markdown(HOSTILE)
    assert "<" not in shown
    assert "\n" not in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    for sign in "|`[]*_":
        assert all(shown[i - 1] == "\\" for i, c in enumerate(shown) if c == sign)


@pytest.mark.parametrize("given", ["plain", "a`b", "``", "`", " ", "a``b`"])
def test_code_spans_hold_backticks(given: str) -> None:
    import markdown_it  # rich, which the package needs, brings it

    tokens = markdown_it.MarkdownIt().parseInline(text.code(given))[0].children
    assert [token.type for token in tokens] == ["code_inline"]
    assert tokens[0].content.strip() == given.strip()


def test_summary_of_a_hostile_method_is_plain(failed_result: gate.Result) -> None:
    from dataclasses import replace

    hostile = Local("effattn.zoo:zeros")
    hostile.name = HOSTILE
    result = replace(failed_result, request=replace(failed_result.request, judge=hostile))
    written = markdown.summary(result, {"command": HOSTILE})
    assert "<img" not in written.replace(text.code(HOSTILE), "")
    assert "\x1b" not in written
    assert "\n# head" not in written


def test_a_method_that_hangs_is_given_up_after_a_few_cases(
    effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def attention(q, k, v):\n    while q.shape[2] != 1:\n        pass\n    return q + v.nan\n"
    )
    code, out, err = effattn_command(
        "gate", "mine.py:attention", "--dtype", "fp16", "--laws", "none", "--time-limit", "1", "--out", "run"
    )
    assert code == 1, err
    last = [line for line in out.splitlines() if "judged cases." in line][-1]
    assert re.search(rf"After {gate.MOST_TIMED_OUT} that timed out, \d+ more were not tried\.", last)
    assert "fp16: timed out in 3 cases" in out
    verdicts = list(store.read_verdicts(Path("run"), []))
    assert sum(str(v.outcome) == "timed out" for v in verdicts) == gate.MOST_TIMED_OUT
    assert len({v.case.id for v in verdicts}) == len(verdicts)
