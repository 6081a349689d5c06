"""Laws about what a query does not see: it has no influence at all, NaN and infinity included."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from effattn.properties.law import Trial, law, parts, with_tensors
from effattn.properties.law_draws import cases
from effattn.properties.visible import distance, visible

if TYPE_CHECKING:
    import torch

    from effattn.case import Case

_LONG = (17, 33, 64, 65, 97, 129)
_PLAIN_KV = ("bhsd", "bhsd", "bshd", "bhsd+pad", "bshd+pad+offset", "bhds")


def _only_causal(case: Case) -> bool:
    return case.window is None and case.alibi == case.bias == case.mask == case.lengths == "none"


def _nothing_hidden(case: Case) -> bool:
    return case.causal == "none" and _only_causal(case)


def _at_keys(x: torch.Tensor, keys: torch.Tensor, value: float) -> torch.Tensor:
    """K or V with a value at the marked keys, (batch, kv_len) bool."""
    return x.masked_fill(keys[:, None, :, None], value)


def _unchanged(it: Trial, keys: torch.Tensor, why: str, *, value: float, names: str = "kv") -> None:
    """Rows that see none of the marked keys, (batch, kv_len) bool, keep their bits when these hold `value`."""
    import torch

    inputs = it.inputs()
    sees = (visible(it.case, inputs) & keys[:, None, None, :]).any(-1)
    if bool(sees.all()) or not bool(keys.any()):
        return
    poisoned = with_tensors(inputs, **{name: _at_keys(getattr(inputs, name), keys, value) for name in names})
    one, other = it(inputs), it(poisoned)
    for (name, got), (_, want) in zip(parts(other), parts(one), strict=True):
        hidden = sees if name == "lse" else sees.unsqueeze(-1)
        it.same(
            name,
            torch.where(hidden, 0.0, got.double()),
            torch.where(hidden, 0.0, want.double()),
            f"{why}: {' and '.join(names.upper())} there became {value} and the row does not see it",
            slack=lambda name=name: 2.0 * it.bounds(inputs)[name],
        )


def _from(it: Trial, fraction: float) -> torch.Tensor:
    """Marks the last keys from a share of the length on."""
    import torch

    start = int(it.case.kv_len * fraction)
    return (torch.arange(it.case.kv_len, device=it.device) >= start).expand(it.case.batch, -1)


@law(
    "masks",
    draw=cases(
        always=("causal",), options=("causal", "softcap", "alibi", "bias", "sinks", "scale"), lengths=_LONG
    ),
    holds=lambda case: case.causal != "none" and case.kv_len > 1,
    bits=True,
)
def future_keys_have_no_influence(it: Trial) -> None:
    """Under a causal mask, K and V at later positions never change a row, whatever they hold."""
    for fraction in (0.4, 0.8):
        _unchanged(it, _from(it, fraction), "future keys", value=it.garbage())


@law(
    "masks",
    draw=cases(always=("window",), options=("window", "causal", "softcap", "sinks"), lengths=_LONG),
    holds=lambda case: case.window is not None and case.kv_len > 1,
    bits=True,
)
def keys_outside_the_window_have_no_influence(it: Trial) -> None:
    """K and V outside of a row's window never change it, whatever they hold."""
    _unchanged(it, _from(it, 0.5), "keys outside the window", value=it.garbage())
    _unchanged(it, ~_from(it, 0.5), "keys outside the window", value=it.garbage())


@law(
    "masks",
    draw=cases(always=("mask",), options=("mask", "causal", "softcap", "sinks"), lengths=_LONG),
    holds=lambda case: case.mask != "none" and case.kv_len > 1,
    bits=True,
)
def masked_keys_have_no_influence(it: Trial) -> None:
    """K and V at keys that a row's mask hides never change it, whatever they hold."""
    inputs = it.inputs()
    if not it.case.q_len:
        return
    seen = visible(it.case, inputs)
    # Keys that the first row of the middle does not see, and keys that nobody sees.
    row = it.case.q_len // 2
    _unchanged(it, ~seen[:, 0, row], "masked keys", value=it.garbage())
    _unchanged(it, ~seen.flatten(1, 2).any(1), "keys that nobody sees", value=it.garbage())


@law(
    "masks",
    draw=cases(
        always=("lengths",), options=("lengths", "causal", "softcap", "sinks", "window"), lengths=_LONG
    ),
    holds=lambda case: case.lengths != "none" and case.kv_len > 1,
    bits=True,
)
def keys_beyond_the_length_have_no_influence(it: Trial) -> None:
    """What unused slots of a padded K and V hold never shows, NaN and infinity included."""
    import torch

    lengths = it.inputs().extras.kv_lengths
    assert lengths is not None
    keys = torch.arange(it.case.kv_len, device=it.device) >= lengths[:, None]
    _unchanged(it, keys, "keys beyond the length", value=it.garbage())


