"""Processor time of the causal linear attention kernels on the CPU backend, and in Triton's interpreter.

    python benchmarks/linear_attention.py                       # the CPU backend, 256 rows
    TRITON_INTERPRET=1 python benchmarks/linear_attention.py    # Triton's interpreter, the same

One head, 256 features, values of 64, float32, one thread; the best of several runs, after one that compiles. Prints JSON.
"""

from __future__ import annotations

import json
import os
import time

os.environ.setdefault("EFFATTN_CPU_THREADS", "1")

import torch

from effattn.kernels.linear_attention import linear_attention

ROWS, FEATURES, V_DIM = 256, 256, 64


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    g = torch.Generator().manual_seed(0)
    q, k = (torch.rand(1, 1, ROWS, FEATURES, generator=g).requires_grad_() for _ in range(2))
    v = torch.randn(1, 1, ROWS, V_DIM, generator=g).requires_grad_()
    weight = torch.randn(1, 1, ROWS, V_DIM, generator=g)

    def once() -> tuple[float, float]:
        start = time.process_time()
        out = linear_attention(q, k, v)
        middle = time.process_time()
        torch.autograd.grad(out, (q, k, v), weight)
        return middle - start, time.process_time() - middle

    once()
    runs = [once() for _ in range(2 if interpreted else 20)]
    best = {name: min(run[i] for run in runs) for i, name in enumerate(("forward_s", "backward_s"))}
    print(
        json.dumps({"interpreter": interpreted, "rows": ROWS, "features": FEATURES, "v_dim": V_DIM, **best})
    )


if __name__ == "__main__":
    main()
