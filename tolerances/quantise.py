"""What a method multiplies whose operands are codes: computed from the inputs and the declaration alone.

The code of x is round(x / scale), scale = amax / top, to nearest. A method computes this in fp32, in one of several ways: it
divides by the scale or multiplies by its reciprocal, which may be off by 2 units in the last place (PTX: div.full.f32,
rcp.approx.f32), and Q may have been multiplied by the softmax scale before. Together these are at most 2^-20 relative
(`BOUNDARY`: 16 u). So the code is known unless x / scale is that close to the middle of two codes; there either is right, and
how ties go does not matter. Where both may be, the number taken here is their middle, and half of their distance is the
`radius`: what a right method may be off by, in one direction for all rows that use it.

What a code stands for, scale * code, has the relative error of the scale in fp32, which is part of the errors of the scores and
of the second product (`sums.ScoreErrors`, `envelope`). docs/theory.md has the proof.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from effattn.case import Inputs
    from effattn.tolerances.codes import Codes
    from effattn.tolerances.numerics import Numerics

#: relative error of x / scale in fp32, however it is computed: below this distance from a boundary a code may be either
BOUNDARY = 2.0**-20

#: relative error of scale * code as it is multiplied: that of the scale in fp32, the reciprocal of a reciprocal at worst, 4 u
#: each, and of what it is folded into
SCALE_ERROR = 12.0 * 2.0**-24

#: the smallest normal number of fp32: scales below it have lost their digits
_SMALLEST_SCALE = 2.0**-126


class Radius(NamedTuple):
    """What entries may be off by where two codes are right; float64, of the shapes of q, k and v, mostly 0."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True, eq=False)
class Multiplied:
    """What a method multiplies."""

    #: q, k and v, float64: what the codes stand for
    inputs: Inputs
    #: None where every code is known
    radius: Radius | None = None
    #: why it cannot be said what codes are right, in words; None where it can
    unknown: str | None = None


@torch.no_grad()
def multiplied(inputs: Inputs, numerics: Numerics) -> Multiplied:
    """What a method of these numerics multiplies, from q, k and v in any dtype; itself where nothing is quantised.

    The exact result that such a method is held to is that of `Multiplied.inputs`.
    """
    wide = [x.detach().to(torch.float64) for x in inputs]
    if not numerics.quantised:
        return Multiplied(type(inputs)(*wide, extras=inputs.extras))
    group = max(1, inputs.q.shape[1] // max(1, inputs.k.shape[1]))
    radii, unknown = [], None
    for i, (name, codes) in enumerate(zip("qkv", (numerics.q, numerics.k, numerics.v), strict=True)):
        radius = None
        if codes is not None and wide[i].numel():
            problem, wide[i], radius = _quantise(wide[i], codes, group if name == "q" else 1)
            if problem is not None:
                unknown = unknown or f"the codes of {name.upper()} are not determined: {problem}"
        radii.append(torch.zeros_like(wide[i]) if radius is None else radius)
    known = all(not bool(radius.any()) for radius in radii)
    return Multiplied(type(inputs)(*wide, extras=inputs.extras), None if known else Radius(*radii), unknown)


def _quantise(
    x: torch.Tensor, codes: Codes, group: int
) -> tuple[str | None, torch.Tensor, torch.Tensor | None]:
    """Why it is not known, or None; what the codes stand for; their radius. x (batch, heads, rows, columns), not empty."""
    fmt = codes.code_format
    if not bool(torch.isfinite(x).all()):
        return "not all entries are finite", x, None
    if codes.scale == "none":
        beyond = int((x.abs() > fmt.largest).sum())
        if beyond:
            return f"{beyond} entries are beyond {fmt.largest:g}, the largest of {codes.format}", x, None
        # One conversion to nearest even, of a number that is there exactly.
        return None, fmt.round(x), None
    scale = amax(x, codes, group) / codes.top_code
    nonzero = scale[scale > 0.0]
    if nonzero.numel() and float(nonzero.min()) < _SMALLEST_SCALE:
        return f"a scale is {float(nonzero.min()):.2g}, below the normal numbers of fp32", x, None
    # Where all entries of a group are 0, so are their codes, whatever the scale.
    y = x / torch.where(scale > 0.0, scale, 1.0)
    low, high = (fmt.round(y * (1.0 + side * BOUNDARY)) for side in (-1.0, 1.0))
    known = low == high
    stands_for = torch.where(known, fmt.round(y), 0.5 * (low + high)) * scale
    return None, stands_for, None if bool(known.all()) else (high - low).abs() * (0.5 * scale)


def amax(x: torch.Tensor, codes: Codes, group: int = 1) -> torch.Tensor:
    """The largest magnitude of what shares a scale with each entry, in a shape that broadcasts to x or is that of it.

    x (batch, heads, rows, columns), not empty; `group` query heads share a KV head.
    """
    size = x.abs()
    match codes.scale:
        case "tensor":
            return size.amax().reshape(1, 1, 1, 1)
        case "head":
            return size.amax((2, 3), keepdim=True)
        case "kv-head":
            return (
                size.amax((2, 3), keepdim=True).unflatten(1, (-1, group)).amax(2).repeat_interleave(group, 1)
            )
        case "channel":
            return size.amax(2, keepdim=True)
    assert codes.rows is not None
    rows = x.shape[2]
    padded = torch.nn.functional.pad(size.amax(3), (0, -rows % codes.rows))
    blocks = padded.unflatten(2, (-1, codes.rows)).amax(3)
    return blocks.repeat_interleave(codes.rows, dim=2)[:, :, :rows, None]
