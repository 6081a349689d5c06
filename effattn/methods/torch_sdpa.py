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

        return fused_numerics(case) if fused(case) else for_dtype(case.dtype, "torch-math")

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
        if flushes_subnormals(case):
            return FLUSHES
        if widens_bias(case):
            return WIDENED
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


#: why a case is not supported of which `widens_bias` is true
WIDENED = (
    "the bias would be widened to the axes of a mask, and its gradient summed over them in the dtype of q"
)


def widens_bias(case: Case) -> bool:
    """Whether what torch has no option for gives the bias of a case with gradients axes that it has not.

    Torch takes one mask: a bias next to another mask becomes one with the axes of both, whose gradient autograd rounds
    for each element before it sums them up.
    """
    if case.bias == "none" or not case.backward:
        return False
    axes = set("" if case.mask == "none" else case.mask)
    axes |= set("qk") if case.causal != "none" or case.window is not None else set()
    axes |= set("bqk") if case.lengths != "none" else set()
    return bool(axes - set(case.bias.partition(":")[0]))


#: why a case is not supported of which `flushes_subnormals` is true
FLUSHES = "torch's products of bf16 flush subnormal numbers to 0 on this CPU"


def flushes_subnormals(case: Case) -> bool:
    """Whether torch's products take the inputs of the case for 0 on this machine."""
    return case.dtype == "bf16" and case.values == "subnormal" and flushes_bf16()


@lru_cache(maxsize=1)
def flushes_bf16() -> bool:
    """Whether bf16 goes through instructions that take subnormal numbers for 0 (Intel's VDPBF16PS and AMX do)."""
    import torch

    small = torch.full((1, 1, 1, 1), 2.0**-127, dtype=torch.bfloat16)
    return not bool(torch.nn.functional.scaled_dot_product_attention(small, small, small))


def fused_numerics(case: Case) -> Numerics:
    """The arithmetic of torch's fused kernel on the CPU."""
    from effattn.tolerances.numerics import for_dtype

    # Gradients are added up in the inputs' dtype, block by block (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp).
    rows = 256 if case.q_len >= 768 else 64 if case.q_len >= 192 else 32
    return for_dtype(case.dtype, "torch-flash").replace(stored_keys=rows, stored_queries=512)


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
    """Whether torch may run its fused kernel on the CPU: for one head_dim, and some keys.

    Strides do not count: laws call a method with tensors that have others than the case, and what the fused kernel may be off
    by, its formula in fp32 may too.
    """
    if case.bias != "none" and case.backward:
        return False  # a mask that requires a gradient
    return case.head_dim == case.v_dim and 0 not in (case.q_len, case.kv_len)


def _is_causal(case: Case) -> bool:
    return case.causal == "top-left" or (case.causal == "bottom-right" and case.q_len == case.kv_len)
