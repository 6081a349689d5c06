"""`effattn cpu -- PROGRAM`, and the pytest option: whole processes with device "cuda" on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import subprocess, sys
import torch
x = torch.ones(3, device="cuda")
assert x.is_cuda and torch.cuda.get_device_capability() == {capability}
print("argv", sys.argv[1:])
if "--child" in sys.argv:
    code = "import torch; print('child', torch.ones(1).cuda().is_cuda)"
    print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
sys.exit(7)
"""


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("effattn")), "cpu", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def test_a_script_its_arguments_and_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(capability=(8, 0)))
    done = run("--capability", "8.0", "--", "python", "script.py", "--flag", "a b", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stdout.strip() == "argv ['--flag', 'a b']"


def test_a_process_that_the_program_starts_inherits_the_device(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(capability=(9, 0)))
    done = run("--", "script.py", "--child", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert "child True" in done.stdout


def test_pytest_and_modules_run(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import torch\ndef test_on():\n    assert torch.ones(1, device='cuda').is_cuda\ndef test_off():\n    assert False\n"
    )
    done = run("--", "pytest", "-q", "-p", "no:cacheprovider", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 failed, 1 passed" in done.stdout
    again = run("--", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_on", cwd=tmp_path)
    assert again.returncode == 0
    assert "1 passed" in again.stdout


def test_the_option_of_pytest(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("import torch\nBEFORE = torch.cuda.is_available()\n")
    (tmp_path / "test_it.py").write_text(
        "import torch\ndef test_on(request):\n    assert torch.ones(1, device='cuda').is_cuda\n"
        "    assert request.config.pluginmanager.getplugin(str(request.config.rootpath / 'conftest.py')).BEFORE\n"
    )
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    with_option = subprocess.run([*pytest_, "--effattn-cpu"], cwd=tmp_path, capture_output=True, text=True)
    assert with_option.returncode == 0, with_option.stdout
    without = subprocess.run(pytest_, cwd=tmp_path, capture_output=True, text=True)
    assert without.returncode == 1, "without the option nothing is emulated"
    wrong = subprocess.run(
        [*pytest_, "--effattn-cpu", "--effattn-cpu-capability", "1.0"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 4
    assert "compute capability '1.0' is not known" in wrong.stderr


def test_the_plugin_does_not_import_torch() -> None:
    code = (
        "import sys, effattn.cpu.pytest_plugin; sys.exit('torch' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_sitecustomize_that_was_there_still_runs(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import builtins\nbuiltins.THERE = True\n")
    code = (
        "import sys, torch; print(THERE, torch.cuda.is_available(), any('autoload' in p for p in sys.path))"
    )
    done = subprocess.run(
        [str(Path(sys.executable).with_name("effattn")), "cpu", "--", "python", "-c", code],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stdout.split() == ["True", "True", "False"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "nothing to run; expected a program after --"),
        (("--",), "nothing to run; expected a program after --"),
        (("--", "no-such-program"), "the program 'no-such-program' was not found"),
        (("--", "./plain.txt"), "exists, but cannot be executed"),
        (("--", "-m"), "-m needs a module to run"),
        (("--", "--verbose", "x"), "found the option --verbose"),
        (("--capability", "9.9", "--", "python", "-c", "1"), "compute capability '9.9' is not known"),
        (("--autotune", "best", "--", "python", "-c", "1"), "autotune 'best' is not known"),
    ],
)
def test_what_cannot_be_started_is_said(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("no program")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("EFFATTN_DOT_MODEL", "hoper", "EFFATTN_DOT_MODEL: unknown dot model 'hoper'; there are ieee,"),
        ("EFFATTN_CPU_THREADS", "abc", "EFFATTN_CPU_THREADS is 'abc'; expected a whole number from 1"),
    ],
)
@pytest.mark.parametrize(
    "command",
    [
        ("cpu", "--", "python", "-c", "print('started')"),
        ("cpu", "--check", "bounds", "--", "python", "-c", "print('started')"),
        ("gate", "flash", "--dtype", "fp16"),
        ("replay", '{"schema":1,"q_len":3,"kv_len":5,"head_dim":40,"dtype":"fp32"}', "flash"),
    ],
    ids=["cpu", "checked", "gate", "replay"],
)
def test_a_wrong_setting_in_the_environment_is_said_before_anything_starts(
    command: tuple[str, ...], variable: str, value: str, words: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("effattn")), *command],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, variable: value},
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith(f"effattn: {words}")
    assert done.stdout == ""


def test_an_option_stands_before_the_environment(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("effattn")), "cpu", "--dot-model", "hopper", "--", "python", "-c", "print(1)"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "EFFATTN_DOT_MODEL": "hoper"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
