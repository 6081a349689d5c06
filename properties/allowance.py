"""What rounding allows, for laws that compare within it: exact values, bounds and standardised errors of any inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.exact import Exact, Options
    from effattn.methods.base import Output
    from effattn.tolerances.envelope import Envelope
    from effattn.tolerances.numerics import Numerics


def exact(case: Case, inputs: Inputs, *, keep: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Exact "out" and "lse", float64."""
    _, _, found = _exact(case, inputs, keep)
    return {"out": found.out, "lse": found.lse}


def bounds(
    case: Case, inputs: Inputs, numerics: Numerics, *, keep: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """Largest error of a correct kernel, per element: "out", "lse", and where the case has gradients "dq", "dk", "dv".

    `keep` is what dropout keeps. Infinite where the case is not judged. On the device of the inputs.
    """
    import torch

    from effattn import exact as reference
    from effattn.tolerances.gradients import gradient_envelopes

    wide, options, found, envelope = _envelope(case, inputs, numerics, keep)
    device = inputs.q.device
    result = {
        "out": torch.from_numpy(envelope.out_bound).to(device),
        "lse": torch.from_numpy(envelope.lse_bound).to(device),
    }
    d_out = inputs.extras.d_out
    if case.backward and d_out is not None:
        d_lse = inputs.extras.d_lse
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


def _exact(case: Case, inputs: Inputs, keep: torch.Tensor | None) -> tuple[Inputs, Options, Exact]:
    from effattn import exact as reference
    from effattn.exact import Options

    wide = type(inputs)(*(x.detach().double() for x in inputs), extras=inputs.extras)
    options = Options.of(case, wide, keep=keep)
    return wide, options, reference.attention_with(*wide, options)


def _envelope(
    case: Case, inputs: Inputs, numerics: Numerics, keep: torch.Tensor | None
) -> tuple[Inputs, Options, Exact, Envelope]:
    from effattn.tolerances.envelope import forward_envelope

    wide, options, found = _exact(case, inputs, keep)
    return wide, options, found, forward_envelope(*wide, numerics=numerics, exact=found, options=options)
