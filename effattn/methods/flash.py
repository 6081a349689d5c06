"""`flash`: the FlashAttention kernel of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.methods import arguments
from effattn.methods.base import Method, Output, triton_on

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics


class Flash(Method):
    """`effattn.kernels.flash_forward` with its own block sizes and IEEE products."""

    name = "flash"
    spec = "flash"

    def numerics(self, case: Case) -> Numerics:
        from effattn.tolerances.numerics import for_dtype

        return for_dtype(case.dtype, "flash")

    def unsupported(self, case: Case) -> str | None:
        from effattn.kernels.arguments import MAX_HEAD_DIM

        if max(case.head_dim, case.v_dim) > MAX_HEAD_DIM:
            return f"the kernel takes head_dim and v_dim up to {MAX_HEAD_DIM}"
        if case.backward:
            return "the kernel is that of the forward pass"
        return None

    def dropout_mask(self, case: Case, device: torch.device) -> torch.Tensor:
        from effattn.kernels.dropout import dropout_mask

        with triton_on(device):
            sizes = (case.batch, case.heads, case.q_len, case.kv_len)
            return dropout_mask(*sizes, case.dropout, arguments.dropout_seed(case), 0, device)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        from effattn.kernels.flash_forward import flash_attention_forward

        with triton_on(inputs.q.device):
            return Output(*flash_attention_forward(*inputs, **arguments.keywords(case, inputs.extras)))
