"""Studies: measures that are right, runs that resume, answers that can be checked, charts, messages."""

from __future__ import annotations

import csv
import math
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from effattn.errors import EffattnError, RequestError
from effattn.study import inverse, measures, plans, theory
from effattn.study.engine import DRAWS, Job, Point, Store, by_point
from effattn.study.intervals import constant
from effattn.study.problems import problem
from effattn.study.results import Curve, curves, setting

# -- measures ----------------------------------------------------------------------------------------------


def _tensors(n: int = 24) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, 2, n, 8, generator=g, dtype=torch.float64) for _ in range(3))


def test_errors_of_known_outputs() -> None:
    exact = torch.tensor([[[[3.0, 4.0], [0.0, 2.0]]]])
    assert measures.output_errors(exact, exact)["error"] == 0.0
    zero = measures.output_errors(0 * exact, exact)
    assert (zero["error"], zero["row_max"], zero["mse"]) == (1.0, 1.0, 7.25)
    half = measures.output_errors(torch.tensor([[[[3.0, 4.0], [0.0, 1.0]]]]), exact)
    assert half["error"] == pytest.approx(1 / math.sqrt(29))
    assert (half["row_max"], half["cosine"]) == (0.5, 1.0)
    assert math.isnan(measures.output_errors(exact * math.nan, exact)["error"])


def test_divergence_is_zero_for_the_same_weights_only_and_refuses_negative_ones() -> None:
    q, k, _ = _tensors()
    weights = measures.exact_weights(q, k, causal=True)
    hidden = measures.causal_mask(24, 24)
    assert measures.divergence(weights, weights, hidden) == pytest.approx(0, abs=1e-14)
    other = measures.exact_weights(2 * q, k, causal=True)
    assert measures.divergence(other, weights, hidden) > 0.1
    assert math.isnan(measures.divergence(-weights, weights, hidden))


def test_baselines_are_exact_at_full_size_and_not_before() -> None:
    q, k, v = _tensors()
    weights = measures.exact_weights(q, k, causal=False)
    svd = torch.linalg.svd(weights)
    for name, at in {
        "svd": lambda size: measures.truncated(tuple(svd), size),
        "top-k": lambda size: measures.top_k(weights, size),
        "nystroem": lambda size: measures.nystroem(q, k, size),
    }.items():
        assert float((at(24) - weights).abs().max()) < 1e-6, name
        assert float((at(6) - weights).norm() / weights.norm()) > 0.05, name
    floor = float((measures.truncated(tuple(svd), 6)[0, 0] - weights[0, 0]).norm() / weights[0, 0].norm())
    assert floor == pytest.approx(theory.floor(svd.S[0, 0].numpy(), 6))
    causal = measures.exact_weights(0 * q, k, causal=True)
    torch.testing.assert_close(measures.uniform(v, 2, causal=True), measures.apply(causal, v))
    with pytest.raises(RequestError, match="25 landmarks of 24 tokens"):
        measures.nystroem(q, k, 25)


def test_theory_predicts_the_mean_square_error_of_the_output() -> None:
    """Where m >> exp(|z|^2) and v knows nothing of k: within 12 % over 60 draws; for a wrong m it isn't."""
    from effattn.methods.performer import performer_attention
    from effattn.methods.performer_features import draw_projections
    from effattn.study.performer import theory_error

    data = problem(Job(point=Point(n=64, head_dim=8, input_scale=0.25, method=""), draw=0), seed=3)
    squares = []
    for draw in range(60):
        omega = draw_projections(
            256, 8, generator=torch.Generator().manual_seed(draw), kind="iid", dtype=torch.float64
        )
        out = performer_attention(data.q.double(), data.k.double(), data.v.double(), omega)
        squares.append(measures.output_errors(out, data.exact)["error"] ** 2)
    measured = math.sqrt(np.mean(squares))
    assert measured == pytest.approx(theory_error(data, 256), rel=0.12)
    assert measured != pytest.approx(theory_error(data, 512), rel=0.25)


# -- runs --------------------------------------------------------------------------------------------------


def _jobs(count: int = 6) -> list[Job]:
    return [Job(point=Point(n=8, head_dim=4, method="a, b", size=3), draw=i) for i in range(count)]


