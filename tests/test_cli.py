"""The command line: what it prints, what it exits with, and what it says to bad input."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., tuple[int, str, str]]

METHODS = """
import os, signal
import effattn
import torch
import torch.nn.functional as F


# As in docs/examples/my_attention.py: what a product does with NaN and with other sizes is declared.
@effattn.method(same_bits=False, nan_safe=False)
def right(q, k, v, *, causal=False, scale=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k, v))
    scores = q.double() @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool)
    if causal:
        seen = seen.tril(k.shape[2] - q.shape[2])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0.0)
    return (weights @ v).to(q.dtype)


def raises(q, k, v, *, causal=False, scale=None):
    raise ValueError("the kernel is [red]not[/red] finished \\x1b[31m")


def none(q, k, v, *, causal=False, scale=None):
    return None


def wrong_shape(q, k, v, *, causal=False, scale=None):
    return right(q, k, v, causal=causal, scale=scale)[..., :-1]


def wrong_dtype(q, k, v, *, causal=False, scale=None):
    return right(q, k, v, causal=causal, scale=scale).double()


def wrong_device(q, k, v, *, causal=False, scale=None):
    return right(q, k, v, causal=causal, scale=scale).to("meta")


def zeros(q, k, v, *, causal=False, scale=None):
    return torch.zeros_like(right(q, k, v, causal=causal, scale=scale))


def nothing(q, k, v, *, causal=False, scale=None):
    raise NotImplementedError("only head_dim 3")


def only_16_bit(q, k, v, *, causal=False, scale=None):
    if q.dtype == torch.float32:
        raise NotImplementedError("16 bit only")
    return right(q, k, v, causal=causal, scale=scale)


def interrupts(q, k, v, *, causal=False, scale=None):
    os.kill(int(os.environ["WHO_IS_INTERRUPTED"]), signal.SIGINT)
    return right(q, k, v, causal=causal, scale=scale)
