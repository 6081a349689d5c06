"""What the benchmarks have in common: how two things are timed against each other, and the inputs of attention."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

DTYPES = ("fp16", "bf16", "fp32")


def seconds(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def cpu_seconds(fn: Callable[[], Any]) -> float:
    """CPU time of this process: what else the machine does is not counted. Threads that wait by spinning are."""
    start = time.process_time()
    fn()
    return time.process_time() - start


def paired(
    a: Callable[[], Any],
    b: Callable[[], Any],
    *,
    rounds: int,
    clock: Callable[[Callable[[], Any]], float] = seconds,
) -> dict[str, float]:
    """Medians of a and b in milliseconds and the median of a/b over pairs, after one warm-up of each.

    They are timed in turn, A B A B ..., and the ratio is taken pair by pair, so a machine whose speed drifts does not
    decide.
    """
    a()
    b()
    pairs = [(clock(a), clock(b)) for _ in range(rounds)]
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
    """q, k and v, standard normal, seed 0."""
    import torch

    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randn(batch, heads, length, head_dim, generator=generator) for _ in range(3))
    q, k, v = (x.to(torch_dtype(dtype)) for x in drawn)
    return q, k, v
