"""Dot models: tile products as tensor cores compute them, against their definition in whole numbers, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from tensor_cores import defined

import effattn.cpu
from effattn.cpu import models
from effattn.errors import RequestError

#: (block, F) by model and element type, from the published tables: MMA-Sim (arXiv:2511.10909), FTTN (2403.00232)
TABLE: dict[str, dict[str, tuple[int, int]]] = {
    "volta": {"f16": (4, 23)},
    "turing": {"f16": (8, 24)},
    "ampere": {"f16": (8, 24), "bf16": (8, 24), "tf32": (4, 24)},
    "ada": {"f16": (8, 24), "bf16": (8, 24), "tf32": (4, 24), "e4m3": (16, 13), "e5m2": (16, 13)},
    "hopper": {"f16": (16, 25), "bf16": (16, 25), "tf32": (8, 25), "e4m3": (32, 13), "e5m2": (32, 13)},
    "blackwell": {"f16": (16, 25), "bf16": (16, 25), "tf32": (8, 25), "e4m3": (32, 25), "e5m2": (32, 25)},
}
#: element type -> (dtype, smallest normal exponent)
TYPES: dict[str, tuple[torch.dtype, int]] = {
    "f16": (torch.float16, -14),
    "bf16": (torch.bfloat16, -126),
    "tf32": (torch.float32, -126),
    "e4m3": (torch.float8_e4m3fn, -6),
    "e5m2": (torch.float8_e5m2, -14),
}


# ----------------------------------------------------------------------------------------------- running


@triton.jit
def _product(a, b, c, o, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, MOST: tl.constexpr = None):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x = tl.load(a + i[:, None] * K + k[None, :])
    y = tl.load(b + k[:, None] * N + j[None, :])
    at = i[:, None] * N + j[None, :]
    z = tl.load(c + at)
    tl.store(o + at, tl.dot(x, y, z, out_dtype=o.dtype.element_ty, max_num_imprecise_acc=MOST))


def run(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, model: str, most: int | None = None) -> Any:
    out = torch.empty_like(c)
    (m, k), n = a.shape, b.shape[1]
    with effattn.cpu.active(dot_model=model):
        _product[(1,)](a, b, c, out, m, n, k, most)
    return out.double().numpy()


def tf32(x: Any, how: str = "truncate") -> Any:
    bits = np.asarray(x, np.float32).view(np.uint32)
    return (
        ((bits + (0x1000 if how == "nearest" else 0)) & np.uint32(0xFFFFE000))
        .view(np.float32)
        .astype(np.float64)
    )


def drawn(shape: tuple[int, ...], elem: str, how: str, seed: int) -> torch.Tensor:
    """Numbers of an element type: `normal`, `spread` over many exponents, `tiny` (subnormals), `edges` (a few bits)."""
    dtype, lowest = TYPES[elem]
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape)
    if how == "spread":
        x *= np.exp2(random.integers(max(lowest, -40), 7, shape))
    elif how == "tiny":
        x *= np.exp2(random.integers(-3, 4, shape) + float(max(lowest, -75)))
    elif how == "edges":
        x = random.choice(
            [0.0, -0.0, 1.0, -1.0, 1.5, 2.0**-6, -(2.0**-5), 1.0 + 2.0**-2, -240.0, 2.0**7], shape
        )
    elif how == "positive":
        x = np.abs(x)
    return torch.from_numpy(x).to(dtype)


def same(got: Any, want: Any) -> None:
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.nan_to_num(got, nan=0.0), np.nan_to_num(want, nan=0.0))


PAIRS = [(model, elem) for model, row in TABLE.items() for elem in row]


@pytest.mark.parametrize("how", ["normal", "spread", "tiny", "edges"])
@pytest.mark.parametrize(("model", "elem"), PAIRS)
def test_a_model_is_its_definition_bit_for_bit(model: str, elem: str, how: str) -> None:
    block, bits = TABLE[model][elem]
    low = TYPES[elem][1]
    a, b = drawn((4, 64), elem, how, 1), drawn((64, 8), elem, how, 2)
    size = float((a.double() @ b.double()).abs().mean())
    c = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 8)) * size).float()
    c[0] = 0.0
    wide = [tf32(x.numpy()) if elem == "tf32" else x.double().numpy() for x in (a, b)]
    got = run(a, b, c, model)
    same(got, defined(*wide, c, block, bits, (low, low), "e8m13" if bits == 13 else "f32"))
    if how == "spread":
        # Not the same as any neighbouring model: one bit more, or blocks of half the size.
        for other in ((block, bits + 1), (block // 2, bits)):
            assert not np.array_equal(
                got, defined(*wide, c, *other, (low, low), "e8m13" if bits == 13 else "f32")
            )


@pytest.mark.parametrize("model", ["volta", "ampere", "hopper"])
def test_accumulators_of_half_precision_are_rounded_to_nearest_after_each_block(model: str) -> None:
    block, bits = TABLE[model]["f16"]
    for how in ("normal", "tiny", "edges"):
        a, b = drawn((4, 64), "f16", how, 4), drawn((64, 8), "f16", how, 5)
        c = drawn((4, 8), "f16", how, 6)
        want = defined(a.double().numpy(), b.double().numpy(), c, block, bits, (-14, -14), "f16")
        same(run(a, b, c, model), want)


@pytest.mark.parametrize("model", TABLE)
def test_infinities_and_nan_come_through(model: str) -> None:
    inf, nan = float("inf"), float("nan")
    a, b = torch.ones(8, 16).half(), torch.ones(16, 8).half()
    c = torch.zeros(8, 8)
    a[0, 3], a[1, 5], a[2, 0], a[2, 9] = inf, nan, inf, -inf
    a[3, 2], b[2, 7] = 0.0, inf
    c[4, 0], c[5, 1], a[5, 0] = inf, -inf, inf
    block, bits = TABLE[model]["f16"]
    same(run(a, b, c, model), defined(a.double().numpy(), b.double().numpy(), c, block, bits, (-14, -14)))
    huge = torch.full((4, 16), 3e38)
    same(
        run(huge.bfloat16(), torch.full((16, 4), 2.0).bfloat16(), torch.zeros(4, 4), "hopper"),
        np.full((4, 4), inf),
    )


@pytest.mark.parametrize("model", ["ada", "hopper", "blackwell"])
def test_products_of_both_kinds_of_fp8(model: str) -> None:
    block, bits = TABLE[model]["e4m3"]
    a, b = drawn((4, 64), "e4m3", "tiny", 1), drawn((64, 8), "e5m2", "tiny", 2)
    c = torch.zeros(4, 8)
    to = "e8m13" if bits == 13 else "f32"
    same(run(a, b, c, model), defined(a.double().numpy(), b.double().numpy(), c, block, bits, (-6, -14), to))


@pytest.mark.parametrize(("most", "step"), [(None, 0), (0, 32), (32, 32), (64, 64), (100, 128)])
def test_hopper_moves_sums_of_fp8_to_another_accumulator_when_told(most: int | None, step: int) -> None:
    a, b = drawn((4, 128), "e4m3", "normal", 1), drawn((128, 8), "e4m3", "normal", 2)
    c = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    p, q = a.double().numpy(), b.double().numpy()
    want = c.numpy() if step else defined(p, q, c, 32, 13, (-6, -6), "e8m13")
    for start in range(0, 128 if step else 0, step or 1):
        part = defined(
            p[:, start : start + step], q[start : start + step], np.zeros((4, 8)), 32, 13, (-6, -6), "e8m13"
        )
        want = want + part.astype(np.float32)
    same(run(a, b, c, "hopper", most), want)


@pytest.mark.parametrize("model", ["volta", "turing", "ampere"])
def test_fp8_is_multiplied_as_fp16_where_there_are_no_units_for_it(model: str) -> None:
    block, bits = TABLE[model]["f16"]
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz):
        a, b = (torch.randn(s).to(dtype) for s in ((4, 32), (32, 4)))
        want = defined(a.double().numpy(), b.double().numpy(), torch.zeros(4, 4), block, bits, (-14, -14))
        same(run(a, b, torch.zeros(4, 4), model), want)


@pytest.mark.parametrize("model", models.MODELS)
def test_what_is_no_tensor_core_product_is_the_same_in_every_model(model: str) -> None:
    """int8 is exact, fp64 a chain, and so is fp32 in IEEE precision."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, s, generator=g, dtype=torch.int8) for s in ((4, 64), (64, 4)))
    c = torch.randint(-(2**31), 2**31, (4, 4), generator=g).int()
    same(run(a, b, c, model), ((c.long() + a.long() @ b.long() + 2**31) % 2**32 - 2**31).numpy())
    x, y, z = (
        torch.randn(4, 64, generator=g).double(),
        torch.randn(64, 4, generator=g).double(),
        torch.zeros(4, 4).double(),
    )
    if model != "ieee-unfused":
        same(run(x, y, z, model), run(x, y, z, "ieee"))
    if models.get(model).tf32 == "none":
        single = x.float(), y.float(), z.float()
        with_ieee = _ieee_product(*single, "ieee")
        same(run(*single, model), with_ieee)
        same(_ieee_product(*single, model), with_ieee)


