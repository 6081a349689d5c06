"""Laws of kernels for causal linear attention: features are given, so what is left is rounding, and that has a bound.

The reference is the quadratic evaluation of the same features in float64 (`effattn.exact.linear`), the bound that of
`effattn.tolerances.linear`, for sums in float32 in any order.
"""

from __future__ import annotations

import torch

from effattn.errors import NotSupported
from effattn.exact.linear import Linear
from effattn.exact.linear import linear_attention as quadratic
from effattn.methods.base import triton_on
from effattn.properties.approximation import Broken, Trial, law
from effattn.tolerances.linear import linear_bounds

#: (n, features, v_dim)
SHAPES = ((1, 16, 16), (63, 16, 5), (64, 64, 64), (130, 80, 33), (257, 32, 64), (70, 256, 128), (1100, 16, 8))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: how often a term may be rounded to 16 bits where 'rounded weights' is claimed: the weight, the state, what it comes from
STORED = 3


def _inputs(trial: Trial, number: int, shape: tuple[int, int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Positive features as those of softmax kernels are, spread over e^-3 to e^3; values, an upstream gradient."""
    n, features, v_dim = shape
    g = trial.generator(300 + number)
    q, k = ((0.8 * torch.randn(2, 2, n, features, generator=g, dtype=torch.float64)).exp() for _ in range(2))
    v, d_out = (torch.randn(2, 2, n, v_dim, generator=g, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype) for x in (q / features**0.5, k / features**0.5, v, d_out)]


def _run(trial: Trial, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with triton_on(q.device), trial.untouched("prefix_sums", phi_q=q, phi_k=k, v=v):
        out = trial.call(trial.subject.functions["prefix_sums"], q, k, v)
    if not isinstance(out, torch.Tensor) or out.shape != v.shape or out.dtype != v.dtype:
        form = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, torch.Tensor) else type(out).__name__
        raise Broken(f"prefix_sums returned {form}; expected a tensor like v, {tuple(v.shape)} {v.dtype}")
    return out


def _within(trial: Trial, *, gradients: bool) -> None:
    roundings = STORED if "rounded weights" in trial.subject.claims else 0
    tried = 0
    for name, dtype in DTYPES.items():
        for number, shape in enumerate(SHAPES):
            q, k, v, d_out = _inputs(trial, number, shape, dtype)
            leaves = [x.clone().requires_grad_(gradients) for x in (q, k, v)]
            try:
                out = _run(trial, *leaves)
            except (NotSupported, NotImplementedError):
                break  # of this dtype; the others may be there
            exact = quadratic(q, k, v, d_out)
            bounds = linear_bounds(q, k, v, d_out, chunk=shape[0], roundings=roundings)
            if gradients:
                if not out.requires_grad:
                    raise NotSupported("`prefix_sums` has no gradient")
                with triton_on(q.device):
                    grads = trial.call(torch.autograd.grad, out, leaves, d_out)
                got = Linear(out.detach(), *grads)
            else:
                got = Linear(out.detach(), *exact[1:])
            tried += 1
            _compare(got, exact, bounds, f"n = {shape[0]}, {shape[1]} features, v_dim {shape[2]}, {name}")
    if not tried:
        raise NotSupported("`prefix_sums` takes none of fp32, bf16, fp16")


def _compare(got: Linear, exact: Linear, bounds: Linear | tuple[torch.Tensor, ...], where: str) -> None:
    for what, a, b, allowed in zip(Linear._fields, got, exact, bounds, strict=True):
        share = ((a.double() - b).abs() / allowed).nan_to_num(nan=torch.inf)
        if float(share.max()) > 1:
            index = tuple(int(i) for i in torch.unravel_index(share.argmax(), share.shape))
            raise Broken(
                f"{what}[{', '.join(map(str, index))}] is {float(a[index])!r}; exact is {float(b[index])!r}: the error is"
                f" {float(share[index]):.3g} times what is allowed, {float(allowed[index]):.3g}; {where}. If weights or"
                " states are stored in 16 bits, claim 'rounded weights'"
            )


@law("prefix_sums")
def causal_sums_are_those_of_all_pairs_within_the_bound(trial: Trial) -> None:
    """out[i] = sum_{j<=i} (q[i].k[j]) v[j] / sum_{j<=i} q[i].k[j] within the bound of float32 sums in any order, element
    by element, in every dtype that is taken."""
    _within(trial, gradients=False)


@law("prefix_sums")
def gradients_of_causal_sums_are_within_the_bound(trial: Trial) -> None:
    """dq, dk and dv likewise. A backward that subtracts from final sums instead of computing them again cancels."""
    _within(trial, gradients=True)


@law("prefix_sums")
def later_features_never_change_a_sum(trial: Trial) -> None:
    """A row has the same bits whatever later features and values are."""
    q, k, v, _ = _inputs(trial, 9, (150, 64, 32), torch.float32)
    later = [x.clone() for x in (q, k, v)]
    for x in later:
        x[:, :, 77:] = x[:, :, 77:] * 3 + 1
    before, after = (_run(trial, *x).detach()[:, :, :77] for x in ((q, k, v), later))
    if not torch.equal(before, after):
        off = float((before - after).abs().max())
        raise Broken(f"rows before 77 changed by up to {off:.3g} when later features and values did")


@law("prefix_sums")
def a_factor_of_the_features_changes_nothing(trial: Trial) -> None:
    """It cancels: with all features times 2^-20 the output is the same but for rounding. An epsilon in the denominator, or a
    least value of it, shows."""
    q, k, v, d_out = _inputs(trial, 11, (130, 64, 32), torch.float32)
    exact, bounds = quadratic(q, k, v, d_out), linear_bounds(q, k, v, d_out, chunk=130)
    for factor in (2.0**-20, 2.0**20):
        out = _run(trial, q * factor, k * factor, v).detach()
        _compare(Linear(out, *exact[1:]), exact, bounds, f"all features times {factor:g}, fp32")


@law("prefix_sums")
def early_sums_survive_large_late_keys(trial: Trial) -> None:
    """Keys that grow by 10^4 along 700 rows: output and gradients of early rows are still within their bounds. Sums that
    are taken as the difference of larger ones are not."""
    shape = (700, 16, 8)
    q, k, v, d_out = _inputs(trial, 10, shape, torch.float32)
    k = k * torch.logspace(0, 4, shape[0])[:, None]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = _run(trial, *leaves)
    exact, bounds = quadratic(q, k, v, d_out), linear_bounds(q, k, v, d_out, chunk=shape[0])
    grads = exact[1:]
    if out.requires_grad:
        with triton_on(q.device):
            grads = trial.call(torch.autograd.grad, out, leaves, d_out)
    _compare(Linear(out.detach(), *grads), exact, bounds, f"n = {shape[0]}, keys growing by 10^4, fp32")
