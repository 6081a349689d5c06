"""What the kernels take on GPUs that are not here: `python -m effattn.kernels.budget`.

Each configuration is compiled for compute capability 80, 90 and 100, with the blocks that it would run with, and its
shared memory, registers and spilled bytes are written to a TOML file with a hash of the kernels' sources. It fails if one
of them spills or takes more shared memory than there is. All of them take a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from pathlib import Path

import torch

from effattn.kernels import ahead_of_time
from effattn.kernels.arguments import Extras, check_numbers, problem_of
from effattn.kernels.flash_backward import backward_launches
from effattn.kernels.flash_forward import forward_launch
from effattn.kernels.launch import Launch

CAPABILITIES = (80, 90, 100)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
HEAD_DIMS = (64, 128, 256)
#: "plain": a causal mask; "rich": a window, a cap, ALiBi and a bias on top
OPTIONS = ("plain", "rich")
KERNELS = ("forward", "keys", "queries")
#: modules whose text decides what is compiled
SOURCES = ("mask", "logits", "loads", "dropout", "launch", "tiles", "flash_forward", "flash_backward")


def names() -> list[str]:
    """All configurations: kernel-dtype-head_dim-options-capability."""
    every = itertools.product(KERNELS, DTYPES, HEAD_DIMS, OPTIONS, CAPABILITIES)
    return ["-".join(map(str, parts)) for parts in every]


def sources_hash() -> str:
    """Changes when a kernel does."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


def usage(name: str) -> ahead_of_time.Usage:
    """Compile one configuration."""
    kernel, dtype, head_dim, options, capability = name.split("-")
    return ahead_of_time.compile_launch(
        launch_of(kernel, DTYPES[dtype], int(head_dim), options == "rich"), int(capability)
    )


def launch_of(kernel: str, dtype: torch.dtype, head_dim: int, rich: bool) -> Launch:
    """The launch of a kernel for a GPU, on tensors without memory."""
    q = torch.empty(1, 2, 64, head_dim, dtype=dtype, device="meta")
    lse = torch.empty(1, 2, 64, device="meta")
    extras = Extras()
    if rich:
        extras = Extras(
            bias=torch.empty(1, 2, 64, 64, dtype=dtype, device="meta"),
            alibi_slopes=torch.empty(1, 2, device="meta"),
        )
    numbers = check_numbers(
        head_dim, causal=True, window=(32, 0) if rich else None, softcap=30.0 if rich else None
    )
    problem = problem_of(q, q, q, **numbers._asdict())
    if kernel == "forward":
        return forward_launch(problem, q, q, q, extras, q, lse, device_type="cuda")
    launches = backward_launches(problem, q, q, q, extras, q, lse, q, None, lse, q, q, q, device_type="cuda")
    return launches[{"keys": 1, "queries": 2}[kernel]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m effattn.kernels.budget", description=__doc__)
    parser.add_argument("--only", default="", help="only the configurations whose name contains this")
    parser.add_argument("--out", type=Path, help="write what was measured to this file")
    given = parser.parse_args(arguments)
    only = given.only
    lines = [
        "# Written by `python -m effattn.kernels.budget`: what each kernel takes on compute capability 80, 90 and 100.",
        f'sources = "{sources_hash()}"',
        "",
        "[usage]",
    ]
    failed = []
    for name in names():
        if only not in name:
            continue
        used = usage(name)
        line = f'"{name}" = {{ shared = {used.shared}, registers = {used.registers}, stack = {used.stack} }}'
        print(line, flush=True)
        lines.append(line)
        limit = ahead_of_time.SHARED_LIMIT[int(name.rpartition("-")[2])]
        if used.stack or used.shared > limit:
            failed.append(name)
    if given.out:
        given.out.write_text("\n".join(lines) + "\n")
    if failed:
        print(f"spilled, or more shared memory than there is: {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
