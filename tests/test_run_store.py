"""Run folders: complete or not there, never over somebody else's files; and how counterexamples get small."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from effattn.case import Case
from effattn.errors import RequestError
from effattn.run import provenance, shrink, store
from effattn.tolerances.statistics import Finding
from effattn.verdict import Outcome, Quantity, Verdict

CASE = Case(
    batch=3, heads=6, kv_heads=2, q_len=70, kv_len=133, head_dim=40, v_dim=24, dtype="bf16",
    causal="bottom-right", scale=0.25, layout="bshd+pad+offset", values="outliers", seed=7,
)  # fmt: skip


def verdict(case: Case, outcome: Outcome = Outcome.PASS) -> Verdict:
    return Verdict(
        case=case,
        method="mine",
        outcome=outcome,
        message="two\nlines",
        quantities=(
            Quantity(
                name="out", count=3, fraction=float("inf"), z_rms=0.5, worst=(0, 1, 2, 3), got=float("nan")
            ),
        ),
        findings=(Finding(name="out size", statistic=9.5, p_value=1e-30, threshold=1e-10),),
        seconds={"method": 0.25},
        replay="effattn replay ...",
    )


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# The store


def test_run_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    written = [verdict(CASE), verdict(replace(CASE, seed=8), Outcome.BIASED)]
    with store.RunWriter(tmp_path / "deep" / "run") as writer:
        for item in written:
            writer.add(item)
        writer.add_case(CASE)
        writer.add_text("summary.md", "# Summary\n")
        folder = writer.commit({"command": "effattn gate mine"})
    assert folder == tmp_path / "deep" / "run"
    assert names(tmp_path / "deep") == {
        "run", "run/verdicts.jsonl", "run/provenance.json", "run/summary.md",
        "run/cases", f"run/cases/{CASE.id}.json",
    }  # fmt: skip
    # NaN is not equal to itself, so the records are compared as they are written.
    assert [v.to_dict() for v in store.read_verdicts(folder)] == [v.to_dict() for v in written]
    assert store.read_provenance(folder)["command"] == "effattn gate mine"
    assert Case.load(folder / "cases" / f"{CASE.id}.json") == CASE


def test_every_line_is_strict_json(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add(verdict(CASE))
        writer.commit({})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "run" / "verdicts.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_run_that_is_broken_off_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def break_off() -> None:
        with store.RunWriter(tmp_path / "deep" / "run") as writer:
            writer.add(verdict(CASE))
            writer.add_case(CASE)
            raise error

    with pytest.raises(error):
        break_off()
    assert names(tmp_path) == set()


def test_run_that_is_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add(verdict(CASE))
        assert not (tmp_path / "run").exists()
    assert names(tmp_path) == set()


def test_empty_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with store.RunWriter(tmp_path / "run") as writer:
        writer.commit({})
    assert store.is_run(tmp_path / "run")


def test_run_is_replaced_only_when_asked_to(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add_case(CASE)
        writer.commit({"command": "first"})
    with pytest.raises(RequestError, match="--overwrite"):
        store.RunWriter(tmp_path / "run")
    with store.RunWriter(tmp_path / "run", overwrite=True) as writer:
        assert store.read_provenance(tmp_path / "run")["command"] == "first", (
            "replaced before the new one is whole"
        )
        writer.commit({"command": "second"})
    assert store.read_provenance(tmp_path / "run")["command"] == "second"
    assert names(tmp_path) == {"run", "run/verdicts.jsonl", "run/provenance.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_folders_are_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "precious.txt").write_text("x")
    (tmp_path / "provenance.json").write_text('{"kind": "another program"}')
    with pytest.raises(RequestError, match="never overwritten"):
        store.RunWriter(tmp_path, overwrite=overwrite)
    assert names(tmp_path) == {"precious.txt", "provenance.json"}


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    first = store.RunWriter(tmp_path / "run")
    (tmp_path / ".run.0.tmp").mkdir()  # what another process would have
    with first:
        first.add(verdict(CASE))
        (tmp_path / ".run.0.tmp" / "provenance.json").write_text('{"kind": "effattn run", "schema": 1}')
        (tmp_path / ".run.0.tmp").rename(tmp_path / "run")
        with pytest.raises(RequestError, match="holds a run already"):
            first.commit({})
    assert names(tmp_path) == {"run", "run/provenance.json"}


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_folder_must_have_a_name(name: str) -> None:
    with pytest.raises(RequestError, match="folder"):
        store.RunWriter(Path(name))


def test_full_disk_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with store.RunWriter(tmp_path / "run") as writer:
            assert writer._verdicts is not None
            # The same open file, on a device that answers every write as a full disk does.
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, writer._verdicts.fileno())
            os.close(full)
            for _ in range(100):
                writer.add(verdict(CASE))
            writer.commit({})

    with pytest.raises(RequestError, match="No space left"):
        fill()
    assert names(tmp_path) == set()


def test_damaged_line_is_named(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        writer.add(verdict(CASE))
        writer.add(verdict(CASE))
        writer.commit({})
    file = tmp_path / "run" / "verdicts.jsonl"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(RequestError, match=r"line 2 is damaged"):
        list(store.read_verdicts(tmp_path / "run"))


def test_newer_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text('{"kind": "effattn run", "schema": 99}')
    with pytest.raises(RequestError, match=r"99.*update effattn"):
        store.read_provenance(tmp_path)


def test_case_is_found_by_the_start_of_its_id(tmp_path: Path) -> None:
    with store.RunWriter(tmp_path / "run") as writer:
        for seed in range(40):
            writer.add(verdict(replace(CASE, seed=seed)))
        shrunk = replace(CASE, q_len=1)
        writer.add_case(shrunk)
        writer.commit({})
    wanted = replace(CASE, seed=3)
    assert store.find_case(wanted.id, tmp_path / "run") == wanted
    assert store.find_case(wanted.id[:10], tmp_path / "run") == wanted
    assert store.find_case(shrunk.id, tmp_path / "run") == shrunk
    with pytest.raises(RequestError, match="give more of the id"):
        store.find_case("", tmp_path / "run")
    with pytest.raises(RequestError, match="no case"):
        store.find_case("zzzz", tmp_path / "run")


def test_newest_run_is_the_last_one_started(tmp_path: Path) -> None:
    for name, started in (("b", "2030-01-01T00:00:00+00:00"), ("a", "2031-01-01T00:00:00+00:00")):
        with store.RunWriter(tmp_path / name) as writer:
            writer.commit({"started": started})
    (tmp_path / "c").mkdir()
    assert store.newest_run(tmp_path).name == "a"
    with pytest.raises(RequestError, match="--run"):
        store.newest_run(tmp_path / "c")


@pytest.mark.parametrize(
    "name",
    ["../../etc/passwd", "a/b.py:f", "..", "", "x" * 500, "<script>", "tab\tnew\nline", "ä", ".hidden"],
)
def test_names_from_users_stay_inside_the_folder(name: str) -> None:
    made = store.file_name(name)
    assert 1 <= len(made) <= 60
    assert "/" not in made
    assert made not in (".", "..")
    assert not made.startswith(".")
    assert made.isascii()


# Where a run comes from


def test_provenance_says_what_ran_where() -> None:
    collected = provenance.collect(device="cpu")
    assert collected["packages"].keys() >= {"torch", "triton", "numpy", "scipy", "hypothesis"}
    assert collected["machine"]["cpu"]
    assert collected["machine"]["cores"] >= 1
    assert json.loads(json.dumps(collected)) == collected


def test_commit_and_whether_the_tree_is_clean(tmp_path: Path) -> None:
    import subprocess

    assert provenance.commit(tmp_path) == {"commit": None, "clean": None}
    for command in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "empty"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)
    clean = provenance.commit(tmp_path)
    assert len(clean["commit"]) == 40
    assert clean["clean"] is True
    (tmp_path / "kernel.py").write_text("")
    assert provenance.commit(tmp_path) == {**clean, "clean": False}


def test_command_can_be_pasted() -> None:
    line = provenance.command_line(["gate", "my file.py:f", "--out", "a'b"])
    import shlex

    assert shlex.split(line) == ["effattn", "gate", "my file.py:f", "--out", "a'b"]


# Shrinking


def shrunk(start: Case, fails) -> tuple[Case, int]:  # type: ignore[no-untyped-def]
    """Shrink by a predicate on recipes, counting judgements."""

    def judge(case: Case) -> Verdict:
        return verdict(case, Outcome.INACCURATE if fails(case) else Outcome.PASS)

    result = shrink.shrink(judge(start), judge, most_judgements=2000)
    assert result.finished
    assert fails(result.verdict.case)
    return result.verdict.case, result.judgements


def test_everything_that_is_not_needed_goes() -> None:
    case, _ = shrunk(CASE, lambda c: True)
    assert case == Case(q_len=0, kv_len=0, head_dim=1, dtype="bf16")


@pytest.mark.parametrize(
    ("fails", "expected"),
    [
        (lambda c: c.kv_len > 64, {"kv_len": 65}),
        (lambda c: c.kv_len > 64 and c.kv_len % 2, {"kv_len": 65}),
        (
            lambda c: c.q_len < c.kv_len and c.causal == "bottom-right",
            {"kv_len": 1, "causal": "bottom-right"},
        ),
        (lambda c: c.kv_heads > 1 and c.heads > c.kv_heads, {"heads": 4, "kv_heads": 2}),
        (lambda c: c.head_dim & (c.head_dim - 1), {"head_dim": 3}),
        (lambda c: "offset" in c.layout, {"layout": "bhsd+offset"}),
        (lambda c: c.layout.startswith("bshd"), {"layout": "bshd"}),
        (lambda c: c.scale is not None, {"scale": 0.25}),
        (lambda c: c.values == "outliers" and c.q_len > 3, {"values": "outliers", "q_len": 4}),
        (lambda c: c.v_dim != c.head_dim, {"head_dim": 1, "v_dim": 2}),
        (lambda c: c.batch > 1, {"batch": 2}),
    ],
)
def test_what_is_needed_stays(fails, expected: dict[str, object]) -> None:  # type: ignore[no-untyped-def]
    case, judgements = shrunk(CASE, fails)
    plain = {"q_len": 0, "kv_len": 0, "head_dim": 1, "dtype": "bf16"}
    found = {name: value for name, value in case.to_dict().items() if name not in ("schema", "seed")}
    wanted = Case(**{**plain, **expected}).to_dict()
    del wanted["schema"]
    if "v_dim" in expected:
        assert case.v_dim != case.head_dim
        assert max(case.v_dim, case.head_dim) <= 2
    else:
        assert found == wanted
    assert judgements <= 400


def test_steps_only_lead_to_simpler_cases() -> None:
    for case in shrink.candidates(CASE):
        assert case.batch <= CASE.batch
        assert case.heads <= CASE.heads
        assert case.kv_heads <= CASE.kv_heads
        assert case.q_len <= CASE.q_len
        assert case.kv_len <= CASE.kv_len
        assert case.head_dim <= CASE.head_dim


def test_another_outcome_is_another_failure() -> None:
    def judge(case: Case) -> Verdict:
        if case.kv_len > 100:
            return verdict(case, Outcome.BIASED)
        return verdict(case, Outcome.CRASHED)

    result = shrink.shrink(judge(CASE), judge, most_judgements=2000)
    assert result.verdict.outcome == Outcome.BIASED
    assert result.verdict.case.kv_len == 101


def test_search_is_bounded_and_says_so() -> None:
    calls = []

    def judge(case: Case) -> Verdict:
        calls.append(case)
        return verdict(case, Outcome.CRASHED)

    result = shrink.shrink(verdict(CASE, Outcome.CRASHED), judge, most_judgements=3)
    assert not result.finished
    assert result.judgements == len(calls) == 3
