"""`pytest --effattn-cpu`: the tests of code written for a GPU, on this machine's cores.

The emulation (effattn.cpu.as_cuda) begins before conftest files and test modules are imported and lasts for the session.
Loading this plugin costs nothing until the option is given: torch is not imported here.
"""

from __future__ import annotations

import pytest

from effattn.cpu import compat
from effattn.errors import RequestError

_active = pytest.StashKey[bool]()


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


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    given = early_config.known_args_namespace
    if not given.effattn_cpu:
        return
    try:
        compat.activate(capability=given.effattn_cpu_capability, autotune=given.effattn_cpu_autotune)
    except RequestError as error:
        raise pytest.UsageError(str(error)) from error
    early_config.stash[_active] = True


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.stash.get(_active, False):
        return None
    return f"effattn: device cuda is served by the CPU, as compute capability {config.option.effattn_cpu_capability}"


def pytest_unconfigure(config: pytest.Config) -> None:
    if config.stash.get(_active, False):
        config.stash[_active] = False
        compat.deactivate()
