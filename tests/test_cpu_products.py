"""Products that are made of simpler ones: input precisions of fp32, and scaled operands (microscaling formats)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tensor_cores import defined

import effattn.cpu


def chain(a: Any, b: Any, c: Any) -> Any:
    """c = fma(a, b, c) in the order of k. Products of the factors used here are exact in float64, their sum is not."""
    c = np.array(c, np.float32)
    for k in range(a.shape[1]):
        p = a[:, k : k + 1].astype(np.float64) * b[k : k + 1].astype(np.float64)
        s = p + c
        t = s - p
        error = (p - (s - t)) + (c.astype(np.float64) - t)  # Knuth: s + error is exact
        bits = s.view(np.int64)
        step = np.where((error > 0) == (s > 0), 1, -1)
        odd = np.where((error != 0) & (bits % 2 == 0), bits + step, bits).view(np.float64)
        c = np.where(np.isfinite(s), odd, s).astype(np.float32)
    return c


def tf32(x: Any) -> Any:
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def bf16(x: Any) -> Any:
    return torch.from_numpy(np.array(x, np.float32)).bfloat16().float().numpy()


def split(x: Any, how: str) -> list[Any]:
    if how == "tf32x3":
        return [tf32(x), x - tf32(x)]
    parts, rest = [], x
    for _ in range(2 if how == "bf16x3" else 3):
        parts.append(bf16(rest))
        rest = rest - parts[-1]
    return parts


#: pairs of parts in the order of their addition
ORDER = {
    "tf32x3": [(1, 0), (0, 1), (0, 0)],
    "bf16x3": [(1, 0), (0, 1), (0, 0)],
    "bf16x6": [(1, 1), (2, 0), (0, 2), (1, 0), (0, 1), (0, 0)],
}


@triton.jit
def _product(a, b, c, o, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, HOW: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + j[None, :])
    at = i[:, None] * N + j[None, :]
    z = tl.load(c + at)
    for _ in range(2):
        z = tl.dot(x, y, z, input_precision=HOW)
    tl.store(o + at, z)


@pytest.fixture(scope="module")
def factors() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(5)
    return [torch.randn(s, generator=g) for s in ((8, 32), (32, 16), (8, 16))]


def run(how: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
    o = torch.empty_like(c)
    _product[(1,)](a, b, c, o, *c.shape, a.shape[1], how)
    return o.numpy()


@pytest.mark.parametrize("how", ORDER)
def test_split_precisions_are_their_definition_bit_for_bit(how: str, factors: list[torch.Tensor]) -> None:
    a, b, c = (x.numpy() for x in factors)
    p, q = split(a, how), split(b, how)
    want = c
    for _ in range(2):
        total = np.zeros_like(c)
        for i, j in ORDER[how]:
            left, right = (tf32(p[i]), tf32(q[j])) if how == "tf32x3" else (p[i], q[j])
            total = chain(left, right, total)
        want = total + want
    np.testing.assert_array_equal(run(how, *factors), want)


def test_each_precision_is_as_accurate_as_it_should_be(factors: list[torch.Tensor]) -> None:
    a, b, c = (x.double().numpy() for x in factors)
    size = np.abs(a) @ np.abs(b)
    error = {
        how: float((np.abs(run(how, *factors) - (c + 2 * (a @ b))) / size).max())
        for how in ("bf16x3", "tf32", "tf32x3", "bf16x6", "ieee")
    }
    assert 2.0**-13 < error["tf32"] < 2.0**-10
    assert 2.0**-20 < error["bf16x3"] < 2.0**-15
    for how in ("tf32x3", "bf16x6", "ieee"):
        assert error[how] < 2.0**-21, how


@pytest.mark.parametrize("how", ORDER)
def test_an_infinity_beside_an_exact_number_stays_one(how: str) -> None:
    a, b, c = torch.ones(8, 32), torch.ones(32, 16), torch.zeros(8, 16)
    b[3, 2], b[4, 5] = float("inf"), float("nan")
    got = run(how, a, b, c)
    assert np.isinf(got[:, 2]).all()
    assert np.isnan(got[:, 5]).all()
    assert (np.delete(got, [2, 5], axis=1) == 64).all()


def test_split_precisions_under_a_tensor_core_model(factors: list[torch.Tensor]) -> None:
    """Blocks that truncate, and parts that are cut where ieee rounds: near the exact product, but other bits."""
    a, b, c = (x.double().numpy() for x in factors)
    for how in ORDER:
        plain = run(how, *factors)
        with effattn.cpu.active(dot_model="hopper"):
            got = run(how, *factors)
        assert not np.array_equal(got, plain)
        limit = 2.0**-15 if how == "bf16x3" else 2.0**-18
        assert (np.abs(got - (c + 2 * (a @ b))) <= limit * (np.abs(a) @ np.abs(b))).all()


# ------------------------------------------------------------------------------- how a precision is asked for


@triton.jit
def _asked(a, o, HOW: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    x = tl.load(a + at)
    one = (i[:, None] == i[None, :]).to(tl.float32)
    if HOW == "nothing":
        y = tl.dot(x, one)
    elif HOW == "none":
        y = tl.dot(x, one, input_precision=None)
    elif HOW == "allowed":
        y = tl.dot(x, one, allow_tf32=True)
    elif HOW == "forbidden":
        y = tl.dot(x, one, allow_tf32=False)
    else:
        y = tl.dot(x, one, input_precision=HOW)
    tl.store(o + at, y)


@pytest.mark.parametrize(
    ("how", "is_tf32"),
    [
        ("nothing", True),
        ("none", True),
        ("allowed", True),
        ("tf32", True),
        ("forbidden", False),
        ("ieee", False),
    ],
)
def test_tf32_is_the_default_for_fp32(how: str, is_tf32: bool) -> None:
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    o = torch.empty_like(a)
    _asked[(1,)](a, o, how)
    assert np.array_equal(o.numpy(), tf32(a.numpy()) if is_tf32 else a.numpy())


def test_tritons_own_setting_of_the_default_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRITON_F32_DEFAULT, for kernels that do not say."""

    @triton.jit
    def kernel(a, o):
        i = tl.arange(0, 16)
        at = i[:, None] * 16 + i[None, :]
        one = (i[:, None] == i[None, :]).to(tl.float32)
        tl.store(o + at, tl.dot(tl.load(a + at), one))

    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    o = torch.empty_like(a)
    kernel[(1,)](a, o)
    assert torch.equal(o, a)


