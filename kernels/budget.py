"""What the kernels take on GPUs that are not here: `python -m effattn.kernels.budget --out tests/kernels_budget.toml`.

Each configuration is compiled for compute capability 80, 90 and 100, with the blocks that it would run with; what it takes
goes into a TOML file. The command fails if one of them spills registers or takes more shared memory than there is.
Triton's cache keeps what is compiled, so a second run compiles what has changed.

A configuration is a kernel, a dtype, a head_dim, a set of options and a compute capability. Options:

    plain   a causal mask; rows lie as torch lays them out, so that loads are as wide as they can be
    packed  flash_attention_varlen with a window and sinks; nothing is known of strides; head_dim is odd
    rich    a causal window, a cap, ALiBi and a bias
    all     rich, and a mask, dropout, lengths and sinks; nothing is known of strides; head_dim is odd
    paged   decoding from pages, with a window, a cap and ALiBi; nothing is known of strides; head_dim is odd

An odd head_dim is 3 less than the one named, and compiled to the same blocks with their columns masked.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from effattn.errors import RequestError
from effattn.kernels import ahead_of_time, linear_attention
from effattn.kernels.arguments import Extras, Problem, check_numbers, problem_of
from effattn.kernels.decode import SPLIT_SIZE, decode_launches
from effattn.kernels.flash_backward import backward_launches
from effattn.kernels.flash_bias import bias_launch
from effattn.kernels.flash_forward import forward_launch
from effattn.kernels.launch import Launch

CAPABILITIES = (80, 90, 100)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = (16, 32, 64, 128, 256)
#: kernel -> the options that it is compiled with; head_dim is v_dim in the last four, which turn inputs into fp32
KERNELS: dict[str, tuple[str, ...]] = {
    "forward": ("plain", "packed", "rich", "all"),
    "keys": ("plain", "packed", "rich", "all"),
    "queries": ("plain", "packed", "rich", "all"),
    "bias": ("rich", "all"),
    "delta": ("plain", "packed"),
    "decode": ("plain", "paged"),
    "merge": ("plain",),
    "states": ("plain",),
    "later": ("plain",),
    "outputs": ("plain",),
    "gradients": ("plain",),
}
#: options with which nothing is known of strides and sizes
UNALIGNED = ("packed", "all", "paged")
_LINEAR = ("states", "later", "outputs", "gradients")
_HEADS, _KV_HEADS, _LENGTH = 4, 2, 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A line of the file."""

    blocks: str  #: queries x keys, and x features for linear attention
    warps: int
    stages: int
    shared: int  #: bytes of shared memory of a block
    registers: int  #: of a thread
    spills: int  #: instructions that move registers to local memory and back
    resident: int  #: blocks that fit one multiprocessor
    occupancy: int  #: per cent of the warps that it has room for
    products: str  #: the instruction that multiplies matrices


def names(*, every: bool = False) -> list[str]:
    """All configurations of the file, or every one that there is: kernel-dtype-head_dim-options-capability.

    The file leaves out most of what others show as well, since each takes seconds to a minute: the blocks and instructions of
    fp16 are those of bf16; a smaller head_dim needs fewer registers; linear attention turns its inputs into fp32. That none
    of those spills is not certain, so `--every` compiles them all when blocks change. For every
    compute capability it has each kernel with head_dim 64 and 256 and those options with which a set of blocks is most
    short of registers; for 90 also the others, and the forward kernel of 128.
    """
    return [
        "-".join(map(str, (kernel, dtype, dim, option, capability)))
        for kernel, options in KERNELS.items()
        for dtype, dim, option, capability in itertools.product(DTYPES, HEAD_DIMS, options, CAPABILITIES)
        if every or _in_file(kernel, dtype, dim, option, capability)
    ]


def _in_file(kernel: str, dtype: str, dim: int, option: str, capability: int) -> bool:
    if dim < 64 or (kernel in _LINEAR and dtype != "fp32") or (dtype == "fp16" and capability != 90):
        return False
    ends = (dim, option) in ((64, "plain"), (256, KERNELS[kernel][-1]))
    if kernel == "forward":
        return ends or (dtype != "fp16" and capability == 90)
    short = option in UNALIGNED or kernel in ("merge", *_LINEAR)
    return dtype != "fp16" and dim != 128 and (short or (ends and capability == 90))


