"""Options, profiles and fixtures of all tests.

A test with a parameter `dtype` (or `case`, with a `Case`) belongs to that dtype; the others belong to none.
`--effattn-dtype` says which to run (`effattn.pytest_plugin`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Before torch is imported, as the command line does: threads that wait do not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import recording

from effattn.case import DTYPES, Case
from effattn.pytest_plugin import NONE, dtype_of

#: How many tests marked gpu were left out.
LEFT_OUT = pytest.StashKey[int]()

#: Test files that run kernels on the CPU backend: what each version of Triton is tested with. Those that use it for
#: something else, such as the accuracy of other kernels, say nothing new about a version.
BACKEND = (
    "test_cpu_",
    "test_compat.py",
    "test_compat_command.py",
    "test_compat_kernels.py",
    "test_kernels_flash.py",
    "test_kernels_options.py",
)

# No deadline: the first case of each shape compiles a kernel.
hypothesis.settings.register_profile(
    "pull-request", derandomize=True, deadline=None, max_examples=60, print_blob=True
)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("EFFATTN_HYPOTHESIS_PROFILE", "pull-request"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--effattn-browser",
        action="store_true",
        help="run the tests in tests/browser, which need Chromium; without it they are not collected",
    )


def pytest_configure(config: pytest.Config) -> None:
    for dtype in DTYPES:
        config.addinivalue_line("markers", f"{dtype}: belongs to this dtype (set from the parameter `dtype`)")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU; left out, which is said, where there is none")
    config.addinivalue_line("markers", "backend: runs kernels on the CPU backend (set from the file's name)")
    nightly = os.environ.get("EFFATTN_HYPOTHESIS_PROFILE") == "nightly"
    if nightly and getattr(config.option, "hypothesis_seed", None) is None:
        # Random, but repeatable: the header below shows the seed.
        config.option.hypothesis_seed = str(int.from_bytes(os.urandom(4), "big"))


def pytest_report_header(config: pytest.Config) -> str:
    seed = getattr(config.option, "hypothesis_seed", None)
    profile = os.environ.get("EFFATTN_HYPOTHESIS_PROFILE", "pull-request")
    dtypes = ", ".join(config.getoption("--effattn-dtype", None) or ["all"])
    return f"effattn: dtypes {dtypes}; hypothesis profile {profile}, seed {seed or 'derandomised'}"


def pytest_sessionstart() -> None:
    if recording.COVERAGE in os.environ:
        recording.watch_compilations()


def pytest_runtest_setup() -> None:
    recording.begin()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    outcome = yield
    if call.when == "call" and outcome.get_result().passed:
        recording.passed(item.path.name)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    output = getattr(session.config, "workeroutput", None)  # pytest-xdist's, in a process that it started
    if output is None:
        recording.write(all_passed=exitstatus == 0)
    else:
        output["effattn_recording"] = recording.found()
    asked_for = session.config.getoption("markexpr", "") == "gpu"
    if (
        exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        and asked_for
        and session.config.stash.get(LEFT_OUT, 0)
    ):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_testnodedown(node: Any) -> None:
    # A process that crashed has no output: its tests count as failed.
    recording.add(getattr(node, "workeroutput", {}).get("effattn_recording", recording.NOTHING))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.line(f"no CUDA GPU here: {count} tests marked gpu were not run")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name.startswith(BACKEND):
            item.add_marker("backend")
        if (dtype := dtype_of(item)) != NONE:
            item.add_marker(dtype)
    on_gpus = [item for item in items if item.get_closest_marker("gpu") is not None]
    if on_gpus:
        import torch

        if not torch.cuda.is_available():
            config.stash[LEFT_OUT] = len(on_gpus)
            config.hook.pytest_deselected(items=on_gpus)
            items[:] = [item for item in items if item.get_closest_marker("gpu") is None]


@pytest.fixture
def effattn_command(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: `code, stdout, stderr = effattn_command("gate", "flash")`."""
    from effattn.cli import main

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return code, captured.out, captured.err

    return run


def ids_of(cases: Sequence[Case]) -> list[str]:
    """Names of cases as test parameters."""
    return [case.describe() for case in cases]
