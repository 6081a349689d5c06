"""Exact attention against two references written without it, and against its own statement."""

from __future__ import annotations

import math
import subprocess
import sys

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effattn import exact
from effattn.case import CAUSAL, Case
from effattn.errors import RequestError
from effattn.exact.blocks import row_blocks

INF, NAN = math.inf, math.nan


def visible(case: Case) -> torch.Tensor:
    """(q_len, kv_len), from the words of the mask convention, pair by pair."""
    rows = []
    for i in range(case.q_len):
        last = {"none": case.kv_len, "top-left": i, "bottom-right": i + case.kv_len - case.q_len}[case.causal]
        rows.append([j <= last for j in range(case.kv_len)])
    return torch.tensor(rows, dtype=torch.bool).reshape(case.q_len, case.kv_len)


def naive(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula with the whole matrix, float64. Rows that see no key get 0 and -inf."""
    group = case.heads // case.kv_heads
    head = [h // group for h in range(case.heads)]
    k, v = k.double()[:, head], v.double()[:, head]
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k) * case.softmax_scale
    scores = scores.masked_fill(~visible(case), -INF)
    out = torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)
    lse = scores.logsumexp(-1)
    empty = ~visible(case).any(-1)
    out[:, :, empty] = 0.0
    return out, lse


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    return Case(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        q_len=draw(st.integers(0, 40)),
        kv_len=draw(st.integers(0, 40)),
        head_dim=draw(st.integers(1, 20)),
        v_dim=draw(st.integers(1, 20)),
        dtype=draw(st.sampled_from(("fp16", "bf16", "fp32"))),
        causal=draw(st.sampled_from(CAUSAL)),
        scale=draw(st.none() | st.floats(-3, 3)),
        layout=draw(
            st.sampled_from(("bhsd", "bshd+pad", "dsbh+step+offset", "bhsd+expand-s", "hbsd+expand-h"))
        ),
        values=draw(
            st.sampled_from(("normal", "outliers", "large-logits", "negative-logits", "growing-max"))
        ),
        seed=draw(st.integers(0, 9)),
    )


@given(case=cases(), block=st.none() | st.tuples(st.integers(1, 50), st.integers(1, 50)))
def test_equals_the_formula_with_the_whole_matrix(case: Case, block: tuple[int, int] | None) -> None:
    inputs = case.tensors()
    got = exact.attention(*inputs, causal=case.causal, scale=case.scale, block=block)
    out, lse = naive(case, *inputs)
    assert got.out.dtype == got.lse.dtype == torch.float64
    # Both round; a logit of 300 has an error near 300 * 2^-53 * 20 terms, which exp makes relative.
    torch.testing.assert_close(got.out, out, rtol=0, atol=2e-12)
    torch.testing.assert_close(got.lse, lse, rtol=1e-13, atol=1e-13)


def test_blocks_bound_what_is_looked_at_together() -> None:
    case = Case(
        batch=2, heads=6, kv_heads=2, q_len=50, kv_len=70, head_dim=8, dtype="fp32", causal="top-left"
    )
    seen = torch.zeros(case.batch, case.heads, case.q_len)
    inputs = case.tensors()
    for rows in row_blocks(*inputs, causal=case.causal, block=(16, 32)):
        count = torch.zeros(rows.q.shape[:2])
        for tile in rows.tiles():
            assert rows.q.shape[1] <= 16 * 3
            assert tile.k.shape[1] <= 32
            assert tile.k.shape[1] == tile.v.shape[1] == tile.keys.stop - tile.keys.start
            count += tile.k.shape[1] if tile.hidden is None else (~tile.hidden).sum(-1)
        torch.testing.assert_close(rows.read(inputs.q).double(), rows.q, rtol=0, atol=0)
        rows.write(seen, count)
    # Query i sees i + 1 keys: each visible pair was met once.
    assert torch.equal(seen, torch.arange(1.0, 51.0).expand_as(seen))


def test_agrees_with_fifty_digits() -> None:
    """Against mpmath, which shares nothing with torch: tiny, but with logits from -25 to 25."""
    case = Case(
        heads=2,
        kv_heads=1,
        q_len=4,
        kv_len=5,
        head_dim=3,
        v_dim=2,
        dtype="fp32",
        causal="bottom-right",
        scale=7.0,
    )
    q, k, v = case.tensors()
    got = exact.attention(q, k, v, causal=case.causal, scale=case.scale, block=(2, 2))
    with mpmath.workdps(50):
        for h in range(2):
            for i in range(4):
                keys = [j for j in range(5) if j <= i + 1]
                s = [7 * mpmath.fdot(q[0, h, i].tolist(), k[0, 0, j].tolist()) for j in keys]
                total = mpmath.fsum(map(mpmath.exp, s))
                assert float(abs(got.lse[0, h, i].item() - mpmath.log(total))) < 1e-14
                for d in range(2):
                    sums = mpmath.fdot(map(mpmath.exp, s), v[0, 0, keys, d].tolist())
                    assert float(abs(got.out[0, h, i, d].item() - sums / total)) < 1e-15


@pytest.mark.parametrize("scale", [1e3, -1e3])
def test_logits_of_millions_neither_overflow_nor_vanish(scale: float) -> None:
    q = torch.tensor([[[[1000.0]]]])
    k = torch.tensor([[[[1.0], [2.0], [2.0]]]])
    v = torch.tensor([[[[1.0], [2.0], [4.0]]]])
    got = exact.attention(q, k, v, scale=scale, block=(1, 1))
    assert got.out.item() == (3.0 if scale > 0 else 1.0)
    assert got.lse.item() == (2e6 + math.log(2) if scale > 0 else -1e6)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("causal", CAUSAL)
def test_no_queries_or_no_keys(q_len: int, kv_len: int, causal: str) -> None:
    case = Case(
        batch=2, heads=2, q_len=q_len, kv_len=kv_len, head_dim=4, v_dim=3, dtype="fp16", causal=causal
    )
    got = exact.attention(*case.tensors(), causal=causal)
    assert got.out.shape == (2, 2, q_len, 3)
    assert got.lse.shape == (2, 2, q_len)
    assert torch.equal(got.out, torch.zeros_like(got.out))
    assert torch.equal(got.lse, torch.full_like(got.lse, -INF))


def test_rows_that_see_no_key_are_zero_whatever_is_in_them() -> None:
    case = Case(q_len=7, kv_len=3, head_dim=4, dtype="fp32", causal="bottom-right")
    q, k, v = case.tensors()
    q[:, :, :4] = NAN
    got = exact.attention(q, k, v, causal=case.causal)
    assert torch.equal(got.out[:, :, :4], torch.zeros(1, 1, 4, 4, dtype=torch.float64))
    assert (got.lse[:, :, :4] == -INF).all()
    assert got.out[:, :, 4:].isfinite().all()
    assert (got.out[:, :, 4:] != 0).all()


@given(case=cases().filter(lambda c: c.causal != "none" and c.q_len and c.kv_len), cut=st.integers(0, 39),
       poison=st.sampled_from((NAN, INF, -INF)))  # fmt: skip
def test_what_lies_behind_the_mask_has_no_influence(case: Case, cut: int, poison: float) -> None:
    q, k, v = (x.clone(memory_format=torch.contiguous_format) for x in case.tensors())
    cut %= case.kv_len
    blind = ~visible(case)[:, cut:].any(-1)
    before = exact.attention(q, k, v, causal=case.causal, scale=case.scale, block=(8, 8))
    k[:, :, cut:] = poison
    v[:, :, cut:] = poison
    after = exact.attention(q, k, v, causal=case.causal, scale=case.scale, block=(8, 8))
    torch.testing.assert_close(after.out[:, :, blind], before.out[:, :, blind], rtol=0, atol=1e-12)
    torch.testing.assert_close(after.lse[:, :, blind], before.lse[:, :, blind], rtol=1e-13, atol=1e-13)
    # and the rows that do see it, show it
    assert not after.out[:, :, ~blind].isfinite().any()


def _one_row(logits: list[float], values: list[float]) -> tuple[float, float]:
    """Output and lse of one row with these logits and values, one key a tile."""
    k = torch.tensor(logits).reshape(1, 1, -1, 1)
    v = torch.tensor(values).reshape(1, 1, -1, 1)
    for block in ((1, 1), None):
        got = exact.attention(torch.ones(1, 1, 1, 1), k, v, scale=1.0, block=block)
    return got.out.item(), got.lse.item()


@pytest.mark.parametrize(
    ("logits", "values", "out", "lse"),
    [
        pytest.param([0, 0], [1, INF], INF, math.log(2), id="an infinite value makes the output infinite"),
        pytest.param([0, -5000], [1, INF], INF, 0.0, id="also with a weight that underflows"),
        pytest.param([0, 0], [-INF, 1], -INF, math.log(2), id="with its sign"),
        pytest.param([0, 0], [INF, -INF], NAN, math.log(2), id="both signs are undefined"),
        pytest.param([0, -5000], [1, NAN], NAN, 0.0, id="a visible NaN shows"),
        pytest.param([-INF, 1], [5, 3], 3.0, 1.0, id="a logit of -inf has no weight"),
        pytest.param([-INF, 1], [INF, 3], NAN, 1.0, id="no weight times an infinite value is undefined"),
        pytest.param([INF, 1], [5, 3], NAN, INF, id="a logit of +inf leaves infinity by infinity"),
        pytest.param([1, INF], [5, 3], NAN, INF, id="wherever it is"),
        pytest.param([NAN, 1], [5, 3], NAN, NAN, id="a NaN logit shows"),
        pytest.param([NAN, INF], [5, 3], NAN, NAN, id="a NaN logit shows beside +inf"),
        pytest.param([-INF, -INF], [5, 3], NAN, -INF, id="no weight at all is 0 by 0"),
    ],
)
def test_infinities_and_nan_follow_the_formula(
    logits: list[float], values: list[float], out: float, lse: float
) -> None:
    got_out, got_lse = _one_row(logits, values)
    assert got_out == pytest.approx(out, abs=1e-15, nan_ok=True)
    assert got_lse == pytest.approx(lse, abs=1e-15, nan_ok=True)


def test_inputs_are_left_alone_and_need_no_gradients() -> None:
    case = Case(q_len=20, kv_len=20, head_dim=8, dtype="fp32", causal="bottom-right")
    inputs = [x.clone().requires_grad_() for x in case.tensors()]
    got = exact.attention(*inputs, causal=case.causal)
    assert not got.out.requires_grad
    for x, original in zip(inputs, case.tensors(), strict=True):
        assert torch.equal(x.detach(), original)


@pytest.mark.parametrize(
    ("shapes", "causal", "message"),
    [
        (((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4)), "none", "all three need four axes"),
        (((1, 2, 4, 8), (1, 2, 4, 9), (1, 2, 4, 8)), "none", "sizes of one name must agree"),
        (((1, 2, 4, 8), (1, 2, 5, 8), (1, 2, 4, 8)), "none", "sizes of one name must agree"),
        (((2, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "none", "sizes of one name must agree"),
        (((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "none", "heads must be a multiple of kv_heads"),
        (((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "bottom", "causal 'bottom': expected one of none,"),
    ],
)
def test_shapes_that_do_not_go_together_are_refused(shapes: tuple, causal: str, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        exact.attention(*(torch.zeros(shape) for shape in shapes), causal=causal)


def test_a_block_without_a_key_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 4)
    with pytest.raises(RequestError, match="block \\(4, 0\\)"):
        exact.attention(x, x, x, block=(4, 0))


_LARGE = """
import torch
from pathlib import Path
from effattn import exact
from effattn.case import Case
torch.set_num_threads(1)
case = Case(q_len=16384, kv_len=16384, head_dim=64, dtype="fp16", seed=3)
q, k, v = case.tensors()
out, lse = exact.attention(q, k, v)
# Of this program alone, in KiB: getrusage would count what the process was before it became this program.
status = Path("/proc/self/status").read_text().splitlines()
peak = int(next(line for line in status if line.startswith("VmHWM")).split()[1])
for i in (0, 5000, 16383):
    s = (q[0, 0, i].double() @ k[0, 0].double().T) * 0.125
    assert (s.logsumexp(0) - lse[0, 0, i]).abs() < 1e-12
    assert (s.softmax(0) @ v[0, 0].double() - out[0, 0, i]).abs().max() < 1e-14
print(peak)
"""


def test_memory_is_linear_in_the_length() -> None:
    """16,384 queries and keys in under 600 MB in total; the matrix of scores alone would be 2,147 MB."""
    done = subprocess.run([sys.executable, "-c", _LARGE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 600e6
