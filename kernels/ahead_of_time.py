"""Compiles the kernels for GPUs that are not here: does a configuration compile, and what does it take?"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effattn.kernels import flash_attention
from effattn.kernels.arguments import Problem

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_TENSORS = ("q", "k", "v", "out")
_LAST_STRIDES = ("q_stride_d", "k_stride_d", "v_stride_d")
#: most bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide,
#: table "Technical Specifications per Compute Capability")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a compiled kernel takes."""

    shared: int  #: bytes of shared memory a block
    registers: int  #: a thread
    stack: int  #: bytes of local memory a thread: spilled registers, if more than 0
    ptx: str  #: the assembly, to look for instructions in


def compile_forward(
    capability: int,
    *,
    dtype: torch.dtype,
    head_dim: int,
    v_dim: int | None = None,
    aligned: bool = True,
    input_precision: str = "ieee",
    scale: float = 1.0,
    wide: bool = False,
) -> Usage:
    """Compile the forward kernel, with the block sizes that it would run with, for a compute capability.

    aligned: contiguous tensors whose rows start at multiples of 16 bytes; else nothing is known about
    strides.
    """
    v_dim = head_dim if v_dim is None else v_dim
    cut = flash_attention.tiles(head_dim, v_dim, dtype, "cuda")
    problem = Problem(
        batch=1, heads=1, kv_heads=1, q_len=1, kv_len=1, head_dim=head_dim, v_dim=v_dim, causal_shift=1,
        scale=scale, input_precision=input_precision,
    )  # fmt: skip
    constants: dict[str, Any] = flash_attention.constants(
        problem, block_m=cut.block_m, block_n=cut.block_n, wide=wide
    )
    if aligned:
        constants |= dict.fromkeys(_LAST_STRIDES, 1)
    kernel = flash_attention.forward_kernel_gpu
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = f"*{_TYPES[dtype]}" if name in _TENSORS else "*fp32" if name == "lse" else None
        signature[name] = pointer or ("fp32" if name == "scale_log2" else "i32")
        divisible = {"head_dim": head_dim % 16 == 0, "v_dim": v_dim % 16 == 0}.get(name, aligned)
        if divisible and (pointer or "stride" in name or name in ("head_dim", "v_dim")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=cut.options,
    )
    registers, stack = _registers_and_stack(compiled.asm["cubin"])
    return Usage(shared=compiled.metadata.shared, registers=registers, stack=stack, ptx=compiled.asm["ptx"])


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Read from the binary by the `cuobjdump` that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {done.stdout}{done.stderr}")
    return int(found[1]), int(found[2])
