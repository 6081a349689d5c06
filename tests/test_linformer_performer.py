"""Linformer and Performer as functions and modules: what is hidden, what is refused at once, what a change of dtype does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.methods.linformer import LinformerAttention, LinformerProjections, linformer_attention
from effattn.methods.linformer_projections import (
    Projection,
    Sample,
    convolution,
    fit,
    fit_values,
    gaussian,
    mean_pooling,
    singular,
)
from effattn.methods.performer import PerformerAttention, performer_attention
from effattn.methods.performer_features import draw_projections, optimal_a

N, D = 24, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two sequences, four heads over two key heads."""
    g = generator(5)
    return tuple(torch.randn(2, heads, N, D, generator=g, dtype=dtype) for heads in (4, 2, 2))


OMEGA = draw_projections(16, D, generator=generator(1), dtype=torch.float64)
POOLED = mean_pooling(6, N, dtype=torch.float64)
DRAWN = gaussian(6, N, generator=generator(2), dtype=torch.float64)
METHODS: dict[str, Callable[..., torch.Tensor]] = {
    "performer": lambda q, k, v, mask: performer_attention(q, k, v, OMEGA, padding_mask=mask),
    "performer, causal": lambda q, k, v, mask: performer_attention(
        q, k, v, OMEGA, causal=True, block=7, padding_mask=mask
    ),
    "performer, relu": lambda q, k, v, mask: performer_attention(
        q, k, v, OMEGA, features="relu", padding_mask=mask
    ),
    "linformer, pooling": lambda q, k, v, mask: linformer_attention(q, k, v, POOLED, padding_mask=mask),
    "linformer, gaussian": lambda q, k, v, mask: linformer_attention(q, k, v, DRAWN, padding_mask=mask),
}
#: tokens that are there: the second sequence has a hole, and begins and ends with padding
SEEN = torch.ones(2, N, dtype=torch.bool)
SEEN[0, 20:] = False
SEEN[1, [0, 1, 9, 22, 23]] = False

# -- padding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [math.nan, math.inf, -math.inf, 1e300], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_what_padding_holds_has_no_influence(name: str, held: float) -> None:
    """Not in a bit, forward and backward; and what padding gets as a gradient is 0."""

    def run(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = METHODS[name](*leaves, SEEN)
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaves)

    q, k, v = problem()
    hidden = ~SEEN[:, None, :, None]
    clean = run(k, v)
    held_there = run(k.masked_fill(hidden, held), v.masked_fill(hidden, held))
    for one, other in zip(clean, held_there, strict=True):
        assert bool(torch.isfinite(one).all())
        assert torch.equal(one, other)
    for gradient in held_there[2:]:
        assert not bool(gradient[hidden.expand_as(gradient)].any())
        assert bool(gradient[~hidden.expand_as(gradient)].any())


@pytest.mark.parametrize("name", METHODS)
def test_what_is_not_finite_is_refused_where_it_is_seen(name: str) -> None:
    for which, message in enumerate(
        ("q has NaN .* not rows of q", "k has NaN .* visible", "v has NaN .* visible")
    ):
        inputs = [x.clone() for x in problem()]
        inputs[which][1, 0, 5, 3] = math.nan
        with pytest.raises(ArgumentError, match=message):
            METHODS[name](*inputs, SEEN)
        with pytest.raises(ArgumentError, match=message):
            METHODS[name](*inputs, None)


def test_projections_that_are_not_finite_are_refused() -> None:
    q, k, v = problem()
    with pytest.raises(ArgumentError, match="omega has NaN"):
        performer_attention(q, k, v, OMEGA * math.inf)
    matrix = DRAWN.matrix.clone()
    matrix[0, N - 1] = math.nan
    with pytest.raises(ArgumentError, match="e has NaN"):
        linformer_attention(q, k, v, Projection(matrix))
    with pytest.raises(ArgumentError, match="f has NaN"):
        linformer_attention(q, k, v, DRAWN, Projection(matrix))
    # What is beyond the keys isn't used.
    short = linformer_attention(q, k[:, :, :-1], v[:, :, :-1], Projection(matrix))
    assert torch.equal(short, linformer_attention(q, k[:, :, :-1], v[:, :, :-1], DRAWN))


# -- dtypes of modules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_projections_of_a_module_are_not_rounded(dtype: torch.dtype) -> None:
    module = PerformerAttention(D, 16, generator=generator(3))
    drawn = module.omega.clone()
    # Rounding them would be seen.
    assert dtype == torch.float64 or not torch.equal(drawn.to(dtype).float(), drawn)
    changed = torch.nn.ModuleDict({"attention": copy.deepcopy(module)}).to(dtype)["attention"]
    assert changed.omega.dtype == torch.float32
    assert torch.equal(changed.omega, drawn)
    assert "omega" in dict(changed.named_buffers())
    q, k, v = problem(dtype)
    assert torch.equal(changed(q, k, v), performer_attention(q, k, v, drawn))
    # The state fits both ways, and redrawing goes on from the same dtype.
    module.load_state_dict(changed.state_dict())
    changed.redraw(generator(4))
    assert torch.equal(changed.omega, PerformerAttention(D, 16, generator=generator(4)).omega)


