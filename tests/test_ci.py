"""The action and the workflow for GitHub: what they name is there, and nothing of their inputs becomes shell."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
ACTION: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "actions" / "gate" / "action.yml").read_text())
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "gate.yml").read_text())


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


def test_actions_of_others_are_pinned_to_a_version() -> None:
    steps = [*ACTION["runs"]["steps"], *WORKFLOW["jobs"]["gate"]["steps"]]
    for step in steps:
        if "uses" in step and not step["uses"].startswith("./"):
            assert re.fullmatch(r"[\w/-]+@v\d+", step["uses"])
