"""Performer: softmax attention estimated by random features, in time and memory linear in the length.

    out[i] = sum_j phi(q[i]).phi(k[j]) v[j] / sum_j phi(q[i]).phi(k[j])

with phi from `effattn.methods.performer_features`. Summing over j first costs O(N m d) instead of O(N^2 d):
Choromanski et al., arXiv:2009.14794. `performer_attention` is the function, `PerformerAttention` the module.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from effattn.errors import ArgumentError, ArgumentTypeError
from effattn.methods import inputs as checks
from effattn.methods.performer_causal import causal_linear_attention
from effattn.methods.performer_features import (
    check_a,
    check_stabiliser,
    draw_projections,
    feature_map,
    projections_for,
)

ALIGNMENTS = ("bottom-right", "top-left")
#: rows of one block of the causal prefix sum
BLOCK = 128


def performer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    omega: torch.Tensor,
    *,
    features: str = "positive",
    causal: bool = False,
    causal_alignment: str = "bottom-right",
    scale: float | None = None,
    padding_mask: torch.Tensor | None = None,
    stabiliser: float | None = None,
    a: float | None = None,
    block: int = BLOCK,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention by random features; an estimate of softmax(scale q k^T + mask) v.

    Shapes
        q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_dim);
        heads is a multiple of kv_heads. omega (m, head_dim) or (kv_heads, m, head_dim), from `draw_projections`.
        out (batch, heads, q_len, v_dim), in the dtype of q.

    Arguments
        features, a, stabiliser: see `effattn.methods.performer_features`. The stabiliser is off if None.
        causal: query i sees the keys j <= i + kv_len - q_len ("bottom-right") or j <= i ("top-left"). No row depends
            on a later key, not in its last bit.
        padding_mask: (batch, kv_len) bool, True where there is a token; others have no influence, whatever k and v
            hold there, NaN included, and gradients of 0. A row that sees no key has output 0.
        block: rows of a block of the causal prefix sum. It changes rounding and speed, not the meaning.
        compute_dtype: of features, sums and quotient; float32 for inputs of 16 bits if None. `torch.autocast` does not
            change it.

    Cost: O(N m d) time; memory O(N m) without a mask, O(N (d + m d / block)) if causal. The causal backward computes
    features and sums again from the states at the borders of blocks; nothing is subtracted.

    Features may be as large or small as they like (they have exponents). But where the products of a query's features
    and those of all its keys underflow, relative to the largest feature of each, the row is 0 / 0, NaN: at inputs for
    which the estimate means nothing. The normaliser of trigonometric features may come out near 0 or negative, and
    then the row is far off. Neither is hidden: it is the estimator's own error.

    Raises ArgumentError, also for NaN or infinity in q, in omega or at a visible token of k and v, and
    ArgumentTypeError.
    """
    sizes = checks.check_tensors(q, k, v)
    scale = checks.check_scale(scale, sizes.head_dim)
    checks.check_bool("causal", causal)
    checks.check_choice("causal_alignment", causal_alignment, ALIGNMENTS)
    checks.check_count("block", block)
    mask = checks.check_padding(padding_mask, sizes, q.device)
    check_a(a, features)
    check_stabiliser(stabiliser, features)
    _check_omega(omega, sizes)
    k, v = checks.visible_only(q, k, v, mask)

    if sizes.kv_len == 0 or q.numel() == 0:
        return checks.without_keys(sizes, q, k, v, omega)
    dtype = checks.compute_dtype(compute_dtype, q.dtype)
    half = abs(scale) ** 0.5
    # (batch, kv_heads, group, length, head_dim): key heads are not copied for the query heads that share them.
    x = (q.to(dtype) * (half if scale >= 0 else -half)).unflatten(1, (sizes.kv_heads, sizes.group))
    y = (k.to(dtype) * half).unsqueeze(2)
    values = v.to(dtype).unsqueeze(2)
    omega = omega.to(device=q.device, dtype=dtype)
    if omega.dim() == 3:
        omega = omega.unsqueeze(1)
    visible = None if mask is None else mask[:, None, None, :]

    if causal and causal_alignment == "top-left":
        y, values = y[..., : sizes.q_len, :], values[..., : sizes.q_len, :]
        visible = None if visible is None else visible[..., : sizes.q_len]
    with checks.without_autocast(q.device):
        if causal:
            out = causal_linear_attention(
                x, y, values, omega, features=features, a=a, stabiliser=stabiliser, visible=visible, block=block,
                before=causal_alignment == "bottom-right",
            )  # fmt: skip
        else:
            out = _bidirectional(x, y, values, omega, features, a, stabiliser, visible)
    return out.flatten(1, 2).to(q.dtype)


