"""The kernels as operators of torch: `torch.ops.effattn.flash_attention` and its backward.

As operators they have fake kernels, so that `torch.compile` and `torch.export` see shapes and no Triton, and an autograd
formula. They take what `effattn.kernels.flash_attention` has brought into numbers; call that. It reaches them through `attend`.

Packed sequences use the same operators: max_q_len > 0 says that q is (total rows, heads, head_dim), and that the lengths
are cumulative.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NoReturn

import torch
from torch import Tensor

from effattn.errors import ArgumentError
from effattn.kernels.arguments import (
    PACKED,
    Extras,
    Problem,
    check_cumulative,
    check_extras,
    check_lengths,
    check_no_tangents,
    check_packed,
    check_shapes,
    check_tensors,
    no_forward_mode,
    problem_of,
)
from effattn.kernels.flash_backward import backward_launches, sink_gradient
from effattn.kernels.flash_bias import bias_launch
from effattn.kernels.flash_forward import forward_launch


@torch.library.custom_op("effattn::flash_attention", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    bottom_right: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    dropout_seed: int,
    dropout_offset: int,
    input_precision: str,
    max_q_len: int,
    max_kv_len: int,
) -> tuple[Tensor, Tensor]:
    problem, views, extras = _prepare(
        (q, k, v),
        (bias, mask, alibi_slopes, sinks, q_lengths, kv_lengths),
        (bottom_right, left, right, scale, softcap, dropout_p, dropout_seed, dropout_offset, input_precision),
        max_q_len,
        max_kv_len,
        values=True,
    )
    out, lse = _outputs(q, v, problem.packed)
    seen = _views(problem, out=out, lse=lse)
    forward_launch(problem, *views, extras, seen["out"], seen["lse"]).run(q)
    return out, lse


@forward_op.register_fake
def _(q: Any, k: Any, v: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    problem, _, _ = _prepare((q, k, v), rest[:6], rest[6:15], *rest[15:], values=False)
    return _outputs(q, v, problem.packed)


@torch.library.custom_op("effattn::flash_attention_backward", mutates_args=())
def backward_op(
    d_out: Tensor,
    d_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    q_lengths: Tensor | None,
    kv_lengths: Tensor | None,
    bottom_right: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    dropout_seed: int,
    dropout_offset: int,
    input_precision: str,
    max_q_len: int,
    max_kv_len: int,
    needs_bias: bool,
    needs_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias and sinks; empty tensors in place of the last two where they are not needed."""
    problem, views, extras = _prepare(
        (q, k, v),
        (bias, mask, alibi_slopes, sinks, q_lengths, kv_lengths),
        (bottom_right, left, right, scale, softcap, dropout_p, dropout_seed, dropout_offset, input_precision),
        max_q_len,
        max_kv_len,
        values=False,
    )
    dq, dk, dv, d_bias, d_sinks = _gradients(q, k, v, bias, sinks, needs_bias, needs_sinks)
    delta = torch.empty_like(lse)
    seen = _views(problem, out=out, lse=lse, d_out=d_out, d_lse=d_lse, delta=delta, dq=dq, dk=dk, dv=dv)
    for launch in backward_launches(problem, *views, extras, **seen):
        launch.run(q)
    if needs_bias and bias is not None and d_bias.numel():
        # Summed in float32, rounded once.
        total = torch.zeros((1,) * (4 - bias.dim()) + tuple(bias.shape), dtype=torch.float32, device=q.device)
        if problem.q_len and problem.kv_len and problem.batch:
            rows = (seen["lse"], seen["delta"], seen["d_out"])
            bias_launch(problem, *views, extras, *rows, total).run(q)
        d_bias.copy_(total.view(bias.shape))
    if needs_sinks and sinks is not None:
        rows = lse[None] if problem.packed else lse
        d_sinks.copy_(sink_gradient(sinks, rows, delta[None] if problem.packed else delta))
    return dq, dk, dv, d_bias, d_sinks


@backward_op.register_fake
def _(
    d_out: Any, d_lse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, bias: Any, mask: Any, *rest: Any
) -> Any:
    return _gradients(q, k, v, bias, rest[1], *rest[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:9])
    ctx.numbers = inputs[9:]


