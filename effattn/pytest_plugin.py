"""pytest options of effattn, and a summary of what its laws judged.

    pytest --pyargs effattn.suite --effattn-method path/to/file.py:function

runs the whole suite of laws on a function, without a test file; `@effattn.parametrize_with_laws` makes it part of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest

from effattn.case import DTYPES

if TYPE_CHECKING:
    from effattn.laws import Tried

#: what `--effattn-dtype` takes besides the dtypes: tests that belong to none
NONE = "none"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the options say."""

    method: str | None = None
    profile: str = "smoke"
    device: str = "cpu"


_settings = Settings()
_tried: list[tuple[str, Tried]] = []


def settings() -> Settings:
    """The options of this run of pytest."""
    return _settings


def remember(method: str, tried: Tried) -> None:
    """Counts what a check judged, for the summary."""
    _tried.append((method, tried))


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options."""
    group = parser.getgroup("effattn", "attention kernels")
    group.addoption(
        "--effattn-dtype",
        action="append",
        choices=(*DTYPES, NONE),
        metavar="DTYPE",
        help=f"run the tests of this dtype only, with '{NONE}' those that belong to no dtype; repeatable",
    )
    group.addoption("--effattn-method", metavar="METHOD", help="the method that `effattn.suite` judges")
    group.addoption(
        "--effattn-profile",
        metavar="PROFILE",
        default="smoke",
        choices=("smoke", "ci"),
        help="how many cases: smoke or ci",
    )
    group.addoption(
        "--effattn-device",
        metavar="DEVICE",
        default="cpu",
        choices=("cpu", "cuda"),
        help="where methods run: cpu or cuda",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keeps the options, and names the markers of the dtypes."""
    global _settings
    _settings = Settings(
        method=config.getoption("--effattn-method"),
        profile=str(config.getoption("--effattn-profile")),
        device=str(config.getoption("--effattn-device")),
    )
    _tried.clear()
    for dtype in DTYPES:
        config.addinivalue_line("markers", f"{dtype}: belongs to this dtype (set from the test's parameters)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of the dtypes that were asked for."""
    wanted = config.getoption("--effattn-dtype")
    if not wanted:
        return
    kept, dropped = [], []
    for item in items:
        (kept if dtype_of(item) in wanted else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def dtype_of(item: pytest.Item) -> str:
    """The dtype that a test belongs to, by its parameters `dtype`, `case` or `check`; `NONE` if to none."""
    from effattn.case import Case

    callspec: Any = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    named = str(params.get("dtype")).removeprefix("torch.")
    named = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}.get(named, named)
    if isinstance(params.get("case"), Case):
        named = params["case"].dtype
    elif "check" in params:
        named = getattr(params["check"], "dtype", named)
    return named if named in DTYPES else NONE


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Puts what a check judged into the JUnit properties of its test."""
    callspec: Any = getattr(item, "callspec", None)
    check = None if callspec is None else callspec.params.get("check")
    tried = getattr(check, "tried", None)
    if call.when == "call" and tried is not None:
        item.user_properties.append(("effattn_law", tried.law))
        item.user_properties.append(("effattn_dtype", tried.dtype))
        item.user_properties.append(("effattn_judged", tried.judged))
    return (yield)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each method and dtype, and one for each reason why laws were not judged."""
    if not _tried:
        return
    from effattn.report import summary

    terminalreporter.section("effattn: laws")
    groups: dict[tuple[str, str], list[Tried]] = {}
    for method, tried in _tried:
        groups.setdefault((method, tried.dtype), []).append(tried)
    for (method, dtype), members in groups.items():
        judged = [one for one in members if one.judged]
        broken = sum(one.failure is not None for one in members)
        terminalreporter.line(
            f"{method} {dtype}: {len(judged)} laws judged on {sum(one.judged for one in judged)} cases, {broken} broken;"
            f" {len(members) - len(judged)} not judged"
        )
    for name in dict.fromkeys(method for method, _ in groups):
        verdicts = [replace(v, law=one.law) for method, one in _tried if method == name for v in one.verdicts]
        for note, cases in summary.notes(verdicts).items():
            terminalreporter.line(f"{name}, note: {note}, in {cases} {'case' if cases == 1 else 'cases'}")
        for group in summary.unjudged_laws(verdicts):
            terminalreporter.line(f"{name}, not judged, {group.reason}: {', '.join(group.names)}")