def test_a_study_resumes_without_losing_or_repeating_a_draw(tmp_path: Path) -> None:
    measured: list[int] = []

    def measure(job: Job) -> dict[str, float]:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(job.draw)
        return {"error": 0.1 * job.draw}

    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path, {"a": 1}, ["error", "kl"]).run(_jobs(), measure)
    # As if the power had gone while a row was being written.
    with (tmp_path / DRAWS).open("a") as file:
        file.write("error,8,4,normal,1.0,fp32,False,a, b")
    again: list[int] = []
    rows = Store(tmp_path, {"a": 1}, ["error", "kl"]).run(
        _jobs(), lambda job: (again.append(job.draw), {"error": 0.1 * job.draw})[1]
    )
    assert (measured, again) == ([0, 1, 2], [3, 4, 5])
    assert [row.measures for row in rows] == [{"error": 0.1 * i} for i in range(6)]
    with (tmp_path / DRAWS).open(newline="") as file:
        assert [int(line["draw"]) for line in csv.DictReader(file)] == list(range(6))
    assert (
        Store(tmp_path, {"a": 1}, ["error", "kl"]).run(_jobs(), lambda job: pytest.fail("repeated")) == rows
    )


def test_a_folder_keeps_to_one_study(tmp_path: Path) -> None:
    early = Store(tmp_path / "a", {"seed": 2}, ["error"])
    Store(tmp_path / "a", {"seed": 1}, ["error"]).run(_jobs(), lambda job: {"error": 1.0})
    with pytest.raises(RequestError, match="holds the draws of another study"):
        # It was opened while there was no draw.
        early.run(_jobs(), lambda job: pytest.fail("measured"))
    with pytest.raises(RequestError, match="holds the draws of another study"):
        Store(tmp_path / "a", {"seed": 2}, ["error"])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("x")
    with pytest.raises(RequestError, match="holds something already"):
        Store(tmp_path / "b", {"seed": 1}, ["error"])


def test_a_second_study_in_a_folder_is_refused_while_one_writes(tmp_path: Path) -> None:
    jobs = _jobs()
    store = Store(tmp_path / "s", {"study": "x"}, ("error",))

    def measure(job: Job) -> dict[str, float]:
        if job == jobs[0]:
            with pytest.raises(RequestError, match="another study is writing into"):
                Store(tmp_path / "s", {"study": "x"}, ("error",)).run(jobs, lambda job: {"error": 2.0})
        return {"error": 1.0}

    assert {row.measures["error"] for row in store.run(jobs, measure)} == {1.0}
    # One that was opened before sees what the other has written since.
    late = Store(tmp_path / "t", {"study": "x"}, ("error",))
    Store(tmp_path / "t", {"study": "x"}, ("error",)).run(jobs, lambda job: {"error": 1.0})
    assert {row.measures["error"] for row in late.run(jobs, lambda job: {"error": 2.0})} == {1.0}


def test_an_empty_study_file_of_a_full_disk_is_none(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text("")
    jobs = _jobs()
    assert len(Store(tmp_path, {"study": "x"}, ("error",)).run(jobs, lambda job: {"error": 1.0})) == len(jobs)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(RequestError, match="cannot use the folder"):
        Store(tmp_path, {"study": "x"}, ("error",))


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, effattn_command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "effattn-runs").write_text("in the way")
    code, _, err = effattn_command("study", "performer", "--n", "16", "--size", "8", "--draws", "1")
    assert code == 2
    assert "Traceback" not in err
    assert "effattn-runs" in err
    assert "--out" in err


def test_an_interrupted_command_says_so_and_goes_on(tmp_path: Path) -> None:
    script = textwrap.dedent(
        """
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from effattn.study import performer, command
        measure, count = performer.measure, [0]
        def interrupted(job, *, seed):
            count[0] += 1
            if count[0] == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return measure(job, seed=seed)
        command._MEASURES["performer"] = interrupted
        from effattn.cli import main
        sys.exit(main(sys.argv[1:]))
        """
    )
    arguments = [
        "study", "performer", "--n", "32", "--head-dim", "8", "--input-scale", "0.5", "--size", "8", "--draws", "2",
        "--out", str(tmp_path / "s"),
    ]  # fmt: skip
    first = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert first.returncode == 130, first.stderr
    assert "interrupted; the same command goes on where this one stopped" in first.stderr
    kept = (tmp_path / "s" / DRAWS).read_text()
    assert 4 <= kept.count("\n") <= 6
    from effattn.cli import main

    assert main(arguments) == 0
    assert (tmp_path / "s" / DRAWS).read_text().startswith(kept)


def test_draws_have_their_own_inputs_and_methods_share_them() -> None:
    point = Point(n=8, head_dim=4, method="a")
    one, two = (problem(Job(point=point, draw=i), seed=0).q for i in (0, 1))
    assert not torch.equal(one, two)
    other = Point(n=8, head_dim=4, method="b", size=9)
    assert torch.equal(problem(Job(point=other, draw=0), seed=0).q, one)
    assert not torch.equal(problem(Job(point=other, draw=0), seed=1).q, one)
    doubled = problem(Job(point=Point(n=8, head_dim=4, input_scale=2.0, method="a"), draw=0), seed=0)
    assert torch.equal(doubled.q, 2 * one)


