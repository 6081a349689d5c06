"""What a report shows beside its runs: a committed baseline, and studies of approximations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from effattn.case import Case
from effattn.errors import RequestError
from effattn.report import charts, gather, html, studies
from effattn.run import store
from effattn.study.engine import Job, Point, Store
from effattn.tolerances import baselines
from effattn.verdict import Outcome, Quantity, Verdict

Command = Callable[..., tuple[int, str, str]]
FACTS = {
    "kind_of_run": "gate",
    "device": "cpu",
    "dot_model": "ieee",
    "profile": "smoke",
    "method": {"name": "mine"},
}


def verdicts(factor: float = 1.0, *, cases: int = 60, name: str = "out") -> list[Verdict]:
    return [
        Verdict(
            case=Case(q_len=8, kv_len=8, head_dim=8, dtype="fp16", seed=seed),
            method="mine",
            outcome=Outcome.PASS,
            message="",
            quantities=(
                Quantity(
                    name=name,
                    count=64,
                    fraction=factor * (0.2 + seed / 100),
                    z_rms=factor * (0.8 + seed / 1000),
                ),
            ),
            replay="",
        )
        for seed in range(cases)
    ]


def write(folder: Path, items: list[Verdict], **facts: object) -> Path:
    with store.RunWriter(folder, spec=f"{items[0].method}.py:f") as writer:
        for item in items:
            writer.add(item)
        writer.commit({"started": "2030-01-01T00:00:00+00:00", "ended": "x", **FACTS, **facts})
    return folder


@pytest.fixture
def baseline(tmp_path: Path) -> Path:
    file = tmp_path / "mine.toml"
    kind = baselines.kind_of(FACTS)
    found = baselines.updated(
        None, method="mine", kind=kind, verdicts=verdicts(), origin={"reason": "<first>"}
    )
    file.write_text(baselines.render(found))
    return file


# A baseline


@pytest.mark.parametrize(("factor", "state"), [(1.0, ""), (1.7, "worse"), (0.5, "better")])
def test_rows_beside_a_baseline_say_what_changed(
    tmp_path: Path, baseline: Path, factor: float, state: str
) -> None:
    run = write(tmp_path / "run", verdicts(factor))
    beside = gather.gather([run], baseline=baseline).beside
    assert beside is not None
    assert {str(line.key): line.state for line in beside.lines} == {
        "fp16 all out": state,
        "fp16 plain out": state,
    }
    line = beside.lines[0]
    assert line.cases == (60, 60)
    assert line.fraction[1] == pytest.approx(factor * line.fraction[0])
    assert line.largest[0] == pytest.approx(0.79)
    assert {point["state"] for point in beside.points} == {state or "no significant change"}
    page = html.render(gather.gather([run], baseline=baseline))
    assert 'id="baseline"' in page
    words = {"worse": "Worse: ", "better": "Better: "}
    for other, heading in words.items():
        assert (f"<h3>{heading}" in page) == (other == state)
    assert "&lt;first&gt;" in page


def test_rows_that_are_gone_or_new_are_listed(tmp_path: Path, baseline: Path) -> None:
    run = write(tmp_path / "run", verdicts(name="lse"))
    page = html.render(gather.gather([run], baseline=baseline))
    assert "<h3>In the baseline, but not judged now: 2</h3>" in page
    assert "<h3>Judged now, but not in the baseline: 2</h3>" in page


def test_gates_of_one_method_in_several_folders_are_put_together(tmp_path: Path, baseline: Path) -> None:
    items = verdicts()
    parts = [write(tmp_path / name, some) for name, some in (("a", items[:30]), ("b", items[30:]))]
    other = write(
        tmp_path / "other", [replace(v, method="other") for v in verdicts(9.0)[:5]], method={"name": "other"}
    )
    beside = gather.gather([*parts, other], baseline=baseline).beside
    assert beside is not None
    assert {(line.cases, line.state) for line in beside.lines} == {((60, 60), "")}


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"method": {"name": "other"}}, "it is of 'mine', and no run given is a gate of that method"),
        (
            {"profile": "ci"},
            "it has nothing for cpu, dot model ieee, profile ci, only for cpu, dot model ieee, profile smoke",
        ),
        ({"values": ["normal"]}, "a baseline is for a profile's own values"),
        ({"kind_of_run": "sweep"}, "no run given is a gate"),
    ],
)
def test_a_baseline_of_something_else_is_refused(
    effattn_command: Command, tmp_path: Path, baseline: Path, facts: dict[str, object], words: str
) -> None:
    run = write(tmp_path / "run", verdicts(), **facts)
    code, _, err = effattn_command("report", run, "--baseline", baseline)
    assert code == 2
    assert words in err


def test_runs_of_several_kinds_are_refused(tmp_path: Path, baseline: Path) -> None:
    runs = [write(tmp_path / name, verdicts(), profile=name) for name in ("smoke", "ci")]
    with pytest.raises(RequestError, match="the runs are of several kinds"):
        gather.gather(runs, baseline=baseline)


# Studies


def study(
    folder: Path, errors: dict[tuple[str, int], list[float]], *, name: str = "performer", **fields: object
) -> Path:
    """A folder as `effattn study` leaves it."""
    kept = Store(folder, {"study": name}, ("error", "loss_change", "similarity_change"))
    given = {
        Job(point=Point(n=64, head_dim=16, method=method, size=size, **fields), draw=draw): error  # type: ignore[arg-type]
        for (method, size), draws in errors.items()
        for draw, error in enumerate(draws)
    }
    measure = "loss_change" if name == "model" else "error"
    kept.run(list(given), lambda job: {measure: given[job]})
    return folder


ERRORS = {
    ("positive, iid", 16): [0.5, 0.4, 0.6],
    ("positive, iid", 64): [0.25, 0.2, 0.3],
    ("truncated SVD", 16): [0.1],
    ("truncated SVD", 64): [0.0],
    ("uniform", 0): [0.3],
}


def test_a_study_is_a_table_and_a_chart_for_each_setting(tmp_path: Path) -> None:
    found = studies.read(study(tmp_path / "study", ERRORS), 3)
    (table,) = found.tables
    assert (table.name, table.sizes, found.more) == ("study-3-0", [16, 64], 0)
    assert [row[0] for row in table.rows] == ["positive, iid", "truncated SVD", "uniform"]
    assert table.rows[0][1][:2] == ["0.500 (0.400 to 0.600)", "0.250 (0.200 to 0.300)"]
    assert float(table.rows[0][1][2].split()[0]) == pytest.approx(-0.5, abs=1e-3)
    assert table.rows[2][1][:2] == ["0.300", "0.300"]
    assert table.sentences == [
        "No better than uniform attention (0.30) at m = 16: positive, iid.",
        "Slopes leave out errors below 1e-06, which are rounding: at m = 64.",
    ]
    assert found.legend[0].startswith("positive: features exp(")
    drawn = {(point["method"], point["size"]): point["median"] for point in table.points}
    assert drawn["uniform", 16] == drawn["uniform", 64] == 0.3
    assert ("truncated SVD", 64) not in drawn, "a logarithmic axis has no 0"
    assert {point["kind"] for point in table.points} == {"method", "floor", "control"}


def test_a_study_of_models_shows_what_changes_with_all_layers(tmp_path: Path) -> None:
    folder = study(tmp_path / "a", {("performer, positive", size): [4.0 / size] for size in (8, 32)}, name="model",
                   part="smollm2", values="all layers")  # fmt: skip
    study(folder, {("performer, positive", 8): [9.0]}, name="model", part="smollm2", values="layer 1")
    (table,) = studies.read(folder).tables
    assert table.heading == "SmolLM2-135M, 64 tokens, all layers"
    assert table.measure == "change of the loss"
    assert [point["median"] for point in table.points] == [0.5, 0.125]


def test_a_study_that_is_running_is_read_and_left_alone(tmp_path: Path) -> None:
    folder = study(tmp_path / "study", ERRORS)
    draws = folder / "draws.csv"
    whole = draws.read_bytes()
    draws.write_bytes(whole + b"error,64,16,norm")
    assert studies.read(folder) == replace(
        studies.read(folder), tables=studies.read(study(tmp_path / "b", ERRORS)).tables
    )
    assert draws.read_bytes() == whole + b"error,64,16,norm"


def test_settings_beyond_a_page_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "MOST_SETTINGS", 2)
    for scale in (0.25, 0.5, 1.0):
        study(tmp_path / "study", ERRORS, input_scale=scale)
    found = studies.read(tmp_path / "study")
    assert (len(found.tables), found.more) == (2, 1)


def test_the_axis_of_a_study_reaches_what_its_caption_says(tmp_path: Path) -> None:
    errors = {("a", 16): [500.0], ("a", 64): [200.0], ("b", 16): [0.5], ("b", 64): [0.001]}
    alt, _ = charts.load()

    def drawn(folder: Path, **fields: object) -> tuple[str, float, dict]:
        (table,) = studies.read(study(folder, errors, **fields)).tables
        chart = charts._study(alt, table)
        encoding = chart.spec["layer"][1]["encoding"]
        return chart.words, encoding["y"]["scale"]["domain"][0], encoding

    words, low, encoding = drawn(tmp_path / "s")
    assert low <= 0.001
    assert "below the axis" not in words
    assert encoding["color"]["legend"]["orient"] == "bottom"
    errors["exact", 64] = [1e-15]
    words, low, _ = drawn(tmp_path / "t")
    assert 1e-6 < low <= 0.001
    assert "Errors under 1e-06 are below the axis" in words
    words, _, encoding = drawn(tmp_path / "u", part="spectrum")
    assert "uniform" not in words
    assert encoding["y"]["title"] == "share of the sum of singular values"


def test_every_line_of_a_study_can_be_told_without_colour(tmp_path: Path) -> None:
    errors = {(f"method {i}", size): [1.0 / size] for i in range(20) for size in (16, 64)}
    errors |= {(name, 0): [0.5] for name in ("zero", "uniform", "shuffled V")}
    errors |= {(name, size): [0.1] for name in ("theory", "truncated SVD") for size in (16, 64)}
    alt, _ = charts.load()
    (table,) = studies.read(study(tmp_path / "study", errors)).tables
    spec = charts._study(alt, table).spec
    _, lines, dots = spec["layer"]
    dashes, shapes = (
        layer["encoding"][name]["scale"] for layer, name in ((lines, "strokeDash"), (dots, "shape"))
    )
    assert dashes["domain"] == shapes["domain"] == lines["encoding"]["color"]["scale"]["domain"]
    looks = {
        name: (tuple(d), s)
        for name, d, s in zip(dashes["domain"], dashes["range"], shapes["range"], strict=True)
    }
    assert len(looks) == len(set(looks.values())) == 25
    # What is no method has no points, so its dashes alone are its own.
    others = ["theory (predicted)", "truncated SVD", "zero", "uniform", "shuffled V"]
    assert {looks[name][1] for name in others} == {"stroke"}
    assert len({looks[name][0] for name in others}) == 5
    assert "stroke" not in {look[1] for name, look in looks.items() if name not in others}
    assert dots["transform"] == [{"filter": "datum.kind == 'method'"}]
    # One legend: the three channels have the same title.
    assert {
        e["title"]
        for e in (lines["encoding"]["color"], lines["encoding"]["strokeDash"], dots["encoding"]["shape"])
    } == {"method"}


def test_studies_are_in_the_page(effattn_command: Command, tmp_path: Path) -> None:
    run = write(tmp_path / "run", verdicts())
    first, second = study(tmp_path / "<b>", ERRORS), study(tmp_path / "two", ERRORS, dtype="bf16")
    code, _, err = effattn_command(
        "report", run, "--study", first, "--study", second, "--out", tmp_path / "r.html"
    )
    assert code == 0, err
    page = (tmp_path / "r.html").read_text()
    assert "<b>" not in re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    for name in ("study-0-0", "study-1-0"):
        assert f'data-chart="{name}"' in page
    assert '<td class="number">0.250 (0.200 to 0.300)</td>' in page
    assert page.count("No better than uniform attention (0.30) at m = 16: positive, iid.") == 2
    assert page.count("<li>uniform: control: the average of all values that a row sees</li>") == 2
    material = gather.gather([run], studies=[first])
    assert [chart.section for chart in charts.charts(material)].count("approximations") == 1


def _break(folder: Path, kind: str) -> None:
    if kind == "none":
        (folder / "study.json").unlink()
    elif kind == "schema":
        file = folder / "study.json"
        file.write_text(file.read_text().replace('"schema": 2', '"schema": 99'))
    elif kind == "json":
        (folder / "study.json").write_text("{")
    elif kind == "csv":
        (folder / "draws.csv").write_text("part,n\nerror,1\n")
    elif kind == "list":
        (folder / "study.json").write_text("[]")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("none", "is no folder of a study: it has no study.json"),
        ("schema", "is of no study that this effattn wrote"),
        ("list", "is of no study that this effattn wrote"),
        ("json", "cannot be read"),
        ("csv", "its first line is not that of a table of draws"),
    ],
)
def test_what_is_no_study_is_refused(effattn_command: Command, tmp_path: Path, kind: str, words: str) -> None:
    run, folder = write(tmp_path / "run", verdicts()), study(tmp_path / "study", ERRORS)
    _break(folder, kind)
    code, _, err = effattn_command("report", run, "--study", folder)
    assert code == 2
    assert words in err


def test_damaged_draws_are_named_and_left_out(effattn_command: Command, tmp_path: Path) -> None:
    run, folder = write(tmp_path / "run", verdicts()), study(tmp_path / "study", ERRORS)
    file = folder / "draws.csv"
    file.write_text(file.read_text().replace("0.25", "0.75"))
    code, _, err = effattn_command("report", run, "--study", folder, "--out", tmp_path / "r.html")
    assert code == 0
    words = f"{file}, line 5 is damaged: its checksum does not match"
    assert words in err
    page = (tmp_path / "r.html").read_text()
    assert words in page
    assert '<td class="number">0.250 (0.200 to 0.300)</td>' in page, "the median of the other two"


def test_studies_without_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'complexity', which has no error against rank"):
        studies.read(study(tmp_path / "a", ERRORS, name="complexity"))
    with pytest.raises(RequestError, match="no draw of two sizes yet"):
        studies.read(study(tmp_path / "b", {("positive, iid", 16): [math.e]}))
