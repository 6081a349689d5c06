"""Laws of approximations on a user's own: right ones keep them, and each law rejects something wrong."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path

import pytest
import torch
import wrong_approximations as wrong
from click.testing import CliRunner

import effattn
from effattn.approximation import BUILT_IN, Approximation, is_own, load, of_namespace
from effattn.cli import cli, main
from effattn.errors import RequestError
from effattn.properties.approximation import ABSENT, all_laws, judge

#: law -> what it rejects
REJECTED: dict[str, list[dict]] = {
    "values_of_one_give_one": [
        {"attention": wrong.epsilon},
        {"attention": wrong.slices_of_averages},
        {"attention": wrong.zeroed_padding},
    ],
    "the_output_is_linear_in_the_values": [{"attention": wrong.bounded_values}],
    "the_future_never_changes_a_row": [
        {"attention": wrong.maximum_of_all_keys},
        {"attention": wrong.slots_under_a_mask},
    ],
    "a_causal_row_is_the_unmasked_row_of_its_prefix": [
        {"attention": wrong.without_the_diagonal, "CLAIMS": ("kernel",)},
        {"attention": wrong.of_chunks_alone, "CLAIMS": ("kernel",)},
    ],
    "heads_and_value_columns_do_not_mix": [
        {"attention": wrong.heads_rolled},
        {"attention": wrong.columns_flipped},
    ],
    "every_key_counts": [{"attention": wrong.tail_dropped}, {"attention": wrong.beyond_128_dropped}],
    "a_sequence_without_a_token_has_a_finite_output": [
        {"attention": wrong.nothing_without_tokens, "CLAIMS": ("empty sequences",)}
    ],
    "padding_has_no_influence": [{"attention": wrong.ignored_padding}],
    "a_row_does_not_depend_on_the_batch": [
        {"attention": wrong.seeded_by_the_data},
        {"attention": wrong.maximum_of_the_batch},
    ],
    "the_generator_alone_is_random": [
        {"attention": wrong.of_the_global_state},
        wrong.performer() | {"attention": wrong.one_seed},
        {"attention": wrong.one_seed, "CLAIMS": ("consistent",)},
    ],
    "every_dtype_takes_the_same_projections": [{"attention": wrong.drawn_in_the_dtype}],
    "long_inputs_give_finite_outputs": [{"attention": wrong.unscaled_features}],
    "gradients_are_those_of_finite_differences": [
        {"attention": wrong.constant_keys},
        {"attention": wrong.nearly(1.02)},
        {"attention": wrong.constant_under_padding},
    ],
    "it_is_the_quadratic_evaluation_of_its_features": [
        wrong.performer("positive", "orthogonal", "own features") | {"attention": wrong.stabilised},
        wrong.performer("positive", "orthogonal", "own features") | {"attention": wrong.wrong_scale},
    ],
    "copies_and_order_of_keys_change_nothing": [
        {"attention": wrong.weights(wrong.pairs, normalise=False), "CLAIMS": ("kernel",)},
        {**wrong.linformer("kernel")},
    ],
    "it_is_exact_with_as_many_slots_as_tokens": [
        {"attention": wrong.rotated_slots, "CLAIMS": ("exact at n",)}
    ],
    "no_error_is_below_the_floor_of_the_rank": [{"attention": wrong.all_pairs, "CLAIMS": ("low rank",)}],
    "the_error_falls_with_the_square_root_of_the_size": [
        wrong.performer("relu", "orthogonal", "consistent"),
        {"attention": wrong.all_pairs, "CLAIMS": ("consistent",)},
        {"attention": wrong.half_of_the_size, "CLAIMS": ("consistent", "positive")},
        wrong.performer() | {"attention": wrong.wrong_scale},  # without a claim, for it has features
    ],
    "projections_come_from_the_generator_alone": [
        {"draw": wrong.from_the_global_state, "features": wrong.mapping()},
        {"draw": wrong.always_the_same, "features": wrong.mapping()},
    ],
    "projections_lean_to_no_side": [
        {"draw": wrong.unsigned, "features": wrong.mapping()},
        {"draw": wrong.drawer(size=1.05), "features": wrong.mapping()},
    ],
    "rows_of_a_block_are_orthogonal": [
        {"draw": wrong.givens_with_replacement, "features": wrong.mapping(), "CLAIMS": ("orthogonal",)},
        {"draw": wrong.drawer("iid"), "features": wrong.mapping(), "CLAIMS": ("orthogonal",)},
    ],
    "estimates_are_unbiased_in_every_direction": [
        {"draw": wrong.unsigned, "features": wrong.mapping()},
        wrong.performer("relu"),
    ],
    "estimates_are_unbiased_for_long_opposite_vectors": [
        {"draw": wrong.drawer(), "features": wrong.mapping(stabiliser=1e-4)}
    ],
    "the_mean_square_error_is_that_of_theory": [
        {"draw": wrong.drawer("iid", size=1.2), "features": wrong.mapping(), "CLAIMS": ("positive",)},
        {"draw": wrong.drawer("iid"), "features": wrong.mapping("hyperbolic"), "CLAIMS": ("positive",)},
        wrong.performer("positive", "iid", "trigonometric"),
    ],
    "orthogonal_projections_err_less_than_iid_by_the_theorems_margin": [
        wrong.performer("positive", "iid", "positive", "orthogonal"),
        {
            "draw": wrong.drawer("regularised"),
            "features": wrong.mapping(),
            "CLAIMS": ("positive", "orthogonal"),
        },
    ],
    "features_of_a_token_do_not_depend_on_others": [
        {"draw": wrong.drawer(), "features": wrong.with_the_maximum_of_all}
    ],
    "a_projection_of_tokens_comes_from_the_generator_alone": [
        {"slots": lambda size, n, generator: torch.randn(size, n)},
        {"slots": lambda size, n, generator: torch.ones(size, n), "CLAIMS": ("gaussian",)},
    ],
    "products_through_a_projection_are_unbiased_with_the_variance_of_theory": [
        {"slots": wrong.small_entries, "CLAIMS": ("gaussian",)},
        {"slots": wrong.first_rows, "CLAIMS": ("gaussian",)},
    ],
    "causal_sums_are_those_of_all_pairs_within_the_bound": [
        {"prefix_sums": wrong.causal_sums(diagonal=-1)},
        {"prefix_sums": wrong.sums_of_128_features},
        {"prefix_sums": wrong.states_of_the_next_sequence},
        {"prefix_sums": wrong.causal_sums(weights=torch.bfloat16)},
        {"prefix_sums": wrong.causal_sums(epsilon=1e-3)},
        {"prefix_sums": wrong.stored_in_the_dtype},
        {"prefix_sums": wrong.causal_sums(epsilon=0.05), "CLAIMS": ("rounded weights",)},
    ],
    "gradients_of_causal_sums_are_within_the_bound": [
        {"prefix_sums": lambda q, k, v: wrong.causal_sums()(q, k.detach() + 0.99 * (k - k.detach()), v)}
    ],
    "later_features_never_change_a_sum": [
        {"prefix_sums": lambda q, k, v: wrong.causal_sums()(q, k, v) + 1e-7 * k.max()}
    ],
    "a_factor_of_the_features_changes_nothing": [{"prefix_sums": wrong.least_denominator}],
    "early_sums_survive_large_late_keys": [{"prefix_sums": wrong.subtracting_backward}],
    "slots_are_averages_for_every_length": [
        {"slots": lambda size, n, g: torch.ones(size, n) / (n // size), "CLAIMS": ("averages",)}
    ],
}


def of(functions: dict) -> Approximation:
    return of_namespace(functions, "it")


@pytest.mark.parametrize("name", list(all_laws()))
def test_a_law_rejects_what_is_wrong(name: str) -> None:
    for functions in REJECTED[name]:
        (finding,) = judge(of(functions), names=[name])
        assert finding.outcome == "broken", (functions, finding)
        assert finding.text


#: right ones of other kinds than effattn's two, each with the laws that it must keep
RIGHT = {
    "iid positive": wrong.performer("positive", "iid", "positive", "kernel", "own features", "low rank"),
    "hyperbolic": wrong.performer("hyperbolic", "iid", "hyperbolic", "kernel", "own features", "low rank"),
    "trigonometric": wrong.performer("trigonometric", "iid", "trigonometric", "kernel"),
    "relu": wrong.performer("relu", "orthogonal", "orthogonal", "biased", "kernel"),
    "gaussian": wrong.linformer("gaussian", "unnormalised", "low rank"),
    "in bfloat16": {"attention": wrong.in_bfloat16, "CLAIMS": ("16 bits inside", "kernel")},
    "float32 alone": {"attention": wrong.float32_alone, "CLAIMS": ("kernel",)},
    "sums of float32": {"prefix_sums": wrong.float32_only},
    "weights in 16 bits": {"prefix_sums": wrong.stored_in_the_dtype, "CLAIMS": ("rounded weights",)},
}


@pytest.mark.parametrize("name", [*RIGHT, *BUILT_IN])
def test_what_is_right_keeps_all_laws(name: str) -> None:
    subject = of(RIGHT[name]) if name in RIGHT else load(name)
    findings = list(judge(subject))
    assert [(f.law.name, f.text) for f in findings if f.broken] == []
    if name == "float32 alone":  # with padding too, in its one dtype
        holds = {f.law.name for f in findings if f.outcome == "holds"}
        assert {"values_of_one_give_one", "padding_has_no_influence"} <= holds
    assert sum(f.outcome == "holds" for f in findings) >= (5 if "prefix_sums" in RIGHT.get(name, {}) else 9)


def test_objects_and_functions_are_taken_by_name(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        class Mine:
            CLAIMS = ("averages",)
            def slots(self, size, n, generator): ...
        class Static:
            @staticmethod
            def slots(size, n, generator): ...
        mine = Mine()
        CLAIMS = ("kernel",)
        def other(q, k, v, *, size, generator): ...
        """,
    )
    assert load(f"{path}:mine").claims == {"averages"}
    assert load(f"{path}:Static").functions.keys() == {"slots"}
    assert load(f"{path}:other").functions.keys() == {"attention"}
    assert load(f"{path}:other").claims == {"kernel"}
    with pytest.raises(RequestError, match=r"needs an instance; name an instance \(mine = Mine\(\)\)"):
        load(f"{path}:Mine")
    with pytest.raises(RequestError, match="did you mean 'mine'"):
        load(f"{path}:mime")