def test_rounding_is_kept_apart_from_approximation() -> None:
    from effattn.study import linformer, performer

    for dtype, size in (("fp16", 2.0**-11), ("bf16", 2.0**-8), ("fp32", 2.0**-24)):
        job = Job(
            point=Point(n=64, head_dim=8, dtype=dtype, input_scale=0.5, method="positive, iid", size=64),
            draw=0,
        )
        got = performer.measure(job, seed=0)
        assert got["rounding"] < 20 * size
        assert got["rounding"] > 0.05 * size
        assert got["error"] == pytest.approx(got["approximation"], abs=20 * size)
        job = Job(point=Point(n=64, head_dim=8, dtype=dtype, method="mean pooling", size=64), draw=0)
        got = linformer.measure(job, seed=0)
        assert got["approximation"] < 1e-12  # exact at k = n
        assert 0.05 * size < got["rounding"] < 20 * size


def test_a_recorded_study_says_what_its_draws_say(tmp_path: Path) -> None:
    from effattn.study import recorded

    jobs = [
        Job(point=Point(n=8, head_dim=4, method="a", size=size), draw=draw)
        for draw in range(7)
        for size in (2, 4)
    ]
    Store(tmp_path, {"study": "x"}, ["error"]).run(
        jobs, lambda job: {"error": (1 + job.draw) / job.point.size}
    )
    (tmp_path / "provenance.json").write_text('{"working_directory": {}, "environment": {}, "ended": "now"}')
    data = recorded.record(tmp_path, ["error"], command="effattn study x")
    assert [p["error"] for p in data["points"]] == [[2.0, 0.5, 3.5], [1.0, 0.25, 1.75]]
    assert data["slopes"][0]["slope"] == [-1.0, -1.0, -1.0]
    assert "| a | 2.00" in recorded.table(data, size="k").replace("2.000", "2.00")
    assert "environment" not in data


# -- the inverse question ----------------------------------------------------------------------------------


def _curve(samples: list[list[float]], sizes: list[int]) -> Curve:
    return Curve(
        setting(Point(n=64, head_dim=8, method="m")), "m", sizes, [constant(s[0]) for s in samples], samples
    )


def test_the_smallest_size_is_found_between_two() -> None:
    sizes = [16, 64, 256]
    curve = _curve([[4 * m**-0.5] * 3 for m in sizes], sizes)
    got = inverse.answer(curve, 0.4)  # m = 100
    assert got.smallest is not None
    assert got.smallest.median == 100
    assert inverse.answer(curve, 0.01).smallest is None  # none below 256
    assert inverse.answer(curve, 2.0).smallest is not None
    # An error that isn't a number reaches no target; an error that rises again was reached before.
    assert inverse.answer(_curve([[math.nan], [math.nan], [0.1]], sizes), 0.2).smallest == constant(
        256.0
    )._replace(coverage=0.0)
    assert inverse.answer(_curve([[1.0], [0.1], [0.3]], sizes), 0.1).smallest is not None


def test_sizes_go_up_to_the_length() -> None:
    assert inverse.sizes_up_to(100, pairs=False) == (1, 2, 4, 8, 16, 32, 64, 100)
    assert inverse.sizes_up_to(65, pairs=True) == (2, 4, 8, 16, 32, 64)
    assert inverse.sizes_up_to(1, pairs=False) == (1,)
    assert inverse.sizes_up_to(1, pairs=True) == (2,)


def test_a_size_is_the_smallest_only_if_smaller_ones_were_tried() -> None:
    good = [[0.1], [0.05]]
    assert inverse.answer(_curve(good, [8, 16]), 0.2).open_below
    assert not inverse.answer(_curve(good, [1, 16]), 0.2).open_below
    assert not inverse.answer(_curve(good, [8, 16]), 0.07).open_below
    assert not inverse.answer(_curve(good, [8, 16]), 0.01).open_below


def test_a_profiles_sizes_are_cut_to_the_length() -> None:
    plan = plans.profile("linformer", "smoke")
    assert plan.sizes == (16, 64, 256)
    assert plans.adapt(plan, n=(64,)).sizes == (16, 64)
    assert plans.adapt(plan, n=(9,)).sizes == (9,)


# -- the command -------------------------------------------------------------------------------------------


