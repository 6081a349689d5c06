"""Laws about numbers: large, very negative, subnormal, infinite and undefined ones."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from effattn.properties.law import SetAside, Trial, law, parts, with_tensors
from effattn.properties.law_draws import cases
from effattn.properties.visible import visible

if TYPE_CHECKING:
    from effattn.case import Inputs

_DENSE = ("bhsd", "bhsd", "bshd+pad", "bhds")
_SOME = ("causal", "window", "mask", "lengths", "softcap", "alibi", "bias")


@law(
    "numbers",
    draw=cases(options=_SOME, values=("large-logits", "negative-logits", "growing-max", "outliers")),
    holds=lambda case: case.q_len > 0,
)
def no_logit_is_too_large_for_the_output(it: Trial) -> None:
    """Logits of any size, of either sign, give finite outputs: the maximum is subtracted before exp."""

    inputs = it.inputs()
    output = it(inputs)
    bad = (~output.out.isfinite()).nonzero()
    where = tuple(int(i) for i in bad[0]) if len(bad) else ()
    it.true(
        not len(bad),
        f"out{list(where)} is {float(output.out[where]) if where else 0.0!r}, one of {len(bad)} elements that are not finite;"
        " expected finite numbers, since all inputs are finite",
    )
    if output.lse is not None:
        seen = visible(it.case, inputs).any(-1)
        fine = output.lse.isfinite() | ~seen
        it.true(
            bool(fine.all()),
            "the log-sum-exp of a row that sees a key is not finite; expected a finite number",
        )


@law(
    "numbers",
    draw=cases(options=("causal", "mask", "lengths"), layouts=("bhsd", "bshd+pad")),
    holds=lambda case: (
        case.kv_len > 0
        and case.q_len > 0
        and case.head_dim > 1
        and not case.sinks
        and case.softcap is None
        and case.bias == case.alibi == "none"
    ),
)
def very_negative_scores_are_scores_like_others(it: Trial) -> None:
    """All scores moved down by hundreds give the same output: keys that are not there do not win by a score of 0."""

    inputs = it.inputs()
    # One column of q and k carries the shift, with the same product for every pair.
    q, k = inputs.q.clone(), inputs.k.clone()
    q[..., 0], k[..., 0] = 0.0, 0.0
    size = 2.0 ** round(math.log2(math.sqrt(300.0 / it.case.softmax_scale)))
    low_q, low_k = q.clone(), k.clone()
    low_q[..., 0], low_k[..., 0] = size, -size
    plain, low = with_tensors(inputs, q=q, k=k), with_tensors(inputs, q=low_q, k=low_k)
    one, other = it(plain), it(low)
    allowed = it.bounds(plain)["out"] + it.bounds(low)["out"]
    it.close("out", other.out, one.out, allowed, "all scores were moved down by the same hundreds")


@law(
    "numbers",
    draw=cases(options=(*_SOME, "sinks"), layouts=_DENSE),
    holds=lambda case: case.q_len > 0 and case.kv_len > 0,
    bits=True,
)
def nan_in_a_query_reaches_its_row_alone(it: Trial) -> None:
    """NaN in a query makes its row NaN, if it sees a key, and no other."""

    case, inputs = it.case, it.inputs()
    b, h, i = case.seed % case.batch, case.seed % case.heads, (case.seed * 13) % case.q_len
    q = inputs.q.clone()
    q[b, h, i, case.head_dim // 2] = math.nan
    one, other = it(inputs), it(with_tensors(inputs, q=q))
    want = one.out.clone()
    if bool(visible(case, inputs)[b, h, i].any()):
        want[b, h, i] = math.nan
    it.same(
        "out", other.out, want, f"NaN is in query {i} of entry {b}, head {h}, and nowhere else",
        slack=lambda: 2.0 * it.bounds(inputs)["out"],
    )  # fmt: skip


@law(
    "numbers",
    draw=cases(options=(*_SOME, "sinks"), layouts=_DENSE),
    holds=lambda case: case.q_len > 0 and case.kv_len > 0,
    bits=True,
)
def nan_in_a_key_reaches_the_rows_that_see_it(it: Trial) -> None:
    """NaN in a key makes NaN of the rows that see it, and leaves all others their bits."""
    case, inputs = it.case, it.inputs()
    b, h, j = case.seed % case.batch, case.seed % case.kv_heads, (case.seed * 13) % case.kv_len
    k = inputs.k.clone()
    k[b, h, j, case.head_dim // 2] = math.nan
    _reaches(
        it, inputs, with_tensors(inputs, k=k), b, h, j, None, f"NaN is in key {j} of entry {b}, KV head {h}"
    )


@law(
    "numbers",
    draw=cases(options=(*_SOME, "sinks"), layouts=_DENSE),
    holds=lambda case: case.q_len > 0 and case.kv_len > 0,
    bits=True,
)
def nan_in_a_value_reaches_the_rows_that_see_it(it: Trial) -> None:
    """NaN in one element of V makes NaN of its column in the rows that see it, and leaves all else its bits."""
    case, inputs = it.case, it.inputs()
    b, h, j = case.seed % case.batch, case.seed % case.kv_heads, (case.seed * 13) % case.kv_len
    c = (case.seed * 3) % case.v_dim
    v = inputs.v.clone()
    v[b, h, j, c] = math.nan
    _reaches(
        it,
        inputs,
        with_tensors(inputs, v=v),
        b,
        h,
        j,
        c,
        f"NaN is in V of key {j} of entry {b}, KV head {h}, column {c}",
    )


def _reaches(
    it: Trial, plain: Inputs, dirty: Inputs, b: int, h: int, j: int, column: int | None, why: str
) -> None:
    case = it.case
    group = case.heads // case.kv_heads
    seen = visible(case, plain)[b, h * group : (h + 1) * group, :, j]
    it.hid |= it.nan_safe and not bool(seen.all())
    one, other = it(plain), it(dirty)
    want = one.out.clone()
    part = want[b, h * group : (h + 1) * group]
    if column is None:
        part[seen] = math.nan
    else:
        part[..., column][seen] = math.nan
    got = other.out
    if not it.nan_safe:
        # What the other rows of this head then hold is not promised.
        got = got.clone()
        here, rest = (x[b, h * group : (h + 1) * group] for x in (got, want))
        here[~seen] = rest[~seen]
    it.same("out", got, want, why, slack=lambda: 2.0 * it.bounds(plain)["out"])


@law(
    "numbers",
    draw=cases(options=("causal", "mask", "window"), layouts=_DENSE),
    holds=lambda case: case.q_len > 0 and case.kv_len > 0,
)
def values_near_the_largest_number_do_not_overflow(it: Trial) -> None:
    """Values of nine tenths of the largest number of the dtype give that number: no sum passes it on the way."""
    import torch

    inputs = it.inputs()
    # fp32 accumulators hold the unnormalised sum, which may pass the largest float32 number.
    most = 0.9 * torch.finfo(it.case.torch_dtype).max / (1.0 if it.case.dtype == "fp16" else 4096.0)
    v = torch.full_like(inputs.v, most)
    given = with_tensors(inputs, v=v)
    seen = visible(it.case, inputs).any(-1, keepdim=True)
    want = torch.where(seen, v.double()[0, 0, 0, 0], 0.0).expand(*seen.shape[:3], it.case.v_dim)
    it.close("out", it(given).out, want, it.bounds(given)["out"], f"every V is {most:.6g}")


@law(
    "numbers",
    draw=cases(options=("causal", "window", "mask", "softcap"), layouts=_DENSE),
    holds=lambda case: case.kv_len > 0 and case.q_len > 0,
)
def products_beyond_the_range_of_fp16_are_right(it: Trial) -> None:
    """Q and K of 64 times the usual, with the scale that takes it back: products pass 65504, scores do not."""
    inputs, case = it.inputs(), it.case
    given = replace(case, scale=case.softmax_scale * 2.0**-12)
    large = with_tensors(inputs, q=inputs.q * 64.0, k=inputs.k * 64.0)
    one, other = it(inputs), it(large, given)
    allowed = it.bounds(inputs)["out"] + it.bounds(large, given)["out"]
    it.close(
        "out", other.out, one.out, allowed, "Q and K were multiplied by 64 and the scale divided by 4096"
    )


@law(
    "numbers",
    draw=cases(options=("causal", "mask"), layouts=_DENSE, values=("subnormal",)),
    holds=lambda case: case.values == "subnormal" and case.kv_len > 0 and case.q_len > 0,
)
def subnormal_inputs_are_not_zero(it: Trial) -> None:
    """Subnormal values count: the output is what the envelope allows around the exact one, and not 0."""
    from effattn.properties.allowance import exact

    inputs = it.inputs()
    want = exact(it.case, inputs)["out"]
    it.close("out", it(inputs).out, want, it.bounds(inputs)["out"], "the inputs are subnormal")


@law(
    "numbers",
    draw=cases(always=("bias",), options=("bias", "causal", "softcap"), layouts=("bhsd", "bshd+pad")),
    holds=lambda case: (
        case.bias != "none" and case.kv_len > 1 and case.q_len > 0 and not case.sinks and case.mask == "none"
    ),
    bits=True,
)
def a_logit_of_minus_infinity_has_no_weight(it: Trial) -> None:
    """A bias of -inf at a key, first keys included, takes its weight away: finite V there does not show."""
    import torch

    case, inputs = it.case, it.inputs()
    bias = inputs.extras.bias
    assert bias is not None
    if bias.shape[3] == 1:
        raise SetAside("the bias does not vary along the keys")
    # All keys but the last ones: whole tiles of -inf come first.
    n = max(1, case.kv_len - 1 - case.seed % 3)
    bias = bias.clone()
    bias[..., :n] = -math.inf
    given = type(inputs)(*inputs, extras=replace(inputs.extras, bias=bias))
    v = given.v.clone()
    v[:, :, :n] = 1.0
    seen = visible(case, inputs)[..., n:].any(-1)
    one, other = it(given), it(with_tensors(given, v=v))
    for (name, got), (_, want) in zip(parts(other), parts(one), strict=True):
        rows = seen if name == "lse" else seen.unsqueeze(-1)
        got, want = (torch.where(rows, x.double(), 0.0) for x in (got, want))
        it.same(
            name,
            got,
            want,
            f"V of the first {n} keys, whose logits are -inf, became 1",
            slack=lambda name=name: 2.0 * it.bounds(given)[name],
        )
        it.true(
            not bool(got.isnan().any()), f"{name} is NaN in a row with first keys of -inf; expected a number"
        )


@law(
    "numbers",
    draw=cases(
        options=("causal",),
        layouts=("bhsd",),
        lengths=(64, 65, 97, 129),
        values=("repeated-max",),
        dims=((64, 64), (40, 40)),
    ),
    holds=lambda case: (
        case.values == "repeated-max" and case.q_len * case.v_dim * case.heads >= 512 and case.kv_len >= 16
    ),
)
def a_repeated_maximum_leaves_no_one_sided_error(it: Trial) -> None:
    """With keys that repeat the row's maximum and V of one sign, signed errors average out: their mean is that of rounding.

    After arXiv 2510.04212. The mean of n errors of deviation sigma lies within 7 sigma / sqrt(n), n taken as the number
    of rows, since the elements of a row share their weights: probability of an alarm 3e-12.
    """
    from effattn.properties.allowance import errors

    inputs = it.inputs()
    z = errors(it.case, inputs, it.numerics(it.case), it(inputs))
    rows = z.mean(-1).flatten()
    mean, most = float(rows.mean()), 7.0 / math.sqrt(max(1, rows.numel()))
    it.true(
        abs(mean) <= most,
        f"the mean of error/sigma over {rows.numel()} rows is {mean:.3f}; expected within {most:.3f} of 0: errors are one-sided",
    )
