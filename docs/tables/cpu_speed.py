"""Tables of docs/cpu-speed.md, from docs/measurements/cpu-backend.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORD = Path(__file__).resolve().parent.parent / "measurements" / "cpu-backend.json"

Row = dict[str, Any]


def table(head: str, rows: list[str]) -> str:
    return "\n".join([head, "|" + "---|" * head.count(" | ") + "---|", *rows])


def form(row: Row) -> str:
    return f"| {row['head_dim']} | {row['dtype']} | {'yes' if row['causal'] else 'no'} |"


def attention(rows: list[Row]) -> str:
    return table(
        "| head_dim | dtype | causal | ours | PyTorch | ours / PyTorch | 10 % to 90 % of the pairs |",
        [
            f"{form(r)} {r['ours_ms']:.1f} ms | {r['other_ms']:.1f} ms | {r['ratio']:.2f} "
            f"| {r['ratio_low']:.2f} to {r['ratio_high']:.2f} |"
            for r in rows
        ],
    )


def interpreter(rows: list[Row]) -> str:
    return table(
        "| dtype | ours | interpreter | times faster |",
        [
            f"| {r['dtype']} | {r['ours_ms']:.1f} ms | {r['other_ms'] / 1e3:.1f} s | {r['speedup']:.0f} |"
            for r in rows
        ],
    )


def scaling(rows: list[Row]) -> str:
    return table(
        "| dtype | 1 thread | all | threads | speedup |",
        [
            f"| {r['dtype']} | {r['ours_ms']:.1f} ms | {r['other_ms']:.1f} ms | {r['threads']} | {r['ratio']:.2f} |"
            for r in rows
        ],
    )


def launch(rows: list[Row]) -> str:
    return table("| arguments | one launch |", [f"| {r['arguments']} | {r['us']:.1f} us |" for r in rows])


def compilation(rows: list[Row]) -> str:
    return table(
        "| operations of the TTIR | first launch | with the library in the cache |",
        [f"| {r['operations']:,} | {r['first_s']:.2f} s | {r['from_cache_ms']:.1f} ms |" for r in rows],
    )


def memory(rows: list[Row]) -> str:
    return table(
        "| head_dim | dtype | 256 x 256 | 4,096 x 4,096 |",
        [
            f"| {r['head_dim']} | {r['dtype']} | {r['bytes'] / 1024:.0f} KiB | {r['bytes_16_times_longer'] / 1024:.0f} KiB |"
            for r in rows
        ],
    )


def instruments(rows: list[Row]) -> str:
    names = [name for name in rows[0] if name not in ("kernel", "ours_ms")]
    return table(
        f"| kernel | without | {' | '.join(names)} |",
        [
            f"| {r['kernel']} | {r['ours_ms']:.1f} ms | {' | '.join(f'{r[name]:.1f} x' for name in names)} |"
            for r in rows
        ],
    )


def dots(rows: list[Row]) -> str:
    return table("| model | times `ieee` |", [f"| `{r['model']}` | {r['ratio']:.1f} |" for r in rows])


#: part of the record -> its heading, what was done, its table
PARTS: dict[str, tuple[str, str, Callable[[list[Row]], str]]] = {
    "forward": (
        "FlashAttention forward against PyTorch",
        "2 x 4 heads, 1,024 x 1,024; PyTorch is its `scaled_dot_product_attention` on the CPU; one thread each, CPU time.",
        attention,
    ),
    "backward": (
        "FlashAttention backward against PyTorch",
        "The gradients of q, k and v of the same problems; the forward passes are not timed.",
        attention,
    ),
    "interpreter": (
        "Against Triton's interpreter",
        "The same launch with `TRITON_INTERPRET=1`, head_dim 64; one thread, CPU time. It multiplies bf16 wrongly, so that is "
        "left out.",
        interpreter,
    ),
    "scaling": ("More threads", "FlashAttention forward, head_dim 64, on one thread and on all.", scaling),
    "launch": (
        "What a launch costs",
        "A compiled kernel that copies 16 numbers in one program, through `kernel[grid](...)`; CPU time.",
        launch,
    ),
    "compilation": (
        "Compilation",
        "A running softmax of 64 x 64 tiles with its steps written out: Triton's front end, the C code, the C compiler. "
        "CPU time in a fresh process that has launched another kernel before.",
        compilation,
    ),
    "memory": (
        "Working memory of a thread",
        "FlashAttention forward, one head: bounded by the tiles that are alive at once, not by the grid.",
        memory,
    ),
    "instruments": (
        "What the sanitizer costs",
        "Copying 4 MB with a mask, and FlashAttention forward (fp32, 4 heads, 512 x 512, d = 64), as multiples of the time "
        "without; one thread, CPU time. `poison` and `order` run a launch several times.",
        instruments,
    ),
    "dots": (
        "What a dot model costs",
        "A product of two fp16 tiles of 64 x 64; one thread, CPU time.",
        dots,
    ),
}


def origin(part: dict[str, Any]) -> str:
    machine, packages = part["machine"], part["packages"]
    commit = part["effattn"]["commit"]
    return (
        f"{part['date'][:10]}, commit {commit[:10] if commit else 'unknown'}, {machine['cpu']}, {machine['cores']} cores, "
        f"Python {part['python']}, torch {packages['torch']}, triton {packages['triton']}"
    )


def render() -> str:
    parts = json.loads(RECORD.read_text(encoding="utf-8"))["parts"]
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(
            f"no table for the parts {sorted(unknown)} of {RECORD.name}: add them to {Path(__file__).name}"
        )
    return "\n\n".join(
        f"## {heading}\n\n{words}\n\n{draw(parts[name]['rows'])}\n\n<sub>{origin(parts[name])}</sub>"
        for name, (heading, words, draw) in PARTS.items()
        if name in parts
    )
