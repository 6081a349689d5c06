"""What the sanitizer costs: times of two kernels under each instrument, as multiples of the time without.

    python benchmarks/instruments.py [--repeats 7]

Each multiple is taken within one round: the kernel without instruments and with each, one after the other, on one thread;
the median of the rounds is shown. What is timed, in processor time, is a whole launch through Triton's JIT. `poison` and
`order` run a launch several times: `poison` twice where a masked load has no `other`, `order` three times.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from effattn import cpu
from effattn.cpu.sanitizer import INSTRUMENTS


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


def plain_copy() -> Callable[[], object]:
    """4 MB to 4 MB in blocks of 1024 elements; the masked load has no `other`."""
    n = 1_000_000
    x, y = torch.randn(n), torch.zeros(n)
    return lambda: copy[(triton.cdiv(n, 1024),)](x, y, n, BLOCK=1024)  # pyright: ignore[reportArgumentType]


def flash_forward() -> Callable[[], object]:
    """fp32, batch 1, 4 heads, 512 x 512, d = 64."""
    from effattn import methods
    from effattn.case import Case

    method = methods.get("flash")
    case = Case(dtype="fp32", heads=4, kv_heads=4, q_len=512, kv_len=512, head_dim=64)
    inputs = case.tensors("cpu")
    return lambda: method(case, inputs)


KERNELS = {"copy": plain_copy, "flash forward": flash_forward}


def _seconds(call: Callable[[], object], instrument: str | None) -> float:
    if instrument is None:
        start = time.process_time()
        call()
        return time.process_time() - start
    with cpu.checks(instrument):
        start = time.process_time()
        call()
        return time.process_time() - start


def measure(repeats: int) -> dict[str, tuple[float, dict[str, float]]]:
    """For each kernel: seconds without instruments (median), and the multiple of it with each."""
    cpu.set_num_threads(1)
    results = {}
    for name, make in KERNELS.items():
        call = make()
        for instrument in (None, *INSTRUMENTS):  # compiled, and memory touched
            _seconds(call, instrument)
        plain: list[float] = []
        ratios: dict[str, list[float]] = {instrument: [] for instrument in INSTRUMENTS}
        for _ in range(repeats):
            base = min(_seconds(call, None) for _ in range(3))
            plain.append(base)
            for instrument in INSTRUMENTS:
                ratios[instrument].append(min(_seconds(call, instrument) for _ in range(2)) / base)
        results[name] = (
            statistics.median(plain),
            {instrument: statistics.median(found) for instrument, found in ratios.items()},
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    print("| kernel | without | " + " | ".join(INSTRUMENTS) + " |")
    print("| --- | ---: |" + " ---: |" * len(INSTRUMENTS))
    for name, (seconds, ratios) in measure(given.repeats).items():
        cells = [f"{ratios[instrument]:.1f} x" for instrument in INSTRUMENTS]
        print(f"| {name} | {seconds * 1e3:.1f} ms | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