@triton.jit
def _ieee(a, b, c, o, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    at = i[:, None] * N + j[None, :]
    x, y = tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + j[None, :])
    acc = tl.load(c + at)
    tl.store(o + at, tl.dot(x, y, acc, input_precision="ieee", out_dtype=acc.dtype))


def _ieee_product(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, model: str) -> Any:
    out = torch.empty_like(c)
    with effattn.cpu.active(dot_model=model):
        _ieee[(1,)](a, b, c, out, *c.shape, a.shape[1])
    return out.double().numpy()


def test_the_unfused_chain_rounds_the_product_first() -> None:
    for dtype in (torch.float32, torch.float64):
        g = torch.Generator().manual_seed(1)
        a, b, c = (torch.randn(s, generator=g, dtype=dtype) for s in ((8, 16), (16, 8), (8, 8)))
        want = c.numpy().copy()
        for k in range(16):
            want = want + a.numpy()[:, k : k + 1] * b.numpy()[k : k + 1]
        got = _ieee_product(a, b, c, "ieee-unfused")
        same(got, want)
        assert not np.array_equal(got, _ieee_product(a, b, c, "ieee"))


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("ieee", "nearest"),
        ("ieee-tf32-truncated", "truncate"),
        ("hopper", "truncate"),
        ("hopper-tf32-rounded", "nearest"),
    ],
)
def test_how_fp32_becomes_tf32(model: str, how: str) -> None:
    """One factor is 1, so the result shows the other one."""
    a = drawn((16, 16), "tf32", "spread", 1)
    got = run(a, torch.eye(16), torch.zeros(16, 16), model)
    same(got, tf32(a.numpy(), how))
    assert not np.array_equal(got, tf32(a.numpy(), "truncate" if how == "nearest" else "nearest"))


