"""What rounding allows, for laws that compare within it: exact values, bounds and standardised errors of any inputs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.exact import Exact, Options
    from effattn.methods.base import Output
    from effattn.tolerances.envelope import Envelope
    from effattn.tolerances.numerics import Numerics
    from effattn.tolerances.quantise import Multiplied


def exact(case: Case, inputs: Inputs, *, keep: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Exact "out" and "lse", float64."""
    _, _, found = _exact(case, inputs, keep, None)
    return {"out": found.out, "lse": found.lse}


def bounds(
    case: Case, inputs: Inputs, numerics: Numerics, *, keep: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Largest error of a correct kernel, per element: "out", "lse", and where the case has gradients "dq", "dk", "dv", and
    "dbias" and "dsinks" where there are such.

    `keep` is what dropout keeps. Infinite where the case is not judged. On the device of the inputs. Raises `SetAside` where
    there is no bound of gradients, which the case asks for.
    """
    import torch

    from effattn import exact as reference
    from effattn.properties.law import SetAside
    from effattn.tolerances import formats
    from effattn.tolerances.gradients import gradient_envelopes

    if case.backward and numerics.quantised:
        raise SetAside("no bound of gradients is known for quantised operands")
    wide, options, found, envelope = _envelope(case, inputs, numerics, keep)
    device = inputs.q.device
    result = {
        "out": torch.from_numpy(envelope.out_bound).to(device),
        "lse": torch.from_numpy(envelope.lse_bound).to(device),
    }
    if numerics.quantised:
        # A law states what is so of attention on the inputs: it may be off by what quantising them does, too.
        _, _, plain = _exact(case, inputs, keep, None)
        result["out"] += (found.out - plain.out).abs()
        result["lse"] += torch.where(found.lse == plain.lse, 0.0, (found.lse - plain.lse).abs())
    d_out = inputs.extras.d_out
    if case.backward and d_out is not None:
        d_lse = inputs.extras.d_lse
        bias_format = numerics.format("input")
        if case.bias.endswith(":fp32"):
            bias_format = formats.get("fp32")
        gradients = reference.gradients(*wide, d_out.double(), options, exact=found, d_lse=d_lse)
        per_name = gradient_envelopes(
            *wide,
            d_out.double(),
            numerics=numerics,
            exact=found,
            gradients=gradients,
            forward=envelope,
            options=options,
            d_lse=d_lse,
            bias_format=bias_format,
        )
        result |= {f"d{name}": torch.as_tensor(x.bound).to(device) for name, x in per_name.items()}
    return result


def errors(case: Case, inputs: Inputs, numerics: Numerics, output: Output) -> torch.Tensor:
    """(got - exact) / sigma of the output, (batch, heads, q_len, v_dim); 0 where the deviation is 0."""
    import torch

    _, _, found, envelope = _envelope(case, inputs, numerics, None)
    sigma = torch.from_numpy(envelope.out_sigma)
    error = output.out.detach().cpu().double() - found.out.cpu()
    return torch.where(sigma > 0.0, error / sigma, 0.0)


def _exact(
    case: Case, inputs: Inputs, keep: torch.Tensor | None, read: Multiplied | None
) -> tuple[Inputs, Options, Exact]:
    """Exact attention on the inputs, or on what is multiplied."""
    from effattn import exact as reference
    from effattn.exact import Options

    if read is None:
        wide = type(inputs)(*(x.detach().double() for x in inputs), extras=inputs.extras)
    else:
        wide = read.inputs
    options = Options.of(case, wide, keep=keep)
    return wide, options, reference.attention_with(*wide, options)


def _envelope(
    case: Case, inputs: Inputs, numerics: Numerics, keep: torch.Tensor | None
) -> tuple[Inputs, Options, Exact, Envelope]:
    from effattn.tolerances.envelope import forward_envelope
    from effattn.tolerances.quantise import multiplied

    read = multiplied(inputs, numerics)
    wide, options, found = _exact(case, inputs, keep, read)
    envelope = forward_envelope(*wide, numerics=numerics, exact=found, options=options, radius=read.radius)
    if read.unknown is not None:
        envelope.out_bound.fill(math.inf)
        envelope.lse_bound.fill(math.inf)
    return wide, options, found, envelope
