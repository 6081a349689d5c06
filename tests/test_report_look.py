"""What a report says first, and how: whether it is a pass, which laws broke, what its words and figures mean."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from markupsafe import escape
from run_folders import verdicts, write

from effattn.judgement import _times
from effattn.report import charts, exports, gather, html, legend, summary, terminal, text
from effattn.run import store
from effattn.verdict import Outcome

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_that_is_not_at_its_end_is_no_pass(effattn_command: Command) -> None:
    """The sentence says so, and the line that goes on with it stands below, without what would begin it anew."""
    command = "effattn sweep 'my spec.toml' --out now --overwrite"
    found = {"kind_of_run": "sweep", "command": command, "cases": 2160, "started": "2030"}
    sweep = write(Path("now"), verdicts("mine"))
    facts = json.loads((sweep / store.PROVENANCE).read_text())
    del facts["ended"]
    (sweep / store.PROVENANCE).write_text(store.provenance_text({**facts, **found}))
    material = gather.gather([sweep])
    assert (material.passed, material.state) == (False, "none")
    sentence = (
        "mine passed all 6 cases judged so far. The run is not at its end (6 of 2160 verdicts are recorded): "
        "what passed so far is not a pass."
    )
    assert material.sentence == sentence
    code, _, _ = effattn_command("report", "now", "--markdown", "m.md")
    assert code == 0
    written = Path("m.md").read_text()
    assert sentence in written.splitlines()[2]
    assert "`effattn sweep 'my spec.toml' --out now`" in written
    (warning,) = exports.workflow_commands(material)
    assert warning == (
        "::warning title=not at its end::now: 6 of 2160 verdicts are recorded. effattn sweep 'my spec.toml' --out now"
    )
    both = gather.gather([sweep, write(Path("torch"), verdicts("torch", bad=1))])
    assert both.state == "bad"
    assert both.sentence.startswith(
        "1 of 2 methods (torch) failed 1 of 12 judged cases. 1 of 2 runs is not at its end"
    )
    assert gather.gather([Path("torch")]).unfinished == []


def test_broken_laws_are_named_with_their_cases() -> None:
    law = [replace(v, law="padded_keys", quantities=()) for v in verdicts("mine", bad=2)]
    law = [replace(v, outcome=Outcome.LAW_BROKEN) if str(v.outcome) != "pass" else v for v in law]
    material = gather.gather([write(Path("now"), [*verdicts("mine", bad=1), *law])])
    assert (
        material.sentence == "mine failed 3 of 12 judged cases. It breaks 1 law: padded keys (2 of 6 cases)."
    )
    assert (
        "6 judged cases are compared with exact attention, and stand here. The other 6 are tries of 1 law,"
        in html.render(material)
    )
    shown = exports.pull_request(material)
    assert "The other 6 judged cases are tries of laws." in shown
    assert "| law broken | \\- | mine | padded keys: " in shown
    assert "law broken: padded keys: " in shown


def test_the_cases_of_a_pass_are_closest_to_the_limit() -> None:
    good, bad = (
        gather.gather([write(Path(name), verdicts(name, bad=n))]) for n, name in enumerate(("a", "b"))
    )
    assert "## The 6 cases closest to the limit" in exports.pull_request(good)
    assert "## The 6 worst cases" in exports.pull_request(bad)


def test_error_over_bound_is_never_rounded_to_1() -> None:
    shown = {x: text.fraction(x) for x in (1.003, 1.00000004, 1 + 2**-52, 0.9996, 1.0, 1.006, 0.994)}
    assert list(shown.values()) == [
        "1.003",
        "1.00000004",
        "1.0000000000000002",
        "0.9996",
        "1.00",
        "1.01",
        "0.99",
    ]
    assert text.fraction(None) == "-"
    assert [_times(x) for x in (1.003, 1.0000004, 1.25, 0.9999)] == [
        "1.003 times",
        "1.0000004 times",
        "1.25 times",
        "1 times",
    ]
    assert text.fraction(float("nan")) == "nan"


def test_what_broke_comes_before_the_charts() -> None:
    """Verdicts, the broken laws, what changed, and the three worst cases with their replay lines."""
    before = write(Path("before"), verdicts("mine"))
    law = [
        replace(v, law="padded_keys", outcome=Outcome.LAW_BROKEN, quantities=())
        for v in verdicts("mine", cases=1)
    ]
    page = html.render(gather.gather([write(Path("now"), [*verdicts("mine", bad=5), *law])], against=before))
    order = [re.search(f'<h[23][^>]*>{words}', page) for words in (
        "Verdicts", "Broken laws: 1", "Against before", "Broken: 5", "Worst cases", "Charts", "Options", "Laws", "Cases",
        "Where this comes from",
    )]  # fmt: skip
    places = [found.start() if found else -1 for found in order]
    assert -1 not in places
    assert places == sorted(places)
    worst = page[places[4] : places[5]]
    assert worst.count("<details open>") == 3
    assert "<summary>4 more</summary>" in worst
    assert "padded keys: fp16" in worst


def test_the_three_worst_are_of_as_many_kinds_as_there_are() -> None:
    items = [replace(v, law="a law", outcome=Outcome.LAW_BROKEN, quantities=()) for v in verdicts(cases=4)]
    items += [replace(v, outcome=Outcome.BIASED) for v in verdicts(cases=2)] + verdicts(cases=5, bad=5)[2:]
    material = gather.gather([write(Path("now"), items)])
    assert [str(v.outcome) for v in material.foremost] == ["law broken", "inaccurate", "biased"]
    page = html.render(material)
    assert page.count("effattn replay") == 0
    assert page.count('<summary><span class="outcome bad">') == len(material.worst) == 9


def test_every_column_and_outcome_is_explained_in_the_page() -> None:
    assert set(legend.COLUMNS) == {*terminal.VERDICT_COLUMNS, *terminal.ACCURACY_COLUMNS}
    assert set(legend.OUTCOMES) == {str(outcome) for outcome in Outcome if summary.failed(outcome)}
    page = html.render(gather.gather([write(Path("now"), verdicts("mine", bad=1))]))
    for column, words in legend.COLUMNS.items():
        assert f"<dt>{column}</dt><dd>{words}.</dd>" in page
    assert "<dt>inaccurate</dt>" in page
    assert "<dt>crashed</dt>" not in page


def test_the_smallest_failing_case_has_its_replay_line(effattn_command: Command) -> None:
    Path("wrong.py").write_text(
        "def f(q, k, v, *, causal, scale):\n    return v[..., :1, :].expand_as(q) * 2\n"
    )
    code, out, _ = effattn_command("gate", "wrong.py:f", "--dtype", "fp32", "--laws", "none", "--out", "run")
    assert code == 1
    lines = [line.strip() for line in out.splitlines() if line.strip().startswith("effattn replay")]
    small = gather.gather([Path("run")]).smallest
    assert small
    assert {found.replay for found in small} <= set(lines)
    page = html.render(gather.gather([Path("run")]))
    section = page[page.index("Smallest cases found that fail") :]
    assert str(escape(small[0].replay)) in section[: section.index("</details>")]


# Charts


def drawn(name: str, material: gather.Material) -> charts.Chart:
    return next(chart for chart in charts.charts(material) if chart.name == name)


def test_errors_of_nothing_are_near_the_others_and_what_has_no_error_is_counted() -> None:
    items = verdicts("mine", bad=1, cases=4, factor=0.6)
    items[2] = replace(items[2], quantities=(replace(items[2].quantities[0], fraction=0.0),))
    crashed = [replace(v, outcome=Outcome.CRASHED, quantities=()) for v in verdicts("mine", cases=8)[4:]]
    material = gather.gather([write(Path("now"), [*items, *crashed])])
    assert sorted(p["drawn"] for p in gather.points(material) if p["drawn"]) == [0.15, 0.3, 0.3, 1.2]
    words = drawn("overview", material).words
    assert "with an error of 0 or next to nothing: 1." in words
    assert "With no error to show: 4 of 8 (4 crashed)." in words
    every = drawn("overview", gather.gather([write(Path("all"), verdicts("mine"))])).words
    assert "next to nothing" not in every
    assert "no error to show" not in every


def test_captions_are_of_what_the_charts_show() -> None:
    items = verdicts("mine", bad=1)
    few = drawn("z", gather.gather([write(Path("few"), items)]))
    items[0] = replace(items[0], quantities=(replace(items[0].quantities[0], z_rms=9.0),))
    many = drawn("z", gather.gather([write(Path("many"), items)]))
    assert "5 stands for more" not in json.dumps(few.spec)
    assert "5 stands for more" in json.dumps(many.spec)


def test_the_map_of_places_has_all_cells_and_the_lightest_is_that_of_none() -> None:
    """More is farther from the page, whose theme has the colours; a case without any error has no place."""
    items = [
        replace(
            v, quantities=(replace(v.quantities[0], worst=(0, 0, v.case.seed, 7), fraction=v.case.seed / 10),)
        )
        for v in verdicts("mine")
    ]
    chart = drawn("places", gather.gather([write(Path("now"), items)]))
    assert chart.rows is not None
    cells = {(row["query"], row["dimension"]) for row in chart.rows}
    assert len(cells) == gather.CELLS**2
    assert sum(row["cases"] for row in chart.rows) == 5
    colour = chart.spec["encoding"]["color"]
    assert (colour["aggregate"], colour["scale"]) == ("sum", {"range": "heatmap", "domainMin": 0})


def test_a_comparison_has_the_diagonal_and_both_limits() -> None:
    old, new = write(Path("old"), verdicts("mine", factor=0.8)), write(Path("new"), verdicts("mine", bad=3))
    layers = drawn("difference", gather.gather([new], against=old)).spec["layer"]
    marks = [(layer["mark"]["type"], *layer["encoding"]) for layer in layers]
    assert marks[:3] == [("line", "x", "y"), ("rule", "x"), ("rule", "y")]


def test_history_tells_methods_apart_and_what_is_bad_from_its_first_run() -> None:
    """A line that is bad from the start is marked, once; a run without a commit goes by its name."""
    for number, (method, bad) in enumerate([("a", 1), ("b", 0), ("a", 1), ("b", 2), ("b", 1)]):
        write(
            Path("runs") / f"run{number}",
            verdicts(method, bad=bad),
            started=f"203{number}-01-01T00:00:00+00:00",
        )
    material = gather.gather([Path("runs/run0")], history=Path("runs"))
    states = [moment.state for moment in material.history]
    assert states == ["bad from its first run", "passed", "failed", "first bad", "failed"]
    page = html.render(material)
    assert "<td>bad from its first run</td>" in page
    assert "<code>run0</code>" in page
    chart = drawn("history", material)
    assert chart.rows is not None
    assert [row["ring"] for row in chart.rows] == [True, False, False, True, False]
    assert "Dashes and shapes tell the methods" in chart.words
    encodings = [layer["encoding"] for layer in chart.spec["layer"]]
    for channel in ("strokeDash", "shape"):
        (scale,) = (e[channel]["scale"] for e in encodings if channel in e)
        assert scale["domain"] == ["a", "b"]
        assert scale["range"][0] != scale["range"][1]
    for run in (1, 3, 4):
        shutil.rmtree(Path("runs") / f"run{run}")
    alone = drawn("history", gather.gather([Path("runs/run0")], history=Path("runs")))
    assert not any("shape" in layer.get("encoding", {}) for layer in alone.spec["layer"])