# ------------------------------------------------------------------------------------------- scaled operands


@triton.jit
def _scaled(
    a, sa, b, sb, c, o,
    FA: tl.constexpr, FB: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, PACK_A: tl.constexpr, PACK_B: tl.constexpr,
):  # fmt: skip
    four_a: tl.constexpr = 2 if FA == "e2m1" else 1
    four_b: tl.constexpr = 2 if FB == "e2m1" else 1
    rows_a: tl.constexpr = M if PACK_A else M // four_a
    deep_a: tl.constexpr = K // four_a if PACK_A else K
    deep_b: tl.constexpr = K // four_b if PACK_B else K
    columns_b: tl.constexpr = N if PACK_B else N // four_b
    i, j, g = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // 32)
    x = tl.load(a + tl.arange(0, rows_a)[:, None] * deep_a + tl.arange(0, deep_a)[None, :])
    y = tl.load(b + tl.arange(0, deep_b)[:, None] * columns_b + tl.arange(0, columns_b)[None, :])
    at = i[:, None] * N + j[None, :]
    z = tl.load(c + at)
    if HAS_A and HAS_B:
        u = tl.load(sa + i[:, None] * (K // 32) + g[None, :])
        v = tl.load(sb + j[:, None] * (K // 32) + g[None, :])
        z = tl.dot_scaled(x, u, FA, y, v, FB, z, lhs_k_pack=PACK_A, rhs_k_pack=PACK_B)
    elif HAS_A:
        u = tl.load(sa + i[:, None] * (K // 32) + g[None, :])
        z = tl.dot_scaled(x, u, FA, y, None, FB, z, lhs_k_pack=PACK_A, rhs_k_pack=PACK_B)
    else:
        v = tl.load(sb + j[:, None] * (K // 32) + g[None, :])
        z = tl.dot_scaled(x, None, FA, y, v, FB, z, lhs_k_pack=PACK_A, rhs_k_pack=PACK_B)
    tl.store(o + at, z)


FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def operand(shape: tuple[int, int], kind: str, pack_axis: int, seed: int) -> tuple[torch.Tensor, Any]:
    """What the kernel is given, and the numbers that it stands for."""
    g = torch.Generator().manual_seed(seed)
    if kind == "e2m1":
        codes = torch.randint(0, 16, shape, generator=g, dtype=torch.uint8)
        low, high = (codes[::2], codes[1::2]) if pack_axis == 0 else (codes[:, ::2], codes[:, 1::2])
        return (low | high << 4).contiguous(), FP4[codes.numpy()]
    dtype = {
        "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16
    }[kind]  # fmt: skip
    x = torch.randn(shape, generator=g).to(dtype)
    return (x.view(torch.uint8) if kind[0] == "e" else x), x.double().numpy()


def powers(scale: torch.Tensor) -> Any:
    """2^(s - 127) for each group of 32, NaN for 255."""
    s = scale.numpy().astype(np.float64)
    return np.repeat(np.where(s == 255, np.nan, np.exp2(s - 127)), 32, axis=1)


CASES = [
    ("e4m3", "e4m3", True, True, True, True),
    ("e5m2", "e4m3", True, True, True, True),
    ("e2m1", "e2m1", True, True, True, True),
    ("e2m1", "e2m1", True, True, False, False),
    ("e2m1", "e5m2", True, True, True, True),
    ("bf16", "e2m1", False, True, True, False),
    ("e4m3", "fp16", True, False, True, True),
    ("bf16", "bf16", True, True, True, True),
]


def scaled(case: tuple[Any, ...], model: str, low: int = 118, high: int = 136) -> tuple[Any, Any, Any, Any]:
    fa, fb, has_a, has_b, pack_a, pack_b = case
    m, n, k = 8, 16, 64
    a, p = operand((m, k), fa, 1 if pack_a else 0, 1)
    b, q = operand((k, n), fb, 0 if pack_b else 1, 2)
    g = torch.Generator().manual_seed(3)
    sa, sb = (torch.randint(low, high, (rows, k // 32), generator=g, dtype=torch.uint8) for rows in (m, n))
    if high == 256:
        sa[0, 0], sb[1, 1] = 255, 0
    c, o = torch.randn(m, n, generator=g), torch.empty(m, n)
    with effattn.cpu.active(dot_model=model):
        _scaled[(1,)](a, sa, b, sb, c, o, fa, fb, has_a, has_b, m, n, k, pack_a, pack_b)
    p = p * powers(sa) if has_a else p
    q = q * powers(sb).T if has_b else q
    return o.numpy(), p, q, c.numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0]} {c[1]} {c[2:]}")
def test_scaled_products_are_their_definition_bit_for_bit(case: tuple[Any, ...]) -> None:
    got, p, q, c = scaled(case, "ieee")
    np.testing.assert_array_equal(got, chain(p, q, c))
    assert not np.array_equal(got, chain(p / 2, q, c)), "a wrong scale is seen"


def test_a_scale_of_255_is_nan_and_one_of_0_is_the_smallest_power() -> None:
    got, p, q, c = scaled(("e4m3", "e4m3", True, True, True, True), "ieee", 100, 256)
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1:]).sum() > 0
    with np.errstate(over="ignore", invalid="ignore"):
        want = chain(p.astype(np.float32), q.astype(np.float32), c)
    fine = np.isfinite(want)
    np.testing.assert_array_equal(got[fine], want[fine])


@pytest.mark.parametrize("kinds", [("e4m3", "e5m2"), ("e2m1", "fp16")])
def test_scaled_products_on_tensor_cores_are_those_of_16_bit_operands(kinds: tuple[str, str]) -> None:
    fa, fb = kinds
    got, p, q, c = scaled((fa, fb, True, fb != "fp16", True, True), "hopper")
    low = -14 if "fp16" in kinds else -126
    np.testing.assert_array_equal(got, defined(p, q, c, 16, 25, (low, low)))
