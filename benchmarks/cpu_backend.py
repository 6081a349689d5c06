"""Speed of the CPU backend: against PyTorch and Triton's interpreter, on more cores, per launch, of compilation, with the
sanitizer, and of the dot models.

    python benchmarks/cpu_backend.py [--only forward,launch,...] [--rounds N]

writes docs/measurements/cpu-backend.json. Each part has the versions, commit, date and machine of its own measurement;
a run replaces the parts that it measures and keeps the others. `python docs/update_tables.py` puts them into
docs/cpu-speed.md. A new part is a function here and its row in `PARTS`, and a renderer in docs/tables/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import DTYPES, cpu_seconds, inputs, paired, torch_dtype

HERE = Path(__file__).resolve().parent
RECORD = HERE.parent / "docs" / "measurements" / "cpu-backend.json"

Rows = list[dict[str, Any]]


def forms() -> list[tuple[int, str, bool]]:
    """The twelve: head dimension, dtype, causal."""
    return [(d, dtype, causal) for d in (64, 128) for dtype in DTYPES for causal in (False, True)]


def one_thread() -> None:
    """For both: CPU time then is the time on an idle machine, and no thread's waiting is counted."""
    import torch

    import effattn.cpu

    torch.set_num_threads(1)
    effattn.cpu.set_num_threads(1)


def forward(rounds: int) -> Rows:
    """FlashAttention forward, 2 x 4 heads, 1,024 x 1,024, against torch's scaled_dot_product_attention; CPU time."""
    import torch

    from effattn.kernels.flash_forward import flash_attention_forward as flash

    one_thread()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    rows = []
    for head_dim, dtype, causal in forms():
        q, k, v = inputs(dtype, head_dim)
        row = paired(
            lambda q=q, k=k, v=v, c=causal: flash(q, k, v, causal=c),
            lambda q=q, k=k, v=v, c=causal: sdpa(q, k, v, is_causal=c),
            rounds=rounds,
            clock=cpu_seconds,
        )
        rows.append({"head_dim": head_dim, "dtype": dtype, "causal": causal, **row})
        show(rows[-1])
    return rows


def backward(rounds: int) -> Rows:
    """Its gradients of q, k and v, against those of torch's; the forward passes are not timed."""
    import torch

    from effattn.kernels import flash_attention

    one_thread()
    sdpa = torch.nn.functional.scaled_dot_product_attention
    rows = []
    for head_dim, dtype, causal in forms():
        q, k, v = (x.requires_grad_() for x in inputs(dtype, head_dim))
        upstream = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(torch_dtype(dtype))
        outs = (flash_attention(q, k, v, causal=causal), sdpa(q, k, v, is_causal=causal))
        ours, other = (
            lambda out=out, of=(q, k, v), up=upstream: torch.autograd.grad(out, of, up, retain_graph=True)
            for out in outs
        )
        rows.append(
            {
                "head_dim": head_dim,
                "dtype": dtype,
                "causal": causal,
                **paired(ours, other, rounds=rounds, clock=cpu_seconds),
            }
        )
        show(rows[-1])
    return rows


_INTERPRET = """
import sys, time
sys.path.insert(0, {folder!r})
from timing import inputs
from effattn.kernels.flash_forward import flash_attention_forward
q, k, v = inputs({dtype!r}, 64)
start = time.process_time()
flash_attention_forward(q, k, v)
print(time.process_time() - start)
"""


def interpreter(rounds: int) -> Rows:
    """The same launch under TRITON_INTERPRET=1 (one run), d = 64; it multiplies bf16 wrongly, so that is left out."""
    from effattn.kernels.flash_forward import flash_attention_forward

    one_thread()
    rows = []
    for dtype in ("fp16", "fp32"):
        q, k, v = inputs(dtype, 64)
        flash_attention_forward(q, k, v)
        ours = statistics.median(
            cpu_seconds(lambda q=q, k=k, v=v: flash_attention_forward(q, k, v)) for _ in range(rounds)
        )
        other = float(python(_INTERPRET.format(folder=str(HERE), dtype=dtype), TRITON_INTERPRET="1"))
        rows.append({"dtype": dtype, "ours_ms": ours * 1e3, "other_ms": other * 1e3, "speedup": other / ours})
        show(rows[-1])
    return rows


def scaling(rounds: int) -> Rows:
    """FlashAttention forward on one thread against all."""
    import effattn.cpu
    from effattn.kernels.flash_forward import flash_attention_forward

    threads = len(os.sched_getaffinity(0))
    rows = []
    for dtype in DTYPES:
        q, k, v = inputs(dtype, 64)

        def on(count: int, q: Any = q, k: Any = k, v: Any = v) -> None:
            effattn.cpu.set_num_threads(count)
            flash_attention_forward(q, k, v)

        row = paired(lambda on=on: on(1), lambda on=on: on(threads), rounds=rounds)
        rows.append({"dtype": dtype, "threads": threads, **row})
        show(rows[-1])
    effattn.cpu.set_num_threads(threads)
    return rows