# ---------------------------------------------------------------------------------- the probes of the literature


def probe(model: str, elem: str, terms: dict[int, float], k: int, c: float = 0.0) -> float:
    """The sum of products with the given values at their places of k, and 0 elsewhere."""
    dtype = TYPES[elem][0]
    a, b = torch.zeros(1, k), torch.zeros(k, 1)
    for place, value in terms.items():
        # Two factors, so that fp8 and fp16 reach large powers of two.
        half = 2.0 ** np.clip(np.floor(np.log2(abs(value)) / 2), TYPES[elem][1], None)
        a[0, place], b[place, 0] = value / half, half
    assert torch.equal(a.to(dtype).float(), a)
    assert torch.equal(b.to(dtype).float(), b)
    return float(run(a.to(dtype), b.to(dtype), torch.full((1, 1), c), model)[0, 0])


@pytest.mark.parametrize(("model", "elem"), PAIRS)
def test_a_mask_of_large_numbers_reveals_the_order_of_accumulation(model: str, elem: str) -> None:
    """FPRev (arXiv:2411.00442): +2^n at i, -2^n at j, small ones elsewhere; what survives was added after both met.

    In a chain of blocks, all in the block of the second large number and in those between are lost. With the first large
    number in the first block, what survives is just what comes in the blocks after the second.
    """
    block, bits = TABLE[model][elem]
    k = 4 * block
    unit = 2.0**-10 if elem == "e4m3" else 1.0  # fp8 reaches few powers of two
    large = unit * 2.0 ** (bits + 1)
    for i, j in ((0, 1), (0, block - 1), (0, block), (1, 2 * block), (0, 3 * block + 1)):
        terms = dict.fromkeys(range(k), unit) | {i: large, j: -large}
        after = k - (j // block + 1) * block
        assert probe(model, elem, terms, k) == after * unit, (i, j)


@pytest.mark.parametrize(("model", "elem"), PAIRS)
def test_the_width_of_the_alignment(model: str, elem: str) -> None:
    """2^n + 2^(n - s) - 2^n in one block: kept for s up to F, lost beyond (FTTN's test of extra bits)."""
    _, bits = TABLE[model][elem]
    for s in (bits - 1, bits, bits + 1):
        got = probe(model, elem, {0: 2.0**12, 1: 2.0 ** (12 - s), 2: -(2.0**12)}, 4)
        assert got == (2.0 ** (12 - s) if s <= bits else 0.0), s


@pytest.mark.parametrize("model", [m for m in TABLE if m != "volta"])
def test_extra_bits_carry_into_the_result_and_the_rest_is_cut(model: str) -> None:
    """Sums of numbers below the last place of 1: with one extra bit 1 + 2 x 2^-24 is seen, with two 1 + 4 x 2^-25."""
    bits = TABLE[model]["f16"][1]
    for extra in range(1, 5):
        small = 2.0 ** -(23 + extra)
        terms = {0: 1.0} | dict.fromkeys(range(1, 4), small)
        kept = sum(int(small * 2**bits) for _ in range(3)) / 2**bits
        want = 1.0 + int(kept * 2**23) / 2**23
        assert probe(model, "f16", terms, 4) == want


def test_rounding_is_toward_zero_for_both_signs() -> None:
    """1 + 1.5 ulp becomes 1 + 1 ulp, and the same below zero: round-to-nearest gives 2 ulp, downward differs by sign."""
    for sign in (1.0, -1.0):
        terms = {0: sign, 1: sign * 2.0**-23, 2: sign * 2.0**-24}
        assert probe("hopper", "f16", terms, 4) == sign * (1 + 2.0**-23)
        assert probe("ieee", "f16", {0: sign, 1: sign * 2.0**-24, 2: sign * 2.0**-24}, 4) == sign


def test_the_significand_of_a_product_is_not_normalised_before_alignment() -> None:
    """1.5 x 1.5 = 2.25 counts with exponent 0: a bit at 2^-25 beside it is kept on Hopper."""
    a, b = torch.tensor([[1.5, 2.0**-12, -1.5, 0.0]]), torch.tensor([[1.5], [2.0**-13], [1.5], [0.0]])
    assert run(a.half(), b.half(), torch.zeros(1, 1), "hopper")[0, 0] == 2.0**-25
    assert run(a.half(), b.half(), torch.zeros(1, 1), "ampere")[0, 0] == 0.0


def test_truncation_makes_sums_of_one_sign_too_small() -> None:
    """n = 4,096 positive products: about -2.6e-5 on Hopper and -5.0e-5 on Ampere on the average, never positive."""
    random = np.random.default_rng(3)
    a, b = (torch.from_numpy(random.random(s)).half() for s in ((4, 4096), (4096, 8)))
    exact = a.double().numpy() @ b.double().numpy()
    off = {m: (run(a, b, torch.zeros(4, 8), m) - exact) / exact for m in ("hopper", "ampere", "ieee")}
    assert off["hopper"].max() <= 0
    assert off["ampere"].max() <= 0
    assert -3.5e-5 < off["hopper"].mean() < -1.7e-5
    assert -6.5e-5 < off["ampere"].mean() < -3.5e-5
    assert np.sqrt((off["ieee"] ** 2).mean()) < 4e-6


# ------------------------------------------------------------------------------------------------- choosing


def test_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="did you mean 'hopper'"):
        models.get("hoper")
    with (
        pytest.raises(RequestError, match="unknown dot model 'tpu'; there are ieee"),
        effattn.cpu.active(dot_model="tpu"),
    ):
        pass
    assert models.selected() == "ieee"


