"""What a dot model costs: time of a tile product of fp16 as a multiple of that of the `ieee` model.

    python benchmarks/dot_models.py

`ratios` is for other benchmarks. The two times of a ratio are taken in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl

import effattn.cpu
from effattn.cpu import models

#: edge of the tile, products for each timing, timings
SIZE, TURNS, REPEATS = 64, 100, 7


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
        start = time.perf_counter()
        _products[(1,)](a, b, o, turns, SIZE)
        return (time.perf_counter() - start) / turns


def ratios(names: tuple[str, ...] = tuple(models.MODELS)) -> dict[str, float]:
    """Model -> its quickest time over the quickest of `ieee`."""
    best: dict[str, float] = {}
    for _ in range(REPEATS):
        for name in dict.fromkeys((models.DEFAULT, *names)):
            turns = TURNS * (20 if name == models.DEFAULT else 1)
            best[name] = min(best.get(name, float("inf")), _seconds(name, turns))
    return {name: best[name] / best[models.DEFAULT] for name in names}


if __name__ == "__main__":
    for name, ratio in ratios().items():
        print(f"{name:22} {ratio:5.1f} x ieee")
