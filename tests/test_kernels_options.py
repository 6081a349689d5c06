"""Every option of `flash_attention`, forward and backward, against the formula in float64 and torch's gradients of it."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from effattn.case import DTYPES
from effattn.errors import ArgumentError
from effattn.kernels import dropout_mask, flash_attention

_spec = importlib.util.spec_from_file_location(
    "kernel_reference", Path(__file__).with_name("kernel_reference.py")
)
assert _spec is not None
assert _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

TORCH_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
B, H, KV, M, N, D, DV = 2, 4, 2, 70, 90, 32, 24


def made(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    dtype: torch.dtype, *, q_len: int = M, kv_len: int = N, head_dim: int = D, v_dim: int = DV
) -> list[torch.Tensor]:
    shapes = ((B, H, q_len, head_dim), (B, KV, kv_len, head_dim), (B, KV, kv_len, v_dim))
    return [made(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]


MASK = made(B, 1, M, N, seed=5) > 0
BIAS = made(1, H, 1, N, seed=6)
SINKS = made(H, seed=7)
SLOPES = made(B, H, seed=8).abs()
Q_LENGTHS = torch.tensor([50, 70], dtype=torch.int32)
KV_LENGTHS = torch.tensor([90, 33], dtype=torch.int32)
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "causal": {"causal": True},
    "top-left": {"causal": True, "causal_alignment": "top-left", "scale": -0.3},
    "window": {"window": (5, 3)},
    "causal window": {"window": (8, -1), "causal": True},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi_slopes": SLOPES},
    "bias of keys": {"bias": BIAS},
    "bias of all": {"bias": made(1, 1, M, N, seed=9), "causal": True},
    "bias of rows": {"bias": made(B, 1, M, 1, seed=10) * torch.arange(M)[:, None] / M, "sinks": SINKS},
    "mask": {"mask": MASK},
    "sinks": {"sinks": SINKS, "causal": True},
    "lengths": {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS, "causal": True},
    "lengths and sinks": {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS, "sinks": SINKS},
    "dropout": {"dropout_p": 0.3, "dropout_seed": 7, "dropout_offset": 2**32 - 50},
    "everything": {
        "causal": True, "window": (30, -1), "softcap": 3.0, "alibi_slopes": SLOPES, "bias": BIAS, "mask": MASK,
        "sinks": SINKS, "q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS, "dropout_p": 0.2, "dropout_seed": 1,
    },
}  # fmt: skip


def for_reference(options: dict[str, Any], q_len: int = M, kv_len: int = N) -> dict[str, Any]:
    """The same options, with the dropout mask in place of its seed."""
    given = dict(options)
    seed, offset = given.pop("dropout_seed", 0), given.pop("dropout_offset", 0)
    if given.get("dropout_p"):
        given["kept"] = dropout_mask(B, H, q_len, kv_len, given["dropout_p"], seed, offset)
    return given


def results(function: Any, inputs: list[torch.Tensor], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """out, lse, and the gradients of all that has one, for fixed upstream gradients of both."""
    leaves = dict(zip("qkv", (x.detach().requires_grad_() for x in inputs), strict=True))
    leaves |= {name: options[name].detach().requires_grad_() for name in ("bias", "sinks") if name in options}
    given = options | {name: leaves[name] for name in ("bias", "sinks") if name in options}
    out, lse = function(leaves["q"], leaves["k"], leaves["v"], **given)
    d_out, d_lse = upstream(out, lse)
    gradients = torch.autograd.grad(
        [out, lse.masked_fill(lse == -math.inf, 0.0)], list(leaves.values()), [d_out, d_lse]
    )
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(leaves, gradients, strict=True))}


def upstream(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return made(*out.shape, seed=20).half().to(out.dtype), made(*lse.shape, seed=21).to(lse.dtype)


def kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    result = flash_attention(q, k, v, return_lse=True, **options)
    assert isinstance(result, tuple)
    return result


def wrong(
    got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], allowed: dict[str, torch.Tensor]
) -> list[str]:
    """Which results are not within what is allowed; a row without an lse has to have none."""
    assert got.keys() == expected.keys() == allowed.keys()
    names = []
    for name, value in got.items():
        here, there = value.double(), expected[name].double()
        error = torch.where((here == -math.inf) & (there == -math.inf), 0.0, (here - there).abs())
        if not bool((error <= allowed[name]).all()):
            names.append(f"{name}: {float((error / allowed[name]).max()):.3g} times")
    return names


def check(inputs: list[torch.Tensor], options: dict[str, Any]) -> tuple[dict[str, torch.Tensor], ...]:
    q, k, _ = inputs
    got = results(kernel, inputs, options)
    given = for_reference(options, q.shape[2], k.shape[2])
    expected = results(reference.attention, inputs, given)
    allowed = reference.bounds(*inputs, *upstream(expected["out"], expected["lse"]), **given)
    assert not wrong(got, expected, allowed)
    assert all(got[name].dtype == x.dtype for name, x in zip("qkv", inputs, strict=True))
    return got, expected, allowed


#: each pair is four kernels to compile: what does not depend on the dtype is tested in fp32
IN_16_BIT = ("causal", "causal window", "everything")
PAIRS = [(name, dtype) for name in OPTIONS for dtype in DTYPES if dtype == "fp32" or name in IN_16_BIT]


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_option_is_right_forward_and_backward(name: str, dtype: str) -> None:
    inputs = qkv(TORCH_DTYPES[dtype])
    options = OPTIONS[name]
    got, _, allowed = check(inputs, options)
    # What the same bounds say of attention without one of the options.
    for option in options:
        if option in ("causal_alignment", "dropout_seed", "dropout_offset", "sinks", "bias"):
            continue
        without = {key: value for key, value in for_reference(options).items() if key != option}
        if option == "dropout_p":
            del without["kept"]
        if option == "window" and options.get("causal"):
            without["window"] = (-1, 0)
        assert wrong(got, results(reference.attention, inputs, without), allowed), f"{option} does not show"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "v_dim"), [(1, 5), (256, 100)])
def test_gradients_of_every_head_dim_are_right(dtype: str, head_dim: int, v_dim: int) -> None:
    check(qkv(TORCH_DTYPES[dtype], head_dim=head_dim, v_dim=v_dim), {"causal": True})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 200), (200, 1), (64, 64), (129, 65), (0, 20), (20, 0)])
def test_gradients_of_every_length_are_right(dtype: str, q_len: int, kv_len: int) -> None:
    inputs = qkv(TORCH_DTYPES[dtype], q_len=q_len, kv_len=kv_len)
    if q_len and kv_len:
        check(inputs, {"causal": True})
        return
    got = results(kernel, inputs, {"causal": True})
    assert all(bool((got[name] == 0).all()) for name in "qkv")


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_sum_and_of_the_lse_alone(dtype: str) -> None:
    """`.sum().backward()` hands over a gradient whose strides are 0; an output that is not used, none at all."""
    inputs = qkv(TORCH_DTYPES[dtype])
    for use in (0, 1):
        leaves = [x.requires_grad_() for x in (y.clone() for y in inputs)]
        got = torch.autograd.grad(kernel(*leaves)[use].sum(), leaves)
        both = kernel(*leaves)
        zeros = torch.zeros_like(both[1 - use])
        ones = torch.ones_like(both[use])
        pair = [ones, zeros] if use == 0 else [zeros, ones]
        assert all(map(torch.equal, got, torch.autograd.grad(both, leaves, pair)))
    assert any(bool((x != 0).any()) for x in got)


HIDING: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (5, 3)},
    "mask": {"mask": MASK},
    "lengths": {"kv_lengths": torch.tensor([60, 33], dtype=torch.int32)},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "dtype"), [(n, d) for n in HIDING for d in DTYPES if d == "fp32" or n in ("causal", "lengths")]
)
def test_a_key_has_no_influence_where_it_is_hidden(name: str, dtype: str, bad: float) -> None:
    """K, V and bias of one key are made NaN or infinite: the queries that do not see it keep every bit, gradients too."""
    inputs, key = qkv(TORCH_DTYPES[dtype]), 40
    options = {**HIDING[name], "bias": BIAS.expand(1, H, M, N).clone()}
    before = results(kernel, inputs, options)
    w, _ = reference.weights(inputs[0], inputs[1], **options)
    hidden = w[..., key] == 0
    assert hidden.any()
    changed = [x.clone() for x in inputs]
    changed[1][:, :, key] = bad
    changed[2][:, :, key] = bad
    bias = options["bias"].clone()
    bias[..., key] = bad
    after = results(kernel, changed, {**options, "bias": bias})
    for result in ("out", "lse", "q"):
        assert torch.equal(after[result][hidden], before[result][hidden]), result
    if math.isnan(bad) and not hidden.all():
        for result in ("out", "lse", "q"):
            assert bool(after[result][~hidden].isnan().all()), f"{result}: NaN that is seen does not show"


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_reach_exactly_those_who_see_them(dtype: str) -> None:
    q, k, v = qkv(TORCH_DTYPES[dtype])
    v[:, :, 40, 0] = math.inf
    v[:, :, 41, 1] = -math.inf
    v[:, :, 42, 2] = math.nan
    v[:, :, 40, 3], v[:, :, 41, 3] = math.inf, -math.inf
    out, _ = kernel(q, k, v, mask=torch.arange(N) <= torch.arange(M)[:, None])
    for i, column, expected in (
        (39, 0, None), (40, 0, math.inf), (69, 0, math.inf), (40, 1, None), (41, 1, -math.inf), (41, 2, None),
        (42, 2, math.nan), (40, 3, math.inf), (41, 3, math.nan), (69, 4, None),
    ):  # fmt: skip
        got = out[:, :, i, column]
        if expected is None:
            assert bool(got.isfinite().all()), (i, column)
        else:
            same = got.isnan() if math.isnan(expected) else got == expected
            assert bool(same.all()), (i, column)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_member_has_the_same_bits_alone_and_at_any_length_of_padding(dtype: str) -> None:
    inputs = qkv(TORCH_DTYPES[dtype])
    options = {"causal": True, "sinks": SINKS}
    lengths = {"q_lengths": Q_LENGTHS, "kv_lengths": KV_LENGTHS}
    together = results(kernel, inputs, options | lengths)
    for b in range(B):
        rows, keys = int(Q_LENGTHS[b]), int(KV_LENGTHS[b])
        leaves = [
            x[b : b + 1, :, :n].detach().requires_grad_()
            for x, n in zip(inputs, (rows, keys, keys), strict=True)
        ]
        out, lse = kernel(*leaves, **options)
        d_out, d_lse = upstream(together["out"], together["lse"])
        d_lse = d_lse[b : b + 1, :, :rows].masked_fill(lse.detach() == -math.inf, 0.0)
        gradients = torch.autograd.grad([out, lse], leaves, [d_out[b : b + 1, :, :rows], d_lse])
        assert torch.equal(out[0], together["out"][b, :, :rows])
        for name, got in zip("qkv", gradients, strict=True):
            assert torch.equal(got[0], together[name][b, :, : got.shape[2]]), name


def test_a_bias_of_minus_infinity_is_a_mask() -> None:
    inputs = qkv(torch.float32)
    hidden = MASK.clone()
    hidden[0, 0, 3] = False  # a row that sees nothing
    bias = torch.zeros(B, 1, M, N).masked_fill(~hidden, -math.inf)
    by_bias, by_mask = results(kernel, inputs, {"bias": bias}), results(kernel, inputs, {"mask": hidden})
    for name in ("out", "lse", "q", "k", "v"):
        assert torch.equal(by_bias[name], by_mask[name]), name
    assert bool((by_bias["lse"][0, :, 3] == -math.inf).all())


def test_strides_of_options_do_not_matter() -> None:
    q, k, v = qkv(torch.float32)
    bias, mask = (
        made(N, M, H, B, seed=30).permute(3, 2, 1, 0),
        (made(1, N, 1, M, seed=31) > 0).permute(0, 2, 3, 1),
    )
    assert not bias.is_contiguous()
    got = kernel(q, k, v, bias=bias, mask=mask)
    expected = kernel(q, k, v, bias=bias.contiguous(), mask=mask.expand(B, H, M, N).contiguous())
    assert all(map(torch.equal, got, expected))


def test_dropout_mask_is_tritons_and_keeps_the_asked_share() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def draw(out, seed, offset, COUNT: tl.constexpr):
        index = tl.arange(0, COUNT)
        tl.store(out + index, tl.rand(seed, offset + index))

    drawn = torch.empty(1024)
    draw[(1,)](drawn, 5, 100, COUNT=1024)
    mask = dropout_mask(2, 4, 16, 8, 0.25, 5, 100)
    assert torch.equal(mask.flatten(), drawn > 0.25)
    kept = int(dropout_mask(1, 8, 128, 128, 0.25, 3).sum())
    n, p = 8 * 128 * 128, 0.75
    assert abs(kept - n * p) < 6 * math.sqrt(n * p * (1 - p))
    assert bool(dropout_mask(1, 1, 4, 4, 0.0).all())
    with pytest.raises(ArgumentError, match=r"dropout_p must be in \[0, 1\), got 1"):
        dropout_mask(1, 1, 4, 4, 1.0)


def test_tanh_of_the_cap_is_accurate_everywhere() -> None:
    import triton
    import triton.language as tl

    from effattn.kernels.logits import tanh

    @triton.jit
    def apply(out, x, COUNT: tl.constexpr):
        index = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
        tl.store(out + index, tanh(tl.load(x + index)))

    # All signs and exponents, with 9 bits of the fraction.
    x = (torch.arange(2**18, dtype=torch.int64) << 14).to(torch.int32).view(torch.float32)
    x = torch.cat([x, -x])
    x = x[x.isfinite()]
    x = x[: x.numel() // 1024 * 1024].clone()
    got = torch.empty_like(x)
    apply[(x.numel() // 1024,)](got, x, COUNT=1024)
    exact = torch.tanh(x.double())
    assert float(((got.double() - exact).abs() / exact.abs().clamp_min(2.0**-126)).max()) < 4 * 2.0**-23
