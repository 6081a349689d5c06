"""The sanitizer on drawn launches: it finds something exactly where a count of all accesses, in Python, does."""

from __future__ import annotations

import random

import torch
import triton
import triton.language as tl

from effattn import cpu

_PLAIN = ["x", "o", "sx", "sy", "shift_x", "shift_y", "nx", "ny", "so"]


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_PLAIN)
def _tiles(x, o, sx, sy, shift_x, shift_y, nx, ny, so, X: tl.constexpr, Y: tl.constexpr):
    i = tl.program_id(0) * X + tl.arange(0, X)[:, None]
    j = tl.program_id(1) * Y + tl.arange(0, Y)[None, :]
    inside = (i < nx) & (j < ny)
    v = tl.load(x + (i + shift_x) * sx + (j + shift_y) * sy, mask=inside, other=0)
    tl.store(o + i * so + j, v, mask=inside)


def test_accesses_outside_of_views_of_any_stride() -> None:
    draw = random.Random(5)
    memory = torch.arange(2000.0)
    seen = {True: 0, False: 0}
    for _ in range(150):
        tile = draw.choice([(4, 8), (8, 4), (16, 16)])
        rows, columns = draw.randint(1, 20), draw.randint(1, 20)
        choices = [(columns, 1), (1, rows), (columns + 3, 1), (2 * columns, 2), (1, 1), (0, 1), (1, 0)]
        sx, sy = draw.choice(choices)
        x = memory.as_strided((rows, columns), (sx, sy), draw.randint(40, 200))
        nx, ny = (max(n + draw.choice([0, 0, 0, 1, -1]), 1) for n in (rows, columns))
        shift_x, shift_y = (draw.choice([0, 0, 0, 1, -1]) for _ in range(2))
        grid = (triton.cdiv(nx, tile[0]), triton.cdiv(ny, tile[1]))
        last = (rows - 1) * sx + (columns - 1) * sy
        offsets = [(i + shift_x) * sx + (j + shift_y) * sy for i in range(nx) for j in range(ny)]
        outside = {at for at in offsets if not 0 <= at <= last}
        with cpu.checks("bounds", "races", raise_=False) as report:
            _tiles[grid](x, torch.zeros(nx * ny), sx, sy, shift_x, shift_y, nx, ny, ny, *tile)
        assert bool(report.findings) == bool(outside), (report.summary(), x.shape, x.stride(), offsets)
        assert all(f.argument == "x" and f.offset in outside for f in report.findings)
        seen[bool(outside)] += 1
    assert min(seen.values()) > 20


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["loads", "stores", "updates", "x"])
def _scattered(loads, stores, updates, x, n, COUNT: tl.constexpr):
    p = tl.program_id(0)
    k = p * COUNT + tl.arange(0, COUNT)
    a, b, c = tl.load(loads + k), tl.load(stores + k), tl.load(updates + k)
    v = tl.load(x + a, mask=a >= 0, other=0)
    tl.store(x + b, (v & 4095) + p, mask=b >= 0)
    tl.atomic_add(x + c, 1, mask=c >= 0)


def test_races_of_scattered_accesses() -> None:
    draw = random.Random(3)
    seen = {True: 0, False: 0}
    for _ in range(150):
        programs, size = draw.randint(1, 6), draw.choice([8, 30, 100])

        def some(odds: float, programs: int = programs, size: int = size) -> torch.Tensor:
            rows = [
                [draw.randrange(size) if draw.random() < odds else -1 for _ in range(4)]
                for _ in range(programs)
            ]
            return torch.tensor(rows, dtype=torch.int32)

        loads, stores, updates = (
            some(draw.choice(odds)) for odds in ([0, 0.3, 0.8], [0, 0.1, 0.4], [0, 0.2, 0.5])
        )
        racing: set[int] = set()
        for p in range(programs):
            for q in range(programs):
                if p != q:
                    touched = {*loads[q].tolist(), *stores[q].tolist(), *updates[q].tolist()}
                    racing |= set(stores[p].tolist()) & touched - {-1}
        x = torch.zeros(size, dtype=torch.int32)
        with cpu.checks("races", raise_=False) as report:
            _scattered[(programs,)](loads, stores, updates, x, size, 4)
        assert bool(report.findings) == bool(racing), (report.summary(), loads, stores, updates)
        assert all(f.argument == "x" and f.offset in racing for f in report.findings)
        seen[bool(racing)] += 1
    assert min(seen.values()) > 20