def test_projections_of_a_module_go_to_its_device() -> None:
    module = PerformerAttention(D, 16, generator=generator(3))
    assert module.to("meta", torch.bfloat16).omega.device.type == "meta"
    assert module.omega.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_16_bits_is_loaded_as_float32(assign: bool) -> None:
    module = PerformerAttention(D, 16, generator=generator(3))
    state = {"omega": PerformerAttention(D, 16, generator=generator(4)).omega.bfloat16()}
    module.load_state_dict(state, assign=assign)
    assert module.omega.dtype == torch.float32
    assert torch.equal(module.omega, state["omega"].float())
    assert "omega" in dict(module.named_buffers())
    module.redraw(generator(3))
    assert torch.equal(module.omega, PerformerAttention(D, 16, generator=generator(3)).omega)


@pytest.mark.parametrize("given", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["performer", "performer, causal", "linformer"])
def test_autocast_does_not_change_what_is_computed_in(
    name: str, inputs: torch.dtype, given: torch.dtype | None
) -> None:
    def run(compute_dtype: torch.dtype | None, backward: bool = True) -> tuple[torch.Tensor, ...]:
        leaves = [x.clone().requires_grad_() for x in problem(inputs)]
        if name == "linformer":
            out = linformer_attention(*leaves, POOLED, compute_dtype=compute_dtype)
        else:
            out = performer_attention(
                *leaves, OMEGA, causal="causal" in name, block=7, compute_dtype=compute_dtype
            )
        assert out.dtype == inputs
        return out.detach(), *(torch.autograd.grad(out.float().square().sum(), leaves) if backward else ())

    plain = run(given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Only the causal backward computes features again; others are torch's, and belong outside.
        inside = run(given, backward="causal" in name)
    assert all(map(torch.equal, inside, plain))
    # The dtype would be seen.
    other = run(torch.bfloat16 if given is None else torch.float32)
    assert not torch.equal(other[0], plain[0])


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, N), (N, 0), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_without_queries_or_keys_gradients_are_zeros(q_len: int, kv_len: int, causal: bool) -> None:
    """As those of torch's own attention, also where a sum of the inputs would overflow."""
    modules: list[torch.nn.Module] = [PerformerAttention(D, 16, generator=generator(3), causal=causal)]
    if not causal:
        modules.append(
            LinformerAttention(LinformerProjections(N, 6, kind="mean-pooling", sharing="headwise"))
        )
    for module in modules:
        leaves = [
            x[:, :, :length].half().mul(0).add(60000).requires_grad_()
            for x, length in zip(problem(), (q_len, kv_len, kv_len), strict=True)
        ]
        out = module(*leaves)
        assert tuple(out.shape) == (2, 4, q_len, D)
        assert out.dtype == torch.float16
        assert not bool(out.any())
        out.sum().backward()
        for x in (*leaves, *module.parameters()):
            assert x.grad is not None
            assert not bool(x.grad.any())


# -- what constructors and fits refuse ---------------------------------------------------------------------


def performer(**changes: Any) -> PerformerAttention:
    arguments: dict[str, Any] = {"head_dim": D, "num_features": 16, "generator": generator(), **changes}
    return PerformerAttention(**arguments)


def linformer(**changes: Any) -> LinformerProjections:
    return LinformerProjections(**{"n": N, "k": 6, "kind": "mean-pooling", **changes})


def sample() -> Sample:
    return Sample(*(x[0, 0] for x in problem()))


