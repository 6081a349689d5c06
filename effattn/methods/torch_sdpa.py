"""`torch`: torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from effattn.methods import backward
from effattn.methods.base import Method, Output

if TYPE_CHECKING:
    import torch

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

        if not fused(case):
            return for_dtype(case.dtype, "torch-math")
        # Gradients are added up in the inputs' dtype, block by block (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
        rows = 256 if case.q_len >= 768 else 64 if case.q_len >= 192 else 32
        return for_dtype(case.dtype, "torch-flash").replace(stored_keys=rows, stored_queries=512)

    def unsupported(self, case: Case) -> str | None:
        lacking = [name for name, there in (("softcap", case.softcap), ("sinks", case.sinks)) if there]
        if lacking:
            return f"torch's function has no {' and no '.join(lacking)}"
        if case.dropout:
            return "torch does not say which weights its dropout keeps"
        if case.alibi != "none":
            return "ALiBi would be a bias in the dtype of q, rounded to it"
        if case.bias.endswith(":fp32"):
            return "torch takes a bias in the dtype of q only"
        if case.dtype == "bf16" and case.values == "subnormal" and _flushes_bf16():
            return "torch's products of bf16 flush subnormal numbers to 0 on this CPU"
        if _is_causal(case) and case.plain and case.scale is not None and case.scale < 0 and fused(case):
            # Seen in torch 2.13 on the CPU: the mask is -inf before the scale is applied, hence +inf after.
            return (
                "torch's fused kernel multiplies its causal mask's -inf by the scale, so a negative one fails"
            )
        return None

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        from torch.nn.functional import scaled_dot_product_attention

        def call(inputs: Inputs) -> torch.Tensor:
            mask = _mask(case, inputs)
            return scaled_dot_product_attention(
                inputs.q,
                inputs.k,
                inputs.v,
                attn_mask=mask,
                is_causal=mask is None and _is_causal(case),
                scale=case.softmax_scale,
                enable_gqa=case.kv_heads != case.heads,
            )

        return backward.run(call, case, inputs)


@lru_cache(maxsize=1)
def _flushes_bf16() -> bool:
    """Whether bf16 goes through instructions that take subnormal numbers for 0 (Intel's VDPBF16PS and AMX do)."""
    import torch

    small = torch.full((1, 1, 1, 1), 2.0**-127, dtype=torch.bfloat16)
    return not bool(torch.nn.functional.scaled_dot_product_attention(small, small, small))


def _mask(case: Case, inputs: Inputs) -> torch.Tensor | None:
    """What torch has no option for, as a mask: a bool one, or one in the dtype of q where there is a bias."""
    import torch

    extras, device = inputs.extras, inputs.q.device
    if case.plain and (case.causal == "none" or _is_causal(case)):
        return None
    i = torch.arange(case.q_len, device=device)[:, None]
    j = torch.arange(case.kv_len, device=device)
    m = torch.tensor(case.q_len) if extras.q_lengths is None else extras.q_lengths[:, None, None, None].long()
    n = (
        torch.tensor(case.kv_len)
        if extras.kv_lengths is None
        else extras.kv_lengths[:, None, None, None].long()
    )
    place = i + ((n - m) if case.alignment == "bottom-right" else 0)
    seen = (i < m) & (j < n)
    if case.causal != "none":
        seen = seen & (j <= place)
    if case.window is not None:
        left, right = case.window
        seen = seen & (j >= place - left) if left >= 0 else seen
        seen = seen & (j <= place + right) if right >= 0 else seen
    if extras.mask is not None:
        seen = seen & extras.mask
    if extras.bias is not None:
        seen = torch.where(seen, extras.bias, -torch.inf)
    # torch takes two axes, or four.
    return seen if seen.dim() in (2, 4) else seen[None]


def fused(case: Case) -> bool:
    """Whether torch runs its fused kernel on the CPU: for one head_dim, some keys, consecutive elements."""
    from effattn import layout

    placed = layout.parse(case.layout)
    if case.bias != "none" and case.backward:
        return False  # a mask that requires a gradient
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
