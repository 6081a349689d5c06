"""Linformer: attention over k projected keys and values, in time and memory linear in the length.

    out = softmax(scale q (E K)^T) (F V)

Wang et al., arXiv:2006.04768. `linformer_attention` is the function, `LinformerAttention` the module; projections
come from `effattn.methods.linformer_projections`.
"""

from __future__ import annotations

import torch

from effattn.errors import ArgumentError, ArgumentTypeError, NotSupported
from effattn.methods import inputs as checks
from effattn.methods.linformer_projections import Projection, convolution, gaussian, mean_pooling

#: who shares a projection: nobody; the heads of a layer; its keys and values too; all layers
SHARING = ("none", "headwise", "key-value", "layerwise")
#: what a module can start from
KINDS = ("gaussian", "mean-pooling", "convolution")


def linformer_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    e: Projection,
    f: Projection | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    padding_mask: torch.Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Attention over projected keys E K and values F V.

    Shapes
        q (batch, heads, q_len, head_dim), k (batch, kv_heads, kv_len, head_dim), v (batch, kv_heads, kv_len, v_dim);
        heads is a multiple of kv_heads. e and f project n >= kv_len tokens to as many slots as each other; f is e
        if None. out (batch, heads, q_len, v_dim), in the dtype of q.

    Absent tokens
        Those that padding_mask (batch, kv_len; True where there is a token) hides, and those from kv_len to n. They
        have no influence, whatever k and v hold there, NaN included, and gradients of 0. A slot that no token goes to
        isn't attended to. Rows of a projection that pools are divided by the share of the pooling's weight that is
        present, so that averages stay averages: by k/n at least for windows of n/k tokens, whatever training has made
        of the weights. Without a token, out is 0.

    compute_dtype is that of projected keys and values, scores and weights; float32 for inputs of 16 bits if None.
    `torch.autocast` does not change it.

    Cost: O(N k d) time, O(N k) memory for the weights.

    Raises
        NotSupported for `causal`: each slot mixes keys of all positions, so that a mask over slots would let later
        tokens in. ArgumentError for what doesn't fit, and for NaN or infinity in q, in a projection or at a visible
        token of k and v. ArgumentTypeError.
    """
    if checks.check_bool("causal", causal):
        raise NotSupported(
            "Linformer can't be causal: each of its slots is a sum over keys of all positions, so a mask over slots"
            " would still let later tokens into earlier rows; use Performer, or exact attention"
        )
    sizes = checks.check_tensors(q, k, v)
    scale = checks.check_scale(scale, sizes.head_dim)
    mask = checks.check_padding(padding_mask, sizes, q.device)
    f = e if f is None else f
    _check_projections(e, f, sizes)
    k, v = checks.visible_only(q, k, v, mask)
    if sizes.kv_len == 0 or q.numel() == 0:
        return checks.without_keys(sizes, q, k, v, *{id(x): x.matrix for x in (e, f)}.values())
    with checks.without_autocast(q.device):
        return _attention(q, k, v, e, f, sizes, scale, mask, checks.compute_dtype(compute_dtype, q.dtype))


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    e: Projection,
    f: Projection,
    sizes: checks.Sizes,
    scale: float,
    mask: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    e_matrix, e_there = _present(e, sizes.kv_len, mask, q.device, dtype)
    # (batch, kv_heads, 1, k, d): slots aren't copied for the query heads that share them.
    keys = (e_matrix @ k.to(dtype)).unsqueeze(2)
    if f is e:
        f_matrix, there = e_matrix, e_there
    else:
        f_matrix, f_there = _present(f, sizes.kv_len, mask, q.device, dtype)
        there = e_there & f_there
    values = (f_matrix @ v.to(dtype)).unsqueeze(2)
    queries = (q.to(dtype) * scale).unflatten(1, (sizes.kv_heads, sizes.group))
    scores = queries @ keys.mT
    there = there[:, :, None, None, :]
    none = ~there.any(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(~(there | none), -torch.inf), -1)
    return (weights @ values).masked_fill(none, 0.0).flatten(1, 2).to(q.dtype)


def _present(
    projection: Projection,
    kv_len: int,
    mask: torch.Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrix for the tokens that are there, (batch or 1, heads or 1, k, kv_len), and the slots that get any."""
    full = projection.matrix.to(device=device, dtype=dtype)
    matrix = full[..., :kv_len]
    matrix = matrix[None, None] if matrix.dim() == 2 else matrix[None]
    if mask is not None:
        matrix = matrix.masked_fill(~mask[:, None, None, :], 0.0)
    there = (matrix.detach() != 0).any(-1)
    if projection.pooling is not None and (mask is not None or kv_len < full.shape[-1]):
        pooling = projection.pooling.detach().to(device=device, dtype=dtype)
        present = pooling[None, None, :, :kv_len]
        if mask is not None:
            present = present.masked_fill(~mask[:, None, None, :], 0.0)
        share = present.sum(-1) / pooling.sum(-1)
        there = there & (share > 0)
        matrix = (matrix / share.masked_fill(~there, 1.0)[..., None]).masked_fill(~there[..., None], 0.0)
    return matrix, there


