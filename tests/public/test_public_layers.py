"""What stands around attention: norms, rotary embeddings, activations, losses, of four packages."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from triton.compiler.errors import CompilationError

DTYPES = ("fp16", "bf16", "fp32")
TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def liger(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), f"Liger{name}Function").apply


@pytest.mark.parametrize("dtype", DTYPES)
class TestLiger:
    def test_rms_norm(self, dtype: str, compare: Any, references: ModuleType) -> None:
        run = liger("rms_norm", "RMSNorm")
        compare(
            "liger-kernel",
            lambda x, w: run(x, w, 1e-6),
            references.rms_norm,
            dtype,
            normal(40, 96),
            normal(96),
            roundings=2,
        )

    def test_layer_norm(self, dtype: str, compare: Any) -> None:
        run = liger("layer_norm", "LayerNorm")
        x = (normal(40, 96), normal(96), normal(96))
        compare(
            "liger-kernel",
            lambda *a: run(*a, 1e-5),
            lambda a, w, b: F.layer_norm(a, (96,), w, b, 1e-5),
            dtype,
            *x,
            roundings=2,
        )

    def test_softmax(self, dtype: str, compare: Any) -> None:
        # The gradient starts from the rounded output: a second rounding, of values that cancel.
        compare(
            "liger-kernel",
            liger("softmax", "Softmax"),
            lambda x: x.softmax(-1),
            dtype,
            normal(40, 100),
            roundings=1,
            grad_roundings=3,
        )

    def test_sparsemax(self, dtype: str, compare: Any, references: ModuleType) -> None:
        run = liger("sparsemax", "Sparsemax")
        compare(
            "liger-kernel", lambda x: run(x, -1), references.sparsemax, dtype, normal(10, 64), roundings=1
        )

    def test_rope(self, dtype: str, compare: Any, references: ModuleType) -> None:
        angle = references.angles(50, 64).repeat(1, 2)[None]
        cos, sin = (x.to(TORCH_DTYPE[dtype]) for x in (angle.cos(), angle.sin()))

        def reference(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(references.rotate(x, cos.double()[:, None], sin.double()[:, None]) for x in (q, k))

        run = liger("rope", "Rope")
        x = (normal(2, 4, 50, 64), normal(2, 2, 50, 64))
        compare(
            "liger-kernel", lambda q, k: run(q, k, cos.cuda(), sin.cuda()), reference, dtype, *x, roundings=3
        )

    def test_swiglu(self, dtype: str, compare: Any, references: ModuleType) -> None:
        x = (normal(40, 96), normal(40, 96))
        compare("liger-kernel", liger("swiglu", "SiLUMul"), references.swiglu, dtype, *x, roundings=2)

    def test_geglu(self, dtype: str, compare: Any, references: ModuleType) -> None:
        x = (normal(40, 96), normal(40, 96))
        compare("liger-kernel", liger("geglu", "GELUMul"), references.geglu, dtype, *x, roundings=2)

    def test_cross_entropy(self, dtype: str, compare: Any) -> None:
        target = torch.randint(0, 100, (40,))
        run = liger("cross_entropy", "CrossEntropy")
        compare(
            "liger-kernel",
            lambda x: run(x.clone(), target.cuda(), None)[0],  # it writes the gradient over its input
            lambda x: F.cross_entropy(x, target),
            dtype, normal(40, 100), roundings=2,
        )  # fmt: skip

    def test_group_norm(self, dtype: str, compare: Any) -> None:
        run = liger("group_norm", "GroupNorm")

        def kernel(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            out = run(x, w, b, 8, 4, 1e-5)
            return out[0] if isinstance(out, tuple) else out

        x = (normal(3, 8, 40), normal(8), normal(8))
        # The gradients of weight and bias are summed over the batch in their own dtype, by atomics.
        compare(
            "liger-kernel",
            kernel,
            lambda a, w, b: F.group_norm(a, 4, w, b, 1e-5),
            dtype,
            *x,
            roundings=2,
            grad_roundings=8,
        )

    def test_neighborhood_attention(self, dtype: str, compare: Any) -> None:
        run = liger("fused_neighborhood_attention", "FusedNeighborhoodAttention")
        size = 7

        def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
            i = torch.arange(q.shape[2])
            far = (i[:, None] - i[None, :]).abs() > size // 2
            return s.masked_fill(far, -torch.inf).softmax(-1) @ v

        x = [normal(1, 2, 40, 32) for _ in range(3)]
        compare(
            "liger-kernel",
            lambda q, k, v: run(q, k, v, size, 1),
            reference,
            dtype,
            *x,
            roundings=3,
            dot="tf32",
        )


@pytest.mark.parametrize("dtype", DTYPES)
class TestConch:
    def test_rms_norm(self, dtype: str, compare: Any, references: ModuleType) -> None:
        from conch.ops.normalization.rms_norm import rms_norm

        compare(
            "conch",
            lambda x, w: rms_norm(x, w, 1e-6),
            references.rms_norm,
            dtype,
            normal(40, 96),
            normal(96),
            roundings=2,
            grads=False,
        )

    def test_fused_add_rms_norm(self, dtype: str, compare: Any, references: ModuleType) -> None:
        from conch.ops.normalization.rms_norm import fused_add_rms_norm

        def reference(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return references.rms_norm(x + r, w), x + r

        x = (normal(40, 96), normal(40, 96), normal(96))
        compare(
            "conch",
            lambda a, r, w: fused_add_rms_norm(a, r, w, 1e-6),
            reference,
            dtype,
            *x,
            roundings=3,
            grads=False,
        )

    def test_rotary_embedding(self, dtype: str, compare: Any, references: ModuleType) -> None:
        from conch.ops.embedding.rotary_embedding import rotary_embedding

        angle = references.angles(50, 64)
        table = torch.cat([angle.cos(), angle.sin()], -1).to(TORCH_DTYPE[dtype])
        positions = torch.randint(0, 50, (30,))

        def reference(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, ...]:
            cos, sin = (x.double()[positions].repeat(1, 2)[:, None] for x in table.chunk(2, -1))
            return tuple(references.rotate(x.view(30, -1, 64), cos, sin).reshape(x.shape) for x in (q, k))

        x = (normal(30, 4 * 64), normal(30, 2 * 64))
        compare(
            "conch",
            lambda q, k: rotary_embedding(positions.cuda(), q, k, 64, table.cuda()),
            reference, dtype, *x, roundings=3, grads=False,
        )  # fmt: skip

    @pytest.mark.parametrize(("name", "activation"), [("silu_and_mul", F.silu), ("gelu_tanh_and_mul", None)])
    def test_activations(
        self, name: str, activation: Any, dtype: str, compare: Any, references: ModuleType
    ) -> None:
        run = getattr(importlib.import_module(f"conch.ops.activation.{name}"), name)
        if activation is None and dtype != "fp32":
            # Triton's own refusal, on any GPU of NVIDIA: its tanh has no 16-bit version.
            with pytest.raises(CompilationError, match=r"libdevice\.tanh"):
                run(normal(20, 2 * 96).to(TORCH_DTYPE[dtype]).cuda())
            return
        formula = references.swiglu if activation is not None else references.geglu
        compare(
            "conch",
            run,
            lambda x: formula(*x.chunk(2, -1)),
            dtype,
            normal(20, 2 * 96),
            roundings=2,
            grads=False,
        )


@pytest.mark.parametrize("dtype", DTYPES)
class TestFla:
    def test_rms_norm(self, dtype: str, compare: Any, references: ModuleType) -> None:
        from fla.modules.norm.layernorm import rms_norm

        x = (normal(40, 96), normal(96))
        compare(
            "fla-core",
            lambda a, w: rms_norm(a, w, None, eps=1e-6),
            references.rms_norm,
            dtype,
            *x,
            roundings=2,
        )

    def test_rotary(self, dtype: str, compare: Any, references: ModuleType) -> None:
        from fla.modules.rotary import rotary_embedding

        angle = references.angles(50, 64)
        cos, sin = (x.to(TORCH_DTYPE[dtype]) for x in (angle.cos(), angle.sin()))

        def reference(x: torch.Tensor) -> torch.Tensor:
            return references.rotate(x, *(t.double().repeat(1, 2)[None, :, None] for t in (cos, sin)))

        compare(
            "fla-core",
            lambda x: rotary_embedding(x, cos.cuda(), sin.cuda()),
            reference,
            dtype,
            normal(2, 50, 3, 64),
            roundings=2,
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_lightning_srms_norm(dtype: str, compare: Any, references: ModuleType) -> None:
    from lightning_attn.ops.triton import SimpleRMSNorm

    norm = SimpleRMSNorm(96)
    compare(
        "lightning-attn",
        norm,
        lambda x: references.rms_norm(x, eps=norm.eps),
        dtype,
        normal(40, 96),
        roundings=2,
    )