def test_inputs_that_are_changed_in_place_are_named() -> None:
    def attention(q, k, v, *, size, generator):
        return v.mul_(2)

    (finding,) = judge(of({"attention": attention}), names=["the_generator_alone_is_random"])
    assert finding.broken
    assert "changed its input v in place" in finding.text


def test_code_that_exits_has_crashed() -> None:
    def attention(q, k, v, *, size, generator):
        raise SystemExit(0)

    (finding,) = judge(of({"attention": attention}), names=["the_generator_alone_is_random"])
    assert finding.outcome == "crashed"


def test_a_function_that_raises_has_crashed_with_its_line() -> None:
    def attention(q, k, v, *, size, generator):
        raise ZeroDivisionError("here")

    (finding,) = judge(of({"attention": attention}), names=["values_of_one_give_one"])
    assert finding.outcome == "crashed"
    assert "ZeroDivisionError: here" in finding.text
    assert "test_approximation.py, line" in finding.text


def test_an_output_of_another_form_is_named() -> None:
    (finding,) = judge(
        of({"attention": lambda q, k, v, *, size, generator: v[:, 0]}), names=["values_of_one_give_one"]
    )
    assert finding.broken
    assert finding.outcome == "broken"
    assert "expected a tensor (2, 3, 48, 16)" in finding.text
    assert "approximation.py, line" not in finding.text


