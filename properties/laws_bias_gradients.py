"""Laws about the gradients of a bias and of sinks, which are sums of dS over rows, heads and entries."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effattn.properties.law import SetAside, Trial, law
from effattn.properties.law_draws import OPTIONS
from effattn.properties.laws_gradients import _STEP, _backward, _cases, _grads, _only_d_out, _slack, _upstream
from effattn.properties.laws_structure import _one, select
from effattn.properties.visible import visible

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.properties.profiles import Draw

_OPTIONS = ("causal", "window", "softcap", "mask", "lengths", "scale")


def _one_of_them(draw: Draw, fields: dict[str, Any]) -> dict[str, Any]:
    """A bias, sinks, or both."""
    wanted = draw.pick((("bias",), ("sinks",), ("bias", "sinks")))
    return {name: value for option in wanted for name, value in OPTIONS[option](draw).items()}


def _has_one(case: Case) -> bool:
    return _backward(case) and (case.bias != "none" or case.sinks)


_draw = _cases(options=_OPTIONS, change=_one_of_them)


def _theirs(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """dbias and dsinks, those that there are."""
    found = {name: gradients[name] for name in ("dbias", "dsinks") if name in gradients}
    if not found:
        raise SetAside("not supported: the method gives no gradient of the bias or of the sinks")
    return found


@law("gradients", draw=_draw, holds=_has_one, gradients=True)
def gradients_of_bias_and_sinks_are_derivatives_of_the_output(it: Trial) -> None:
    """<dX, U> is the derivative of <dO, O> along U, for X the bias and the sinks: of exact attention, by differences.

    As for q, k and v: central differences at steps h and 2h of the float64 output, extrapolated.
    """
    import torch

    from effattn.properties.allowance import exact

    inputs = _only_d_out(it.inputs())
    d_out = inputs.extras.d_out
    assert d_out is not None
    gradients, bounds = _theirs(_grads(it(inputs))), it.bounds(inputs)
    wide = type(inputs)(*(x.double() for x in inputs), extras=inputs.extras)

    def loss(name: str, move: torch.Tensor) -> torch.Tensor:
        moved = getattr(inputs.extras, name).double() + move
        given = type(wide)(*wide, extras=replace(wide.extras, **{name: moved}))
        return (d_out.double() * exact(it.case, given)["out"]).sum()

    for name in (name.removeprefix("d") for name in gradients):
        given = getattr(inputs.extras, name).double()
        along = torch.sin(torch.arange(1, given.numel() + 1, device=given.device).double()).view(given.shape)
        near, far = (
            (loss(name, along * h) - loss(name, along * -h)) / (2.0 * h) for h in (_STEP, 2.0 * _STEP)
        )
        want = near + (near - far) / 3.0
        got = (gradients[f"d{name}"].double() * along).sum()
        allowed = (bounds[f"d{name}"] * along.abs()).sum() + (near - far).abs() + 1e-6 * want.abs() + 1e-9
        it.close(f"<d{name}, u>", got.view(1), want.view(1), allowed.view(1), "it is the derivative along u")


@law("gradients", draw=_draw, holds=_has_one, gradients=True, bits=True)
def gradients_of_bias_and_sinks_scale_with_the_upstream_gradient(it: Trial) -> None:
    """dO times 4 gives dbias and dsinks times 4, dO times 0 gives 0, and the same call again gives the same bits."""
    import torch

    inputs = _only_d_out(it.inputs())
    d_out = inputs.extras.d_out
    assert d_out is not None
    one, again = (_theirs(_grads(it(inputs))) for _ in range(2))
    four, none = (_theirs(_grads(it(_upstream(inputs, d_out * factor)))) for factor in (4.0, 0.0))
    for name, x in one.items():
        it.same(name, again[name], x, "the same call was made twice")
        it.same(name, none[name], torch.zeros_like(x), "the gradient of the output is 0")
        info = torch.finfo(x.dtype)
        fair = (x.double().abs() >= 64.0 * info.tiny) & (x.double().abs() < info.max / 16.0)
        got, want = (torch.where(fair, y, 0.0) for y in (four[name].double(), 4.0 * x.double()))
        it.same(name, got, want, "dO was multiplied by 4", slack=_slack(it, inputs, name, 8.0))


@law(
    "gradients",
    draw=_cases(options=_OPTIONS, always=("bias",)),
    holds=lambda case: _backward(case) and case.bias != "none",
    gradients=True,
    bits=True,
)
def a_bias_at_hidden_keys_has_no_gradient(it: Trial) -> None:
    """dbias is 0 where no row that shares the element of the bias sees the key."""
    import torch

    inputs = it.inputs()
    bias = inputs.extras.bias
    assert bias is not None
    seen = visible(it.case, inputs)
    for axis in range(4):
        if bias.shape[axis] == 1:
            seen = seen.any(axis, keepdim=True)
    if bool(seen.all()):
        return
    hidden = torch.where(seen, 0.0, _theirs(_grads(it(inputs)))["dbias"].double())
    it.same("dbias", hidden, torch.zeros_like(hidden), "no query that shares this element sees the key")


@law("gradients", draw=_draw, holds=_has_one, gradients=True)
def a_shift_of_all_logits_leaves_the_loss(it: Trial) -> None:
    """All logits of a row, the sink's included, moved by the same amount give the same output: dbias and dsinks sum to 0.

    Without sinks the sum is that of dbias. With sinks alone there is no bias that moves the other logits.
    """
    import torch

    if it.case.bias == "none":
        return
    inputs = _only_d_out(it.inputs())
    gradients, bounds = _theirs(_grads(it(inputs))), it.bounds(inputs)
    total = torch.stack([x.double().sum() for x in gradients.values()]).sum().view(1)
    allowed = torch.stack([bounds[name].sum() for name in gradients]).sum().view(1)
    it.close(
        " + ".join(f"sum of {name}" for name in gradients),
        total,
        torch.zeros_like(total),
        allowed,
        "moving all logits by the same amount leaves the output",
    )


def _two(draw: Draw, fields: dict[str, Any]) -> dict[str, Any]:
    return _one_of_them(draw, fields) | {"batch": 2}


@law(
    "gradients",
    draw=_cases(options=_OPTIONS, change=_two),
    holds=lambda case: _has_one(case) and case.batch > 1,
    gradients=True,
)
def gradients_of_bias_and_sinks_add_up_over_the_batch(it: Trial) -> None:
    """What entries of a batch share has the sum of the gradients that each gives alone; what they do not share, each its own."""
    import torch

    inputs, alone = _only_d_out(it.inputs()), replace(it.case, batch=1)
    whole, bounds = _theirs(_grads(it(inputs))), it.bounds(inputs)
    parts: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []
    for b in range(it.case.batch):
        entry: Inputs = select(inputs, "b", _one(b))
        parts.append((_theirs(_grads(it(entry, alone))), it.bounds(entry, alone)))
    for name, x in whole.items():
        each, allowed = ([part[kind][name].double() for part in parts] for kind in (0, 1))
        if name == "dbias" and x.shape[0] > 1:
            for b, got in enumerate(each):
                it.close(
                    name,
                    got,
                    x[b : b + 1],
                    allowed[b] + bounds[name][b : b + 1],
                    f"entry {b} was given alone",
                )
        else:
            summed, slack = torch.stack(each).sum(0), bounds[name] + torch.stack(allowed).sum(0)
            it.close(name, x, summed, slack, "entries of the batch were given alone, and summed")