def value(device: str = "cpu", **options: Any) -> float:
    """1 + 2^-24 + 2^-24 in ulps above 1, which tells a chain from a block."""
    a, b = (
        torch.tensor([[1.0, 2.0**-12, 2.0**-12, 0.0]]),
        torch.tensor([[1.0], [2.0**-12], [2.0**-12], [0.0]]),
    )
    given = [x.to(device) for x in (a.half(), b.half(), torch.zeros(1, 1), torch.empty(1, 1))]
    _product[(1,)](*given, 1, 1, 4, None, **options)
    return float((given[3].cpu()[0, 0] - 1) * 2**23)


def test_one_kernel_runs_under_several_models_in_turn() -> None:
    """The compiled kernels do not mix, whichever way a model is chosen."""
    assert value() == 0.0
    with effattn.cpu.active(dot_model="hopper"):
        assert value() == 1.0
        with effattn.cpu.active(dot_model="ieee"):
            assert value() == 0.0
        with effattn.cpu.active():
            assert value() == 1.0
    assert value() == 0.0
    assert value(dot_model="hopper") == 1.0
    assert value() == 0.0


def test_a_model_holds_in_other_threads_and_under_an_emulated_gpu() -> None:
    seen: list[float] = []
    with effattn.cpu.active(dot_model="hopper"):
        thread = threading.Thread(target=lambda: seen.append(value()))
        thread.start()
        thread.join()
    assert seen == [1.0]
    with effattn.cpu.as_cuda():
        assert value("cuda") == 0.0
        with effattn.cpu.active(dot_model="ampere"):
            assert value("cuda") == 1.0
        assert value("cuda") == 0.0


