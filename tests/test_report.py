"""Reports: what they hold, how large they get, and that names of users are text in every form of them."""

from __future__ import annotations

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from run_folders import say

from effattn.case import Case
from effattn.errors import RequestError
from effattn.report import charts, exports, gather, html, text
from effattn.run import store
from effattn.verdict import Outcome, Quantity, Verdict

Command = Callable[..., tuple[int, str, str]]
OLD = Path(__file__).parent / "data" / "run-schema-1"
HOSTILE = (
    "<img src=x onerror=alert(1)></script>]]>|`*_[a](javascript:b)\x1b[31m\u202e\x00&{{7*7}}\n::error::x,y:%"
)


def verdict(seed: int, fraction: float, *, method: str = "mine", **changes: object) -> Verdict:
    bad = fraction > 1
    return replace(
        Verdict(
            case=Case(
                q_len=8,
                kv_len=16 + seed % 50,
                head_dim=32,
                dtype=("fp16", "bf16", "fp32")[seed % 3],
                seed=seed,
            ),
            method=method,
            outcome=Outcome.INACCURATE if bad else Outcome.PASS,
            message=f"the error is {fraction}" if bad else "fine",
            quantities=(
                Quantity(
                    name="out", count=64, fraction=fraction, z_rms=0.5, ulp_p99=2.0, worst=(0, 0, 7, 31)
                ),
            ),
            seconds={"method": 0.01},
            replay=f"effattn replay {seed}",
        ),
        **changes,
    )


def write(folder: Path, verdicts: list[Verdict], spec: str = "mine.py:f", **provenance: object) -> Path:
    with store.RunWriter(folder, spec=spec) as writer:
        for item in verdicts:
            writer.add(item)
        writer.commit(
            {"started": "2030-01-01T00:00:00+00:00", "ended": "x", "kind_of_run": "gate", **provenance}
        )
    return folder


def svg(chart: charts.Chart, material: gather.Material, folder: Path) -> str:
    file = folder / "chart.svg"
    assert charts.pictures([chart], gather.points(material), [file]) == {}
    return file.read_text()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "run", [verdict(s, 0.1 + s / 20) for s in range(24)])


# What is in it


def test_rows_come_worst_first_and_count_everything(run: Path) -> None:
    material = gather.gather([run])
    assert material.failed == sum(0.1 + s / 20 > 1 for s in range(24)) == 5
    assert material.sentence == "mine failed 5 of 24 judged cases."
    failures = [sum(row.failed.values()) for row in material.rows]
    assert failures == sorted(failures, reverse=True)
    assert sum(row.judged for row in material.rows) == 24
    assert [v.case.seed for v in material.worst[:3]] == [23, 22, 21]


def test_worst_cases_have_one_of_each_kind_first(tmp_path: Path) -> None:
    crashes = [verdict(3 * s, 0.5, outcome=Outcome.CRASHED, quantities=()) for s in range(30)]
    others = [verdict(1, 3.0), verdict(2, 2.0), verdict(4, 2.5)]
    worst = gather.gather([write(tmp_path / "run", [*crashes, *others])]).worst
    assert len(worst) == gather.MOST_WORST
    assert [(v.case.seed, str(v.outcome)) for v in worst[1:3]] == [(1, "inaccurate"), (2, "inaccurate")]
    assert {str(v.outcome) for v in [worst[0], *worst[3:]]} == {"crashed"}


def test_options_are_counted_by_dtype(tmp_path: Path) -> None:
    items = [verdict(s, 0.5) for s in range(3)]
    causal = [replace(v, case=replace(v.case, causal="top-left")) for v in items]
    broken = replace(causal[0], outcome=Outcome.CRASHED)
    material = gather.gather([write(tmp_path / "run", [*items, broken, *causal[1:]])])
    found = {(row.name, row.value): row.cells for row in material.options}
    assert found["causal", "top-left"]["fp16"].failed == {"crashed": 1}
    assert found["causal", "none"]["fp16"].passed == 1
    assert ("layout", "dense") not in found, "an option that all cases share tells nothing"


