"""Number formats: every value of the small ones, every tie between neighbours, and one rounding only."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effattn.errors import RequestError
from effattn.tolerances import formats
from effattn.tolerances.formats import FORMATS, Format

SMALL = ("fp16", "bf16", "e4m3", "e5m2", "tf32")


def magnitudes(fmt: Format) -> np.ndarray:
    """All finite numbers >= 0 of the format in order, built from its definition."""
    steps = 2 ** (fmt.precision - 1)
    lowest = [m * fmt.smallest_subnormal for m in range(steps)]
    normal = [
        (steps + m) * 2.0 ** (e - fmt.precision + 1)
        for e in range(fmt.emin, fmt.emax + 1)
        for m in range(steps)
    ]
    return np.array([x for x in lowest + normal if x <= fmt.largest])


def nearest_even(x: float, fmt: Format) -> float:
    """x rounded by exact arithmetic: the definition, slowly."""
    if x == 0.0:
        return x
    size = Fraction(abs(x))
    e = max(math.frexp(abs(x))[1] - 1, fmt.emin)
    spacing = Fraction(2) ** (e - fmt.precision + 1)
    rounded = round(size / spacing) * spacing  # Python rounds ties of a Fraction to even
    if rounded > Fraction(fmt.largest):
        return math.copysign(math.inf if fmt.has_inf else math.nan, x)
    return math.copysign(float(rounded), x)


@pytest.mark.parametrize("name", SMALL)
def test_every_number_of_the_format_is_left_as_it_is(name: str) -> None:
    fmt = FORMATS[name]
    values = magnitudes(fmt)
    for signed in (values, -values):
        assert np.array_equal(fmt.round(signed), signed)
        assert np.array_equal(np.signbit(fmt.round(signed)), np.signbit(signed))


@pytest.mark.parametrize("name", SMALL)
def test_every_tie_goes_to_the_even_neighbour_and_its_neighbourhood_does_not(name: str) -> None:
    fmt = FORMATS[name]
    values = magnitudes(fmt)
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2.0  # exact in float64
    even = np.where(np.arange(len(low)) % 2 == 0, low, high)
    assert np.array_equal(fmt.round(middle), even)
    assert np.array_equal(fmt.round(np.nextafter(middle, 0.0)), low)
    assert np.array_equal(fmt.round(np.nextafter(middle, np.inf)), high)
    assert np.array_equal(fmt.round(-middle), -even)


@pytest.mark.parametrize("name", SMALL)
def test_numbers_beyond_the_largest_overflow_half_a_spacing_later(name: str) -> None:
    fmt = FORMATS[name]
    limit = fmt.largest + float(fmt.ulp(np.array([fmt.largest]))[0]) / 2.0
    below, beyond = fmt.round(np.array([np.nextafter(limit, 0.0), np.nextafter(limit, np.inf)]))
    assert below == fmt.largest
    assert np.isinf(beyond) if fmt.has_inf else np.isnan(beyond)


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "e5m2"])
def test_order_counts_the_bit_patterns(name: str) -> None:
    fmt = FORMATS[name]
    if name == "fp32":
        codes = torch.arange(0, 0x7F800000, 65521, dtype=torch.int32)
    else:
        top = int(fmt.order(np.array([math.inf]))[0])
        kind = torch.int8 if name == "e5m2" else torch.int16
        codes = torch.arange(0, top + 1, dtype=torch.int32).to(kind)
    values = codes.view(fmt.torch_dtype).to(torch.float64)
    assert torch.equal(fmt.order(values), codes.to(torch.float64))
    assert torch.equal(fmt.order(-values), -codes.to(torch.float64))


def test_distance_counts_steps_across_zero_and_binades() -> None:
    fmt = FORMATS["fp16"]
    tiny = fmt.smallest_subnormal
    pairs = [
        (0.0, -0.0, 0),
        (tiny, -tiny, 2),
        (1.0, 1.0 + 2.0**-10, 1),
        (1.0, 1.0 - 2.0**-11, 1),
        (65504.0, math.inf, 1),
    ]
    a, b, steps = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    assert np.array_equal(fmt.distance(a, b), steps)
    assert np.isnan(fmt.distance(np.array([math.nan]), np.array([1.0])))[0]


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "tf32"])
def test_ulp_is_the_distance_to_the_next_number(name: str) -> None:
    fmt = FORMATS[name]
    x = np.array([1.0, 1.5, 2.0 - 2.0**-20, 0.3, fmt.smallest_normal, 0.75 * fmt.smallest_normal, 0.0])
    rounded = fmt.round(x)
    # Down to the number below, and up again by one spacing.
    assert np.array_equal(fmt.round(rounded + fmt.ulp(rounded)), rounded + fmt.ulp(rounded))
    assert np.array_equal(fmt.order(rounded + fmt.ulp(rounded)), fmt.order(rounded) + 1.0)


@given(
    st.lists(st.floats(allow_nan=False, width=64), min_size=1, max_size=20), st.sampled_from((*SMALL, "fp32"))
)
def test_rounding_agrees_with_exact_arithmetic(values: list[float], name: str) -> None:
    fmt = FORMATS[name]
    finite = [x for x in values if math.isfinite(x)]
    expected = np.array([nearest_even(x, fmt) for x in finite])
    assert np.array_equal(fmt.round(np.array(finite)), expected, equal_nan=True)
    assert np.array_equal(
        fmt.round(torch.tensor(finite, dtype=torch.float64)).numpy(), expected, equal_nan=True
    )


@given(st.lists(st.floats(width=64), min_size=1, max_size=20))
def test_fp16_and_fp32_agree_with_numpy(values: list[float]) -> None:
    x = np.array(values)
    with np.errstate(over="ignore", invalid="ignore"):
        for name, kind in (("fp16", np.float16), ("fp32", np.float32)):
            expected = x.astype(kind).astype(np.float64)
            assert np.array_equal(FORMATS[name].round(x), expected, equal_nan=True)
            got = formats.round_to(torch.from_numpy(x), name)
            assert np.array_equal(got.double().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize(("name", "bits"), [("fp16", 11), ("bf16", 8)])
def test_values_are_rounded_once_where_torch_rounds_twice(name: str, bits: int) -> None:
    # Just above a tie, by less than fp32 can hold: rounding to fp32 first makes it a tie, which goes to even.
    x = torch.tensor([1.0 + 2.0**-bits + 2.0**-40], dtype=torch.float64)
    dtype = FORMATS[name].torch_dtype
    assert formats.round_to(x, name).item() == 1.0 + 2.0 ** (1 - bits)
    assert x.to(torch.float32).to(dtype).item() == 1.0


@pytest.mark.parametrize("name", FORMATS)
def test_round_to_gives_the_dtype_and_keeps_what_is_not_a_number(name: str) -> None:
    x = torch.tensor([math.nan, -0.0, 0.0], dtype=torch.float64)
    got = formats.round_to(x, name)
    assert got.dtype == FORMATS[name].torch_dtype
    assert math.isnan(got[0].item())
    assert [math.copysign(1.0, z) for z in got[1:].double().tolist()] == [-1.0, 1.0]


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "fp64"])
def test_formats_are_those_of_torch(name: str) -> None:
    fmt, info = FORMATS[name], torch.finfo(FORMATS[name].torch_dtype)
    assert (fmt.largest, fmt.smallest_normal, 2.0 * fmt.unit_roundoff) == (
        info.max,
        info.smallest_normal,
        info.eps,
    )
    assert fmt.unit_roundoff == 2.0 ** int(fmt.unit_roundoff_text.removeprefix("2^"))


def test_an_unknown_format_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match=r"'bf15': expected one of fp64, .*did you mean 'bf16'"):
        formats.get("bf15")
