"""The Triton kernels of causal linear attention, against the quadratic evaluation of the same features."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.exact.linear import Linear
from effattn.exact.linear import linear_attention as quadratic
from effattn.kernels import ahead_of_time
from effattn.kernels import linear_attention as kernels
from effattn.kernels.linear_attention import linear_attention
from effattn.methods.performer import performer_attention
from effattn.methods.performer_features import draw_projections, feature_map
from effattn.tolerances.linear import LinearBounds, linear_bounds

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def problem(n: int, features: int, v_dim: int, dtype: torch.dtype, *, kind: str = "positive", heads: int = 2):
    g = torch.Generator().manual_seed(n + features)
    x = [torch.randn(1, heads, n, 16, generator=g) * 0.7 for _ in range(2)]
    omega = draw_projections(features, 16, generator=g, partial=True)
    q, k = (feature_map(t, omega, kind).value() if kind != "trigonometric" else t @ omega.mT for t in x)
    v, d_out = (torch.randn(1, heads, n, v_dim, generator=g) for _ in range(2))
    return tuple(t.to(dtype) for t in (q, k, v, d_out))


def run(q, k, v, d_out, method=linear_attention) -> Linear:
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = method(*leaves)
    return Linear(out.detach(), *torch.autograd.grad(out, leaves, d_out))


def fractions(got: Linear, exact: Linear, bounds: LinearBounds) -> list[float]:
    """The largest error over its bound, of out, dq, dk, dv."""
    return [
        float(((a.double() - b).abs() / c).nan_to_num(nan=torch.inf).max())
        for a, b, c in zip(got, exact, bounds, strict=True)
    ]


SHAPES = [(1, 16, 16), (63, 16, 5), (64, 64, 64), (200, 80, 33), (130, 256, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "features", "v_dim"), SHAPES)
def test_output_and_gradients_are_within_the_bound(
    n: int, features: int, v_dim: int, dtype: torch.dtype
) -> None:
    q, k, v, d_out = problem(n, features, v_dim, dtype)
    exact, bounds = quadratic(q, k, v, d_out), linear_bounds(q, k, v, d_out)
    assert max(fractions(run(q, k, v, d_out), exact, bounds)) <= 1
    assert (
        min(float((b / (e.abs() + b)).median()) for e, b in zip(exact, bounds, strict=True)) < 0.1
    )  # not idle


def wrong(name: str):
    """Linear attention that is wrong in one way."""

    def method(q, k, v):
        pairs = (q.double() @ k.double().mT).tril()
        if name == "strict":
            pairs = (q.double() @ k.double().mT).tril(-1)
        if name == "not causal":
            pairs = q.double() @ k.double().mT
        if name == "scores in bf16":
            pairs = pairs.bfloat16().double()
        if name == "state in bf16":
            state = (k.double()[..., :, None] * v.double()[..., None, :]).cumsum(2).bfloat16().double()
            numerator = (q.double()[..., None, :] @ state).squeeze(-2)
            return (numerator / pairs.sum(-1, keepdim=True)).to(v.dtype)
        total = pairs.sum(-1, keepdim=True)
        if name == "epsilon":
            total = total + 1e-3 * total.detach().mean()
        return (pairs @ v.double() / total).to(v.dtype)

    return method


WRONG = ["strict", "not causal", "scores in bf16", "state in bf16", "epsilon"]


@pytest.mark.parametrize("name", WRONG)
def test_the_bound_rejects_what_is_wrong(name: str) -> None:
    q, k, v, d_out = problem(130, 64, 32, torch.float32)
    exact, bounds = quadratic(q, k, v, d_out), linear_bounds(q, k, v, d_out)
    assert max(fractions(run(q, k, v, d_out, wrong(name)), exact, bounds)) > 2
    assert max(fractions(run(q, k, v, d_out, wrong("nothing")), exact, bounds)) <= 1


def test_a_backward_that_subtracts_prefix_sums_is_rejected() -> None:
    """S before a row as the sum over all rows minus that from it on, in float32, as published kernels do."""
    q, k, v, d_out = problem(700, 16, 8, torch.float32)
    k = k * torch.logspace(0, 4, 700)[:, None]  # late keys are larger, so early sums drown
    exact, bounds = quadratic(q, k, v, d_out), linear_bounds(q, k, v, d_out)
    assert max(fractions(run(q, k, v, d_out), exact, bounds)) <= 1
    pairs = (q.double() @ k.double().mT).tril()
    total = pairs.sum(-1, keepdim=True)
    g = (d_out.double() / total).float()
    h = -(g * (pairs @ v.double() / total).float()).sum(-1, keepdim=True)
    outer = k[..., :, None] * v[..., None, :]
    after = outer.flip(2).cumsum(2).flip(2) - outer
    state = outer.sum(2, keepdim=True) - after
    sums = k.sum(2, keepdim=True) - (k.flip(2).cumsum(2).flip(2) - k)
    dq = (state @ g[..., None]).squeeze(-1) + h * sums
    assert float(((dq.double() - exact.dq).abs() / bounds.dq).max()) > 2


def test_features_of_both_signs_have_bounds_too() -> None:
    q, k, v, d_out = problem(100, 32, 16, torch.float32, kind="trigonometric")
    k, q = k.abs() + 0.1 * k, q.abs() + 0.2 * q
    exact, bounds = quadratic(q, k, v, d_out), linear_bounds(q, k, v, d_out)
    assert max(fractions(run(q, k, v, d_out), exact, bounds)) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_future_never_changes_a_row(dtype: torch.dtype) -> None:
    q, k, v, _ = problem(150, 48, 20, dtype)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, 77:] = x[:, :, 77:] * 3 + 1
    before, after = linear_attention(q, k, v), linear_attention(*changed)
    assert torch.equal(before[:, :, :77], after[:, :, :77])
    assert not torch.equal(before[:, :, 77:], after[:, :, 77:])


def test_a_head_has_the_same_bits_alone() -> None:
    q, k, v, d_out = problem(90, 40, 24, torch.float32, heads=3)
    whole = run(q, k, v, d_out)
    alone = run(*(x[:, 1:2] for x in (q, k, v, d_out)))
    assert all(torch.equal(a[:, 1:2], b) for a, b in zip(whole, alone, strict=True))


def test_strides_do_not_matter() -> None:
    q, k, v, d_out = problem(70, 32, 16, torch.float32)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, d_out)]
    assert not strided[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(run(q, k, v, d_out), run(*strided), strict=True))


def test_it_is_performer_on_performers_features() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 16, generator=g) for _ in range(3))
    omega = draw_projections(32, 16, generator=g)
    fq, fk = (feature_map(x * 0.5, omega).value() for x in (q, k))
    expected = performer_attention(q, k, v, omega, causal=True)
    torch.testing.assert_close(linear_attention(fq, fk, v), expected, rtol=2e-5, atol=2e-5)


def test_empty_inputs_give_empty_outputs() -> None:
    assert linear_attention(*(torch.zeros(1, 2, 0, d) for d in (8, 8, 4))).shape == (1, 2, 0, 4)


BAD = [
    ((1, 2, 8, 4), (1, 2, 9, 4), (1, 2, 8, 4), ArgumentError, "one key for each query"),
    ((1, 2, 8, 4), (1, 2, 8, 4), (1, 1, 8, 4), ArgumentError, "v must agree with q"),
    ((1, 2, 8, 4), (1, 2, 8, 4), (1, 2, 8, 300), ArgumentError, "v_dim 1 to 256"),
    ((2, 8, 4), (2, 8, 4), (2, 8, 4), ArgumentError, "4 axes"),
]


@pytest.mark.parametrize(("q", "k", "v", "error", "message"), BAD)
def test_bad_input_is_named(q, k, v, error, message: str) -> None:
    with pytest.raises(error, match=message):
        linear_attention(*(torch.ones(shape) for shape in (q, k, v)))


def test_a_wrong_dtype_is_named() -> None:
    with pytest.raises(ArgumentTypeError, match="float16, bfloat16 or float32"):
        linear_attention(*(torch.ones(1, 1, 8, 4, dtype=torch.float64) for _ in range(3)))


def test_the_interpreter_of_triton_agrees() -> None:
    """The same source, run by Triton's own interpreter in another process, and within the same bound."""
    script = (
        "import sys, torch\nsys.path.insert(0, sys.argv[1])\n"
        "from effattn.kernels.linear_attention import linear_attention\n"
        "q, k, v, g = torch.load(sys.argv[2])\n"
        "x = [t.requires_grad_() for t in (q, k, v)]\nout = linear_attention(*x)\n"
        "torch.save([out.detach(), *torch.autograd.grad(out, x, g)], sys.argv[2])\n"
    )
    inputs = problem(70, 40, 16, torch.float32, heads=1)
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pt"
        torch.save(list(inputs), path)
        done = subprocess.run(
            [sys.executable, "-c", script, str(Path(__file__).parent.parent), str(path)],
            env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        got = Linear(*torch.load(path))
    exact, bounds = quadratic(*inputs), linear_bounds(*inputs)
    assert max(fractions(got, exact, bounds)) <= 1


@pytest.mark.parametrize(("dtype", "capability"), [(torch.bfloat16, 80), (torch.float32, 90)])
def test_kernels_compile_for_gpus_within_their_memory(dtype: torch.dtype, capability: int) -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, v = meta(4, 1024, 256, dtype=dtype), meta(4, 1024, 64, dtype=dtype)
    chunks = 1024 // kernels.tile(v)
    states, sums, h = meta(4, chunks, 256, 64), meta(4, chunks, 256), meta(4, 1024)
    for launch in (
        kernels.states_launch(x, v, None, states, sums, reverse=False),
        kernels.states_launch(x, v.float(), h, states, sums, reverse=True),
        kernels.outputs_launch(x, x, v, states, sums, v, h),
        kernels.gradients_launch(x, x, v, v.float(), h, states, sums, states, sums, x, x, v),
    ):
        usage = ahead_of_time.compile_launch(launch, capability)
        assert usage.shared <= ahead_of_time.SHARED_LIMIT[capability]
        assert usage.spills == 0
