"""Approximations of the user's own in a study: `--method path/to/my_performer.py`, see `effattn.approximation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from effattn.approximation import Approximation, is_own, load
from effattn.errors import NotSupported, RequestError
from effattn.study import measures

if TYPE_CHECKING:
    from effattn.study.engine import Job
    from effattn.study.problems import Problem

__all__ = ["check", "is_own", "measure", "subject"]


def subject(method: str) -> Approximation:
    """The approximation that a method of a study names. RequestError if it has no `attention`."""
    found = load(method)
    if not found.has("attention"):
        raise RequestError(
            f"{method} has no function `attention`, of which a study measures the error; expected attention(q, k, v, *,"
            " size, generator, causal=False)"
        )
    return found


def check(method: str, *, causal: bool) -> None:
    """RequestError where a study can't measure the method."""
    found = subject(method)
    if causal and not found.takes("causal"):
        raise RequestError(
            f"`attention` of {method} has no keyword `causal`; leave out --causal, or the method"
        )


def measure(job: Job, data: Problem, *, divergence: bool) -> Mapping[str, float]:
    """One draw, as for effattn's own: in the dtype, and the same projections in float64.

    A method that raises NotImplementedError or NotSupported in float64 has its errors, and neither `approximation` nor
    `rounding` nor `kl`. RequestError for one that raises otherwise, or in the dtype that was asked for.
    """
    point = job.point
    found = subject(point.method)
    # k and v as often as there are query heads: a function need not know of shared ones.
    group = data.q.shape[1] // data.k.shape[1]
    q, k, v = data.q, data.k.repeat_interleave(group, 1), data.v.repeat_interleave(group, 1)
    seed = job.seed("own", point.size)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        where = f"size = {point.size}, n = {point.n}, {str(q.dtype).removeprefix('torch.')}"
        try:
            with torch.no_grad():
                # Copies: the inputs are shared by all methods of a draw.
                out = found.attention(
                    q.clone(), k.clone(), v.clone(), size=point.size, seed=seed, causal=data.causal
                )
        except (RequestError, KeyboardInterrupt):
            raise
        except BaseException as error:  # SystemExit too
            kind = _NotTaken if isinstance(error, NotSupported | NotImplementedError) else RequestError
            raise kind(
                f"`attention` of {point.method} raised {type(error).__name__}: {error}; {where}. Where it takes some sizes"
                " only, name them with --size; for a dtype that it doesn't take, it should raise NotImplementedError"
            ) from error
        if not out.dtype.is_floating_point:
            raise RequestError(
                f"`attention` of {point.method} returned {str(out.dtype).removeprefix('torch.')}; expected a real floating"
                f" dtype, such as that of q; {where}"
            )
        return out.double()

    narrow = run(q, k, v)
    errors = measures.output_errors(narrow, data.exact)
    try:
        wide = run(q.double(), k.double(), v.double())
        errors["approximation"] = measures.output_errors(wide, data.exact)["error"]
        errors["rounding"] = float((narrow - wide).norm() / wide.norm())
        if divergence and data.small:
            eye = torch.eye(k.shape[2], dtype=torch.float64).expand(*k.shape[:2], -1, -1)
            implied = run(q.double(), k.double(), eye)
            hidden = measures.causal_mask(*implied.shape[-2:]) if data.causal else None
            errors["kl"] = measures.divergence(implied, data.weights, hidden)
    except _NotTaken:
        pass  # float64, or values that are not as wide as keys: what needs them stays empty
    return errors


class _NotTaken(RequestError):
    """A method said that it doesn't take what it was given."""
