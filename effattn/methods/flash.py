"""`flash`: the FlashAttention kernel of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from effattn.methods import arguments, backward
from effattn.methods.base import Method, Output, triton_on

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics


class Flash(Method):
    """`effattn.kernels.flash_attention` with its own block sizes and IEEE products, and its gradients."""

    name = "flash"
    spec = "flash"

    def numerics(self, case: Case) -> Numerics:
        from effattn.tolerances.numerics import for_dtype

        # One program owns a block of keys and all query heads that share it.
        return for_dtype(case.dtype, "flash").replace(group_sum="acc")

    def unsupported(self, case: Case) -> str | None:
        from effattn.kernels.arguments import MAX_HEAD_DIM

        if max(case.head_dim, case.v_dim) > MAX_HEAD_DIM:
            return f"the kernel takes head_dim and v_dim up to {MAX_HEAD_DIM}"
        return None

    def dropout_mask(self, case: Case, device: torch.device) -> torch.Tensor:
        from effattn.kernels.dropout import dropout_mask

        with triton_on(device):
            sizes = (case.batch, case.heads, case.q_len, case.kv_len)
            return dropout_mask(*sizes, case.dropout, arguments.dropout_seed(case), 0, device)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        from effattn.kernels import flash_attention

        def call(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
            given = arguments.keywords(case, inputs.extras)
            return cast(
                "tuple[torch.Tensor, torch.Tensor]", flash_attention(*inputs, **given, return_lse=True)
            )

        with triton_on(inputs.q.device):
            return backward.run(call, case, inputs)