def _bidirectional(
    x: torch.Tensor,
    y: torch.Tensor,
    values: torch.Tensor,
    omega: torch.Tensor,
    features: str,
    a: float | None,
    stabiliser: float | None,
    visible: torch.Tensor | None,
) -> torch.Tensor:
    queries = feature_map(x, omega, features, a=a, stabiliser=stabiliser)
    keys = feature_map(y, omega, features, a=a, stabiliser=stabiliser)
    exponent = keys.exponent
    if visible is not None:
        exponent = exponent.masked_fill(~visible, -torch.inf)
    # A factor for all keys of a head cancels in the quotient. A query's own exponent cancels as well.
    top = exponent.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weighted = keys.mantissa * (exponent - top).exp()[..., None]
    # Another factor that cancels, a power of two: sums over keys times features would overflow fp16.
    shrink = 2.0 ** -math.ceil(math.log2(weighted.shape[-1]))
    state = (weighted.mT @ values) * shrink  # (..., features, v_dim)
    total = weighted.sum(-2)[..., None] * shrink  # (..., features, 1)
    normaliser = queries.mantissa @ total
    if visible is None:
        return (queries.mantissa @ state) / normaliser
    # The sums are 0 where nothing is visible; 0 / 0 would put NaN into the gradients.
    nothing = ~visible.any(-1, keepdim=True)[..., None]
    return (queries.mantissa @ state) / normaliser.masked_fill(nothing, 1.0)


def _check_omega(omega: Any, sizes: checks.Sizes) -> None:
    if not isinstance(omega, torch.Tensor) or not omega.dtype.is_floating_point:
        raise ArgumentTypeError(
            "omega must be a floating tensor of projections, such as draw_projections gives"
        )
    expected = f"(m, {sizes.head_dim}) or ({sizes.kv_heads}, m, {sizes.head_dim})"
    fits = omega.dim() == 2 or (omega.dim() == 3 and omega.shape[0] == sizes.kv_heads)
    if not fits or omega.shape[-1] != sizes.head_dim or omega.shape[-2] == 0:
        raise ArgumentError(f"omega must have the shape {expected}, got {tuple(omega.shape)}")
    checks.check_finite("omega", omega)


class PerformerAttention(torch.nn.Module):
    """`performer_attention` as a module with its own projections: in place of scaled_dot_product_attention.

        attention = PerformerAttention(64, 256, generator=torch.Generator().manual_seed(0))
        out = attention(q, k, v)

    num_features is the length of phi(x): trigonometric and hyperbolic features have two for each projection.
    The projections are a buffer, saved with the state; `redraw` replaces them from a generator. They stay float32 in
    `module.to(torch.bfloat16)`: rounded rows are not orthogonal any more, and nobody trains or multiplies them in 16
    bits. A state of 16 bits holds rounded ones: they are loaded as float32, with `assign=True` too, and `redraw` makes
    new ones. Other arguments as for `performer_attention` and `draw_projections`, which say what is raised; all are
    checked here, not at the first call.
    """

    omega: torch.Tensor

    def __init__(
        self,
        head_dim: int,
        num_features: int = 256,
        *,
        generator: torch.Generator,
        features: str = "positive",
        projections: str = "orthogonal",
        partial: bool = False,
        kv_heads: int | None = None,
        causal: bool = False,
        scale: float | None = None,
        stabiliser: float | None = None,
        a: float | None = None,
        block: int = BLOCK,
    ) -> None:
        super().__init__()
        count = projections_for(num_features, features)
        checks.check_count("head_dim", head_dim)
        checks.check_bool("causal", causal)
        checks.check_scale(scale, head_dim)
        checks.check_count("block", block)
        check_a(a, features)
        check_stabiliser(stabiliser, features)
        self._draw: dict[str, Any] = {
            "count": count,
            "head_dim": head_dim,
            "kind": projections,
            "partial": partial,
            # One set for all heads, or one for each kv head.
            "shape": () if kv_heads is None else (checks.check_count("kv_heads", kv_heads),),
        }
        self._options: dict[str, Any] = {
            "features": features, "causal": causal, "scale": scale, "stabiliser": stabiliser, "a": a, "block": block,
        }  # fmt: skip
        self.register_buffer("omega", draw_projections(generator=generator, **self._draw))

    def redraw(self, generator: torch.Generator) -> None:
        """New projections, from the generator and nothing else."""
        self.omega.copy_(draw_projections(generator=generator, **self._draw))

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        dtype = self.omega.dtype
        super()._load_from_state_dict(*args, **options)
        # assign=True puts the state's tensor in the buffer's place, whatever its dtype.
        self.omega = self.omega.to(dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # What `to`, `half`, `cuda` and their like call. A change of device is followed, one of dtype is not.
        exact = self.omega
        super()._apply(fn, recurse)
        if self.omega.dtype != exact.dtype:
            self.omega = exact.to(self.omega.device)
        return self

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """out (batch, heads, q_len, v_dim); shapes as for `performer_attention`."""
        return performer_attention(q, k, v, self.omega, padding_mask=padding_mask, **self._options)
