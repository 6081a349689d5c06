"""Laws about batches, heads, rows, strides and splits: what a row's answer must not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effattn.properties.law import SetAside, Trial, law, parts, twin
from effattn.properties.law_draws import cases
from effattn.properties.visible import visible

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from effattn.case import Case, Inputs

_DENSE = ("bhsd", "bhsd", "bshd+pad")
_ORDERLY = ("softcap", "scale", "sinks", "bias", "mask", "lengths", "causal", "window", "alibi")


def select(inputs: Inputs, axis: str, choose: Callable[[torch.Tensor, int], torch.Tensor]) -> Inputs:
    """The inputs with `choose(tensor, axis)` along one of b, h (query heads; K and V by groups), q, k."""
    q, k, v = inputs
    e = inputs.extras
    # axis of (batch, heads, q_len, kv_len), and of what has fewer axes
    place = "bhqk".index(axis)

    def scores(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None or x.shape[place] == 1 else choose(x, place)

    changes: dict[str, Any] = {}
    for name in ("bias", "mask"):
        x = getattr(e, name)
        if x is not None and x.shape[place] > 1:
            changes[name] = scores(x)
    if axis == "b":
        q, k, v = (choose(x, 0) for x in (q, k, v))
        for name in ("q_lengths", "kv_lengths", "d_out", "d_lse"):
            x = getattr(e, name)
            if x is not None:
                changes[name] = choose(x, 0)
        if e.alibi_slopes is not None and e.alibi_slopes.dim() == 2:
            changes["alibi_slopes"] = choose(e.alibi_slopes, 0)
    elif axis == "h":
        q = choose(q, 1)
        if e.alibi_slopes is not None:
            changes["alibi_slopes"] = choose(e.alibi_slopes, e.alibi_slopes.dim() - 1)
        if e.sinks is not None:
            changes["sinks"] = choose(e.sinks, 0)
        for name in ("d_out", "d_lse"):
            x = getattr(e, name)
            if x is not None:
                changes[name] = choose(x, 1)
    elif axis == "q":
        q = choose(q, 2)
        for name in ("d_out", "d_lse"):
            x = getattr(e, name)
            if x is not None:
                changes[name] = choose(x, 2)
    else:
        k, v = choose(k, 2), choose(v, 2)
    return type(inputs)(q, k, v, extras=replace(e, **changes))


def _pick(index: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda x, axis: x.index_select(axis, index.to(x.device))


def _one(at: int, size: int = 1) -> Callable[[torch.Tensor, int], torch.Tensor]:
    return lambda x, axis: x.narrow(axis, at, size)


def _order(it: Trial, n: int) -> torch.Tensor:
    """A permutation of n that is not the identity where n > 1."""
    import torch

    generator = torch.Generator().manual_seed(it.case.seed + n)
    order = torch.randperm(n, generator=generator)
    return order.roll(1) if bool((order == torch.arange(n)).all()) else order


def _both(
    it: Trial,
    got: Any,
    want: Any,
    choose: Callable[[torch.Tensor], torch.Tensor],
    inputs: Inputs,
    why: str,
    *,
    plain: Case | None = None,
) -> None:
    """out and lse of the changed call equal those of the plain one, after `choose`.

    plain: the case of the plain call where it is another than the trial's, by which its arithmetic may differ.
    """
    bounds: dict[str, torch.Tensor] = {}

    def slack(name: str) -> torch.Tensor:
        if not bounds:
            one = it.bounds(inputs)
            other = one if plain is None else it.bounds(inputs, plain)
            bounds.update({key: one[key] + other[key] for key in ("out", "lse")})
        return choose(bounds[name])

    for (name, other), (_, one) in zip(parts(got), parts(want), strict=True):
        it.same(name, other, choose(one), why, slack=lambda name=name: slack(name))


def _free_of_positions(case: Case) -> bool:
    return case.causal == "none" and case.window is None and case.alibi == "none"


@law(
    "structure",
    draw=cases(options=("softcap", "scale", "sinks", "bias", "mask")),
    holds=lambda case: case.q_len > 1 and _free_of_positions(case) and case.lengths != "both",
    bits=True,
)
def permuting_the_queries_permutes_the_output(it: Trial) -> None:
    """Without positions, a row's answer does not depend on where the row stands."""
    inputs = it.inputs()
    order = _order(it, it.case.q_len)
    got = it(select(inputs, "q", _pick(order)))
    _both(
        it,
        got,
        it(inputs),
        lambda x: x.index_select(2, order.to(x.device)),
        inputs,
        "the queries were permuted",
    )


