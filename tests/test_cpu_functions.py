"""Exponentials, logarithms and the like on the CPU backend, in ulp of interval arithmetic (Arb, by python-flint).

An error in ulp is the distance from the exact value in units of the format's last place there. Near the zeros of Bessel
functions and of lgamma no finite bound of that kind holds for any common library; there the unit is that of 1/8.
A measurement for docs/cpu-exactness.md draws more values (tests/recording.py).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import flint
import mpmath
import numpy as np
import pytest
import recording
import torch
from flint import arb

FLOAT = {"fp32": torch.float32, "fp64": torch.float64}
#: significant bits, exponent of the smallest subnormal, exponent beyond the largest number
FORMAT = {"fp32": (24, -149, 128), "fp64": (53, -1074, 1024)}
BLOCK = 256
#: values of each function and type
COUNT = 8_192 if recording.many() else 1024

Interval = tuple[float, float]


@dataclass(frozen=True)
class Function:
    """A function of one or two arguments, where it is measured, and the largest error allowed (fp32, fp64) in ulp."""

    name: str
    exact: Callable[..., Any]
    #: where arguments are drawn; an interval (-inf, inf) or (0, inf) takes all exponents alike
    domain: Sequence[Interval]
    bounds: tuple[float, float | None]
    second: Sequence[Interval] | None = None
    #: errors are counted in ulp of at least this
    floor: float = 0.0
    #: the largest arguments differ by type: (fp32, fp64) magnitudes beyond which the result overflows
    source: str = "libdevice"

    @property
    def call(self) -> str:
        return f"{self.source}.{self.name}"


def _cbrt(x: Any) -> Any:
    return x.root(3) if x >= 0 else -((-x).root(3))


INF = math.inf
ROOT = arb(1) / 2
ALL: list[Interval] = [(-INF, INF)]
POSITIVE: list[Interval] = [(0.0, INF), (0.5, 2.0)]
SMALL: list[Interval] = [(-8.0, 8.0), (-1.0, 1.0)]
UNIT: list[Interval] = [(-1.0, 1.0), (-0.01, 0.01)]
EXPONENT: list[Interval] = [(-110.0, 95.0), (-1.0, 1.0)]
ANGLE: list[Interval] = [(-10.0, 10.0), (-1e5, 1e5), (-1e-3, 1e-3)]
NEAR: float = 0.125

FUNCTIONS = [
    Function("exp", lambda x: x.exp(), EXPONENT, (0.95, 1.0), source="tl"),
    Function("exp2", lambda x: (x * arb.const_log2()).exp(), [(-152.0, 129.0), (-1.0, 1.0)], (0.9, 1.0), source="tl"),
    Function("log", lambda x: x.log(), POSITIVE, (1.0, 1.0), source="tl"),
    Function("log2", lambda x: x.log() / arb.const_log2(), POSITIVE, (1.0, 1.5), source="tl"),
    Function("sin", lambda x: x.sin(), ANGLE, (1.0, 1.0), source="tl"),
    Function("cos", lambda x: x.cos(), ANGLE, (1.0, 1.0), source="tl"),
    Function("erf", lambda x: x.erf(), SMALL, (1.5, 1.5), source="tl"),
    Function("sqrt", lambda x: x.sqrt(), POSITIVE, (0.5, 0.5), source="tl"),
    Function("rsqrt", lambda x: x.rsqrt(), POSITIVE, (1.5, 1.5), source="tl"),
    Function("sigmoid", lambda x: 1 / (1 + (-x).exp()), [(-80.0, 80.0)], (3.0, 3.0), source="tl"),
    Function("acos", lambda x: x.acos(), UNIT, (1.0, 1.0)),
    # glibc 2.36 in fp32, all values of a range tried: acosh from 1 to 8 is off by up to 2.0002 ulp, tanh from 2^-13 to
    # 12 by up to 2.189.
    Function("acosh", lambda x: x.acosh(), [(1.0, INF), (1.0, 2.0)], (2.1, 2.0)),
    Function("asin", lambda x: x.asin(), UNIT, (1.0, 1.0)),
    Function("asinh", lambda x: x.asinh(), [*ALL, *SMALL], (2.0, 2.0)),
    Function("atan", lambda x: x.atan(), [*ALL, *SMALL], (1.0, 1.0)),
    Function("atanh", lambda x: x.atanh(), UNIT, (2.0, 2.0)),
    Function("cbrt", _cbrt, ALL, (1.0, 1.0)),
    Function("cosh", lambda x: x.cosh(), [(-89.0, 89.0), (-1.0, 1.0)], (2.0, 2.0)),
    Function("cospi", lambda x: x.cos_pi(), [(-10.0, 10.0), (-1e5, 1e5)], (1.0, 2.0)),
    Function("sinpi", lambda x: x.sin_pi(), [(-10.0, 10.0), (-1e5, 1e5)], (1.0, 2.0)),
    Function("cyl_bessel_i0", lambda x: x.bessel_i(0), [(-80.0, 80.0)], (2.0, 8.0)),
    Function("cyl_bessel_i1", lambda x: x.bessel_i(1), [(-80.0, 80.0)], (2.0, 8.0)),
    Function("erf", lambda x: x.erf(), SMALL, (1.5, 1.5)),
    Function("erfc", lambda x: x.erfc(), [(-5.0, 9.0)], (3.0, 3.0)),
    Function("erfcinv", lambda x: x.erfcinv(), [(0.001, 1.999)], (2.0, 8.0)),
    Function("erfcx", lambda x: (x * x).exp() * x.erfc(), [(-5.0, 80.0)], (2.0, 8.0)),
    Function("erfinv", lambda x: x.erfinv(), [(-0.999, 0.999)], (2.0, 8.0)),
    Function("exp", lambda x: x.exp(), EXPONENT, (0.95, 1.0)),
    Function("exp10", lambda x: (x * arb.const_log10()).exp(), [(-45.0, 38.0)], (1.0, 2.0)),
    Function("exp2", lambda x: (x * arb.const_log2()).exp(), [(-152.0, 129.0)], (0.9, 1.0)),
    Function("expm1", lambda x: x.expm1(), [(-20.0, 88.0), (-1.0, 1.0)], (1.0, 1.0)),
    Function("j0", lambda x: x.bessel_j(0), [(-50.0, 50.0)], (8.0, 8.0), floor=NEAR),
    Function("j1", lambda x: x.bessel_j(1), [(-50.0, 50.0)], (8.0, 8.0), floor=NEAR),
    Function("y0", lambda x: x.bessel_y(0), [(0.01, 50.0)], (8.0, 8.0), floor=NEAR),
    Function("y1", lambda x: x.bessel_y(1), [(0.01, 50.0)], (8.0, 8.0), floor=NEAR),
    Function("lgamma", lambda x: x.lgamma(), [(0.01, 100.0)], (8.0, 8.0), floor=NEAR),
    Function("log", lambda x: x.log(), POSITIVE, (1.0, 1.0)),
    Function("log10", lambda x: x.log() / arb.const_log10(), POSITIVE, (2.0, 2.0)),
    Function("log1p", lambda x: x.log1p(), [(-0.999, 10.0), (0.0, INF)], (1.5, 1.5)),
    Function("log2", lambda x: x.log() / arb.const_log2(), POSITIVE, (1.0, 1.5)),
    Function("normcdf", lambda x: (-x * ROOT.sqrt()).erfc() / 2, [(-8.0, 8.0)], (2.0, 60.0)),
    Function("normcdfinv", lambda x: -arb(2).sqrt() * (2 * x).erfcinv(), [(0.001, 0.999)], (2.0, 8.0)),
    Function("rcbrt", lambda x: 1 / _cbrt(x), [(-1e30, -1e-30), (1e-30, 1e30)], (1.0, 2.0)),
    Function("rsqrt", lambda x: x.rsqrt(), POSITIVE, (1.0, 1.5)),
    Function("sin", lambda x: x.sin(), ANGLE, (1.0, 1.0)),
    Function("cos", lambda x: x.cos(), ANGLE, (1.0, 1.0)),
    Function("sinh", lambda x: x.sinh(), [(-89.0, 89.0), (-1.0, 1.0)], (2.0, 2.0)),
    Function("tan", lambda x: x.tan(), ANGLE, (1.0, 1.0)),
    Function("tanh", lambda x: x.tanh(), SMALL, (2.2, 2.0)),
    Function("tgamma", lambda x: x.gamma(), [(0.01, 30.0)], (8.0, 8.0)),
    Function("fast_expf", lambda x: x.exp(), EXPONENT, (0.95, None)),
    Function("fast_exp10f", lambda x: (x * arb.const_log10()).exp(), [(-45.0, 38.0)], (1.0, None)),
    Function("fast_cosf", lambda x: x.cos(), ANGLE, (1.0, None)),
    Function("fast_sinf", lambda x: x.sin(), ANGLE, (1.0, None)),
    Function("fast_tanf", lambda x: x.tan(), ANGLE, (1.0, None)),
    Function("fast_logf", lambda x: x.log(), POSITIVE, (1.0, None)),
    Function("fast_log2f", lambda x: x.log() / arb.const_log2(), POSITIVE, (1.0, None)),
    Function("fast_log10f", lambda x: x.log() / arb.const_log10(), POSITIVE, (2.0, None)),
    Function("atan2", arb.atan2, SMALL, (1.5, 1.0), second=SMALL),
    Function("hypot", lambda x, y: (x * x + y * y).sqrt(), SMALL, (1.0, 1.0), second=SMALL),
    Function("pow", lambda x, y: x**y, [(0.01, 100.0)], (1.0, 1.0), second=[(-8.0, 8.0)]),
    Function("fast_powf", lambda x, y: x**y, [(0.01, 100.0)], (1.0, None), second=[(-8.0, 8.0)]),
    Function("rhypot", lambda x, y: (x * x + y * y).rsqrt(), SMALL, (1.0, 2.0), second=SMALL),
    Function("fast_dividef", lambda x, y: x / y, SMALL, (0.5, None), second=[(0.1, 10.0)]),
]  # fmt: skip


def draw(intervals: Sequence[Interval], kind: str, count: int, g: np.random.Generator) -> np.ndarray:
    """`count` values of a type, in equal parts of each interval."""
    parts = []
    _, least, beyond = FORMAT[kind]
    for k, (low, high) in enumerate(intervals):
        n = count // len(intervals) if k else count - (len(intervals) - 1) * (count // len(intervals))
        if high == INF:  # all exponents alike, subnormals included
            x = np.ldexp(
                g.uniform(0.5, 1.0, n),
                g.integers(least + 2, beyond, n) if low < 1 else g.integers(2, beyond, n),
            )
            x = x * g.choice([-1.0, 1.0], n) if low < 0 else x
        else:
            x = g.uniform(low, high, n)
        parts.append(x)
    x = np.concatenate(parts)
    return x.astype(np.float32 if kind == "fp32" else np.float64)


def written(chosen: Sequence[Function], folder: Path) -> ModuleType:
    """A module whose kernel applies each function to a row of its own."""
    lines = ["import triton", "import triton.language as tl", "from triton.language.extra import libdevice", "", "",
             "@triton.jit(do_not_specialize=['n'])", "def kernel(x, y, o, n, BLOCK: tl.constexpr):",
             "    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)"]  # fmt: skip
    for k, f in enumerate(chosen):
        second = f", tl.load(y + {k} * n + i)" if f.second else ""
        lines.append(f"    tl.store(o + {k} * n + i, {f.call}(tl.load(x + {k} * n + i){second}))")
    path = folder / "functions_kernel.py"
    path.write_text("\n".join(lines) + "\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _precision() -> Iterator[None]:
    before = flint.ctx.prec
    flint.ctx.prec = 140
    yield
    flint.ctx.prec = before


def error(got: float, exact: Any, kind: str, floor: float) -> float:
    """Distance of a result from the exact value, in ulp there. An infinity counts as the power of two that it stands for."""
    bits, least, beyond = FORMAT[kind]
    if math.isinf(got):
        value = arb(2) ** beyond * (1 if got > 0 else -1)
    else:
        value = arb(got)
    size = max(abs(float(exact.mid())), floor)
    e = beyond if math.isinf(size) else math.frexp(size)[1]
    # An exact value beyond the range is as good as the number it overflows to.
    if math.isinf(got) and abs(exact) >= arb(2) ** beyond * (1 - arb(2) ** (-bits - 1)):
        return 0.0
    return abs(float(((value - exact) * arb(2) ** -max(min(e, beyond) - bits, least)).mid()))


@pytest.mark.usefixtures("_precision")
@pytest.mark.parametrize("kind", FLOAT)
def test_functions_are_within_their_bounds(kind: str, tmp_path: Path) -> None:
    column = list(FLOAT).index(kind)
    chosen = [f for f in FUNCTIONS if f.bounds[column] is not None]
    g = np.random.default_rng(17)
    x = np.stack([draw(f.domain, kind, COUNT, g) for f in chosen])
    y = np.stack([draw(f.second or [(0.0, 1.0)], kind, COUNT, g) for f in chosen])
    out = torch.zeros(x.shape, dtype=FLOAT[kind])
    grid = (COUNT // BLOCK,)
    written(chosen, tmp_path).kernel[grid](torch.from_numpy(x), torch.from_numpy(y), out, COUNT, BLOCK=BLOCK)
    found, wrong = [], []
    for k, f in enumerate(chosen):
        worst, at = 0.0, 0.0
        for a, b, got in zip(x[k].tolist(), y[k].tolist(), out[k].tolist(), strict=True):
            exact = f.exact(arb(a), arb(b)) if f.second else f.exact(arb(a))
            assert exact.is_finite(), f"{f.call}({a!r}): the reference has no value"
            off = error(got, exact, kind, f.floor)
            if not off <= worst:
                worst, at = off, a
        bound = f.bounds[column]
        assert bound is not None
        found.append((f, worst))
        if not worst <= bound:
            wrong.append(f"{f.call} in {kind}: {worst:.4g} ulp at {at!r}, allowed {bound}")
    assert not wrong, "\n".join(wrong)
    for f, worst in found:
        unit = f"ulp of at least {f.floor:g}" if f.floor else "ulp"
        recording.compared(f.call, kind, "interval arithmetic (Arb)", COUNT, ulp=worst, unit=unit)


@pytest.mark.usefixtures("_precision")
def test_an_error_of_two_ulp_is_measured_as_such() -> None:
    exact = arb(1) / 3
    near = float(np.float32(1 / 3))
    assert error(near, exact, "fp32", 0.0) <= 0.5
    assert (
        1.5
        < error(
            float(np.nextafter(np.nextafter(np.float32(near), np.float32(1)), np.float32(1))),
            exact,
            "fp32",
            0.0,
        )
        < 2.5
    )
    assert error(INF, arb(2) ** 128, "fp32", 0.0) == 0.0
    assert error(INF, arb(2) ** 127, "fp32", 0.0) > 2**22
    assert not error(math.nan, exact, "fp32", 0.0) <= 1.0


@pytest.mark.usefixtures("_precision")
def test_the_two_references_agree() -> None:
    with mpmath.workprec(140):
        for name in ("exp", "log", "sin", "erf", "tanh", "cbrt", "gamma", "besselj"):
            ours = {"cbrt": _cbrt, "besselj": lambda x: x.bessel_j(0)}.get(
                name, lambda x, n=name: getattr(x, n)()
            )
            theirs = {"besselj": lambda x: mpmath.besselj(0, x)}.get(name, getattr(mpmath, name))
            for value in (0.1, 0.9, 2.5, 7.25):
                assert abs(float(ours(arb(value)).mid()) - float(theirs(mpmath.mpf(value)))) <= 1e-15 * abs(
                    float(theirs(value))
                )


@pytest.mark.parametrize("kind", FLOAT)
def test_functions_of_special_values(kind: str, tmp_path: Path) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 1.0, -1.0], dtype=FLOAT[kind])
    want = {
        "exp": [1, 1, inf, 0, nan], "exp2": [1, 1, inf, 0, nan, 2, 0.5], "log": [-inf, -inf, inf, nan, nan, 0, nan],
        "log2": [-inf, -inf, inf, nan, nan, 0, nan], "sin": [0.0, -0.0, nan, nan, nan], "cos": [1, 1, nan, nan, nan],
        "erf": [0.0, -0.0, 1, -1, nan], "sqrt": [0.0, -0.0, inf, nan, nan, 1, nan], "rsqrt": [inf, -inf, 0, nan, nan, 1, nan],
    }  # fmt: skip
    chosen = [f for f in FUNCTIONS if f.source == "tl" and f.name in want]
    rows = torch.nn.functional.pad(x, (0, BLOCK - len(x))).expand(len(chosen), BLOCK).contiguous()
    out = torch.zeros_like(rows)
    written(chosen, tmp_path).kernel[(1,)](rows, rows, out, BLOCK, BLOCK=BLOCK)
    for f, row in zip(chosen, out, strict=True):
        expected = np.array(want[f.name])
        got = row[: len(expected)].numpy()
        np.testing.assert_array_equal(got, expected, err_msg=f.name)
        np.testing.assert_array_equal(np.signbit(got[:2]), np.signbit(expected[:2]), err_msg=f.name)
        recording.compared(f"{f.call} of 0, infinity, NaN", kind, "IEEE 754, section 9.2", len(expected))


def test_all_of_fp32_on_a_grid_stays_below_the_bound_of_exp() -> None:
    """exp and exp2 in fp32 are this backend's own polynomials: also against fp64, on many more values."""
    import triton
    import triton.language as tl

    @triton.jit
    def both(x, o, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + i)
        tl.store(o + i, tl.exp(v))
        tl.store(o + n + i, tl.exp2(v))

    count = 1 << (24 if recording.many() else 20)
    g = np.random.default_rng(3)
    x = torch.from_numpy(
        np.concatenate([g.uniform(-104, 90, count // 2), g.uniform(-1.0, 1.0, count // 2)]).astype(np.float32)
    )
    out = torch.zeros(2, count)
    both[(count // 1024,)](x, out, count, BLOCK=1024)
    wide = x.double()
    for name, got, exact in (("exp", out[0], wide.exp()), ("exp2", out[1], wide.exp2())):
        kept = exact.abs() < 2.0**128 * (1 - 2.0**-24)
        unit = torch.exp2(torch.clamp(torch.frexp(exact).exponent - 24, min=-149).double())
        worst = float(((got.double() - exact) / unit).abs()[kept].max())
        assert worst <= {"exp": 0.95, "exp2": 0.9}[name], (name, worst)
        recording.compared(f"tl.{name}", "fp32 (many)", "fp64", int(kept.sum()), ulp=worst, unit="ulp")
