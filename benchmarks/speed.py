"""Speed of the CPU backend and of a verdict, as ratios measured in one run.

    python benchmarks/speed.py [--only attention,interpreter,judge,launch,commands] [--out FILE]

Two things are timed in turn, A B A B ..., and the ratio is taken pair by pair, so a machine whose speed drifts
does not decide. Medians are printed; nothing is asserted. `--out` writes the figures as JSON with versions and machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = ("fp16", "bf16", "fp32")


def seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def paired(a: Callable[[], Any], b: Callable[[], Any], *, rounds: int) -> dict[str, float]:
    """Medians of a and b in milliseconds and the median of a/b over pairs, after one warm-up of each."""
    a()
    b()
    pairs = [(seconds(a), seconds(b)) for _ in range(rounds)]
    ratios = sorted(x / y for x, y in pairs)
    return {
        "ours_ms": statistics.median(x for x, _ in pairs) * 1e3,
        "other_ms": statistics.median(y for _, y in pairs) * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 10],
        "ratio_high": ratios[-1 - len(ratios) // 10],
    }


def torch_dtype(name: str) -> Any:
    import torch

    return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[name]


def inputs(
    dtype: str, head_dim: int, *, batch: int = 2, heads: int = 4, length: int = 1024
) -> tuple[Any, Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, length, head_dim, generator=generator) for _ in range(3))
    return tuple(x.to(torch_dtype(dtype)) for x in (q, k, v))  # type: ignore[return-value]


def attention(rounds: int) -> list[dict[str, Any]]:
    """FlashAttention forward on the CPU backend against torch's own CPU attention, same number of threads."""
    import torch

    import effattn.cpu
    from effattn.kernels.flash_forward import flash_attention_forward

    torch.set_num_threads(effattn.cpu.get_num_threads())
    print(
        f"FlashAttention forward, batch 2, 4 heads, 1,024 x 1,024, {effattn.cpu.get_num_threads()} threads; torch = its CPU SDPA"
    )
    rows = []
    for head_dim in (64, 128):
        for dtype in DTYPES:
            for causal in (False, True):
                q, k, v = inputs(dtype, head_dim)
                row = paired(
                    lambda q=q, k=k, v=v, c=causal: flash_attention_forward(q, k, v, causal=c),
                    lambda q=q, k=k, v=v, c=causal: torch.nn.functional.scaled_dot_product_attention(
                        q, k, v, is_causal=c
                    ),
                    rounds=rounds,
                )
                rows.append({"head_dim": head_dim, "dtype": dtype, "causal": causal, **row})
                print(
                    f"  d={head_dim:<4}{dtype:5}{'causal' if causal else 'full':7} ours {row['ours_ms']:7.1f} ms   "
                    f"torch {row['other_ms']:7.1f} ms   ratio {row['ratio']:.2f} "
                    f"({row['ratio_low']:.2f} to {row['ratio_high']:.2f})",
                    flush=True,
                )
    return rows


_INTERPRET = """
import sys, time
sys.path.insert(0, {folder!r})
from speed import inputs
from effattn.kernels.flash_forward import flash_attention_forward
q, k, v = inputs({dtype!r}, 64)
start = time.perf_counter()
flash_attention_forward(q, k, v)
print(time.perf_counter() - start)
"""


def interpreter(rounds: int) -> list[dict[str, Any]]:
    """The same launch under TRITON_INTERPRET=1 (one run), where that is right: fp16 and fp32."""
    from effattn.kernels.flash_forward import flash_attention_forward

    print("FlashAttention forward, batch 2, 4 heads, 1,024 x 1,024, d = 64, against Triton's interpreter")
    rows = []
    for dtype in ("fp16", "fp32"):
        q, k, v = inputs(dtype, 64)
        flash_attention_forward(q, k, v)
        ours = statistics.median(
            seconds(lambda q=q, k=k, v=v: flash_attention_forward(q, k, v)) for _ in range(rounds)
        )
        code = _INTERPRET.format(folder=str(Path(__file__).parent), dtype=dtype)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        other = float(done.stdout.split()[-1])
        rows.append({"dtype": dtype, "ours_ms": ours * 1e3, "other_ms": other * 1e3, "speedup": other / ours})
        print(
            f"  {dtype:5} ours {ours * 1e3:7.1f} ms   interpreter {other * 1e3:9.1f} ms   {other / ours:.0f} times faster",
            flush=True,
        )
    return rows


