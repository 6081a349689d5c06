"""Reports on several runs and on damaged ones: no verdict hides another, nothing of a run is written over, no run is blamed for
what another did."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import say, verdicts, write

from effattn.report import charts, gather, html
from effattn.run import store
from effattn.verdict import Outcome, Quantity, Verdict

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# Several runs


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_failure_is_shown_in_whatever_order_the_runs_are_given(
    effattn_command: Command, order: tuple[str, str]
) -> None:
    write(Path("a"), verdicts(bad=0))
    write(Path("b"), verdicts(bad=3))
    material = gather.gather([Path(name) for name in order])
    assert material.sentence == "mine failed 3 of 12 judged cases."
    sentence = "6 cases of a method are in more than one run; the verdict of each run counts."
    assert material.notes == [sentence]
    code, _, err = effattn_command("report", *order, "--markdown", "m.md", "--junit", "j.xml")
    assert code == 0
    assert sentence in err
    assert sentence in Path("m.md").read_text()
    assert sentence in (Path(order[0]) / "report.html").read_text()
    root = ElementTree.parse("j.xml").getroot()
    assert [suite.get("failures") for suite in root] == ["3"]
    names = [case.get("name") or "" for case in root.iter("testcase")]
    assert len(set(names)) == 12
    failed = [case.get("name") or "" for case in root.iter("testcase") if case.find("failure") is not None]
    assert all(name.endswith(" in b") for name in failed)


def test_the_worse_verdict_is_compared_with_the_other_run() -> None:
    write(Path("a"), verdicts(bad=0))
    write(Path("b"), verdicts(bad=3))
    before = write(Path("before"), verdicts(bad=0), started="2029-01-01T00:00:00+00:00")
    for order in (["a", "b"], ["b", "a"]):
        difference = gather.gather([Path(name) for name in order], against=before).difference
        assert difference is not None
        assert (len(difference.broken), difference.both) == (3, 6)


def test_runs_with_other_cases_repeat_nothing() -> None:
    write(Path("a"), verdicts("mine"))
    write(Path("b"), verdicts("torch"))
    write(Path("c"), verdicts("mine", cases=8)[6:])
    assert gather.gather([Path("a"), Path("b"), Path("c")]).notes == []


def test_the_same_run_counts_once_through_links_and_as_a_copy() -> None:
    run = write(Path("a"), verdicts(bad=1))
    Path("link").symlink_to(run)
    shutil.copytree(run, "copy")
    material = gather.gather([run, Path("link"), Path("copy"), run])
    assert material.sentence == "mine failed 1 of 6 judged cases."
    assert material.notes == [
        f"{name} is the same run as a and counts once." for name in ("link", "copy", "a")
    ]


def test_the_headline_blames_those_that_failed() -> None:
    def sentence(*runs: list[Verdict], **facts: Any) -> str:
        made = []
        for number, items in enumerate(runs):
            shutil.rmtree(str(number), ignore_errors=True)
            made.append(write(Path(str(number)), items, **(facts if number == 0 else {})))
        material = gather.gather(made)
        page = html.render(material)
        assert f'class="verdict {"good" if material.passed else "bad"}"' in page
        return material.sentence

    att, torch = verdicts("att", bad=3), verdicts("torch")
    assert sentence(att, torch) == "1 of 2 methods (att) failed 3 of 12 judged cases."
    assert sentence(torch, att) == "1 of 2 methods (att) failed 3 of 12 judged cases."
    assert sentence(att, verdicts("torch", bad=1)) == "All 2 methods failed 4 of 12 judged cases."
    assert sentence(verdicts("att"), torch) == "2 methods passed all 12 judged cases."
    assert sentence(att) == "att failed 3 of 6 judged cases."
    unjudged = [replace(v, outcome=Outcome.NOT_SUPPORTED) for v in verdicts("other")]
    nothing = " Nothing was judged of other: that is not a pass."
    assert sentence(torch, unjudged) == f"torch passed all 6 judged cases.{nothing}"
    assert sentence(att, unjudged) == f"att failed 3 of 6 judged cases.{nothing}"
    alarm = {"alarms": [{"sentence": "s", "replay": "r"}], "explained": [], "unsteady": []}
    assert sentence(verdicts("att"), torch, evidence=alarm).startswith(
        "1 of 2 methods (att) passed each of 12"
    )


# Where it is written


@pytest.mark.parametrize("option", ["--out", "--markdown", "--junit"])
@pytest.mark.parametrize(
    "target",
    ["run/verdicts.jsonl", "run/verdicts-9.jsonl", "run/provenance.json", "run/verdicts.parquet", "run/cases/x.json",
     "run/summary.md", "link/provenance.json", "link.html", "kernel.py", "notes"],
)  # fmt: skip
def test_nothing_of_a_run_or_of_others_is_written_over(
    effattn_command: Command, option: str, target: str
) -> None:
    run = write(Path("run"), verdicts(bad=1))
    (run / "summary.md").write_text("# effattn gate: mine\n")
    Path("link").symlink_to("run")
    Path("link.html").symlink_to("run/provenance.json")
    for name in ("kernel.py", "notes"):
        Path(name).write_text("mine")
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    code, _, err = effattn_command("report", "run", option, target)
    assert code == 2
    assert repr(target) in err
    assert "name another" in err.lower()
    assert {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [("--out", "x.html", "--markdown", "x.html"), ("--markdown", "y/../x.xml", "--junit", "x.xml"),
     ("--junit", "run/report.html"), ("--out", "/dev/null")],
)  # fmt: skip
def test_two_outputs_have_two_files(effattn_command: Command, arguments: tuple[str, ...]) -> None:
    write(Path("run"), verdicts())
    code, _, err = effattn_command("report", "run", *arguments)
    assert code == 2
    assert "name a file" in err
    assert not Path("x.html").exists()
    assert not Path("run/report.html").exists()


def test_a_report_is_replaced_and_others_with_its_suffix_too(effattn_command: Command) -> None:
    write(Path("run"), verdicts(bad=1))
    Path("mine.md").write_text("old")
    arguments = ("--out", "page", "--markdown", "text", "--junit", "tests.txt")
    for more in (
        arguments,
        arguments,
        ("--markdown", "mine.md", "--out", "run/page.HTM", "--junit", "run/j.xml"),
    ):
        code, _, err = effattn_command("report", "run", *more)
        assert (code, err) == (0, "")
    assert Path("mine.md").read_text().startswith("# effattn")
    Path("page").write_text("<!doctype html> of somebody else")
    assert effattn_command("report", "run", *arguments)[0] == 2


# History


def history(*runs: tuple[str, bool | None, float]) -> Path:
    """A folder of runs: commit, whether its tree was clean, and error/bound."""
    for number, (commit, clean, factor) in enumerate(runs):
        write(
            Path("runs") / f"r{number}",
            verdicts(cases=1, factor=2 * factor),
            started=f"203{number}-01-01T00:00:00+00:00",
            working_directory={"commit": commit * 40, "clean": clean},
        )
    return Path("runs")


def test_a_commit_is_not_bad_by_changes_that_are_not_in_it() -> None:
    found = gather.moments(history(("a", True, 0.5), ("b", False, 3.0), ("b", True, 0.5), ("c", True, 2.0)))
    assert [moment.state for moment in found] == [
        "passed",
        "failed, with uncommitted changes",
        "passed",
        "first bad",
    ]
    shutil.rmtree("runs")
    found = gather.moments(history(("a", True, 0.5), ("b", False, 0.4), ("b", True, 3.0), ("b", False, 3.0)))
    assert [moment.first_bad for moment in found] == [False, False, True, False]
    shutil.rmtree("runs")
    found = gather.moments(history(("a", None, 0.5), ("b", False, 3.0), ("b", False, 4.0)))
    assert [moment.state for moment in found][1] == "first bad, with uncommitted changes"
    assert [moment.first_bad for moment in found] == [False, True, False]


ALARM = {
    "sentence": "fp16: errors of dV are 1.2 times as large, over 20 cases together",
    "replay": "effattn replay x",
}
UNSTEADY = "fp16: a case passed and, judged again, is crashed: no more workspace"


@pytest.mark.parametrize(
    "evidence", [{"alarms": [ALARM], "unsteady": []}, {"alarms": [], "unsteady": [UNSTEADY]}]
)
def test_a_commit_is_bad_by_all_of_its_cases_together(evidence: dict[str, Any]) -> None:
    runs = history(*((commit, True, 0.5) for commit in "abcd"))
    for number in (1, 2):
        say(runs / f"r{number}", method={"name": "mine"}, evidence=evidence)
        other = [replace(v, case=replace(v.case, dtype="fp32")) for v in verdicts(cases=1)]
        shutil.copy(
            write(Path(f"fp32-{number}"), other) / "verdicts.jsonl", runs / f"r{number}" / "verdicts-2.jsonl"
        )
    found = [moment for moment in gather.moments(runs) if moment.dtype == "fp16"]
    assert [moment.commit[0] for moment in found if moment.bad] == ["b", "c"]
    assert [moment.state for moment in found] == [
        "passed",
        "first bad, by its cases together",
        "failed, by its cases together",
        "passed",
    ]
    assert [moment.state for moment in gather.moments(runs) if moment.dtype == "fp32"] == ["passed"] * 2
    page = html.render(gather.gather([runs / "r0"], history=runs))
    assert page.count('<tr class="failed"><td class="whole">203') == 2
    assert "<td>first bad, by its cases together</td>" in page


def test_a_run_of_laws_alone_is_in_the_history() -> None:
    runs = history(("a", True, 0.5))
    for number, outcomes in (
        (1, ["pass", "pass"]),
        (2, ["pass", "law broken"]),
        (3, ["not judged", "not judged"]),
    ):
        laws = [
            replace(v, law="a law", outcome=Outcome(outcome), quantities=())
            for v, outcome in zip(verdicts(cases=2), outcomes, strict=True)
        ]
        facts = {"commit": "bcd"[number - 1] * 40, "clean": True}
        write(runs / f"r{number}", laws, started=f"204{number}-01-01T00:00:00+00:00", working_directory=facts)
    found = gather.moments(runs)
    assert [(m.commit[0], m.judged, m.failed, m.first_bad) for m in found] == [
        ("a", 1, 0, False),
        ("b", 2, 0, False),
        ("c", 2, 1, True),
        ("d", 0, 0, False),
    ]


def test_what_cases_say_together_is_a_failure_in_every_form(effattn_command: Command) -> None:
    two = [
        replace(v, case=replace(v.case, dtype=dtype)) for dtype in ("fp32", "fp16") for v in verdicts(cases=2)
    ]
    write(Path("run"), two, method={"name": "mine"}, evidence={"alarms": [ALARM], "unsteady": [UNSTEADY]})
    code, out, err = effattn_command("report", "run", "--junit", "j.xml", "--github")
    assert (code, err) == (0, "")
    suites = list(ElementTree.parse("j.xml").getroot())
    assert [(s.get("name"), s.get("tests"), s.get("failures")) for s in suites] == [
        ("mine fp32", "2", "0"),
        ("mine fp16", "3", "1"),
    ]
    ((_, failure),) = [(test, test.find("failure")) for test in suites[1] if test.find("failure") is not None]
    assert failure is not None
    assert failure.get("message") == ALARM["sentence"]
    assert failure.text == "\n".join([ALARM["sentence"], ALARM["replay"], UNSTEADY])
    assert [len(list(suite)) for suite in suites] == [2, 3]
    errors = [line for line in out.splitlines() if line.startswith("::error")]
    assert errors == [
        f"::error title=evidence over cases::{ALARM['sentence']}%0A{ALARM['replay']}",
        f"::error title=evidence over cases::{UNSTEADY}",
    ]
    # Two runs of a method, and evidence that doesn't say of which dtype.
    write(Path("more"), verdicts(cases=2), started="x", evidence={"alarms": [], "unsteady": ["odd"]})
    assert effattn_command("report", "run", "more", "--junit", "j.xml")[0] == 0
    (_, suite) = ElementTree.parse("j.xml").getroot()
    names = [test.get("name") for test in suite if test.find("failure") is not None]
    assert names == ["evidence over cases in run", "evidence over cases in more"]


def test_history_counts_a_run_once_and_says_its_order() -> None:
    runs = history(("a", True, 0.5), ("b", True, 0.5), ("c", False, 2.0))
    (runs / "again").symlink_to(runs.absolute() / "r0")
    shutil.copytree(runs / "r2", runs / "r3")
    material = gather.gather([runs / "r0"], history=runs)
    assert [moment.commit[0] for moment in material.history] == ["a", "b", "c"], (
        "equal verdicts of two commits are two"
    )
    assert len(material.notes) == 2
    (drawn,) = [chart for chart in charts.charts(material) if chart.name == "history"]
    assert [row["at"] for row in drawn.rows or []] == ["aaaaaaaa", "bbbbbbbb", "cccccccc+"]
    assert "by start of the run" in json.dumps(drawn.spec)
    page = html.render(material)
    assert "which need not be that of the commits" in page
    assert "<code>cccccccccc+</code>" in page
    assert "first bad, with uncommitted changes" in page
    assert '<td class="whole">2032-01-01 00:00</td>' in page


def test_a_crash_is_no_small_error_in_the_history() -> None:
    runs = history(("a", True, 0.5), ("b", True, 3.0))
    crashed = [replace(v, outcome=Outcome.CRASHED, quantities=()) for v in verdicts(cases=1)]
    write(runs / "r9", crashed, started="2039-01-01T00:00:00+00:00")
    wrong = [
        replace(v, quantities=(replace(v.quantities[0], fraction=float("nan")),)) for v in verdicts(cases=1)
    ]
    write(runs / "r8", wrong, started="2038-01-01T00:00:00+00:00")
    material = gather.gather([runs / "r0"], history=runs)
    (drawn,) = [chart for chart in charts.charts(material) if chart.name == "history"]
    assert [row["drawn"] for row in drawn.rows or []] == [0.5 * 2 * 0.5, 3.0, 6.0, 6.0]


# What is drawn


def test_a_run_without_errors_has_no_empty_charts(effattn_command: Command) -> None:
    crashed = [replace(v, outcome=Outcome.CRASHED, quantities=()) for v in verdicts()]
    run = write(Path("run"), crashed)
    material = gather.gather([run])
    assert charts.charts(material) == []
    page = html.render(material)
    assert "No case has an error to draw." in page
    assert "of the bound" not in page
    assert effattn_command("report", "run", "--markdown", "m.md", "--pictures", "svg")[0] == 0
    page = html.render(gather.gather([run, write(Path("other"), verdicts("torch", bad=1))]))
    assert "No case has an error to draw." not in page
    assert "2.00 of the bound" in page


def test_legends_have_the_dtypes_that_there_are() -> None:
    material = gather.gather([write(Path("run"), verdicts())], history=history(("a", True, 0.5)))
    drawn = {chart.name: json.dumps(chart.spec) for chart in charts.charts(material)}
    assert {"overview", "z", "kv_len", "head_dim", "scale", "history"} <= set(drawn)
    for name, spec in drawn.items():
        assert '"fp16"' in spec, name
        assert '"fp32"' not in spec, name


@pytest.mark.parametrize(
    ("sizes", "extent"), [([0.5, 1.1], [0.5, 1.2]), ([0.33, 0.34], [0.3, 0.4]), ([7.0], [5.0, 5.1])]
)
def test_bars_end_within_the_chart(sizes: list[float], extent: list[float]) -> None:
    """A value at the edge of two bars is in the second, which is within the axis."""
    items = [
        replace(v, quantities=(replace(v.quantities[0], z_rms=z),))
        for v, z in zip(verdicts(), sizes, strict=False)
    ]
    (chart,) = [c for c in charts.charts(gather.gather([write(Path("run"), items)])) if c.name == "z"]
    assert chart.spec["encoding"]["x"]["bin"]["extent"] == pytest.approx(extent)


def test_long_names_break_between_words_and_are_text() -> None:
    run = write(Path("run"), verdicts("a_<b>.py:attention__x"))
    page = html.render(gather.gather([run]))
    assert '<th scope="row">a_<wbr>&lt;b&gt;.<wbr>py:<wbr>attention__<wbr>x</th>' in page


def test_pairs_are_of_all_methods_and_the_largest_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "MOST_POINTS", 60)
    items = {
        name: verdicts(name, cases=100, factor=factor)
        for name, factor in (("torch", 1), ("a", 0.5), ("b", 1.5))
    }
    nan = replace(items["b"][7], quantities=(Quantity(name="out", count=64, fraction=float("nan")),))
    items["b"] = [nan if v is items["b"][7] else v for v in items["b"]]
    items["a"][90] = replace(items["a"][90], quantities=(Quantity(name="out", count=64, fraction=50.0),))
    material = gather.gather([write(Path(name), each) for name, each in items.items()])
    reference, pairs = gather.pairs(material)
    assert (reference, len(pairs)) == ("torch", 200)
    (chart,) = [chart for chart in charts.charts(material) if chart.name == "pairs"]
    assert chart.rows is not None
    assert [pair["ratio"] for pair in chart.rows[:3]] == [2e4, 100.0, 1.5]
    assert [sum(pair["method"] == name for pair in chart.rows) for name in "ab"] == [23, 37]
    words = "60 of 200 pairs are drawn: the largest ratios, and an even choice of the rest."
    assert words in chart.words
    monkeypatch.undo()
    (chart,) = [chart for chart in charts.charts(material) if chart.name == "pairs"]
    assert len(chart.rows or []) == 200
    assert "are drawn" not in chart.words


def test_nan_is_the_worst_wherever_rows_are_sorted() -> None:
    fractions = {"a": 5.0, "b": float("nan"), "c": 100.0, "d": float("inf"), "e": 50.0}
    made = []
    for name, fraction in fractions.items():
        (item,) = verdicts(name, cases=1)
        case = replace(
            item.case,
            values={"a": "constant", "b": "normal", "c": "outliers", "d": "uniform"}.get(name, "low-rank"),
        )
        quantity = replace(item.quantities[0], fraction=fraction)
        item = replace(item, case=case, outcome=Outcome.INACCURATE, quantities=(quantity,))
        made.append(write(Path(name), [item]))
    material = gather.gather(made)
    assert [row.label[0] for row in material.rows] == ["b", "d", "c", "e", "a"]
    values = [row.value for row in material.options if row.name == "values"]
    assert values == ["normal", "uniform", "outliers", "low-rank", "constant"]
    assert [v.method for v in material.worst] == ["b", "d", "c", "e", "a"]


# Damage


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"evidence": [1]}, "evidence: "),
        ({"evidence": {"alarms": "x", "unsteady": 3}}, "evidence: "),
        ({"evidence": {"alarms": [1, {}], "unsteady": [2]}}, "evidence: "),
        ({"evidence": {"alarms": [{"sentence": "s"}, {"sentence": "s", "replay": "r"}]}}, "1 of its alarms have no replay"),
        ({"working_directory": [1]}, "working_directory: "),
        ({"method": "mine", "started": 5}, "started, method: "),
        ({"command": "\ud800", "method": {"\udfff": "\ud800"}, "evidence": {"unsteady": ["\ud800"]}}, ""),
        ({"working_directory": {"commit": 5, "clean": "x"}, "exit_code": {"a": None}}, ""),
    ],
)  # fmt: skip
def test_damage_of_provenance_is_named_and_the_rest_is_shown(
    effattn_command: Command, facts: dict[str, Any], words: str
) -> None:
    write(Path("runs/good"), verdicts())
    run = write(Path("runs/run"), verdicts())
    say(run, **facts)
    for arguments in (("runs/run", "--junit", "j.xml"), ("runs/good", "--history", "runs")):
        code, out, err = effattn_command("report", *arguments, "--markdown", "m.md", "--github")
        assert code == 0, err
        assert "Report: " in out
        assert words in err
        assert ("provenance.json" in err) == bool(words)


def test_halves_of_surrogates_in_records_are_damage(effattn_command: Command) -> None:
    run = write(Path("runs/run"), verdicts(bad=2))
    file = run / "verdicts.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    body = json.loads(lines[0])["body"]
    body["verdict"]["method"] = "odd \ud800"
    encoded = json.dumps(body, separators=(",", ":")).encode()
    lines[0] = b'{"crc32":"%08x","body":%b}\n' % (zlib.crc32(encoded), encoded)
    file.write_bytes(b"".join(lines))
    code, _, err = effattn_command(
        "report", run, "--history", "runs", "--markdown", "m.md", "--pictures", "svg"
    )
    assert code == 0, err
    assert err.count("line 1 is damaged") == 1
    assert "mine failed 1 of 5 judged cases." in Path("m.md").read_text()


def test_reference_is_that_of_the_same_run_where_that_has_one(tmp_path: Path) -> None:
    runs = []
    for name, mine, theirs in (("first", 0.4, 0.2), ("second", 0.4, 0.8)):
        runs.append(write(tmp_path / name, verdicts(factor=mine)))
        other = write(tmp_path / f"of-{name}", verdicts("torch", factor=theirs))
        shutil.copy(other / "verdicts.jsonl", runs[-1] / "verdicts-2.jsonl")
    runs.append(write(tmp_path / "alone", verdicts(factor=0.2)))
    reference, pairs = gather.pairs(gather.gather(runs))
    assert reference == "torch"
    assert [pair["ratio"] for pair in pairs] == [2.0] * 6 + [1.0] * 6 + [0.5] * 6


def test_methods_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    runs = []
    for name, bad in (("old", 0), ("new", 2)):
        runs.append(tmp_path / name)
        with store.RunWriter(runs[-1], spec=f"{name}/k.py:f") as writer:
            for item in verdicts("k.py:f", bad=bad):
                writer.add(item)
            writer.commit({"started": "2030-01-01T00:00:00+00:00", "kind_of_run": "gate"})
    material = gather.gather(runs)
    assert material.methods == ["old/k.py:f", "new/k.py:f"]
    assert material.sentence.startswith("1 of 2 methods (new/k.py:f) failed 2 of 12")
    assert gather.gather(runs[:1]).methods == ["k.py:f"]


def test_the_first_of_the_worst_cases_are_of_different_kinds(tmp_path: Path) -> None:
    def failing(
        seed: int, dtype: str, outcome: Outcome, fraction: float | None, law: str | None = None
    ) -> Verdict:
        (made,) = verdicts(cases=1)
        quantities = (
            () if fraction is None else (Quantity(name="out", count=64, fraction=fraction, z_rms=0.5),)
        )
        case = replace(made.case, seed=seed, dtype=dtype)
        return replace(made, case=case, outcome=outcome, quantities=quantities, law=law)

    broken = [failing(seed, "bf16", Outcome.LAW_BROKEN, None, "first_law") for seed in range(5)]
    others = [
        failing(5, "fp16", Outcome.LAW_BROKEN, None, "first_law"),
        failing(6, "fp16", Outcome.INACCURATE, 2.0),
        failing(7, "bf16", Outcome.INACCURATE, 3.0),
        failing(8, "bf16", Outcome.INACCURATE, 2.5),
        failing(9, "fp16", Outcome.BIASED, 0.5),
    ]
    worst = gather.gather([write(tmp_path / "run", [*verdicts(), *broken, *others])]).worst
    kinds = [(str(v.outcome), v.case.dtype) for v in worst]
    assert kinds[:3] == [("law broken", "bf16"), ("inaccurate", "bf16"), ("biased", "fp16")]
    assert kinds[3:5] == [("law broken", "fp16"), ("inaccurate", "fp16")]
    assert len({v.case.id for v in worst}) == len(worst) == 10
    assert all(v.outcome != Outcome.PASS for v in worst)
