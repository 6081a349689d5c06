"""Studies of traffic and of models: counts against formulas, what stands in for a model's attention."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from effattn.errors import ArgumentError
from effattn.study.engine import Job, Point, Store


def test_counted_traffic_is_that_of_the_formula(tmp_path: Path) -> None:
    """To the element, for both kernels; and no other block's formula fits."""
    from effattn.study import traffic

    jobs = traffic.jobs("smoke")
    rows = Store(tmp_path, {}, traffic.COLUMNS).run(jobs, traffic.measure)
    for row in rows:
        assert row.measures["elements"] == row.measures["formula"], row.job
        assert traffic.formula("flash", row.job.point.n, 64, 16) != row.measures["elements"]
    found = traffic.exponents(rows)
    assert 1.5 < found.length < 2
    assert -1 < found.block < -0.5
    assert "1.0000" in traffic.table(rows)[-1]


def test_standard_attention_is_attention() -> None:
    from effattn.kernels.standard_attention import standard_attention

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 128, 32, generator=g) for _ in range(3))
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(standard_attention(q, k, v), exact, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="a multiple of 64"):
        standard_attention(*(x[:, :, :100] for x in (q, k, v)))


def test_a_models_attention_is_replaced_where_it_is_asked_for() -> None:
    """A sentence model: exact attention and Linformer at k = n change nothing, uniform attention and few features do."""
    from effattn.study import model

    tokens = 24
    point = Point(part="minilm", n=tokens, head_dim=32, values=model.ALL, method="exact")

    def change(method: str, size: int, values: str = model.ALL) -> float:
        changed = Point(**{**vars(point), "method": method, "size": size, "values": values})
        return model.measure(Job(point=changed, draw=0))["similarity_change"]

    assert change("exact", 0) == 0.0
    for method in ("linformer, mean pooling", "top-k", "truncated SVD", "Nystroemformer"):
        assert change(method, tokens) < 1e-5
    assert 1e-4 < change("truncated SVD", 8) < change("truncated SVD", 2)
    assert change("shuffled V", 0) > 0.01
    assert change("zero", 0) > 0.01
    assert 1e-4 < change("top-k", 4) < change("top-k", 1)
    one, every = change("performer, positive", 64, "layer 2"), change("performer, positive", 64)
    assert 1e-4 < one < every
    assert change("performer, positive", 4) > every
    assert change("uniform", 0) > 0.01


@pytest.mark.parametrize("causal", [False, True])
def test_baselines_in_a_model_are_what_they_say(causal: bool) -> None:
    """Of grouped heads and padding: all keys are exact attention, one key is the value of the largest score."""
    from effattn.study import model

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 8, generator=g) for heads in (4, 2, 2))
    seen = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    both = seen[:, None, None] & (torch.ones(5, 5).tril().bool() if causal else torch.ones(5, 5).bool())
    exact = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=both, scale=0.5, enable_gqa=True
    )

    def attend(method: str, size: int) -> torch.Tensor:
        point = Point(
            part="smollm2", n=5, head_dim=8, causal=causal, values=model.ALL, method=method, size=size
        )
        return model.attention(Job(point=point, draw=0))(q, k, v, seen, 0.5)

    torch.testing.assert_close(attend("top-k", 5), exact)
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    best = (q @ keys.mT).masked_fill(~both, -math.inf).argmax(-1)
    torch.testing.assert_close(attend("top-k", 1), values.gather(2, best[..., None].expand(values.shape)))
    mean = both.float() / both.sum(-1, keepdim=True)
    torch.testing.assert_close(attend("uniform", 0), (mean @ values).expand(2, 4, 5, 8))
    assert not attend("zero", 0).any()
    torch.testing.assert_close(attend("truncated SVD", 5), exact)
    weights = (0.5 * q @ keys.mT).masked_fill(~both, -math.inf).softmax(-1).double()
    u, s, vt = torch.linalg.svd(weights)
    rank_two = (u[..., :2] * s[..., None, :2]) @ vt[..., :2, :] @ values.double()
    torch.testing.assert_close(attend("truncated SVD", 2), rank_two.float(), rtol=1e-4, atol=1e-5)
    if not causal:  # its landmarks are averages over all positions
        got = attend("Nystroemformer", 5)
        torch.testing.assert_close(got[0], exact[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(got[1, :, :3], exact[1, :, :3], rtol=1e-3, atol=1e-4)
        assert float((attend("Nystroemformer", 1) - exact).abs().max()) > 0.05
    # Shuffled: weights that are right, values of the tokens that are there in an order of their own.
    shuffled = torch.linalg.lstsq(weights[0], attend("shuffled V", 0)[0].double()).solution
    order = torch.cdist(shuffled, values[0].double()).argmin(-1)
    assert all(sorted(row.tolist()) == [0, 1, 2, 3, 4] for row in order)
    torch.testing.assert_close(
        shuffled.float(), values[0].gather(1, order[..., None].expand(4, 5, 8)), rtol=0.05, atol=0.05
    )
    assert any(row.tolist() != [0, 1, 2, 3, 4] for row in order)
    hidden = v.clone()
    hidden[1, :, 3:] = 100.0
    v = hidden
    assert float(attend("shuffled V", 0)[1].abs().max()) < 50
