"""`pytest --effattn-cpu`: the tests of code written for a GPU, on this machine's cores. `pytest --effattn-check bounds`:
tests under the sanitizer of Triton kernels (effattn.cpu.checks).

The emulation (effattn.cpu.as_cuda) begins before conftest files and test modules are imported and lasts for the session.
Loading this plugin costs nothing until the option is given: torch is not imported here.
"""

from __future__ import annotations

import pytest

from effattn.cpu import compat, sanitizer
from effattn.errors import RequestError

_active = pytest.StashKey[bool]()
_checks = pytest.StashKey[sanitizer.Checks]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effattn", "Triton kernels on the CPU")
    group.addoption(
        "--effattn-cpu",
        action="store_true",
        help='serve device "cuda" by CPU tensors, and run Triton kernels on the CPU',
    )
    group.addoption(
        "--effattn-cpu-capability",
        default=compat.DEFAULT_CAPABILITY,
        metavar="X.Y",
        help=f"the compute capability that is declared (default {compat.DEFAULT_CAPABILITY})",
    )
    group.addoption(
        "--effattn-cpu-autotune",
        default="first",
        metavar="|".join(compat.AUTOTUNE),
        help="which configurations autotuners try (default first: the first that compiles)",
    )
    group.addoption(
        "--effattn-check",
        action="append",
        metavar="NAME",
        help="look at what Triton kernels do on the CPU: bounds, races, poison, order, traffic; repeat it or list them with "
        "commas. A launch with a finding raises effattn.cpu.Fault",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    given = early_config.known_args_namespace
    try:
        if given.effattn_cpu:
            compat.activate(capability=given.effattn_cpu_capability, autotune=given.effattn_cpu_autotune)
            early_config.stash[_active] = True
        if given.effattn_check:
            checks = sanitizer.Checks(*sanitizer.parse(",".join(given.effattn_check)))
            checks.begin()
            early_config.stash[_checks] = checks
    except RequestError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_report_header(config: pytest.Config) -> list[str]:
    lines = []
    if config.stash.get(_active, False):
        capability = config.option.effattn_cpu_capability
        lines.append(f"effattn: device cuda is served by the CPU, as compute capability {capability}")
    checks = config.stash.get(_checks, None)
    if checks is not None:
        lines.append(f"effattn: Triton kernels on the CPU are checked for {', '.join(checks.instruments)}")
    return lines


def pytest_sessionfinish(session: pytest.Session) -> None:
    checks = session.config.stash.get(_checks, None)
    if checks is None:
        return
    checks.end()
    # Also where the code under test has caught what a launch raised.
    if checks.report.findings and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    checks = config.stash.get(_checks, None)
    if checks is not None:
        terminalreporter.section("effattn")
        terminalreporter.write_line(checks.report.summary())


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.stash.get(_active, False):
        config.stash[_active] = False
        compat.deactivate()
