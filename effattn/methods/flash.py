"""`flash`: the FlashAttention kernel of this package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.methods.base import Method, Output, triton_on

if TYPE_CHECKING:
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
        if not case.plain or case.backward:
            return "the kernel is that of the forward pass and knows the causal mask and the scale only"
        return None

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        from effattn.kernels.flash_forward import flash_attention_forward

        with triton_on(inputs.q.device):
            out, lse = flash_attention_forward(
                inputs.q,
                inputs.k,
                inputs.v,
                causal=case.causal != "none",
                scale=case.softmax_scale,
                causal_alignment=case.causal if case.causal != "none" else "bottom-right",
            )
        return Output(out, lse)
