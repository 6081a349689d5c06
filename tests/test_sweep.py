"""Sweeps: what they run, that each case is recorded exactly once whatever is killed, and what they refuse.

One file, longer than others: all tests run, kill, resume or refuse the same few methods and specification, which begin it.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from effattn.case import Case
from effattn.errors import RequestError
from effattn.report import gather
from effattn.run import chunk, isolation, records, spec, store, sweep, work
from effattn.run.isolation import IsolatedExecutor

Command = Callable[..., tuple[int, str, str]]

METHODS = """
import os, signal
import torch


def right(q, k, v):
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


def says_what_no_text_is(q, k, v):
    raise ValueError("\\ud800" + "x" * 1_000_000 + " the end")


def zeros(q, k, v):
    return torch.zeros_like(q)


def crashes_on_long(q, k, v):
    if k.shape[2] > 6:
        os.abort()
    return right(q, k, v)


def loops_on_long(q, k, v):
    while k.shape[2] > 6:
        pass
    return right(q, k, v)


def on_a_small_disk(q, k, v):
    if "LARGEST_FILE" in os.environ:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]), resource.RLIM_INFINITY))
    return right(q, k, v)


def tells(q, k, v):
    # A byte for every case, to whoever waits for one.
    descriptor = os.open(os.environ["TOLD"], os.O_WRONLY)
    os.write(descriptor, b".")
    os.close(descriptor)
    return right(q, k, v)


def tells_its_pid(q, k, v):
    with open(os.environ["TOLD"], "w") as told:
        told.write(f"{os.getpid()}\\n")
    return right(q, k, v)
