"""Laws about the backward pass: gradients of q, k and v for a given gradient of the output."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effattn.properties.law import SetAside, Trial, law, with_tensors
from effattn.properties.law_draws import Drawing, cases
from effattn.properties.laws_structure import _one, select
from effattn.properties.visible import visible

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from effattn.case import Case, Inputs
    from effattn.methods.base import Output

_OPTIONS = ("causal", "window", "softcap", "alibi", "bias", "mask", "sinks", "lengths", "scale")
_DENSE = ("bhsd", "bhsd", "bshd+pad")
_SHORT = (1, 15, 16, 17, 33, 64, 65, 97)
_QKV = ("dq", "dk", "dv")


def _cases(
    *,
    options: tuple[str, ...] = _OPTIONS,
    always: tuple[str, ...] = (),
    lengths: tuple[int, ...] = _SHORT,
    change: Callable[..., dict[str, object]] = lambda draw, fields: {},
) -> Drawing:
    return cases(
        options=options,
        always=always,
        lengths=lengths,
        layouts=_DENSE,
        dims=((64, 64), (40, 40), (64, 40), (32, 32)),
        change=change,
        backward=True,
    )


def _backward(case: Case) -> bool:
    return case.backward and case.q_len > 0 and case.kv_len > 0


def _upstream(inputs: Inputs, d_out: torch.Tensor, d_lse: torch.Tensor | None = None) -> Inputs:
    return type(inputs)(*inputs, extras=replace(inputs.extras, d_out=d_out, d_lse=d_lse))


def _only_d_out(inputs: Inputs) -> Inputs:
    assert inputs.extras.d_out is not None
    return _upstream(inputs, inputs.extras.d_out)


def _grads(output: Output) -> dict[str, torch.Tensor]:
    gradients = {f"d{name}": x for name, x in (output.gradients or {}).items()}
    if not all(name in gradients for name in _QKV):
        raise SetAside("not supported: the method gives no gradients")
    return gradients


def _slack(it: Trial, inputs: Inputs, name: str, factor: float = 2.0) -> Callable[[], torch.Tensor]:
    return lambda: factor * it.bounds(inputs)[name]


@law("gradients", draw=_cases(), holds=_backward, gradients=True, bits=True)
def gradients_twice_have_the_same_bits(it: Trial) -> None:
    """Equal inputs give equal gradients, bit for bit: nothing is added in the order in which threads finish."""
    inputs = it.inputs()
    first = _grads(it(inputs))
    for _ in range(2):
        again = _grads(it(inputs))
        for name in first:
            it.same(name, again[name], first[name], "the same call was made twice")


@law("gradients", draw=_cases(), holds=_backward, gradients=True, bits=True)
def without_an_upstream_gradient_all_gradients_are_zero(it: Trial) -> None:
    """A gradient of the output of zeros gives gradients of zeros: nothing is taken from elsewhere."""
    import torch

    inputs = _only_d_out(it.inputs())
    assert inputs.extras.d_out is not None
    for name, x in _grads(it(_upstream(inputs, torch.zeros_like(inputs.extras.d_out)))).items():
        it.same(name, x, torch.zeros_like(x), "the gradient of the output is 0")


@law("gradients", draw=_cases(), holds=_backward, gradients=True, bits=True)
def gradients_scale_with_the_upstream_gradient(it: Trial) -> None:
    """The gradient of the output times 4 gives gradients times 4: products and sums scale without rounding."""
    import torch

    inputs = _only_d_out(it.inputs())
    d_out = inputs.extras.d_out
    assert d_out is not None
    one, four = _grads(it(inputs)), _grads(it(_upstream(inputs, d_out * 4.0)))
    info = torch.finfo(it.case.torch_dtype)
    for name in _QKV:
        # In fp16 dS may be rounded below the normal numbers, where rounding does not scale.
        if it.case.dtype == "fp16" and name != "dv":
            it.close(
                name,
                four[name],
                4.0 * one[name].double(),
                _slack(it, inputs, name, 8.0)(),
                "dO was multiplied by 4",
            )
            continue
        fair = (one[name].double().abs() >= 64.0 * info.tiny) & (one[name].double().abs() < info.max / 16.0)
        got, want = (torch.where(fair, x, 0.0) for x in (four[name].double(), 4.0 * one[name].double()))
        it.same(name, got, want, "dO was multiplied by 4", slack=_slack(it, inputs, name, 8.0))


@law("gradients", draw=_cases(), holds=_backward, gradients=True)
def the_gradient_of_v_is_linear_in_the_upstream_gradient(it: Trial) -> None:
    """dV = P^T dO: for the sum of two upstream gradients it is the sum of theirs."""
    import torch

    inputs = _only_d_out(it.inputs())
    d_out = inputs.extras.d_out
    assert d_out is not None
    a = ((d_out.double() * 8.0).round() / 8.0).clamp(-3.0, 3.0).to(d_out.dtype)
    b = a.flip(2)
    three = [_upstream(inputs, x) for x in (a, b, a + b)]
    got = [_grads(it(x))["dv"].double() for x in three]
    allowed = torch.stack([it.bounds(x)["dv"] for x in three]).sum(0)
    it.close("dv", got[2], got[0] + got[1], allowed, "dO is the sum of two")


@law(
    "gradients",
    draw=_cases(options=tuple(o for o in _OPTIONS if o != "sinks")),
    holds=lambda case: _backward(case) and not case.sinks,
    gradients=True,
)
def a_shift_of_all_keys_leaves_the_loss(it: Trial) -> None:
    """Rows of dS sum to 0, since a shift common to a row's scores cancels: without softcap, so does dK over the keys."""
    if it.case.softcap is not None:
        raise SetAside("under a softcap a shift of the keys is no shift of the scores")
    import torch

    inputs = _only_d_out(it.inputs())
    dk, bound = _grads(it(inputs))["dk"].double(), it.bounds(inputs)["dk"]
    total = dk.sum(2)
    it.close(
        "dk summed over the keys",
        total,
        torch.zeros_like(total),
        bound.sum(2),
        "a shift of all keys leaves the loss",
    )


