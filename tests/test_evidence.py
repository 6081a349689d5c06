"""Evidence over cases: its e-values are some, it finds what no verdict does, and right kernels do not meet it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from effattn.case import Case
from effattn.errors import RequestError
from effattn.properties import profiles
from effattn.run import evidence as weighing
from effattn.run import store
from effattn.run.executor import Local
from effattn.tolerances import evidence, statistics
from effattn.tolerances.evidence import LEAN, SIZE, Account, Evidence
from effattn.tolerances.statistics import Cells
from effattn.verdict import Outcome, Verdict

Command = Callable[..., tuple[int, str, str]]
Draw = Callable[[np.random.Generator], Evidence]

KERNELS = Path(__file__).parent / "data/slightly_wrong.py"
ROWS = 40
#: a level that simulation can check: the statement holds at each
LEVEL = 0.01
RUNS, CASES = 2000, 12

# The e-values


def _cells(rng: np.random.Generator) -> Cells:
    """Rows in cells of one to some twenty."""
    return Cells(np.unique(rng.choice([0, 1, 1, 2, 2, 2, *range(3, 12)], ROWS), return_inverse=True)[1])


def leaning(
    rng: np.random.Generator, *, cells_known: bool = True, steady_known: bool = True, lean: float = LEAN
) -> Evidence:
    """Errors alike in all rows of a cell, of any size, and a part that has one sign and one size in all cases."""
    cells = _cells(rng)
    symmetric = rng.standard_t(3, len(cells.counts)) * rng.choice([0.3, 1.0, 2.0], len(cells.counts))
    steady = np.full(ROWS, 0.4)
    along = symmetric[cells.index] + steady + lean
    used = cells if cells_known else Cells(np.arange(ROWS))
    allowed = steady if steady_known else np.zeros(ROWS)
    return evidence.of_direction(
        "out mean", [statistics.lean_of(along, allowed, used, used.counts.astype(np.float64))]
    )


def sized(rng: np.random.Generator, *, cells_known: bool = True, size: float = SIZE) -> Evidence:
    """All errors of a cell are one normal number, of the largest deviation that is allowed."""
    cells = Cells(np.repeat(np.arange(ROWS // 4), 4))
    error = size * rng.standard_normal(ROWS // 4)[cells.index][:, None] * np.ones((1, 3))
    one = np.ones_like(error)
    independent = ROWS / (cells.largest if cells_known else 1)
    return evidence.of_size("out size", [statistics.size_of(error**2, one, one, independent)])


def coarse(rng: np.random.Generator) -> Evidence:
    """Half of the rows have their last rounding at its largest, which is known."""
    even = np.ones((ROWS, 3))
    known = even * np.where(np.arange(ROWS) % 2, 3.0, 0.5)[:, None]
    error = SIZE * np.sqrt(np.maximum(even, known)) * rng.standard_normal((ROWS, 1))
    return evidence.of_size("out size", [statistics.size_of(error**2, even, known, ROWS)])


def alarms(draw: Draw, runs: int = RUNS) -> tuple[float, np.ndarray]:
    """The share of runs that alarm at any time at `LEVEL`; the e-values of all cases, (cases, bets)."""
    rng, found, values = np.random.default_rng(0), 0, []
    for _ in range(runs):
        account, alarmed = Account(), False
        for _ in range(CASES):
            each = draw(rng)
            values.append(each.bets)
            account.add(each)
            alarmed = alarmed or account.log_e >= math.log(1.0 / LEVEL)
        found += alarmed
    return found / runs, np.exp(np.array(values))


@pytest.mark.parametrize("draw", [leaning, sized, coarse])
def test_e_values_have_a_mean_of_one_at_most_and_runs_alarm_as_stated(draw: Draw) -> None:
    rate, values = alarms(draw)
    error = values.std(axis=0) / math.sqrt(len(values))
    assert (values.mean(axis=0) <= 1.0 + 4.0 * error).all()
    assert rate <= LEVEL


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: leaning(rng, cells_known=False),
        lambda rng: leaning(rng, steady_known=False),
        lambda rng: leaning(rng, lean=1.2),
        lambda rng: sized(rng, cells_known=False),
        lambda rng: sized(rng, size=1.4),
    ],
    ids=["cells left out", "steady part left out", "leaning", "size without cells", "too large"],
)
def test_what_breaks_the_null_hypothesis_is_met(draw: Draw) -> None:
    # The same check as above: without the cells, or what is allowed, it would not hold.
    rate, _ = alarms(draw, 500)
    assert rate > 3.0 * LEVEL


def test_an_account_averages_its_bets_and_has_the_mean_by_rows() -> None:
    account = Account()
    assert account.log_e == 0.0
    account.add(Evidence(name="out size", mean=1.0, rows=10.0, bets=(1.0, -900.0)))
    account.add(Evidence(name="out size", mean=2.0, rows=30.0, bets=(2.0, 800.0)))
    assert account.log_e == pytest.approx(3.0 - math.log(2.0))
    assert (account.cases, account.best, account.mean) == (2, 0, 1.75)


def test_what_is_no_number_wins_nothing() -> None:
    for mean in (math.inf, math.nan):
        (found,) = set(evidence.of_size("out size", [evidence.Size(mean, 10.0)]).bets)
        assert found < -1e5


def test_all_tests_of_a_run_share_its_probability() -> None:
    assert math.exp(-evidence.threshold(3)) * 3 * len(evidence.NAMES) == pytest.approx(evidence.ALARM)


# Cases


def backward(dtype: str) -> list[Case]:
    cases = [case for case in profiles.cases("smoke", dtype=dtype) if case.backward]
    return profiles.with_values(cases, ["normal"])


def weigh(method: Local, cases: list[Case], dtype: str) -> tuple[list[Verdict], weighing.Weighed]:
    verdicts = [method.judge(case, weigh="quick") for case in cases]
    return verdicts, weighing.weigh(
        verdicts, lambda case: method.judge(case, weigh="explained"), dtypes=(dtype,)
    )


@pytest.mark.parametrize("dtype", ["fp16"])
def test_no_verdict_finds_a_slightly_wrong_kernel_and_all_together_do(dtype: str) -> None:
    verdicts, found = weigh(Local(f"{KERNELS}:slight"), backward(dtype), dtype)
    assert {str(verdict.outcome) for verdict in verdicts} == {"pass"}
    (alarm,) = found.alarms
    assert (alarm.dtype, alarm.name) == ("fp16", "dv output")
    assert alarm.p_value < alarm.threshold < 1e-10
    assert 1 < alarm.cases <= len(verdicts)
    assert alarm.value > LEAN
    assert "dV lean along dV itself by +0." in alarm.sentence
    assert any(alarm.replay == verdict.replay for verdict in verdicts)
    assert not found.passed


@pytest.mark.parametrize("name", ["torch", "effattn.zoo:whole_matrices"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_right_kernels_have_no_evidence_against_them(name: str, dtype: str) -> None:
    method = Local(name)
    cases = profiles.cases("smoke", dtype=dtype)
    verdicts, found = weigh(
        method, cases[::4] if name == "torch" else [case for case in cases if not case.plain], dtype
    )
    assert sum(bool(verdict.evidence) for verdict in verdicts) > 10
    assert found.passed


@pytest.mark.parametrize("dtype", ["fp16"])
def test_a_quick_look_is_an_upper_limit(dtype: str) -> None:
    method, differs, names = Local("effattn.zoo:whole_matrices"), 0, set()
    for case in profiles.cases("smoke", dtype=dtype)[::3]:
        quick = {e.name: e for e in method.judge(case, weigh="quick").evidence}
        explained = {e.name: e for e in method.judge(case, weigh="explained").evidence}
        assert quick.keys() == explained.keys()
        for name, sure in explained.items():
            assert all(a >= b - 1e-9 for a, b in zip(quick[name].bets, sure.bets, strict=True)), name
            differs += quick[name].bets != sure.bets
        names |= quick.keys()
    assert differs > 10
    assert names == set(evidence.NAMES)


@pytest.mark.parametrize("dtype", ["fp16"])
def test_a_method_that_breaks_when_judged_again_is_told_of(dtype: str) -> None:
    verdicts, found = weigh(Local(f"{KERNELS}:breaking"), backward(dtype), dtype)
    assert {str(verdict.outcome) for verdict in verdicts} == {"pass"}
    assert not found.passed
    assert {str(verdict.outcome) for verdict in found.unsteady} == {"crashed"}
    assert "judged again, is crashed" in found.to_dict()["unsteady"][0]
    assert "no more workspace" in found.to_dict()["unsteady"][0]


def test_cases_of_one_stream_of_random_numbers_count_once() -> None:
    bets = (0.0,) * 15 + (20.0,)
    each = Evidence(name="out mean", mean=0.3, rows=100.0, bets=bets)

    def verdict(seed: int, heads: int) -> Verdict:
        case = Case(q_len=8, kv_len=8, head_dim=8, heads=heads, dtype="fp16", seed=seed)
        return Verdict(
            case=case, method="m", outcome=Outcome.PASS, message="", evidence=(each,), replay=f"replay {seed}"
        )

    def found(verdicts: list[Verdict]) -> weighing.Weighed:
        by_case = {v.case.id: v for v in verdicts}
        return weighing.weigh(verdicts, lambda case: by_case[case.id], dtypes=("fp16",))

    assert found([verdict(0, heads) for heads in (1, 2, 3, 4)]).passed
    (alarm,) = found([verdict(seed, 1) for seed in (0, 1, 2, 3)]).alarms
    # Two cases of 20 each, and the average over 16 bets: enough, so the rest is not judged again.
    assert alarm.cases == 2


# Records


@pytest.mark.parametrize("dtype", ["bf16"])
def test_verdicts_go_to_json_and_back_with_and_without_evidence(dtype: str) -> None:
    case, method = backward(dtype)[0], Local("effattn.zoo:whole_matrices")
    plain = json.loads(json.dumps(method.judge(case).to_dict(), allow_nan=False))
    assert "evidence" not in plain  # as older runs have it
    assert Verdict.from_dict(plain).evidence == ()
    verdict = method.judge(case, weigh="quick")
    again = Verdict.from_dict(json.loads(json.dumps(verdict.to_dict(), allow_nan=False)))
    assert again.evidence == verdict.evidence
    assert len(again.evidence) == len(evidence.NAMES)
    for wrong in ("x", [{"name": "out size", "bets": ["x"]}], [{"bias": 1.0}], [3]):
        with pytest.raises(RequestError):
            Verdict.from_dict(plain | {"evidence": wrong})


# The command


@pytest.mark.parametrize("dtype", ["fp16"])
def test_the_gate_fails_a_kernel_that_only_all_cases_show(
    dtype: str, effattn_command: Command, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    code, out, err = effattn_command(
        "gate", f"{KERNELS}:slight", "--dtype", dtype, "--values", "normal", "--out", run
    )
    assert code == 1, out + err
    assert "passed each of 123 judged cases, and failed all of them together" in out
    assert "evidence over cases" in out
    assert "fp16: errors of dV lean along dV itself" in out
    facts = store.read_provenance(run)
    (alarm,) = facts["evidence"]["alarms"]
    assert alarm["sentence"] in out
    assert alarm["replay"] in out
    written = (run / "summary.md").read_text()
    assert "## Evidence over cases" in written
    assert "errors of dV lean along dV itself" in written
    markdown, page = tmp_path / "pr.md", tmp_path / "report.html"
    code, _, err = effattn_command("report", run, "--markdown", markdown, "--out", page, "--no-github")
    assert code == 0, err
    for file in (markdown, page):
        assert "failed all of them together" in file.read_text()
        assert "errors of dV lean along dV itself" in file.read_text()
    _, listed, _ = effattn_command("runs", "list", tmp_path)
    assert "failed together" in listed


@pytest.mark.parametrize("dtype", ["fp16"])
def test_the_gate_says_nothing_of_evidence_where_there_is_none(
    dtype: str, effattn_command: Command, tmp_path: Path
) -> None:
    code, out, err = effattn_command(
        "gate", "torch", "--laws", "none", "--dtype", dtype, "--out", tmp_path / "run"
    )
    assert code == 0, err
    assert "evidence" not in out
    assert "evidence" not in store.read_provenance(tmp_path / "run")
