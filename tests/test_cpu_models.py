"""Tile products as tensor cores compute them, against the model's definition in exact rational arithmetic."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import effattn.cpu
from effattn.cpu import models, toolchain
from effattn.errors import RequestError

#: smallest normal exponent
LOWEST = {"f16": -14, "bf16": -126}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = Path(effattn.cpu.__file__).parent
    source = "#include <stdlib.h>\n" + "\n".join(
        (folder / name).read_text() for name in ("prelude.h", "models.c")
    )
    path = tmp_path_factory.mktemp("models") / "models.so"
    path.write_bytes(toolchain.build(source.replace('#include "prelude.h"\n', ""), what="the dot models"))
    return ctypes.CDLL(str(path))


def product(library: ctypes.CDLL, a: Any, b: Any, c: Any, block: int, bits: int, lowest: int) -> Any:
    out = c.copy()
    (m, k), n = a.shape, b.shape[1]
    pointers = [x.ctypes.data_as(ctypes.c_void_p) for x in (a, b, out)]
    sizes = [ctypes.c_long(x) for x in (m, n, k)]
    assert library.effattn_dot_blocks(*pointers, *sizes, 0, block, bits, lowest) == 1
    return out


def chain(a: Any, b: Any, c: float, block: int, bits: int, lowest: int) -> float:
    """One element: blocks of exact products, aligned, truncated, summed exactly, rounded toward zero to fp32."""
    for start in range(0, len(a), block):
        terms = [
            (Fraction(float(x)) * Fraction(float(y)), exponent(x, lowest) + exponent(y, lowest))
            for x, y in zip(a[start : start + block], b[start : start + block], strict=True)
            if x != 0 and y != 0
        ]
        if c != 0:
            terms.append((Fraction(float(c)), exponent(c, -126)))
        if not terms:
            continue
        step = Fraction(2) ** (max(e for _, e in terms) - bits)
        total = sum(int(x / step) for x, _ in terms) * step  # int() truncates
        c = toward_zero(total)
    return c


def exponent(x: float, lowest: int) -> int:
    return max(math.frexp(abs(float(x)))[1] - 1, lowest)


def toward_zero(x: Fraction) -> float:
    if x == 0:
        return 0.0
    size = abs(x)
    e = size.numerator.bit_length() - size.denominator.bit_length()
    e -= Fraction(2) ** e > size
    step = Fraction(2) ** (max(e, -126) - 23)
    return float(int(x / step) * step)


@pytest.mark.parametrize("elem", ["f16", "bf16"])
@pytest.mark.parametrize("name", ["volta", "ampere", "hopper"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6, 100.0])
def test_model_is_its_definition_bit_for_bit(library: ctypes.CDLL, name: str, elem: str, size: float) -> None:
    model = models.get(name)
    if elem not in model.block:
        assert name == "volta"
        return
    block, bits, lowest = model.block[elem], model.bits_for(elem), LOWEST[elem]
    random = np.random.default_rng(7)

    def held(x: Any) -> Any:
        if elem == "f16":
            return x.astype(np.float16).astype(np.float32)
        return (x.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)

    a = held(random.standard_normal((3, 48)) * size)
    b = held(random.standard_normal((48, 9)) * np.exp2(random.integers(-12, 4, (48, 9))))
    b[5] = 0.0
    c = (random.standard_normal((3, 9)) * size).astype(np.float32)
    c[0] = 0.0
    got = product(library, a, b, c, block, bits, lowest)
    want = [[chain(a[i], b[:, j], float(c[i, j]), block, bits, lowest) for j in range(9)] for i in range(3)]
    np.testing.assert_array_equal(got, np.array(want, np.float32))
    # A chain of fused multiply-adds, rounded to nearest, is something else.
    assert not np.array_equal(got, (c.astype(np.float64) + a.astype(np.float64) @ b).astype(np.float32))


def test_truncation_makes_sums_of_one_sign_too_small(library: ctypes.CDLL) -> None:
    random = np.random.default_rng(3)
    a = random.random((1, 4096)).astype(np.float16).astype(np.float32)
    b = random.random((4096, 8)).astype(np.float16).astype(np.float32)
    exact = a.astype(np.float64) @ b
    off = {}
    for name in ("hopper", "ampere"):
        model = models.get(name)
        got = product(
            library, a, b, np.zeros((1, 8), np.float32), model.block["f16"], model.bits_for("f16"), -14
        )
        off[name] = float(((got - exact) / exact).mean())
    assert off["ampere"] < off["hopper"] < -1e-6


def test_unknown_model_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="did you mean 'hopper'"):
        models.get("hoper")
