"""The rest of Triton's language on the CPU backend: what no other test file has as its subject."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from effattn.cpu.ir import parse
from effattn.cpu.lower import kernel_source
from effattn.errors import RequestError

TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])

# ------------------------------------------------------------------------------------- pointers of pointers


@triton.jit
def _through_pointers(table, o, N: tl.constexpr):
    i, k = tl.arange(0, 4), tl.arange(0, N)
    for j in range(4):
        tl.store(o + j * N + k, tl.load(tl.load(table + j).to(tl.pointer_type(tl.float32)) + k) * 2)
    rows = tl.load(table + i).to(tl.pointer_type(tl.float32))
    tl.store(o + 4 * N + i[:, None] * N + k[None, :], tl.load(rows[:, None] + k[None, :]))
    tl.store(rows[:, None] + k[None, :], tl.zeros([4, N], tl.float32), mask=k[None, :] < i[:, None])


def test_addresses_that_come_from_memory() -> None:
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(16, generator=g) for _ in range(4)]
    before = torch.stack(rows)
    o = torch.empty(8, 16)
    _through_pointers[(1,)](torch.tensor([x.data_ptr() for x in rows]), o, 16)
    assert torch.equal(o, torch.cat([before * 2, before]))
    assert torch.equal(torch.stack(rows), before.triu(0))


# ----------------------------------------------------------------------------------------------- descriptors


@triton.jit
def _in_tiles(x, o, m, n, OP: tl.constexpr, B: tl.constexpr):
    source = tl.make_tensor_descriptor(x, [m, n], [n, 1], [B, B])
    target = tl.make_tensor_descriptor(o, [m, n], [n, 1], [B, B])
    v = source.load([4, 8])
    if OP == "store":
        target.store([10, -3], v)
    elif OP == "add":
        target.atomic_add([10, 8], v)
    elif OP == "min":
        target.atomic_min([10, 8], v)
    elif OP == "max":
        target.atomic_max([10, 8], v)
    elif OP == "and":
        target.atomic_and([10, 8], v)
    elif OP == "or":
        target.atomic_or([10, 8], v)
    else:
        target.atomic_xor([10, 8], v)


_OPS: dict[str, Any] = {
    "add": torch.add, "min": torch.minimum, "max": torch.maximum, "and": torch.bitwise_and, "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
}  # fmt: skip


@pytest.mark.parametrize("op", ["store", *_OPS])
def test_descriptors_made_in_the_kernel(op: str) -> None:
    """Tiles that stick out: what is outside reads as 0 and is not written."""
    g = torch.Generator().manual_seed(1)
    x, o = (torch.randint(-99, 99, (20, 24), generator=g, dtype=torch.int32) for _ in range(2))
    want, tile = o.clone(), torch.zeros(16, 16, dtype=torch.int32)
    tile[:, :] = x[4:20, 8:24]
    if op == "store":
        want[10:20, :13] = tile[:10, 3:]
    else:
        want[10:20, 8:24] = _OPS[op](o[10:20, 8:24], tile[:10])
    _in_tiles[(1,)](x, o, 20, 24, op, 16)
    assert torch.equal(o, want)


@triton.jit
def _rows(source, target, index, o, B: tl.constexpr):
    i, k = tl.arange(0, B), tl.arange(0, 16)
    rows = tl.load(index + i)
    tl.store(o + i[:, None] * 16 + k[None, :], source.gather(rows, 4))
    target.scatter(source.gather(rows, 0) * 2, rows, 8)


def test_descriptors_gather_and_scatter_rows() -> None:
    x, y, o = torch.randn(32, 32), torch.zeros(32, 32), torch.empty(8, 16)
    rows = torch.tensor([3, 31, 0, 7, 12, 5, 28, 1], dtype=torch.int32)
    _rows[(1,)](
        TensorDescriptor.from_tensor(x, [1, 16]), TensorDescriptor.from_tensor(y, [1, 16]), rows, o, 8
    )
    assert torch.equal(o, x[rows.long(), 4:20])
    want = torch.zeros(32, 32)
    want[rows.long(), 8:24] = x[rows.long(), :16] * 2
    assert torch.equal(y, want)


# -------------------------------------------------------------------------------------------- block pointers


@triton.jit
def _blocks(x, o, m, n, B: tl.constexpr, PAD: tl.constexpr):
    source = tl.make_block_ptr(x, (m, n), (n, 1), (m - 4, 0), (B, B), (1, 0))
    target = tl.make_block_ptr(o, (m, n), (n, 1), (m - 4, 0), (B, B), (1, 0))
    total = tl.zeros([B, B], tl.float32)
    for _ in range(tl.cdiv(n, B)):
        v = tl.load(source, boundary_check=(0, 1), padding_option=PAD)
        total += v
        tl.store(target, v * 2, boundary_check=(0, 1))
        source = tl.advance(source, (0, B))
        target = tl.advance(target, (0, B))
    i = tl.arange(0, B)
    tl.store(o + i[:, None] * n + i[None, :], total)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_block_pointers_that_stick_out(padding: str) -> None:
    """Their last rows and columns lie outside. Triton 3.9 has removed them, and is given them back."""
    m, n, b = 20, 20, 8
    x, o = torch.randn(m, n, generator=torch.Generator().manual_seed(2)), torch.zeros(m, n)
    _blocks[(1,)](x, o, m, n, b, padding)
    padded = torch.full((m + 4, 24), 0.0 if padding == "zero" else math.nan)
    padded[:m, :n] = x
    want = torch.zeros(m, n)
    want[m - 4 :] = 2 * x[m - 4 :]
    tiles = padded[m - 4 :].split(b, 1)
    want[:b, :b] = tiles[0] + tiles[1] + tiles[2]
    assert torch.equal(torch.nan_to_num(o, nan=99.0), torch.nan_to_num(want, nan=99.0))
    assert bool(o.isnan().any()) == (padding == "nan")


# -------------------------------------------------------------------------------------------- random numbers


def _philox(seed: int, counter: np.ndarray) -> list[np.ndarray]:
    """Philox 4x32-10 (Salmon et al. 2011) with a 64-bit counter in its first words, as Triton's `philox`."""
    mask = np.uint64(0xFFFFFFFF)
    c = [counter.astype(np.uint64) & mask, counter.astype(np.uint64) >> np.uint64(32)]
    c += [np.zeros_like(c[0]), np.zeros_like(c[0])]
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        b, a = np.uint64(0xCD9E8D57) * c[2], np.uint64(0xD2511F53) * c[0]
        c = [(b >> np.uint64(32)) ^ c[1] ^ k0, b & mask, (a >> np.uint64(32)) ^ c[3] ^ k1, a & mask]
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & mask, (k1 + np.uint64(0xBB67AE85)) & mask
    return [x.astype(np.uint32) for x in c]


