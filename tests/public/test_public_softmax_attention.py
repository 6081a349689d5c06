"""Published softmax attention kernels, judged as any method is: the forward by the envelope, the gradients by float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from effattn.case import Case
from effattn.judge import Outcome, judge_output
from effattn.methods.base import Output
from effattn.tolerances import numerics

DTYPES = ("fp16", "bf16", "fp32")
TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]


def flash_attention_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    from flash_attention_triton import flash_attention_v2

    assert causal
    return flash_attention_v2(q, k, v, softmax_scale=None)


def fla_parallel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    from fla.ops.attn.parallel import parallel_attn

    assert causal
    return parallel_attn(*(x.transpose(1, 2).contiguous() for x in (q, k, v))).transpose(1, 2)


#: With scores kept in bf16, at the usual scale of 1/8 any output would do.
CONCH_SCALE = 1 / 32


def paged(k: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache of blocks (blocks, size, heads, dim) that holds (batch, heads, length, dim), shuffled, and its table."""
    batch, heads, length, dim = k.shape
    per = -(-length // size)
    padded = torch.zeros(batch, heads, per * size, dim, dtype=k.dtype, device=k.device)
    padded[:, :, :length] = k
    blocks = (
        padded.view(batch, heads, per, size, dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(batch * per, size, heads, dim)
    )
    order = torch.randperm(batch * per, generator=torch.Generator().manual_seed(3))
    cache = torch.empty_like(blocks)
    cache[order.to(k.device)] = blocks
    return cache.contiguous(), order.view(batch, per).to(torch.int32).to(k.device)


def conch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    from conch.ops.attention.varlen_attention import varlen_attention

    batch, heads, length, dim = q.shape
    keys, table = paged(k, 32)
    values, _ = paged(v, 32)
    out = varlen_attention(
        q.transpose(1, 2).reshape(batch * length, heads, dim).contiguous(),
        keys,
        values,
        torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=q.device),
        length,
        torch.full((batch,), k.shape[2], dtype=torch.int32, device=q.device),
        k.shape[2],
        table,
        causal=causal,
        scale=CONCH_SCALE,
    )
    return out.view(batch, length, heads, dim).transpose(1, 2)


def conch_paged(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    from conch.ops.attention.paged_attention import paged_attention

    assert q.shape[2] == 1
    keys, table = paged(k, 32)
    values, _ = paged(v, 32)
    lengths = torch.full((q.shape[0],), k.shape[2], dtype=torch.int32, device=q.device)
    out = paged_attention(q[:, :, 0].contiguous(), keys, values, table, lengths, scale=CONCH_SCALE)
    return out[:, :, None]


def sage(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    from sageattention import sageattn

    return sageattn(q, k.clone(), v, is_causal=causal)  # it smooths k in place


def cases(dtype: str, method: Attention) -> list[Case]:
    if method is conch_paged:
        return [
            Case(
                batch=3,
                heads=4,
                kv_heads=2,
                q_len=1,
                kv_len=70,
                head_dim=64,
                scale=CONCH_SCALE,
                dtype=dtype,
                seed=5,
            )
        ]
    if method is conch_varlen:
        shape: dict[str, Any] = {"batch": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "scale": CONCH_SCALE}
        return [
            Case(q_len=70, kv_len=70, causal="bottom-right", dtype=dtype, **shape),
            Case(q_len=33, kv_len=70, dtype=dtype, **shape),
        ]
    if method is fla_parallel:
        return [
            Case(heads=4, kv_heads=2, q_len=n, kv_len=n, head_dim=32, causal="bottom-right", dtype=dtype)
            for n in (80, 64)
        ]
    return [
        Case(heads=2, q_len=n, kv_len=n, head_dim=64, causal="bottom-right", dtype=dtype) for n in (128, 100)
    ]


#: What a kernel does not do in the dtype of its inputs: it is judged as what it is.
def declared(method: Attention, dtype: str) -> numerics.Numerics:
    given = numerics.for_dtype(dtype)
    if dtype == "fp32" and method is fla_parallel:
        return given.replace(operand="tf32", p="tf32")  # tl.dot without a precision
    if method in (conch_varlen, conch_paged):
        if dtype == "fp32":
            return given.replace(operand="tf32", p="tf32")
        # Accumulator, running maximum and log-sum-exp are kept in the dtype of the inputs.
        return given.replace(acc=dtype, score=dtype, p=dtype, lse=dtype, dp=dtype)
    return given


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "method", [flash_attention_triton, fla_parallel, conch_varlen, conch_paged], ids=lambda m: m.__name__
)
def test_forward_is_as_accurate_as_its_numerics_allow(method: Attention, dtype: str) -> None:
    if dtype == "bf16" and method in (conch_varlen, conch_paged):
        pytest.skip("no envelope for an accumulator of bf16: see test_sums_kept_in_bf16")
    for case in cases(dtype, method):
        inputs = case.tensors()
        given = [x.cuda() for x in (inputs.q, inputs.k, inputs.v)]
        judged, wanted = case, declared(method, dtype)
        if method is flash_attention_triton and dtype != "fp16":
            # It converts everything to fp16, computes, and converts back: judged as the fp16 kernel that it is.
            judged = Case.from_dict({**case.to_dict(), "dtype": "fp16"})
            inputs = type(inputs)(*(x.to(torch.float16) for x in (inputs.q, inputs.k, inputs.v)))
            wanted = numerics.for_dtype("fp16")
        out = method(*given, case.causal != "none").cpu()
        if judged is not case:
            out = out.to(torch.float16)
            if dtype == "bf16":
                wanted = wanted.replace(output="bf16")
                out = out.to(torch.bfloat16)
        verdict = judge_output(judged, inputs, Output(out, None), wanted, method=method.__name__)
        assert verdict.outcome is Outcome.PASS, f"{verdict.outcome}: {verdict.message}"


@pytest.mark.parametrize("method", [conch_varlen, conch_paged], ids=lambda m: m.__name__)
def test_sums_kept_in_bf16(method: Attention, close: Any, references: ModuleType) -> None:
    for case in cases("bf16", method):
        inputs = case.tensors()
        out = method(*(x.cuda() for x in (inputs.q, inputs.k, inputs.v)), case.causal != "none")
        exact = references.softmax_attention(
            *(x.double() for x in (inputs.q, inputs.k, inputs.v)),
            causal=case.causal != "none",
            scale=CONCH_SCALE,
        )
        # A rounding of maximum, weights, sum, rescaled output and output in each of the three blocks.
        close("conch", "output", out, exact, "bf16", 6)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_an_accumulator_of_16_bits_is_noticed(dtype: str) -> None:
    """conch's kernel is not as accurate as one that accumulates in fp32, which is what the judge expects of an unknown one."""
    case = cases(dtype, conch_varlen)[0]
    inputs = case.tensors()
    out = conch_varlen(*(x.cuda() for x in (inputs.q, inputs.k, inputs.v)), True).cpu()
    verdict = judge_output(case, inputs, Output(out, None), numerics.for_dtype(dtype))
    assert verdict.outcome in (Outcome.INACCURATE, Outcome.BIASED), verdict.message


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [128, 100])
def test_gradients_of_flash_attention_triton(
    length: int, dtype: str, compare: Any, references: ModuleType
) -> None:
    x = [torch.randn(1, 2, length, 64, dtype=torch.float64) for _ in range(3)]
    # fp32 inputs become fp16: its unit roundoff is that of tf32.
    compare(
        "flash-attention-triton",
        lambda q, k, v: flash_attention_triton(q, k, v, True),
        lambda q, k, v: references.softmax_attention(q, k, v, causal=True),
        dtype, *x, roundings=2, dot="tf32", names="qkv",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_fla_parallel_attention(dtype: str, compare: Any, references: ModuleType) -> None:
    x = [torch.randn(1, 80, h, 32, dtype=torch.float64) for h in (4, 2, 2)]
    from fla.ops.attn.parallel import parallel_attn

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return references.softmax_attention(*(t.transpose(1, 2) for t in (q, k, v)), causal=True).transpose(
            1, 2
        )

    compare("fla-core", parallel_attn, reference, dtype, *x, roundings=2, dot="tf32", names="qkv")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "causal"), [(128, False), (128, True), (100, True)])
