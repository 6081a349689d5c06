"""`flash_attention` and `flash_attention_varlen`: the functions to call."""

from __future__ import annotations

from typing import Any

import torch

from effattn.errors import ArgumentError
from effattn.kernels.arguments import (
    PACKED,
    check_cumulative,
    check_dense,
    check_numbers,
    check_packed,
    check_tensors,
)
from effattn.kernels.operators import attend


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    window: tuple[int, int] | int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    q_lengths: torch.Tensor | None = None,
    kv_lengths: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    input_precision: str = "ieee",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention in O(N d) memory, with gradients; on CUDA and, through `effattn.cpu`, on the CPU.

        s[i, j] = cap(scale * q[i] . k[j]) + bias[i, j] - slope * |i + shift - j|
        lse[i]  = log(exp(sink) + sum_j exp(s[i, j]))            over the keys j that query i sees
        out[i]  = sum_j exp(s[i, j] - lse[i]) v[j]

    Shapes
        q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_dim) of
        one dtype: float16, bfloat16 or float32. heads is a multiple of kv_heads; query head h reads key head
        h // (heads // kv_heads). head_dim and v_dim are 1 to 256, lengths start at 0, strides are any.

    Returns out (batch, heads, q_len, v_dim) in the dtype of q or, with `return_lse`, (out, lse), where lse (batch, heads,
    q_len) is float32, the natural logarithm, and differentiable too.

    Options
        causal: query i sees the keys j <= i + shift. shift is kv_len - q_len where `causal_alignment` is "bottom-right"
            (the last query sees the last key), 0 where it is "top-left".
        window: (left, right): query i sees i + shift - left <= j <= i + shift + right; -1 is no limit on that side; an
            int w is (w, w). With causal, right is 0.
        scale: any finite number; head_dim ** -0.5 if None.
        softcap: cap(s) = softcap * tanh(s / softcap).
        alibi_slopes: float32 (heads,) or (batch, heads). No gradient.
        bias: in q's dtype or float32, broadcastable to (batch, heads, q_len, kv_len).
        mask: bool, broadcastable likewise; True may be seen.
        sinks: float32 (heads,): one more logit a head in the normaliser, without a value.
        q_lengths, kv_lengths: int32 (batch,): what lies beyond is padding, and shift is that of the lengths.
        dropout_p, dropout_seed, dropout_offset: weights are dropped with probability p and the others divided by 1 - p,
            after normalisation: `dropout_mask` returns which are kept. lse is that without dropout.
        input_precision: of the products of float32 tensors, as `tl.dot` has it.

    A query that sees no key, and padding, has out = 0, lse = -inf (the sink, where a query of no padding has one) and
    gradients 0. What is hidden from a query has no influence on it, NaN and infinity included. A bias of -inf is a
    weight of 0, so that NaN in v comes through it; use `mask`. A bias or sink of +inf gives NaN.

    Gradients are those of q, k, v, bias and sinks, deterministic, and of a row the same bits whatever else is in the
    batch; first derivatives in reverse mode, by `backward`, `torch.func.grad`, `vjp` or `jacrev`.
    Arithmetic is that of `effattn.kernels.flash_forward` and `effattn.kernels.flash_backward`.

    Raises ArgumentTypeError (a TypeError) for a wrong type, dtype or device, ArgumentError (a ValueError) for a wrong
    shape or value, or for a gradient that is not offered.
    """
    _refuse_gradient(alibi_slopes)
    given = check_numbers(
        _head_dim(q),
        causal=causal,
        causal_alignment=causal_alignment,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        input_precision=input_precision,
    )
    check_tensors(q=q, k=k, v=v)
    optional = {"bias": bias, "mask": mask, "alibi_slopes": alibi_slopes, "sinks": sinks}
    for name, x in (optional | {"q_lengths": q_lengths, "kv_lengths": kv_lengths}).items():
        if x is not None:
            check_dense(name, x)
    out, lse = attend(q, k, v, bias, mask, alibi_slopes, sinks, q_lengths, kv_lengths, *given, 0, 0)
    return (out, lse) if return_lse else out


def flash_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    window: tuple[int, int] | int | None = None,
    softcap: float | None = None,
    alibi_slopes: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dropout_offset: int = 0,
    input_precision: str = "ieee",
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attention` of sequences of different lengths that follow each other along one axis.

    q (total_q, heads, head_dim), k (total_k, kv_heads, head_dim), v (total_k, kv_heads, v_dim). cu_seqlens_q and
    cu_seqlens_k, int32 (batch + 1,), begin with 0, end with total_q and total_k, and do not fall: member b has the rows
    cu_seqlens[b] <= row < cu_seqlens[b + 1], none where they are equal. The longest lengths are found where they are not
    given; under `torch.compile` they have to be. Their values are checked, for which a GPU is waited for.

    Returns out (total_q, heads, v_dim) or, with `return_lse`, (out, lse) with lse (heads, total_q). Output and gradients
    have the same bits as one call of `flash_attention` for each member; those of sinks are summed over all. The options
    are those of `flash_attention`, with alibi_slopes (heads,) or (batch, heads). bias and mask are broadcastable to
    (batch, heads, longest q, longest k), and are looked up at a member's own positions, which begin with 0. Which weights
    dropout keeps is `dropout_mask` of these sizes, so give the longest lengths where a result is to be repeated with
    other members.
    """
    _refuse_gradient(alibi_slopes)
    given = check_numbers(
        _head_dim(q),
        causal=causal,
        causal_alignment=causal_alignment,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        dropout_offset=dropout_offset,
        input_precision=input_precision,
    )
    check_tensors(PACKED, q=q, k=k, v=v)
    check_packed(q, cu_seqlens_q, cu_seqlens_k)
    longest = [
        _longest(name, lengths, x.shape[0], most)
        for name, lengths, x, most in (
            ("cu_seqlens_q", cu_seqlens_q, q, max_seqlen_q),
            ("cu_seqlens_k", cu_seqlens_k, k, max_seqlen_k),
        )
    ]
    # At least 1, which says that sequences are packed.
    longest = [max(1, length) for length in longest]
    out, lse = attend(
        q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, *given, *longest
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _longest(name: str, lengths: torch.Tensor, total: int, given: int | None) -> int:
    if given is None and torch.compiler.is_compiling():
        raise ArgumentError(
            f"under torch.compile the longest length of {name} has to be given: max_seqlen_{name[-1]}=..., an int"
        )
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise ArgumentError(f"the longest length of {name} must be an int from 0, got {given!r}")
        return given
    check_cumulative(name, lengths, total, total)
    return int(lengths.diff().max()) if lengths.shape[0] > 1 else 0


def _head_dim(q: Any) -> int:
    """For the usual scale; a q that is no tensor of 1 or more dimensions is found out later."""
    return q.shape[-1] if isinstance(q, torch.Tensor) and q.dim() and q.shape[-1] else 1


def _refuse_gradient(alibi_slopes: Any) -> None:
    if isinstance(alibi_slopes, torch.Tensor) and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise ArgumentError(
            "alibi_slopes requires a gradient, which is not offered; pass alibi_slopes.detach() if none is wanted, or"
            " the same as a bias"
        )