def _check_projections(e: Projection, f: Projection, sizes: checks.Sizes) -> None:
    for name, projection in (("e", e), ("f", f)):
        if not isinstance(projection, Projection) or not isinstance(projection.matrix, torch.Tensor):
            raise ArgumentTypeError(f"{name} must be a Projection of effattn.methods.linformer_projections")
        matrix = projection.matrix
        fits = matrix.dim() == 2 or (matrix.dim() == 3 and matrix.shape[0] == sizes.kv_heads)
        if not fits or matrix.shape[-2] == 0:
            raise ArgumentError(
                f"{name} must have the shape (k, n) or ({sizes.kv_heads}, k, n), k at least 1, got"
                f" {tuple(matrix.shape)}"
            )
        if matrix.shape[-1] < sizes.kv_len:
            raise ArgumentError(
                f"{name} projects {matrix.shape[-1]} tokens, but there are {sizes.kv_len} keys; Linformer has a"
                " longest length. Cut the input or make a longer projection"
            )
        # What is beyond the keys isn't used, and may hold anything.
        checks.check_finite(name, matrix[..., : sizes.kv_len])
        pooling = projection.pooling
        if pooling is None:
            continue
        if pooling.shape != matrix.shape[-2:] or not bool(
            (pooling >= 0).all() and (pooling.sum(-1) > 0).all()
        ):
            raise ArgumentError(
                f"the pooling of {name} must have the shape (k, n) = {tuple(matrix.shape[-2:])}, no negative entries and"
                f" no empty row, got {tuple(pooling.shape)}"
            )
    if e.matrix.shape[-2] != f.matrix.shape[-2]:
        raise ArgumentError(
            f"e and f must have as many slots as each other, got {e.matrix.shape[-2]} and {f.matrix.shape[-2]}"
        )


class LinformerProjections(torch.nn.Module):
    """E and F as parameters. Hand one instance to all layers for `sharing="layerwise"`.

    kind "gaussian" starts from N(0, 1/k) and "mean-pooling" from averages, both trained as full matrices;
    "convolution" trains one kernel of n/k weights for E and one for F, starting from averages. What starts from
    averages keeps their windows: where tokens are absent, the rest of a slot's window makes up for them. kv_heads is
    needed for sharing "none", where each head has its own. Raises ArgumentError, ArgumentTypeError.
    """

    def __init__(
        self,
        n: int,
        k: int,
        *,
        kind: str = "gaussian",
        sharing: str = "layerwise",
        kv_heads: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        checks.check_choice("kind", kind, KINDS)
        checks.check_choice("sharing", sharing, SHARING)
        checks.check_count("n", n)
        checks.check_count(
            "k", k, most=n, why=f", the number of tokens n = {n}: more slots than tokens save nothing"
        )
        if kv_heads is not None:
            checks.check_count("kv_heads", kv_heads)
        if generator is not None:
            checks.check_generator(generator)
        if (kv_heads is None) == (sharing == "none"):
            raise ArgumentError(
                f"kv_heads goes with sharing='none' and only with it, got {kv_heads} and {sharing!r}"
            )
        if kind == "gaussian" and generator is None:
            raise ArgumentError(
                "a gaussian projection is drawn from a generator: torch.Generator().manual_seed(0)"
            )
        self.n, self.k, self.kind, self.sharing = n, k, kind, sharing

        def start() -> torch.nn.Parameter:
            if kind == "gaussian":
                assert generator is not None
                return torch.nn.Parameter(gaussian(k, n, generator=generator, heads=kv_heads).matrix)
            if kind == "convolution":
                checks.check_count(
                    "kv_heads", kv_heads or 1, most=1, why=" for a convolution, whose kernel is shared"
                )
                kernel = torch.full((n // k,), k / n)
                convolution(k, n, kernel)  # the checks
                return torch.nn.Parameter(kernel)
            matrix = mean_pooling(k, n).matrix
            return torch.nn.Parameter(matrix.expand(kv_heads, -1, -1).clone() if kv_heads else matrix)

        self.pooling: torch.Tensor | None
        # Not part of the state: n and k say it.
        self.register_buffer(
            "pooling", None if kind == "gaussian" else mean_pooling(k, n).matrix, persistent=False
        )
        self.e = start()
        self.f = self.e if sharing in ("key-value", "layerwise") else start()

    def forward(self) -> tuple[Projection, Projection]:
        """E and F as they are now."""
        e = self._projection(self.e)
        return e, e if self.f is self.e else self._projection(self.f)

    def _projection(self, parameter: torch.Tensor) -> Projection:
        matrix = convolution(self.k, self.n, parameter).matrix if self.kind == "convolution" else parameter
        return Projection(matrix, pooling=self.pooling)


class LinformerAttention(torch.nn.Module):
    """`linformer_attention` as a module with trainable projections: in place of scaled_dot_product_attention.

        attention = LinformerAttention(LinformerProjections(512, 128, kind="mean-pooling"))
        out = attention(q, k, v, padding_mask=mask)

    The projections' parameters train with the rest. Inputs may be shorter than n, not longer. Raises ArgumentError,
    ArgumentTypeError.
    """

    def __init__(self, projections: LinformerProjections, *, scale: float | None = None) -> None:
        super().__init__()
        if not isinstance(projections, LinformerProjections):
            raise ArgumentTypeError(
                f"projections must be a LinformerProjections, got {type(projections).__name__}; make one:"
                ' LinformerProjections(512, 128, kind="mean-pooling")'
            )
        checks.check_scale(scale, 1)
        self.projections = projections
        self.scale = scale

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, padding_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """out (batch, heads, q_len, v_dim); shapes as for `linformer_attention`."""
        e, f = self.projections()
        return linformer_attention(q, k, v, e, f, scale=self.scale, padding_mask=padding_mask)
