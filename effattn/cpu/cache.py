"""Triton's cache of compiled kernels, with one more check.

Triton takes an entry whose file of metadata is damaged, by a full disk or a crash of the machine, for a kernel that is there,
and fails on reading it, in this run and in every later one. Here it counts as absent, and the kernel is compiled again.
(Damaged libraries: `effattn.cpu.toolchain.rebuild`.)
"""

from __future__ import annotations

import json
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager


class CheckedCache(FileCacheManager):
    """Triton's file cache; a group with metadata that cannot be read is none."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Paths of the files of a compiled kernel by their names; None where there is none that can be used."""
        try:
            group = super().get_group(filename)
        except (AttributeError, TypeError):
            return None  # JSON, but not the object that Triton wrote
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
