"""The FlashAttention kernel compiled for GPUs that are not here: no spills, the right products, wide loads.

It is not among the tests of Triton's other versions: what a compiler makes of a kernel is its own. 3.8 spills
registers of the widest fp32 kernel here, say, which 3.9 does not.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from effattn.kernels import ahead_of_time
from effattn.kernels.arguments import Extras, check_numbers, problem_of
from effattn.kernels.flash_forward import forward_launch

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def usage_of(
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    *,
    v_dim: int | None = None,
    aligned: bool = True,
    **options: Any,
) -> ahead_of_time.Usage:
    """What the forward kernel takes with the block sizes that it would run with."""
    q = torch.empty(1, 2, 64, head_dim, dtype=dtype, device="meta")
    v = q if v_dim is None else torch.empty(1, 2, 64, v_dim, dtype=dtype, device="meta")
    numbers = check_numbers(head_dim, **options)
    launch = forward_launch(
        problem_of(q, q, v, **numbers._asdict()),
        q,
        q,
        v,
        Extras(),
        torch.empty_like(v),
        q[..., 0].float(),
        device_type="cuda",
    )
    return ahead_of_time.compile_launch(launch, capability, aligned=aligned)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(("kind", "head_dim"), [("bf16", 64), ("fp32", 64)])
def test_compiles_for_a_gpu_without_spilling(capability: int, kind: str, head_dim: int) -> None:
    usage = usage_of(capability, TORCH_DTYPES[kind], head_dim)
    assert 0 < usage.shared <= ahead_of_time.SHARED_LIMIT[capability]
    assert usage.spills == 0
    if kind != "fp32":
        assert {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability] in usage.ptx
    else:
        # IEEE products of fp32 have no tensor core to run on, and must not be rounded to tf32 to get one.
        assert not re.search(r"mma|tf32", usage.ptx)
    wide = r"cp\.async\.cg\.shared\.global .*, 0x10" if kind != "fp32" else r"ld\.global\.v4\.b32"
    assert re.search(wide, usage.ptx), "rows are not loaded 16 bytes at a time"


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float16, "head_dim": 256},
        {"dtype": torch.float32, "head_dim": 256},
        {"dtype": torch.float32, "head_dim": 64, "input_precision": "tf32"},
        {"dtype": torch.float16, "head_dim": 20, "v_dim": 7, "aligned": False, "scale": -1.0},
    ],
    ids=["widest 16 bit", "widest fp32", "tf32", "nothing known"],
)
def test_other_configurations_compile_for_hopper(options: dict[str, Any]) -> None:
    usage = usage_of(90, **options)
    assert 0 < usage.shared <= ahead_of_time.SHARED_LIMIT[90]
    assert usage.spills == 0
    assert ("tf32" in usage.ptx) == (options.get("input_precision") == "tf32")
