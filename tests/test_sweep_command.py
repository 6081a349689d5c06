"""What `effattn sweep` says: how far it is, how many cases, why nothing was judged, and identities that can be copied."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from effattn import cli_progress
from effattn.errors import RequestError
from effattn.report import terminal
from effattn.run import spec, store, sweep
from effattn.run.isolation import IsolatedExecutor

Command = Callable[..., tuple[int, str, str]]

METHODS = """
import effattn


def right(q, k, v):
    scores = q.double() @ k.double().transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores.softmax(-1) @ v.double()).to(q.dtype)


def refuses(q, k, v):
    raise effattn.NotSupported(f"fewer than {q.shape[2] + 1} queries\\nin one call")


def waits(q, k, v):
    open("told").read(1)
    return right(q, k, v)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(METHODS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, methods: str, seeds: str) -> None:
    (folder / "s.toml").write_text(
        f"methods = [{methods}]\ndtypes = ['fp32']\nseeds = {seeds}\n"
        "shapes = [{ q_len = 3, kv_len = 5, head_dim = 8 }]\n"
    )


def lines(told: str) -> list[str]:
    return [line.rstrip() for line in told.splitlines()]


def test_cases_are_counted_in_all_before_and_now(effattn_command: Command, folder: Path) -> None:
    write(folder, "'mine.py:right'", "[0]")
    code, out, err = effattn_command("sweep", "s.toml", "--out", "run", "--jobs", "1")
    assert (code, lines(err)) == (0, ["effattn: judging 1 case"])
    assert "1 case." in lines(out)
    code, out, err = effattn_command("sweep", "s.toml", "--out", "run", "--jobs", "1")
    assert (code, err) == (0, "")
    assert "1 case: 1 recorded before, 0 now." in lines(out)

    write(folder, "'mine.py:right'", "[0, 1, 2, 3, 4, 5]")
    code, out, _ = effattn_command("sweep", "s.toml", "--out", "six", "--jobs", "1")
    assert "6 cases." in lines(out)
    (file,) = (folder / "six").glob("verdicts*.jsonl")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    code, out, err = effattn_command("sweep", "s.toml", "--out", "six", "--jobs", "1")
    assert (code, lines(err)) == (0, ["effattn: judging 6 cases, of which 4 are recorded"])
    assert "6 cases: 4 recorded before, 2 now." in lines(out)


def test_sweep_in_which_nothing_was_judged_says_so_and_why(effattn_command: Command, folder: Path) -> None:
    write(folder, "'mine.py:refuses'", "[0, 1, 2]")
    code, out, _ = effattn_command("sweep", "s.toml", "--out", "run", "--jobs", "1")
    assert code == 2
    assert "not supported, 3, the first: fewer than 4 queries in one call" in lines(out)
    assert lines(out)[-1] == "Nothing was judged: that is not a pass."
    write(folder, "'mine.py:refuses', 'mine.py:right'", "[0]")
    code, out, _ = effattn_command("sweep", "s.toml", "--out", "both", "--jobs", "1")
    assert code == 0
    assert "not supported, 1: fewer than 4 queries in one call" in lines(out)
    assert "Nothing was judged" not in out
    write(folder, "'mine.py:right'", "[0]")
    _, out, _ = effattn_command("sweep", "s.toml", "--out", "right", "--jobs", "1")
    assert "not supported," not in out


def test_methods_that_were_edited_are_named_in_the_plural(folder: Path) -> None:
    (folder / "other.py").write_text(METHODS)
    write(folder, "'mine.py:right', 'other.py:right'", "[0]")
    wanted = spec.load(folder / "s.toml")
    with IsolatedExecutor(1) as executor:
        with sweep.Sweep(folder / "run", wanted) as taken:
            taken.run(executor, parallel=1)
        for name in ("mine.py", "other.py"):
            (folder / name).write_text(f"{METHODS}\nx = 1\n")
        with (
            sweep.Sweep(folder / "run", wanted) as taken,
            pytest.raises(
                RequestError, match=r"^'mine.py:right' and 'other.py:right' were edited since their verdicts"
            ),
        ):
            taken.run(executor, parallel=1)


