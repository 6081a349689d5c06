"""FlashAttention in Triton on codes of e4m3, with a scale for each block of rows of Q, K and V, and wrong variants of it.

P is e4m3 after an offset of 2^8; both products are `tl.dot` of e4m3. The wrong ones are the same source with one edit, so that
mistakes go the way of a user's kernel, from source through the compiler to a verdict. The command line takes them too:
`effattn gate effattn.zoo.triton_fp8:attention`, `effattn gate effattn.zoo.triton_fp8:k_scale_forgotten`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

import effattn

if TYPE_CHECKING:
    from collections.abc import Callable

    from effattn.case import Case
    from effattn.tolerances.numerics import Numerics

#: rows that share a scale, of queries and of keys: a program's block
ROWS = 64
LOG2E = 1.4426950408889634


@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len", "dim", "v_dim"])
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    q_scale,
    k_scale,
    v_scale,
    out_ptr,
    lse_ptr,
    heads,
    group,
    q_len,
    kv_len,
    dim,
    v_dim,
    factor,
    CAUSAL: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
):
    """One block of queries of one head; tensors are contiguous, scales (pairs, blocks)."""
    pair = tl.program_id(1)
    kv_pair = pair // heads * (heads // group) + pair % heads // group
    kv_blocks = tl.cdiv(kv_len, ROWS)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d, dv = tl.arange(0, D), tl.arange(0, V)
    q_at = q_ptr + (pair * q_len + i[:, None]) * dim + d[None, :]
    q = tl.load(q_at, mask=(i[:, None] < q_len) & (d[None, :] < dim), other=0.0)
    q_unit = tl.load(q_scale + pair * tl.cdiv(q_len, ROWS) + tl.program_id(0)) * factor
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, V), tl.float32)
    for block in range(kv_blocks):
        j = block * ROWS + tl.arange(0, ROWS)
        k_at = k_ptr + (kv_pair * kv_len + j[None, :]) * dim + d[:, None]
        k = tl.load(k_at, mask=(j[None, :] < kv_len) & (d[:, None] < dim), other=0.0)
        v_at = v_ptr + (kv_pair * kv_len + j[:, None]) * v_dim + dv[None, :]
        v = tl.load(v_at, mask=(j[:, None] < kv_len) & (dv[None, :] < v_dim), other=0.0)
        k_unit = tl.load(k_scale + kv_pair * kv_blocks + block)
        v_unit = tl.load(v_scale + kv_pair * kv_blocks + block)
        seen = j[None, :] < kv_len
        if CAUSAL == 1:
            seen = seen & (j[None, :] <= i[:, None] + kv_len - q_len)
        if CAUSAL == 2:
            seen = seen & (j[None, :] <= i[:, None])
        scores = tl.where(seen, tl.dot(q, k) * (q_unit * k_unit), float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        weights = tl.exp2(scores - safe[:, None] + 8.0)
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tl.dot(weights.to(tl.float8e4nv), v) * v_unit
        top = new
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total) - 8.0) * 0.6931471805599453)
    out_at = out_ptr + (pair * q_len + i[:, None]) * v_dim + dv[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(i[:, None] < q_len) & (dv[None, :] < v_dim))
    tl.store(lse_ptr + pair * q_len + i, lse, mask=i < q_len)


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of e4m3 in the shape of x (batch, heads, rows, columns), and scales (batch, heads, blocks) in fp32."""
    rows = x.shape[2]
    if not x.numel():
        return x.to(torch.float8_e4m3fn), x.new_ones(*x.shape[:2], 1, dtype=torch.float32)
    padded = torch.nn.functional.pad(x.float(), (0, 0, 0, -rows % ROWS)).unflatten(2, (-1, ROWS))
    amax = padded.abs().amax((3, 4))
    scale = torch.where(amax > 0.0, amax / 448.0, 1.0)
    codes = (padded / scale[..., None, None]).to(torch.float8_e4m3fn)
    return codes.flatten(2, 3)[:, :, :rows].contiguous(), scale


def _numerics(case: Case) -> Numerics:
    from effattn.tolerances.numerics import for_dtype

    return for_dtype(case.dtype, "fp8-block")


def _supports(case: Case) -> bool | str:
    return case.dtype != "fp32" or "the kernel is for fp16, bf16"


