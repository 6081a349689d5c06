"""Functions of single elements: `tl.map_elementwise`, combine functions that branch, and calls that are not inlined."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

import effattn.cpu
import effattn.cpu.sanitizer
from effattn.cpu.ir import parse
from effattn.cpu.lower import kernel_source
from effattn.cpu.support import UnsupportedKernel

X = torch.randn(65, generator=torch.Generator().manual_seed(2))


# ------------------------------------------------------------------------------------------ map_elementwise


@triton.jit
def _branching(x, y):
    """An early return, a loop, a while loop; two results of two types."""
    if x > y:
        return x * 2, 1
    n = 0
    for _ in range(3):
        y += x
    while y < 4.0:
        y += 1.5
        n += 1
    return y, n


@triton.jit
def _map(x, o, oi, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    a, n = tl.map_elementwise(_branching, tl.load(x + at), tl.load(x + 1 + at))
    tl.store(o + at, tl.trans(tl.trans(a)))
    tl.store(oi + at, n)


def _by_hand(x: float, y: float) -> tuple[float, int]:
    import numpy as np

    a, b, n = np.float32(x), np.float32(y), 0
    if a > b:
        return float(a * np.float32(2)), 1
    for _ in range(3):
        b = b + a
    while b < 4.0:
        b, n = b + np.float32(1.5), n + 1
    return float(b), n


@pytest.mark.parametrize("shape", [(1, 64), (64, 1), (8, 8), (1, 1)])
def test_map_elementwise_with_branches_and_loops(shape: tuple[int, int]) -> None:
    o, oi = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
    _map[(1,)](X, o, oi, *shape)
    want = [_by_hand(a, b) for a, b in zip(X[: o.numel()].tolist(), X[1:].tolist(), strict=False)]
    assert o.view(-1).tolist() == [a for a, _ in want]
    assert oi.view(-1).tolist() == [n for _, n in want]


@triton.jit
def _exchanged(a, b, c, d, e, f, g, h):
    """Two inputs, four elements of each: the neighbours are visible, and the order of the arguments."""
    return a + f, b + e, c + h, d + g


@triton.jit
def _packed(x, o, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + at)
    (swapped,) = tl.map_elementwise(_exchanged, v, v * 10, pack=4)
    tl.store(o + at, swapped)


@pytest.mark.parametrize("shape", [(1, 64), (32, 2), (1, 4)])
def test_map_elementwise_of_several_at_once(shape: tuple[int, int]) -> None:
    """Which elements are neighbours is left open on a GPU; here they follow each other in memory order."""
    x = torch.arange(shape[0] * shape[1]).float().view(shape)
    o = torch.zeros(shape)
    _packed[(1,)](x, o, *shape)
    flat = x.view(-1)
    other = flat.view(-1, 2).flip(1).reshape(-1)
    assert torch.equal(o.view(-1), flat + other * 10)


@triton.jit
def _looks_up(i, table):
    if i < 0:
        return -1.0
    return tl.load(table + i)


@triton.jit
def _looked_up(index, table, o, N: tl.constexpr):
    i = tl.arange(0, N)
    tables = table + i * 0
    tl.store(o + i, tl.map_elementwise(_looks_up, tl.load(index + i), tables))


def test_the_function_may_read_memory_where_it_gets_to() -> None:
    """Addresses of elements that return before are never touched: they would end the process."""
    index = torch.tensor([3, -(2**30), 0, 7, -1, 2, 5, -(2**29)], dtype=torch.int32)
    o = torch.zeros(8)
    _looked_up[(1,)](index, X, o, 8)
    assert torch.equal(o, torch.where(index < 0, -1.0, X[index.clamp(min=0)]))


def test_the_sanitizer_sees_what_such_functions_read() -> None:
    index = torch.tensor([3, -5, 0, 7, -1, 2, 5, -2], dtype=torch.int32)
    with effattn.cpu.checks("bounds") as report:
        _looked_up[(1,)](index, X, torch.zeros(8), 8)
    assert not report.findings
    index[4] = X.numel()
    with pytest.raises(effattn.cpu.sanitizer.Fault, match="table"), effattn.cpu.checks("bounds"):
        _looked_up[(1,)](index, X, torch.zeros(8), 8)


# -------------------------------------------------------------------------------------- combine functions


@triton.jit
def _stronger(a, b):
    if a > b:
        return a
    return b * 0.5


@triton.jit
def _better(a, i, b, j):
    """Two operands, nested branches."""
    if a == b:
        if i < j:
            return a, i
        return b, j
    if a > b:
        return a, i
    else:
        return b, j


@triton.jit
def _combine(x, o, oi, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    v = tl.load(x + at)
    tl.store(o + at, tl.associative_scan(v, AXIS, _stronger, reverse=REVERSE))
    r = tl.reduce(v, AXIS, _stronger)
    best, place = tl.reduce((v, at), AXIS, _better)
    k = tl.arange(0, N if AXIS == 0 else M)
    tl.store(o + M * N + k, r)
    tl.store(o + M * N + 64 + k, best)
    tl.store(oi + k, place)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((8, 8), 0), ((8, 8), 1), ((1, 64), 1), ((64, 1), 0)])
def test_combine_functions_that_branch(shape: tuple[int, int], axis: int, reverse: bool) -> None:
    x = (X[:64] * 4).round().view(shape).contiguous()
    o, oi = torch.zeros(64 + 128), torch.zeros(64, dtype=torch.int32)
    _combine[(1,)](x, o, oi, *shape, axis, reverse)
    rows = x.T if axis == 0 else x
    places = torch.arange(64).view(shape)
    places = places.T if axis == 0 else places

    def strongest(values: list[float]) -> list[float]:
        out = [values[0]]
        for v in values[1:]:
            out.append(out[-1] if out[-1] > v else v * 0.5)
        return out

    # A scan is inclusive, and a reverse one starts at the end.
    scanned = [strongest(r.tolist()[::-1])[::-1] if reverse else strongest(r.tolist()) for r in rows]
    got = o[:64].view(shape)
    assert (got.T if axis == 0 else got).tolist() == scanned
    n = len(rows)
    assert o[64 : 64 + n].tolist() == [strongest(r.tolist())[-1] for r in rows]
    assert o[128 : 128 + n].tolist() == [max(r.tolist()) for r in rows]
    want = [p[int(r.argmax())].item() for r, p in zip(rows, places, strict=True)]  # the first of equals
    assert oi[:n].tolist() == want


# --------------------------------------------------------------------------------------------------- calls


@triton.jit
def _returns_early(x, s, p):
    """Returns tensors from three places, one after a store."""
    if s > 4:
        return x * s, s
    y = x + 1
    if s == 2:
        tl.store(p + s, 1.0)
        return tl.trans(y), s * 10
    for k in range(s):
        y += k
    return y, -s


@triton.jit
def _calls_it(x, s, p):
    a, n = _returns_early(x, s, p)
    if n < -2:
        return a - 1, n
    b, m = _returns_early(a, n, p)
    return b + a, m


@triton.jit
def _in_loops(x, o, p, n, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(x + at)
    total = a * 0
    last = 0
    for s in range(n):
        if s != 1:
            a, last = _returns_early(a * 0.5, s, p)
        b, m = _calls_it(a, s + 1, p)
        total += b * m
        while last > 5:
            total, last = _returns_early(total, 0, p)
    tl.store(o + at, a)
    tl.store(o + N * N + at, total)
    tl.store(p, last)


def _early(x: Any, s: int, p: Any) -> tuple[Any, int]:
    if s > 4:
        return x * s, s
    y = x + 1
    if s == 2:
        p[2] = 1.0
        return y.T, s * 10
    for k in range(s):
        y = y + k
    return y, -s


def _nested(x: Any, s: int, p: Any) -> tuple[Any, int]:
    a, n = _early(x, s, p)
    if n < -2:
        return a - 1, n
    b, m = _early(a, n, p)
    return b + a, m


@pytest.mark.parametrize("n", [0, 1, 3, 8])
def test_functions_with_early_returns_called_in_loops_and_branches(n: int) -> None:
    """Tensors go in and come out; MLIR cannot inline these."""
    size = 8
    x, o, p = X[:64].contiguous(), torch.zeros(128), torch.zeros(8)
    _in_loops[(1,)](x, o, p, n, size)
    a, want_p, last = x.view(size, size), torch.zeros(8), 0
    total = a * 0
    for s in range(n):
        if s != 1:
            a, last = _early(a * 0.5, s, want_p)
        b, m = _nested(a, s + 1, want_p)
        total = total + b * m
        while last > 5:
            total, last = _early(total, 0, want_p)
    want_p[0] = last
    assert torch.equal(o[:64].view(size, size), a)
    assert torch.equal(o[64:].view(size, size), total)
    assert torch.equal(p, want_p)


@triton.jit(noinline=True)
def _digits(n, base):
    if n == 0:
        return 1
    count = 0
    while n > 0:
        n = n // base
        count += 1
    return count


@triton.jit
def _count_digits(o, N: tl.constexpr):
    for i in range(N):
        total = 0
        for base in range(2, 5):
            total = total * 10 + _digits(i, base)
        tl.store(o + i, total)


def test_functions_of_scalars_that_are_not_to_be_inlined_called_in_loops() -> None:
    o = torch.zeros(100, dtype=torch.int32)
    _count_digits[(1,)](o, 100)

    def digits(n: int, base: int) -> int:
        return 1 if n < base else 1 + digits(n // base, base)

    assert o.tolist() == [int("".join(str(digits(i, b)) for b in (2, 3, 4))) for i in range(100)]


RECURSION = """"builtin.module"() ({
  "tt.func"() <{function_type = (i32) -> (), sym_name = "deep", sym_visibility = "public"}> ({
  ^bb0(%arg0: i32 loc("x")):
    %0 = "tt.call"(%arg0) <{callee = @again}> : (i32) -> i32 loc(#loc1)
    "tt.return"() : () -> () loc(#loc1)
  }) {noinline = false} : () -> () loc(#loc1)
  "tt.func"() <{function_type = (i32) -> i32, sym_name = "again", sym_visibility = "private"}> ({
  ^bb0(%arg0: i32 loc("x")):
    %0 = "tt.call"(%arg0) <{callee = @again}> : (i32) -> i32 loc(#loc2)
    "tt.return"(%0) : (i32) -> () loc(#loc2)
  }) {noinline = false} : () -> () loc(#loc2)
}) : () -> () loc(#loc1)
#loc1 = loc("/home/me/kernels.py":10:1)
#loc2 = loc("/home/me/kernels.py":12:1)
"""


def test_a_function_that_calls_itself_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedKernel, match=r"kernel deep, /home/me/kernels.py:12: a call of @again, which calls itself"
    ):
        kernel_source(parse(RECURSION), "deep")


@triton.jit
def _talks(x):
    return tl.inline_asm_elementwise("neg.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _talking(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, tl.map_elementwise(_talks, tl.load(x + i)))


def test_what_an_element_cannot_do_is_refused_with_its_line() -> None:
    with pytest.raises(
        UnsupportedKernel,
        match=r"kernel _talking, .*: tt.elementwise_inline_asm inside the function",
    ):
        _talking[(1,)](X, torch.zeros(64), 64)