"""

#: The command line in a process of its own.
MAIN = "import sys; from effattn.cli import main; sys.exit(main())"

CASE = '{"schema":1,"heads":2,"q_len":20,"kv_len":33,"head_dim":16,"dtype":"fp16"}'


@pytest.fixture
def methods_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with methods, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.py"
    path.write_text(METHODS)
    return path


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


# Starting up


@pytest.mark.parametrize(
    "arguments",
    [["--help"], [], ["--version"], ["gate", "--help"], ["replay", "--help"], ["doctor", "--help"], ["gate"]],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from effattn.cli import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'triton', 'numpy', 'scipy', 'hypothesis', 'pytest'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = python(code, *arguments)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_nothing_heavy() -> None:
    done = python("import sys, effattn; sys.exit(bool({'torch', 'triton', 'numpy'} & set(sys.modules)))")
    assert done.returncode == 0, done.stderr


def test_help_names_commands_and_exit_codes(effattn_command: Command) -> None:
    code, out, err = effattn_command("--help")
    assert code == 0
    assert not err
    for word in ("gate", "replay", "doctor", "methods", "values", "Exit codes"):
        assert word in out


def test_console_script_exits_with_the_code() -> None:
    script = Path(sys.executable).with_name("effattn")
    done = subprocess.run(
        [script, "gate", "flash", "--dtype", "fp8"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "fp8" in done.stderr


# Listing


def test_methods_are_listed(effattn_command: Command) -> None:
    code, out, _ = effattn_command("methods")
    assert code == 0
    assert "flash" in out
    assert "torch" in out
    assert "file.py:function" in out


def test_values_are_listed_with_their_reason(effattn_command: Command) -> None:
    from effattn.values import VALUES

    code, out, _ = effattn_command("values")
    assert code == 0
    for name in VALUES:
        assert name in out
    assert "real:smollm2" in out


def test_doctor_finds_what_the_tests_run_on(effattn_command: Command) -> None:
    code, out, _ = effattn_command("doctor")
    assert code == 0
    for what in (
        "Python",
        "torch",
        "triton",
        "C compiler",
        "Triton on the CPU",
        "kernel cache",
        "GPU",
        "real model",
    ):
        assert what in out


def test_doctor_says_what_to_do_without_a_compiler(
    effattn_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    code, out, _ = effattn_command("doctor")
    assert code == 2
    assert "/nowhere/cc" in out
    assert "Missing: C compiler" in out


def test_doctor_says_what_to_do_about_an_unwritable_cache(
    effattn_command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    code, out, _ = effattn_command("doctor")
    assert code == 2
    assert "set TRITON_CACHE_DIR" in out


# The wrong request: exit code 2, one message, nothing written


def refused(command: Command, *arguments: str | Path) -> str:
    """The message of a request that must be refused, in the current folder."""
    before = sorted(Path.cwd().rglob("*"))
    code, out, err = command(*arguments)
    assert code == 2, (code, out, err)
    assert not out
    assert err.startswith("effattn: ")
    assert "Traceback" not in err
    after = [path for path in Path.cwd().rglob("*") if "__pycache__" not in path.parts]
    assert sorted(after) == before, "something was written"
    return err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gate", "flahs"], ["'flahs'", "flash"]),
        (["gate", "flash", "--dtype", "float16"], ["'float16'", "fp16, bf16, fp32", "did you mean fp16"]),
        (["gate", "flash", "--dtype", "fp16,fp8"], ["'fp8'", "fp16, bf16, fp32"]),
        (["gate", "flash", "--dtype", ","], ["','", "fp16, bf16, fp32"]),
        (["gate", "flash", "--profile", "quick"], ["'quick'", "smoke, ci"]),
        (["gate", "flash", "--profile", "nightly"], ["'nightly'", "smoke, ci", "reserved"]),
        (["gate", "flash", "--values", "outlier"], ["'outlier'", "outliers"]),
        (["gate", "flash", "--values", "real:gpt9"], ["real:gpt9", "smollm2"]),
        (["gate", "flash", "--device", "tpu"], ["'tpu'", "cpu, cuda"]),
        (["gate", "flash", "--overwrite"], ["--overwrite", "--out"]),
        (["gate", "flash", "--bogus"], ["--bogus"]),
        (["gate"], ["METHOD"]),
        (["bogus"], ["bogus"]),
        (["gate", "missing.py:attention"], ["'missing.py'"]),
        (["gate", "mine.py:attention"], ["'mine.py'", "'attention'"]),
        (["gate", "mine.py:rihgt"], ["'rihgt'", "'right'"]),
        (["gate", "mine.py"], ["mine.py", "function"]),
        (["gate", "no_such_package.attention:forward"], ["no_such_package"]),
        (["gate", "broken.py:attention"], ["broken.py", "line 2"]),
        (["gate", "raising.py:attention"], ["raising.py", "ZeroDivisionError", "line 1"]),
        (["replay", "missing.json", "torch"], ["missing.json"]),
        (["replay", CASE[:40], "torch"], ["not JSON"]),
        (["replay", CASE[:-1] + ',"head":3}', "torch"], ["'head'"]),
        (["replay", CASE.replace("fp16", "fp8"), "torch"], ["'fp8'"]),
        (["replay", CASE.replace('"heads":2', '"heads":2,"kv_heads":3'), "torch"], ["heads", "kv_heads"]),
        (["replay", CASE.replace("33", "-1"), "torch"], ["kv_len", "-1"]),
        (["replay", CASE, "flahs"], ["'flahs'"]),
        (["replay", CASE], ["METHOD"]),
        (["replay", "0123456789ab", "torch"], ["effattn-runs", "--run"]),
        (["replay", "0123456789ab", "torch", "--run", "nowhere"], ["nowhere"]),
        (["replay", "xyz", "torch"], ["'xyz'", "file"]),
        (["replay", "truncated.json", "torch"], ["truncated.json", "not JSON"]),
        (["replay", "binary.json", "torch"], ["binary.json"]),
        (["replay", ".", "torch"], ["."]),
    ],
)  # fmt: skip
def test_wrong_request_is_refused(
    effattn_command: Command, methods_file: Path, arguments: list[str], words: list[str]
) -> None:
    Path("broken.py").write_text("def attention(q, k, v):\n    return (\n")
    Path("raising.py").write_text("1 / 0\n")
    Path("truncated.json").write_text(CASE[:30])
    Path("binary.json").write_bytes(b"\x80\x04\x95pickle")
    message = refused(effattn_command, *arguments)
    for word in words:
        assert word in message


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="this machine has a GPU")
def test_missing_gpu_is_named(effattn_command: Command, methods_file: Path) -> None:
    for arguments in (["gate", "torch"], ["replay", CASE, "torch"]):
        message = refused(effattn_command, *arguments, "--device", "cuda")
        assert "no usable GPU" in message


def test_output_folder_below_a_file_is_refused(effattn_command: Command, methods_file: Path) -> None:
    message = refused(effattn_command, "gate", "torch", "--dtype", "fp32", "--out", "mine.py/report")
    assert "mine.py/report" in message


def test_output_folder_that_the_system_refuses_is_named(effattn_command: Command, methods_file: Path) -> None:
    message = refused(effattn_command, "gate", "torch", "--dtype", "fp32", "--out", "/proc/effattn/report")
    assert "/proc/effattn/report" in message
    assert "--out" in message


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_folder_of_somebody_else_is_never_overwritten(
    effattn_command: Command, methods_file: Path, overwrite: list[str]
) -> None:
    Path("thesis").mkdir()
    Path("thesis/chapter.txt").write_text("years of work")
    message = refused(effattn_command, "gate", "torch", "--dtype", "fp32", "--out", "thesis", *overwrite)
    assert "'thesis'" in message
    assert Path("thesis/chapter.txt").read_text() == "years of work"


def test_missing_compiler_is_named(methods_file: Path) -> None:
    # In a process of its own: this one has compiled kernels.
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "gate", "flash"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "CC": "/nowhere/cc", "TRITON_CACHE_DIR": str(methods_file.parent / "cache")},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "/nowhere/cc" in done.stderr
    assert "Traceback" not in done.stderr
    assert not Path("effattn-runs").exists()


TRITON_WITH_ASSEMBLY = """
import torch, triton
import triton.language as tl


