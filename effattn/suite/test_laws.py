"""Every law, in every dtype, for the method that `--effattn-method` names."""

from __future__ import annotations

from typing import Any

import pytest

from effattn import laws


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each law and dtype."""
    method = metafunc.config.getoption("--effattn-method")
    if method is None:
        raise pytest.UsageError(
            "effattn.suite: which method? Give --effattn-method path/to/file.py:function, or a name that"
            " `effattn methods` lists."
        )
    mark: Any = laws.parametrize_with_laws(method)
    metafunc.parametrize(*mark.mark.args)


def test_law(check: laws.Check) -> None:
    """The law holds."""
    check()
