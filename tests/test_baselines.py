"""Baselines: what is worse is found, what is the same is not, and a file that is wrong is refused."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from effattn import cli_baseline
from effattn.case import Case
from effattn.errors import RequestError
from effattn.tolerances import baselines
from effattn.tolerances.baselines import Baseline, Key, Kind
from effattn.verdict import Outcome, Quantity, Verdict

KIND = Kind(device="cpu", dot_model="ieee", profile="smoke")
OUT = Key("fp16", "plain", "out")
Command = Callable[..., tuple[int, str, str]]


def verdicts(
    seed: int, cases: int, *, factor: float = 1.0, name: str = "out", **fields: object
) -> list[Verdict]:
    """Verdicts whose z and fraction scatter by a fifth."""
    drawn = np.random.default_rng(seed).normal(size=(cases, 2))
    made = []
    for i, (a, b) in enumerate(drawn):
        recipe = {"schema": 1, "q_len": 8, "kv_len": 8, "head_dim": 8, "dtype": "fp16", "seed": i, **fields}
        case = Case.from_dict(recipe)
        quantity = Quantity(
            name=name,
            count=512,
            fraction=float(0.4 * np.exp(0.2 * a)) * factor,
            z_rms=float(0.9 * np.exp(0.1 * b)) * factor,
        )
        made.append(
            Verdict(
                case=case, method="mine", outcome=Outcome.PASS, message="", quantities=(quantity,), replay=""
            )
        )
    return made


def record(given: list[Verdict], before: Baseline | None = None, **origin: str) -> Baseline:
    return baselines.updated(before, method="mine", kind=KIND, verdicts=given, origin=origin)


def test_what_is_the_same_passes_and_what_is_a_fifth_worse_does_not() -> None:
    (section,) = record(verdicts(0, 100)).sections
    assert baselines.compare(section, verdicts(0, 100)) == baselines.Comparison()
    assert baselines.compare(section, verdicts(1, 100)).passed
    worse = baselines.compare(section, verdicts(1, 100, factor=1.2))
    assert not worse.passed
    assert {(change.key.option, change.statistic) for change in worse.worse} >= {("plain", "z_rms")}
    assert "above that" in str(worse.worse[0])
    better = baselines.compare(section, verdicts(1, 100, factor=0.8))
    assert better.passed
    assert better.better
    assert "below that" in str(better.better[0])


def test_the_probability_of_an_alarm_is_what_is_stated() -> None:
    """At 5 % instead of 1e-6, so that there is something to count: 400 comparisons of the same distribution."""
    alarms = 0
    for seed in range(400):
        (section,) = record(verdicts(2 * seed, 40)).sections
        found = baselines.compare(section, verdicts(2 * seed + 1, 40), alarm=0.05)
        alarms += bool(found.worse or found.better)
    # Bonferroni is strict, above all with rows that share their cases; more than 33 of 400 have a probability of 0.1 %.
    assert 0 < alarms <= 33


def test_a_row_that_is_judged_no_more_fails_and_a_new_one_is_named() -> None:
    both = verdicts(0, 10) + verdicts(1, 10, window=(4, 4))
    (section,) = record(both).sections
    found = baselines.compare(section, verdicts(0, 10))
    assert not found.passed
    assert found.gone == (Key("fp16", "window", "out"),)
    (section,) = record(verdicts(0, 10)).sections
    found = baselines.compare(section, both)
    assert found.passed
    assert found.new == (Key("fp16", "window", "out"),)
    # A run of one dtype says nothing of the others.
    assert baselines.compare(section, verdicts(0, 10, dtype="bf16")).gone == ()


def test_a_dtype_that_is_judged_no_more_fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (section,) = record(verdicts(0, 10) + verdicts(1, 10, dtype="fp32")).sections
    refused = [
        replace(v, outcome=Outcome.NOT_SUPPORTED, quantities=()) for v in verdicts(1, 10, dtype="fp32")
    ]
    now = verdicts(0, 10) + refused
    found = baselines.compare(section, iter(now))
    assert not found.passed
    assert found.gone == (Key("fp32", "all", "out"), Key("fp32", "plain", "out"))
    assert not cli_baseline.report(section, now, file=tmp_path / "b", folder=tmp_path, passed=False)
    out = capsys.readouterr().out
    assert "in the baseline, but not judged now: 2" in out
    assert "  fp32 all out" in out
    # Laws that were tried in fp32 alone ask for no comparison there.
    laws = [replace(v, law="a law") for v in refused]
    assert baselines.compare(section, verdicts(0, 10) + laws).passed


def test_a_case_whose_roundings_are_known_has_a_bound_all_the_same() -> None:
    known = [replace(v, quantities=(replace(v.quantities[0], z_rms=None),)) for v in verdicts(1, 40)]
    section = record(known).sections[0]
    assert section.rows[OUT].cases == 40
    assert section.rows[OUT].values["z_rms"] == (0.0,) * 5
    worse = [
        replace(v, quantities=(replace(v.quantities[0], z_rms=None),)) for v in verdicts(2, 40, factor=2.0)
    ]
    assert {change.statistic for change in baselines.compare(section, worse).worse} == {"fraction"}


def test_a_failed_run_is_not_offered_as_a_record_and_rows_are_those_of_its_dtypes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    both = record(verdicts(1, 40) + verdicts(1, 40, dtype="bf16")).sections[0]
    assert cli_baseline.report(both, verdicts(1, 40), file=tmp_path / "b", folder=tmp_path, passed=True)
    assert ", in 2 rows." in capsys.readouterr().out, "all, and those without an option"
    for passed in (True, False):
        worse = verdicts(2, 40, factor=2.0)
        assert not cli_baseline.report(both, worse, file=tmp_path / "b", folder=tmp_path, passed=passed)
        assert ("To record these errors" in capsys.readouterr().out) == passed


def test_a_looser_entry_needs_a_reason_and_a_stricter_one_does_not() -> None:
    first = record(verdicts(0, 30))
    with pytest.raises(RequestError, match=r"would become looser; give --reason[^$]*fp16 all out: z_rms"):
        record(verdicts(0, 30, factor=1.1), first)
    with pytest.raises(RequestError, match="judged no more"):
        record(verdicts(0, 30, window=(4, 4)), first)
    loosened = record(verdicts(0, 30, factor=1.1), first, reason="a faster exponential")
    assert loosened.sections[0].origin["reason"] == "a faster exponential"
    stricter = record(verdicts(0, 30, factor=0.9), first)
    assert stricter.sections[0].rows[OUT].values["z_rms"] < first.sections[0].rows[OUT].values["z_rms"]


def test_a_file_comes_back_as_it_was_and_keeps_other_dtypes_and_kinds(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    first = record(verdicts(0, 5), reason='a "quoted"\nreason \\ with é')
    path.write_text(baselines.render(first))
    assert baselines.load(path) == first
    second = record(verdicts(1, 5, dtype="bf16"), baselines.load(path))
    assert {key.dtype for key in second.sections[0].rows} == {"fp16", "bf16"}
    hopper = baselines.updated(
        second, method="mine", kind=replace(KIND, dot_model="hopper"), verdicts=verdicts(2, 5), origin={}
    )
    path.write_text(baselines.render(hopper))
    assert baselines.load(path) == hopper
    assert [section.kind.dot_model for section in hopper.sections] == ["ieee", "hopper"]


ROW = '[[run]]\ndevice="cpu"\ndot_model="ieee"\nprofile="smoke"\n[[run.row]]\n'
GOOD = (
    'dtype="fp16"\noption="all"\nquantity="out"\ncases=3\nfraction=[0.1,0.1,0.1,0.1,0.1]\nz_rms=[1,1,1,1,1]\n'
)
HEAD = 'schema=1\nmethod="mine"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema=2\n", "schema 2; this effattn reads schema 1"),
        ('method="mine"\n', "schema None"),
        ("", "it is empty"),
        ("# a remark\n", "it is empty"),
        (HEAD + "colour=1\n", "the file has the unknown key 'colour'"),
        (HEAD + ROW + GOOD + "shape=1\n", "unknown key 'shape'"),
        (HEAD + ROW + GOOD.replace("[1,1", "[nan,1"), "z_rms has nan; expected finite numbers"),
        (HEAD + ROW + GOOD.replace("[1,1,1", "[1,1"), "expected 5 numbers"),
        (HEAD + ROW + GOOD.replace("[1,1,1", "[2,1,1"), "numbers that do not fall"),
        (
            HEAD + ROW + GOOD.replace("cases=3", "cases=0"),
            "cases is 0; expected how many there were, 1 to 1000000000",
        ),
        (HEAD + ROW + GOOD.replace("cases=3", "cases=1000000001"), "cases is 1000000001; expected"),
        (
            HEAD + ROW + GOOD.replace('"all"', '"windw"'),
            "has the option 'windw'; expected all, plain, window, softcap",
        ),
        (HEAD + ROW + GOOD + "[[run.row]]\n" + GOOD, "fp16 all out is there twice"),
        (HEAD + ROW + GOOD.replace("fp16", "bf17"), "has the dtype 'bf17'; expected fp16, bf16, fp32"),
        (HEAD + "run=3\n", "run is no list of tables"),
        ("schema=1\n", "method is None"),
        ("schema=", "no TOML"),
    ],
)
def test_a_file_that_is_wrong_is_refused_with_the_place(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(HEAD + ROW + GOOD)
    baselines.load(path)
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        baselines.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_gate_records_and_compares(effattn_command: Command, tmp_path: Path) -> None:
    file = tmp_path / "my_attention.toml"
    method = "docs/examples/my_attention.py:attention"
    gate = ("gate", method, "--laws", "none", "--dtype", "fp32", "--out")
    code, _, error = effattn_command(*gate, str(tmp_path / "first"), "--baseline", str(file))
    assert code == 2
    assert "there is no such file; `effattn baseline RUN --file" in error
    assert effattn_command(*gate, str(tmp_path / "first"))[0] == 0
    code, out, error = effattn_command("baseline", str(tmp_path / "first"), "--file", str(file))
    assert (code, error) == (0, "")
    code, out, error = effattn_command(*gate, str(tmp_path / "second"), "--baseline", str(file))
    assert code == 0, error
    assert f"Baseline: nothing is worse or better than {file} has it by more than chance" in out
    assert "have an error to compare now" not in out
    # As if it had been better before: every error of now is larger.
    text = file.read_text()
    lines = [
        "z_rms = [0.01, 0.01, 0.01, 0.01, 0.01]" if x.startswith("z_rms") else x for x in text.splitlines()
    ]
    file.write_text("\n".join(lines))
    code, out, _ = effattn_command(*gate, str(tmp_path / "third"), "--baseline", str(file))
    assert code == 1
    assert "worse than the baseline" in out
    assert f"effattn baseline {tmp_path / 'third'} --file {file} --reason TEXT" in out
    code, _, error = effattn_command("baseline", str(tmp_path / "third"), "--file", str(file))
    assert code == 2
    assert "give --reason" in error
    # As if some of its cases had no error any more.
    rows = [x.replace("cases = ", "cases = 1") if x.startswith("cases") else x for x in text.splitlines()]
    file.write_text("\n".join(rows))
    _, out, _ = effattn_command(
        *gate, str(tmp_path / "fourth"), "--baseline", str(file), "--against", str(tmp_path / "first")
    )
    assert re.search(r"fp32: (\d\d) of the 1\1 cases in the baseline have an error to compare now", out)
    file.write_text(text)
    # What is reported on the run later has the same comparisons, as long as there is something to compare with.
    page = tmp_path / "page.html"
    code, _, error = effattn_command("report", str(tmp_path / "fourth"), "--out", str(page))
    assert code == 0, error
    for told in (
        f"Compared with the run {tmp_path / 'first'}, as the gate",
        f"Beside the baseline {file}, as the gate",
    ):
        assert told in error
    assert "Against" in page.read_text()
    assert str(file) in page.read_text()
    shutil.rmtree(tmp_path / "first")
    file.rename(tmp_path / "elsewhere.toml")
    code, _, error = effattn_command("report", str(tmp_path / "fourth"), "--out", str(page))
    assert code == 0
    assert f"compared with the run {tmp_path / 'first'}, which is not there any more" in error
    assert f"beside the baseline {file}, which is not there any more" in error
    (tmp_path / "elsewhere.toml").rename(file)
    for arguments, message in (
        (("gate", "torch", "--dtype", "fp32"), "it is of 'my_attention.py:attention', not of 'torch'"),
        ((*gate[:-1], "--profile", "ci"), "it has nothing for cpu, dot model ieee, profile ci"),
        ((*gate[:-1], "--values", "normal"), "leave --values out"),
    ):
        code, _, error = effattn_command(*arguments, "--out", str(tmp_path / "no"), "--baseline", str(file))
        assert code == 2
        assert message in error
