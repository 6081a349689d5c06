"""Ctrl-C while a kernel runs: the launch ends, the process does not, and the next launch is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# A kernel that says that it runs, and never ends. The signal is sent when it has said so.
KERNEL = """
import signal, sys, threading
import torch, triton, triton.language as tl
import effattn.cpu

@triton.jit
def endless(flag, o):
    if tl.program_id(0) == 0:
        tl.device_print("running")
    tl.store(o, -1)
    while tl.load(flag) == 0:
        tl.store(o, -1)

@triton.jit
def long(o, n):
    if tl.program_id(0) == 0:
        tl.device_print("running")
    for k in range(n):
        tl.store(o, k)

@triton.jit
def double(x, o, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(o + i, tl.load(x + i) * 2)

flag, o = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
forever = 2**31 - 1

def works():
    x = torch.arange(64.0 * 64)
    result = torch.zeros_like(x)
    double[(64,)](x, result, N=64)
    assert torch.equal(result, x * 2)

works()
signal.signal(signal.SIGINT, signal.default_int_handler)
"""


def start(folder: Path, code: str, threads: int) -> subprocess.Popen[str]:
    path = folder / "interrupted.py"
    path.write_text(KERNEL + code)
    return subprocess.Popen(
        [sys.executable, str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "EFFATTN_CPU_THREADS": str(threads)},
    )


def interrupt(process: subprocess.Popen[str], times: int = 1, by: signal.Signals = signal.SIGINT) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert "running" in line, line or (process.stderr and process.stderr.read())
    for _ in range(times):
        process.send_signal(by)


def rest(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What is still to come. (`communicate` would lose what `readline` has read ahead.)"""
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        return process.stdout.read(), process.stderr.read()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "launch", ["endless[(5,)](flag, o)", "long[(1000000,)](o, forever)"], ids=["while", "for"]
)
def test_ctrl_c_ends_a_launch_that_does_not_end_by_itself(launch: str, threads: int, tmp_path: Path) -> None:
    process = start(
        tmp_path,
        f"""
for _ in range(2):
    try:
        {launch}
    except KeyboardInterrupt:
        works()
        print("ended", flush=True)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
""",
        threads,
    )
    for _ in range(2):
        interrupt(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ended\n", rest(process)
    out, error = rest(process)
    assert (process.returncode, out) == (0, ""), error


def test_ctrl_c_twice_does_not_crash(tmp_path: Path) -> None:
    process = start(tmp_path, "endless[(5,)](flag, o)\n", threads=2)
    interrupt(process, times=2)
    _, error = rest(process)
    # Python's own way to end at Ctrl-C.
    assert process.returncode in (1, 130, -signal.SIGINT), error
    assert "KeyboardInterrupt" in error


def test_a_handler_that_does_not_raise_is_called_and_an_incomplete_grid_is_still_an_error(
    tmp_path: Path,
) -> None:
    process = start(
        tmp_path,
        """
calls = []
signal.signal(signal.SIGINT, lambda number, frame: calls.append(number))
try:
    endless[(5,)](flag, o)
except KeyboardInterrupt as error:
    print(calls == [signal.SIGINT], error)
works()
""",
        threads=1,
    )
    interrupt(process)
    out, error = rest(process)
    assert out == "True the launch of endless ended before all its programs were done\n", error


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        """
signal.signal(signal.SIGINT, signal.SIG_IGN)
threading.Thread(target=lambda: (sys.stdin.read(), flag.fill_(1)), daemon=True).start()
long[(1,)](o, 3)
signal.raise_signal(signal.SIGINT)
works()
print(o.item())
""",
        threads=1,
    )
    interrupt(process)
    out, error = rest(process)
    assert (process.returncode, out) == (0, "2\n"), error


def test_a_launch_in_another_thread_is_waited_for_and_can_be_given_up(tmp_path: Path) -> None:
    """The main thread's launch waits for its turn behind one that never ends; Ctrl-C ends the waiting.

    A signal that comes before the main thread has begun its own launch is answered by a line, and sent again.
    """
    process = start(
        tmp_path,
        """
import os
def handler(number, frame):
    while frame is not None:
        if frame.f_code.co_filename == effattn.cpu.launch.__file__:
            raise KeyboardInterrupt
        frame = frame.f_back
    os.write(1, b"running, but not yet waiting\\n")  # print cannot be interrupted by itself
long[(1,)](torch.zeros_like(o), 3)  # compiled beforehand
signal.signal(signal.SIGINT, handler)
thread = threading.Thread(target=lambda: endless[(5,)](flag, o), daemon=True)
thread.start()
while o.item() != -1:
    pass
try:
    long[(100000,)](torch.zeros_like(o), forever)
except KeyboardInterrupt:
    print("given up", flush=True)
    flag.fill_(1)
    os._exit(0)
""",
        threads=2,
    )
    assert process.stdout is not None
    assert "running" in process.stdout.readline()
    interrupt(process)
    while (line := process.stdout.readline()) == "running, but not yet waiting\n":
        process.send_signal(signal.SIGINT)
    _, error = rest(process)
    assert line == "given up\n", error


CHECKED = """
import os, signal, sys
import torch, triton, triton.language as tl

@triton.jit
def beyond(flag, x, o, n):
    if tl.program_id(0) == 0:
        tl.store(o, tl.load(x + n))
    if tl.program_id(0) == 1:
        tl.device_print("running")
        while tl.load(flag) == 0:
            tl.store(o, -1)

signal.signal(signal.SIGINT, signal.default_int_handler)
flag, o = (torch.zeros(1, dtype=torch.int32, device="cuda") for _ in range(2))
beyond.warmup(flag, flag, o, 1, grid=(2,))
try:
    beyond[(2,)](flag, flag, o, 1)
except BaseException as error:
    os.write(1, f"raised {type(error).__name__}\\n".encode())
    raise
"""


def test_an_interrupt_of_a_checked_program_is_passed_on_and_what_was_found_by_then_is_printed(
    tmp_path: Path,
) -> None:
    (tmp_path / "checked.py").write_text(CHECKED)
    # Signals to the command alone, which waits for the program: as a script or a test runner sends them.
    command = "import signal; from effattn.cli import main; signal.signal(signal.SIGINT, signal.default_int_handler); main()"
    options = ["cpu", "--check", "bounds,races", "--", "checked.py"]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    interrupt(process)
    out, error = rest(process)
    assert out == "raised KeyboardInterrupt\n", error
    assert process.returncode == -signal.SIGINT
    assert "bounds: kernel beyond, checked.py:8, program (0, 0, 0): load of element 1 of x" in error
    assert error.endswith("checked bounds, races in 1 launch: 1 finding\n")


def test_a_checked_program_ends_where_its_command_is_told_to(tmp_path: Path) -> None:
    (tmp_path / "waits.py").write_text(
        "import os, sys; os.write(1, b'running\\n'); sys.stdin.read(); os.write(1, b'by itself')"
    )
    process = subprocess.Popen(
        [str(Path(sys.executable).with_name("effattn")), *["cpu", "--check", "bounds", "--", "waits.py"]],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    interrupt(process, by=signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    assert process.stdin is not None
    process.stdin.close()  # a program that is still there says so
    assert rest(process)[0] == ""