def test_lines_say_how_far_a_sweep_is_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(every: float, *steps: tuple[int, int]) -> list[str]:
        count = cli_progress.Count(every)
        for done, total in steps:
            count.done(done, total)
        out, err = capsys.readouterr()
        assert out == ""
        return err.splitlines()

    begin = "effattn: judging 4,320 cases, of which 1,682 are recorded"
    steps = (1682, 4320), (1700, 4320), (1700, 4320), (4320, 4320)
    assert printed(1e9, *steps) == [begin]
    assert printed(0.0, *steps) == [begin, *["effattn: 1,700 of 4,320 cases judged"] * 2]
    assert printed(0.0, (0, 1), (1, 1)) == ["effattn: judging 1 case"]
    assert printed(0.0, (6, 6)) == []


def test_progress_is_told_while_a_case_takes_long(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "TELL_AGAIN", 0.1)
    write(folder, "'mine.py:waits'", "[0]")
    os.mkfifo("told")
    pipe = os.open("told", os.O_RDWR)
    told: list[tuple[int, int]] = []

    def tell(*now: int) -> None:
        told.append((now[0], now[1]))
        if len(told) == 4:  # not before, so whoever tells at the end of a case alone waits for ever
            os.write(pipe, b".")

    with IsolatedExecutor(1) as executor, sweep.Sweep(folder / "run", spec.load(folder / "s.toml")) as taken:
        try:
            taken.run(executor, parallel=1, progress=tell)
        except BaseException:
            os.write(pipe, b".")  # else the case, and so this test, would go on until the time limit
            raise
    os.close(pipe)
    assert told[0] == (0, 1)
    assert told[-1] == (1, 1)
    assert told[:4] == [(0, 1)] * 4


@pytest.mark.parametrize("width", [80, 60])
def test_identities_are_not_wrapped_on_a_narrow_terminal(width: int) -> None:
    """Everything else may be; a text that only looks a little like an identity is."""
    names = [
        "method",
        "dtype",
        "judged",
        "passed",
        "failed",
        "not supported",
        "not judged",
        "error/bound",
        "worst case",
    ]
    row = [
        "my_kernels/attention.py:attention",
        "fp16",
        "4320",
        "4000",
        "320 inaccurate",
        "12",
        "0",
        "1.3e+05",
    ]
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, color_system=None)
    terminal.print_plain(console, names, [[*row, "c36e1bcae91a"], [*row, "0123456789ab"], [*row, ""]])
    told = out.getvalue()
    assert "c36e1bcae91a" in told
    assert "0123456789ab" in told
    assert "my_kernels/attention.py:attention" not in told
    assert max(map(len, told.splitlines())) <= width
    # The check can fail: of a column that has anything else, too, every cell is wrapped.
    out.truncate(0)
    terminal.print_plain(console, names, [[*row, "c36e1bcae91a"], [*row, "no identity of a case"]])
    assert "c36e1bcae91a" not in out.getvalue()


def test_show_counts_a_gate_as_the_gate_did(effattn_command: Command, folder: Path) -> None:
    code, out, err = effattn_command(
        "gate", "mine.py:right", "--laws", "values", "--dtype", "fp32", "--out", "run"
    )
    assert code in (0, 1), err
    header, row = next(
        (a.split(), b) for a, b in zip(lines(out), lines(out)[2:], strict=False) if a.startswith("dtype")
    )
    judged = row.split()[header.index("judged")]
    laws = next(line for line in lines(out) if line.startswith("laws fp32: "))
    verdicts = list(store.read_verdicts(folder / "run"))
    assert int(judged) < len(verdicts), "laws are tried, too"
    code, shown, err = effattn_command("runs", "show", "run")
    assert code == 0, err
    again = next(line for line in lines(shown) if re.match(r"mine\.py:right +fp32", line))
    assert again.split()[2:4] == row.split()[1:3]
    assert laws in lines(shown)


def test_every_option_is_in_the_synopsis_of_the_documentation() -> None:
    from effattn.cli_sweep import sweep as command

    page = (Path(__file__).parent.parent / "docs" / "sweep.md").read_text()
    synopsis = page.split("\n\n")[1]
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
    assert options - {"--help"} == set(re.findall(r"--[a-z-]+", synopsis))
