"""Causal linear attention by blocked prefix sums, forward and backward: O(N) time and memory.

    out[i] = sum_{j <= i} (q[i] . k[j]) v[j] / sum_{j <= i} q[i] . k[j]

q and k are features (`effattn.methods.performer_features` makes some); nothing here knows how they came about.
The sequence is cut into chunks. With S the sum of k[j] v[j]^T and z that of k[j] over earlier chunks,

    states    one program a head and a block of features walks over the chunks and writes S and z before each
    outputs   one program a chunk:  A = tril(q k^T);  out = (A v + q S) / (A 1 + q z)

Backward, with num and den the numerator and denominator, g = d_out / den and h = -(d_out . out) / den:

    dA = tril(g v^T + h 1^T)     dq = dA k + g S^T + h z^T     dk = dA^T q + v T^T + t     dv = A^T g + k T

T and t are the sums of q[i] g[i]^T and q[i] h[i] over later chunks: the same states, walked from the end. Nothing is
subtracted, and S and z are computed again instead of kept. (Katharopoulos et al., arXiv:2006.16236, has the sums;
chunks as in Hua et al., arXiv:2202.10447, section 3.)
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from effattn.errors import ArgumentError
from effattn.kernels.arguments import check_tensors
from effattn.kernels.launch import Launch

#: rows of a chunk, and features of a block, on a CPU: a step costs a fixed overhead, so tiles are large
CPU_TILE = 64
#: the same on a GPU, up to a v_dim of 64 and beyond: products of float32 in IEEE precision run on scalar units out of
#: registers, of which wider rows leave less
GPU_TILES = (32, 16)
MAX_V_DIM = 256


def linear_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal linear attention of features, normalised; differentiable in q, k and v, once.

    Shapes
        q, k (batch, heads, n, features), v (batch, heads, n, v_dim), v_dim up to 256; out like v. Any strides.

    Arithmetic
        One dtype, float16, bfloat16 or float32. Products and sums are float32 for all of them, rounded once into out
        and into each gradient. `effattn.tolerances.linear` bounds what that may change. A row whose denominator is 0
        is NaN or infinite. A row has the same bits whatever comes after it, as long as that is finite.

    Memory: n / 64 (on a GPU n / 32, or n / 16 where v_dim is above 64) states of features x (v_dim + 1) float32 for
    each head, during the call.

    Raises ArgumentTypeError, ArgumentError.
    """
    check_tensors(q=q, k=k, v=v)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.shape != k.shape:
        raise ArgumentError(f"q and k must have the same shape, one key for each query, got {shapes}")
    if v.shape[:3] != q.shape[:3]:
        raise ArgumentError(f"v must agree with q in batch, heads and length, got {shapes}")
    if q.shape[3] == 0 or not 1 <= v.shape[3] <= MAX_V_DIM:
        raise ArgumentError(f"expected at least one feature and v_dim 1 to {MAX_V_DIM}, got {shapes}")
    if v.numel() == 0:
        return torch.empty_like(v)
    return _LinearAttention.apply(q, k, v)  # pyright: ignore[reportReturnType]


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, den = _forward(*(x.flatten(0, 1).contiguous() for x in (q, k, v)))
        out = out.view(v.shape)
        ctx.save_for_backward(q, k, v, out, den)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, den = ctx.saved_tensors
        grads = _backward(*(x.flatten(0, 1).contiguous() for x in (q, k, v, out, d_out)), den)
        return tuple(grad.view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))


def tile(v: torch.Tensor) -> int:
    """Rows of a chunk and features of a block, by the device and v_dim: a row is cut alike whatever comes with it."""
    if v.device.type == "cpu":
        return CPU_TILE
    return GPU_TILES[0] if v.shape[-1] <= 64 else GPU_TILES[1]


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out (heads, n, v_dim) and the denominators (heads, n) in float32, of (heads, n, ...) without gaps."""
    out = torch.empty_like(v)
    den = q.new_empty(q.shape[:2], dtype=torch.float32)
    states, sums = _prefix_sums(k, v, None, reverse=False)
    outputs_launch(q, k, v, states, sums, out, den).run(q)
    return out, den


def _backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    d_out: torch.Tensor,
    den: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = d_out.float() / den[..., None]
    h = -(g * out.float()).sum(-1)
    states, sums = _prefix_sums(k, v, None, reverse=False)
    later, later_sums = _prefix_sums(q, g, h, reverse=True)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    gradients_launch(q, k, v, g, h, states, sums, later, later_sums, dq, dk, dv).run(q)
    return dq, dk, dv


def _prefix_sums(
    x: torch.Tensor, y: torch.Tensor, w: torch.Tensor | None, *, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each chunk, the sums of x[j] y[j]^T and x[j] w[j] over the chunks before it, after it if `reverse`.

    (heads, chunks, features, v_dim) and (heads, chunks, features), float32; w is 1 if None.
    """
    heads, n, features = x.shape
    chunks = triton.cdiv(n, tile(y))
    states = x.new_empty((heads, chunks, features, y.shape[2]), dtype=torch.float32)
    sums = x.new_empty((heads, chunks, features), dtype=torch.float32)
    states_launch(x, y, w, states, sums, reverse=reverse).run(x)
    return states, sums


