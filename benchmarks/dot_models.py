"""What a dot model costs: time of a tile product of fp16 as a multiple of that of the `ieee` model.

    python benchmarks/dot_models.py

`ratios` is for benchmarks/cpu_backend.py. Times are processor time of one thread, taken in turn.
"""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl

import effattn.cpu
from effattn.cpu import models

#: edge of the tile, products for each timing
SIZE, TURNS = 64, 100


@triton.jit
def _products(a, b, o, turns, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    x, y = tl.load(a + at), tl.load(b + at)
    z = tl.zeros([N, N], tl.float32)
    for _ in range(turns):
        z = tl.dot(x, y, z)
    tl.store(o + at, z)


def _seconds(model: str, turns: int) -> float:
    """Of one product; the launch is spread over `turns` of them."""
    a, b = torch.randn(SIZE, SIZE).half(), torch.randn(SIZE, SIZE).half()
    o = torch.empty(SIZE, SIZE)
    with effattn.cpu.active(dot_model=model):
        _products[(1,)](a, b, o, 1, SIZE)
        start = time.process_time()
        _products[(1,)](a, b, o, turns, SIZE)
        return (time.process_time() - start) / turns


def ratios(names: tuple[str, ...] = tuple(models.MODELS), rounds: int = 7) -> dict[str, float]:
    """Model -> its quickest time over the quickest of `ieee`."""
    effattn.cpu.set_num_threads(1)
    best: dict[str, float] = {}
    for _ in range(rounds):
        for name in dict.fromkeys((models.DEFAULT, *names)):
            turns = TURNS * (20 if name == models.DEFAULT else 1)
            best[name] = min(best.get(name, float("inf")), _seconds(name, turns))
    return {name: best[name] / best[models.DEFAULT] for name in names}


if __name__ == "__main__":
    for name, ratio in ratios().items():
        print(f"{name:22} {ratio:5.1f} x ieee")