"""

SMALL: dict[str, Any] = {
    "methods": ["mine.py:right"],
    "dtypes": ["fp16", "fp32"],
    "shapes": [
        {"q_len": 3, "kv_len": 5, "head_dim": 8},
        {"q_len": 2, "kv_len": 7, "head_dim": 4, "heads": 2},
    ],
    "seeds": {"from": 0, "count": 3},
}
#: The command line in a process of its own.
MAIN = "import sys; from effattn.cli import main; sys.exit(main())"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(METHODS)
    return tmp_path


@pytest.fixture(scope="module")
def executor() -> Iterator[IsolatedExecutor]:
    with IsolatedExecutor(2) as started:
        yield started


def small(**changes: Any) -> spec.Spec:
    return spec.parse({**SMALL, **changes})


def run(out: Path, wanted: spec.Spec, executor: concurrent.futures.Executor, **options: Any) -> sweep.Result:
    with sweep.Sweep(out, wanted, **options) as taken:
        return taken.run(executor, parallel=2)


def keys(out: Path) -> Counter[records.Key]:
    """Every whole line of a run, with how often it is there; any damage is an error."""
    return Counter(
        records.decode(line).key for file in store.verdict_files(out) for line in records.lines(file)
    )


def expected(wanted: spec.Spec, device: str = "cpu") -> set[records.Key]:
    return {records.Key(case.id, method, device) for method, case in wanted.cases()}


# Specifications


def test_product_has_every_combination_once() -> None:
    wanted = small(methods=["a", "b"], values=["normal", "uniform"], options=[{}, {"causal": "top-left"}])
    cases = list(wanted.cases())
    assert wanted.count == len(cases) == 2 * 2 * 2 * 2 * 2 * 3
    assert len({(method, case.id) for method, case in cases}) == len(cases)
    assert (
        "b",
        Case(q_len=3, kv_len=5, head_dim=8, dtype="fp32", values="uniform", causal="top-left", seed=2),
    ) in cases


def test_zip_goes_item_by_item() -> None:
    wanted = small(mode="zip", methods=["a", "a"], values=["normal", "uniform"], seeds=[7])
    assert [(method, case.dtype, case.values, case.q_len, case.seed) for method, case in wanted.cases()] == [
        ("a", "fp16", "normal", 3, 7),
        ("a", "fp32", "uniform", 2, 7),
    ]


def test_random_sample_is_some_of_the_product_and_the_same_again() -> None:
    everything = {case.id for _, case in small(seeds={"count": 1000}).cases()}
    first, again, other = (
        [case.id for _, case in small(seeds={"count": 1000}, mode="random", samples=20, seed=seed).cases()]
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert len(set(first)) == 20
    assert set(first) <= everything


def test_sample_of_more_than_can_be_counted_out() -> None:
    wanted = small(seeds={"count": 10**12}, mode="random", samples=5)
    assert len({case.seed for _, case in wanted.cases()}) == 5


def test_cases_are_made_one_at_a_time() -> None:
    cases = small(seeds={"count": 2_000_000}).cases()
    assert next(cases)[1].seed == 0
    assert next(cases)[1].seed == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtyps": ["fp16"]}, ["'dtyps'", "did you mean 'dtypes'"]),
        ({"methods": []}, ["methods is empty"]),
        ({"methods": "flash"}, ["methods = 'flash'", "expected a list"]),
        ({"dtypes": ["fp8"]}, ["'fp8'", "fp16, bf16, fp32"]),
        ({"dtypes": ["fp16", "fp16"]}, ["'fp16' 2 times"]),
        ({"shapes": [{"q_len": 3, "kv_length": 5}]}, ["'kv_length'", "did you mean 'kv_len'"]),
        ({"shapes": [{"q_len": 3}]}, ["is no case", "kv_len"]),
        ({"shapes": [3]}, ["shapes has 3", "tables"]),
        ({"shapes": [{"q_len": 3, "kv_len": 3, "head_dim": 3, "dtype": "fp16"}]}, ["'dtype'", "move it there"]),
        ({"options": [{"q_len": 4}]}, ["'q_len' is in shapes and in options"]),
        ({"options": [{"heads": 3, "kv_heads": 2}], "shapes": [{"q_len": 3, "kv_len": 3, "head_dim": 3}]},
         ["is no case", "heads 3 with kv_heads 2"]),
        ({"options": []}, ["options is empty"]),
        ({"values": ["nrmal"]}, ["nrmal"]),
        ({"seeds": []}, ["seeds = []"]),
        ({"seeds": {"count": 0}}, ["count 0"]),
        ({"seeds": {"from": 1}}, ["seeds = {'from': 1}"]),
        ({"seeds": [-1]}, ["seeds has -1"]),
        ({"seeds": [True]}, ["seeds has True"]),
        ({"seeds": {"count": 250_000_000_000}}, ["1,000,000,000,000 cases", "at most 10,000,000"]),
        ({"mode": "all"}, ["mode 'all'", "product, zip, random"]),
        ({"samples": 3}, ["'samples' is for mode 'random'"]),
        ({"seed": 3}, ["'seed' is for mode 'random'"]),
        ({"seeds": [3, 1, 3]}, ["seeds has 3 2 times", "expected it once"]),
        ({"values": ["normal", "normal"], "mode": "random", "samples": 2}, ["values has 'normal' 2 times"]),
        ({"options": [{}, {}]}, ["options has {} 2 times"]),
        ({"shapes": [{"q_len": 3, "kv_len": 5, "head_dim": 8}, {"head_dim": 8, "kv_len": 5, "q_len": 3}]},
         ["shapes has {'q_len': 3, 'kv_len': 5, 'head_dim': 8} 2 times"]),
        ({"mode": "zip", "dtypes": ["fp16"] * 3, "shapes": SMALL["shapes"][:1], "seeds": [1, 2, 1]},
         ["items 1 and 3 of the lists are the same case"]),
        ({"mode": "random"}, ["'samples' is missing", "write, say, samples = 1000"]),
        ({"mode": "random", "samples": 0}, ["samples = 0", "1 to 12"]),
        ({"mode": "random", "samples": 13}, ["samples = 13", "1 to 12"]),
        ({"mode": "zip"}, ["mode 'zip'", "3 seeds"]),
    ],
)  # fmt: skip
def test_specification_that_means_nothing_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        small(**changes)
    for word in words:
        assert word in str(refused.value)


def test_contradiction_in_the_last_combination_is_found_before_anything_runs() -> None:
    with pytest.raises(RequestError, match="is no case"):
        small(options=[{}, {"causal": "sideways"}])


def test_contradiction_among_many_samples_is_found_before_anything_runs() -> None:
    """Drawn among 200,000 samples; where it is not drawn, nothing is wrong."""
    options = [{}, {"causal": "sideways"}]
    drawn = {"seeds": {"count": 100_000}, "mode": "random", "samples": 200_000, "options": options}
    with pytest.raises(RequestError, match="is no case"):
        small(**drawn)
    small(**{**drawn, "options": [{}]})
    found = 0
    for seed in range(10):
        try:
            small(**{**drawn, "samples": 1, "seed": seed})
        except RequestError:
            found += 1
    assert 0 < found < 10


def test_contradiction_at_the_end_of_long_lists_is_found_before_anything_runs() -> None:
    shapes = [{"q_len": 3, "kv_len": n, "head_dim": 8} for n in range(1, 25_000)]
    zipped = {"mode": "zip", "dtypes": ["fp32"], "seeds": [0]}
    small(**zipped, shapes=shapes)
    with pytest.raises(RequestError, match="is no case"):
        small(**zipped, shapes=[*shapes, {"q_len": 3, "kv_len": 3, "head_dim": 8, "heads": 3, "kv_heads": 2}])


@pytest.mark.parametrize("missing", ["methods", "dtypes", "shapes"])
def test_what_must_be_given(missing: str) -> None:
    with pytest.raises(RequestError, match=f"{missing!r} is missing"):
        spec.parse({key: value for key, value in SMALL.items() if key != missing})


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read"):
        spec.load(tmp_path / "nowhere.toml")
    (tmp_path / "broken.toml").write_text("methods = [")
    with pytest.raises(RequestError, match="is not TOML"):
        spec.load(tmp_path / "broken.toml")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("seeds = { from = 0, count = 100000000000000000000000000 }", "seeds below 2**63"),
        ("seeds = { from = 9223372036854775807, count = 1 }", "seeds below 2**63"),
        (
            "mode = 'random'\nsamples = 5\nseeds = { count = 9223372036854775806 }",
            "18,446,744,073,709,551,612 combinations",
        ),
        ("options = [{ scale = 2030-01-01 }]", "options has scale = 2030-01-01; expected a number"),
        ("options = [{ causal = [2030-01-01T00:00:00] }]", "no date"),
        (f"values = {'[' * 3000}{']' * 3000}", "nested too deeply"),
        (f"samples = {'9' * 5000}", "is not TOML"),
        ("seedz = [1]", "did you mean 'seeds'?"),
        ("mode = 'random'\nsamples = 1\nseeds = [1]\nsede = 1", "did you mean 'seed'?"),
    ],
    ids=str,
)
def test_specification_of_another_kind_is_refused(
    effattn_command: Command, tmp_path: Path, given: str, words: str
) -> None:
    (tmp_path / "sweep.toml").write_text(
        f"{given}\nmethods = ['flash']\ndtypes = ['fp16', 'fp32']\nshapes = [{{ q_len = 3, kv_len = 5, head_dim = 8 }}]\n"
    )
    code, out, err = effattn_command("sweep", tmp_path / "sweep.toml", "--out", tmp_path / "run")
    assert (code, out) == (2, "")
    assert words in err
    assert not (tmp_path / "run").exists()


def test_identity_is_that_of_what_runs() -> None:
    assert small().id == small().id != small(seeds={"count": 4}).id
    assert small(seeds=[0, 1, 2]).count == small().count


# Running


def test_every_case_is_recorded_once(folder: Path, executor: IsolatedExecutor) -> None:
    wanted = small(methods=["mine.py:right", "mine.py:zeros"])
    result = run(folder / "run", wanted, executor)
    assert keys(folder / "run") == Counter(expected(wanted))
    assert result.added == 24
    assert result.exit_code == 1
    assert result.tallies["mine.py:right", "fp16"].outcomes == {"pass": 6}
    assert result.tallies["mine.py:zeros", "fp32"].outcomes == {
        "inaccurate": 3,
        "wrong shape or dtype": 0,
    } or (result.tallies["mine.py:zeros", "fp32"].failed == 6)
    provenance = store.read_provenance(folder / "run")
    assert provenance["kind_of_run"] == "sweep"
    assert provenance["cases"] == 24
    assert provenance["ended"]
    assert sorted(path.name for path in (folder / "run").iterdir() if "verdicts" not in path.name) == [
        "provenance.json"
    ]


def test_what_is_recorded_is_not_run_again(folder: Path, executor: IsolatedExecutor) -> None:
    run(folder / "run", small(), executor)
    before = {file: file.read_bytes() for file in store.verdict_files(folder / "run")}
    result = run(folder / "run", small(), executor)
    assert (result.resumed, result.added) == (12, 0)
    assert {file: file.read_bytes() for file in store.verdict_files(folder / "run")} == before
    assert result.exit_code == 0


def test_cases_that_are_the_same_are_run_once(folder: Path, executor: IsolatedExecutor) -> None:
    result = run(folder / "run", small(options=[{}, {"causal": "none"}]), executor)
    assert (result.added, result.same) == (12, 12)
    assert run(folder / "run", small(options=[{}, {"causal": "none"}]), executor).same == 12
    assert run(folder / "other", small(), executor).same == 0


@pytest.mark.parametrize(
    ("name", "outcome"), [("crashes_on_long", "crashed"), ("loops_on_long", "timed out")]
)
def test_case_that_kills_its_worker_gets_the_verdict_and_no_other(
    folder: Path, executor: IsolatedExecutor, name: str, outcome: str
) -> None:
    wanted = small(methods=[f"mine.py:{name}"], dtypes=["fp32"], seeds={"count": 2})
    result = run(folder / "run", wanted, executor, time_limit=0.5 if name.startswith("loops") else 60.0)
    assert keys(folder / "run") == Counter(expected(wanted))
    assert result.tallies[f"mine.py:{name}", "fp32"].outcomes == {"pass": 2, outcome: 2}
    wrong = {
        r.verdict["case"]["kv_len"]
        for r in store.read_records(folder / "run")
        if r.verdict["outcome"] == outcome
    }
    assert wrong == {7}


def test_text_that_is_none_or_too_long_is_recorded_in_part(
    effattn_command: Command, folder: Path, executor: IsolatedExecutor
) -> None:
    wanted = small(methods=["mine.py:says_what_no_text_is"], seeds=[0])
    assert run(folder / "run", wanted, executor).added == 4
    for record in store.read_records(folder / "run"):
        message = record.verdict["message"]
        assert message.startswith(r"the method raised ValueError: \ud800xxx")
        assert "characters left out]" in message
        assert " the end\nat mine.py" in message
        assert 7000 < len(message) <= 8000
    assert run(folder / "run", wanted, executor).added == 0
    code, out, err = effattn_command(
        "gate", "mine.py:says_what_no_text_is", "--dtype", "fp32", "--out", "gate"
    )
    assert (code, "Traceback" in err) == (1, False), err
    assert r"\ud800xxx" in out


def test_longest_tail_of_a_killed_writer_is_cut_off(folder: Path, executor: IsolatedExecutor) -> None:
    run(folder / "run", small(), executor)
    file = store.verdict_files(folder / "run")[0]
    was = file.read_bytes()
    file.write_bytes(was + b'{"crc32":"' + b"x" * (5 << 19))
    other = file.with_name("verdicts-other.jsonl")
    other.write_bytes(b"x" * (5 << 19))
    assert [str(damage).rpartition("/")[2] for damage in run(folder / "run", small(), executor).damaged] == [
        f"{name}, line {line} is damaged: it is cut off; the case is run again"
        for name, line in sorted([(file.name, was.count(b"\n") + 1), (other.name, 1)])
    ]
    assert file.read_bytes() == was


def test_what_is_only_named_like_records_is_left_alone(
    effattn_command: Command, folder: Path, executor: IsolatedExecutor
) -> None:
    run(folder / "run", small(), executor)
    (folder / "notes.txt").write_text("no newline at the end")
    (folder / "run" / "verdicts-link.jsonl").symlink_to(folder / "notes.txt")
    os.mkfifo(folder / "run" / "verdicts-pipe.jsonl")
    (folder / "run" / "verdicts-folder.jsonl").mkdir()
    told = ["folder.jsonl: it is a folder", "link.jsonl: it is a symbolic link", "pipe.jsonl: it is a pipe"]
    result = run(folder / "run", small(), executor)
    assert (result.resumed, result.added) == (12, 0)
    assert all(any(words in str(damage) for damage in result.damaged) for words in told)
    for arguments in (["list", "."], ["show", "run"], ["query", "SELECT count(*) FROM verdicts", "run"]):
        code, _, err = effattn_command("runs", *arguments)
        assert code == 0
        assert all(words in err for words in told)
    assert (folder / "notes.txt").read_text() == "no newline at the end"


def test_damage_is_named_kept_where_it_is_and_made_good(folder: Path, executor: IsolatedExecutor) -> None:
    run(folder / "run", small(), executor)
    cut = next(file for file in store.verdict_files(folder / "run"))
    content = bytearray(cut.read_bytes())
    content[100] ^= 1
    cut.write_bytes(content[:-7])
    lost = 1 if content.count(b"\n") == 1 else 2
    result = run(folder / "run", small(), executor)
    assert (result.resumed, result.added) == (12 - lost, lost)
    assert any("cut off" in damage.reason for damage in result.damaged)
    found = {record.key for record in store.read_records(folder / "run", [])}
    assert found == expected(small())


def test_another_sweep_or_anything_else_in_the_folder_is_refused(
    folder: Path, executor: IsolatedExecutor
) -> None:
    run(folder / "run", small(), executor)
    before = {path: path.read_bytes() for path in (folder / "run").iterdir()}
    with pytest.raises(RequestError, match="never mixed"):
        sweep.Sweep(folder / "run", small(seeds=[0]))
    with pytest.raises(RequestError, match="never mixed"):
        sweep.Sweep(folder / "run", small(), device="cuda")
    assert before.items() <= {path: path.read_bytes() for path in (folder / "run").iterdir()}.items()
    with pytest.raises(RequestError, match="something other than an effattn run"):
        sweep.Sweep(folder, small())
    with pytest.raises(RequestError, match="is a file"):
        sweep.Sweep(folder / "mine.py", small())


def test_method_that_was_edited_since_is_refused(folder: Path) -> None:
    """By the file itself and by a neighbour of a neighbour that it imports; the edit of another file is no matter."""
    (folder / "neighbour.py").write_text("import deeper\n")
    for other in ("deeper.py", "other.py"):
        (folder / other).write_text("x = 1\n")
    (folder / "mine.py").write_text(f"import neighbour\n{METHODS}")
    wanted = small(methods=["mine.py:right", "torch"])
    # Of its own, since workers look for files where they were started.
    with IsolatedExecutor(1) as executor:
        run(folder / "run", wanted, executor)
        (folder / "other.py").write_text("x = 2\n")
        assert run(folder / "run", wanted, executor).resumed == 24
        before = {path: path.read_bytes() for path in (folder / "run").iterdir()}
        for edited in ("mine.py", "deeper.py"):
            was = (folder / edited).read_text()
            (folder / edited).write_text(f"{was}\ny = 2\n")
            with pytest.raises(RequestError, match=r"^'mine.py:right' was edited since.*--out"):
                run(folder / "run", wanted, executor)
            after = {path: path.read_bytes() for path in (folder / "run").iterdir()}
            assert after == before
            (folder / edited).write_text(was)
        assert run(folder / "run", wanted, executor).added == 0


def test_edit_anywhere_in_the_package_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in what no file of it seems to import; what is beside the package is no matter."""
    from effattn.methods import load

    inner = tmp_path / "attention_package" / "kernels"
    inner.mkdir(parents=True)
    files = [
        inner.parent / "__init__.py",
        inner.parent / "tuning.py",
        inner / "__init__.py",
        inner / "forward.py",
    ]
    for file in files:
        file.write_text(f"# {file.name}\n")
    files[-1].write_text("def attention(q, k, v):\n    return q\n")
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "alone.py").write_text("import beside\n\n\ndef f(q, k, v):\n    return q\n")
    monkeypatch.syspath_prepend(tmp_path)

    def changes(spec: str, file: Path) -> bool:
        before, was = load.source_digest(spec), file.read_text()
        file.write_text(f"{was}# edited\n")
        after = load.source_digest(spec)
        file.write_text(was)
        assert load.source_digest(spec) == before
        return after != before

    deep = "attention_package.kernels.forward:attention"
    assert [changes(deep, file) for file in files] == [True] * 4
    assert [changes("attention_package:kernels", file) for file in files] == [True] * 4
    assert not changes(deep, tmp_path / "beside.py")
    assert changes("alone:f", tmp_path / "beside.py")
    # Of a package that is too large, the part around the module that is not.
    files[1].write_text("#" * load.MOST_SOURCE)
    assert [changes(deep, file) for file in files] == [False, False, True, True]