@law(
    "structure",
    draw=cases(options=_ORDERLY),
    holds=lambda case: case.heads > 1 and case.alibi != "geometric",
    bits=True,
)
def permuting_the_heads_permutes_the_output(it: Trial) -> None:
    """Groups of heads, with their K and V, may be in any order."""
    import torch

    case, inputs = it.case, it.inputs()
    group = case.heads // case.kv_heads
    order = _order(it, case.kv_heads)
    inner = _order(it, group)
    heads = (order[:, None] * group + inner[None, :]).flatten()
    moved = select(inputs, "h", _pick(heads))
    at = order.to(inputs.q.device)
    moved = type(moved)(
        moved.q, moved.k.index_select(1, at), moved.v.index_select(1, at), extras=moved.extras
    )
    if bool((heads == torch.arange(case.heads)).all()):
        return
    got = it(moved)
    _both(
        it,
        got,
        it(inputs),
        lambda x: x.index_select(1, heads.to(x.device)),
        inputs,
        "the heads were permuted",
    )


@law(
    "structure",
    draw=cases(options=_ORDERLY, change=lambda draw, fields: {"batch": 3}),
    holds=lambda case: case.batch > 1,
    bits=True,
)
def permuting_the_batch_permutes_the_output(it: Trial) -> None:
    """The entries of a batch may be in any order."""
    inputs = it.inputs()
    order = _order(it, it.case.batch)
    got = it(select(inputs, "b", _pick(order)))
    _both(
        it, got, it(inputs), lambda x: x.index_select(0, order.to(x.device)), inputs, "the batch was permuted"
    )


@law(
    "structure",
    draw=cases(options=("softcap", "scale", "sinks", "bias", "mask"), layouts=_DENSE),
    holds=lambda case: case.kv_len > 1 and _free_of_positions(case) and case.lengths == "none",
)
def permuting_the_keys_changes_nothing(it: Trial) -> None:
    """Without positions, keys with their V may be in any order: only roundings differ."""
    inputs = it.inputs()
    moved = select(inputs, "k", _pick(_order(it, it.case.kv_len)))
    one, other = it(inputs), it(moved)
    first, second = it.bounds(inputs), it.bounds(moved)
    for (name, got), (_, want) in zip(parts(other), parts(one), strict=True):
        it.close(name, got, want, first[name] + second[name], "the keys were permuted")


@law("structure", draw=cases(options=_ORDERLY), holds=lambda case: case.heads > case.kv_heads, bits=True)
def grouped_heads_equal_repeated_keys(it: Trial) -> None:
    """Query head h reads KV head h // group: repeating K and V for each head gives the same bits."""
    case, inputs = it.case, it.inputs()
    group = case.heads // case.kv_heads
    k, v = (x.repeat_interleave(group, dim=1) for x in (inputs.k, inputs.v))
    got = it(type(inputs)(inputs.q, k, v, extras=inputs.extras), replace(case, kv_heads=case.heads))
    _both(
        it,
        got,
        it(inputs),
        lambda x: x,
        inputs,
        f"K and V were repeated for each of the {group} heads of a group",
    )


