"""A kernel that is wrong by less than any one verdict of the smoke profile can tell, and one that breaks when called again."""

from __future__ import annotations

from typing import Any

import torch

from effattn.zoo.matrices import Setting, Whole
from effattn.zoo.specimen import _with_options

#: calls until `Breaking` breaks: the backward cases of smoke
CALLS = 23


class _Slight(Whole):
    """dV is too large by 2^-16: a thirty-second of a unit roundoff of fp16."""

    def to_group(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        return super().to_group(x, kv_heads, dtype) * (1.0 + 2.0**-16)

    def scaled(self, x: torch.Tensor, setting: Setting, of: str) -> torch.Tensor:
        # dK goes through `to_group` too.
        return super().scaled(x, setting, of) / (1.0 + 2.0**-16 if of == "k" else 1.0)


class _Breaking(_Slight):
    """The same, until it has been called often enough."""

    calls = 0

    def forward(self, *args: Any) -> Any:
        _Breaking.calls += 1
        if _Breaking.calls > CALLS:
            raise RuntimeError("no more workspace")
        return super().forward(*args)


slight = _with_options(_Slight())
breaking = _with_options(_Breaking())
