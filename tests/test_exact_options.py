"""Exact attention with options, and its gradients: against autograd of the formula, and against finite differences."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn import exact
from effattn.case import CAUSAL, Case, Inputs
from effattn.errors import RequestError
from effattn.exact import Options

INF, NAN = math.inf, math.nan


def keep_of(case: Case) -> torch.Tensor | None:
    if not case.dropout:
        return None
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.heads, case.q_len, case.kv_len)
    return torch.rand(shape, generator=generator) >= case.dropout


def visible(case: Case, inputs: Inputs) -> torch.Tensor:
    """(batch, q_len, kv_len) from the words of the conventions, pair by pair; the mask apart."""
    seen = torch.zeros(case.batch, case.q_len, case.kv_len, dtype=torch.bool)
    extras = inputs.extras
    for b in range(case.batch):
        m = case.q_len if extras.q_lengths is None else int(extras.q_lengths[b])
        n = case.kv_len if extras.kv_lengths is None else int(extras.kv_lengths[b])
        shift = 0 if case.causal == "top-left" else n - m
        for i in range(m):
            for j in range(n):
                sees = case.causal == "none" or j <= i + shift
                if case.window is not None:
                    left, right = case.window
                    sees &= left < 0 or j >= i + shift - left
                    sees &= right < 0 or j <= i + shift + right
                seen[b, i, j] = sees
    return seen


def naive(case: Case, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """out, lse and the leaves q, k, v[, bias][, sinks], all float64 and whole matrices, for autograd."""
    extras = inputs.extras
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v = leaves
    group = case.heads // case.kv_heads
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = q @ k.mT * case.softmax_scale
    if case.softcap is not None:
        s = case.softcap * torch.tanh(s / case.softcap)
    if extras.bias is not None:
        leaves.append(extras.bias.double().requires_grad_())
        s = s + leaves[-1]
    if extras.alibi_slopes is not None:
        slopes = extras.alibi_slopes.double()
        slopes = slopes[None].expand(case.batch, -1) if slopes.dim() == 1 else slopes
        m = torch.full((case.batch,), case.q_len) if extras.q_lengths is None else extras.q_lengths
        n = torch.full((case.batch,), case.kv_len) if extras.kv_lengths is None else extras.kv_lengths
        shift = (n - m) * (case.causal != "top-left")
        place = torch.arange(case.q_len)[None, :, None] + shift[:, None, None]
        distance = (place - torch.arange(case.kv_len)).abs()
        s = s - slopes[:, :, None, None] * distance[:, None]
    seen = visible(case, inputs)[:, None].expand(s.shape)
    if extras.mask is not None:
        seen = seen & extras.mask
    s = s.masked_fill(~seen, -INF)
    if extras.sinks is not None:
        leaves.append(extras.sinks.double().requires_grad_())
        sink = leaves[-1][None, :, None, None].expand(*s.shape[:3], 1)
        if extras.q_lengths is not None:
            padding = torch.arange(case.q_len)[None, None, :, None] >= extras.q_lengths[:, None, None, None]
            sink = sink.masked_fill(padding, -INF)
        s = torch.cat([s, sink], -1)
    nothing = (s == -INF).all(-1, keepdim=True)
    lse = torch.where(nothing, 0.0, s).logsumexp(-1)  # of rows without keys: anything, masked below
    lse = torch.where(nothing[..., 0], -INF, lse)
    w = torch.exp(s - torch.where(nothing[..., 0], 0.0, lse)[..., None])[..., : case.kv_len]
    keep = keep_of(case)
    if keep is not None:
        w = w * keep / (1.0 - case.dropout)
    return w @ v, lse, leaves


def options_of(case: Case, inputs: Inputs) -> Options:
    return Options.of(case, inputs, keep=keep_of(case))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 2))
    side = st.sampled_from((-1, 0, 1, 3, 8))
    axes = st.sampled_from(("none", "none", "bhqk", "hqk", "qk", "bk", "k", "bhq", "h"))
    return Case(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        q_len=draw(st.integers(0, 9)),
        kv_len=draw(st.integers(0, 9)),
        head_dim=draw(st.integers(1, 5)),
        v_dim=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(("fp16", "bf16", "fp32"))),
        causal=draw(st.sampled_from(CAUSAL)),
        scale=draw(st.sampled_from((None, 1.5, -0.5, 0.0))),
        window=draw(st.none() | st.tuples(side, side)),
        softcap=draw(st.sampled_from((None, None, 0.5, 20.0))),
        alibi=draw(st.sampled_from(("none", "geometric", "drawn"))),
        bias=draw(axes),
        mask=draw(axes),
        sinks=draw(st.booleans()),
        lengths=draw(st.sampled_from(("none", "kv", "both"))),
        dropout=draw(st.sampled_from((0.0, 0.0, 0.25))),
        backward=True,
        layout=draw(st.sampled_from(("bhsd", "bshd+pad", "dsbh+step+offset", "bhsd+expand-s"))),
        seed=draw(st.integers(0, 99)),
    )


@settings(max_examples=150)
@given(case=cases(), most_scores=st.sampled_from((None, 1, 17, 60)), through_lse=st.booleans())
def test_equals_the_formula_and_autograd(case: Case, most_scores: int | None, through_lse: bool) -> None:
    inputs = case.tensors()
    options = options_of(case, inputs)
    got = exact.attention_with(*inputs, options, most_scores=most_scores)
    out, lse, leaves = naive(case, inputs)
    torch.testing.assert_close(got.out, out.detach(), rtol=0, atol=1e-11)
    torch.testing.assert_close(got.lse, lse.detach(), rtol=1e-12, atol=1e-12)

    d_out, d_lse = inputs.extras.d_out, inputs.extras.d_lse
    assert d_out is not None
    assert d_lse is not None
    target = (out * d_out.double()).sum()
    if through_lse:
        target = target + (torch.where(lse == -INF, 0.0, lse) * d_lse.double()).sum()
    expected = torch.autograd.grad(target, leaves, allow_unused=True) if target.requires_grad else []
    found = exact.gradients(
        *inputs, d_out, options, exact=got, d_lse=d_lse if through_lse else None, most_scores=most_scores
    )
    assert len(found.present()) == len(leaves)
    for (name, x), leaf, want in zip(found.present().items(), leaves, expected, strict=True):
        assert x.shape == leaf.shape, name
        torch.testing.assert_close(
            x, torch.zeros_like(x) if want is None else want, rtol=0, atol=1e-10, msg=name
        )


CASE = Case(
    batch=2, heads=4, kv_heads=2, q_len=5, kv_len=7, head_dim=3, dtype="fp32", causal="bottom-right", window=(3, 2),
    softcap=2.0, alibi="drawn", bias="hqk", mask="bqk", sinks=True, lengths="both", dropout=0.25, backward=True, seed=4,
)  # fmt: skip


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sinks"])
def test_gradients_are_the_limits_of_differences(name: str) -> None:
    inputs = CASE.tensors()
    options = options_of(CASE, inputs)
    d_out, d_lse = inputs.extras.d_out.double(), inputs.extras.d_lse.double()  # type: ignore[union-attr]

    def target(tensors: dict[str, torch.Tensor], options: Options) -> float:
        got = exact.attention_with(tensors["q"], tensors["k"], tensors["v"], options)
        lse = torch.where(got.lse == -INF, 0.0, got.lse)
        return float((got.out * d_out).sum() + (lse * d_lse).sum())

    tensors = {n: x.double() for n, x in zip("qkv", inputs, strict=True)}
    reference = exact.attention_with(*inputs, options)
    found = exact.gradients(*inputs, d_out, options, exact=reference, d_lse=d_lse).present()[name]
    generator = torch.Generator().manual_seed(1)
    step = 1e-5
    for _ in range(5):
        direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
        values = []
        for sign in (step, -step):
            if name in "qkv":
                values.append(target(tensors | {name: tensors[name] + sign * direction}, options))
            else:
                moved = getattr(options, name).double() + sign * direction
                values.append(target(tensors, replace(options, **{name: moved})))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            float((found * direction).sum()), abs=1e-8
        )


@pytest.mark.parametrize("poison", [NAN, INF])
def test_what_is_hidden_has_no_influence(poison: float) -> None:
    case = replace(CASE, mask="k", dropout=0.0, kv_len=11, seed=1)
    inputs = case.tensors()
    options = options_of(case, inputs)
    d_out = inputs.extras.d_out
    assert d_out is not None
    before = exact.attention_with(*inputs, options)
    gradients = exact.gradients(*inputs, d_out, options, exact=before)
    assert options.mask is not None
    hidden = ~options.mask[0, 0, 0]
    assert hidden.any()
    q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in inputs)
    k[:, :, hidden], v[:, :, hidden] = poison, poison
    after = exact.attention_with(q, k, v, options)
    assert torch.equal(after.out, before.out)
    assert torch.equal(after.lse, before.lse)
    for name, x in exact.gradients(q, k, v, d_out, options, exact=after).present().items():
        assert torch.equal(x, gradients.present()[name]), name
    v[:, :, int((~hidden).nonzero()[0])] = poison
    after = exact.attention_with(q, k, v, options)
    assert not after.out.isfinite().all()
    assert not exact.gradients(q, k, v, d_out, options, exact=after).k.isfinite().all()


def test_a_bias_of_minus_infinity_is_weight_0() -> None:
    case = replace(CASE, bias="qk", mask="none")
    inputs = case.tensors()
    options = options_of(case, inputs)
    assert options.bias is not None
    cut = torch.rand(options.bias.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    biased = replace(options, bias=options.bias.masked_fill(cut, -INF))
    masked = replace(options, mask=~cut)
    for x, y in zip(
        exact.attention_with(*inputs, biased), exact.attention_with(*inputs, masked), strict=True
    ):
        assert torch.equal(x, y)


def test_rows_without_keys_have_the_sink_alone_and_padding_has_nothing() -> None:
    case = Case(
        q_len=9, kv_len=2, head_dim=4, dtype="fp16", causal="bottom-right", sinks=True, lengths="both", seed=1
    )
    inputs = case.tensors()
    got = exact.attention_with(*inputs, options_of(case, inputs))
    length, keys = int(inputs.extras.q_lengths[0]), int(inputs.extras.kv_lengths[0])  # type: ignore[index]
    assert keys < length < 9
    empty = length - keys
    assert torch.equal(
        got.lse[:, :, :empty], torch.full((1, 1, empty), float(inputs.extras.sinks[0])).double()
    )  # type: ignore[index]
    assert torch.isfinite(got.lse[:, :, empty:length]).all()
    assert (got.lse[:, :, length:] == -INF).all()
    assert (got.out[:, :, length:] == 0).all()
    assert (got.out[:, :, :empty] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(4, 5, 7)}, r"bias \(4, 5, 7\): expected four axes that broadcast"),
        ({"mask": torch.ones(2, 4, 5, 6, dtype=torch.bool)}, r"mask \(2, 4, 5, 6\)"),
        ({"sinks": torch.zeros(2)}, r"sinks \(2,\): expected \(heads,\)"),
        ({"alibi_slopes": torch.zeros(4, 2)}, r"alibi_slopes \(4, 2\): expected \(heads,\) or"),
        ({"kv_lengths": torch.zeros(3)}, r"kv_lengths \(3,\): expected \(batch,\)"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(change: dict[str, Any], message: str) -> None:
    inputs = CASE.tensors()
    with pytest.raises(RequestError, match=message):
        exact.attention_with(*inputs, replace(options_of(CASE, inputs), **change))
