"""Laws about what the output is made of: weights that sum to one, times V."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from effattn.properties.law import Trial, law, with_tensors
from effattn.properties.law_draws import FEW, cases
from effattn.properties.visible import visible

if TYPE_CHECKING:
    import torch

    from effattn.case import Case

#: options that only change scores, or what is visible
_ALL_BUT_SINKS = ("causal", "window", "softcap", "alibi", "bias", "mask", "lengths", "scale")


def _for_heads(case: Case, x: torch.Tensor) -> torch.Tensor:
    """K or V with one entry for each query head."""
    return x.repeat_interleave(case.heads // case.kv_heads, dim=1)


def _grid(x: torch.Tensor, step: float, most: float) -> torch.Tensor:
    """Values on a coarse grid, so that their sums are exact in every dtype."""
    return ((x.double() / step).round() * step).clamp(-most, most).to(x.dtype)


@law(
    "values",
    draw=cases(options=_ALL_BUT_SINKS, change=lambda draw, fields: {"kv_len": 1}),
    holds=lambda case: case.kv_len == 1 and not case.sinks and case.q_len > 0,
    bits=True,
)
def one_key_returns_its_value(it: Trial) -> None:
    """A query that sees one key gets its value: the weight is exp(0) / exp(0) = 1, without any rounding."""
    inputs = it.inputs()
    seen = visible(it.case, inputs)[..., 0]
    want = _for_heads(it.case, inputs.v).expand(-1, -1, it.case.q_len, -1)
    want = want.double().masked_fill(~seen.unsqueeze(-1), 0.0)
    it.same("out", it(inputs).out, want, "the row sees one key, and the output is its V")


@law("values", draw=cases(), holds=lambda case: case.kv_len > 0 and not case.sinks)
def equal_values_are_returned(it: Trial) -> None:
    """Where all values are the same row, every query that sees a key gets this row."""
    inputs = it.inputs()
    inputs = with_tensors(inputs, v=inputs.v[:, :, :1].expand_as(inputs.v))
    seen = visible(it.case, inputs).any(-1, keepdim=True)
    want = _for_heads(it.case, inputs.v)[:, :, :1].double().masked_fill(~seen, 0.0)
    it.close("out", it(inputs).out, want, it.bounds(inputs)["out"], "all keys have this V")


@law("values", draw=cases(), holds=lambda case: case.kv_len > 0)
def output_lies_between_the_smallest_and_the_largest_value(it: Trial) -> None:
    """Weights are not negative and sum to one (with a sink, to less), so the output lies in the hull of the V seen."""
    import torch

    inputs = it.inputs()
    seen = visible(it.case, inputs)
    v = _for_heads(it.case, inputs.v).double()
    low, high = (
        torch.stack([_extreme(v[:, :, :, c], seen, top) for c in range(it.case.v_dim)], -1)
        for top in (False, True)
    )
    if it.case.sinks:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    bound = it.bounds(inputs)["out"]
    out = it(inputs).out.double()
    it.close(
        "out",
        out,
        torch.minimum(torch.maximum(out, low), high),
        bound,
        "the output lies in the hull of the V seen",
    )


def _extreme(column: torch.Tensor, seen: torch.Tensor, top: bool) -> torch.Tensor:
    filled = column.unsqueeze(2).masked_fill(~seen, -math.inf if top else math.inf)
    extreme = filled.amax(-1) if top else filled.amin(-1)
    return extreme.masked_fill(~seen.any(-1), 0.0)


@law(
    "values",
    draw=cases(options=("causal", "window", "softcap", "mask", "lengths", "scale")),
    holds=lambda case: case.kv_len > 0 and not case.sinks and case.bias == "none" and case.alibi == "none",
)
def equal_scores_average_the_values(it: Trial) -> None:
    """A query of zeros gives every key the same score: the output is the mean of the V seen, the LSE log of how many."""
    inputs = it.inputs()
    inputs = with_tensors(inputs, q=inputs.q * 0.0)
    seen = visible(it.case, inputs).double()
    count = seen.sum(-1, keepdim=True)
    mean = seen @ _for_heads(it.case, inputs.v).double() / count.clamp(min=1.0)
    output, bounds = it(inputs), it.bounds(inputs)
    it.close(
        "out", output.out, mean, bounds["out"], "all scores are 0, and the output is the mean of the V seen"
    )
    if output.lse is not None:
        it.close(
            "lse", output.lse, count.squeeze(-1).log(), bounds["lse"], "the log of the number of keys seen"
        )


@law(
    "values",
    draw=cases(
        options=("causal", "mask", "lengths"),
        lengths=(15, 16, 17, 33, 64, 65, 97, 129),
        dims=((64, 64), (40, 40)),
    ),
    holds=lambda case: (
        case.kv_len > 1
        and case.head_dim > 1
        and not case.sinks
        and case.scale is None
        and case.softcap is None
        and case.bias == case.alibi == "none"
    ),
    bits=True,
)
def a_dominant_key_wins(it: Trial) -> None:
    """Where one score lies 250 above all others, whose weights underflow to 0, the output is its V."""
    import torch

    inputs = it.inputs()
    seen = visible(it.case, inputs)
    key = (it.case.seed * 7 + it.case.kv_len // 2) % it.case.kv_len
    size = math.sqrt(250.0 / it.case.softmax_scale)
    q, k = torch.zeros_like(inputs.q), torch.zeros_like(inputs.k)
    q[..., 0] = size
    k[:, :, key, 0] = size
    rows = seen[..., key].unsqueeze(-1)
    v = inputs.v
    want = _for_heads(it.case, v)[:, :, key].unsqueeze(2).double()
    out = it(with_tensors(inputs, q=q, k=k)).out
    if not bool(rows.any()):
        return
    it.same(
        "out",
        torch.where(rows, out.double(), 0.0),
        torch.where(rows, want, 0.0),
        f"key {key} has a score of 250 and all others one of 0, so the output is its V",
    )


@law("values", draw=cases(), holds=lambda case: case.kv_len > 0, bits=True)
def values_times_a_power_of_two_scale_the_output(it: Trial) -> None:
    """V times 4 gives the output times 4: every product and sum scales without rounding, underflow apart."""
    import torch

    inputs = it.inputs()
    one = it(inputs).out.double()
    four = it(with_tensors(inputs, v=inputs.v * 4.0)).out.double()
    # Below the normal numbers a rounding does not scale, and above a sixteenth of the largest sums may overflow.
    info = torch.finfo(it.case.torch_dtype)
    fair = (one.abs() >= 64.0 * info.tiny) & (one.abs() <= info.max / 16.0)
    it.same(
        "out",
        torch.where(fair, four, 0.0),
        torch.where(fair, one * 4.0, 0.0),
        "V was multiplied by 4, and so is the output",
        slack=lambda: 8.0 * it.bounds(inputs)["out"],
    )


@law("values", draw=cases(), holds=lambda case: case.kv_len > 0, bits=True)
def negated_values_negate_the_output(it: Trial) -> None:
    """-V gives minus the output: rounding to nearest, and rounding toward zero, are symmetric."""
    inputs = it.inputs()
    it.same(
        "out",
        it(with_tensors(inputs, v=-inputs.v)).out,
        -it(inputs).out.double(),
        "V was negated, and so is the output",
        slack=lambda: 2.0 * it.bounds(inputs)["out"],
    )


@law(
    "values",
    draw=cases(
        options=("causal", "window", "softcap", "alibi", "bias", "mask", "sinks", "lengths"),
        layouts=("bhsd", "bshd+pad"),
    ),
    holds=lambda case: case.kv_len > 0,
    bits=True,
)
def a_power_of_two_moves_between_q_and_scale(it: Trial) -> None:
    """Q times 2 with half the scale is the same problem, to the bit: both multiplications are exact."""
    inputs, case = it.inputs(), it.case
    moved = replace(case, scale=case.softmax_scale / 2.0)
    one, other = it(inputs), it(with_tensors(inputs, q=inputs.q * 2.0), moved)
    bounds = None

    def slack(name: str) -> torch.Tensor:
        nonlocal bounds
        bounds = it.bounds(inputs) if bounds is None else bounds
        return 2.0 * bounds[name]

    why = "Q was doubled and the scale halved"
    it.same("out", other.out, one.out, why, slack=lambda: slack("out"))
    if one.lse is not None and other.lse is not None:
        it.same("lse", other.lse, one.lse, why, slack=lambda: slack("lse"))


@law(
    "values",
    draw=cases(
        options=("causal", "window", "mask", "lengths", "alibi", "bias"), layouts=("bhsd", "bshd+pad")
    ),
    holds=lambda case: case.kv_len > 0 and not case.sinks and case.softcap is None,
)
def a_vector_added_to_every_key_changes_nothing(it: Trial) -> None:
    """K + c moves all scores of a row by the same amount, which cancels; the LSE moves by scale q.c."""
    inputs = it.inputs()
    if not it.case.q_len:
        return
    q, k = _grid(inputs.q, 0.25, 2.0), _grid(inputs.k, 0.125, 2.0)
    c = _grid(inputs.k[:, :, :1] * 0.0 + inputs.q[:1, :1, :1, :] * 1.0, 0.125, 1.0)
    plain, moved = with_tensors(inputs, q=q, k=k), with_tensors(inputs, q=q, k=k + c)
    one, other = it(plain), it(moved)
    first, second = it.bounds(plain), it.bounds(moved)
    why = "one vector was added to all keys"
    it.close("out", other.out, one.out, first["out"] + second["out"], why)
    if one.lse is not None and other.lse is not None:
        step = it.case.softmax_scale * (q.double() * _for_heads(it.case, c).double()).sum(-1)
        it.close("lse", other.lse.double() - step, one.lse, first["lse"] + second["lse"], why)


@law("values", draw=cases(layouts=("bhsd", "bshd+pad")), holds=lambda case: case.kv_len > 0)
def the_output_is_additive_in_the_values(it: Trial) -> None:
    """attention(V + W) = attention(V) + attention(W): the weights do not know V."""
    import torch

    inputs = it.inputs()
    v = _grid(inputs.v, 0.125, 2.0)
    w = v.flip(2)
    three = [with_tensors(inputs, v=x) for x in (v, w, v + w)]
    outs = [it(x).out.double() for x in three]
    allowed = torch.stack([it.bounds(x)["out"] for x in three]).sum(0)
    it.close("out", outs[2], outs[0] + outs[1], allowed, "V is the sum of two, and so is the output")


@law(
    "values",
    draw=cases(
        lengths=(1, 15, 16, 17, 33, 40, 64),
        layouts=("bhsd", "bshd+pad"),
        # As many columns as keys: in the first cases as many as other laws have, padded.
        change=lambda draw, fields: {"kv_len": draw.pick((33, 40))} if fields["seed"] < FEW else {},
    ),
    holds=lambda case: 0 < case.kv_len <= 64,
)
def one_hot_values_show_weights_that_sum_to_one(it: Trial) -> None:
    """With V = identity the output is the matrix of weights: none negative, none for hidden keys, summing to one."""
    import torch

    case, inputs = it.case, it.inputs()
    wide = replace(case, v_dim=case.kv_len)
    eye = torch.eye(case.kv_len, dtype=case.torch_dtype, device=inputs.v.device)
    inputs = with_tensors(inputs, v=eye.expand(case.batch, case.kv_heads, -1, -1).contiguous())
    if wide.backward:
        inputs.extras = replace(inputs.extras, d_out=None)
    seen = visible(case, inputs)
    weights = it(inputs, wide).out.double()
    bounds = it.bounds(inputs, wide)["out"]
    zeros = torch.zeros_like(weights)
    it.close("weights", torch.where(seen, zeros, weights), zeros, zeros, "a hidden key has weight 0")
    it.close("weights", weights.clamp(max=0.0), zeros, zeros, "no weight is negative")
    total = weights.sum(-1)
    if case.sinks:
        allowed = bounds.sum(-1)
        it.close(
            "sums of weights", total, total.clamp(0.0, 1.0), allowed, "with a sink, weights sum to at most 1"
        )
    else:
        want = seen.any(-1).double()
        it.close(
            "sums of weights",
            total,
            want,
            bounds.sum(-1),
            "the weights of a row sum to 1, or 0 if it sees no key",
        )


@law("values", draw=cases(), holds=lambda case: case.kv_len > 0 and case.v_dim > 1, bits=True)
def columns_of_v_do_not_mix(it: Trial) -> None:
    """Reversing the columns of V reverses those of the output: a column of the output depends on its column of V alone."""
    inputs = it.inputs()
    it.same(
        "out",
        it(with_tensors(inputs, v=inputs.v.flip(-1))).out,
        it(inputs).out.flip(-1),
        "the columns of V were reversed",
        slack=lambda: 2.0 * it.bounds(inputs)["out"].flip(-1),
    )


@law(
    "values",
    draw=cases(dims=((40, 40), (17, 17), (33, 33), (64, 64))),
    holds=lambda case: case.kv_len > 0 and case.q_len > 0,
)
def columns_of_zeros_in_q_and_k_change_nothing(it: Trial) -> None:
    """Q and K with columns of zeros appended have the same products; the scale is that of the first."""
    import torch

    case, inputs = it.case, it.inputs()
    wide = replace(case, head_dim=case.head_dim + 8, v_dim=case.v_dim, scale=case.softmax_scale)
    padded = with_tensors(
        inputs, q=torch.nn.functional.pad(inputs.q, (0, 8)), k=torch.nn.functional.pad(inputs.k, (0, 8))
    )
    one, other = it(inputs), it(padded, wide)
    allowed = it.bounds(inputs)["out"] + it.bounds(padded, wide)["out"]
    it.close("out", other.out, one.out, allowed, "eight columns of zeros were appended to Q and K")