def judge(rounds: int) -> list[dict[str, Any]]:
    """One judged small case, warm: tensors, kernel, reference, envelope, verdict."""
    from effattn import methods
    from effattn.case import Case
    from effattn.run.executor import judge as judge_case

    print("A judged case: 2 heads, 64 x 64, d = 32, causal; kernel, reference and verdict together, warm")
    method = methods.get("flash")
    rows = []
    for dtype in DTYPES:
        case = Case(heads=2, q_len=64, kv_len=64, head_dim=32, dtype=dtype, causal="bottom-right")
        for _ in range(3):
            judge_case(case, method)
        times, parts = [], []
        for _ in range(rounds * 5):
            start = time.perf_counter()
            verdict = judge_case(case, method)
            times.append(time.perf_counter() - start)
            parts.append(verdict.seconds)
        split = {key: statistics.median(p[key] for p in parts) * 1e3 for key in parts[0]}
        row = {"dtype": dtype, "ms": statistics.median(times) * 1e3, "parts_ms": split}
        rows.append(row)
        print(
            f"  {dtype:5} {row['ms']:.2f} ms   " + "   ".join(f"{k} {v:.2f}" for k, v in split.items()),
            flush=True,
        )
    return rows


def launch(rounds: int) -> list[dict[str, Any]]:
    """What a launch of the flash kernel costs beyond its work: a problem of one query and one key."""
    import torch

    from effattn.kernels.flash_forward import flash_attention_forward

    x = torch.ones(1, 1, 1, 16)
    flash_attention_forward(x, x, x)
    many = 200
    times = [
        seconds(lambda: [flash_attention_forward(x, x, x) for _ in range(many)]) / many for _ in range(rounds)
    ]
    row = {"us": statistics.median(times) * 1e6}
    print(f"One call of flash_attention_forward with one query and one key: {row['us']:.0f} us")
    return [row]


def commands(rounds: int) -> list[dict[str, Any]]:
    """Whole commands, as a user starts them: cold means an empty kernel cache."""
    program = [sys.executable, "-c", "import sys; from effattn.cli import main; sys.exit(main())"]
    rows = []

    def timed(label: str, arguments: list[str], cache: str, repeat: int) -> None:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        times = []
        for _ in range(repeat):
            start = time.perf_counter()
            subprocess.run([*program, *arguments], env=env, capture_output=True, check=True)
            times.append(time.perf_counter() - start)
        row = {
            "command": "effattn " + " ".join(arguments[:4]),
            "state": label,
            "seconds": statistics.median(times),
        }
        rows.append(row)
        print(f"  {row['command']:45} {label:14} {row['seconds']:6.2f} s", flush=True)

    print("Whole commands")
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as out:
        timed("", ["--help"], cache, max(3, rounds // 2))
        gate = ["gate", "flash", "--profile", "smoke", "--out", str(Path(out, "run")), "--overwrite"]
        timed("empty cache", gate, cache, 1)
        timed("warm", gate, cache, 3)
    return rows


SECTIONS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "attention": attention,
    "interpreter": interpreter,
    "judge": judge,
    "launch": launch,
    "commands": commands,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, with commas between")
    parser.add_argument("--rounds", type=int, default=11, help="pairs timed (11)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args()
    unknown = [name for name in options.only.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"unknown section {unknown[0]!r}; there are {', '.join(SECTIONS)}")
    figures = {name: SECTIONS[name](options.rounds) for name in options.only.split(",")}
    if options.out is not None:
        from effattn.run import provenance

        record = {
            "schema": 1,
            "date": provenance.now(),
            **provenance.collect(device="cpu"),
            "figures": figures,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1, allow_nan=False, default=_plain) + "\n")
        print(f"written to {options.out}")


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    raise TypeError(f"cannot write {type(value)}")


if __name__ == "__main__":
    main()