def _differentiate(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
    out, *rest = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros((), dtype=out.dtype, device=out.device).expand_as(out)
    needs_bias, needs_sinks = ctx.needs_input_grad[3], ctx.needs_input_grad[6]
    dq, dk, dv, d_bias, d_sinks = _Backward.apply(
        d_out, d_lse, out, *rest, *ctx.numbers, needs_bias, needs_sinks
    )  # pyright: ignore[reportGeneralTypeIssues]
    optional = (d_bias if needs_bias else None, None, None, d_sinks if needs_sinks else None, None, None)
    return dq, dk, dv, *optional, *(None for _ in ctx.numbers)


forward_op.register_autograd(_differentiate, setup_context=_setup_context)


def attend(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`forward_op` with what an operator's autograd formula leaves out: `torch.func.grad` works, and forward mode, which
    would lose its tangents without a word, raises ArgumentError. Arguments by position.
    """
    if (
        torch.compiler.is_compiling()
    ):  # Dynamo takes the operator, but no Function with setup_context and jvp.
        check_no_tangents("flash_attention", *inputs[:9])
        return forward_op(*inputs)
    return _Forward.apply(*inputs)  # pyright: ignore[reportReturnType]


def _refuse_tangents(ctx: Any, *tangents: Any) -> NoReturn:
    raise no_forward_mode("flash_attention")


def _refuse_second(ctx: Any, *grads: Any) -> NoReturn:
    raise ArgumentError(
        "second derivatives of flash_attention are not offered; use create_graph=False, or effattn.exact.attention"
    )


backward_op.register_autograd(_refuse_second)


class _Forward(torch.autograd.Function):
    generate_vmap_rule = True
    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_differentiate)
    jvp = staticmethod(_refuse_tangents)

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return forward_op(*inputs)


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True
    backward = staticmethod(_refuse_second)
    jvp = staticmethod(_refuse_tangents)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept: there is no further derivative."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return backward_op(*inputs)


def _prepare(
    qkv: tuple[Any, ...],
    extra: tuple[Any, ...],
    numbers: tuple[Any, ...],
    max_q_len: int,
    max_kv_len: int,
    *,
    values: bool,
) -> tuple[Problem, tuple[Tensor, Tensor, Tensor], Extras]:
    """Check everything; with `values`, the contents of the lengths too. Tensors become (batch, heads, length, dim)."""
    names = (
        "bottom_right", "left", "right", "scale", "softcap", "dropout_p", "dropout_seed", "dropout_offset",
        "input_precision",
    )  # fmt: skip
    given = dict(zip(names, numbers, strict=True))
    bias, mask, alibi_slopes, sinks, q_lengths, kv_lengths = extra
    q, k, v = qkv
    if not max_q_len:
        check_tensors(q=q, k=k, v=v)
        check_shapes(q, k, v)
        extras = check_extras(
            q, k.shape[2], bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, q_lengths=q_lengths,
            kv_lengths=kv_lengths,
        )  # fmt: skip
        if values:
            check_lengths("q_lengths", extras.q_lengths, q.shape[2])
            check_lengths("kv_lengths", extras.kv_lengths, k.shape[2])
        return problem_of(q, k, v, **given), (q, k, v), extras
    check_tensors(PACKED, q=q, k=k, v=v)
    batch = check_packed(q, q_lengths, kv_lengths)
    if values:
        check_cumulative("cu_seqlens_q", q_lengths, q.shape[0], max_q_len)
        check_cumulative("cu_seqlens_k", kv_lengths, k.shape[0], max_kv_len)
    q, k, v = (_packed_view(x, batch) for x in qkv)
    check_shapes(q, k, v)
    extras = check_extras(
        q, max_kv_len, bias=bias, mask=mask, alibi_slopes=alibi_slopes, sinks=sinks, q_len=max_q_len
    )
    problem = problem_of(q, k, v, packed=True, lengths=(max_q_len, max_kv_len), **given)
    extras = dataclasses.replace(extras, q_lengths=q_lengths.contiguous(), kv_lengths=kv_lengths.contiguous())
    return problem, (q, k, v), extras


def _packed_view(x: Tensor, batch: int) -> Tensor:
    """(total, heads, ...) as (batch, heads, total, ...): each member's rows begin where its cumulative length says."""
    return x.transpose(0, 1).unsqueeze(0).expand(batch, *x.transpose(0, 1).shape)


def _views(problem: Problem, **tensors: Tensor | None) -> dict[str, Any]:
    if not problem.packed:
        return tensors
    views: dict[str, Any] = {}
    for name, x in tensors.items():
        if x is None:
            views[name] = None
        elif x.dim() == 2:  # (heads, total)
            views[name] = x.unsqueeze(0).expand(problem.batch, *x.shape)
        else:
            views[name] = _packed_view(x, problem.batch)
    return views


def _outputs(q: Tensor, v: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    rows = (q.shape[1], q.shape[0]) if packed else q.shape[:3]
    out = torch.empty((*q.shape[:-1], v.shape[-1]), dtype=q.dtype, device=q.device)
    return out, torch.empty(rows, dtype=torch.float32, device=q.device)


def _gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    sinks: Tensor | None,
    needs_bias: bool,
    needs_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def new(x: Tensor | None, needed: bool) -> Tensor:
        if x is None or not needed:
            return torch.empty(0, device=q.device)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    return new(q, True), new(k, True), new(v, True), new(bias, needs_bias), new(sinks, needs_sinks)