def test_a_block_ends_with_an_exception_and_the_model_is_what_it_was() -> None:
    with pytest.raises(ZeroDivisionError), effattn.cpu.active(dot_model="hopper"):
        raise ZeroDivisionError
    assert models.selected() == "ieee"
    assert models.VARIABLE not in os.environ


def _python(code: str, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != models.VARIABLE} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_environment_variable_chooses_and_is_inherited() -> None:
    show = "from effattn.cpu import models; print(models.selected())"
    assert _python(show) == "ieee\n"
    assert _python(show, EFFATTN_DOT_MODEL="ampere") == "ampere\n"
    assert "EFFATTN_DOT_MODEL: unknown dot model 'ampre'" in _python(show, EFFATTN_DOT_MODEL="ampre")
    child = (
        "import subprocess, sys, effattn.cpu\n"
        f"with effattn.cpu.active(dot_model='ada'): subprocess.run([sys.executable, '-c', {show!r}])"
    )
    assert _python(child) == "ada\n"


def _command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != models.VARIABLE} | environment
    line = [str(Path(sys.executable).with_name("effattn")), *arguments]
    return subprocess.run(line, env=env, capture_output=True, text=True, check=False)


def test_the_command_cpu_hands_the_model_on() -> None:
    program = ("--", "python", "-c", "from effattn.cpu import models; print(models.selected())")
    assert _command("cpu", "--dot-model", "turing", *program).stdout == "turing\n"
    assert _command("cpu", *program, EFFATTN_DOT_MODEL="volta").stdout == "volta\n"
    done = _command("cpu", "--dot-model", "hoper", *program)
    assert (done.returncode, done.stdout) == (2, "")
    assert "did you mean 'hopper'" in done.stderr