def test_run_is_replaced_only_when_asked_to_and_when_the_methods_load(
    effattn_command: Command, folder: Path
) -> None:
    (folder / "small.toml").write_text(toml("right", 2))
    (folder / "other.toml").write_text(toml("zeros", 1))
    (folder / "typo.toml").write_text(toml("wright", 1))
    assert effattn_command("sweep", "small.toml", "--out", "run", "--jobs", "1")[0] == 0
    (folder / "run" / "notes").mkdir()
    before = {path: path.read_bytes() for path in (folder / "run").iterdir() if path.is_file()}

    def unchanged() -> bool:
        after = {path: path.read_bytes() for path in (folder / "run").iterdir() if path.is_file()}
        after.pop(folder / "run" / sweep.LOCK, None)
        return after == before and (folder / "run" / "notes").is_dir()

    code, _, err = effattn_command("sweep", "other.toml", "--out", "run", "--jobs", "1")
    assert code == 2
    assert "replace that run with --overwrite" in err
    assert unchanged()
    code, _, err = effattn_command("sweep", "typo.toml", "--out", "run", "--jobs", "1", "--overwrite")
    assert code == 2
    assert "no function 'wright'" in err
    assert unchanged()
    code, out, err = effattn_command("sweep", "other.toml", "--out", "run", "--jobs", "1", "--overwrite")
    assert code == 1, err
    assert "2 cases." in out
    assert keys(folder / "run") == Counter(expected(spec.load(folder / "other.toml")))
    assert "resumed" not in store.read_provenance(folder / "run")
    assert not (folder / "run" / "notes").exists()
    # The same again: begun anew, not taken up.
    code, out, _ = effattn_command("sweep", "other.toml", "--out", "run", "--jobs", "1", "--overwrite")
    assert "2 cases." in out
    assert "recorded before" not in out


