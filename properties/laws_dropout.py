"""Laws about dropout: how many weights are kept, which, and that the same seed keeps the same ones.

The number of weights kept of n is binomial; an alarm has a probability of at most 1e-12 (Hoeffding's inequality).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from effattn.properties.law import SetAside, Trial, law
from effattn.properties.law_draws import FEW, cases

if TYPE_CHECKING:
    import torch

    from effattn.case import Case

#: log(2 / 1e-12)
_SURE = math.log(2.0e12)

_draws = cases(
    options=(),
    lengths=(64, 65, 97, 128),
    layouts=("bhsd",),
    dims=((40, 40), (32, 32), (64, 64)),
    change=lambda draw, fields: (
        {
            "dropout": draw.pick((0.1, 0.25, 0.5, 0.9)),
            "batch": 2,
            "heads": 2,
            "kv_heads": draw.pick((1, 2)),
        }
        # An identity V has as many columns as there are keys: in the first cases as many as other laws have, padded.
        | ({"batch": 3, "kv_len": draw.pick((61, 62, 63))} if fields["seed"] < FEW else {})
    ),
)


def _holds(case: Case) -> bool:
    return case.dropout > 0.0 and case.q_len * case.kv_len * case.heads * case.batch >= 1024


def _kept(it: Trial, case: Case) -> torch.Tensor:
    """Which weights the method keeps, seen through V = identity: (batch, heads, q_len, kv_len) bool."""
    import torch

    if case.kv_len > 128:
        raise SetAside("more keys than an identity V is made for")
    inputs = case.tensors(it.device)
    eye = torch.eye(case.kv_len, dtype=case.torch_dtype, device=inputs.v.device)
    given = type(inputs)(
        inputs.q * 0.0,
        inputs.k,
        eye.expand(case.batch, case.kv_heads, -1, -1).contiguous(),
        extras=inputs.extras,
    )
    return it(given, replace(case, v_dim=case.kv_len)).out != 0.0


@law("dropout", draw=_draws, holds=_holds)
def dropout_keeps_the_share_that_it_says(it: Trial) -> None:
    """Of n weights a share of 1 - p is kept, give or take what chance makes of n draws."""
    kept = _kept(it, it.case)
    n, share = kept.numel(), float(kept.double().mean())
    want, most = 1.0 - it.case.dropout, math.sqrt(_SURE / (2.0 * kept.numel()))
    it.true(
        abs(share - want) <= most,
        f"{share:.4f} of {n} weights were kept; expected {want:.4f} within {most:.4f}, dropout being {it.case.dropout}",
    )


@law("dropout", draw=_draws, holds=_holds, bits=True)
def the_same_seed_drops_the_same_weights(it: Trial) -> None:
    """The mask depends on the seed and the place of the weight alone, not on Q, K or V, nor on earlier calls."""
    one, other = _kept(it, it.case), _kept(it, it.case)
    it.same("kept", other, one, "the same seed was given twice")


@law("dropout", draw=_draws, holds=_holds)
def another_seed_drops_other_weights(it: Trial) -> None:
    """Masks of two seeds agree as often as independent ones: p^2 + (1-p)^2."""
    p = it.case.dropout
    one, other = _kept(it, it.case), _kept(it, replace(it.case, seed=it.case.seed + 1))
    agree = float((one == other).double().mean())
    want, most = p * p + (1.0 - p) * (1.0 - p), math.sqrt(_SURE / (2.0 * one.numel()))
    it.true(
        abs(agree - want) <= most,
        f"masks of two seeds agree at {agree:.4f} of the places; expected {want:.4f} within {most:.4f}",
    )


@law("dropout", draw=_draws, holds=_holds)
def weights_are_dropped_independently(it: Trial) -> None:
    """Neighbours in a row, rows, heads and entries of the batch agree as often as independent draws do."""
    p = it.case.dropout
    kept = _kept(it, it.case)
    want = p * p + (1.0 - p) * (1.0 - p)
    for axis, what in enumerate(("entries of the batch", "heads", "rows", "neighbours in a row")):
        n = kept.shape[axis]
        if n < 2:
            continue
        # Pairs that share no element, so that they are independent.
        a, b = (
            kept.narrow(axis, 0, n // 2 * 2).unflatten(axis, (n // 2, 2)).select(axis + 1, i) for i in (0, 1)
        )
        agree, most = float((a == b).double().mean()), math.sqrt(_SURE / (2.0 * a.numel()))
        it.true(
            abs(agree - want) <= most,
            f"{what} agree at {agree:.4f} of the places; expected {want:.4f} within {most:.4f}: the mask repeats",
        )


@law("dropout", draw=_draws, holds=_holds)
def kept_weights_are_scaled_up(it: Trial) -> None:
    """What is kept is divided by 1 - p: with equal scores every kept weight is 1 / (kv_len (1 - p))."""
    import torch

    case = it.case
    inputs = case.tensors(it.device)
    eye = torch.eye(case.kv_len, dtype=case.torch_dtype, device=inputs.v.device)
    if case.kv_len > 128:
        raise SetAside("more keys than an identity V is made for")
    wide = replace(case, v_dim=case.kv_len)
    given = type(inputs)(
        inputs.q * 0.0,
        inputs.k,
        eye.expand(case.batch, case.kv_heads, -1, -1).contiguous(),
        extras=inputs.extras,
    )
    out = it(given, wide).out.double()
    weight = 1.0 / (case.kv_len * (1.0 - case.dropout))
    allowed = torch.full_like(out, 4.0 * weight * torch.finfo(case.torch_dtype).eps)
    it.close(
        "weights", out, torch.where(out != 0.0, weight, 0.0), allowed, "a kept weight is 1 / (kv_len (1 - p))"
    )


@law(
    "dropout",
    draw=cases(
        options=("causal",),
        lengths=(17, 33, 64, 65),
        layouts=("bhsd",),
        dims=((40, 40), (32, 32), (64, 64)),
        change=lambda draw, fields: {"dropout": draw.pick((0.1, 0.5))},
        backward=True,
    ),
    holds=lambda case: case.dropout > 0.0 and case.backward and case.kv_len > 1 and case.q_len > 0,
    gradients=True,
)
def backward_drops_the_weights_that_forward_dropped(it: Trial) -> None:
    """The output is linear in V, so <dO, O> = <dV, V> per KV head: only with one mask in both passes."""
    from effattn.properties.laws_gradients import dv_and_the_output_agree

    dv_and_the_output_agree(it)
