"""`exact`: the float64 reference, rounded once. A control: nothing can be more accurate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effattn.methods.base import Method, Output

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics


class ExactRounded(Method):
    """`effattn.exact` as a method: whoever judges it by anything stricter than a pass judges wrongly."""

    name = "exact"
    spec = "exact"

    def numerics(self, case: Case) -> Numerics:
        from effattn.tolerances.numerics import for_dtype

        return for_dtype(case.dtype, "flash")

    def dropout_mask(self, case: Case, device: torch.device) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(case.seed)
        shape = (case.batch, case.heads, case.q_len, case.kv_len)
        return (torch.rand(shape, generator=generator) >= case.dropout).to(device)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        import torch

        from effattn import exact

        keep = self.dropout_mask(case, inputs.q.device) if case.dropout else None
        options = exact.Options.of(case, inputs, keep=keep)
        if options.plain:
            result = exact.attention(*inputs, causal=case.causal, scale=case.softmax_scale)
        else:
            result = exact.attention_with(*inputs, options)
        gradients, extras = None, inputs.extras
        if extras.d_out is not None:
            found = exact.gradients(*inputs, extras.d_out, options, exact=result, d_lse=extras.d_lse)
            dtypes = {"sinks": torch.float32, "bias": None if extras.bias is None else extras.bias.dtype}
            gradients = {
                name: _to(x, dtypes.get(name) or inputs.q.dtype) for name, x in found.present().items()
            }
        return Output(
            _to(result.out, inputs.q.dtype), result.lse.to(torch.float32), gradients, through_lse=True
        )


def _to(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounded once: torch rounds float64 to its 16-bit types by way of float32."""
    import torch

    from effattn.tolerances import formats

    names = {getattr(torch, f.torch_name): f for f in formats.FORMATS.values() if f.torch_name}
    return names[dtype].round(x).to(dtype)
