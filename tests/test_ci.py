"""The action and the workflow for GitHub: what they name is there, and nothing of their inputs becomes shell."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "actions" / "gate" / "action.yml").read_text())
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "gate.yml").read_text())


#: The command line, by the interpreter that runs the tests.
MAIN = "import sys; from effattn.cli import main; sys.exit(main(sys.argv[1:]))"


def scripts() -> list[dict[str, Any]]:
    return [step for step in ACTION["runs"]["steps"] if "run" in step]


def test_workflow_gives_what_the_action_takes() -> None:
    (step,) = (s for s in WORKFLOW["jobs"]["gate"]["steps"] if "actions/gate" in s["uses"])
    assert (ROOT / step["uses"] / "action.yml").is_file()
    assert set(step["with"]) <= set(ACTION["inputs"])
    needed = {name for name, given in ACTION["inputs"].items() if given.get("required")}
    assert needed <= set(step["with"])


def test_inputs_never_become_shell() -> None:
    assert scripts()
    for step in scripts():
        assert "${{" not in step["run"], "an input in a script is run as one"
        for name in re.findall(r"\$\{\{ inputs\.([a-z-]+) \}\}", str(step.get("env", {}))):
            assert name in ACTION["inputs"]


def test_scripts_are_shell_and_their_options_exist() -> None:
    from effattn.cli import cli

    called = []
    for step in scripts():
        assert subprocess.run(["bash", "-n", "-c", step["run"]], check=False).returncode == 0
        for command, rest in re.findall(
            r"effattn (gate|report) ((?:[^\n]|\\\n)*)", step["run"].replace("\\\n", " ")
        ):
            called.append(command)
            options = {o for p in cli.commands[command].params for o in (*p.opts, *p.secondary_opts)}
            assert set(re.findall(r"--[a-z-]+", rest)) <= options
    assert called == ["gate", "report"]


def gate_step(tmp_path: Path, method: str) -> tuple[int, str]:
    """Run the script that gates as a runner would, in a folder; its exit code and what it told the workflow."""
    (step,) = (step for step in ACTION["runs"]["steps"] if step.get("id") == "gate")
    program = tmp_path / "bin" / "effattn"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(MAIN)} "$@"\n')
    program.chmod(0o755)
    told = tmp_path / "told"
    told.write_text("")
    environment = {
        **os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "GITHUB_OUTPUT": str(told),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "step.md"), "PYTHONPATH": str(ROOT), "METHOD": method, "PROFILE": "smoke",
        "DTYPES": "fp32", "ARGUMENTS": "--values constant",
    }  # fmt: skip
    work = tmp_path / "work"
    work.mkdir(exist_ok=True)
    code = subprocess.run(
        ["bash", "-e", "-o", "pipefail", "-c", step["run"]], cwd=work, env=environment, check=False
    ).returncode
    return code, told.read_text()


def test_a_run_that_was_left_is_not_reported_as_this_one(tmp_path: Path) -> None:
    code, told = gate_step(tmp_path, "torch")
    run = tmp_path / "work" / "effattn-gate"
    assert (code, told) == (0, "report=effattn-gate/report.html\n")
    assert (run / "summary.md").read_text().startswith("# effattn gate: torch")
    assert (run / "report.md").read_text().startswith("# effattn: torch")
    assert (run / "junit.xml").is_file()
    (tmp_path / "step.md").unlink()
    assert gate_step(tmp_path, "nowhere.py:f") == (2, "")
    assert not run.exists()
    assert not (tmp_path / "step.md").exists()
    run.mkdir()
    (run / "provenance.json").write_text("of somebody else")
    assert gate_step(tmp_path, "torch") == (2, "")
    assert (run / "provenance.json").read_text() == "of somebody else"


def test_commands_of_the_page_work_one_after_the_other(
    effattn_command: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/ci.md has them, on a method that is here and a few cases."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "ci.md").read_text()
    commands = re.findall(r"^    effattn ([^#\n]*)", text, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["gate", "report", "gate", "report"]
    for command in commands:
        words = shlex.split(command)
        if words[0] == "gate":
            words[1] = "torch"
            if "--profile" in words:
                del words[words.index("--profile") : words.index("--profile") + 2]
            words += ["--profile", "smoke", "--dtype", "fp32", "--values", "constant"]
        code, _, err = effattn_command(*words)
        assert code == 0, err
        if not Path("main-run").exists():
            shutil.copytree("gate", "main-run")
            Path("runs").mkdir()
            shutil.copytree("gate", "runs/first")
    assert Path("gate/summary.md").read_text().startswith("# effattn gate: torch")


def test_actions_of_others_are_pinned_to_a_version() -> None:
    steps = [*ACTION["runs"]["steps"], *WORKFLOW["jobs"]["gate"]["steps"]]
    for step in steps:
        if "uses" in step and not step["uses"].startswith("./"):
            assert re.fullmatch(r"[\w/-]+@v\d+", step["uses"])