BAD: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: performer(block=0), ArgumentError, "block must be at least 1, got 0"),
    (lambda: performer(block=2.0), ArgumentTypeError, "block must be an int"),
    (lambda: performer(scale=math.nan), ArgumentError, "scale must be finite, got nan"),
    (lambda: performer(scale="x"), ArgumentTypeError, "scale must be a real number or None, got 'x'"),
    (lambda: performer(causal="yes"), ArgumentTypeError, "causal must be True or False, got 'yes'"),
    (lambda: performer(partial="no"), ArgumentTypeError, "partial must be True or False"),
    (lambda: performer(features="softmax"), ArgumentError, "features must be one of"),
    (lambda: performer(features="softmax", a=0.1), ArgumentError, "features must be one of"),
    (lambda: performer(projections="random"), ArgumentError, "kind must be one of"),
    (lambda: performer(num_features=15, features="hyperbolic"), ArgumentError, "must be even"),
    (lambda: performer(num_features="16"), ArgumentTypeError, "num_features must be an int"),
    (lambda: performer(head_dim=0), ArgumentError, "head_dim must be at least 1"),
    (lambda: performer(head_dim=8.0), ArgumentTypeError, "head_dim must be an int"),
    (lambda: performer(kv_heads=0), ArgumentError, "kv_heads must be at least 1"),
    (lambda: performer(generator=None), ArgumentTypeError, "generator must be a torch.Generator"),
    (lambda: performer().redraw(None), ArgumentTypeError, "generator must be a torch.Generator"),  # pyright: ignore
    (
        lambda: draw_projections(8, 8, generator=generator(), dtype=torch.int32),
        ArgumentTypeError,
        "dtype must be torch.float16",
    ),
    (
        lambda: draw_projections(8, 8, generator=generator(), shape=2),  # pyright: ignore
        ArgumentTypeError,
        "shape must be a tuple",
    ),
    (
        lambda: draw_projections(8, 8, generator=generator(), shape=(-1,)),
        ArgumentError,
        "shape must be at least 1",
    ),
    (lambda: optimal_a("1", 8), ArgumentTypeError, "mean_square must be a real number"),  # pyright: ignore
    (lambda: linformer(n="32"), ArgumentTypeError, "n must be an int, got '32'"),
    (lambda: linformer(n=0), ArgumentError, "n must be at least 1"),
    (lambda: linformer(k=N + 1), ArgumentError, "k must be at most 24, the number of tokens"),
    (lambda: linformer(k=None), ArgumentTypeError, "k must be an int"),
    (lambda: linformer(sharing="none", kv_heads=-2), ArgumentError, "kv_heads must be at least 1"),
    (lambda: linformer(sharing="none", kv_heads="2"), ArgumentTypeError, "kv_heads must be an int"),
    (lambda: linformer(kind="convolution", k=7), ArgumentError, "needs k to divide n"),
    (lambda: linformer(kind="gaussian"), ArgumentError, "drawn from a generator"),
    (lambda: linformer(kind="gaussian", generator=0), ArgumentTypeError, "must be a torch.Generator"),
    (
        lambda: LinformerAttention(None),
        ArgumentTypeError,
        "projections must be a LinformerProjections, got None",
    ),  # pyright: ignore
    (lambda: LinformerAttention(POOLED), ArgumentTypeError, "got Projection"),  # pyright: ignore
    (lambda: LinformerAttention(linformer(), scale="x"), ArgumentTypeError, "scale must be"),  # pyright: ignore
    (lambda: LinformerAttention(linformer(), scale=math.inf), ArgumentError, "scale must be finite"),
    (lambda: gaussian(2, 4, generator=generator(), dtype=torch.int8), ArgumentTypeError, "dtype must be"),
    (lambda: mean_pooling(2, 4, dtype=torch.bool), ArgumentTypeError, "dtype must be"),
    (lambda: convolution(2, 4, [1.0, 1.0]), ArgumentTypeError, "weight must be a floating tensor"),  # pyright: ignore
    (lambda: singular(torch.ones(4), 2), ArgumentError, r"\(\.\.\., q_len, n\)"),
    (lambda: singular(torch.full((4, 4), math.nan), 2), ArgumentError, "attention has NaN"),
    (lambda: fit([sample()], None), ArgumentTypeError, "start must be a Projection"),  # pyright: ignore
    (lambda: fit([sample()], POOLED, steps=0), ArgumentError, "steps must be at least 1"),
    (lambda: fit([sample()], POOLED, learning_rate=math.nan), ArgumentError, "learning_rate must be finite"),
    (lambda: fit([sample()], POOLED, learning_rate="x"), ArgumentTypeError, "learning_rate must be"),  # pyright: ignore
    (lambda: fit([sample()], POOLED, shared=1), ArgumentTypeError, "shared must be"),  # pyright: ignore
    (lambda: fit([sample()], Projection(DRAWN.matrix[None])), ArgumentError, "one head's"),
    (lambda: fit_values([tuple(sample())], POOLED), ArgumentTypeError, "must be a Sample"),  # pyright: ignore
    (lambda: fit_values([sample()], POOLED, scale="x"), ArgumentTypeError, "scale must be"),  # pyright: ignore
    (
        lambda: fit_values([sample()._replace(v=sample().v * math.inf)], POOLED),
        ArgumentError,
        "v of a calibration sample has NaN",
    ),
]


@pytest.mark.parametrize(
    ("call", "kind", "message"), BAD, ids=[f"{i}-{m[:24]}" for i, (_, _, m) in enumerate(BAD)]
)
def test_what_cannot_work_is_refused_at_once(
    call: Callable[[], object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_what_is_right_is_taken() -> None:
    performer(block=1, scale=-0.5, causal=True, partial=True, num_features=4, kv_heads=2).redraw(generator(1))
    LinformerAttention(linformer(sharing="none", kv_heads=2), scale=0.5)
    fit([sample()], POOLED, steps=1)
