"""Laws of random projections, of feature maps and of projections of tokens.

Closed forms: `effattn.study.theory`, from arXiv:2009.14794 (lemma 2, theorem 2).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from effattn.errors import NotSupported
from effattn.properties.approximation import HEAD_DIM, LIMIT, Broken, Sample, Trial, law, sample, score
from effattn.study import theory


def _tensors(omega: Any) -> list[torch.Tensor]:
    """The tensors of whatever `draw` gives."""
    if isinstance(omega, torch.Tensor):
        return [omega]
    if isinstance(omega, dict):
        omega = list(omega.values())
    if isinstance(omega, (tuple, list)):
        return [tensor for part in omega for tensor in _tensors(part)]
    return []


def _same(one: Any, two: Any) -> bool:
    pairs = list(zip(_tensors(one), _tensors(two), strict=False))
    return bool(pairs) and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _from_the_generator_alone(draw: Any, trial: Trial, what: str, *, random: bool) -> None:
    state = torch.get_rng_state()
    try:
        torch.manual_seed(1)
        generator = trial.generator()
        one, next_one = draw(generator), draw(generator)
        torch.manual_seed(2)
        two = draw(trial.generator())
    finally:
        torch.set_rng_state(state)
    if not _tensors(one):
        raise NotSupported(f"{what} gives no tensors to compare")
    if not _same(one, two):
        raise Broken(
            f"{what} gave other numbers from the same generator after torch.manual_seed: it draws from the global state."
            " Hand `generator` to torch.randn"
        )
    if random and _same(one, next_one):
        raise Broken(
            f"{what} gave the same numbers twice from one generator, which had moved on: it is not what is drawn from"
        )


@law("draw")
def projections_come_from_the_generator_alone(trial: Trial) -> None:
    """The same state of the generator gives the same projections whatever the global state is, and a generator that
    moved on gives others: so that a result can be repeated, and a redraw is one."""
    _from_the_generator_alone(
        lambda g: trial.draw(HEAD_DIM, HEAD_DIM, g),
        trial,
        f"draw({HEAD_DIM}, {HEAD_DIM}, generator)",
        random=True,
    )


@law("draw")
def projections_lean_to_no_side(trial: Trial) -> None:
    """Every row by itself has the mean 0 and E (w . e)^2 = 1 along any direction e. Q of a QR decomposition without the
    signs that make the diagonal of R positive leans to one side (F. Mezzadri, math-ph/0609050)."""
    projections = trial.sample.projections
    if projections is None:
        raise NotSupported("`draw` gives no tensor (rows, head_dim) of one shape")
    d = projections.shape[-1]
    along = {
        "+1": torch.ones(d, dtype=torch.float64) / math.sqrt(d),
        "the first axis": torch.eye(d, dtype=torch.float64)[0],
        "the last axis": torch.eye(d, dtype=torch.float64)[-1],
    }
    for word, e in along.items():
        # The rows of one draw depend on each other: their mean is one number of the sample.
        products = projections @ e
        first, mean, square = products[:, 0], products.mean(-1), products.square().mean(-1)
        for what, values, expected in (
            ("the first row's product", first, 0.0), ("the mean product of rows", mean, 0.0),
            ("the mean square product of rows", square, 1.0),
        ):  # fmt: skip
            off = float(score(values, expected))
            if abs(off) > LIMIT:
                raise Broken(
                    f"{what} with {word} is {float(values.mean()):.4g} over {values.numel()} draws; expected"
                    f" {expected:g}: {abs(off):.1f} standard errors off"
                )


@law("draw", claims=["orthogonal"])
def rows_of_a_block_are_orthogonal(trial: Trial) -> None:
    """Rows 0 to head_dim - 1, the next head_dim and so on are orthogonal to each other. Givens rotations whose rows are
    picked with replacement are not."""
    omega = trial.draw(2 * HEAD_DIM, HEAD_DIM, trial.generator(2))
    if not isinstance(omega, torch.Tensor) or omega.dim() != 2:
        raise NotSupported("`draw` gives no tensor (rows, head_dim)")
    for start in range(0, omega.shape[0], omega.shape[1]):
        rows = omega[start : start + omega.shape[1]].detach().double()
        rows = rows / rows.norm(dim=-1, keepdim=True)
        cosines = (rows @ rows.mT - torch.eye(len(rows), dtype=torch.float64)).abs()
        if float(cosines.max()) > 1e-5:
            i, j = divmod(int(cosines.argmax()), len(rows))
            raise Broken(
                f"rows {start + i} and {start + j} of a draw have a cosine of {float(cosines.max()):.4g}; expected 0"
            )


@law("features", unless=["biased"])
def estimates_are_unbiased_in_every_direction(trial: Trial) -> None:
    """The mean of phi(x) . phi(y) over projections is exp(x . y), along +1 and -1 and the axes too: what leans to one side
    averages out over random directions. A factor for all features of a token is part of them: return it as `exponent`."""
    _unbiased(trial.sample, near=True)


@law("features", unless=["biased"])
def estimates_are_unbiased_for_long_opposite_vectors(trial: Trial) -> None:
    """For y = -x positive features have no variance at all: phi(x) . phi(-x) = exp(-|x|^2). A stabiliser that is added to
    the features, 1e-4 in much code, is larger than most of them there."""
    _unbiased(trial.sample, near=False)


def _unbiased(drawn: Sample, *, near: bool) -> None:
    scores = score(drawn.ratios, 1.0, rounding=1e-3)
    for i, word in enumerate(drawn.words):
        if word.startswith("|x + y|") is not near:
            continue
        mean = float(drawn.ratios[:, i].mean())
        if not abs(float(scores[i])) <= LIMIT:  # NaN is no pass
            raise Broken(
                f"the mean of phi(x).phi(y) / exp(x.y) over {len(drawn.ratios)} draws is {mean:.4g} at {word}; expected 1:"
                f" {abs(float(scores[i])):.1f} standard errors off"
            )


@law("features", unless=["biased"])
def the_mean_square_error_is_that_of_theory(trial: Trial) -> None:
    """E (phi(x) . phi(y) - exp(x . y))^2 is the closed form of the claimed map with iid projections, up to
    |x + y|^2 = 1; with orthogonal ones of positive features it is below."""
    kinds = [kind for kind in ("positive", "hyperbolic", "trigonometric") if kind in trial.subject.claims]
    if not kinds:
        raise NotSupported("none of 'positive', 'hyperbolic', 'trigonometric' is claimed")
    if "orthogonal" in trial.subject.claims and kinds != ["positive"]:
        raise NotSupported(f"there is no closed form for {kinds[0]} features with orthogonal projections")
    drawn = trial.sample
    m = trial.features(drawn.x, trial.draw(HEAD_DIM, HEAD_DIM, trial.generator(3)), query=True)[0].shape[-1]
    # Paired maps have two features for each projection, which is what the closed forms count.
    m = m // 2 if kinds[0] in ("hyperbolic", "trigonometric") else m
    sm = (drawn.x * drawn.y).sum(-1).exp()
    for i, word in enumerate(drawn.words):
        if not word.startswith("|x + y|"):
            continue
        expected = float(theory.mean_square_error(kinds[0], drawn.x[i].numpy(), drawn.y[i].numpy(), m))
        squares = ((drawn.ratios[:, i] - 1) * sm[i]).square()
        off = float(score(squares, expected, rounding=1e-3))
        one_sided = "orthogonal" in trial.subject.claims
        if not (off if one_sided else abs(off)) <= LIMIT:
            raise Broken(
                f"the mean square error is {float(squares.mean()):.4g} at {word}, m = {m}; expected"
                f" {'at most ' if one_sided else ''}{expected:.4g}, that of {kinds[0]} features with iid projections:"
                f" {abs(off):.1f} standard errors off"
            )


@law("features", claims=["orthogonal", "positive"], unless=["biased"])
def orthogonal_projections_err_less_than_iid_by_the_theorems_margin(trial: Trial) -> None:
    """With m = head_dim orthogonal rows the estimate is unbiased and the mean square error is below that of iid rows by at least
    2 (m-1) / (m (d+2)) (exp(x.y) - exp(-(|x|^2+|y|^2)/2))^2: theorem 2 of arXiv:2009.14794."""
    drawn = sample(trial, 20_000, far=False)
    # So many draws also show the bias of projections that all have the length sqrt(d).
    _unbiased(drawn, near=True)
    for i in (5, 9):  # |x + y|^2 = 1, along +1 and slanted
        x, y = drawn.x[i].numpy(), drawn.y[i].numpy()
        iid = float(theory.mean_square_error("positive", x, y, HEAD_DIM))
        margin = float(theory.orthogonal_margin(x, y, HEAD_DIM))
        squares = ((drawn.ratios[:, i] - 1) * float((drawn.x[i] @ drawn.y[i]).exp())).square()
        off = float(score(squares, iid - margin, rounding=1e-3))
        if not off <= LIMIT:
            raise Broken(
                f"the mean square error is {float(squares.mean()):.4g} at {drawn.words[i]}; expected at most"
                f" {iid - margin:.4g}, {margin:.2g} below that of iid rows: {off:.1f} standard errors above"
            )


@law("features")
def features_of_a_token_do_not_depend_on_others(trial: Trial) -> None:
    """phi of a token is the same whatever stands beside it. A maximum over all keys that is subtracted cancels without a
    mask, but lets the future into the past where it is causal, and together with a stabiliser everywhere."""
    # Long ones, whose features are small beside those of short ones.
    x = 2 * torch.randn(12, HEAD_DIM, generator=trial.generator(4), dtype=torch.float64)
    omega = trial.draw(HEAD_DIM, HEAD_DIM, trial.generator(5))
    for query, factor in itertools.product((True, False), (2.0, 0.05)):
        other = torch.cat([x[:6], factor * x[6:]])
        (one, e1), (two, e2) = (trial.features(t, omega, query=query) for t in (x, other))
        # Mantissa and exponent may be split in another way.
        difference = (one * (e1 - e2).exp()[:, None] - two)[:6].abs().amax(-1) / two[:6].abs().amax(-1)
        if not float(difference.max()) <= 1e-4:
            raise Broken(
                f"features of a {'query' if query else 'key'} changed by up to {float(difference.max()):.3g} of the largest"
                f" when six other tokens became {factor:g} times as long"
            )


# -- projections of tokens ---------------------------------------------------------------------------------

_N = 24
_SLOTS = 8


@law("slots")
def a_projection_of_tokens_comes_from_the_generator_alone(trial: Trial) -> None:
    """As for random projections; one that draws nothing is the same every time."""
    _from_the_generator_alone(
        lambda g: trial.slots(_SLOTS, _N, g), trial, f"slots({_SLOTS}, {_N}, generator)",
        random="gaussian" in trial.subject.claims,
    )  # fmt: skip


@law("slots", claims=["gaussian"])
def products_through_a_projection_are_unbiased_with_the_variance_of_theory(trial: Trial) -> None:
    """x E^T E y has the mean x . y and the variance (|x|^2 |y|^2 + (x . y)^2) / size, for every size. A standard
    deviation of 1 / size, or the first rows of a larger projection, does not."""
    x = torch.linspace(-1, 1, _N, dtype=torch.float64)
    y = torch.cos(3 * x)
    generator = trial.generator(6)
    for size in (_SLOTS, _SLOTS // 2):
        products = []
        for _ in range(4000):
            e = trial.slots(size, _N, generator)
            products.append(((e @ x) * (e @ y)).sum())
        got = torch.stack(products)
        variance = float(theory.projected_product_variance(x.numpy(), y.numpy(), size))
        for what, values, expected in (
            ("mean", got, float(x @ y)),
            ("mean square deviation", (got - x @ y).square(), variance),
        ):
            off = float(score(values, expected, rounding=1e-4))
            if not abs(off) <= LIMIT:
                raise Broken(
                    f"the {what} of x E^T E y with size = {size}, n = {_N} is {float(values.mean()):.4g} over"
                    f" {len(values)} draws; expected {expected:.4g}: {abs(off):.1f} standard errors off"
                )


@law("slots", claims=["averages"])
def slots_are_averages_for_every_length(trial: Trial) -> None:
    """No entry is negative, and rows sum to one, also where size does not divide n."""
    for size, n in ((_SLOTS, _N), (7, _N), (1, 5), (5, 5)):
        e = trial.slots(size, n, trial.generator(7))
        worst = float((e.sum(-1) - 1).abs().max())
        if float(e.min()) < 0 or not worst <= 1e-5:
            raise Broken(
                f"slots({size}, {n}) has entries down to {float(e.min()):.4g} and a row sum that is off 1 by {worst:.4g}"
            )
