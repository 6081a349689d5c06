"""What the README and docs/ say is what happens: commands, transcripts, listings."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}


@pytest.fixture(scope="module")
def transcripts() -> ModuleType:
    """docs/update_transcripts.py, which writes what is compared here."""
    path = ROOT / "docs" / "update_transcripts.py"
    spec = importlib.util.spec_from_file_location("update_transcripts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def marked(name: str) -> str:
    """The one line of shell between `<!-- NAME -->` and `<!-- end -->`."""
    (block,) = re.findall(rf"<!-- {name} -->\n```sh\n(.*?)\n```\n<!-- end -->", README, re.DOTALL)
    assert "\n" not in block
    return block


def printed() -> list[tuple[str, str]]:
    """Each command of a transcript and what the README says that it prints."""
    found = re.findall(
        r"<!-- run: (.+?) -->\n```console\n\$ (.+?)\n(.*?)\n```\n<!-- end -->", README, re.DOTALL
    )
    assert all(marker == command for marker, command, _ in found)
    return [(command, output) for _, command, output in found]


def table(output: str) -> list[list[str]]:
    """The rows of the tables in an output, without the time, which is the last column."""
    rows = [
        re.split(r"\s{2,}", line.strip())
        for line in output.splitlines()
        if line.startswith(("dtype", "fp", "bf"))
    ]
    return [row[:-1] for row in rows]


def test_there_are_two_lines_and_each_is_one() -> None:
    main, test = marked("main command"), marked("test command")
    assert "effattn gate flash --profile smoke --out" in main
    assert test.endswith("tox")
    for line in (main, test):
        assert line.startswith("python3 -m venv .venv && .venv/bin/pip install -c constraints.txt")
        for path in re.findall(r"\.venv/bin/(\S+)", line):
            assert path in ("pip", "effattn", "tox")


def test_continuous_integration_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    sed = re.search(r"sed -n '(.+?)' README.md", script)
    assert sed is not None
    import subprocess

    shown = subprocess.run(
        ["sed", "-n", sed[1], "README.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == marked("test command")
    # What it fetches before, and where it reads what to fetch, are no test command.
    rest = [line for line in script.splitlines() if "fetch" not in line and not line.startswith("extras=")]
    assert len(rest) < len(script.splitlines())
    assert not re.search("tox|pytest", "\n".join(rest)), "the script must not have a test command of its own"


def test_main_command_prints_what_the_readme_shows(transcripts: ModuleType, tmp_path: Path) -> None:
    # The kernel's arithmetic is IEEE in a declared order, so its figures are the same on every machine.
    command = marked("main command").rpartition(".venv/bin/")[2]
    (shown,) = (output for given, output in printed() if given == command)
    got = transcripts.output_of(command, tmp_path)
    assert table(got) == table(shown)
    assert got.splitlines()[-2:] == shown.splitlines()[-2:]
    assert (tmp_path / "effattn-runs" / "flash" / "summary.md").is_file()


@pytest.mark.parametrize(("command", "shown"), [pair for pair in printed() if "examples" in pair[0]])
def test_example_does_what_the_readme_shows(
    transcripts: ModuleType, tmp_path: Path, command: str, shown: str
) -> None:
    # torch sums in another order on another processor, so counts and words are compared, not figures.
    got = transcripts.output_of(command, tmp_path)
    assert [row[:3] for row in table(got)[:1]] == [row[:3] for row in table(shown)[:1]]
    sentence = {True: "passed all", False: "failed"}["passed all" in shown]
    assert sentence in got
    assert [line.split(" in ")[0] for line in got.splitlines() if re.match(r"(fp|bf)\d\d: ", line)] == [
        line.split(" in ")[0] for line in shown.splitlines() if re.match(r"(fp|bf)\d\d: ", line)
    ]


def test_the_usual_rule_lets_the_rounded_example_pass() -> None:
    # FlashAttention's own tests: twice the error of PyTorch in the low precision, against float32.
    import torch

    from effattn import methods
    from effattn.case import Case

    rounded = methods.get(f"{ROOT / 'docs/examples/my_attention_rounded.py'}:attention")
    for seed in range(5):
        case = Case(heads=4, q_len=128, kv_len=128, head_dim=64, dtype="fp16", seed=seed)
        q, k, v = inputs = case.tensors()
        exact = (q.float() @ k.float().mT * case.softmax_scale).softmax(-1) @ v.float()
        low = (q @ k.mT * case.softmax_scale).softmax(-1) @ v
        error = (rounded(case, inputs).out.float() - exact).abs().max()
        assert error <= 2 * (low.float() - exact).abs().max()
        assert torch.isfinite(error)


def test_transcripts_cover_the_main_command_a_pass_and_a_failure() -> None:
    outputs = [output for _, output in printed()]
    assert len(outputs) == 3
    assert sum("passed all" in output for output in outputs) == 2
    assert sum(" failed " in output.splitlines()[-2] for output in outputs) == 1


@pytest.mark.parametrize("name", DOCUMENTS)
def test_listings_are_the_files(transcripts: ModuleType, name: str) -> None:
    text = DOCUMENTS[name]
    kept = dict(re.findall(r"<!-- run: (.+?) -->\n(.*?)<!-- end -->", text, re.DOTALL))

    def as_it_stands(command: str) -> str:
        return kept[command].removeprefix(f"```console\n$ {command}\n").removesuffix("\n```\n")

    assert transcripts.rewritten(text, as_it_stands) == text


def test_example_of_the_kernels_prints_what_its_page_shows() -> None:
    done = subprocess.run(
        [sys.executable, "docs/examples/use_kernels.py"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"It prints\n\n```console\n{done.stdout}```" in DOCUMENTS["docs/flash-attention.md"]


def test_example_is_short_and_complete() -> None:
    lines = (ROOT / "docs" / "examples" / "my_attention.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 20
    assert lines[0] == "import torch"


def options_of(command: click.Command) -> set[str]:
    """The options of a command, and of the commands inside it."""
    own = {o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)}
    inner = command.commands.values() if isinstance(command, click.Group) else ()
    return own.union(*map(options_of, inner))


#: pages of figures and of what they rest on
WITHOUT_COMMANDS = {f"docs/{page}.md" for page in ("cpu-coverage", "cpu-exactness", "cpu-speed", "criteria")}
#: what the plugins add to pytest, as their sources name it
PYTEST_OPTIONS = {
    option
    for path in ("effattn/pytest_plugin.py", "effattn/cpu/pytest_plugin.py")
    for option in re.findall(r'"(--effattn-[a-z-]+)"', (ROOT / path).read_text(encoding="utf-8"))
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_and_option_exists(name: str) -> None:
    from effattn.cli import cli

    text = re.sub(r"\\\n", " ", DOCUMENTS[name])
    lines = re.findall(r"(?:^|^ {4}|`|bin/|\$ )effattn ([a-z]+[^`\n]*)", text, re.MULTILINE)
    assert bool(lines) == (name not in WITHOUT_COMMANDS)
    for line in lines:
        command, *rest = line.split(" -- ")[0].split()
        assert command in cli.commands, line
        options = options_of(cli.commands[command])
        for given in re.findall(r"--[a-z-]+", " ".join(rest)):
            assert given in options | {"--help"}, line
    for option in re.findall(r"`(--[a-z-]+)", text):
        assert option in options_of(cli) | {"--no-deps"} | PYTEST_OPTIONS, option


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    text = re.sub(r"```.*?```", "", DOCUMENTS[name], flags=re.DOTALL)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)  # code, where x[i](...) is a launch
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / name).parent / target).exists(), target


def test_shell_lines_are_shell() -> None:
    for line in (marked("main command"), marked("test command")):
        assert shlex.split(line)


def test_every_command_is_in_the_readme() -> None:
    from effattn.cli import cli

    assert isinstance(cli, click.Group)
    for command in cli.commands:
        assert f"effattn {command}" in README
