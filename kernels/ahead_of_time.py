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

from effattn.kernels.launch import Launch

_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
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
    cubin: bytes  #: the binary


def compile_launch(launch: Launch, capability: int, *, aligned: bool = True) -> Usage:
    """Compile a launch's kernel for a compute capability, specialised as Triton's JIT would for its arguments.

    The tensors may be on the meta device. aligned: they start at multiples of 16 bytes, and every stride and size that
    is a multiple of 16 is known to be one; else nothing is known.
    """
    kernel = launch.kernel
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name, value = parameter.name, launch.arguments[parameter.name]
        specialised = not parameter.do_not_specialize
        is_one = type(value) is int and value == 1 and specialised and aligned
        if parameter.is_constexpr or value is None or is_one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if aligned and specialised and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options=launch.options,
    )
    cubin = compiled.asm["cubin"]
    registers, stack = _registers_and_stack(cubin)
    return Usage(
        shared=compiled.metadata.shared,
        registers=registers,
        stack=stack,
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )


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