def states_launch(
    x: torch.Tensor,
    y: torch.Tensor,
    w: torch.Tensor | None,
    states: torch.Tensor,
    sums: torch.Tensor,
    *,
    reverse: bool,
) -> Launch:
    """One program for each block of features and each head."""
    heads, n, features = x.shape
    tensors = {"x": x, "y": y, "w": x if w is None else w, "states": states, "sums": sums}
    flags = {"WEIGHTED": w is not None, "REVERSE": reverse}
    return _launch(_states, triton.cdiv(features, tile(y)) * heads, tensors, n, features, y, **flags)


def outputs_launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, states: torch.Tensor, sums: torch.Tensor, out: torch.Tensor,
    den: torch.Tensor,
) -> Launch:  # fmt: skip
    """One program for each chunk and each head."""
    heads, n, features = q.shape
    tensors = {"q": q, "k": k, "v": v, "states": states, "sums": sums, "out": out, "den": den}
    return _launch(_outputs, triton.cdiv(n, tile(v)) * heads, tensors, n, features, v)


def gradients_launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, h: torch.Tensor, states: torch.Tensor,
    sums: torch.Tensor, later: torch.Tensor, later_sums: torch.Tensor, dq: torch.Tensor, dk: torch.Tensor,
    dv: torch.Tensor,
) -> Launch:  # fmt: skip
    """One program for each chunk and each head."""
    heads, n, features = q.shape
    tensors = {
        "q": q, "k": k, "v": v, "g": g, "h": h, "states": states, "sums": sums, "later": later,
        "later_sums": later_sums, "dq": dq, "dk": dk, "dv": dv,
    }  # fmt: skip
    return _launch(_gradients, triton.cdiv(n, tile(v)) * heads, tensors, n, features, v)


