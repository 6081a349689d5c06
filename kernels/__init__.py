"""Attention kernels in Triton: `flash_attention` and what goes with it.

    from effattn.kernels import flash_attention

Names are loaded when they are first used: this imports neither torch nor triton.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effattn.kernels.attention import flash_attention, flash_attention_varlen
    from effattn.kernels.decode import flash_decode
    from effattn.kernels.dropout import dropout_mask
    from effattn.kernels.hugging_face import register_with_transformers

__all__ = [
    "dropout_mask",
    "flash_attention",
    "flash_attention_varlen",
    "flash_decode",
    "register_with_transformers",
]

_MODULES = {
    "dropout_mask": "dropout",
    "flash_attention": "attention",
    "flash_attention_varlen": "attention",
    "flash_decode": "decode",
    "register_with_transformers": "hugging_face",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def _hand_over() -> None:
    """Become the package on PyPI that has this name, if it is installed.

    This folder is `effattn.kernels`. Whoever runs in a checkout, or has it on the path, and imports `kernels` means
    another one, which this folder would hide.
    """
    here = Path(__file__).resolve().parent
    for entry in sys.path:
        if (Path(entry or ".").resolve() / "kernels") == here:
            continue
        spec = importlib.machinery.PathFinder.find_spec("kernels", [entry])
        if (
            spec is None
            or spec.loader is None
            or not spec.origin
            or Path(spec.origin).resolve().parent == here
        ):
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)
        return


if __name__ == "kernels":
    import importlib.util

    _hand_over()
