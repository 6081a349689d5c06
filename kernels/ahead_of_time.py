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
#: the same table: bytes of shared memory of a multiprocessor, of which each block takes 1 KB more than it asked for;
#: registers, which a warp takes in units of 256; warps and blocks that are resident at once
SHARED_OF_ALL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
#: instructions that multiply matrices, in PTX
_PRODUCTS = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a compiled kernel takes."""

    shared: int  #: bytes of shared memory a block
    registers: int  #: a thread
    spills: int  #: instructions that move registers to local memory and back, for want of registers
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
    registers, spills = _registers_and_spills(cubin)
    return Usage(
        shared=compiled.metadata.shared,
        registers=registers,
        spills=spills,
        ptx=compiled.asm["ptx"],
        cubin=cubin,
    )


def resident_blocks(usage: Usage, warps: int, capability: int) -> int:
    """How many blocks of so many warps a multiprocessor has room for."""
    of_a_warp = -(-usage.registers * 32 // 256) * 256
    by_registers = REGISTERS // of_a_warp // warps
    by_shared = SHARED_OF_ALL[capability] // (usage.shared + 1024)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


def products(usage: Usage) -> str:
    """Which instructions multiply matrices, by what they are called in PTX; "fma" where none does."""
    found = [name for name, instruction in _PRODUCTS.items() if instruction in usage.ptx]
    return "+".join(found) or "fma"


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Read from the binary by the `cuobjdump` that comes with Triton.

    What a thread has of local memory says less: a frame of 8 bytes that nothing is written to is no spill.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+)", done.stdout + done.stderr)
    if found is None or "EXIT" not in done.stdout:
        raise RuntimeError(f"cuobjdump names no registers, or no instructions: {done.stdout}{done.stderr}")
    # Kernels of Triton have no arrays and no calls, so local memory is stored to and loaded from for nothing else.
    return int(found[1]), len(re.findall(r"\b(?:STL|LDL)\b", done.stdout))