@law(
    "structure",
    draw=cases(
        options=_ORDERLY,
        layouts=(
            "bshd",
            "bhsd+pad",
            "bhds",
            "bhsd+step",
            "bhsd+offset",
            "sbhd+pad+offset",
            "dbhs",
            "bhsd+expand-b",
        ),
        change=lambda draw, fields: {
            "layout": draw.pick(("bshd", "bhsd+pad", "bhds", "bhsd+step", "sbhd+pad+offset", "bhsd+expand-h"))
        },
    ),
    holds=lambda case: case.layout != "bhsd",
    bits=True,
    quantised=True,
)
def strides_do_not_matter(it: Trial) -> None:
    """Any strides, those of 0 included, give the bits of contiguous tensors."""
    import torch

    inputs = it.inputs()
    extras = {n: x.contiguous() for n, x in inputs.extras.present().items()}
    dense = type(inputs)(
        *(x.clone(memory_format=torch.contiguous_format) for x in inputs),
        extras=replace(inputs.extras, **extras),
    )
    plain = replace(it.case, layout="bhsd")
    _both(
        it,
        it(inputs),
        it(dense, plain),
        lambda x: x,
        inputs,
        f"the tensors are laid out as {it.case.layout}, not contiguous",
        plain=plain,
    )


@law(
    "structure",
    draw=cases(options=_ORDERLY, layouts=_DENSE, change=lambda draw, fields: {"batch": draw.pick((2, 3))}),
    holds=lambda case: case.batch > 1,
    bits=True,
)
def a_row_does_not_depend_on_its_neighbours_in_the_batch(it: Trial) -> None:
    """Each entry alone gives the bits that it has in the batch, whatever the batch's size."""
    inputs = it.inputs()
    whole = it(inputs)
    alone = replace(it.case, batch=1)
    for b in range(it.case.batch):
        got = it(select(inputs, "b", _one(b)), alone)
        _both(it, got, whole, lambda x, b=b: x[b : b + 1], inputs, f"entry {b} was given alone")