def test_a_small_study_writes_tables_and_charts(tmp_path: Path, effattn_command) -> None:
    out = tmp_path / "s"
    code, stdout, stderr = effattn_command(
        "study", "linformer", "--n", "32", "--head-dim", "8", "--values", "normal", "--size", "4,8,32", "--draws", "3",
        "--out", out,
    )  # fmt: skip
    assert code == 0, stderr
    assert "at any k: gaussian; gaussian, E and F; singular vectors" in stdout
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    error = {
        (row["method"], int(row["size"])): float(row["median"])
        for row in rows
        if row["part"] == "error" and row["measure"] == "error"
    }
    assert error["mean pooling", 32] < 1e-6
    assert error["truncated SVD", 8] < error["mean pooling", 8] < error["gaussian", 8]
    assert error["zero", 0] == 1.0
    svg = (out / "error-n32-d8-normal-x1-fp32.svg").read_text()
    assert "mean pooling" in svg
    text = (out / "summary.md").read_text()
    assert "![" in text
    assert "| mean pooling |" in text


def test_charts_are_the_same_for_the_same_data(tmp_path: Path) -> None:
    from effattn.study import charts

    chart = charts.Chart(
        name="c", title="t", x_label="m", y_label="e",
        curves=[charts.Curve(label="a", x=[1, 2], y=[0.5, 0.25], low=[0.4, 0.2], high=[0.6, 0.3])],
    )  # fmt: skip
    first = charts.draw(chart, tmp_path).read_bytes()
    assert charts.draw(chart, tmp_path).read_bytes() == first
    assert b"<svg" in first


def _drawn(tmp_path: Path, curves: Sequence[Any], **more: Any) -> str:
    from effattn.study import charts

    chart = charts.Chart(name="c", title="t", x_label="m", y_label="e", curves=curves, **more)
    return charts.draw(chart, tmp_path).read_text()


def test_every_line_of_a_chart_looks_different() -> None:
    from effattn.study import charts

    styles = ["method"] * 14 + ["theory", "floor"] + ["control"] * 3
    looks = charts._looks([charts.Curve(label="a", x=[1], y=[1.0], style=style) for style in styles])
    assert len({repr(look) for look in looks}) == len(styles)
    # Without colours too.
    grey = {
        repr({name: x for name, x in look.items() if name != "color"}) for look in looks[:12] + looks[14:]
    }
    assert len(grey) == len(styles) - 2


def test_what_is_exact_does_not_stretch_the_axis(tmp_path: Path) -> None:
    from effattn.study import charts

    curves = [
        charts.Curve(label="a", x=[1, 2], y=[0.5, 0.02]),
        charts.Curve(label="exact", x=[1, 2], y=[0.5, 3e-16]),
    ]
    svg = _drawn(tmp_path, curves, least=1e-6, below="under 1e-6")
    assert "under 1e-6" in svg
    assert "-16}" not in svg
    whole = _drawn(tmp_path, curves)
    assert "-15}" in whole or "-16}" in whole
    assert "under 1e-6" not in _drawn(tmp_path, curves[:1], least=1e-6, below="under 1e-6")


def test_axes_say_what_each_part_measures(tmp_path: Path) -> None:
    from effattn.study import results

    curve = _curve([[0.5], [0.9]], [8, 16])
    spectrum = curve.setting._replace(part="spectrum")
    assert results.chart(spectrum, [curve], size="k").y_label == "share of the sum of singular values"
    assert results.chart(curve.setting, [curve], size="k").y_label == "relative error of the output"
    assert results.chart(spectrum, [curve], size="k").least == 0.0


def test_the_answer_is_printed_with_its_cost(tmp_path: Path, effattn_command) -> None:
    code, out, err = effattn_command(
        "study", "performer", "--n", "64", "--head-dim", "8", "--input-scale", "0.25", "--method", "positive, orthogonal",
        "--method", "relu, orthogonal", "--draws", "6", "--size", "8,512", "--target-error", "0.1", "--out", tmp_path / "s",
    )  # fmt: skip
    assert code == 0, err
    found = {line.split("  ")[0]: line for line in out.splitlines()}
    assert re.search(r" (under 0\.1|(?!0\.0)\d+\.\d) MB$", found["positive, orthogonal"])
    _, low, high = _numbers_in(found["positive, orthogonal"])
    assert 8 < low <= high <= 512
    assert "| positive, orthogonal |" in (tmp_path / "s" / "summary.md").read_text().partition("## error")[0]
    assert "positive, orthogonal,512,error" in (tmp_path / "s" / "summary.csv").read_text().replace('"', "")
    assert "12 of 24 draws" in err
    code, out, err = effattn_command(
        "study", "performer", "--n", "64", "--head-dim", "8", "--input-scale", "1", "--method", "relu, orthogonal",
        "--size", "8,64", "--draws", "6", "--target-error", "0.02", "--out", tmp_path / "t",
    )  # fmt: skip
    assert code == 0, err
    assert "none up to 64, error" in out