def compiled(name: str) -> ahead_of_time.Usage:
    """Compile one configuration."""
    _kernel, _dtype, _dim, option, capability = name.split("-")
    return ahead_of_time.compile_launch(launch(name), int(capability), aligned=option not in UNALIGNED)


def entry(name: str) -> Entry:
    """Compile one configuration and say what it takes."""
    capability = int(name.rpartition("-")[2])
    made, usage = launch(name), compiled(name)
    warps = made.options["num_warps"]
    resident = ahead_of_time.resident_blocks(usage, warps, capability)
    return Entry(
        **choice(made),
        shared=usage.shared,
        registers=usage.registers,
        spills=usage.spills,
        resident=resident,
        occupancy=round(100 * resident * warps / ahead_of_time.WARPS),
        products=ahead_of_time.products(usage),
    )


def choice(made: Launch) -> dict[str, Any]:
    """How a launch is cut up: the part of an entry that takes no compiler."""
    names = ("CHUNK", "BLOCK_M", "BLOCK_N", "BLOCK_F")
    blocks = "x".join(str(made.arguments[name]) for name in names if name in made.arguments)
    # What Triton takes where a launch says nothing.
    return {"blocks": blocks, "warps": made.options["num_warps"], "stages": made.options.get("num_stages", 3)}


def faults(name: str, found: Entry) -> list[str]:
    """What is wrong with a configuration."""
    limit = ahead_of_time.SHARED_LIMIT[int(name.rpartition("-")[2])]
    wrong = []
    if found.spills:
        wrong.append(f"{name} spills registers, by {found.spills} instructions")
    if found.shared > limit:
        wrong.append(f"{name} takes {found.shared} bytes of shared memory, more than {limit}")
    return wrong


def stale(entries: dict[str, Entry]) -> list[str]:
    """What a file lacks, has too much, or has cut otherwise than the kernels are now; compiles nothing."""
    wrong = [f"{name} is no configuration" for name in entries if name not in names()]
    for name in names():
        if name not in entries:
            wrong.append(f"{name} is missing")
            continue
        given = {key: getattr(entries[name], key) for key in ("blocks", "warps", "stages")}
        if given != (now := choice(launch(name))):
            wrong.append(f"{name} has {given}, now {now}")
    return wrong


