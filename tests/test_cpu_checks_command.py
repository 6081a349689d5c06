"""`effattn cpu --check` and `pytest --effattn-check`: whole processes under the sanitizer."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

KERNEL = """
import sys
import torch, triton, triton.language as tl

@triton.jit
def shift(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x, mask=at < n)

def launch(device, n):
    x, y = torch.ones(100, device=device), torch.zeros(100, device=device)
    shift[(2,)](x, y, n, BLOCK=64)
    return y
"""

SCRIPT = (
    KERNEL
    + """
try:
    launch("cuda", int(sys.argv[1]))
except Exception as error:
    print("caught", type(error).__name__)
if len(sys.argv) > 2:
    import subprocess
    sys.exit(subprocess.run([sys.executable, __file__, sys.argv[2]]).returncode)
"""
)

TESTS = (
    KERNEL
    + """
def test_right():
    assert launch("cpu", 100).sum() == 100

def test_that_swallows():
    try:
        launch("cpu", WRONG)
    except Exception:
        pass
"""
)


def effattn_cpu(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name("effattn"))
    return subprocess.run([program, "cpu", *arguments], capture_output=True, text=True, cwd=cwd)


def test_a_right_program_keeps_its_exit_code_and_the_traffic_is_printed(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = effattn_cpu("--check", "bounds,traffic", "--", "script.py", "100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "checked bounds, traffic in 1 launch: nothing found" in done.stderr
    assert any(line.split()[:4] == ["shift", "x_ptr", "400", "B"] for line in done.stderr.splitlines())


def test_a_finding_that_the_program_swallows_still_makes_the_exit_code_1(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    # The child process finds the same; it is one finding.
    done = effattn_cpu("--check", "bounds", "--check", "races", "--", "script.py", "101", "101", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stdout.split() == ["caught", "Fault", "caught", "Fault"]
    assert "bounds: kernel shift, script.py:8, program (1, 0, 0): load of element 100 of x_ptr" in done.stderr
    assert "checked bounds, races in 2 launches: 1 finding" in done.stderr


def test_what_a_traceback_has_told_is_only_counted(tmp_path: Path):
    swallowed = "x = torch.ones(90, device='cuda')\ntry:\n    shift[(2,)](x, x, 91, BLOCK=64)\nexcept Exception:\n    pass\n"
    for before, count in (("", "1 finding, told above"), (swallowed, "2 findings, 1 told above")):
        (tmp_path / "script.py").write_text(f"{KERNEL}\n{before}launch('cuda', 101)\n")
        done = effattn_cpu("--check", "bounds", "--", "script.py", cwd=tmp_path)
        assert done.returncode == 1
        told = "bounds: kernel shift, script.py:8, program (1, 0, 0): load of element 100 of x_ptr"
        traceback, _, summary = done.stderr.partition("effattn.cpu.sanitizer.Fault: ")
        assert "Traceback (most recent call last)" in traceback
        assert summary.startswith(told)
        assert summary.count(told) == 1
        assert summary.count("load of element 90 of x_ptr") == bool(before)
        assert summary.endswith(
            f"checked bounds in {1 + bool(before)} launch{'es' if before else ''}: {count}\n"
        )


@pytest.mark.parametrize("ending", ["os._exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_process_that_ends_at_once_is_counted(ending: str, tmp_path: Path):
    (tmp_path / "script.py").write_text(f"{KERNEL}\nimport os, signal\nlaunch('cuda', 100)\n{ending}\n")
    done = effattn_cpu("--check", "bounds,traffic", "--", "script.py", cwd=tmp_path)
    assert done.returncode == (7 if "exit" in ending else 128 + 9), done.stderr
    assert "checked bounds, traffic in 1 launch: nothing found" in done.stderr
    assert any(line.split()[:4] == ["shift", "x_ptr", "400", "B"] for line in done.stderr.splitlines())


WORKERS = (
    KERNEL
    + """
import multiprocessing

def unwritten(n):
    y = torch.empty(100, device="cuda")
    shift[(2,)](torch.ones(100, device="cuda"), y, n, BLOCK=64)
    global kept
    kept = y

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    workers = [context.Process(target=unwritten, args=(n,)) for n in (100, 90)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
"""
)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_of_multiprocessing_say_what_they_find_when_they_end(method: str, tmp_path: Path):
    (tmp_path / "workers.py").write_text(WORKERS)
    done = effattn_cpu("--check", "poison,traffic", "--", "workers.py", method, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "checked poison, traffic in 2 launches: 1 finding" in done.stderr
    assert "element (90,) of y_ptr, of shape (100,), was never written" in done.stderr
    assert any(line.split()[:4] == ["shift", "x_ptr", "760", "B"] for line in done.stderr.splitlines())


@pytest.mark.parametrize("option", [["--check", "bonds"], ["--check", ""]])
def test_unknown_checks_are_a_wrong_request(option: list[str], tmp_path: Path):
    done = effattn_cpu(*option, "--", "python", "-c", "pass", cwd=tmp_path)
    assert done.returncode == 2
    assert "expected some of bounds, races, poison, order, traffic" in done.stderr


@pytest.mark.parametrize(("n", "code", "words"), [(100, 0, "nothing found"), (101, 1, "1 finding")])
def test_the_option_of_pytest(n: int, code: int, words: str, tmp_path: Path):
    (tmp_path / "test_it.py").write_text(TESTS.replace("WRONG", str(n)))
    given = ["-q", "-p", "no:cacheprovider", "--effattn-check", "bounds,races", "test_it.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *given], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout
    assert f"checked bounds, races in 2 launches: {words}" in done.stdout
    assert "2 passed" in done.stdout


ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "sanitizer.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"<!-- run: (.+?) -->\n```console\n\$ .+?\n(.*?)\n```\n<!-- end -->", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "shown"), SHOWN)
def test_the_page_shows_what_is_printed(command: str, shown: str, tmp_path: Path):
    spec = importlib.util.spec_from_file_location(
        "update_transcripts", ROOT / "docs" / "update_transcripts.py"
    )
    assert spec is not None
    assert spec.loader is not None
    transcripts = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(transcripts)

    def words(text: str) -> list[str]:
        """The lines without figures that another processor may round otherwise, and without times."""
        lines = [line.rstrip() for line in text.splitlines() if not line.startswith("time ")]
        return [re.sub(r"-?\d+\.\d+(e[+-]\d+)?", "#", line) for line in lines]

    assert words(transcripts.output_of(command, tmp_path).rstrip()) == words(shown)


def test_the_page_has_a_program_and_a_verdict():
    assert [command.split()[1] for command, _ in SHOWN] == ["cpu", "replay"]
    for instrument in ("bounds", "races", "poison", "order"):
        assert f"\n{instrument}: kernel " in SHOWN[0][1]