def test_an_answer_at_the_smallest_size_says_that_none_below_was_tried(
    tmp_path: Path, effattn_command
) -> None:
    asked = (
        "study",
        "linformer",
        "--n",
        "16",
        "--head-dim",
        "8",
        "--values",
        "normal",
        "--method",
        "mean pooling",
    )
    asked = (*asked, "--draws", "2", "--target-error", "5")
    code, out, err = effattn_command(*asked, "--size", "8,16", "--out", tmp_path / "s")
    assert code == 0, err
    assert "8 or fewer; none below was tried" in out
    code, out, err = effattn_command(*asked, "--out", tmp_path / "t")
    assert code == 0, err
    assert "or fewer" not in out
    assert next(line for line in out.splitlines() if line.startswith("mean pooling")).split()[2] == "1"


def _numbers_in(line: str) -> tuple[int, int, int]:
    match = re.search(r"  (\d+)(?: \((\d+) to (\d+)\))?  ", line)
    assert match, line
    middle = int(match[1])
    return middle, int(match[2] or middle), int(match[3] or middle)


BAD = [
    (["perform"], "unknown study 'perform'"),
    (["performer", "--profile", "huge"], "unknown profile 'huge'"),
    (["performer", "--size", "15"], "come in pairs; expected an even number"),
    (["performer", "--size", "0"], "--size 0: expected at least 1"),
    (["performer", "--size", "many"], "expected whole numbers"),
    (["performer", "--method", "magic"], "unknown method 'magic'"),
    (["performer", "--input-scale", "-1"], "expected a positive finite number"),
    (["performer", "--dtype", "fp8"], "unknown dtype 'fp8'"),
    (["performer", "--draws", "0"], "--draws 0"),
    (["performer", "--values", "gaussian"], "gaussian"),
    (["performer", "--values", "real:gpt5/1"], "unknown model"),
    (["performer", "--values", "real:smollm2/12", "--head-dim", "32"], "expected 64, the model's"),
    (["performer", "--target-error", "1e-9"], "below 6e-08, the unit roundoff of fp32"),
    (["performer", "--target-error", "-1"], "expected a positive number"),
    (
        ["linformer", "--target-error", "nan", "--size", "300"],
        "--target-error nan: expected a positive number",
    ),
    (["linformer", "--target-error", "0", "--n", "64,128"], "--target-error 0: expected a positive number"),
    (["linformer", "--size", "300"], "expected k up to n"),
    (["linformer", "--causal"], "Linformer can't be causal"),
    (["complexity", "--draws", "3"], "takes no options but --profile and --out"),
    (["complexity", "--profile", "endless"], "unknown profile 'endless'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_requests_are_answered(
    arguments: list[str], message: str, tmp_path: Path, effattn_command
) -> None:
    code, _, err = effattn_command("study", *arguments, "--out", tmp_path / "s")
    assert code == 2
    assert message in err
    assert "Traceback" not in err


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom effattn.cli import main\nmain(['study', '--help'])\n"
        "print(sorted({'torch', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_profile_is_a_plan_that_can_run() -> None:
    for study, profiles in plans.PROFILES.items():
        for name in profiles:
            jobs = plans.jobs(plans.adapt(plans.profile(study, name)))
            assert len({job.key for job in jobs}) == len(jobs), (study, name)
            assert len(by_point([])) == 0
            assert len(jobs) > 20


def test_costs_are_measured_in_a_process_of_their_own() -> None:
    from effattn.study import probe

    small, large = probe.measure(method="standard", n=(256, 1024), head_dim=16, size=1)
    assert large["seconds"] > small["seconds"]
    # Scores and weights: two matrices of float32, at least one more than before.
    assert 4 * 1024**2 < large["bytes"] < 5 * 4 * 1024**2
    with pytest.raises(EffattnError, match=r"measuring .* failed: .*k must be at most 16"):
        probe.measure(method="linformer", n=(16,), head_dim=16, size=17)


def test_curves_keep_the_order_of_measurement() -> None:
    from effattn.study.engine import Row

    rows = [
        Row(job=Job(point=Point(n=8, head_dim=4, method=m, size=s), draw=0), measures={"error": 1.0})
        for m in ("z", "a")
        for s in (4, 2)
    ]
    (found,) = curves(rows).values()
    assert [(c.method, c.sizes) for c in found] == [("z", [2, 4]), ("a", [2, 4])]
