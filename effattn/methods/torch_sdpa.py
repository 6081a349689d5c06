"""`torch`: torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.methods.base import Method, Output

if TYPE_CHECKING:
    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics


class TorchSDPA(Method):
    """torch's attention as its users call it. It returns no log-sum-exp.

    `is_causal` means top-left, so a bottom-right mask of a rectangle is given as a boolean mask. Which of
    torch's implementations runs depends on the case, and with it the arithmetic: `fused` says which.
    """

    name = "torch"
    spec = "torch"
    same_bits = False
    #: with a mask, torch multiplies hidden values by 0 (pytorch #101967)
    nan_safe = False

    def numerics(self, case: Case) -> Numerics:
        from effattn.tolerances.numerics import for_dtype

        return for_dtype(case.dtype, "torch-flash" if fused(case) else "torch-math")

    def unsupported(self, case: Case) -> str | None:
        if not case.plain or case.backward:
            return "options besides the causal mask and the scale, and gradients, are not passed on yet"
        if _is_causal(case) and case.scale is not None and case.scale < 0 and fused(case):
            # Seen in torch 2.13 on the CPU: the mask is -inf before the scale is applied, hence +inf after.
            return (
                "torch's fused kernel multiplies its causal mask's -inf by the scale, so a negative one fails"
            )
        return None

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        import torch
        from torch.nn.functional import scaled_dot_product_attention

        mask = None
        if case.causal == "bottom-right" and case.q_len != case.kv_len:
            visible = torch.ones(case.q_len, case.kv_len, dtype=torch.bool, device=inputs.q.device)
            mask = visible.tril(case.kv_len - case.q_len)
        out = scaled_dot_product_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            attn_mask=mask,
            is_causal=_is_causal(case),
            scale=case.softmax_scale,
            enable_gqa=case.kv_heads != case.heads,
        )
        return Output(out)


def fused(case: Case) -> bool:
    """Whether torch runs its fused kernel on the CPU: for one head_dim, some keys, consecutive elements."""
    from effattn import layout

    placed = layout.parse(case.layout)
    if case.head_dim != case.v_dim or case.q_len == 0 or case.kv_len == 0 or "step" in placed.suffixes:
        return False
    # The elements of a row are consecutive where d is innermost or all that lies inside it has length 1.
    inner = placed.order[placed.order.index("d") + 1 :]
    if inner and "pad" in placed.suffixes:
        return False
    q = {"b": case.batch, "h": case.heads, "s": case.q_len}
    kv = {"b": case.batch, "h": case.kv_heads, "s": case.kv_len} | dict.fromkeys(placed.expanded, 1)
    return all(q[axis] == kv[axis] == 1 for axis in inner)


def _is_causal(case: Case) -> bool:
    return case.causal == "top-left" or (case.causal == "bottom-right" and case.q_len == case.kv_len)