def test_sageattention_is_right_to_its_int8_scores(
    length: int, causal: bool, dtype: str, close: Any, references: ModuleType
) -> None:
    q, k, v = (torch.randn(1, 2, length, 64, dtype=torch.float64).to(TORCH_DTYPE[dtype]) for _ in range(3))
    out = sage(q.cuda(), k.cuda(), v.cuda(), causal)
    exact = references.softmax_attention(q.double(), k.double(), v.double(), causal=causal)
    # q and k have 8 bits: a rounding of each score's terms by 1/254 of a block's largest value, about 1/60 of the values.
    # Scores are then off by about 0.01 in the root mean square, and so are the weights.
    close("sageattention", "output", out, exact, "bf16", 5)


def test_sageattention_counts_keys_beyond_the_end_where_it_has_no_mask(references: ModuleType) -> None:
    """A fault of the kernel, not of its emulation: without `causal`, keys that pad the last block get weight exp2(0 - max)."""
    q, k, v = (torch.randn(1, 2, 100, 64, dtype=torch.float64).to(torch.float16) for _ in range(3))
    out = sage(q.cuda(), k.cuda(), v.cuda(), False).cpu().double()
    exact = references.softmax_attention(q.double(), k.double(), v.double(), causal=False)
    assert (out - exact).norm() / exact.norm() > 0.05