@law(
    "structure",
    draw=cases(options=_ORDERLY, layouts=_DENSE),
    holds=lambda case: case.batch * case.kv_heads > 1 and case.kv_len > 0,
    bits=True,
)
def nothing_leaks_between_heads_and_entries(it: Trial) -> None:
    """NaN in one KV head of one entry of the batch, and in its queries, leaves all other heads and entries alone."""
    case, inputs = it.case, it.inputs()
    b, h = case.seed % case.batch, (case.seed // 2) % case.kv_heads
    group = case.heads // case.kv_heads
    dirty = twin(inputs)
    for x in (dirty.k, dirty.v):
        x[b, h] = float("nan")
    dirty.q[b, h * group : (h + 1) * group] = float("nan")
    one, other = it(inputs), it(dirty)

    def rest(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[b, h * group : (h + 1) * group] = 0.0
        return x

    for (name, got), (_, want) in zip(parts(other), parts(one), strict=True):
        it.same(
            name, rest(got), rest(want), f"NaN was written into entry {b}, KV head {h} and its queries only",
            slack=lambda name=name: 2.0 * it.bounds(inputs)[name],
        )  # fmt: skip


@law(
    "structure",
    draw=cases(
        options=("softcap", "scale", "sinks", "bias", "mask"),
        layouts=_DENSE,
        lengths=(16, 17, 33, 64, 65, 97, 129),
    ),
    holds=lambda case: case.q_len > 1 and _free_of_positions(case) and case.lengths == "none",
    bits=True,
)
def a_row_does_not_depend_on_the_other_rows(it: Trial) -> None:
    """Some of the queries alone give the bits that they have among all."""
    inputs = it.inputs()
    start = it.case.seed % (it.case.q_len - 1)
    size = 1 + (it.case.seed * 5) % (it.case.q_len - start)
    size = min(size, it.case.q_len - start)
    got = it(select(inputs, "q", _one(start, size)), replace(it.case, q_len=size))
    _both(
        it,
        got,
        it(inputs),
        lambda x: x.narrow(2, start, size),
        inputs,
        f"rows {start} to {start + size - 1} alone",
    )


@law(
    "structure",
    draw=cases(
        options=("softcap", "scale", "bias", "mask"), layouts=_DENSE, lengths=(1, 2, 16, 17, 33, 65, 129)
    ),
    holds=lambda case: (
        case.kv_len > 0 and _free_of_positions(case) and case.lengths == "none" and not case.sinks
    ),
)
def merging_the_parts_of_split_keys_gives_the_whole(it: Trial) -> None:
    """Attention over two parts of the keys, an empty part included, merged by LSE, is attention over all of them."""
    import torch

    case, inputs = it.case, it.inputs()
    whole = it(inputs)
    if whole.lse is None:
        raise SetAside("not supported: the method returns no log-sum-exp")
    cut = (case.seed * 11) % (case.kv_len + 1)
    pieces = []
    for start, size in ((0, cut), (cut, case.kv_len - cut)):
        part = replace(case, kv_len=size)
        piece = select(inputs, "k", _one(start, size))
        output = it(piece, part)
        assert output.lse is not None
        pieces.append((output.out.double(), output.lse.double(), it.bounds(piece, part)))
    lse = torch.logaddexp(pieces[0][1], pieces[1][1])
    out, allowed = torch.zeros_like(pieces[0][0]), it.bounds(inputs)["out"]
    v_most = inputs.v.double().abs().amax()
    for part_out, part_lse, bounds in pieces:
        share = (part_lse - lse).exp().nan_to_num(0.0).unsqueeze(-1)
        out = out + share * part_out
        spread = bounds["lse"].nan_to_num(0.0, posinf=0.0).unsqueeze(-1)
        allowed = allowed + share * (bounds["out"] + 4.0 * v_most * spread)
    seen = visible(case, inputs).any(-1)
    it.close(
        "out",
        torch.where(seen.unsqueeze(-1), whole.out.double(), 0.0),
        out,
        allowed,
        f"merged from {cut} and {case.kv_len - cut} keys",
    )
    spread = sum(p[2]["lse"].nan_to_num(0.0, posinf=0.0) for p in pieces) + it.bounds(inputs)[
        "lse"
    ].nan_to_num(0.0, posinf=0.0)
    it.close(
        "lse",
        torch.where(seen, whole.lse.double(), 0.0),
        torch.where(seen, lse, 0.0),
        spread,
        "merged from two parts",
    )


@law(
    "structure",
    draw=cases(
        options=("causal", "softcap", "scale", "alibi"), layouts=_DENSE, lengths=(2, 16, 17, 33, 65, 129)
    ),
    holds=lambda case: (
        case.kv_len >= case.q_len > 1
        and case.causal != "top-left"
        and case.window is None
        and case.bias == case.mask == case.lengths == "none"
    ),
)
def decoding_gives_the_last_row_of_prefill(it: Trial) -> None:
    """One query against all keys gives the last row of the whole."""
    inputs = it.inputs()
    got = it(select(inputs, "q", _one(it.case.q_len - 1)), replace(it.case, q_len=1))
    want = it(inputs)
    bounds = it.bounds(inputs)
    for (name, one), (_, whole) in zip(parts(got), parts(want), strict=True):
        it.close(name, one, whole[:, :, -1:], 2.0 * bounds[name][:, :, -1:], "the last query alone")


@law("structure", draw=cases(), bits=True, quantised=True)
def the_same_call_twice_gives_the_same_bits(it: Trial) -> None:
    """Equal inputs give equal bits, run after run: nothing is summed in the order in which threads finish."""
    inputs = it.inputs()
    first = it(inputs)
    for _ in range(2):
        for (name, got), (_, want) in zip(parts(it(inputs)), parts(first), strict=True):
            it.same(name, got, want, "the same call was made twice")


@law(
    "structure",
    draw=cases(layouts=_DENSE),
    holds=lambda case: case.q_len > 0 and case.kv_len > 0,
    bits=True,
    quantised=True,
)
def no_state_is_kept_between_calls(it: Trial) -> None:
    """A call with another scale and other values in between changes nothing, and is not answered from the first."""
    case, inputs = it.case, it.inputs()
    first = it(inputs)
    fresh = replace(case, seed=case.seed + 1)
    between = it(fresh.tensors(it.device), fresh)
    if case.kv_len > 1 and bool(visible(case, inputs).any()):
        it.true(
            not bool((between.out == first.out).all()),
            "other tensors of the same shape gave the same output: it was answered from an earlier call",
        )
    scaled = replace(fresh, scale=case.softmax_scale * 3.0)
    if it.method.unsupported(scaled) is None:
        it(fresh.tensors(it.device), scaled)
    for (name, got), (_, want) in zip(parts(it(inputs)), parts(first), strict=True):
        it.same(name, got, want, "calls with other values and another scale were made in between")