def launch(name: str) -> Launch:
    """The launch of a configuration, on tensors without memory."""
    kernel, kind, width, option, _capability = name.split("-")
    dtype, odd = DTYPES[kind], option in UNALIGNED
    dim = int(width) - 3 if odd else int(width)
    if kernel in _LINEAR:
        return _linear(kernel, dtype, dim)
    if kernel in ("decode", "merge"):
        return _decode(kernel, dtype, dim, paged=option == "paged")
    packed = option == "packed"
    batch = 2

    def tensor(heads: int, last: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return _meta(batch, heads, _LENGTH, last, dtype=dtype)

    q, k = tensor(_HEADS, dim), tensor(_KV_HEADS, dim)
    rows = _meta(batch, _HEADS, _LENGTH)
    rich = option in ("rich", "all")
    numbers = check_numbers(
        dim,
        causal=True,
        window=None if option == "plain" else (32, 0),
        softcap=30.0 if rich else None,
        dropout_p=0.1 if option == "all" else 0.0,
    )
    lengths = _meta(batch + packed, dtype=torch.int32) if packed or option == "all" else None
    scores = (batch, _HEADS, _LENGTH, _LENGTH)
    extras = Extras(
        bias=_meta(*scores, dtype=dtype) if rich else None,
        alibi_slopes=_meta(batch, _HEADS) if rich else None,
        mask=_meta(*scores, dtype=torch.uint8) if option == "all" else None,
        sinks=_meta(_HEADS) if odd else None,
        q_lengths=lengths,
        kv_lengths=lengths,
    )
    problem = problem_of(
        q, k, k, packed=packed, lengths=(_LENGTH, _LENGTH) if packed else None, **numbers._asdict()
    )
    if kernel == "forward":
        return forward_launch(problem, q, k, k, extras, q, rows, device_type="cuda")
    if kernel == "bias":
        d_bias = _meta(*scores)
        return bias_launch(problem, q, k, k, extras, rows, rows, q, d_bias, device_type="cuda")
    d_lse = rows if odd else None
    launches = backward_launches(
        problem, q, k, k, extras, q, rows, q, d_lse, rows, q, k, k, device_type="cuda"
    )
    return launches[("delta", "keys", "queries").index(kernel)]


def _decode(kernel: str, dtype: torch.dtype, dim: int, *, paged: bool) -> Launch:
    """8 query heads and 4 queries share a key head: half of the rows that a block may have at most."""
    q, pages = _meta(2, 16, 4, dim, dtype=dtype), _meta(8, 2, 1024, dim, dtype=dtype)
    numbers = check_numbers(
        dim, causal=True, window=(700, 0) if paged else None, softcap=30.0 if paged else None
    )
    kept = {name: value for name, value in numbers._asdict().items() if not name.startswith("dropout")}
    problem: Problem = problem_of(q, pages, pages, lengths=(4, 4096), **kept)
    extras = Extras(
        alibi_slopes=_meta(2, 16) if paged else None,
        kv_lengths=_meta(2, dtype=torch.int32) if paged else None,
        sinks=_meta(16),
    )
    table = _meta(2, 4, dtype=torch.int32) if paged else None
    parts, rows = _meta(8, 2, 16, 4, dim), _meta(8, 2, 16, 4)
    launches = decode_launches(
        problem, q, pages, pages, extras, table, parts, rows, q, rows[0], SPLIT_SIZE, device_type="cuda"
    )
    return launches[("decode", "merge").index(kernel)]


def _linear(kernel: str, dtype: torch.dtype, v_dim: int) -> Launch:
    """256 features; how many there are changes no block."""
    heads, n, features = 4, 1024, 256
    x, v = _meta(heads, n, features, dtype=dtype), _meta(heads, n, v_dim, dtype=dtype)
    chunks = n // linear_attention.tile(v)
    states, sums, column = (
        _meta(heads, chunks, features, v_dim),
        _meta(heads, chunks, features),
        _meta(heads, n),
    )
    if kernel == "states":
        return linear_attention.states_launch(x, v, None, states, sums, reverse=False)
    if kernel == "later":
        return linear_attention.states_launch(x, v.float(), column, states, sums, reverse=True)
    if kernel == "outputs":
        return linear_attention.outputs_launch(x, x, v, states, sums, v, column)
    return linear_attention.gradients_launch(x, x, v, v.float(), column, states, sums, states, sums, x, x, v)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def read(path: Path) -> tuple[str, dict[str, Entry]]:
    """(the version of Triton it was written with, configuration -> entry) of a file."""
    found = tomllib.loads(path.read_text(encoding="utf-8"))
    return found["triton"], {name: Entry(**given) for name, given in found["configurations"].items()}


def write(path: Path, entries: dict[str, Entry]) -> None:
    """Write a file that `read` reads."""
    lines = [
        "# Written by `python -m effattn.kernels.budget`: what each kernel takes on compute capability 80, 90 and 100.",
        "# kernel-dtype-head_dim-options-capability; see kernels/budget.py.",
        f'triton = "{triton.__version__}"',
        "",
        "[configurations]",
        *(line(name, given) for name, given in entries.items()),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def line(name: str, given: Entry) -> str:
    """An entry as TOML."""
    fields = (
        f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
        for key, value in asdict(given).items()
    )
    return f'"{name}" = {{ {", ".join(fields)} }}'


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m effattn.kernels.budget",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--every", action="store_true", help="compile also what the file leaves out")
    parser.add_argument("--only", default="", help="only the configurations whose name contains this")
    parser.add_argument("--out", type=Path, help="write what was measured to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compile as many at a time")
    given = parser.parse_args(arguments)
    chosen = [name for name in names(every=given.every) if given.only in name]
    if not chosen:
        raise RequestError(f"no configuration's name contains {given.only!r}; one is {names()[0]}")
    if given.out and (given.only or given.every):
        raise RequestError("--out writes the file's own configurations; leave --only and --every out")
    entries: dict[str, Entry] = {}
    # Triton keeps state for each process, so threads would wait for each other.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
        for name, found in zip(chosen, pool.map(entry, chosen), strict=True):
            entries[name] = found
            print(line(name, found), flush=True)
    if given.out:
        write(given.out, entries)
    wrong = [fault for name, found in entries.items() for fault in faults(name, found)]
    for fault in wrong:
        print(fault, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
