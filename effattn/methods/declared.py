"""Another method, judged by a preset instead of by what it declares: METHOD@PRESET on the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.methods.base import Method, Output
from effattn.tolerances import numerics

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics


class Declared(Method):
    """`method` under the numerics of a preset. Raises `RequestError` for an unknown one."""

    def __init__(self, method: Method, preset: str) -> None:
        self._dtypes = numerics.dtypes_of(preset)
        self._method, self._preset = method, preset
        self.name, self.spec = f"{method.name}@{preset}", f"{method.spec}@{preset}"
        self.same_bits, self.nan_safe, self.declares = method.same_bits, method.nan_safe, True

    def numerics(self, case: Case) -> Numerics:
        return numerics.for_dtype(case.dtype, self._preset)

    def unsupported(self, case: Case) -> str | None:
        if case.dtype not in self._dtypes:
            return f"the preset {self._preset!r} is for {', '.join(self._dtypes)}"
        return self._method.unsupported(case)

    def dropout_mask(self, case: Case, device: torch.device) -> torch.Tensor:
        return self._method.dropout_mask(case, device)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        return self._method(case, inputs)