def _uniform(bits: np.ndarray) -> np.ndarray:
    signed = bits.view(np.int32)
    return np.where(signed < 0, -signed - 1, signed).astype(np.float32) * np.float32(4.6566127342e-10)


@triton.jit
def _random(o, oi, seed, start, N: tl.constexpr):
    i = tl.arange(0, N)
    at = start + i.to(tl.int64)
    tl.store(oi + i, tl.randint(seed, at))
    tl.store(o + i, tl.rand(seed, at))
    tl.store(o + N + i, tl.randn(seed, at))
    u = tl.rand4x(seed, at)
    tl.store(o + 2 * N + i, u[3] - u[2])
    n = tl.randn4x(seed, at)
    tl.store(o + 3 * N + i, n[3])


@pytest.mark.parametrize(("seed", "start"), [(0, 2**40), (2**40 + 7, 2**33 - 20)])
def test_random_numbers_of_every_kind_and_of_64_bit_counters(seed: int, start: int) -> None:
    n = 64
    o, oi = torch.empty(4, n), torch.empty(n, dtype=torch.int32)
    _random[(1,)](o, oi, seed, start, n)
    bits = _philox(seed, start + np.arange(n))
    u = [_uniform(x) for x in bits]
    assert np.array_equal(oi.numpy().view(np.uint32), bits[0])
    assert np.array_equal(o[0].numpy(), u[0])
    assert np.array_equal(o[2].numpy(), u[3] - u[2])

    def normal(a: np.ndarray, b: np.ndarray, function: Any) -> np.ndarray:
        """Box and Muller; through elementary functions, so not bit for bit."""
        a = np.maximum(a, np.float32(1e-7))
        return np.sqrt(-2 * np.log(a.astype(np.float64))) * function(2 * math.pi * b.astype(np.float64))

    np.testing.assert_allclose(o[1].numpy(), normal(u[0], u[1], np.cos), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(o[3].numpy(), normal(u[2], u[3], np.sin), rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------------------------------------- atomics


@triton.jit
def _contended(p, n, OP: tl.constexpr):
    x = tl.program_id(0)
    if OP == "add":
        tl.atomic_add(p + tl.arange(0, 4), (x + 1).to(p.dtype.element_ty), sem="relaxed")
    elif OP == "max":
        tl.atomic_max(p + tl.arange(0, 4), (x * 37 % n).to(p.dtype.element_ty), sem="relaxed")
    else:
        old = tl.load(p)
        done = False
        while not done:
            seen = tl.atomic_cas(p, old, old + 1)
            done = seen == old
            old = seen


@pytest.mark.parametrize(
    ("op", "dtype"),
    [(op, t) for op in ("add", "max") for t in (torch.int32, torch.int64, torch.uint32, torch.uint64)]
    + [(op, t) for op in ("add", "max") for t in (torch.float32, torch.float64)]
    + [("add", torch.float16), ("add", torch.bfloat16)]
    + [("cas", t) for t in (torch.int32, torch.int64, torch.float32, torch.float16, torch.bfloat16)],
)  # fmt: skip
def test_no_update_is_lost_between_programs(op: str, dtype: torch.dtype) -> None:
    programs = {torch.float16: 40, torch.bfloat16: 15}.get(dtype, 400)  # sums are exact in the type
    p = torch.zeros(4, dtype=dtype)
    _contended[(programs,)](p, programs, op)
    want = {"add": programs * (programs + 1) // 2, "max": programs - 1, "cas": programs}[op]
    assert p[0].item() == want
    if op != "cas":
        assert (p.double() == want).all()


# --------------------------------------------------------------------------------------------------- prints


@triton.jit
def _prints(x, N: tl.constexpr):
    tl.static_assert(N == 2, "two elements")
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.device_print("as hex", v, hex=True)
    tl.device_print("nothing else")
    tl.device_print("both", v, i)


@pytest.mark.parametrize(
    ("values", "hexadecimal", "plain"),
    [
        (torch.tensor([1, 255], dtype=torch.uint8), ["0x01", "0xff"], ["1", "255"]),
        (torch.tensor([-1, 2], dtype=torch.int64), ["0x" + "f" * 16, "0x" + "0" * 15 + "2"], ["-1", "2"]),
        (torch.tensor([1.5, -2.0]), ["0x3fc00000", "0xc0000000"], ["1.500000", "-2.000000"]),
        (torch.tensor([1.5, -2.0]).half(), ["0x3e00", "0xc000"], ["1.500000", "-2.000000"]),
        (torch.tensor([1.5, -2.0]).bfloat16(), ["0x3fc0", "0xc000"], ["1.500000", "-2.000000"]),
        (
            torch.tensor([1.5, -2.0]).double(),
            ["0x3ff8" + "0" * 12, "0xc" + "0" * 15],
            ["1.500000", "-2.000000"],
        ),
        (torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn), ["0x3c", "0xc0"], ["1.500000", "-2.000000"]),
    ],
    ids=["u8", "i64", "f32", "f16", "bf16", "f64", "f8"],
)
def test_prints(
    values: torch.Tensor, hexadecimal: list[str], plain: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    _prints[(1,)](values, 2)
    want = [f"pid (0, 0, 0) idx ({k}) as hex: {x}" for k, x in enumerate(hexadecimal)]
    want.append("pid (0, 0, 0) nothing else")
    want += [f"pid (0, 0, 0) idx ({k}) both: (operand 0) {x}" for k, x in enumerate(plain)]
    want += [f"pid (0, 0, 0) idx ({k}) both: (operand 1) {k}" for k in range(2)]
    assert [x.rstrip() for x in capfd.readouterr().out.splitlines()] == [x.rstrip() for x in want]


# ------------------------------------------------------------------------------------------ assorted functions


@triton.jit
def _assorted(x, o, oi, N: tl.constexpr, REORDER: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i, cache_modifier=".cg", eviction_policy="evict_first", volatile=True)
    tl.assume(N > 2)
    tl.debug_barrier()
    tl.store(o + i, tl.cumprod(v, 0), cache_modifier=".cs")
    tl.store(o + N + i, tl.sort(v, descending=True))
    tl.store(o + 2 * N + i, tl.clamp(v, -0.5, 0.5))
    tl.store(o + 3 * N + i, tl.math.div_rn(v, 3.0))
    tl.store(o + 4 * N + i, tl.math.sqrt_rn(tl.abs(v)))
    tl.store(o + 5 * N + i, tl.flip(tl.floor(v) + tl.ceil(v), 0))
    best, place = tl.max(v, 0, return_indices=True)
    tl.store(o + 6 * N + i, tl.where(i == place, best, 0.0))
    tl.store(o + 7 * N + tl.arange(0, 4), tl.topk(v, 4))
    tl.store(o + 7 * N + 4 + i, tl.fma(v, v, -v))
    n = (v * 8).to(tl.int32)
    tl.store(
        oi + i,
        tl.cat(n, n * 3, can_reorder=REORDER).reshape(2, N).trans(1, 0).reshape(2 * N).reshape(N, 2).sum(1),
    )
    tl.store(oi + N, tl.xor_sum(n, 0))
    tl.store(oi + N + 1, tl.reduce_or(n, 0))
    a, b = tl.swizzle2d(1, 2, 4, 4, 2)
    tl.store(oi + N + 2, a * 10 + b)
    tl.store(oi + N + 4 + tl.arange(0, 16), tl.histogram(n & 15, 16, mask=i < 20))


@pytest.mark.parametrize("reorder", [True] if TRITON < (3, 7) else [True, False])  # False is new in 3.7
@pytest.mark.filterwarnings("ignore:.*can_reorder")
def test_assorted_functions_of_the_language(reorder: bool) -> None:
    """`tl.cat` may reorder where it is told so; here it does not."""
    n = 32
    x = torch.randn(n, generator=torch.Generator().manual_seed(4))
    o, oi = torch.zeros(9 * n), torch.zeros(2 * n, dtype=torch.int32)
    _assorted[(1,)](x, o, oi, n, reorder)
    a = x.numpy()
    place = int(a.argmax())
    want = {
        0: np.cumprod(a), 1: np.sort(a)[::-1], 2: a.clip(-0.5, 0.5), 3: a / np.float32(3), 4: np.sqrt(np.abs(a)),
        5: (np.floor(a) + np.ceil(a))[::-1], 6: np.where(np.arange(n) == place, a.max(), 0),
    }  # fmt: skip
    for k, y in want.items():
        assert np.array_equal(o[k * n : (k + 1) * n].numpy(), y), k
    assert np.array_equal(o[7 * n : 7 * n + 4].numpy(), np.sort(a)[::-1][:4])
    wide = a.astype(np.float64)
    assert np.array_equal(o[7 * n + 4 : 8 * n + 4].numpy(), (wide * wide - wide).astype(np.float32))
    whole = np.trunc(wide * 8).astype(np.int32)
    assert oi[:n].tolist() == (whole * 4).tolist()
    assert oi[n].item() == np.bitwise_xor.reduce(whole)
    assert oi[n + 1].item() == np.bitwise_or.reduce(whole)
    # Rows in groups of two, columns fastest within a group: (1, 2) is the seventh of 16, row 0 of column 3.
    assert oi[n + 2].item() == 3
    assert oi[n + 4 : n + 20].tolist() == np.bincount(whole[:20] & 15, minlength=16).tolist()


@triton.jit
def _addresses(x, o, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, (x + i).to(tl.int64))


def test_addresses_are_numbers() -> None:
    x, o = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.int64)
    _addresses[(1,)](x, o, 8)
    assert o.tolist() == [x[k].data_ptr() for k in range(8)]


@triton.jit
def _single(x, o, N: tl.constexpr):
    first = tl.load(x + tl.arange(0, 1))
    tl.store(o, first.item() * 2)
    total = tl.sum(tl.load(x + tl.arange(0, N))[None, :], 1)
    if total.item() > 0:
        tl.store(o + 1, total.item())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_tensor_of_one_element_is_a_number(sign: int) -> None:
    x, o = sign * torch.arange(1.0, 9.0), torch.zeros(2)
    _single[(1,)](x, o, 8)
    assert o.tolist() == [2.0 * sign, 36.0 if sign > 0 else 0.0]


since_3_9 = pytest.mark.skipif(TRITON < (3, 9), reason="Triton has this since 3.9")


@triton.jit
def _loads_and_stores(x, o, flag, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.atomic_load(x + i, mask=i != 2)
    tl.atomic_store(o + i, tl.where(i == 2, v, v + v), mask=i != 3)
    tl.atomic_store(o + N, tl.atomic_load(x, sem="relaxed"), sem="relaxed")
    tl.atomic_store(flag, tl.atomic_load(flag) + 1, mask=tl.load(x + 1) > 0)


@since_3_9
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32, torch.int64], ids=str)
def test_atomic_loads_and_stores(dtype: torch.dtype) -> None:
    x, o = torch.tensor([-5, 3, 7, 2, 9, 1, 0, 4], dtype=dtype), torch.full((9,), 77, dtype=dtype)
    flag = torch.zeros(1, dtype=torch.int32)
    _loads_and_stores[(2,)](x, o, flag, 8)
    assert o.tolist() == [-10, 6, 0, 77, 18, 2, 0, 8, -5]
    assert flag.item() in (1, 2)  # no indivisible update: two programs may both have read 0
    x[1] = -3
    _loads_and_stores[(2,)](x, o, flag.zero_(), 8)
    assert flag.item() == 0


@triton.jit
def _hands_over(x, o, ready, N: tl.constexpr):
    i = tl.arange(0, N)
    if tl.program_id(0) == 0:
        tl.store(x + i, i * i)
        tl.atomic_store(ready, 1)
    else:
        while tl.atomic_load(ready) == 0:
            pass
        tl.store(o + i, tl.load(x + i))


@since_3_9
def test_an_atomic_store_hands_over_what_was_written_before() -> None:
    x, o, ready = (torch.zeros(n, dtype=torch.int32) for n in (64, 64, 1))
    _hands_over[(2,)](x, o, ready, 64)
    assert o.tolist() == [k * k for k in range(64)]


@triton.jit
def _divides(x, y, o, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(o + i, tl.fdiv(tl.load(x + i), tl.load(y + i), approx=True))


@since_3_9
def test_an_approximate_division_is_rounded_once() -> None:
    g = torch.Generator().manual_seed(6)
    x, y, o = torch.randn(64, generator=g), torch.randn(64, generator=g), torch.zeros(64)
    _divides[(1,)](x, y, o, 64)
    assert np.array_equal(o.numpy(), x.numpy() / y.numpy())


@triton.jit
def _polls(flag):
    tl.atomic_poll(flag, 1)


@since_3_9
def test_waiting_for_another_program_is_refused() -> None:
    with pytest.raises(
        RequestError, match=r"kernel _polls.*: the operation tt\.atomic_poll is not supported"
    ):
        _polls[(1,)](torch.ones(1, dtype=torch.int32))


@triton.jit
def _logic(x, y, o, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(o + i, a & b)
    tl.store(o + N + i, a | b)
    tl.store(o + 2 * N + i, a ^ b)
    tl.store(o + 3 * N + i, ~a)
    tl.store(o + 4 * N + i, a == b)
    tl.store(o + 5 * N + i, tl.where(a, b, ~b))
    tl.store(o + 6 * N + i, a < b)
    tl.store(o + 7 * N + i, tl.associative_scan(a, 0, _either))


@triton.jit
def _either(a, b):
    return a | b


def test_truth_values() -> None:
    x, y = torch.tensor([0, 0, 1, 1]).bool(), torch.tensor([0, 1, 0, 1]).bool()
    o = torch.zeros(8, 4, dtype=torch.bool)
    _logic[(1,)](x, y, o, 4)
    want = [x & y, x | y, x ^ y, ~x, x == y, torch.where(x, y, ~y), ~x & y, x.cumsum(0) > 0]
    assert torch.equal(o, torch.stack(want))


@triton.jit
def _several(o, n, N: tl.constexpr):
    a = 0
    b = 1.0
    c = tl.zeros([N], tl.float32)
    while (a < n) & (b < 100.0):
        a += 1
        b, c = b * 1.5 + a, c + b
    for j in tl.range(0, n, num_stages=3, loop_unroll_factor=2, flatten=True):
        c += j
    tl.store(o, a)
    tl.store(o + 1, b)
    tl.store(o + 2 + tl.arange(0, N), c)


@pytest.mark.parametrize("n", [0, 3, 20])
def test_while_loops_that_carry_several_values(n: int) -> None:
    o = torch.zeros(6)
    _several[(1,)](o, n, 4)
    a, b, c = 0, 1.0, 0.0
    while a < n and b < 100:
        a += 1
        b, c = b * 1.5 + a, c + b
    assert o.tolist() == [a, b, *[c + sum(range(n))] * 4]


# ------------------------------------------------------------------------------------------------ constants


def test_a_long_constant_is_a_table() -> None:
    """MLIR prints constants of more than 100 elements as their bytes."""
    data = np.arange(128, dtype="<i4")
    text = f""""builtin.module"() ({{
  "tt.func"() <{{function_type = (!tt.ptr<i32>) -> (), sym_name = "table", sym_visibility = "public"}}> ({{
  ^bb0(%o: !tt.ptr<i32>):
    %c = "arith.constant"() <{{value = dense<"0x{data.tobytes().hex().upper()}"> : tensor<128xi32>}}> : () -> tensor<128xi32>
    %p = "tt.splat"(%o) : (!tt.ptr<i32>) -> tensor<128x!tt.ptr<i32>>
    "tt.store"(%p, %c) : (tensor<128x!tt.ptr<i32>>, tensor<128xi32>) -> ()
    "tt.return"() : () -> ()
  }}) {{noinline = false}} : () -> ()
}}) : () -> ()
"""
    source, _ = kernel_source(parse(text), "table")
    assert "{" + ", ".join(map(str, range(128))) + "}" in source
