"""Runs a function forward, and backward by torch's autograd where the case asks for gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effattn.errors import NotSupported, WrongReturn
from effattn.methods.base import Output, as_output

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs


def run(function: Callable[[Inputs], Any], case: Case, inputs: Inputs) -> Output:
    """What `function` gives for the inputs, with the gradients by q, k, v, bias and sinks if the case is backward.

    The function gets leaves of the same memory that require gradients, and the upstream gradients are those of the case;
    that of the log-sum-exp only where the function's can be differentiated. Raises `NotSupported` where the output, or
    bias or sinks, have no gradient, `WrongReturn` where q, k or v have none.
    """
    if not case.backward:
        return as_output(function(inputs))
    import torch

    def leaf(x: torch.Tensor) -> torch.Tensor:
        return x.detach().requires_grad_()

    extras = inputs.extras
    options = {name: leaf(x) for name in ("bias", "sinks") if (x := getattr(extras, name)) is not None}
    leaves = dict(zip("qkv", map(leaf, inputs), strict=True)) | options
    with torch.enable_grad():
        output = as_output(
            function(type(inputs)(leaves["q"], leaves["k"], leaves["v"], extras=replace(extras, **options)))
        )
        if not output.out.requires_grad:
            raise NotSupported("its output has no gradient")
        assert extras.d_out is not None
        outputs, upstream = [output.out], [extras.d_out]
        through_lse = output.lse is not None and output.lse.requires_grad and extras.d_lse is not None
        if through_lse:
            assert output.lse is not None
            assert extras.d_lse is not None
            outputs.append(output.lse)
            upstream.append(extras.d_lse)
        shapes = [(tuple(x.shape), tuple(g.shape)) for x, g in zip(outputs, upstream, strict=True)]
        if any(given != expected for given, expected in shapes):
            # The judge says what is wrong with the shape; there is nothing to differentiate.
            return Output(output.out.detach(), output.lse, {})
        found = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    gradients = dict(zip(leaves, found, strict=True))
    for name, x in gradients.items():
        if x is None and name in options:
            raise NotSupported(f"its output has no gradient by {name}")
        if x is None:
            raise WrongReturn(
                f"its output does not depend on {name} for autograd; expected a gradient by q, k and v"
            )
    lse = None if output.lse is None else output.lse.detach()
    return Output(output.out.detach(), lse, gradients, through_lse=through_lse)