@triton.jit
def _kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n)
    value = tl.inline_asm_elementwise("teleport.b32 $0, $1;", "=r,r", [value], tl.float32, is_pure=True, pack=1)
    tl.store(x + i, value, mask=i < n)


def attention(q, k, v, *, causal=False, scale=None):
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float32)
    _kernel[(1,)](out, 1, BLOCK=16)
    return out.to(q.dtype)
"""


def test_operation_that_the_backend_does_not_offer_is_named(
    effattn_command: Command, methods_file: Path
) -> None:
    Path("assembly.py").write_text(TRITON_WITH_ASSEMBLY)
    message = refused(effattn_command, "gate", "assembly.py:attention", "--dtype", "fp32", "--out", "run")
    assert "teleport.b32" in message
    assert "_kernel" in message
    assert "assembly.py:10" in message


# The method's fault: exit code 1


@pytest.mark.parametrize(
    ("function", "outcome", "words"),
    [
        ("raises", "crashed", ["ValueError", "[red]not[/red] finished"]),
        ("none", "wrong shape or dtype", ["None"]),
        ("wrong_shape", "wrong shape or dtype", ["(1, "]),
        ("wrong_dtype", "wrong shape or dtype", ["float64"]),
        ("wrong_device", "wrong shape or dtype", ["meta"]),
        ("zeros", "inaccurate", ["replay"]),
    ],
)
def test_method_at_fault_fails(
    effattn_command: Command, methods_file: Path, function: str, outcome: str, words: list[str]
) -> None:
    code, out, err = effattn_command(
        "gate", f"mine.py:{function}", "--laws", "none", "--dtype", "fp16", "--out", "run"
    )
    assert code == 1, err
    assert outcome in out
    for word in words:
        assert word in out
    assert "\x1b" not in out, "what a method says must not control the terminal"
    assert "Traceback" not in err
    assert json.loads(Path("run/provenance.json").read_text())["exit_code"] == 1


def test_right_method_passes(effattn_command: Command, methods_file: Path) -> None:
    code, out, err = effattn_command("gate", "mine.py:right", "--laws", "none", "--out", "run")
    assert code == 0
    assert re.fullmatch(r"effattn: judging \d+ cases: fp16, bf16, fp32\n", err)
    assert "passed all" in out
    for dtype in ("fp16", "bf16", "fp32"):
        assert dtype in out


def test_nothing_judged_is_no_pass(effattn_command: Command, methods_file: Path) -> None:
    code, out, _ = effattn_command(
        "gate", "mine.py:nothing", "--laws", "none", "--dtype", "fp16", "--out", "run"
    )
    assert code == 2
    assert "only head_dim 3" in out
    assert "not a pass" in out


def test_dtype_of_which_nothing_was_judged_is_no_pass(effattn_command: Command, methods_file: Path) -> None:
    code, out, _ = effattn_command(
        "gate", "mine.py:only_16_bit", "--laws", "none", "--dtype", "fp16,fp32", "--out", "run"
    )
    assert code == 2
    assert "16 bit only" in out
    assert "fp32" in out.splitlines()[-2]
    code, out, _ = effattn_command(
        "gate", "mine.py:only_16_bit", "--laws", "none", "--dtype", "fp16", "--out", "run2"
    )
    assert code == 0


@pytest.mark.parametrize("isolation", ["--isolation", "--no-isolation"])
def test_interruption_writes_nothing_and_is_no_failure(
    effattn_command: Command, methods_file: Path, monkeypatch: pytest.MonkeyPatch, isolation: str
) -> None:
    monkeypatch.setenv("WHO_IS_INTERRUPTED", str(os.getpid()))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
    try:
        code, _, err = effattn_command(
            "gate", "mine.py:interrupts", "--laws", "none", "--dtype", "fp32", "--out", "deep/run", isolation
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130
    assert "interrupted" in err
    assert not Path("deep").exists()


# Replay


def test_replay_shows_everything(effattn_command: Command, methods_file: Path) -> None:
    code, out, _ = effattn_command("replay", CASE, "mine.py:right")
    assert code == 0
    for word in ("case", "mine.py:right", "pass", "bit-equal", "z rms", "time", "again"):
        assert word in out


def test_replay_of_a_failure_fails_and_repeats_itself(effattn_command: Command, methods_file: Path) -> None:
    import shlex

    code, out, _ = effattn_command("replay", CASE, "mine.py:zeros")
    assert code == 1
    (again,) = (line for line in out.splitlines() if line.startswith("again"))
    program, *arguments = shlex.split(again.removeprefix("again"))
    assert program == "effattn"
    code, repeated, _ = effattn_command(*arguments)
    assert code == 1
    without_time = [
        [line for line in text.splitlines() if not line.startswith("time")] for text in (out, repeated)
    ]
    assert without_time[0] == without_time[1]


def test_replay_takes_files_and_ids(effattn_command: Command, methods_file: Path) -> None:
    code, _, _ = effattn_command("gate", "mine.py:zeros", "--laws", "none", "--dtype", "bf16")
    assert code == 1
    (run,) = (path for path in Path("effattn-runs").iterdir() if path.is_dir())
    files = sorted((run / "cases").glob("*.json"))
    assert files
    for given in (files[0], files[0].stem, files[0].stem[:8]):
        code, out, err = effattn_command("replay", given, "mine.py:zeros")
        assert code == 1, err
        assert files[0].read_text().strip() in out
    code, _, err = effattn_command("replay", "ffffffffffff", "mine.py:zeros", "--run", run)
    assert code == 2
    assert "ffffffffffff" in err


def test_replay_of_an_unsupported_case_is_no_pass(effattn_command: Command, methods_file: Path) -> None:
    code, out, _ = effattn_command("replay", CASE, "mine.py:nothing")
    assert code == 2
    assert "only head_dim 3" in out


# Where it prints to


def test_piped_output_is_plain_and_has_no_progress_bar(methods_file: Path) -> None:
    done = python(
        MAIN,
        "gate", "mine.py:right", "--laws", "none", "--dtype", "fp32", "--out", "run",
        TERM="xterm-256color",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    judged = done.stdout.splitlines()[2].split()[1]
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"effattn: judging \d+ cases: fp32", line)
    assert int(line.split()[2]) >= int(judged)
    assert "\x1b" not in done.stdout
    assert "\r" not in done.stdout
    assert all(line == line.rstrip() for line in done.stdout.splitlines())
    header = done.stdout.splitlines()[0]
    assert header.split()[:3] == ["dtype", "judged", "passed"]
    assert header.split()[-1] == "time", "a piped table is whole, on lines of its own"


def test_lines_say_how_far_it_is_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from effattn.case import Case
    from effattn.cli_progress import Lines
    from effattn.gate import Question
    from effattn.verdict import Outcome, Verdict

    cases = [Case(q_len=1, kv_len=1, head_dim=1, dtype=dtype) for dtype in ("fp16", "fp16", "fp16", "bf16")]
    outcomes = [Outcome.PASS, Outcome.CRASHED, Outcome.PASS, Outcome.PASS]

    def printed(every: float) -> list[str]:
        lines = Lines(every)
        lines.stage("finding fp16 cases for 2 laws")
        lines.begin([Question(cases[0]), *(Question(case, f"law {case.dtype}") for case in cases[1:])])
        for k, (case, outcome) in enumerate(zip(cases, outcomes, strict=True), 1):
            verdict = Verdict(case=case, outcome=outcome, method="m", message="", replay="")
            lines.judged(verdict, len(cases) - k)
        lines.stage("making failure 1 of 1 small")
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    begin = "effattn: judging 1 case and 2 laws on 3 cases: fp16, bf16"
    end = "effattn: 1 of 4 cases failed; making one of each kind small"
    assert printed(1e9) == [begin, end]
    finding, small = "effattn: finding fp16 cases for 2 laws", "effattn: making failure 1 of 1 small"
    counts = [f"effattn: {n} of 4 cases judged, {failed} failed" for n, failed in ((1, 0), (2, 1), (3, 1))]
    assert printed(0.0) == [finding, begin, *counts, end, small]


@pytest.mark.parametrize("columns", [60, 200])
def test_terminal_has_progress_and_lines_that_fit(methods_file: Path, columns: int) -> None:
    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "gate", "mine.py:right", "--laws", "values", "--dtype", "fp32", "--out", "run"],
        stdin=side, stdout=side, stderr=side,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "40"},
    )  # fmt: skip
    os.close(side)
    received = b""
    while True:
        try:
            block = os.read(main, 65536)
        except OSError:  # Linux answers so when the other side has been closed.
            break
        if not block:
            break
        received += block
    os.close(main)
    assert process.wait() == 0
    text = received.decode()
    assert "\x1b[" in text
    assert "judging" in text
    assert "passed all" in text
    from rich.text import Text

    shown = [Text.from_ansi(line.split("\r")[-1]).plain for line in text.replace("\r\n", "\n").split("\n")]
    table = [line for line in shown if line.lstrip().startswith(("dtype", "fp32"))]
    assert table
    assert max(map(len, table)) <= columns


def test_reader_that_goes_away_is_no_error() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, "values"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    complaint = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 141
    assert complaint == ""