def test_in_a_test_of_ones_own() -> None:
    effattn.check_approximation({"slots": wrong.linformer()["slots"], "CLAIMS": ("gaussian",)})

    def nothing(size, n, generator):
        raise NotImplementedError("not yet")

    with pytest.raises(RequestError, match=r"no law was tried on the approximation: .*not yet"):
        effattn.check_approximation({"slots": nothing})
    with pytest.raises(AssertionError, match="products through a projection are unbiased"):
        effattn.check_approximation({"slots": wrong.first_rows, "CLAIMS": ("gaussian",)})


# -- the command -------------------------------------------------------------------------------------------

SLOTS = """
import torch
CLAIMS = ("averages",)
def slots(size, n, generator):
    e = torch.zeros(size, n)
    e[torch.arange(n) * size // n, torch.arange(n)] = 1.0
    return e{end}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "mine.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return str(path)


def test_the_command_says_what_holds_and_what_is_broken(tmp_path: Path) -> None:
    right = CliRunner().invoke(
        cli, ["approximation", write(tmp_path, SLOTS.replace("{end}", " / e.sum(-1, keepdim=True)"))]
    )
    assert right.exit_code == 0, right.output
    assert "of 3 laws 2 hold, 1 not claimed" in right.output
    failed = write(tmp_path, SLOTS.replace("{end}", ""))
    assert main(["approximation", failed]) == 1
    broken = CliRunner().invoke(
        cli, ["approximation", failed, "--law", "slots_are_averages_for_every_length"], standalone_mode=False
    )
    assert "a row sum that is off 1 by" in broken.output
    assert "of 1 law 1 broken" in broken.output


def test_the_list_has_every_law_and_claim() -> None:
    shown = CliRunner().invoke(cli, ["approximation", "--list"])
    assert all(name in shown.output for name in all_laws())
    assert "low rank: " in shown.output


BAD = [
    ("x = 1", "defines no approximation"),
    ("def draw(size, head_dim, generator): ...", "defines no approximation"),
    ("def features(x, omega): ...", "`features` without `draw"),
    ("def attention(q, k, v): ...", "has no keyword `size`"),
    ("CLAIMS = ('orthogonale',)\ndef slots(size, n, generator): ...", "did you mean 'orthogonal'?"),
    ("CLAIMS = 'gaussian'\ndef slots(size, n, generator): ...", "must be a tuple of words"),
    ("CLAIMS = 5\ndef slots(size, n, generator): ...", "must be a tuple of words"),
    ("1 / 0", "raised ZeroDivisionError"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[message for _, message in BAD])
def test_a_file_without_an_approximation_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    assert main(["approximation", write(tmp_path, text)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["performr"], "unknown approximation 'performr'"),
        (["nowhere.py"], "no file 'nowhere.py'"),
        (["performer", "--law", "values_of_one"], "did you mean values_of_one_give_one?"),
        ([], "Missing argument 'SUBJECT'"),
    ],
)
def test_bad_requests_are_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["approximation", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_file_on_which_no_law_can_be_tried_is_no_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "def slots(size, n, generator): ...")
    assert main(["approximation", path, "--law", "values_of_one_give_one"]) == 2
    assert "no law was tried" in capsys.readouterr().err


# -- studies -----------------------------------------------------------------------------------------------

UNIFORM = """
def attention(q, k, v, *, size, generator, causal=False):
    import torch
    assert q.shape[1] == k.shape[1]
    if causal:
        return v.cumsum(2) / torch.arange(1, v.shape[2] + 1)[:, None]
    return v.mean(2, keepdim=True).expand(v.shape) * {factor}