@law(
    "masks",
    draw=cases(always=("lengths",), options=("lengths", "causal", "softcap", "alibi"), lengths=_LONG),
    holds=lambda case: case.lengths == "both" and case.q_len > 1,
    bits=True,
)
def padding_rows_of_q_have_no_influence(it: Trial) -> None:
    """What the padding rows of Q hold never changes another row, and their own output is 0."""
    import torch

    inputs = it.inputs()
    lengths = inputs.extras.q_lengths
    assert lengths is not None
    padding = torch.arange(it.case.q_len, device=it.device) >= lengths[:, None]
    poisoned = with_tensors(inputs, q=inputs.q.masked_fill(padding[:, None, :, None], it.garbage(keys=False)))
    one, other = it(inputs), it(poisoned)
    it.same(
        "out",
        other.out,
        one.out,
        "only padding rows of Q were changed",
        slack=lambda: 2.0 * it.bounds(inputs)["out"],
    )


@law(
    "masks",
    draw=cases(always=("bias",), options=("bias", "causal", "window", "lengths", "mask"), lengths=_LONG),
    holds=lambda case: (
        case.bias.partition(":")[0] in ("bhqk", "qk", "hqk")
        and (
            case.causal != "none" or case.window is not None or case.lengths != "none" or case.mask != "none"
        )
    ),
    bits=True,
)
def a_bias_at_hidden_keys_has_no_influence(it: Trial) -> None:
    """What the bias holds where a key is hidden never shows, NaN and infinity included."""
    inputs = it.inputs()
    bias = inputs.extras.bias
    assert bias is not None
    hidden = ~visible(it.case, inputs)
    for axis, size in enumerate(bias.shape):
        if size == 1:
            hidden = hidden.all(axis, keepdim=True)
    changed = type(inputs)(
        *inputs, extras=replace(inputs.extras, bias=bias.masked_fill(hidden, it.garbage(keys=False)))
    )
    if not bool(hidden.any()):
        return
    one, other = it(inputs), it(changed)
    it.same(
        "out", other.out, one.out, f"the bias became {it.garbage(keys=False)} where the key is hidden",
        slack=lambda: 2.0 * it.bounds(inputs)["out"],
    )  # fmt: skip


@law(
    "masks",
    draw=cases(
        options=("causal", "window", "mask", "lengths", "alibi", "bias", "softcap"),
        lengths=_LONG,
        values=("normal", "large-logits"),
        change=lambda draw, fields: (
            {"causal": "bottom-right", "q_len": fields["kv_len"] + draw.pick((1, 16, 70))}
            if draw.chance(0.5)
            else {}
        ),
    ),
    holds=lambda case: case.q_len > 0,
    bits=True,
    quantised=True,
)
def a_row_that_sees_no_key_is_zero(it: Trial) -> None:
    """A row that sees no key has output 0 and LSE -inf (with a sink: the sink), never NaN."""
    import torch

    inputs = it.inputs()
    empty = ~visible(it.case, inputs).any(-1)
    if not bool(empty.any()):
        return
    output = it(inputs)
    got = torch.where(empty.unsqueeze(-1), output.out.double(), 0.0)
    it.same("out", got, torch.zeros_like(got), "a row that sees no key has output 0")
    if output.lse is not None and not it.case.sinks:
        got = torch.where(empty, output.lse.double(), -math.inf)
        it.same(
            "lse", got, torch.full_like(got, -math.inf), "a row that sees no key has the log-sum-exp -inf"
        )


@law(
    "masks",
    draw=cases(change=lambda draw, fields: {"kv_len": 0}),
    holds=lambda case: case.kv_len == 0 and case.q_len > 0,
    quantised=True,
)
def without_keys_the_output_is_zero(it: Trial) -> None:
    """With kv_len 0 the output is all zeros, written, not left as the memory was."""
    import torch

    output = it(it.inputs())
    it.same("out", output.out, torch.zeros_like(output.out), "there is no key, so the output is 0")


@law(
    "masks",
    draw=cases(options=("softcap", "scale", "sinks"), lengths=_LONG, layouts=("bhsd", "bshd+pad")),
    holds=lambda case: _nothing_hidden(case) and case.kv_len > 0,
)
def appended_hidden_keys_change_nothing(it: Trial) -> None:
    """K and V with more keys that the lengths hide, NaN in them, give the same output."""
    import torch

    case, inputs = it.case, it.inputs()
    more = 1 + it.case.seed % 70
    longer = replace(case, kv_len=case.kv_len + more, lengths="kv")
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, more), value=it.garbage()) for x in (inputs.k, inputs.v))
    lengths = torch.full((case.batch,), case.kv_len, dtype=torch.int32, device=inputs.q.device)
    padded = type(inputs)(inputs.q, k, v, extras=replace(inputs.extras, kv_lengths=lengths))
    one, other = it(inputs), it(padded, longer)
    it.close("out", other.out, one.out, 2.0 * it.bounds(inputs)["out"], f"{more} hidden keys were appended")


