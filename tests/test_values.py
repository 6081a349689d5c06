"""Distributions: the same bits everywhere, one rounding, and what each docstring promises.

Each promise is a function of a case and its tensors. It must hold for its distribution, and must not hold
for the normal one, so that no promise is empty.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from scipy import stats

from effattn import values
from effattn.case import DTYPES, Case, Inputs
from effattn.draw import Source, normal_quantile
from effattn.errors import RequestError
from effattn.rounding import round_bits

# -- random words ------------------------------------------------------------------------------------------


def _philox(counter: int, key: int) -> list[int]:
    """Philox 4x64 with ten rounds, from the paper (J. Salmon et al., SC 2011), one block."""
    mask = 2**64 - 1
    c = [(counter >> 64 * i) & mask for i in range(4)]
    k = [key & mask, key >> 64]
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [high >> 64 ^ c[1] ^ k[0], high & mask, low >> 64 ^ c[3] ^ k[1], low & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


def test_philox_here_is_that_of_its_authors() -> None:
    """The first known answer of Random123 1.14."""
    assert _philox(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


def test_the_words_are_philox_keyed_by_the_name_of_the_stream() -> None:
    digest = hashlib.sha256(b"effattn/1/normal/7/q").digest()
    expected = [w for counter in (1, 2) for w in _philox(counter, int.from_bytes(digest[:16], "little"))]
    source = Source("normal", 7, "q")
    assert source.words(5).tolist() + source.words(3).tolist() == expected


def test_uniform_numbers_are_the_words() -> None:
    words = Source("a").words(1000)
    expected = [(2 * (int(w) >> 12) + 1) / 2**53 for w in words]
    assert Source("a").uniform((10, 100)).ravel().tolist() == expected
    assert Source("a").sign((1000,)).tolist() == [-1.0 if w >> 63 else 1.0 for w in words.tolist()]


def test_normal_numbers_are_quantiles_to_fifteen_digits() -> None:
    """Against fifty digits, from the middle to the largest and the smallest number that can be drawn."""
    u = np.array(
        [i / 64 for i in range(1, 64)]
        + [0.075, 0.0749999, 0.925, 0.9250001, 0.5 + 2.0**-53, 0.5 - 2.0**-53]
        + [2.0**-i for i in range(2, 54)]
        + [1 - 2.0**-i for i in range(2, 54)]
    )
    got = normal_quantile(u)
    with mpmath.workdps(50):
        for p, x in zip(u.tolist(), got.tolist(), strict=True):
            exact = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)
            assert abs(x - exact) <= 2e-15 * abs(exact)


def test_normal_numbers_are_normally_distributed() -> None:
    x = Source("test", 1).normal((200_000,))
    assert stats.kstest(x, "norm").pvalue > 1e-3
    assert stats.kstest(x * 1.02, "norm").pvalue < 1e-3  # the test would see two per cent
    assert abs(np.corrcoef(x[:-1], x[1:])[0, 1]) < 4 / math.sqrt(x.size)


# -- one rounding ------------------------------------------------------------------------------------------


def _positive(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """All finite numbers >= 0 of a 16-bit format in order, as bit patterns and as float64."""
    bits = np.arange(0x7C00 if dtype == "fp16" else 0x7F80, dtype=np.uint16)
    if dtype == "fp16":
        return bits, bits.view(np.float16).astype(np.float64)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _wrongly_rounded(dtype: str, convert: Callable[[np.ndarray], np.ndarray]) -> int:
    """How many of the numbers at and beside all midpoints of a 16-bit format `convert` rounds wrongly."""
    bits, x = _positive(dtype)
    # Beyond the largest number comes infinity, as if it were the next power of two.
    upper = np.append(x[1:], 2 * x[-1] - x[-2])
    upper_bits = bits + np.uint16(1)
    middle = x + (upper - x) / 2  # exact in float64
    even = np.where(bits % 2 == 0, bits, upper_bits)
    sign = np.uint16(0x8000)
    wrong = 0
    for value, expected in (
        (x, bits),
        (middle, even),
        (np.nextafter(middle, 0), bits),
        (np.nextafter(middle, np.inf), upper_bits),
        (x + (upper - x) * 0.25, bits),
        (x + (upper - x) * 0.75, upper_bits),
    ):
        wrong += int((convert(value) != expected).sum())
        wrong += int((convert(-value) != expected + sign).sum())
    return wrong


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_float64_is_rounded_once_beside_every_midpoint(dtype: str) -> None:
    assert _wrongly_rounded(dtype, lambda x: round_bits(x, dtype)) == 0


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_check_of_rounding_sees_a_second_rounding(dtype: str) -> None:
    """torch goes through float32 and is wrong beside half of the midpoints; the reason for our own code."""
    to = torch.float16 if dtype == "fp16" else torch.bfloat16

    def convert(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(x).to(torch.float32).to(to).view(torch.int16).numpy().view(np.uint16)

    assert _wrongly_rounded(dtype, convert) > 30_000


def test_float64_is_rounded_once_to_fp32() -> None:
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 0x7F7FFFFF, 100_000, dtype=np.uint32)
    bits[:3] = 0, 0x007FFFFF, 0x7F7FFFFE  # zero, the largest subnormal number, the second largest of all
    x, upper = (b.view(np.float32).astype(np.float64) for b in (bits, bits + np.uint32(1)))
    middle = x + (upper - x) / 2
    assert np.array_equal(round_bits(middle, "fp32"), bits + bits % 2)
    assert np.array_equal(round_bits(np.nextafter(middle, 0), "fp32"), bits)
    assert np.array_equal(round_bits(np.nextafter(middle, np.inf), "fp32"), bits + np.uint32(1))


@pytest.mark.parametrize(
    ("dtype", "nan", "infinity", "half_of_the_smallest"),
    [
        ("fp16", 0x7E00, 0x7C00, 2.0**-25),
        ("bf16", 0x7FC0, 0x7F80, 2.0**-134),
        ("fp32", 0x7FC00000, 0x7F800000, 2.0**-150),
    ],
)
def test_special_numbers_stay_what_they_are(
    dtype: str, nan: int, infinity: int, half_of_the_smallest: float
) -> None:
    sign = 1 << (31 if dtype == "fp32" else 15)
    x = np.array(
        [math.inf, 1e300, -math.inf, -1e300, 0.0, -0.0, half_of_the_smallest, -half_of_the_smallest, 1e-300]
    )
    expected = [infinity, infinity, sign + infinity, sign + infinity, 0, sign, 0, sign, 0]
    assert round_bits(x, dtype).tolist() == expected
    assert round_bits(np.array([math.nan]), dtype).tolist() == [nan]
    assert round_bits(np.nextafter(x[6:7], 1), dtype).tolist() == [1]


# -- distributions -----------------------------------------------------------------------------------------

DIGITS = {"fp16": 10, "bf16": 7, "fp32": 23}
SMALLEST_NORMAL = {"fp16": 2.0**-14, "bf16": 2.0**-126, "fp32": 2.0**-126}


def logits(case: Case, inputs: Inputs) -> torch.Tensor:
    group = case.heads // case.kv_heads
    head = [h // group for h in range(case.heads)]
    return torch.einsum("bhid,bhjd->bhij", inputs.q.double(), inputs.k.double()[:, head]) * case.softmax_scale


def _entries_are_standard_normal(case: Case, inputs: Inputs) -> bool:
    return all(abs(x.double().mean()) < 0.05 and abs(x.double().std() - 1) < 0.05 for x in inputs)


def _q_and_k_are_in_one_and_v_is_positive(case: Case, inputs: Inputs) -> bool:
    q, k, v = (x.double() for x in inputs)
    inside = q.abs().max() <= 1 and k.abs().max() <= 1 and v.max() <= 1
    spread = q.min() < -0.9 and q.max() > 0.9 and v.min() < 0.1 and v.max() > 0.9
    return bool(inside and spread and (v >= 0).all())


def _one_in_a_thousand_entries_is_large(case: Case, inputs: Inputs) -> bool:
    """Beyond 6 lies 2e-9 of N(0, 1), and 55 % of N(0, 101)."""
    entries = torch.cat([x.double().abs().flatten() for x in inputs])
    return bool(0.0003 < (entries > 6).double().mean() < 0.0008)


def _exp_overflows(case: Case, inputs: Inputs) -> bool:
    s = logits(case, inputs)
    return bool(s.min() > 100 and s.max() < 220 and s.float().exp().isinf().all())


def _a_key_scored_0_wins(case: Case, inputs: Inputs) -> bool:
    s = logits(case, inputs)
    padded = torch.cat([s, torch.zeros_like(s[..., :1])], -1).softmax(-1)
    return bool(
        s.min() > -300 and s.max() < -105 and (s.float().exp() == 0).all() and (padded[..., -1] > 0.999).all()
    )


def _every_block_of_keys_raises_the_maximum(case: Case, inputs: Inputs) -> bool:
    width = 16 * max(1, math.ceil(case.kv_len / 2048))
    blocks = logits(case, inputs).split(width, dim=-1)
    return all(bool((b.amin(-1) > a.amax(-1)).all()) for a, b in pairwise(blocks))


def _many_keys_share_the_maximum_and_v_is_negative(case: Case, inputs: Inputs) -> bool:
    same = (inputs.k == inputs.k[:, :, :1]).all(-1)
    s = logits(case, inputs)
    s = s.unflatten(1, (case.kv_heads, -1))
    tops = (s - s.amax(-1, keepdim=True)).abs() < 1e-12
    share = same.double().mean(-1)
    # In each row, the maximum is where the repeated key is, and nowhere else.
    exact = (tops == same[:, :, None, None, :]).all()
    return bool(exact and (share > 0.125).all() and (share < 0.5).all() and (inputs.v < 0).all())


def _the_top_is_within_few_units(case: Case, inputs: Inputs) -> bool:
    s = logits(case, inputs)
    top = s.amax(-1, keepdim=True)
    near = s >= top * (1 - 3 * 2.0 ** -DIGITS[case.dtype] / 1.5 - 1e-12)
    count = near.sum(-1)
    lower = s.masked_fill(near, -math.inf).amax(-1, keepdim=True)
    levels = [
        len(row[mask].mul(1e9).round().unique())
        for row, mask in zip(s.flatten(0, 2), near.flatten(0, 2), strict=True)
    ]
    enough = (count > case.kv_len / 8).all() and (count < case.kv_len / 2).all()
    return bool(enough and (lower < top - 1).all()) and max(levels) > 1


def _one_key_has_all_the_weight(case: Case, inputs: Inputs) -> bool:
    """For every row of a causal mask too, and not always the same key."""
    s = logits(case, inputs)
    rest = torch.arange(case.kv_len) > torch.arange(case.q_len)[:, None]
    best = set()
    for masked in (s, s.masked_fill(rest, -math.inf)):
        two = masked.topk(2, dim=-1)
        if not (two.values[:, :, 1:, 0] - two.values[:, :, 1:, 1] > math.log(1e12)).all():
            return False
        best |= set(two.indices[..., 0].flatten().tolist())
    return len(best) >= 2


def _one_number_a_tensor(case: Case, inputs: Inputs) -> bool:
    return all(len(x.unique()) == 1 and x.unique().item() != 0 for x in inputs)


def _outputs_of_every_other_feature_are_subnormal(case: Case, inputs: Inputs) -> bool:
    smallest = SMALLEST_NORMAL[case.dtype]

    def subnormal(x: torch.Tensor) -> torch.Tensor:
        return (x != 0) & (x.double().abs() < smallest)

    k = subnormal(inputs.k).double().mean()
    group = case.heads // case.kv_heads
    out = logits(case, inputs).softmax(-1) @ inputs.v.double().repeat_interleave(group, 1)
    bits = torch.from_numpy(round_bits(out.numpy(), case.dtype).astype(np.int64))
    exponent = bits & {"fp16": 0x7C00, "bf16": 0x7F80, "fp32": 0x7F800000}[case.dtype]
    # Of N(0, 1), five in 100,000 are below fp16's smallest normal number.
    mixed = subnormal(inputs.v[..., ::2]).all() and subnormal(inputs.v[..., 1::2]).double().mean() < 1e-3
    hidden = (exponent[..., ::2] == 0).all() and (exponent[..., 1::2] > 0).double().mean() > 0.9
    return bool(mixed and hidden and 0.1 < k < 0.15)


def _four_dimensions_suffice(case: Case, inputs: Inputs) -> bool:
    if min(case.head_dim, case.v_dim) <= 4:
        return True
    return all(
        (torch.linalg.svdvals(x.double())[..., 4:] < 0.1 * torch.linalg.svdvals(x.double())[..., 3:4]).all()
        for x in inputs
    )


def _neighbouring_keys_are_alike(case: Case, inputs: Inputs) -> bool:
    k = inputs.k.double()
    return bool(k.diff(dim=2).square().mean().sqrt() < 0.1 * k.std() and 0.7 < k.std() < 1.2)


PROMISES: dict[str, Callable[[Case, Inputs], bool]] = {
    "normal": _entries_are_standard_normal,
    "uniform": _q_and_k_are_in_one_and_v_is_positive,
    "outliers": _one_in_a_thousand_entries_is_large,
    "large-logits": _exp_overflows,
    "negative-logits": _a_key_scored_0_wins,
    "growing-max": _every_block_of_keys_raises_the_maximum,
    "repeated-max": _many_keys_share_the_maximum_and_v_is_negative,
    "near-ties": _the_top_is_within_few_units,
    "one-hot": _one_key_has_all_the_weight,
    "constant": _one_number_a_tensor,
    "subnormal": _outputs_of_every_other_feature_are_subnormal,
    "low-rank": _four_dimensions_suffice,
    "smooth-keys": _neighbouring_keys_are_alike,
}

SHAPES: dict[str, dict[str, Any]] = {
    "usual": {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 128, "kv_len": 256, "head_dim": 64},
    "wide": {"heads": 2, "q_len": 200, "kv_len": 333, "head_dim": 256, "v_dim": 80},
    "scaled": {"heads": 3, "kv_heads": 1, "q_len": 150, "kv_len": 160, "head_dim": 72, "scale": 1.0},
    "negative scale": {"heads": 2, "q_len": 150, "kv_len": 170, "head_dim": 48, "scale": -0.2},
}  # fmt: skip


def test_every_distribution_has_a_promise_that_is_tested() -> None:
    assert tuple(PROMISES) == values.names()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROMISES)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_distribution_does_what_its_docstring_says(dtype: str, shape: str, name: str, seed: int) -> None:
    case = Case(dtype=dtype, values=name, seed=seed, **SHAPES[shape])
    inputs = case.tensors()
    assert all(x.isfinite().all() for x in inputs)
    assert PROMISES[name](case, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in PROMISES if name != "normal"])
def test_normal_values_do_nothing_of_the_kind(dtype: str, name: str) -> None:
    case = Case(dtype=dtype, **SHAPES["usual"])
    assert not PROMISES[name](case, case.tensors())


def test_uniform_values_are_not_normal() -> None:
    case = Case(dtype="fp32", values="uniform", **SHAPES["usual"])
    assert not _entries_are_standard_normal(case, case.tensors())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["large-logits", "negative-logits", "growing-max", "repeated-max", "near-ties", "one-hot"]
)
@pytest.mark.parametrize("head_dim", [1, 2, 3])
def test_logits_are_as_promised_for_few_features_too(dtype: str, name: str, head_dim: int) -> None:
    case = Case(heads=2, q_len=40, kv_len=200, head_dim=head_dim, v_dim=4, dtype=dtype, values=name)
    assert PROMISES[name](case, case.tensors())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_maximum_grows_over_long_sequences(dtype: str) -> None:
    case = Case(q_len=8, kv_len=5000, head_dim=64, dtype=dtype, values="growing-max")
    assert PROMISES["growing-max"](case, case.tensors())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-8, -1e-8, 0.0, 1e6, 1e-300, 1e300])
@pytest.mark.parametrize("name", values.names())
def test_entries_stay_finite_for_any_scale(dtype: str, scale: float, name: str) -> None:
    case = Case(heads=2, q_len=20, kv_len=30, head_dim=16, scale=scale, dtype=dtype, values=name)
    assert all(x.isfinite().all() for x in case.tensors())


@pytest.mark.parametrize("name", ["normal", "outliers", "large-logits", "low-rank", "smooth-keys"])
def test_dtypes_get_the_same_values_each_rounded_once(name: str) -> None:
    drawn = {dtype: Case(dtype=dtype, values=name, **SHAPES["usual"]).tensors() for dtype in DTYPES}
    recipe = values.Recipe(Case(dtype="fp16", values=name, **SHAPES["usual"]))
    for logical, *rounded in zip(values.get(name).draw(recipe), *drawn.values(), strict=True):
        for x, digits in zip(rounded, (10, 7, 23), strict=True):
            error = (x.double() - torch.from_numpy(logical)).abs()
            # Half a unit in the last place is half of 2^-digits of the power of two below the number.
            unit = torch.from_numpy(np.ldexp(1.0, np.frexp(logical)[1] - 1 - digits))
            assert (error <= unit.clamp_min(2.0**-24 if digits == 10 else 0.0) / 2).all()


#: The first 16 digits of a SHA-256 over the bit patterns of q, k and v in fp16, bf16 and fp32. They must not
#: change: stored cases would mean other tensors. A distribution that has to change gets a new name.
PINNED = {
    "normal": "640b428101e5252d",
    "uniform": "0b3186c96ce5f907",
    "outliers": "7093fbb31db74c2c",
    "large-logits": "8a6e14455154877d",
    "negative-logits": "3a00f0a70a7c46f8",
    "growing-max": "7b276ccbdca4c28b",
    "repeated-max": "f9d75d53af559634",
    "near-ties": "4024db0f380ef556",
    "one-hot": "e2c109702106eacd",
    "constant": "44c0c95c4a45ca9f",
    "subnormal": "cd0d13f023b7541c",
    "low-rank": "d8a2200d8063a1ca",
    "smooth-keys": "7f8af493c691b520",
}


@pytest.mark.parametrize("name", PROMISES)
def test_the_bits_are_those_of_every_other_machine(name: str) -> None:
    digest = hashlib.sha256()
    for dtype in DTYPES:
        case = Case(
            batch=2,
            heads=4,
            kv_heads=2,
            q_len=33,
            kv_len=70,
            head_dim=17,
            v_dim=9,
            dtype=dtype,
            values=name,
            seed=11,
        )
        for x in case.tensors():
            digest.update(
                x.contiguous().view(torch.int32 if dtype == "fp32" else torch.int16).numpy().tobytes()
            )
    assert digest.hexdigest()[:16] == PINNED[name]


# -- names -------------------------------------------------------------------------------------------------


def test_every_distribution_says_why_it_is_there() -> None:
    for name, distribution in values.VALUES.items():
        assert distribution.name == name
        assert len(distribution.reason.split("\n\n")) >= 2, f"{name} gives no reason"
        assert distribution.summary.endswith(".")
        assert "\n" not in distribution.summary


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "larg-logits",
            r"values 'larg-logits' is unknown\. Expected one of normal, .*Did you mean 'large-logits'",
        ),
        ("smollm2", r"or real:smollm2/LAYER\. Did you mean 'real:smollm2'"),
        ("zzz", r"values 'zzz' is unknown\. Expected one of normal, [^?]*LAYER\.$"),
        (
            "real:smolm2/3",
            r"values 'real:smolm2/3': unknown model\. Expected one of smollm2\. Did you mean 'real:smollm2'",
        ),
        ("real:smollm2", r"stands for all 30 layers; a single case needs one of them"),
        ("real:smollm2/30", r"'30' is not a layer of SmolLM2-135M\. Expected 0 to 29"),
        ("real:smollm2/03", r"'03' is not a layer"),
        ("real:smollm2/-1", r"'-1' is not a layer"),
        ("real:smollm2/", r"'' is not a layer"),
    ],
)
def test_an_unknown_name_is_answered_with_the_right_ones(given: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        values.get(given)