"""


def draws(folder: Path) -> list[dict[str, str]]:
    with (folder / "draws.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_names_of_ones_own_are_told_from_those_of_studies() -> None:
    assert all(map(is_own, ("a.py", "./a.py", "a.py:attention", "package.module:attention")))
    assert not any(map(is_own, ("positive, iid", "E and F fitted", "uniform")))


@pytest.mark.parametrize("study", ["performer", "linformer"])
@pytest.mark.parametrize("more", [[], ["--causal"]])
def test_a_study_measures_ones_own(tmp_path: Path, study: str, more: list[str]) -> None:
    """An average of all values has the error of the control, in every draw, dtype apart."""
    if study == "linformer" and more:
        return
    path = write(tmp_path, UNIFORM.replace("{factor}", "1.0"))
    out = tmp_path / "out"
    asked = [
        "study",
        study,
        "--method",
        path,
        "--n",
        "32",
        "--size",
        "4,8",
        "--draws",
        "2",
        "--out",
        str(out),
        *more,
    ]
    assert main(asked) == 0
    rows = draws(out)
    own = {
        (r["n"], r["values"], r["input_scale"], r["draw"]): float(r["approximation"])
        for r in rows
        if r["method"] == path
    }
    control = {
        (r["n"], r["values"], r["input_scale"], r["draw"]): float(r["error"])
        for r in rows
        if r["method"] == "uniform"
    }
    assert own.keys() == control.keys()
    assert own == pytest.approx(control, rel=1e-12)
    # The same command measures nothing again; an edited approximation is another one.
    assert main(asked) == 0
    assert len(draws(out)) == len(rows)
    write(tmp_path, UNIFORM.replace("{factor}", "1.5"))
    assert main(asked) == 2


def test_a_real_models_shared_keys_come_for_every_query_head(tmp_path: Path) -> None:
    path = write(tmp_path, UNIFORM.replace("{factor}", "1.0"))
    out = tmp_path / "out"
    assert main(
        ["study", "performer", "--method", path, "--values", "real:smollm2/3", "--n", "24", "--size", "4", "--draws", "1",
         "--causal", "--out", str(out)]
    ) == 0  # fmt: skip


def test_the_inverse_question_answers_for_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, UNIFORM.replace("{factor}", "1.0"))
    asked = ["study", "performer", "--method", path, "--n", "32", "--draws", "2", "--input-scale", "0.5"]
    assert main([*asked, "--target-error", "2.0", "--out", str(tmp_path / "one")]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith(path)]
    assert line.split()[1] == "1"
    assert "ms" in line or "us" in line
    assert main([*asked, "--target-error", "0.001", "--out", str(tmp_path / "two")]) == 0
    assert "none up to 32" in capsys.readouterr().out


def test_a_study_refuses_what_it_cannot_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without = write(tmp_path, "def attention(q, k, v, *, size, generator): return 1 / 0")
    out = ["--n", "16", "--size", "4", "--draws", "1", "--out"]
    assert main(["study", "performer", "--method", without, "--causal", *out, str(tmp_path / "out")]) == 2
    assert "has no keyword `causal`" in capsys.readouterr().err
    assert main(["study", "performer", "--method", without, *out, str(tmp_path / "out")]) == 2
    assert "raised ZeroDivisionError: division by zero; size = 4, n = 16" in capsys.readouterr().err
    slots = write(tmp_path, "def slots(size, n, generator): ...")
    assert main(["study", "performer", "--method", slots, *out, str(tmp_path / "other")]) == 2
    assert "has no function `attention`" in capsys.readouterr().err


def test_the_page_shows_what_the_command_prints() -> None:
    """The outcome of every law; figures may differ in their last digit between machines."""
    root = Path(__file__).parent.parent
    page = (root / "docs" / "approximations.md").read_text(encoding="utf-8")
    outcomes = [
        f"{finding.outcome:<13}  {finding.law.sentence}"
        for finding in judge(load(str(root / "docs" / "examples" / "my_performer.py")))
        if finding.outcome != ABSENT
    ]
    shown = [
        line
        for line in page.splitlines()
        if line.startswith(("holds  ", "broken  ", "not supported  ", "not claimed  "))
    ]
    assert [line.partition(":")[0] for line in shown] == outcomes