def test_laws_have_a_table_of_their_own(tmp_path: Path) -> None:
    law = verdict(0, 0.5, law="a law", outcome=Outcome.LAW_BROKEN, quantities=())
    material = gather.gather([write(tmp_path / "run", [verdict(0, 0.5), law])])
    assert [(row.value, row.cells["fp16"].failed) for row in material.laws] == [("a law", {"law broken": 1})]
    assert sum(row.judged for row in material.rows) == 1
    assert (material.judged, material.failed) == (2, 1)


def test_places_are_cells_of_the_output(run: Path) -> None:
    cells = gather.places(gather.gather([run]))
    assert {(cell["query"], cell["dimension"]) for cell in cells} == {(10 / 12, 11 / 12)}
    assert sum(cell["cases"] for cell in cells) == 24


def test_methods_are_put_beside_the_reference_on_the_same_cases(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine", [verdict(s, 0.6) for s in range(4)])
    torch = write(tmp_path / "torch", [verdict(s, 0.2, method="torch") for s in range(3)], "torch")
    reference, pairs = gather.pairs(gather.gather([mine, torch]))
    assert reference == "torch"
    assert [pair["ratio"] for pair in pairs] == [3.0] * 3


def test_history_marks_the_first_bad_commit(tmp_path: Path) -> None:
    for number, (fraction, commit) in enumerate(
        [(0.5, "a"), (0.6, "b"), (2.0, "c"), (3.0, "d"), (0.5, "e"), (4.0, "f")]
    ):
        write(
            tmp_path / f"run{number}",
            [verdict(0, fraction)],
            started=f"203{number}-01-01T00:00:00+00:00",
            working_directory={"commit": commit * 40, "clean": True},
        )
    moments = gather.moments(tmp_path)
    assert [moment.commit[0] for moment in moments] == list("abcdef")
    assert [moment.commit[0] for moment in moments if moment.first_bad] == ["c", "f"]
    say(tmp_path / "run0", schema=3)
    material = gather.gather([tmp_path / "run1"], history=tmp_path)
    assert [moment.commit[0] for moment in material.history] == list("bcdef")
    assert ["run0" in str(damage) and "schema 3" in str(damage) for damage in material.damaged] == [True]
    (drawn,) = [chart for chart in charts.charts(material) if chart.name == "history"]
    assert drawn.rows is not None
    assert [row["at"] for row in drawn.rows] == [letter * 8 for letter in "bcdef"]
    material.history = [replace(moment, commit="c0ffee" * 2) for moment in material.history]
    (drawn,) = [chart for chart in charts.charts(material) if chart.name == "history"]
    assert [row["at"] for row in drawn.rows or []] == ["c0ffeec0", *(f"c0ffeec0 ({i})" for i in range(2, 6))]
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="there is no run"):
        gather.moments(tmp_path / "empty")


def test_report_that_cannot_be_written_is_named(effattn_command: Command, run: Path) -> None:
    """Nor can what was begun of it be removed: its name is too long, as all of a read-only file system is."""
    name = "x" * 245 + ".html"
    code, _, err = effattn_command("report", "run", "--out", name)
    assert code == 2
    assert "cannot write" in err
    assert "Traceback" not in err
    Path("m-charts").write_text("in the way")
    code, _, err = effattn_command("report", "run", "--markdown", "m.md", "--pictures", "svg")
    assert code == 2
    assert "cannot write the pictures into 'm-charts'" in err


def test_ticks_of_the_scale_are_numbers_that_the_scales_are(run: Path) -> None:
    material = gather.gather([run])
    verdicts = [replace(v, case=replace(v.case, scale=0.25)) for v in material.verdicts]
    material.verdicts = verdicts
    (chart,) = [chart for chart in charts.charts(material) if chart.name == "scale"]
    ticks = re.findall(r">([-0-9.]+)</text>", svg(chart, material, run.parent))
    assert "0.25" in ticks, ticks


