"""Atomics, gather, histogram, libdevice, inline assembly, fp8, prints, assertions, descriptors, random numbers."""

from __future__ import annotations

import math
import re
import time

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, globaltimer, smid
from triton.tools.tensor_descriptor import TensorDescriptor

from effattn.cpu.debug import DeviceAssertion
from effattn.cpu.support import UnsupportedKernel

# ------------------------------------------------------------------------------------------------- atomics


@triton.jit
def _sum_up(out, x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(out + i, tl.load(x + i), mask=i < N - 1)
    tl.atomic_add(out + N - 1 + i * 0, tl.load(x + i))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64]
)
def test_no_update_is_lost(dtype: torch.dtype) -> None:
    """Whole numbers small enough that every sum is exact in every order; 400 programs on all threads."""
    programs = 400 if dtype not in (torch.float16, torch.bfloat16) else 7
    x = (torch.arange(8) % 3).to(dtype)
    out = torch.zeros(8, dtype=dtype)
    _sum_up[(programs,)](out, x, 8)
    expected = x.double() * programs
    expected[7] = float(x.double().sum()) * programs
    assert torch.equal(out.double(), expected)


@triton.jit
def _old_values(p, v, old, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(v + i)
    if OP == "add":
        r = tl.atomic_add(p + i, x)
    elif OP == "max":
        r = tl.atomic_max(p + i, x)
    elif OP == "min":
        r = tl.atomic_min(p + i, x)
    elif OP == "and":
        r = tl.atomic_and(p + i, x)
    elif OP == "or":
        r = tl.atomic_or(p + i, x)
    elif OP == "xor":
        r = tl.atomic_xor(p + i, x)
    else:
        r = tl.atomic_xchg(p + i, x)
    tl.store(old + i, r)


_OPS = {
    "add": lambda a, b: a + b,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "xchg": lambda a, b: b,
}


@pytest.mark.parametrize("op", _OPS)
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float32"])
def test_an_atomic_gives_the_old_value_and_leaves_the_new(dtype: str, op: str) -> None:
    if dtype == "float32" and op in ("and", "or", "xor"):
        return
    draw = np.random.default_rng(1)
    a, b = (draw.integers(-(2**31), 2**31, 64).astype(dtype) for _ in range(2))
    if dtype == "float32":
        a[:4], b[:4] = [0.0, -0.0, np.inf, -1.5], [1.0, -2.0, -7.0, -1.25]
    memory, old = torch.from_numpy(a.copy()), torch.from_numpy(np.zeros_like(a))
    _old_values[(1,)](memory, torch.from_numpy(b), old, 64, op)
    assert old.numpy().tobytes() == a.tobytes()
    assert np.array_equal(memory.numpy(), _OPS[op](a, b))


@triton.jit
def _locked(lock, counter, n):
    for _ in range(n):
        while tl.atomic_cas(lock, 0, 1) == 1:
            pass
        tl.store(counter, tl.load(counter) + 1)
        tl.atomic_xchg(lock, 0)


def test_compare_and_swap_makes_a_lock() -> None:
    lock, counter = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _locked[(8,)](lock, counter, 50)
    assert counter.item() == 400


# ------------------------------------------------------------------------------------- gather, histogram


@triton.jit
def _gather(x, index, out, M: tl.constexpr, N: tl.constexpr, AXIS: tl.constexpr):
    i = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + i, tl.gather(tl.load(x + i), tl.load(index + i), AXIS))


@pytest.mark.parametrize("axis", [0, 1])
def test_gather(axis: int) -> None:
    x = torch.randn(8, 16)
    index = torch.randint(0, x.shape[axis], x.shape, dtype=torch.int32)
    out = torch.empty_like(x)
    _gather[(1,)](x, index, out, 8, 16, axis)
    assert torch.equal(out, x.gather(axis, index.long()))


@triton.jit
def _histogram(x, out, N: tl.constexpr, BINS: tl.constexpr):
    tl.store(out + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, N)), BINS))


def test_histogram() -> None:
    x = torch.randint(0, 16, (128,), dtype=torch.int32)
    x[:2] = torch.tensor([-1, 16])
    out = torch.empty(16, dtype=torch.int32)
    _histogram[(1,)](x, out, 128, 16)
    assert torch.equal(out.long(), torch.bincount(x[2:].long(), minlength=16))


# --------------------------------------------------------------------------------------- random numbers


