"""Triton's cache of compiled kernels, with one more check, and words for a folder that cannot be used.

Triton takes an entry whose file of metadata is damaged, by a full disk or a crash of the machine, for a kernel that is there,
and fails on reading it, in this run and in every later one. Here it counts as absent, and the kernel is compiled again.
(Damaged libraries: `effattn.cpu.toolchain.rebuild`.)
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from triton import knobs
from triton.runtime.cache import FileCacheManager

from effattn.cpu import toolchain


class CheckedCache(FileCacheManager):
    """Triton's file cache; a group with metadata that cannot be read is none.

    Raises RequestError with the folder where it cannot be made or written to: no space, a limit, read-only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__init__(*args, **kwargs)
        except OSError as error:
            raise toolchain.unusable_cache(knobs.cache.dir, error) from error

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """Write a file into the cache; its path."""
        try:
            return super().put(data, filename, binary)
        except OSError as error:
            raise toolchain.unusable_cache(os.path.dirname(self.cache_dir), error) from error

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Paths of the files of a compiled kernel by their names; None where there is none that can be used."""
        try:
            group = super().get_group(filename)
        except (AttributeError, TypeError, ValueError):
            return None  # not the object that Triton wrote, or, which 3.6 does not expect, no JSON at all
        if group is None or filename not in group:
            return group
        try:
            whole = isinstance(json.loads(Path(group[filename]).read_bytes()), dict)
        except (OSError, ValueError):
            whole = False
        return group if whole else None


def install() -> None:
    """Have Triton use it, unless the user chose a cache of their own (TRITON_CACHE_MANAGER)."""
    if knobs.cache.manager_class is None:
        knobs.cache.manager_class = CheckedCache