def _oblong(draw: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Half of the cases causal with more keys than queries, where alignments differ; half with a softcap that bites."""
    causal = {"causal": "bottom-right", "kv_len": fields["q_len"] + 16} if draw.chance(0.5) else {}
    return causal | ({"softcap": 0.5} if draw.chance(0.5) else {})


@law("gradients", draw=_cases(change=_oblong), holds=_backward, gradients=True)
def dv_and_the_output_agree(it: Trial) -> None:
    """The output is linear in V, so <dO, O> = <dV, V> (Euler): with dropout too, if backward has the forward's mask."""
    inputs = _only_d_out(it.inputs())
    output = it(inputs)
    d_out = inputs.extras.d_out
    assert d_out is not None
    bounds = it.bounds(inputs)
    left = (d_out.double() * output.out.double()).sum((2, 3))
    right = (_grads(output)["dv"].double() * inputs.v.double()).sum((2, 3))
    allowed = (d_out.double().abs() * bounds["out"]).sum((2, 3))
    group = it.case.heads // it.case.kv_heads
    left, allowed = (x.unflatten(1, (-1, group)).sum(2) for x in (left, allowed))
    allowed = allowed + (bounds["dv"] * inputs.v.double().abs()).sum((2, 3))
    it.close("<dv, v> per KV head", right, left, allowed, "the output is linear in V, so it is <dO, O>")


@law("gradients", draw=_cases(), holds=_backward, gradients=True)
def dq_and_dk_agree(it: Trial) -> None:
    """Scores depend on q and k through q.k alone, so <dQ, Q> = <dK, K> over the heads that share K."""
    inputs = _only_d_out(it.inputs())
    gradients, bounds = _grads(it(inputs)), it.bounds(inputs)
    group = it.case.heads // it.case.kv_heads
    q, k = inputs.q.double(), inputs.k.double()
    left = (gradients["dq"].double() * q).sum((2, 3)).unflatten(1, (-1, group)).sum(2)
    right = (gradients["dk"].double() * k).sum((2, 3))
    allowed = (bounds["dq"] * q.abs()).sum((2, 3)).unflatten(1, (-1, group)).sum(2)
    it.close(
        "<dk, k> per KV head",
        right,
        left,
        allowed + (bounds["dk"] * k.abs()).sum((2, 3)),
        "it equals <dq, q>",
    )


#: a step of finite differences: the error of the central difference is of the order of its square
_STEP = 2.0**-9


@law("gradients", draw=_cases(change=_oblong), holds=_backward, gradients=True)
def gradients_are_derivatives_of_the_output(it: Trial) -> None:
    """<dX, U> is the derivative of <dO, O> along U, for X each of q, k and v: here of exact attention, by differences.

    Central differences at steps h and 2h of the float64 output, extrapolated; what is left is estimated by how much the
    two differ.
    """
    from effattn.properties.allowance import exact

    inputs = _only_d_out(it.inputs())
    d_out = inputs.extras.d_out
    assert d_out is not None
    gradients, bounds = _grads(it(inputs)), it.bounds(inputs)
    wide = type(inputs)(*(x.double() for x in inputs), extras=inputs.extras)

    def loss(name: str, move: torch.Tensor) -> torch.Tensor:
        moved = with_tensors(wide, **{name: getattr(wide, name) + move})
        return (d_out.double() * exact(it.case, moved)["out"]).sum()

    for name in "qkv":
        along = getattr(inputs, name).flip(-1).double().clamp(-2.0, 2.0)
        near, far = (
            (loss(name, along * h) - loss(name, along * -h)) / (2.0 * h) for h in (_STEP, 2.0 * _STEP)
        )
        want = near + (near - far) / 3.0
        got = (gradients[f"d{name}"].double() * along).sum()
        allowed = (bounds[f"d{name}"] * along.abs()).sum() + (near - far).abs() + 1e-6 * want.abs() + 1e-9
        it.close(f"<d{name}, u>", got.view(1), want.view(1), allowed.view(1), "it is the derivative along u")


@law(
    "gradients",
    draw=_cases(options=("causal", "window", "mask", "lengths", "softcap")),
    holds=_backward,
    gradients=True,
    bits=True,
)
def keys_that_nobody_sees_have_no_gradient(it: Trial) -> None:
    """dK and dV of a key that no query sees are 0."""
    import torch

    inputs = it.inputs()
    seen = visible(it.case, inputs).any(2).unflatten(1, (it.case.kv_heads, -1)).any(2)
    if bool(seen.all()):
        return
    gradients = _grads(it(inputs))
    for name in ("dk", "dv"):
        hidden = torch.where(seen.unsqueeze(-1), 0.0, gradients[name].double())
        it.same(name, hidden, torch.zeros_like(hidden), "no query sees the key")


@law(
    "gradients",
    draw=_cases(
        options=("causal", "window", "mask", "lengths", "softcap", "alibi"),
        change=lambda draw, fields: (
            {"causal": "bottom-right", "q_len": fields["kv_len"] + draw.pick((1, 16, 40))}
            if draw.chance(0.5)
            else {}
        ),
    ),
    holds=_backward,
    gradients=True,
    bits=True,
)
def rows_that_see_no_key_have_no_gradient(it: Trial) -> None:
    """dQ of a row that sees no key is 0, and what its dO holds changes nothing, NaN and infinity apart."""
    import torch

    inputs = it.inputs()
    empty = ~visible(it.case, inputs).any(-1)
    if not bool(empty.any()):
        return
    d_out = inputs.extras.d_out
    assert d_out is not None
    louder = torch.where(empty.unsqueeze(-1), torch.full_like(d_out, 1000.0), d_out)
    d_lse = inputs.extras.d_lse
    quiet = _upstream(inputs, torch.where(empty.unsqueeze(-1), torch.zeros_like(d_out), d_out), d_lse)
    one, other = _grads(it(quiet)), _grads(it(_upstream(inputs, louder, d_lse)))
    rows = torch.where(empty.unsqueeze(-1), other["dq"].double(), 0.0)
    it.same("dq", rows, torch.zeros_like(rows), "the row sees no key")
    for name in _QKV:
        it.same(
            name,
            other[name],
            one[name],
            "only dO of rows that see no key was changed",
            slack=_slack(it, inputs, name),
        )


@law(
    "gradients",
    draw=_cases(always=("causal",), options=("causal", "softcap", "alibi")),
    holds=lambda case: _backward(case) and case.causal != "none" and case.kv_len > 1,
    gradients=True,
    bits=True,
)
def future_keys_do_not_reach_dq(it: Trial) -> None:
    """NaN in keys and values after a row's last one leaves its dQ as it was."""
    import torch

    inputs = it.inputs()
    keys = torch.arange(it.case.kv_len, device=it.device) >= it.case.kv_len // 2
    sees = (visible(it.case, inputs) & keys).any(-1)
    if bool(sees.all()):
        return
    k, v = (x.masked_fill(keys[None, None, :, None], it.garbage()) for x in (inputs.k, inputs.v))
    one, other = _grads(it(inputs))["dq"], _grads(it(with_tensors(inputs, k=k, v=v)))["dq"]
    got, want = (torch.where(sees.unsqueeze(-1), 0.0, x.double()) for x in (other, one))
    it.same(
        "dq",
        got,
        want,
        f"future K and V became {it.garbage()} and the row does not see them",
        slack=_slack(it, inputs, "dq"),
    )


@law(
    "gradients",
    draw=_cases(always=("lengths",), options=("lengths", "causal", "softcap")),
    holds=lambda case: _backward(case) and case.lengths != "none",
    gradients=True,
    bits=True,
)
def padding_does_not_reach_the_gradients(it: Trial) -> None:
    """NaN in K and V beyond the length, and in the padding rows of Q, leaves all gradients as they were."""
    import torch

    inputs = it.inputs()
    extras = inputs.extras
    assert extras.kv_lengths is not None
    keys = (torch.arange(it.case.kv_len, device=it.device) >= extras.kv_lengths[:, None])[:, None, :, None]
    dirty = {name: getattr(inputs, name).masked_fill(keys, it.garbage()) for name in "kv"}
    if extras.q_lengths is not None:
        rows = (torch.arange(it.case.q_len, device=it.device) >= extras.q_lengths[:, None])[:, None, :, None]
        dirty["q"] = inputs.q.masked_fill(rows, it.garbage())
    one, other = _grads(it(inputs)), _grads(it(with_tensors(inputs, **dirty)))
    for name in _QKV:
        it.same(
            name,
            other[name],
            one[name],
            f"only padding became {it.garbage()}",
            slack=_slack(it, inputs, name),
        )


@law(
    "gradients",
    draw=_cases(),
    holds=lambda case: _backward(case) and case.heads > case.kv_heads,
    gradients=True,
)
def gradients_of_shared_keys_are_summed_over_the_group(it: Trial) -> None:
    """dK and dV of a KV head are the sums of those that repeated heads would have."""
    case, inputs = it.case, _only_d_out(it.inputs())
    group = case.heads // case.kv_heads
    k, v = (x.repeat_interleave(group, dim=1) for x in (inputs.k, inputs.v))
    wide, apart = with_tensors(inputs, k=k, v=v), replace(case, kv_heads=case.heads)
    one, other = _grads(it(inputs)), _grads(it(wide, apart))
    first, second = it.bounds(inputs), it.bounds(wide, apart)
    for name in ("dk", "dv"):
        summed = other[name].double().unflatten(1, (-1, group)).sum(2)
        allowed = first[name] + second[name].unflatten(1, (-1, group)).sum(2)
        it.close(
            name, one[name], summed, allowed, f"K and V were repeated for each of {group} heads, and summed"
        )
    it.close("dq", other["dq"], one["dq"], first["dq"] + second["dq"], "K and V were repeated for each head")


@law(
    "gradients",
    draw=_cases(change=lambda draw, fields: {"batch": 2}),
    holds=lambda case: _backward(case) and case.batch > 1,
    gradients=True,
    bits=True,
)
def gradients_do_not_depend_on_the_neighbours_in_the_batch(it: Trial) -> None:
    """Each entry alone has the gradients that it has in the batch, bit for bit."""
    inputs = it.inputs()
    whole, alone = _grads(it(inputs)), replace(it.case, batch=1)
    for b in range(it.case.batch):
        got = _grads(it(select(inputs, "b", _one(b)), alone))
        for name in _QKV:
            it.same(
                name,
                got[name],
                whole[name][b : b + 1],
                f"entry {b} was given alone",
                slack=lambda name=name, b=b: 2.0 * it.bounds(inputs)[name][b : b + 1],
            )


@law("gradients", draw=_cases(), holds=_backward, gradients=True, bits=True)
def the_layout_of_the_upstream_gradient_does_not_matter(it: Trial) -> None:
    """dO with other strides, expanded ones of a sum included, gives the same gradients."""
    inputs = _only_d_out(it.inputs())
    d_out = inputs.extras.d_out
    assert d_out is not None
    flat = d_out[:1, :1, :1, :1]
    expanded = _upstream(inputs, flat.expand(d_out.shape))
    dense = _upstream(inputs, flat.expand(d_out.shape).contiguous())
    one, other = _grads(it(dense)), _grads(it(expanded))
    for name in _QKV:
        it.same(name, other[name], one[name], "dO has strides of 0", slack=_slack(it, dense, name))
    permuted = _upstream(inputs, d_out.transpose(1, 2).contiguous().transpose(1, 2))
    one, other = _grads(it(_upstream(inputs, d_out.contiguous()))), _grads(it(permuted))
    for name in _QKV:
        it.same(name, other[name], one[name], "dO has permuted axes", slack=_slack(it, inputs, name))