def launch(rounds: int) -> Rows:
    """A launch of a compiled kernel that copies 16 numbers in one program: what is left is the launch.

    CPU time, so that what else the machine does is not counted.
    """
    import torch
    from cpu_backend_kernels import copy_3, copy_17

    x, o = torch.ones(16), torch.zeros(16)
    rows = []
    many = 500
    for arguments, kernel, rest in ((3, copy_3, (16,)), (17, copy_17, (*range(2, 16), 16))):
        kernel[(1,)](x, o, *rest, N=16)
        times = []
        for _ in range(rounds):
            start = time.process_time()
            for _ in range(many):
                kernel[(1,)](x, o, *rest, N=16)
            times.append((time.process_time() - start) / many)
        rows.append({"arguments": arguments, "us": statistics.median(times) * 1e6})
        show(rows[-1])
    return rows


_COMPILE = """
import resource, sys, time
sys.path.insert(0, {folder!r})
import torch
from cpu_backend_kernels import chain, copy_3
x, o = torch.ones(64 * 64), torch.zeros(64 * 64)
copy_3[(1,)](x, o, 16, N=16)  # imports, the compiler's version, the runtime
def spent():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
start = spent()
compiled = chain[(1,)](x, o, {turns}, N=64)
print(spent() - start, sum(" = " in line for line in compiled.asm["ttir"].splitlines() if line[0] == " "))
"""


def compilation(rounds: int) -> Rows:
    """The first launch of a kernel, with an empty cache and with a full one, each in a fresh process.

    CPU time, the C compiler's included.
    """
    rows = []
    for turns in (8, 230):
        with tempfile.TemporaryDirectory() as cache:
            code = _COMPILE.format(folder=str(HERE), turns=turns)
            cold, operations = python(code, TRITON_CACHE_DIR=cache).split()
            warm = [float(python(code, TRITON_CACHE_DIR=cache).split()[0]) for _ in range(3)]
        rows.append(
            {
                "operations": int(operations),
                "first_s": float(cold),
                "from_cache_ms": statistics.median(warm) * 1e3,
            }
        )
        show(rows[-1])
    return rows


def memory(rounds: int) -> Rows:
    """Working memory of a thread while it runs FlashAttention forward: the same for any number of programs."""
    from effattn.kernels.flash_forward import flash_attention_forward

    rows = []
    for head_dim in (64, 128):
        for dtype in DTYPES:
            sizes = []
            for length in (256, 4096):
                q, k, v = inputs(dtype, head_dim, batch=1, heads=1, length=length)
                sizes.append(arena_of(lambda q=q, k=k, v=v: flash_attention_forward(q, k, v)))
            row = {"head_dim": head_dim, "dtype": dtype, "bytes": sizes[0], "bytes_16_times_longer": sizes[1]}
            rows.append(row)
            show(row)
    return rows


def arena_of(call: Callable[[], Any]) -> int:
    """The largest arena of the kernels that a call launches."""
    from effattn.cpu import launch as launching

    found: list[int] = []

    packed = launching.Launcher.packed

    def noting(launcher: launching.Launcher, *args: Any) -> bytes:
        found.append(launcher.arena)
        return packed(launcher, *args)

    launching.Launcher.packed = noting
    try:
        call()
    finally:
        launching.Launcher.packed = packed
    return max(found)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout.strip()


def instruments(rounds: int) -> Rows:
    """Each instrument of the sanitizer, as a multiple of the time without: benchmarks/instruments.py."""
    from instruments import measure

    rows = []
    for kernel, (seconds, ratios) in measure(rounds).items():
        row = {"kernel": kernel, "ours_ms": seconds * 1e3, **ratios}
        show(row)
        rows.append(row)
    return rows


def dots(rounds: int) -> Rows:
    """A tile product with each dot model, as a multiple of `ieee`: benchmarks/dot_models.py."""
    from dot_models import ratios

    rows = [{"model": model, "ratio": ratio} for model, ratio in ratios(rounds=rounds).items()]
    for row in rows:
        show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    words = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    ]
    print("  " + "   ".join(words), flush=True)


PARTS: dict[str, Callable[[int], Rows]] = {
    "forward": forward,
    "backward": backward,
    "interpreter": interpreter,
    "scaling": scaling,
    "launch": launch,
    "compilation": compilation,
    "memory": memory,
    "instruments": instruments,
    "dots": dots,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between")
    parser.add_argument("--rounds", type=int, default=11, help="pairs timed (11)")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"the record ({RECORD.name})")
    options = parser.parse_args()
    names = options.only.split(",")
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    from effattn.run import provenance

    record: dict[str, Any] = {"schema": 1, "parts": {}}
    if options.out.exists():
        record = json.loads(options.out.read_text(encoding="utf-8"))
    for name in names:
        print(f"{name}: {(PARTS[name].__doc__ or '').strip()}", flush=True)
        rows = PARTS[name](options.rounds)
        facts = provenance.collect(device="cpu")
        record["parts"][name] = {"date": provenance.now(), **facts, "rounds": options.rounds, "rows": rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