@law(
    "masks",
    draw=cases(
        always=("causal",),
        options=("causal", "softcap", "scale", "sinks"),
        lengths=_LONG,
        layouts=("bhsd", "bshd+pad"),
        change=lambda draw, fields: {"causal": "bottom-right", "kv_len": fields["q_len"]},
    ),
    holds=lambda case: case.causal == "bottom-right" and case.q_len == case.kv_len > 1 and _only_causal(case),
)
def the_last_queries_of_a_prefill_are_those_of_a_chunk(it: Trial) -> None:
    """With bottom-right alignment the last queries alone, against all keys, are the last rows of the whole."""
    case, inputs = it.case, it.inputs()
    rows = 1 + case.seed % (case.q_len - 1)
    part = replace(case, q_len=rows)
    one, other = it(inputs), it(with_tensors(inputs, q=inputs.q[:, :, -rows:]), part)
    allowed = 2.0 * it.bounds(inputs)["out"][:, :, -rows:]
    it.close("out", other.out, one.out[:, :, -rows:], allowed, f"the last {rows} queries alone")


@law(
    "masks",
    draw=cases(
        always=("causal",),
        options=("causal", "softcap", "scale"),
        lengths=_LONG,
        layouts=("bhsd", "bshd+pad"),
        change=lambda draw, fields: {
            "causal": "top-left",
            "kv_len": fields["q_len"] + draw.pick((1, 16, 33)),
        },
    ),
    holds=lambda case: case.causal == "top-left" and 0 < case.q_len < case.kv_len and _only_causal(case),
)
def with_top_left_alignment_later_keys_are_not_seen(it: Trial) -> None:
    """With top-left alignment query i sees the keys up to i, so keys from q_len on may be left out."""
    case, inputs = it.case, it.inputs()
    square = replace(case, kv_len=case.q_len)
    cut = with_tensors(inputs, k=inputs.k[:, :, : case.q_len], v=inputs.v[:, :, : case.q_len])
    one, other = it(inputs), it(cut, square)
    it.close(
        "out", other.out, one.out, 2.0 * it.bounds(inputs)["out"], "the keys from q_len on were left out"
    )


@law(
    "masks",
    draw=cases(
        always=("window",), options=("window",), lengths=(33, 64, 65, 97, 129), layouts=("bhsd", "bshd")
    ),
    holds=lambda case: case.window is not None and case.q_len > 1 and case.kv_len > 1,
)
def the_edges_of_the_window_are_seen(it: Trial) -> None:
    """The first and the last key of a row's window change the row, and the next ones outside do not."""
    _edge(it, lambda d, sees: _last_of(d, sees, first=True), "the first key of the window")
    _edge(it, lambda d, sees: _last_of(d, sees, first=False), "the last key of the window")


@law(
    "masks",
    draw=cases(
        always=("causal",), options=("causal",), lengths=(17, 33, 64, 65, 97), layouts=("bhsd", "bshd")
    ),
    holds=lambda case: case.causal != "none" and case.q_len > 1 and case.kv_len > 1,
)
def the_diagonal_is_seen(it: Trial) -> None:
    """The last key that a causal mask leaves to a row changes the row."""
    _edge(it, lambda d, sees: _last_of(d, sees, first=False), "the last key before the future")


def _last_of(d: torch.Tensor, sees: torch.Tensor, *, first: bool) -> int:
    keys = sees.nonzero().flatten()
    return int(keys[0] if first else keys[-1])


def _edge(it: Trial, choose: Callable[[torch.Tensor, torch.Tensor], int], what: str) -> None:
    """The key at the edge of a row's view: with a V of its own there, the row changes; one further, it does not."""
    inputs = it.inputs()
    seen = visible(it.case, inputs)[0, 0]
    rows = [i for i in range(it.case.q_len) if bool(seen[i].any())]
    if not rows:
        return
    row = rows[len(rows) // 2]
    key = choose(distance(it.case, inputs)[0, 0, row], seen[row])
    # All queries and keys alike, so that each key that is seen has the same, noticeable, weight.
    plain = with_tensors(inputs, q=inputs.q * 0.0, v=inputs.v * 0.0)
    marked = plain.v.clone()
    marked[0, 0, key] = 1.0
    out = it(with_tensors(plain, v=marked)).out.double()[0, 0, row]
    share = 1.0 / int(seen[row].sum())
    it.true(
        bool((out > 0.4 * share).all()),
        f"out[0, 0, {row}] is {float(out.min())!r} where V is 1 at key {key}, {what}, and 0 elsewhere: expected"
        f" about {share:.4g}, since the row sees {int(seen[row].sum())} keys with equal scores",
    )
    for outside in (key - 1, key + 1):
        if 0 <= outside < it.case.kv_len and not bool(seen[row, outside]):
            marked = plain.v.clone()
            marked[0, 0, outside] = 1.0
            out = it(with_tensors(plain, v=marked)).out.double()[0, 0, row]
            it.true(
                bool((out == 0.0).all()),
                f"out[0, 0, {row}] is {float(out.abs().max())!r} where V is 1 at key {outside} alone, which the row"
                f" does not see; expected 0",
            )
