"""Lets tox environments share one folder (tox finds this file by its name).

torch is large: a gigabyte on the CPU, several with CUDA. tox records the environment's name in the folder and
empties the folder when another environment comes along; the runner below leaves the name out of the record.
Everything else is compared as usual, so a changed dependency still rebuilds the folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tox.plugin import impl
from tox.tox_env.api import ToxEnv
from tox.tox_env.info import Info
from tox.tox_env.python.virtual_env.runner import VirtualEnvRunner
from tox.tox_env.register import ToxEnvRegister


class _Nameless(Info):
    """tox's record of a folder, without the name of the environment that made it."""

    @contextmanager
    def compare(self, value: Any, section: str, sub_section: str | None = None) -> Iterator[tuple[bool, Any]]:
        if section == ToxEnv.__name__ and isinstance(value, dict):
            value = {**value, "name": "shared"}
        with super().compare(value, section, sub_section) as compared:
            yield compared


class SharedRunner(VirtualEnvRunner):
    """A virtual environment whose folder belongs to several tox environments that need the same packages."""

    @staticmethod
    def id() -> str:
        return "shared"

    @property
    def cache(self) -> Info:
        return _Nameless(self.env_dir)


@impl
def tox_register_tox_env(register: ToxEnvRegister) -> None:
    register.add_run_env(SharedRunner)