@effattn.method(numerics=_numerics, supports=_supports, same_bits=False, nan_safe=False)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    causal_alignment: str = "bottom-right",
) -> tuple[torch.Tensor, torch.Tensor]:
    """A scale for each 64 rows, as the preset `fp8-block` says; returns out in the dtype of q, and the log-sum-exp."""
    return _run(_attend, q, k, v, causal, scale, causal_alignment)


def _run(
    kernel: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    scale: float | None,
    alignment: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    (batch, heads, q_len, dim), (kv_len, v_dim) = q.shape, v.shape[2:]
    out = torch.empty((batch, heads, q_len, v_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out, lse
    (a, a_scale), (b, b_scale), (c, c_scale) = (quantise(x) for x in (q, k, v))
    factor = (dim**-0.5 if scale is None else scale) * LOG2E
    padded = [max(32, triton.next_power_of_2(n)) for n in (dim, v_dim)]
    sizes = (heads, heads // k.shape[1], q_len, kv_len, dim, v_dim)
    kernel[(triton.cdiv(q_len, ROWS), batch * heads)](
        a,
        b,
        c,
        a_scale,
        b_scale,
        c_scale,
        out,
        lse,
        *sizes,
        factor,
        CAUSAL=0 if not causal else 1 if alignment == "bottom-right" else 2,
        ROWS=ROWS,
        D=padded[0],
        V=padded[1],
    )
    return out, lse


_CAST = "weights.to(tl.float8e4nv)"
_V_UNIT = "tl.load(v_scale + kv_pair * kv_blocks + block)"

#: name -> the mistake, and edits of the kernel's source: a text that occurs once, and what replaces it
MUTANTS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "k_scale_forgotten": ("scores without the scale of K", (("(q_unit * k_unit)", "q_unit"),)),
    "k_scale_of_first_block": (
        "the scale of K's first block for all",
        (("tl.load(k_scale + kv_pair * kv_blocks + block)", "tl.load(k_scale + kv_pair * kv_blocks)"),),
    ),
    "v_scale_of_query_block": (
        "the scale of V by the block of queries",
        ((_V_UNIT, _V_UNIT.replace("block)", "tl.minimum(tl.program_id(0), kv_blocks - 1))")),),
    ),
    "v_scale_after_the_loop": (
        "the sum over all blocks is multiplied by the scale of V's last one",
        (
            ("v) * v_unit\n", "v)\n"),
            ("acc = acc / ", f"acc = {_V_UNIT.replace('block)', 'kv_blocks - 1)')} * acc / "),
        ),
    ),
    "offset_forgotten": (
        "the offset of P is not in the sum that the output is divided by",
        (("tl.where(empty, 1.0, total)", "tl.where(empty, 1.0, total / 256.0)"),),
    ),
    "offset_in_lse": (
        "the offset of P stays in the log-sum-exp",
        (("tl.log2(total) - 8.0", "tl.log2(total)"),),
    ),
    "p_saturates": (
        "an offset of 2^9, so that P ends at 448 of 512",
        (
            (_CAST, "tl.minimum(2.0 * weights, 448.0).to(tl.float8e4nv)"),
            ("acc = acc / ", "acc = 0.5 * acc / "),
        ),
    ),
    "p_rounded_twice": (
        "P goes through e5m2",
        ((_CAST, "weights.to(tl.float8e5).to(tl.float32).to(tl.float8e4nv)"),),
    ),
}


def __getattr__(name: str) -> Callable[..., Any]:
    """`effattn.zoo.triton_fp8:NAME` on the command line: the wrong kernel of that name."""
    if name in MUTANTS:
        return mutant(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def mutant(name: str) -> Callable[..., Any]:
    """The host function of a wrong kernel. Raises `ValueError` where its text does not occur exactly once."""
    from effattn.zoo.triton_mutants import made

    what, edits = MUTANTS[name]
    source = inspect.getsource(sys.modules[__name__])
    kernel = source[source.index("@triton.jit") : source.index("def quantise")]
    for old, new in edits:
        if kernel.count(old) != 1:
            raise ValueError(
                f"{name}: {old!r} occurs {kernel.count(old)} times in the kernel's source; expected once"
            )
        kernel = kernel.replace(old, new)
    module = made(f"{__name__}.{name}", f"import triton\nimport triton.language as tl\n\n\n{kernel}")

    @effattn.method(numerics=_numerics, supports=_supports, same_bits=False, nan_safe=False)
    def attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: bool = False,
        scale: float | None = None,
        causal_alignment: str = "bottom-right",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _run(module._attend, q, k, v, causal, scale, causal_alignment)

    attention.__doc__ = what
    return attention
