"""Control flow on the CPU backend: loops, branches, early returns, and what they carry; and what is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from effattn.cpu.ir import parse
from effattn.cpu.lower import kernel_source
from effattn.errors import RequestError


def run(
    kernel: Any,
    *args: Any,
    size: int = 64,
    dtype: torch.dtype = torch.float32,
    grid: int = 1,
    **constants: Any,
) -> torch.Tensor:
    o = torch.zeros(size, dtype=dtype)
    kernel[(grid,)](*args, o, **constants)
    return o


X = torch.randint(-50, 50, (256,), generator=torch.Generator().manual_seed(0)).float()


# --------------------------------------------------------------------------------------------------- loops


@triton.jit(do_not_specialize=["start", "stop", "step"])
def count(start, stop, step, o):
    n = 0
    last = stop
    for i in range(start, stop, step):
        n += 1
        last = i
    tl.store(o, n)
    tl.store(o + 1, last)


@pytest.mark.parametrize("wide", [False, True])
def test_ranges(wide: bool) -> None:
    cases = [(0, 5, 1), (0, 5, 2), (5, 5, 1), (5, 0, 1), (-7, -2, 3), (-3, 4, 1), (2**31 - 10, 2**31 - 1, 4)]
    if wide:
        cases = [(a + 2**40, b + 2**40, c) for a, b, c in cases]
    for start, stop, step in cases:
        o = run(count, start, stop, step, dtype=torch.int64)
        turns = list(range(start, stop, step))
        assert o[:2].tolist() == [len(turns), turns[-1] if turns else stop], (start, stop, step)


@triton.jit(do_not_specialize=["n"])
def carried(x, n, o, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(x + N + i)
    outside = a * 3 + b
    c = tl.zeros([N], tl.float32)
    for k in range(n):
        a, b = b, a  # a swap
        before = c
        c = c + a * (k + 1)
        if k % 2 == 1:
            c = c - before  # read after it was redefined
        b = b + tl.sum(before, 0) + outside
    tl.store(o + i, a)
    tl.store(o + N + i, b)
    tl.store(o + 2 * N + i, c + outside)


@pytest.mark.parametrize("n", [0, 1, 2, 5])
def test_what_a_loop_carries(n: int) -> None:
    size = 16
    o = run(carried, X, n, N=size)
    a, b, c = X[:size], X[size : 2 * size], torch.zeros(size)
    outside = a * 3 + b
    for k in range(n):
        a, b = b, a
        before = c
        c = c + a * (k + 1)
        if k % 2 == 1:
            c = c - before
        b = b + before.sum() + outside
    assert torch.equal(o[:48], torch.cat([a, b, c + outside]))


@triton.jit
def rotated(x, o, N: tl.constexpr):
    """Three tensors change places, some of them computed on the way, in a loop within a loop."""
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + i * N + j)
    b, c = a + 1, tl.trans(a)
    for _ in range(3):
        for k in range(2):
            a, b, c = b - k, tl.trans(c), a
        a, b = tl.trans(b), tl.trans(a) * 2
    tl.store(o + i * N + j, a)
    tl.store(o + N * N + i * N + j, b)
    tl.store(o + 2 * N * N + i * N + j, c)


def test_rotations_and_transposes_in_nested_loops() -> None:
    n = 8
    o = run(rotated, X, size=3 * n * n, N=n)
    a = X[: n * n].reshape(n, n)
    b, c = a + 1, a.T
    for _ in range(3):
        for k in range(2):
            a, b, c = b - k, c.T, a
        a, b = b.T, a.T * 2
    assert torch.equal(o, torch.cat([t.reshape(-1) for t in (a, b, c)]))


@triton.jit(do_not_specialize=["n"])
def collatz(n, o, N: tl.constexpr):
    v = n
    steps = 0
    path = tl.zeros([N], tl.int32)
    while v != 1:
        path = tl.where(tl.arange(0, N) == steps, v, path)
        if v % 2 == 0:
            v = v // 2
        else:
            v = 3 * v + 1
        steps += 1
    tl.store(o + tl.arange(0, N), path)
    tl.store(o + N, steps)


def test_while_loops() -> None:
    for n in (1, 2, 7, 27):
        o = run(collatz, n, size=129, dtype=torch.int32, N=128)
        path, v = [], n
        while v != 1:
            path.append(v)
            v = v // 2 if v % 2 == 0 else 3 * v + 1
        assert o[: len(path)].tolist() == path
        assert o[128] == len(path)


@triton.jit
def unrolled(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for k in tl.static_range(4):
        v = tl.load(x + i + k)
        if k > 1:
            total -= v
        else:
            total += v * k
    tl.store(o + i, total)


def test_static_ranges() -> None:
    assert torch.equal(run(unrolled, X, N=16)[:16], X[1:17] - X[2:18] - X[3:19])


# ------------------------------------------------------------------------------------------------- branches


@triton.jit(do_not_specialize=["flag"])
def chosen(x, flag, o, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(x + N + i)
    s = 1
    if flag > 1:
        a = a + b
        b = a * 2
        s = 5
    elif flag == 1:
        a, b = b, a
        if tl.sum(a, 0) > 0:
            s = 7
    tl.store(o + i, a)
    tl.store(o + N + i, b)
    tl.store(o + 2 * N, s)


@pytest.mark.parametrize("flag", [0, 1, 2])
def test_branches(flag: int) -> None:
    o = run(chosen, X, flag, N=16)
    a, b, s = X[:16], X[16:32], 1
    if flag > 1:
        a = a + b
        b = a * 2
        s = 5
    elif flag == 1:
        a, b = b, a
        s = 7 if a.sum() > 0 else 1
    assert torch.equal(o[:33], torch.cat([a, b, torch.tensor([float(s)])]))


@triton.jit(do_not_specialize=["n"])
def early(x, n, o, N: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, N)
    a = tl.load(x + pid * N + i)
    if pid >= n:
        tl.store(o + pid * N + i, -a)
        return
    b = a * a
    total = tl.sum(b, 0)
    for k in range(pid):
        b += a * k
    if total < 12000:
        b = b + 1
        if pid == 2:
            return
    tl.store(o + pid * N + i, b + total)


def test_early_returns() -> None:
    o = run(early, X, 4, size=96, grid=6, N=16)
    for pid in range(6):
        a = X[pid * 16 : pid * 16 + 16]
        want = -a
        if pid < 4:
            b = a * a
            total = b.sum()
            for k in range(pid):
                b = b + a * k
            if total < 12000:
                b = b + 1
            want = torch.zeros(16) if total < 12000 and pid == 2 else b + total
        assert torch.equal(o[pid * 16 : pid * 16 + 16], want), pid


@triton.jit
def helper(a, b):
    """Returns early, from a branch."""
    if a > b:
        return a - b
    return b * 2


@triton.jit
def calls(x, o):
    pid = tl.program_id(0)
    tl.store(o + pid, helper(tl.load(x + pid), tl.load(x + pid + 1)))


def test_functions_that_return_from_branches() -> None:
    o = run(calls, X, grid=16)
    a, b = X[:16], X[1:17]
    assert torch.equal(o[:16], torch.where(a > b, a - b, b * 2))


@triton.jit
def where_am_i(o):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    gx, gy, gz = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    at = (z * gy + y) * gx + x
    tl.store(o + at, x + 100 * y + 10000 * z)
    tl.store(o + gx * gy * gz + at, gx + 100 * gy + 10000 * gz)


def test_grids_of_three_axes() -> None:
    o = torch.zeros(2 * 3 * 4 * 5, dtype=torch.int32)
    where_am_i[(3, 4, 5)](o)
    want = [x + 100 * y + 10000 * z for z in range(5) for y in range(4) for x in range(3)]
    assert o.tolist() == want + [3 + 400 + 50000] * 60


def test_empty_and_long_grids() -> None:
    o = torch.zeros(2 * 70000, dtype=torch.int32)
    where_am_i[(0,)](o)
    where_am_i[(4, 0, 2)](o)
    assert not o.any()
    where_am_i[(1, 70000)](o)
    assert o[:70000].tolist() == [100 * y for y in range(70000)]
    where_am_i[(70000,)](o)
    assert o[:70000].tolist() == list(range(70000))


# ------------------------------------------------------------------------------------------------- refusals

MODULE = """"builtin.module"() ({
  "tt.func"() <{function_type = (!tt.ptr<f32>) -> (), sym_name = "strange", sym_visibility = "public"}> ({
  ^bb0(%arg0: !tt.ptr<f32> loc("x")):
    %0 = "tt.load"(%arg0) <{operandSegmentSizes = array<i32: 1, 0, 0>}> : (!tt.ptr<f32>) -> f32 loc(#loc1)
    %1 = {} loc(#loc2)
    "tt.store"(%arg0, %1) : (!tt.ptr<f32>, f32) -> () loc(#loc1)
    "tt.return"() : () -> () loc(#loc1)
  }) {noinline = false} : () -> () loc(#loc1)
}) : () -> () loc(#loc1)
#loc1 = loc("/home/me/kernels.py":10:1)
#loc2 = loc("/home/me/kernels.py":12:34)
"""


@pytest.mark.parametrize(
    ("operation", "what"),
    [
        ('"tt.made_up"(%0) : (f32) -> f32', "the operation tt.made_up"),
        ('"arith.addf"(%0, %0) : (f32, f32) -> f6E2M3FN', "the type f6E2M3FN"),
        ('"tt.fp_to_fp"(%0) <{rounding = 7 : i32}> : (f32) -> f16', "tt.fp_to_fp with rounding mode 7"),
        (
            '"tt.reduce"(%0) <{axis = 0 : i32}> ({\n'
            "^bb0(%a: f32, %b: f32):\n"
            '%2 = "tt.made_up"(%a) : (f32) -> f32 loc(#loc2)\n'
            '"tt.reduce.return"(%2) : (f32) -> () loc(#loc2)\n'
            "}) : (f32) -> f32",
            "tt.made_up inside the combine region of tt.reduce",
        ),
    ],
    ids=["operation", "type", "attribute", "combine region"],
)
def test_what_is_not_supported_is_refused_with_its_name_and_line(operation: str, what: str) -> None:
    with pytest.raises(RequestError) as caught:
        kernel_source(parse(MODULE.replace("{} loc", operation + " loc")), "strange")
    message = str(caught.value)
    assert message.startswith(f"kernel strange, /home/me/kernels.py:12: {what}")
    assert message.endswith("is not supported by the CPU backend")
    assert str(copy.copy(caught.value)) == message  # it can be passed between processes
    assert str(pickle.loads(pickle.dumps(caught.value))) == message


LOOP = """"builtin.module"() ({
  "tt.func"() <{function_type = () -> (), sym_name = "round", sym_visibility = "public"}> ({
  ^bb0:
    "cf.br"()[^bb1] : () -> () loc(#loc1)
  ^bb1:
    "cf.br"()[^bb1] : () -> () loc(#loc1)
  }) {noinline = false} : () -> () loc(#loc1)
}) : () -> () loc(#loc1)
#loc1 = loc("/home/me/kernels.py":10:1)
"""


def test_a_loop_made_of_branches_is_refused() -> None:
    with pytest.raises(RequestError, match=r"kernel round, /home/me/kernels.py:10: a loop made of branches"):
        kernel_source(parse(LOOP), "round")


@triton.jit
def looks_at_other_threads(x, o):
    i = tl.arange(0, 32)
    v = tl.load(x + i)
    v = tl.inline_asm_elementwise("activemask.b32 $0;", "=r,f", [v], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(o + i, v)


def test_a_refusal_reaches_the_user_from_a_launch() -> None:
    lines, first = inspect.getsourcelines(looks_at_other_threads.fn)
    line = first + next(i for i, text in enumerate(lines) if "activemask" in text)
    with pytest.raises(RequestError) as caught:
        run(looks_at_other_threads, torch.zeros(32))
    assert f"kernel looks_at_other_threads, {__file__}:{line}: the PTX instruction activemask.b32" in str(
        caught.value
    )