def test_long_name_of_a_method_loses_its_middle_and_not_the_dtype(tmp_path: Path) -> None:
    long = "kernels/experiments/blocked_attention.py:fused_causal_attention"
    material = gather.gather([write(tmp_path / "run", [verdict(s, 0.5, method=long) for s in range(6)])])
    (chart,) = [chart for chart in charts.charts(material) if chart.name == "overview"]
    labels = re.findall(r">([^<]+ · [^<]+)</text>", svg(chart, material, tmp_path))
    assert sorted(labels) == [f"kernels/experi…al_attention · {dtype}" for dtype in ("bf16", "fp16", "fp32")]


def test_points_of_a_large_run_are_the_worst_and_some_of_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "MOST_POINTS", 30)
    material = gather.gather([write(tmp_path / "run", [verdict(s, s / 1000) for s in range(500)])])
    points = gather.points(material)
    assert len(points) == 30
    fractions = [point["fraction"] for point in points]
    assert fractions[:10] == [x / 1000 for x in range(499, 489, -1)]
    assert min(fractions) < 0.05
    assert f"30 of {500} cases are drawn" in html.render(material)


def test_run_without_verdicts_and_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no verdict"):
        gather.gather([write(tmp_path / "empty", [])])
    with pytest.raises(RequestError, match="not a run folder"):
        gather.gather([tmp_path])


# The page


def test_page_needs_nothing_else(run: Path) -> None:
    page = html.render(gather.gather([run]))
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"<(link|img|iframe|object)\b|src=|href=\"(?!#)|@import|url\(", outside)
    assert "default-src 'none'" in page
    assert len(page.encode()) < 3_000_000
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert len(data["cases"]) == 24


def test_names_of_users_are_text_in_the_page(tmp_path: Path) -> None:
    items = [verdict(s, 2.0, method=HOSTILE, message=HOSTILE, replay=HOSTILE) for s in range(3)]
    folder = write(tmp_path / "run", items, HOSTILE, command=HOSTILE, method={HOSTILE: HOSTILE})
    page = html.render(gather.gather([folder], against=folder, history=tmp_path))
    # The script that draws has such words of its own; the data between it and the page are checked as text.
    bundle = max(re.findall(r"<script>.*?</script>", page, re.DOTALL), key=len)
    assert "<img" not in page.replace(bundle, "")
    assert page.count("</script>") == 3
    assert "{{7*7}}" in page


def test_old_run_has_a_report(effattn_command: Command, tmp_path: Path) -> None:
    code, out, err = effattn_command("report", OLD, "--out", tmp_path / "old.html")
    assert code == 0, err
    assert out.strip() == f"Report: {tmp_path / 'old.html'}"
    assert "last_partial_block_dropped failed 7 of 9 judged cases." in (tmp_path / "old.html").read_text()


def test_script_in_the_cache_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = charts.javascript()
    (kept,) = (tmp_path / "effattn").glob("vega-*.js")
    kept.write_text("alert(1)" + whole[8:])
    assert charts.javascript() == whole
    assert charts.javascript() == kept.read_text()


