"""Attention kernels written in torch, right ones of different design and wrong ones, that verdicts are tested with.

Each is a function that the command line takes as any user's: `effattn gate effattn.zoo:output_times_1_001`.
`specimens()` lists them with what is wrong and where it shows.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from effattn.zoo.specimen import Specimen, get, specimens

__all__ = ["Specimen", "get", "specimens"]


def __getattr__(name: str) -> Callable[..., Any]:
    """`effattn.zoo:NAME` on the command line: the kernel of that name, dashes written as underscores."""
    from effattn.errors import RequestError

    if name.startswith("_"):
        raise AttributeError(name)
    # Not `from effattn.zoo import lawless`, which asks this function.
    lawless = importlib.import_module("effattn.zoo.lawless")
    if (named := name.replace("_", "-")) in lawless.LAWLESS:
        return lawless.function_of(lawless.LAWLESS[named], named)
    try:
        return get(name.replace("_", "-")).function
    except RequestError as error:
        raise AttributeError(str(error)) from None