def test_methods_of_one_name_in_two_folders_are_two(folder: Path) -> None:
    for name, source in (("old", METHODS), ("new", METHODS.replace("(q.dtype)", "(q.dtype) * 2"))):
        (folder / name).mkdir()
        (folder / name / "k.py").write_text(source)
    methods = ["old/k.py:right", "new/k.py:right", "mine.py:right"]
    with IsolatedExecutor(2) as executor:  # of its own, since workers look for files where they were started
        result = run(folder / "run", small(methods=methods), executor)
    failed = {name: tally.failed > 0 for (name, _), tally in result.tallies.items()}
    assert failed == {"old/k.py:right": False, "new/k.py:right": True, "mine.py:right": False}


def test_run_whose_provenance_was_changed_is_not_gone_on_with(
    folder: Path, executor: IsolatedExecutor
) -> None:
    run(folder / "run", small(), executor)
    file = folder / "run" / "provenance.json"
    file.write_text(file.read_text().replace('"device": "cpu"', '"device": "cuda"'))
    with pytest.raises(RequestError, match=r"provenance.json: its checksum does not match"):
        sweep.Sweep(folder / "run", small())
    assert '"device": "cuda"' in file.read_text()
    with sweep.Sweep(folder / "run", small(), overwrite=True):
        pass