def test_pictures_are_pictures(run: Path, tmp_path: Path) -> None:
    material = gather.gather([run])
    for kind in ("svg", "png"):
        made, failed = exports.pictures(material, tmp_path / kind, format=kind)
        assert failed == {}
        assert [path.name for path in made] == [f"overview.{kind}", f"z.{kind}"]
    root = ElementTree.parse(tmp_path / "svg" / "overview.svg").getroot()
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 24
    assert (tmp_path / "png" / "z.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_hostile_names_are_drawn_and_shown(effattn_command: Command, tmp_path: Path) -> None:
    import markdown_it  # rich, which the package needs, brings it

    name = "e\x1b\x00\x7f\ufffe\u2028\n.py:f"
    folder = write(tmp_path / "run", [verdict(s, 0.5 + s, method=name, message=name) for s in range(9)])
    for kind, begin in (("svg", b"<svg"), ("png", b"\x89PNG")):
        target = tmp_path / "a (b) <c> 100%.md"
        code, _, err = effattn_command(
            "report", folder, "--history", tmp_path, "--markdown", target, "--pictures", kind
        )
        assert (code, err) == (0, "")
        shown = markdown_it.MarkdownIt("commonmark").enable("table").render(target.read_text())
        sources = [unquote(source) for source in re.findall(r'<img src="([^"]*)"', shown)]
        assert sources == [f"a (b) <c> 100%-charts/{which}.{kind}" for which in ("overview", "z", "history")]
        for source in sources:
            assert (tmp_path / source).read_bytes().startswith(begin)
    labels = re.findall(r">([^<]* · [^<]+)</text>", (tmp_path / sources[0]).with_suffix(".svg").read_text())
    assert set(labels) == {f"e\ufffd\ufffd\ufffd\ufffd .py:f · {dtype}" for dtype in ("bf16", "fp16", "fp32")}


def test_a_picture_that_ends_its_process_takes_no_other_with_it(
    effattn_command: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a control character did: here it is not taken out."""
    monkeypatch.setattr(text, "plain", str)
    folder = write(run.parent / "other", [verdict(s, 0.5, method="e\x1b") for s in range(9)])
    code, _, err = effattn_command(
        "report", folder, "--markdown", "m.md", "--pictures", "png", "--junit", "j.xml"
    )
    assert code == 2
    assert "cannot draw the picture 'm-charts/overview.png': vl-convert ended with code -6" in err
    assert "z.png" not in err
    assert Path("m-charts/z.png").read_bytes().startswith(b"\x89PNG")
    written = Path("m.md").read_text()
    assert "![z](m-charts/z.png)" in written
    assert "![overview]" not in written
    assert Path("j.xml").exists()


# The other forms


@pytest.mark.parametrize("count", [3, 3000])
def test_markdown_is_small_whatever_the_run_holds(tmp_path: Path, count: int) -> None:
    long = "x" * 5000
    items = [verdict(s, 2.0 + s, message=long, replay=long, method=f"m{s % 60}") for s in range(count)]
    folder = write(tmp_path / "run", items, command=long)
    written = exports.pull_request(gather.gather([folder], against=folder))
    assert len(written.encode()) < 60_000
    assert f"failed {count} of {count} judged cases" in written
    assert written.count("| inaccurate |") == min(count, 10)


def test_names_of_users_are_text_in_markdown(tmp_path: Path) -> None:
    import markdown_it  # rich, which the package needs, brings it

    items = [verdict(s, 2.0, method=HOSTILE, message=HOSTILE, replay=HOSTILE) for s in range(3)]
    folder = write(tmp_path / "run", items, HOSTILE, command=HOSTILE)
    shown = (
        markdown_it.MarkdownIt("commonmark")
        .enable("table")
        .render(exports.pull_request(gather.gather([folder])))
    )
    assert "<img" not in shown
    assert "javascript:" not in re.sub(r"<code>.*?</code>", "", shown, flags=re.DOTALL).replace(
        "(javascript:b)", ""
    )
    assert not re.search(r"<a\b|<script", shown)


def test_a_line_of_a_message_is_no_heading_and_no_list(tmp_path: Path) -> None:
    import markdown_it  # rich, which the package needs, brings it

    message = "above\n=====\nbetween\n-----\n# below\n1. one\n2) two\n12 three\n3.5 four\n* five\n+ six"
    written = exports.pull_request(
        gather.gather([write(tmp_path / "run", [verdict(0, 2.0, message=message)])])
    )
    shown = markdown_it.MarkdownIt("commonmark").enable("table").render(written)
    (quoted,) = re.findall(r"<blockquote>(.*?)</blockquote>", shown, re.DOTALL)
    assert [
        line.strip() for line in re.sub("<[^>]*>", "", quoted).strip().splitlines()
    ] == message.splitlines()
    assert set(re.findall(r"<(\w+)", quoted)) == {"p", "br"}


def test_junit_is_xml_with_a_test_for_each_case(run: Path) -> None:
    items = [
        verdict(0, 0.5),
        verdict(3, 2.0, method=HOSTILE, message=HOSTILE),
        verdict(6, 0.5, outcome=Outcome.NOT_SUPPORTED, message="not supported: no"),
    ]
    folder = write(run.parent / "hostile", items, HOSTILE)
    root = ElementTree.fromstring(exports.junit(gather.gather([folder])))
    assert sum(int(suite.get("tests", "0")) for suite in root) == 3
    assert sum(int(suite.get("failures", "0")) for suite in root) == 1
    assert sum(int(suite.get("skipped", "0")) for suite in root) == 1
    (failure,) = root.iter("failure")
    assert failure.get("type") == "inaccurate"
    assert "onerror=alert(1)></script>]]>" in (failure.text or "")
    assert len(list(root.iter("testcase"))) == 3


def test_at_most_ten_annotations_each_one_line(tmp_path: Path) -> None:
    items = [verdict(s, 2.0 + s, method=f"{HOSTILE}{s}", message=HOSTILE) for s in range(30)]
    lines = exports.workflow_commands(gather.gather([write(tmp_path / "run", items)]))
    assert len(lines) == 10
    for line in lines:
        assert re.fullmatch(r"::error title=[^\n,:]*::[^\n]*", line)
        assert "%0A" in line
    assert exports.workflow_commands(gather.gather([write(tmp_path / "good", [verdict(0, 0.5)])])) == []


def test_report_on_github(effattn_command: Command, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(run.parent / "step.md"))
    (run.parent / "step.md").write_text("before\n")
    code, out, _ = effattn_command(
        "report", run, "--junit", "j.xml", "--markdown", "m.md", "--pictures", "svg"
    )
    assert code == 0
    assert out.count("::error") == 3, "one for each dtype"
    assert (run.parent / "step.md").read_text().startswith("before\n# effattn")
    assert Path("j.xml").read_text().startswith("<?xml")
    assert "![overview](m-charts/overview.svg)" in Path("m.md").read_text()
    assert Path("m-charts/overview.svg").is_file()
    assert (run / "report.html").is_file()
    code, out, _ = effattn_command("report", run, "--no-github")
    assert "::error" not in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "is no run"),
        (["run", "--pictures", "svg"], "--markdown"),
        (["run", "--against", "nowhere"], "is no run"),
        (["run", "--history", "nowhere"], "no folder"),
        (["run", "--out", "/proc/nowhere/r.html"], "cannot write"),
    ],
)
def test_wrong_commands(effattn_command: Command, run: Path, arguments: list[str], words: str) -> None:
    code, _, err = effattn_command("report", *arguments)
    assert code == 2
    assert words in err


@pytest.mark.parametrize("summary", ["/proc/nowhere/step.md", "."])
def test_a_step_summary_that_cannot_be_written_is_named_and_the_rest_is_written(
    effattn_command: Command, run: Path, monkeypatch: pytest.MonkeyPatch, summary: str
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", summary)
    code, out, err = effattn_command("report", run, "--github", "--junit", "j.xml", "--markdown", "m.md")
    assert code == 2
    assert f"cannot write the job summary into {summary!r}, which GITHUB_STEP_SUMMARY names: " in err
    assert out.count("::error") == 3
    assert Path("j.xml").exists()
    monkeypatch.delenv("GITHUB_STEP_SUMMARY")
    Path("j.xml").unlink()
    code, _, err = effattn_command("report", run, "--out", "/proc/nowhere/r.html", "--junit", "j.xml")
    assert code == 2
    assert "cannot write" in err
    assert Path("j.xml").exists()


@pytest.mark.parametrize("missing", ["altair", "vl_convert", "jinja2"])
def test_what_a_report_needs_is_named_where_it_is_missing(
    effattn_command: Command, run: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    code, _, err = effattn_command("report", run)
    assert code == 2
    assert "effattn[report]" in err


# Against another run


def test_every_kind_of_change_is_in_every_form(effattn_command: Command, tmp_path: Path) -> None:
    unsupported = {"outcome": Outcome.NOT_SUPPORTED, "quantities": ()}
    pairs = {
        "broken": ({}, {"outcome": Outcome.CRASHED}),
        "failing and not judged before": (unsupported, {"outcome": Outcome.CRASHED}),
        "passed and judged no more": ({}, unsupported),
        "other outcome": ({"outcome": Outcome.CRASHED}, unsupported),
        "mended": ({"outcome": Outcome.CRASHED}, {}),
    }
    runs = [
        write(tmp_path / name, [verdict(s, 0.05, **each[of]) for s, each in enumerate(pairs.values())])
        for of, name in enumerate(("before", "after"))
    ]
    write(tmp_path / "more", [verdict(s, 0.05) for s in range(1, 4)])
    code, _, err = effattn_command(
        "report", runs[1], "--against", runs[0], "--out", tmp_path / "r.html", "--markdown", tmp_path / "r.md"
    )
    assert code == 0, err
    page, summary = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    for title in pairs:
        assert f"<h3>{title.capitalize()}: 1</h3>" in page
        assert f"\n{title.capitalize()}: 1\n" in summary
    assert page.count('<td class="whole">pass 0.05</td>') == 3
    assert '<td class="whole">not supported -</td><td class="whole">crashed 0.05</td>' in page
    assert summary.count("| pass 0.05 |") == 3
    assert "| not supported - | crashed 0.05 |" in summary
    sentence = "5 cases compared: 1 broken, 1 failing and not judged before, 1 passed and judged no more,"
    assert sentence in page
    assert sentence in summary
    material = gather.gather([tmp_path / "more"], against=runs[0])
    assert material.difference is not None
    assert material.difference.sentence.endswith(" 2 cases are in the former run only.")


# With a gate


def test_gate_writes_a_report_and_compares(
    effattn_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from effattn.properties import profiles

    monkeypatch.chdir(tmp_path)
    cases = profiles.with_values(profiles.cases("smoke", dtype="fp32"), ["constant"])
    before = [replace(verdict(0, 0.9), case=case) for case in cases]
    before[0] = replace(before[0], outcome=Outcome.CRASHED)
    write(tmp_path / "before", before)
    code, out, err = effattn_command(
        "gate", "torch", "--dtype", "fp32", "--values", "constant", "--out", "now", "--report",
        "--against", "before",
    )  # fmt: skip
    assert code == 0, err
    *_, compared, written, reported = out.splitlines()
    assert compared.startswith(
        f"{len(cases)} cases compared: 0 broken, 14 passed and judged no more, 0 notably worse"
    )
    assert (written, reported) == ("Written to now/", "Report: now/report.html")
    assert "Against before" in (tmp_path / "now" / "report.html").read_text()


def test_a_run_with_other_cases_is_said_to_be_no_comparison_and_its_damage_is_named(
    effattn_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "before", [verdict(0, 0.9), verdict(3, 0.9)])
    file = tmp_path / "before" / "verdicts.jsonl"
    file.write_bytes(file.read_bytes().replace(b"0.9", b"0.8", 1))
    method = "effattn.zoo:last_partial_block_dropped"
    code, out, err = effattn_command(
        "gate",
        method,
        "--dtype",
        "fp32",
        "--values",
        "constant",
        "--out",
        "now",
        "--report",
        "--against",
        "before",
    )
    assert code == 1, err
    assert "before/verdicts.jsonl, line 1 is damaged" in err
    sentence = "The runs have no case in common; nothing was compared."
    *_, compared, written, reported = out.splitlines()
    assert (compared, written, reported) == (sentence, "Written to now/", "Report: now/report.html")
    assert sentence in (tmp_path / "now" / "report.html").read_text()
    code, _, err = effattn_command("report", "now", "--against", "before")
    assert code == 2
    assert "no case in common" in err


def test_baseline_that_is_not_there_is_refused_before_the_gate(
    effattn_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = effattn_command("gate", "torch", "--against", "nowhere", "--out", "run")
    assert code == 2
    assert "is no run" in err
    monkeypatch.setitem(sys.modules, "altair", None)
    code, _, err = effattn_command("gate", "torch", "--report", "--out", "run")
    assert code == 2
    assert "effattn[report]" in err
    assert not (tmp_path / "run").exists()
