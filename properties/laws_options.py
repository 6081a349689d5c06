"""Laws about options: one that is given changes the output, its neutral value does not, and options agree with each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effattn.properties.law import SetAside, Trial, law, parts
from effattn.properties.law_draws import cases
from effattn.properties.visible import distance, visible

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs


def _bare(case: Case, *, but: str = "") -> bool:
    """No option besides causal, scale, softcap and those of `but`."""
    usual = {
        "window": None,
        "alibi": "none",
        "bias": "none",
        "mask": "none",
        "lengths": "none",
        "sinks": False,
    }
    return all(getattr(case, name) == value for name, value in usual.items() if name not in but.split())


_MORE = (17, 33, 64, 65, 97, 129)
_DENSE = ("bhsd", "bshd+pad")


def _plain(case: Case) -> bool:
    return case.plain and case.causal == "none" and case.kv_len > 1 and case.q_len > 1


def _extras(inputs: Inputs, **changes: Any) -> Inputs:
    return type(inputs)(*inputs, extras=replace(inputs.extras, **changes))


def _same_as(it: Trial, inputs: Inputs, case: Case, why: str, *, bits: bool = True) -> None:
    """The case with an option at its neutral value gives what the case without it gives."""
    plain = it.inputs()
    one, other = it(plain), it(inputs, case)
    bounds: dict[str, torch.Tensor] = {}

    def slack(name: str) -> torch.Tensor:
        if not bounds:
            bounds.update(it.bounds(plain))
        return 2.0 * bounds[name]

    for (name, got), (_, want) in zip(parts(other), parts(one), strict=True):
        if bits:
            it.same(name, got, want, why, slack=lambda name=name: slack(name))
        else:
            it.close(name, got, want, slack(name), why)


_plain_cases = cases(options=(), lengths=_MORE, layouts=_DENSE)


@law("options", draw=_plain_cases, holds=_plain)
def a_window_wider_than_the_keys_changes_nothing(it: Trial) -> None:
    """A window that reaches beyond all keys hides none."""
    far = it.case.kv_len + it.case.q_len
    _same_as(
        it, it.inputs(), replace(it.case, window=(far, far)), "the window is wider than all keys", bits=False
    )


@law("options", draw=_plain_cases, holds=_plain)
def slopes_of_zero_change_nothing(it: Trial) -> None:
    """ALiBi with slopes of 0 adds 0 to every score."""
    import torch

    slopes = torch.zeros(it.case.heads, device=it.device)
    _same_as(
        it,
        _extras(it.inputs(), alibi_slopes=slopes),
        replace(it.case, alibi="geometric"),
        "all slopes are 0",
        bits=False,
    )


@law("options", draw=_plain_cases, holds=_plain)
def a_bias_of_zero_changes_nothing(it: Trial) -> None:
    """A bias of 0 adds 0 to every score."""
    inputs = it.inputs()
    bias = inputs.q.new_zeros((1, 1, it.case.q_len, it.case.kv_len))
    _same_as(it, _extras(inputs, bias=bias), replace(it.case, bias="qk"), "the bias is 0", bits=False)


@law("options", draw=_plain_cases, holds=_plain)
def a_mask_that_hides_nothing_changes_nothing(it: Trial) -> None:
    """A mask of all True hides no key."""
    import torch

    mask = torch.ones((1, 1, it.case.q_len, it.case.kv_len), dtype=torch.bool, device=it.device)
    _same_as(
        it, _extras(it.inputs(), mask=mask), replace(it.case, mask="qk"), "the mask hides nothing", bits=False
    )


@law("options", draw=_plain_cases, holds=_plain)
def a_sink_of_minus_infinity_changes_nothing(it: Trial) -> None:
    """A sink whose logit is -inf has weight 0."""
    import torch

    sinks = torch.full((it.case.heads,), -math.inf, device=it.device)
    _same_as(
        it, _extras(it.inputs(), sinks=sinks), replace(it.case, sinks=True), "all sinks are -inf", bits=False
    )


@law("options", draw=_plain_cases, holds=_plain)
def full_lengths_change_nothing(it: Trial) -> None:
    """Lengths that are those of the tensors hide nothing."""
    import torch

    lengths = torch.full((it.case.batch,), it.case.kv_len, dtype=torch.int32, device=it.device)
    _same_as(
        it,
        _extras(it.inputs(), kv_lengths=lengths),
        replace(it.case, lengths="kv"),
        "all lengths are full",
        bits=False,
    )


@law("options", draw=_plain_cases, holds=_plain)
def a_very_large_softcap_changes_nothing(it: Trial) -> None:
    """softcap * tanh(score / softcap) is the score where that is far below the cap: here within rounding."""
    inputs = it.inputs()
    case = replace(it.case, softcap=2.0**18)
    one, other = it(inputs), it(inputs, case)
    allowed = it.bounds(inputs)["out"] + it.bounds(inputs, case)["out"] + 1e-7
    it.close("out", other.out, one.out, allowed, "the softcap is 2^18, far above all scores")


@law(
    "options",
    draw=cases(options=(), lengths=_MORE, layouts=_DENSE, dims=((40, 40), (17, 17), (33, 100))),
    holds=lambda case: _plain(case) and case.scale is None,
)
def the_usual_scale_given_changes_nothing(it: Trial) -> None:
    """Without a scale it is head_dim ** -0.5; given as a number, nothing changes beyond rounding."""
    case = it.case
    given = replace(case, scale=case.softmax_scale * (1.0 + 2.0**-40))
    _same_as(it, it.inputs(), given, "the scale is head_dim ** -0.5, given as a number", bits=False)


_CHANGES: dict[str, dict[str, Any]] = {
    "causal": {"causal": "top-left"},
    "window": {"window": (2, 2)},
    "softcap": {"softcap": 0.25},
    "alibi": {"alibi": "geometric"},
    "bias": {"bias": "qk"},
    "mask": {"mask": "qk"},
    "sinks": {"sinks": True},
    "lengths": {"lengths": "kv"},
    "scale": {"scale": 2.0},
}


@law(
    "options",
    draw=cases(options=(), lengths=_MORE, layouts=_DENSE, dims=((64, 64), (40, 40), (32, 32))),
    holds=_plain,
)
def an_option_that_is_given_changes_the_output(it: Trial) -> None:
    """Each option, given strongly, changes the output by more than rounding: none is accepted and ignored."""
    import torch

    inputs = it.inputs()
    plain = it(inputs).out.double()
    tried = 0
    for option, changes in _CHANGES.items():
        case = replace(it.case, **changes)
        given = case.tensors(it.device)
        if option == "lengths":
            half = torch.full((case.batch,), max(1, case.kv_len // 2), dtype=torch.int32, device=it.device)
            given = _extras(given, kv_lengths=half)
        if option == "mask":
            seen = torch.ones((1, 1, case.q_len, case.kv_len), dtype=torch.bool, device=it.device)
            seen[..., ::2] = False
            given = _extras(given, mask=seen)
        if option == "bias" and given.extras.bias is not None:
            given = _extras(given, bias=(given.extras.bias * 4.0).contiguous())
        try:
            changed = it(given, case).out.double()
        except SetAside:
            continue
        tried += 1
        allowed = it.bounds(inputs)["out"] + it.bounds(given, case)["out"]
        it.true(
            bool(((changed - plain).abs() > allowed).any()),
            f"{option} was given ({', '.join(f'{n}={v!r}' for n, v in changes.items())}) and the output is the same"
            " within rounding: the option is ignored",
        )
    if not tried:
        raise SetAside("not supported: the method has none of the options")


@law(
    "options",
    draw=cases(always=("causal",), options=("causal", "softcap", "scale"), lengths=_MORE, layouts=_DENSE),
    holds=lambda case: case.causal != "none" and _bare(case),
)
def a_causal_mask_is_its_boolean_mask(it: Trial) -> None:
    """causal=True and the boolean mask that says the same give the same output."""
    _as_mask(it, replace(it.case, causal="none", mask="qk"), "the causal mask was given as a boolean mask")


@law(
    "options",
    draw=cases(always=("window",), options=("window", "softcap"), lengths=_MORE, layouts=_DENSE),
    holds=lambda case: case.window is not None and _bare(case, but="window"),
)
def a_window_is_its_boolean_mask(it: Trial) -> None:
    """A window and the boolean mask that says the same give the same output."""
    case = replace(it.case, causal="none", window=None, mask="qk")
    _as_mask(it, case, "the window was given as a boolean mask")


@law(
    "options",
    draw=cases(always=("lengths",), options=("lengths", "softcap"), lengths=_MORE, layouts=_DENSE),
    holds=lambda case: case.lengths == "kv" and case.causal == "none" and _bare(case, but="lengths"),
)
def lengths_are_their_boolean_mask(it: Trial) -> None:
    """Numbers of keys and the boolean mask that says the same give the same output."""
    _as_mask(it, replace(it.case, lengths="none", mask="bk"), "the lengths were given as a boolean mask")


def _as_mask(it: Trial, case: Case, why: str) -> None:
    inputs = it.inputs()
    if not it.case.q_len or not it.case.kv_len:
        return
    mask = visible(it.case, inputs)
    for axis, letter in enumerate("bhqk"):
        if letter not in case.mask:
            mask = mask.narrow(axis, 0, 1)
    given = _extras(inputs, mask=mask.contiguous(), kv_lengths=None, q_lengths=None)
    one, other = it(inputs), it(given, case)
    it.close("out", other.out, one.out, 2.0 * it.bounds(inputs)["out"], why)


@law(
    "options",
    draw=cases(always=("mask",), options=("mask", "causal", "softcap"), lengths=_MORE, layouts=_DENSE),
    holds=lambda case: case.mask != "none" and case.bias == "none" and case.kv_len > 0,
)
def a_mask_is_a_bias_of_minus_infinity(it: Trial) -> None:
    """A boolean mask and a bias of -inf where it hides give the same output; rows that see nothing included."""
    import torch

    inputs = it.inputs()
    mask = inputs.extras.mask
    assert mask is not None
    bias = torch.zeros(mask.shape, dtype=inputs.q.dtype, device=mask.device).masked_fill(~mask, -math.inf)
    given = _extras(inputs, mask=None, bias=bias)
    case = replace(it.case, mask="none", bias=it.case.mask)
    rows = visible(it.case, inputs).any(-1, keepdim=True)
    one, other = it(inputs), it(given, case)
    it.close(
        "out",
        torch.where(rows, other.out.double(), 0.0),
        torch.where(rows, one.out.double(), 0.0),
        2.0 * it.bounds(inputs)["out"],
        "the mask was given as a bias of -inf",
    )


@law(
    "options",
    draw=cases(always=("alibi",), options=("alibi", "causal", "softcap"), lengths=_MORE, layouts=_DENSE),
    holds=lambda case: case.alibi != "none" and case.bias == "none" and case.kv_len > 0,
)
def alibi_is_its_bias(it: Trial) -> None:
    """ALiBi and the bias -slope |i + shift - j| in float32 give the same output."""
    inputs = it.inputs()
    slopes = inputs.extras.alibi_slopes
    assert slopes is not None
    per_head = slopes.view(-1, it.case.heads, 1, 1)
    bias = (-per_head * distance(it.case, inputs).abs().float()).float()
    full = (
        it.case.batch if per_head.shape[0] > 1 else bias.shape[0],
        it.case.heads,
        it.case.q_len,
        it.case.kv_len,
    )
    given = _extras(inputs, alibi_slopes=None, bias=bias.expand(full).contiguous())
    case = replace(
        it.case,
        alibi="none",
        bias=("bhqk" if full[0] > 1 else "hqk") + ("" if it.case.dtype == "fp32" else ":fp32"),
    )
    one, other = it(inputs), it(given, case)
    allowed = it.bounds(inputs)["out"] + it.bounds(given, case)["out"]
    it.close("out", other.out, one.out, allowed, "ALiBi was given as a bias")


@law(
    "options",
    draw=cases(options=("causal", "window"), always=("softcap",), lengths=_MORE, layouts=_DENSE),
    holds=lambda case: case.bias == "none" and case.kv_len > 0 and not case.sinks,
)
def a_constant_bias_moves_the_lse_alone(it: Trial) -> None:
    """A bias of 6 everywhere, added after the softcap, cancels in the weights and moves the LSE by 6."""
    import torch

    inputs = it.inputs()
    bias = torch.full(
        (1, 1, it.case.q_len, it.case.kv_len), 6.0, dtype=inputs.q.dtype, device=inputs.q.device
    )
    given, case = _extras(inputs, bias=bias), replace(it.case, bias="qk")
    one, other = it(inputs), it(given, case)
    first, second = it.bounds(inputs), it.bounds(given, case)
    it.close("out", other.out, one.out, first["out"] + second["out"], "the bias is 6 everywhere")
    if one.lse is not None and other.lse is not None:
        it.close(
            "lse", other.lse, one.lse.double() + 6.0, first["lse"] + second["lse"], "the bias is 6 everywhere"
        )


@law(
    "options",
    draw=cases(options=("causal", "window", "softcap"), always=("sinks",), lengths=_MORE, layouts=_DENSE),
    holds=lambda case: case.sinks and case.kv_len > 0,
)
def a_sink_takes_its_share(it: Trial) -> None:
    """A sink scales the output by exp(lse without it - lse with it), and does not change which keys count."""
    import torch

    inputs = it.inputs()
    sinks = inputs.extras.sinks
    assert sinks is not None
    bare = replace(it.case, sinks=False)
    without = _extras(inputs, sinks=None)
    one, other = it(without, bare), it(inputs)
    if one.lse is None:
        raise SetAside("not supported: the method returns no log-sum-exp")
    whole = torch.logaddexp(one.lse.double(), sinks.double()[None, :, None])
    share = (one.lse.double() - whole).exp().nan_to_num(0.0).unsqueeze(-1)
    first, second = it.bounds(without, bare), it.bounds(inputs)
    want = one.out.double() * share
    allowed = first["out"] + second["out"] + want.abs() * (2.0 * first["lse"].nan_to_num(0.0).unsqueeze(-1))
    it.close("out", other.out, want, allowed, "a sink takes exp(sink) of the sum of the weights")
    if other.lse is not None:
        slack = first["lse"].nan_to_num(0.0, posinf=0.0) + second["lse"]
        it.close("lse", other.lse, whole, slack, "the log-sum-exp counts the sink")