def test_what_is_no_run_is_never_replaced(folder: Path) -> None:
    def all_of(place: Path) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}

    for name, content in (("work.py", "x = 1"), ("provenance.json", '{"kind": "something else"}')):
        other = folder / name.partition(".")[0]
        other.mkdir()
        (other / name).write_text(content)
        before = all_of(other)
        with pytest.raises(RequestError, match="something other than an effattn run"):
            sweep.Sweep(other, small(), overwrite=True)
        assert all_of(other) == before
    with sweep.Sweep(folder / "run", small()):
        for overwritten in (sweep.Sweep, lambda out, _, **options: store.RunWriter(out, **options)):
            with pytest.raises(RequestError, match="sweep is writing"):
                overwritten(folder / "run", small(), overwrite=True)


def test_killed_while_it_begins_anew_nothing_is_mixed(
    folder: Path, executor: IsolatedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The removal breaks off after some files: what is left is a part of the old run, and is named so."""
    run(folder / "run", small(), executor)
    (folder / "run" / "summary.md").write_text("")
    unlink = Path.unlink

    def breaks_off(path: Path, **options: Any) -> None:
        unlink(path, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "run", small(seeds=[7]), executor, overwrite=True)
    with pytest.raises(RequestError, match="never mixed"):
        sweep.Sweep(folder / "run", small(seeds=[7]))
    run(folder / "run", small(seeds=[7]), executor, overwrite=True)
    assert keys(folder / "run") == Counter(expected(small(seeds=[7])))


def test_second_supervisor_in_a_folder_is_refused(folder: Path) -> None:
    with (
        sweep.Sweep(folder / "run", small()),
        pytest.raises(RequestError, match="another sweep is writing"),
    ):
        sweep.Sweep(folder / "run", small())


def test_folder_that_cannot_be_made_is_named(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot write the run folder.*--out"):
        sweep.Sweep(Path("/proc/nowhere/run"), small())


def test_full_disk_stops_the_sweep_by_name_and_keeps_what_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = small(methods=["mine.py:on_a_small_disk"])
    # A file that may not grow answers as a full disk does: with a part of what is written.
    monkeypatch.setenv("LARGEST_FILE", "4000")
    with (
        IsolatedExecutor(1) as own,
        pytest.raises(RequestError, match=r"cannot write into the run folder.*what is recorded is kept"),
    ):
        run(folder / "run", wanted, own)
    kept = keys(folder / "run")
    assert kept
    assert set(kept) < expected(wanted)
    monkeypatch.delenv("LARGEST_FILE")
    with IsolatedExecutor(1) as own:
        assert run(folder / "run", wanted, own).resumed == len(kept)
    assert keys(folder / "run") == Counter(expected(wanted))


class Filling(concurrent.futures.Executor):
    """Runs everything here; when the first case has been judged, no file can grow beyond what the provenance has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        if fn is chunk.run:
            size = (self.folder / "provenance.json").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        future.set_result(fn(*args, **kwargs))
        return future


def test_disk_that_is_full_at_the_end_is_named_and_the_verdicts_are_kept(folder: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The provenance is larger than the files of verdicts will be, and cannot be written once more.
    try:
        with pytest.raises(
            RequestError, match=r"cannot write the run folder.*File too large.*recorded is kept"
        ):
            run(folder / "run", small(), Filling(folder / "run"), provenance={"note": "x" * 100_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert keys(folder / "run") == Counter(expected(small()))
    assert "ended" not in store.read_provenance(folder / "run")
    result = run(folder / "run", small(), Rerunning())
    assert (result.resumed, result.added) == (12, 0)
    assert store.read_provenance(folder / "run")["ended"]


class Rerunning(concurrent.futures.Executor):
    """Runs everything here, and now and then what it has run already, as Dask does when it thinks a worker lost."""

    def __init__(self) -> None:
        self.calls = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.calls += 1
        result = fn(*args, **kwargs)
        if fn is chunk.run and self.calls % 2:
            result = fn(*args, **kwargs)
        future.set_result(result)
        return future


def test_executor_that_runs_a_chunk_twice_records_it_once(folder: Path) -> None:
    result = run(folder / "run", small(), Rerunning())
    assert keys(folder / "run") == Counter(expected(small()))
    assert result.added == 12


def test_worker_that_outlives_an_edit_judges_nothing(folder: Path) -> None:
    """Workers of Dask live from sweep to sweep, and keep what they have loaded."""
    run(folder / "run", small(), Rerunning())
    was = (folder / "mine.py").read_text()
    (folder / "mine.py").write_text(was.replace("return (scores", "return 2 * (scores"))
    with pytest.raises(
        RequestError, match=r"^'mine.py:right' was edited since a worker loaded it.*start the workers"
    ):
        run(folder / "run", small(), Rerunning(), overwrite=True)
    assert not keys(folder / "run")
    (folder / "mine.py").write_text(was)
    assert run(folder / "run", small(), Rerunning(), overwrite=True).added == 12


EDITS_ITSELF = """

def edits_its_file_and_dies(q, k, v):
    # As somebody does who mends a kernel while a run is judging it: the first case goes well, the next one ends the process.
    if k.shape[2] > 6:
        with open(__file__, "a") as file:
            file.write("edited = True\\n")
        os._exit(3)
    return right(q, k, v)
"""


def test_worker_that_replaces_another_refuses_a_file_edited_meanwhile(
    effattn_command: Command, folder: Path
) -> None:
    (folder / "mine.py").write_text(METHODS + EDITS_ITSELF)
    was = (folder / "mine.py").read_text()
    wanted = small(methods=["mine.py:edits_its_file_and_dies"])
    with (
        IsolatedExecutor(1, quiet=True) as own,
        pytest.raises(
            RequestError,
            match=r"^'mine.py:edits_its_file_and_dies' was edited since the run began: process \d+ on",
        ),
    ):
        run(folder / "run", wanted, own)
    there = keys(folder / "run")
    assert len(there) >= 3
    assert set(there) < expected(wanted)
    # The gate has no folder to keep anything in: it is there when all is judged.
    (folder / "mine.py").write_text(was)
    code, _, err = effattn_command(
        "gate", "mine.py:edits_its_file_and_dies", "--dtype", "fp32", "--jobs", "2", "--out", "gate"
    )
    assert code == 2
    assert "was edited since the run began" in err
    assert not (folder / "gate").exists()
    # Mended after the process has loaded it, and nothing ended it: that changes no verdict of this run.
    with IsolatedExecutor(1) as own:
        assert run(folder / "other", small(), own).added == 12


def test_leftover_of_another_session_does_nothing(folder: Path) -> None:
    with sweep.Sweep(folder / "run", small()) as first:
        first.begin({})
        old = first.session
    with sweep.Sweep(folder / "run", small()) as second:
        second.begin({})
        items = [(method, case.to_dict()) for method, case in small().cases()]
        place, sources = str(second.folder), {"mine.py:right": work.source("mine.py:right")}
        refused = chunk.run(place, old, "a", "cpu", 60.0, items, sources)["refused"]
        assert "another sweep has begun" in refused
        assert chunk.run(place, second.session, "a", "cpu", 60.0, items[:1], sources)["cases"] == 1
        assert chunk.run(place, second.session, "a", "cpu", 60.0, items[:1], sources) == {"claimed": "a"}
    assert sum(keys(folder / "run").values()) == 1


def test_no_more_is_handed_out_than_the_workers_can_take(folder: Path) -> None:
    class Counting(concurrent.futures.Executor):
        """Holds everything back until nothing more is handed out."""

        def __init__(self) -> None:
            self.held: list[tuple[concurrent.futures.Future[Any], Callable[..., Any], tuple[Any, ...]]] = []
            self.most = 0

        def submit(
            self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any
        ) -> concurrent.futures.Future[Any]:
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            if fn is not chunk.run:
                future.set_result(fn(*args))
                return future
            self.held.append((future, fn, args))
            self.most = max(self.most, len(self.held))
            return future

        def release(self) -> None:
            held, self.held = self.held, []
            for future, fn, args in held:
                future.set_result(fn(*args))

    counting = Counting()
    real_wait = concurrent.futures.wait

    def wait(futures: Any, **options: Any) -> Any:
        counting.release()
        return real_wait(futures, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concurrent.futures, "wait", wait)
        run(folder / "run", small(seeds={"count": 12}), counting)
    assert counting.most <= 2 * sweep.AHEAD
    assert keys(folder / "run") == Counter(expected(small(seeds={"count": 12})))


# kill -9


def start(folder: Path, out: Path, told: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, "sweep", "sweep.toml", "--out", str(out), "--jobs", "2"],
        cwd=folder, env={**os.environ, "TOLD": str(told)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def toml(method: str, seeds: int) -> str:
    return f"""
methods = ["mine.py:{method}"]
dtypes = ["fp16", "fp32"]
shapes = [{{ q_len = 3, kv_len = 5, head_dim = 8 }}]
seeds = {{ from = 0, count = {seeds} }}
"""


def test_supervisor_is_killed_again_and_again(folder: Path) -> None:
    """Killed after some cases have begun, whichever they are; the next one goes on, until one comes to the end."""
    (folder / "sweep.toml").write_text(toml("tells", 30))
    os.mkfifo(folder / "told")
    wanted = spec.load(folder / "sweep.toml")
    for begun in (1, 7, 20):
        # Read and write, so that the pipe is open before and after the others.
        told = os.open(folder / "told", os.O_RDWR)
        process = start(folder, folder / "run", folder / "told")
        for _ in range(begun):
            assert os.read(told, 1) == b"."
        process.kill()
        # Its pipes are closed when its workers have gone too.
        process.communicate()
        os.close(told)
        so_far = {record.key for record in store.read_records(folder / "run", [])}
        assert so_far < expected(wanted)
    told = os.open(folder / "told", os.O_RDWR)
    process = start(folder, folder / "run", folder / "told")
    _, err = process.communicate()
    os.close(told)
    assert process.returncode == 0, err
    assert keys(folder / "run") == Counter(expected(wanted))
    assert {record.verdict["outcome"] for record in store.read_records(folder / "run")} == {"pass"}
    assert len(store.read_provenance(folder / "run")["resumed"]) == 3


def test_interrupted_sweep_says_what_is_recorded_and_how_to_go_on(folder: Path) -> None:
    os.mkfifo(folder / "told")
    (folder / "s.toml").write_text(toml("tells", 3000))
    told = os.open(folder / "told", os.O_RDWR)
    main = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {MAIN}"
    process = subprocess.Popen(
        [sys.executable, "-c", main, "sweep", "s.toml", "--out", "run", "--jobs", "1"],
        cwd=folder, env={**os.environ, "TOLD": str(folder / "told")}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(5):
        assert os.read(told, 1) == b"."
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate()
    os.close(told)
    recorded = sum(keys(folder / "run").values())
    assert process.returncode == 130
    assert f"{recorded} of 6000 verdicts are recorded in run/, and the same command goes on" in complaint
    assert 4 <= recorded < 6000
    said = gather.gather([folder / "run"])
    assert f"The run is not at its end ({recorded} of 6000 verdicts are recorded)" in said.sentence
    assert [run.command for run in said.unfinished] == ["effattn sweep s.toml --out run --jobs 1"]


def test_sweep_that_is_terminated_says_what_is_recorded(folder: Path) -> None:
    (folder / "sweep.toml").write_text(toml("tells", 40))
    os.mkfifo(folder / "told")
    pipe = os.open(folder / "told", os.O_RDWR)
    process = start(folder, folder / "run", folder / "told")
    os.read(pipe, 1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    os.close(pipe)
    assert process.returncode == 143, err
    assert "effattn: ended by SIGTERM; " in err
    assert "of 80 verdicts are recorded in" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(("method", "outcome"), [("zeros", "inaccurate"), ("crashes_on_long", "crashed")])
def test_failed_sweep_ends_with_the_line_that_shows_a_case_again(
    effattn_command: Command, folder: Path, method: str, outcome: str
) -> None:
    (folder / "sweep.toml").write_text(toml(method, 2).replace("kv_len = 5", "kv_len = 7"))
    code, out, _ = effattn_command("sweep", "sweep.toml", "--out", "a run", "--jobs", "1")
    assert code == 1
    words = shlex.split(out.splitlines()[-1].removeprefix("To see a failed case again: "))
    assert words[:2] == ["effattn", "replay"]
    assert words[3:] == [f"mine.py:{method}", "--run", "a run"]
    assert words[2] in next(line for line in out.splitlines() if "fp16" in line)
    code, out, _ = effattn_command(*words[1:])
    assert code == 1
    assert outcome in out
    (folder / "sweep.toml").write_text(toml("right", 2))
    code, out, _ = effattn_command("sweep", "sweep.toml", "--out", "good", "--jobs", "1")
    assert (code, "replay" in out) == (0, False)


def test_workers_are_killed_while_they_work(folder: Path) -> None:
    (folder / "sweep.toml").write_text(toml("tells_its_pid", 20))
    os.mkfifo(folder / "told")
    wanted = spec.load(folder / "sweep.toml")
    told = os.open(folder / "told", os.O_RDWR)
    process = start(folder, folder / "run", folder / "told")
    with open(told, closefd=True) as lines:
        for begun in range(24):
            pid = int(lines.readline())
            if begun % 8 == 3:
                os.kill(pid, signal.SIGKILL)
        # Nobody reads any more: what is left is told to a pipe that is large enough.
        _, err = process.communicate()
    assert process.returncode == 0, err
    assert keys(folder / "run") == Counter(expected(wanted))
    assert {record.verdict["outcome"] for record in store.read_records(folder / "run")} == {"pass"}


@pytest.mark.parametrize("cause", ["no array", "no tensors", "no reference"])
def test_case_too_large_for_memory_is_not_judged_and_the_others_are(folder: Path, cause: str) -> None:
    # No array has 2^48 elements; 2^28 queries of 8 are more than the worker may allocate, exact attention on 2^21 too.
    heads, q_len = {"no array": (2**14, 2**31 - 1), "no tensors": (1, 2**28), "no reference": (1, 2**21)}[
        cause
    ]
    large = {"q_len": q_len, "kv_len": 5, "head_dim": 8, "heads": heads}
    wanted = small(shapes=[large, SMALL["shapes"][0]], dtypes=["fp16"], seeds=[0, 1])
    with IsolatedExecutor(1, memory_limit=2**30, quiet=True) as own:
        result = run(folder / "run", wanted, own)
    found = [record.verdict for record in store.read_records(folder / "run")]
    outcomes = {(v["case"]["q_len"], v["case"].get("seed", 0)): v["outcome"] for v in found}
    assert outcomes == {
        (n, s): "pass" if n == 3 else "not judged" for n in (large["q_len"], 3) for s in (0, 1)
    }
    told = [v["message"] for v in found if v["outcome"] == "not judged"]
    assert all(
        ("exact attention" if cause == "no reference" else "memory of cpu") in message for message in told
    )
    assert (result.exit_code, result.added) == (0, 4)
    with IsolatedExecutor(1, memory_limit=2**30, quiet=True) as own:
        assert run(folder / "run", wanted, own).added == 0


def test_death_from_outside_is_told_from_the_cases_own(folder: Path) -> None:
    with sweep.Sweep(folder / "run", small()) as taken:
        state = sweep._State(taken, IsolatedExecutor(0), {}, {})
        key = records.Key("a", "m", "cpu")

        def blamed(code: int | None, deaths: int) -> bool:
            state._deaths[key] = deaths
            return state._is_to_blame(key, code)

        assert blamed(-signal.SIGALRM, 1)
        assert [blamed(-signal.SIGSEGV, n) for n in (1, 2)] == [False, True]
        for unknown in (-signal.SIGKILL, None):
            assert [blamed(unknown, n) for n in (1, 2, 3)] == [False, False, True]


# The command


def test_command_runs_and_resumes(effattn_command: Command, folder: Path) -> None:
    (folder / "small.toml").write_text(toml("right", 3))
    code, out, err = effattn_command("sweep", "small.toml", "--jobs", "1")
    assert code == 0, err
    assert "6 cases." in out
    (made,) = (path for path in (folder / "effattn-runs").iterdir() if path.is_dir())
    assert made.name.startswith("small-")
    code, out, _ = effattn_command("sweep", "small.toml", "--jobs", "1")
    assert code == 0
    assert "6 cases: 6 recorded before, 0 now." in out
    provenance = store.read_provenance(made)
    assert provenance["command"] == "effattn sweep small.toml --jobs 1"
    assert "mine.py:right" in provenance["specification"]
    code, out, _ = effattn_command("runs", "show", made)
    assert code == 0
    assert "mine.py:right" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["small.toml", "--executor", "ssh://host"], "dask://HOST:PORT"),
        (["small.toml", "--executor", "dask://127.0.0.1:1", "--jobs", "2"], "--jobs"),
        (["small.toml", "--executor", "dask://127.0.0.1:1"], "no Dask scheduler answers"),
        (["small.toml", "--device", "tpu"], "tpu"),
        (["nowhere.toml"], "cannot read"),
        (["unknown.toml"], "unknown method 'flush'"),
    ],
)
def test_wrong_commands(
    effattn_command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    from effattn.run import dask

    monkeypatch.setattr(dask, "CONNECTING", 1)
    (folder / "small.toml").write_text(toml("right", 1))
    (folder / "unknown.toml").write_text(toml("right", 1).replace("mine.py:right", "flush"))
    code, _, err = effattn_command("sweep", *arguments)
    assert code == 2
    assert words in err


# Dask


def test_dask_cluster_with_a_worker_killed_midway(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers on loopback; one is killed while it judges, its nanny starts another, the sweep goes on."""
    from effattn.run import dask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dask's own: ports that are taken, slow event loops
        from distributed import LocalCluster

        os.mkfifo(folder / "told")
        monkeypatch.setenv("TOLD", str(folder / "told"))
        told = os.open(folder / "told", os.O_RDWR)
        wanted = spec.parse(
            {
                **SMALL,
                "methods": [f"{folder}/mine.py:tells_its_pid"],
                "seeds": {"count": 4},
                "dtypes": ["fp32"],
            }
        )
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
            ) as cluster,
            dask.executor(cluster.scheduler_address.removeprefix("tcp://"), device="cpu") as (pool, parallel),
            sweep.Sweep(folder / "run", wanted) as taken,
            open(told) as lines,
            concurrent.futures.ThreadPoolExecutor(1) as threads,
        ):
            assert parallel == 2
            running = threads.submit(taken.run, pool, parallel=parallel)
            os.kill(int(lines.readline()), signal.SIGKILL)
            result = running.result()
    assert keys(folder / "run") == Counter(expected(wanted))
    assert result.added == 8
    assert {record.verdict["outcome"] for record in store.read_records(folder / "run")} == {"pass"}


def test_provenance_is_strict_json(folder: Path, executor: IsolatedExecutor) -> None:
    run(folder / "run", small(seeds=[0]), executor)
    text = (folder / "run" / "provenance.json").read_text()
    assert json.loads(text)["sweep"] == small(seeds=[0]).id
    assert isolation.TIME_LIMIT > 0