def _philox(seed: int, counter: np.ndarray, rounds: int = 10) -> list[np.ndarray]:
    """Philox 4x32 as Triton defines it (Salmon et al. 2011), in numpy."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter.astype(np.uint64), *(np.zeros_like(counter, np.uint64) for _ in range(3))]
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(rounds):
        b, a = np.uint64(0xCD9E8D57) * c[2], np.uint64(0xD2511F53) * c[0]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & mask, (a >> np.uint64(32)) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return [x.astype(np.uint32) for x in c]


@triton.jit
def _draw(bits, uniform, seed, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, i)
    tl.store(bits + i, a)
    tl.store(bits + N + i, b)
    tl.store(bits + 2 * N + i, c)
    tl.store(bits + 3 * N + i, d)
    tl.store(uniform + i, tl.rand(seed, i))


@pytest.mark.parametrize("seed", [0, 42, 2**40 + 7])
def test_philox_and_rand_are_bit_equal_to_their_definition(seed: int) -> None:
    n = 256
    bits, uniform = torch.empty(4, n, dtype=torch.int32), torch.empty(n)
    _draw[(1,)](bits, uniform, seed, n)
    expected = _philox(seed, np.arange(n))
    assert np.array_equal(bits.numpy().view(np.uint32), np.stack(expected))
    signed = expected[0].view(np.int32)
    folded = np.where(signed < 0, -signed - 1, signed)
    assert np.array_equal(uniform.numpy(), folded.astype(np.float32) * np.float32(4.6566127342e-10))


# ------------------------------------------------------------------------------------------------- fp8

FP8 = {
    "e4m3fn": (torch.float8_e4m3fn, 448.0),
    "e5m2": (torch.float8_e5m2, 57344.0),
    "e4m3fnuz": (torch.float8_e4m3fnuz, 240.0),
    "e5m2fnuz": (torch.float8_e5m2fnuz, 57344.0),
}


@triton.jit
def _convert(x, y, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@pytest.mark.parametrize("kind", FP8)
def test_all_codes_of_fp8_load(kind: str) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(FP8[kind][0])
    out = torch.empty(256)
    _convert[(1,)](codes, out, 256)
    expected = codes.float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
    assert torch.equal(out.signbit()[~out.isnan()], expected.signbit()[~out.isnan()])


@pytest.mark.parametrize("kind", FP8)
def test_rounding_to_fp8_at_every_boundary(kind: str) -> None:
    """Every value, every midpoint of neighbours, and what is next to these, from fp32; too large saturates."""
    dtype, largest = FP8[kind]
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double()
    values = values[values.isfinite()].unique()
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat([values, middles]).float()
    points = torch.cat(
        [
            points,
            torch.nextafter(points, torch.tensor(torch.inf)),
            torch.nextafter(points, torch.tensor(-torch.inf)),
        ]
    )
    points = torch.cat(
        [points, torch.tensor([largest * 1.01, -largest * 2, torch.inf, -torch.inf, torch.nan, 1e-40, -0.0])]
    )
    points = torch.nn.functional.pad(points, (0, 2048 - len(points)))
    out = torch.empty(2048, dtype=dtype)
    _convert[(1,)](points, out, 2048)
    got = out.float()
    assert torch.equal(got.isnan(), points.isnan())
    # torch rounds to nearest even too, but does not saturate.
    expected = points.clamp(-largest, largest).to(dtype).float()
    assert torch.equal(got.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@triton.jit
def _dot_fp8(a, b, c):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(c + i, tl.dot(tl.load(a + i), tl.load(b + i)))


def test_products_of_fp8_are_exact() -> None:
    a, b = (torch.randint(-8, 9, (16, 16)).float().to(torch.float8_e4m3fn) for _ in range(2))
    c = torch.empty(16, 16)
    _dot_fp8[(1,)](a, b, c)
    assert torch.equal(c, a.float() @ b.float())


@triton.jit
def _toward_zero(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty, fp_downcast_rounding="rtz"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_toward_zero(dtype: torch.dtype) -> None:
    x = torch.cat(
        [torch.randn(1000), torch.tensor([65519.0, -1e30, 1e-7, -6e-8, 0.0, -0.0, torch.inf, -torch.inf])]
    )
    x = torch.nn.functional.pad(x, (0, 1024 - len(x)))
    y = torch.empty(1024, dtype=dtype)
    _toward_zero[(1,)](x, y, 1024)
    nearest = x.to(dtype)
    less = torch.nextafter(nearest, torch.zeros((), dtype=dtype))
    assert torch.equal(y, torch.where(nearest.double().abs() > x.double().abs(), less, nearest))


# -------------------------------------------------------------------------------------------- libdevice


@triton.jit
def _functions(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, libdevice.tanh(a))
    tl.store(out + N + i, libdevice.pow(libdevice.abs(a), b))
    tl.store(out + 2 * N + i, libdevice.erfinv(libdevice.tanh(a)))
    tl.store(out + 3 * N + i, libdevice.log1p(libdevice.abs(a)))
    tl.store(out + 4 * N + i, libdevice.normcdf(a))
    tl.store(out + 5 * N + i, libdevice.atan2(a, b))
    tl.store(out + 6 * N + i, libdevice.fast_dividef(a, b))
    tl.store(out + 7 * N + i, libdevice.cospi(a))


@pytest.mark.parametrize("dtype", [torch.float32])
def test_functions_of_libdevice(dtype: torch.dtype) -> None:
    x, y = torch.randn(128, dtype=dtype), torch.randn(128, dtype=dtype)
    out = torch.empty(8, 128, dtype=dtype)
    _functions[(1,)](x, y, out, 128)
    a, b = x.double(), y.double()
    expected = [
        a.tanh(), a.abs().pow(b), torch.erfinv(a.tanh()), a.abs().log1p(), torch.special.ndtr(a), torch.atan2(a, b), a / b,
        torch.cos(math.pi * a),
    ]  # fmt: skip
    for row, (got, wanted) in enumerate(zip(out.double(), expected, strict=True)):
        # erfinv of a rounded argument: its derivative is large near 1. Elsewhere: 2 ulp of fp32.
        allowed = (
            2.0**-22 * (1000 if row == 2 else 1) * wanted.abs().clamp(min=2.0**-3 if row == 7 else 2.0**-20)
        )
        assert ((got - wanted).abs() <= allowed).all(), f"function {row}"


@triton.jit
def _directed(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(out + i, libdevice.add_rd(a, 1.0))
    tl.store(out + N + i, libdevice.add_ru(a, 1.0))
    tl.store(out + 2 * N + i, libdevice.add_rz(a, 1.0))
    tl.store(out + 3 * N + i, libdevice.float2int_rd(a).to(tl.float32))
    tl.store(out + 4 * N + i, libdevice.float2int_rn(a).to(tl.float32))
    tl.store(out + 5 * N + i, libdevice.popc(libdevice.float_as_int(a)).to(tl.float32))
    tl.store(out + 6 * N + i, libdevice.clz(libdevice.float_as_int(a)).to(tl.float32))


def test_directed_rounding_and_bits_of_libdevice() -> None:
    x = torch.cat([torch.randn(120) * 10, torch.tensor([0.5, 1.5, -0.5, 2.5, 3.3e9, -4e9, torch.nan, 1e-9])])
    out = torch.empty(7, 128)
    _directed[(1,)](x, out, 128)
    down, up, zero, floor, near, ones, leading = out
    exact = x.double() + 1.0
    nearest = exact.float()
    below = torch.where(nearest.double() > exact, torch.nextafter(nearest, torch.tensor(-torch.inf)), nearest)
    above = torch.where(nearest.double() < exact, torch.nextafter(nearest, torch.tensor(torch.inf)), nearest)
    fine = ~x.isnan()
    assert torch.equal(down[fine], below[fine])
    assert torch.equal(up[fine], above[fine])
    assert torch.equal(zero[fine], torch.where(exact > 0, below, above)[fine])
    limit = (-(2.0**31), 2.0**31 - 1)
    assert torch.equal(floor, x.double().floor().clamp(*limit).nan_to_num(nan=0.0).float())
    assert torch.equal(near, x.double().round().clamp(*limit).nan_to_num(nan=0.0).float())
    bits = x.numpy().view(np.uint32)
    assert ones.tolist() == [int(b).bit_count() for b in bits]
    assert leading.tolist() == [32 - int(b).bit_length() for b in bits]


# --------------------------------------------------------------------------------------- inline assembly


@triton.jit
def _assembly(x, k, out, packed, N: tl.constexpr):
    i = tl.arange(0, N)
    a, n = tl.load(x + i), tl.load(k + i)
    tl.store(
        out + i,
        tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1
        ),
    )
    block: tl.constexpr = """
        {
            .reg .pred p;       // softplus with a guard
            .reg .f32 t<2>;
            setp.gt.f32 p, $1, 20.0;
            @p mov.f32 $0, $1;
            mul.f32 t0, $1, 0f3FB8AA3B;
            ex2.approx.ftz.f32 t0, t0;
            add.f32 t1, t0, 1.0;
            lg2.approx.f32 t1, t1;
            @!p mul.f32 $0, t1, 0f3F317218;
        }
    """
    tl.store(
        out + N + i, tl.inline_asm_elementwise(block, "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)
    )
    nth = tl.inline_asm_elementwise(
        "fns.b32 $0, $1, 0, 2;", "=r,r", [n], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(out + 2 * N + i, nth.to(tl.float32))
    lo, hi = tl.inline_asm_elementwise(
        "{ .reg .b64 t; mul.wide.s32 t, $2, $3; mov.b64 {$0, $1}, t; }",
        "=r,=r,r,r", [n, n], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    tl.store(packed + i, lo)
    tl.store(packed + N + i, hi)
    # Four bytes at once.
    s = tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0, 0x3C;",
        "=r,r,r",
        [n.to(tl.int8), (n >> 8).to(tl.int8)],
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )
    tl.store(packed + 2 * N + i, s.to(tl.int32))


def test_inline_assembly() -> None:
    n = 64
    x = torch.cat([torch.randn(60) * 5, torch.tensor([25.0, -200.0, 0.0, 1e-40])])
    k = torch.randint(-(2**31), 2**31 - 1, (n,), dtype=torch.int32)
    out, packed = torch.empty(3, n), torch.empty(3, n, dtype=torch.int32)
    _assembly[(1,)](x, k, out, packed, n)
    assert torch.allclose(out[0].double(), torch.exp2(x.double()), rtol=2.0**-22, atol=2.0**-126)
    assert torch.allclose(
        out[1].double(), torch.nn.functional.softplus(x.double(), threshold=20), rtol=1e-5, atol=1e-6
    )
    second = [[b for b in range(32) if v >> b & 1][1] for v in k.tolist()]
    assert out[2].tolist() == second
    square = k.long() ** 2
    assert torch.equal(packed[0], square.to(torch.int32))
    assert torch.equal(packed[1], (square >> 32).to(torch.int32))
    assert torch.equal(packed[2], (k.to(torch.int8) ^ (k >> 8).to(torch.int8)).int())


@triton.jit
def _unknown_assembly(x):
    i = tl.arange(0, 16)
    y = tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [tl.load(x + i)], dtype=tl.int32, is_pure=True, pack=1
    )
    tl.store(x + i, y)


def test_assembly_that_looks_at_other_threads_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedKernel,
        match=r"_unknown_assembly, .*test_cpu_extras.py:\d+: the PTX instruction shfl.sync.idx.b32",
    ):
        _unknown_assembly[(1,)](torch.zeros(16, dtype=torch.int32))


@triton.jit
def _one_thread(x, out, clock):
    gdc_wait()
    tl.inline_asm_elementwise("bar.sync 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(out, tl.load(x) + smid())
    tl.inline_asm_elementwise("fence.acq_rel.gpu;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(clock, globaltimer())
    gdc_launch_dependents()


def test_waiting_for_other_threads_and_launches_is_nothing() -> None:
    x, out = torch.tensor([7], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    clock = torch.zeros(1, dtype=torch.int64)
    before = time.monotonic_ns()
    _one_thread[(1,)](x, out, clock)
    assert out.item() == 7
    assert before <= clock.item() <= time.monotonic_ns()


@triton.jit
def _fp4(x, pairs, back, masked, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    to: tl.constexpr = "{ .reg .b8 t; cvt.rn.satfinite.e2m1x2.f32 t, $2, $1; cvt.u32.u8 $0, t; }"
    # Not -a, which is 0 - a in Triton 3.6 and 3.7, and so no negative zero.
    p = tl.inline_asm_elementwise(to, "=r,f,f", [a, a * -1], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(pairs + i, p)
    of: tl.constexpr = "{ .reg .b8 t; cvt.u8.u32 t, $1; cvt.rn.f16x2.e2m1x2 $0, t; }"
    tl.store(back + i, tl.inline_asm_elementwise(of, "=r,r", [p], dtype=tl.int32, is_pure=True, pack=1))
    logic: tl.constexpr = "lop3.b32 $0, $1, $2, $3, $4;"
    args: tl.constexpr = (0x000F000F, 0x64006400, 0xEA)  # (a & b) | c
    tl.store(
        masked + i,
        tl.inline_asm_elementwise(
            logic, "=r,r,n,n,n", [p, args[0], args[1], args[2]], dtype=tl.int32, is_pure=True, pack=1
        ),
    )


def test_assembly_with_fp4_and_numbers() -> None:
    """Every value of e2m1, the middles between them, and what lies beyond; constraints that ask for a number."""
    grid = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    x = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([1e9])])
    pairs, back, masked = (torch.zeros(16, dtype=torch.int32) for _ in range(3))
    _fp4[(1,)](x, pairs, back, masked, 16)
    even = torch.tensor([*range(8), 0, 2, 2, 4, 4, 6, 6, 7], dtype=torch.int32)
    assert torch.equal(pairs, even | (even | 8) << 4)
    values = back.view(torch.float16).view(16, 2).float()
    assert torch.equal(values[:, 0], grid[even.long()])
    assert torch.equal(values[:, 1], -grid[even.long()])
    assert torch.equal(masked, pairs & 0x000F000F | 0x64006400)


@triton.jit
def _assembly_of_one_line(x, TEXT: tl.constexpr):
    y = tl.inline_asm_elementwise(TEXT, "=r,r", [tl.load(x)], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(x, y)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mov.u32 $0, %tid.x;", "the operand %tid.x"),
        ("mov.b32 $0, undeclared;", "the operand undeclared"),
        ("cvt.rs.f16x2.f32 $0, $1, $1, $1;", "the PTX instruction cvt.rs.f16x2.f32"),
    ],
)
def test_assembly_that_is_not_known_is_refused_before_the_c_compiler(text: str, named: str) -> None:
    with pytest.raises(UnsupportedKernel, match=re.escape(named)):
        _assembly_of_one_line[(1,)](torch.zeros(1, dtype=torch.int32), text)


# ------------------------------------------------------------------------------------- prints, assertions


@triton.jit
def _talk(x, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.device_print("value", tl.load(x + i))
    tl.device_print("number", tl.program_id(0) - 1)


def test_device_print(capfd: pytest.CaptureFixture[str]) -> None:
    _talk[(2,)](torch.tensor([0.5, -2.0]), 2)
    lines = capfd.readouterr().out.splitlines()
    assert sorted(lines) == sorted(
        line
        for p in (0, 1)
        for line in (
            f"pid ({p}, 0, 0) idx (0) value: 0.500000",
            f"pid ({p}, 0, 0) idx (1) value: -2.000000",
            f"pid ({p}, 0, 0) idx () number: {p - 1}",
        )
    )


@triton.jit
def _checked(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.device_assert(v < 5, "100% too large")
    tl.store(out + i, v)


def test_device_assert_raises_where_it_fails_and_only_there() -> None:
    x, out = torch.tensor([1.0, 2.0, 9.0, 3.0]), torch.zeros(4)
    with pytest.raises(
        DeviceAssertion,
        match=r"100% too large; kernel _checked, .*test_cpu_extras.py:\d+, program \(0, 0, 0\), element \(2\)",
    ):
        _checked[(1,)](x, out, 4, debug=True)
    assert out.sum() == 0, "the program ended there"
    _checked[(1,)](x.clamp(max=4), out, 4, debug=True)
    assert out.tolist() == [1, 2, 4, 3]
    _checked[(1,)](x, out, 4)
    assert out[2] == 9, "without debug there is no assertion"


# ------------------------------------------------------------------------------- descriptors, calls, returns


@triton.jit
def _copy_tiles(src, dst, M: tl.constexpr):
    i = tl.program_id(0)
    dst.store([i * M, 8], src.load([i * M, 0]) * 2)


def test_descriptors_made_by_the_host() -> None:
    x, y = torch.randn(50, 40), torch.zeros(50, 40)
    _copy_tiles[(4,)](
        TensorDescriptor.from_tensor(x, [16, 16]), TensorDescriptor.from_tensor(y, [16, 16]), 16
    )
    expected = torch.zeros(50, 40)
    expected[:, 8:24] = x[:, :16] * 2
    assert torch.equal(y, expected)


@triton.jit(noinline=True)
def _apart(x, p):
    if x > 3.0:
        return x * 2
    tl.store(p, 1.0)
    return x * 3


@triton.jit
def _calls(p, x):
    tl.store(p + 1, _apart(x, p))


@pytest.mark.parametrize(("x", "expected"), [(2.0, [1.0, 6.0]), (4.0, [0.0, 8.0])])
def test_functions_that_are_not_to_be_inlined(x: float, expected: list[float]) -> None:
    p = torch.zeros(2)
    _calls[(1,)](p, x)
    assert p.tolist() == expected


@triton.jit
def _returns(p, n, m):
    i = tl.program_id(0)
    if i >= n:
        return
    if i % 2 == 0:
        if m <= i:
            return
        tl.store(p + i, 1.0)
    else:
        tl.store(p + i, 3.0)
        return
    tl.store(p + 16 + i, 2.0)


def test_several_early_returns() -> None:
    p = torch.zeros(32)
    _returns[(16,)](p, 10, 6)
    assert p.tolist() == [1, 3, 1, 3, 1, 3, 0, 3, 0, 3, *[0] * 6, 2, 0, 2, 0, 2, *[0] * 11]