def _launch(
    kernel: Any,
    programs: int,
    tensors: dict[str, torch.Tensor],
    n: int,
    features: int,
    v: torch.Tensor,
    **flags: bool,
) -> Launch:
    v_dim = v.shape[2]
    sizes = {"n": n, "features": features, "v_dim": v_dim}
    # The gradients hold twice as many tiles at once.
    block_f = tile(v) if v.device.type == "cpu" or kernel is not _gradients else 16
    blocks = {"CHUNK": tile(v), "BLOCK_F": block_f, "BLOCK_D": max(16, triton.next_power_of_2(v_dim))}
    # Products of float32 in IEEE precision run on scalar units, out of registers: more warps hold more.
    options = {} if v.device.type == "cpu" else {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": True}
    return Launch(
        kernel=kernel, programs=programs, arguments={**tensors, **sizes, **flags, **blocks}, options=options
    )


@triton.jit(do_not_specialize=["n", "features", "v_dim"])
def _states(
    x, y, w, states, sums, n, features, v_dim,
    WEIGHTED: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_F features of one head, all chunks one after the other."""
    blocks = tl.cdiv(features, BLOCK_F)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    f = tl.program_id(0) % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    d = tl.arange(0, BLOCK_D)
    chunks = tl.cdiv(n, CHUNK)
    state = tl.zeros([BLOCK_F, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_F], tl.float32)
    for step in tl.range(0, chunks, disable_licm=True):
        c = chunks - 1 - step if REVERSE else step
        place = head * chunks + c
        inside_f = f < features
        tl.store(sums + place * features + f, total, mask=inside_f)
        tl.store(
            states + place * features * v_dim + f[:, None] * v_dim + d[None, :], state,
            mask=inside_f[:, None] & (d[None, :] < v_dim),
        )  # fmt: skip
        x_tile = _tile(x, head, c, f, n, features, CHUNK)
        y_tile = _tile(y, head, c, d, n, v_dim, CHUNK)
        state = tl.dot(tl.trans(x_tile), y_tile, state, input_precision="ieee")
        if WEIGHTED:
            weights = _column(w, head, c, n, CHUNK)
            total += tl.sum(x_tile * weights[:, None], 0)
        else:
            total += tl.sum(x_tile, 0)


@triton.jit(do_not_specialize=["n", "features", "v_dim"])
def _outputs(
    q, k, v, states, sums, out, den, n, features, v_dim,
    CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the rows of one chunk of one head."""
    chunks = tl.cdiv(n, CHUNK)
    c = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    d = tl.arange(0, BLOCK_D)
    place = head * chunks + c
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    numerator = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    denominator = tl.zeros([CHUNK], tl.float32)
    for first in tl.range(0, features, BLOCK_F, disable_licm=True):
        f = first + tl.arange(0, BLOCK_F)
        q_tile = _tile(q, head, c, f, n, features, CHUNK)
        k_tile = _tile(k, head, c, f, n, features, CHUNK)
        pairs = tl.dot(q_tile, tl.trans(k_tile), pairs, input_precision="ieee")
        numerator = tl.dot(
            q_tile, _state(states, place, f, d, features, v_dim), numerator, input_precision="ieee"
        )
        total = tl.load(sums + place * features + f, mask=f < features, other=0.0)
        denominator += tl.sum(q_tile * total[None, :], 1)
    pairs = tl.where(rows[:, None] >= rows[None, :], pairs, 0.0)
    v_tile = _tile(v, head, c, d, n, v_dim, CHUNK)
    numerator = tl.dot(pairs, v_tile, numerator, input_precision="ieee")
    denominator += tl.sum(pairs, 1)
    _put(out, numerator / denominator[:, None], head, c, d, n, v_dim, CHUNK)
    i = c * CHUNK + rows
    tl.store(den + head * n + i, denominator, mask=i < n)


@triton.jit(do_not_specialize=["n", "features", "v_dim"])
def _gradients(
    q, k, v, g, h, states, sums, later, later_sums, dq, dk, dv, n, features, v_dim,
    CHUNK: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: all gradients of one chunk of one head."""
    chunks = tl.cdiv(n, CHUNK)
    c = tl.program_id(0) % chunks
    head = (tl.program_id(0) // chunks).to(tl.int64)
    rows = tl.arange(0, CHUNK)
    seen = rows[:, None] >= rows[None, :]
    d = tl.arange(0, BLOCK_D)
    place = head * chunks + c
    v_tile = _tile(v, head, c, d, n, v_dim, CHUNK)
    g_tile = _tile(g, head, c, d, n, v_dim, CHUNK)
    h_tile = _column(h, head, c, n, CHUNK)
    d_pairs = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee") + h_tile[:, None]
    d_pairs = tl.where(seen, d_pairs, 0.0)
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_values = tl.zeros([CHUNK, BLOCK_D], tl.float32)
    for first in tl.range(0, features, BLOCK_F, disable_licm=True):
        f = first + tl.arange(0, BLOCK_F)
        inside = f < features
        q_tile = _tile(q, head, c, f, n, features, CHUNK)
        k_tile = _tile(k, head, c, f, n, features, CHUNK)
        pairs = tl.dot(q_tile, tl.trans(k_tile), pairs, input_precision="ieee")
        # Read again in each step: held through the loop, they would take all registers of a GPU at v_dim 256.
        v_tile = _tile(v, head, c, d, n, v_dim, CHUNK)
        g_tile = _tile(g, head, c, d, n, v_dim, CHUNK)

        state = _state(states, place, f, d, features, v_dim)
        total = tl.load(sums + place * features + f, mask=inside, other=0.0)
        d_q = tl.dot(d_pairs, k_tile, h_tile[:, None] * total[None, :], input_precision="ieee")
        d_q = tl.dot(g_tile, tl.trans(state), d_q, input_precision="ieee")
        _put(dq, d_q, head, c, f, n, features, CHUNK)

        state = _state(later, place, f, d, features, v_dim)
        total = tl.load(later_sums + place * features + f, mask=inside, other=0.0)
        d_k = tl.dot(tl.trans(d_pairs), q_tile, input_precision="ieee") + total[None, :]
        d_k = tl.dot(v_tile, tl.trans(state), d_k, input_precision="ieee")
        _put(dk, d_k, head, c, f, n, features, CHUNK)
        d_values = tl.dot(k_tile, state, d_values, input_precision="ieee")
    pairs = tl.where(seen, pairs, 0.0)
    g_tile = _tile(g, head, c, d, n, v_dim, CHUNK)
    d_values = tl.dot(tl.trans(pairs), g_tile, d_values, input_precision="ieee")
    _put(dv, d_values, head, c, d, n, v_dim, CHUNK)


@triton.jit
def _tile(x, head, c, columns, n, width, CHUNK: tl.constexpr):
    """The rows of a chunk in float32, 0 beyond the last row and column."""
    rows = c * CHUNK + tl.arange(0, CHUNK)
    inside = (rows[:, None] < n) & (columns[None, :] < width)
    base = x + (head * n + c * CHUNK) * width
    offsets = tl.arange(0, CHUNK)[:, None] * width + columns[None, :]
    return tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _column(x, head, c, n, CHUNK: tl.constexpr):
    """One number for each row of a chunk, 0 beyond the last."""
    rows = c * CHUNK + tl.arange(0, CHUNK)
    return tl.load(x + head * n + rows, mask=rows < n, other=0.0)


@triton.jit
def _state(states, place, f, d, features, v_dim):
    """A block of a chunk's state, 0 beyond the last feature and column."""
    inside = (f[:, None] < features) & (d[None, :] < v_dim)
    return tl.load(
        states + place * features * v_dim + f[:, None] * v_dim + d[None, :], mask=inside, other=0.0
    )


@triton.jit
def _put(x, tile, head, c, columns, n, width, CHUNK: tl.constexpr):
    """Write the rows of a chunk, rounded to the dtype of x."""
    rows = c * CHUNK + tl.arange(0, CHUNK)
    inside = (rows[:, None] < n) & (columns[None, :] < width)
    base = x + (head * n + c * CHUNK) * width
    offsets = tl.arange(0, CHUNK)[:, None] * width + columns[None, :]
    tl.store(base + offsets, tile.to(x.dtype.element_ty), mask=inside)
