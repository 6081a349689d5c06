"""Linear attention, state-space and delta-rule kernels of fla-core and lightning-attn, against the recurrence in float64."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

DTYPES = ("fp16", "bf16", "fp32")
BATCH, TIME, HEADS, DIM = 1, 80, 2, 32  # 80: a whole chunk of 64 and a part

Kernel = Callable[..., Any]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(normal(BATCH, TIME, HEADS, DIM) for _ in range(3))


def unit_keys() -> tuple[torch.Tensor, ...]:
    """The delta rule is stable for keys of norm 1."""
    q, k, v = qkv()
    return q, F.normalize(k, dim=-1), v


def gates(*shape: int) -> torch.Tensor:
    return F.logsigmoid(normal(*shape))


def kernel(path: str, **options: Any) -> Kernel:
    module, _, name = path.partition(":")

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        out = getattr(importlib.import_module(f"fla.ops.{module}"), name)(*inputs, **options)
        return out[0] if isinstance(out, tuple) else out

    return call


def retention_decay(x: torch.Tensor) -> torch.Tensor:
    rates = torch.log1p(-(2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))))
    return rates.to(x.dtype).expand(x.shape[0], x.shape[1], HEADS)


#: name -> (kernel, inputs, reference, roundings on the way, whether it multiplies tiles: in fp32 these are tf32)
KERNELS: dict[str, tuple[str, dict[str, Any], str, float, bool]] = {
    "chunk_linear_attn": ("linear_attn:chunk_linear_attn", {"normalize": False}, "linear", 2, True),
    "fused_chunk_linear_attn": (
        "linear_attn:fused_chunk_linear_attn",
        {"normalize": False},
        "linear",
        2,
        True,
    ),
    "fused_recurrent_linear_attn": (
        "linear_attn:fused_recurrent_linear_attn",
        {"normalize": False},
        "linear",
        1,
        False,
    ),
    "chunk_retention": ("retention:chunk_retention", {}, "retention", 2, True),
    "parallel_retention": ("retention:parallel_retention", {}, "retention", 2, True),
    "fused_recurrent_retention": ("retention:fused_recurrent_retention", {}, "retention", 1, False),
    "chunk_simple_gla": ("simple_gla:chunk_simple_gla", {}, "scalar decay", 2, True),
    "parallel_simple_gla": ("simple_gla:parallel_simple_gla", {}, "scalar decay", 3, True),
    "fused_recurrent_simple_gla": ("simple_gla:fused_recurrent_simple_gla", {}, "scalar decay", 1, False),
    "chunk_gla": ("gla:chunk_gla", {}, "vector decay", 2, True),
    "fused_recurrent_gla": ("gla:fused_recurrent_gla", {}, "vector decay", 1, False),
    "chunk_rwkv6": ("rwkv6:chunk_rwkv6", {"scale": 1.0}, "rwkv6", 2, True),
    "fused_recurrent_rwkv6": ("rwkv6:fused_recurrent_rwkv6", {"scale": 1.0}, "rwkv6", 1, False),
    "chunk_delta_rule": ("delta_rule:chunk_delta_rule", {}, "delta", 3, True),
    "fused_recurrent_delta_rule": ("delta_rule:fused_recurrent_delta_rule", {}, "delta", 1, False),
    "chunk_gated_delta_rule": ("gated_delta_rule:chunk_gated_delta_rule", {}, "gated delta", 3, True),
    "chunk_kda": ("kda:chunk_kda", {}, "kda", 3, True),
    "chunk_hgrn": ("hgrn:chunk_hgrn", {}, "hgrn", 1, False),
    "fused_recurrent_hgrn": ("hgrn:fused_recurrent_hgrn", {}, "hgrn", 1, False),
    "parallel_forgetting_attn": (
        "forgetting_attn.parallel:parallel_forgetting_attn",
        {},
        "forgetting",
        2,
        True,
    ),
    "parallel_based": ("based:parallel_based", {"use_norm": True}, "based", 2, False),
}


def setting(kind: str, ref: ModuleType) -> tuple[tuple[torch.Tensor, ...], Kernel]:
    """Inputs and reference of one kind of recurrence."""
    beta = normal(BATCH, TIME, HEADS).sigmoid()
    if kind == "linear":
        return qkv(), ref.recurrence
    if kind == "retention":
        return qkv(), lambda q, k, v: ref.recurrence(q, k, v, retention_decay(q))
    if kind == "scalar decay":
        return (*qkv(), gates(BATCH, TIME, HEADS)), ref.recurrence
    if kind == "vector decay":
        return (*qkv(), gates(BATCH, TIME, HEADS, DIM)), ref.recurrence
    if kind == "rwkv6":
        inputs = (*qkv(), gates(BATCH, TIME, HEADS, DIM), normal(HEADS, DIM))
        return inputs, lambda q, k, v, w, u: ref.recurrence(q, k, v, w, bonus=u, scale=1.0)
    if kind == "delta":
        return (*unit_keys(), beta), lambda q, k, v, b: ref.recurrence(q, k, v, None, b)
    if kind == "gated delta":
        return (*unit_keys(), gates(BATCH, TIME, HEADS), beta), ref.recurrence
    if kind == "kda":
        return (*unit_keys(), gates(BATCH, TIME, HEADS, DIM), beta), ref.recurrence
    if kind == "hgrn":
        return (normal(BATCH, TIME, 64), gates(BATCH, TIME, 64)), ref.gated_recurrence
    if kind == "forgetting":
        return (*qkv(), gates(BATCH, TIME, HEADS)), ref.forgetting_attention
    assert kind == "based"
    q, k = (normal(BATCH, TIME, HEADS, 16) for _ in range(2))
    options = {"constant": 1.0, "linear": 1.0, "square": 0.5, "eps": 1e-6}
    return (q, k, normal(BATCH, TIME, HEADS, DIM)), lambda *x: ref.polynomial_attention(*x, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KERNELS)
def test_fla_computes_the_recurrence_and_its_gradients(
    name: str, dtype: str, compare: Any, references: ModuleType
) -> None:
    path, options, kind, roundings, tiles = KERNELS[name]
    torch.manual_seed(1)
    inputs, reference = setting(kind, references)
    if name == "chunk_delta_rule" and dtype == "fp32":
        with pytest.raises(AssertionError, match="does not support float32"):
            kernel(path, **options)(*(x.float().cuda() for x in inputs))
        return
    compare(
        "fla-core",
        kernel(path, **options),
        reference,
        dtype,
        *inputs,
        roundings=roundings,
        dot="tf32" if tiles else "fp32",
        # The gradient of a scalar decay sums q dq - k dk over all later steps.
        cancelling=[3] if kind == "scalar decay" else [],
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_fla_gated_delta_rule_step_by_step(dtype: str, compare: Any, references: ModuleType) -> None:
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    inputs, reference = setting("gated delta", references)
    compare(
        "fla-core",
        lambda q, k, v, g, beta: fused_recurrent_gated_delta_rule(q, k, v, g, beta=beta)[0],
        reference, dtype, *inputs, roundings=1, grads=False,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [True, False], ids=["decay", "no decay"])
def test_lightning_attention(decay: bool, dtype: str, compare: Any, references: ModuleType) -> None:
    from lightning_attn.ops.triton import lightning_attn2, lightning_attn2_no_decay

    slopes = torch.tensor([0.05, 0.2])[: 2 if decay else 0]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not decay:
            return lightning_attn2_no_decay(q, k, v)
        return lightning_attn2(q, k, v, slopes.view(2, 1, 1).cuda())

    def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        rates = None
        if decay:
            rates = -slopes.double().expand(q.shape[0], q.shape[1], 2)
        return references.recurrence(q, k, v, rates, scale=1.0).transpose(1, 2)

    x = [normal(1, 2, 128, 32) for _ in range(3)]
    compare("lightning-attn", run, reference, dtype, *x, roundings=2, dot="tf32", names="qkv")
