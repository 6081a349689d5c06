"""Profiles: the fixed lists of cases that `effattn gate` judges.

A profile is drawn once from its name, by a generator of our own over the same menus as the Hypothesis
strategies. So the list is the same on every machine and with every version of Hypothesis, a recorded run can
be repeated, and the shapes are the same in every dtype, which makes the rows of a report comparable.

Each case is drawn for one regime, all regimes in turn, and every other field is drawn freely: so each mistake
meets the cases made for it, and most of the other cases too. A long profile ends with a few cases of thousands of keys,
each with few queries, for kernels that do something else beyond some length.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from effattn.errors import RequestError
from effattn.properties import menus, regimes

if TYPE_CHECKING:
    from effattn.case import Case

T = TypeVar("T")
Fields = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Profile:
    """How many cases, and from which sizes."""

    name: str
    #: Cases drawn for each regime.
    repeats: int
    lengths: tuple[int, ...]
    #: Lengths for the regimes that need several KV tiles.
    long_lengths: tuple[int, ...]
    #: (head_dim, v_dim); a compiled kernel has its head dimensions padded to powers of two, so the number of
    #: different padded pairs decides how much is compiled.
    dims: tuple[tuple[int, int | None], ...]
    #: (head_dim, v_dim) with v_dim different from head_dim.
    unequal_dims: tuple[tuple[int, int | None], ...]
    #: (head_dim, v_dim) where the last axis is not contiguous, for which kernels are compiled apart; empty for
    #: all of `dims`.
    strided_dims: tuple[tuple[int, int | None], ...]
    layouts: tuple[str, ...]
    groups: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    #: Upper limit of batch * heads * q_len * kv_len, so that one case stays a matter of milliseconds.
    most_scores: int
    #: Cases drawn for each regime of an option, and cases with two options.
    option_repeats: int = 1
    pairs: tuple[tuple[str, str], ...] = ()
    #: Lengths, dimensions and upper limit of scores of cases with options: their reference costs more.
    option_lengths: tuple[int, ...] = ()
    option_dims: tuple[tuple[int, int | None], ...] = ()
    most_option_scores: int = 0
    #: (q_len, kv_len) of the cases at the end, which are too long to be drawn; each plain and causal, in one head.
    longest: tuple[tuple[int, int], ...] = ()


SMOKE = Profile(
    name="smoke",
    repeats=2,
    lengths=(1, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 128, 129, 131, 193),
    long_lengths=(129, 151, 193, 211, 257, 271),
    dims=tuple((d, None) for d in (64, 64, 33, 40, 32, 7, 7, 80)),
    unequal_dims=((48, 17), (56, 24), (33, 20)),
    strided_dims=((40, None),),
    layouts=tuple(layout for layout in menus.LAYOUTS if layout[:4] in ("bhsd", "bshd", "sbhd", "bhds")),
    groups=menus.GROUPS,
    batches=(1, 1, 2),
    most_scores=400_000,
    option_repeats=1,
    pairs=(
        ("window", "sinks"), ("softcap", "bias"), ("alibi", "lengths"), ("mask", "dropout"), ("window", "softcap"),
        ("alibi", "bias"),
    ),
    option_lengths=(17, 33, 64, 65, 97, 129),
    option_dims=((64, None), (40, None)),
    most_option_scores=60_000,
)  # fmt: skip

CI = Profile(
    name="ci",
    repeats=8,
    lengths=menus.LENGTHS[2:],
    long_lengths=menus.SEVERAL_PARTIAL_TILES,
    dims=(
        *((d, None) for d in menus.HEAD_DIMS),
        *((d, None) for d in menus.LARGE_HEAD_DIMS),
        (64, None), (64, None), (80, None), (96, None), (128, None),
    ),
    unequal_dims=((64, 32), (48, 17), (56, 24), (32, 64), (17, 100), (128, 64), (1, 3), (192, 128)),
    strided_dims=(),
    layouts=menus.LAYOUTS,
    groups=menus.GROUPS,
    batches=menus.BATCHES,
    most_scores=1_000_000,
    option_repeats=6,
    pairs=tuple(itertools.combinations(menus.OPTIONS, 2)),
    option_lengths=(1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 97, 128, 129, 131, 193),
    option_dims=((64, None), (64, None), (40, None), (33, None), (128, None), (80, None), (48, 17), (32, 64)),
    most_option_scores=200_000,
    longest=tuple((m, n) for n in (1031, 2053, 4099) for m in (1, 17, 65)),
)  # fmt: skip

PROFILES: dict[str, Profile] = {profile.name: profile for profile in (SMOKE, CI)}


def get(name: str) -> Profile:
    """The profile of that name. Raises `RequestError` for an unknown one."""
    try:
        return PROFILES[name]
    except KeyError:
        raise RequestError(
            f"unknown profile {name!r}; expected one of {', '.join(PROFILES)}"
            + (" (nightly is reserved for a later version)" if name == "nightly" else "")
        ) from None


def cases(profile: str | Profile, *, dtype: str) -> list[Case]:
    """The cases of a profile in one dtype, always the same list. `RequestError` for an unknown profile."""
    profile = get(profile) if isinstance(profile, str) else profile
    draw = Draw(f"effattn profile {profile.name}")
    in_turn = [
        regime
        for _ in range(profile.repeats)
        for regime in regimes.plain_regimes()
        for _ in range(regime.weight)
    ]
    plain = [_draw_one(draw, profile, regime, seed, dtype) for seed, regime in enumerate(in_turn)]
    # In turn, so that the first cases of a long profile have seen every option and gradient.
    drawn = _in_turn(plain, _with_options(profile, dtype, len(plain)))
    return drawn + _long(profile, dtype, max(case.seed for case in drawn) + 1)


def _long(profile: Profile, dtype: str, first_seed: int) -> list[Case]:
    """Cases with many keys for their queries: a loop that ends too early, keys that are split from some length on."""
    from effattn.case import Case

    wanted: list[Fields] = [
        {"q_len": m, "kv_len": n, "causal": causal, "head_dim": (64, 40)[at % 2]}
        for at, (m, n) in enumerate(profile.longest)
        for causal in ("none", "bottom-right")
    ]
    if profile.longest:
        m, n = max(profile.longest, key=lambda sizes: (-sizes[1], sizes[0]))
        wanted.append({"q_len": m, "kv_len": n, "head_dim": 40, "backward": True})
    return [Case(**fields, dtype=dtype, seed=seed) for seed, fields in enumerate(wanted, first_seed)]


def _in_turn(first: Sequence[T], second: Sequence[T]) -> list[T]:
    """One of each list for as long as both last, then the rest."""
    both = min(len(first), len(second))
    pairs = itertools.chain.from_iterable(zip(first, second, strict=False))
    return [*pairs, *first[both:], *second[both:]]


def _with_options(profile: Profile, dtype: str, first_seed: int) -> list[Case]:
    """Cases with options and gradients: each option alone, forward and with gradients, then pairs."""
    draw = Draw(f"effattn profile {profile.name} options")
    wanted: list[tuple[regimes.Regime | None, tuple[str, ...], bool]] = []
    for _ in range(profile.option_repeats):
        for regime in regimes.OPTION_REGIMES:
            if any(_scores(fields) > profile.most_scores for fields in _LARGE_GRADIENTS.get(regime.name, ())):
                continue
            name = regime.name.removeprefix("gradients with ")
            options = (name,) if name in menus.OPTIONS else ()
            wanted += [(regime, options, regime.name.startswith("gradients"))] * regime.weight
    # The forward pass of a case with gradients is judged as well.
    wanted += [(None, pair, True) for pair in profile.pairs]
    # The entries of a menu in turn: a short profile would miss most of one if it drew them.
    menu = {
        option: itertools.cycle([entry for entry in entries if _fits(entry, profile)])
        for option, entries in menus.OPTIONS.items()
    }
    drawn = []
    for seed, (regime, options, backward) in enumerate(wanted, first_seed):
        fields = {field: value for option in options for field, value in next(menu[option]).items()}
        case = _draw_options(draw, profile, fields, backward, seed, dtype, regime)
        if regime is not None and not regime.holds(case):
            if regime.name in _LARGE_GRADIENTS and profile.most_scores < SMOKE.most_scores:
                continue  # a list of smaller cases than any profile's, such as that of benchmarks/alarms.py
            raise AssertionError(f"drawn for the regime {regime.name!r}, which it is not in: {case!r}")
        drawn.append(case)
    return drawn


def _draw_options(
    draw: Draw, profile: Profile, options: Fields, backward: bool, seed: int, dtype: str,
    regime: regimes.Regime | None,
) -> Case:  # fmt: skip
    from effattn.case import Case

    fields = _anything(draw, profile, seed) | {"dtype": dtype, "backward": backward}
    lengths = profile.option_lengths
    q_len, kv_len = draw.pick(lengths), draw.pick([n for n in lengths if n > 1])
    fields |= {"q_len": q_len, "kv_len": kv_len}
    fields["head_dim"], fields["v_dim"] = draw.pick(profile.option_dims)
    fields["values"] = draw.pick(("normal", "normal", "uniform", "outliers"))
    most = profile.most_option_scores
    if not regimes.last_axis_contiguous(fields["layout"]) and profile.strided_dims:
        fields["layout"] = menus.CONTIGUOUS  # kernels are compiled apart for it
    fields |= options
    if "window" in options:
        # Lengths that it cuts.
        left, right = options["window"]
        fields["q_len"] = draw.pick([n for n in lengths if n > max(right + 1, 8)])
        fields["kv_len"] = draw.pick([n for n in lengths if n > max(left + 1, right + 1, 8)])
    if "alibi" in options:
        # Else both alignments measure the same distances.
        fields["kv_len"] = draw.pick([n for n in lengths if n not in (1, fields["q_len"])])
    if "lengths" in options or "b" not in options.get("bias", "b"):
        fields["batch"] = draw.pick((2, 3))
    if regime is not None and regime.name == "gradients":
        fields["q_len"] = draw.pick([n for n in lengths if n > 16])
    if regime is not None and regime.name == "gradients of groups":
        kv_heads, group = draw.pick([(h, g) for h, g in profile.groups if g > 1])
        fields |= {"kv_heads": kv_heads, "heads": kv_heads * group}
    if regime is not None and regime.name == "gradients, causal, more keys":
        fields |= {
            "causal": draw.pick(("bottom-right", "bottom-right", "top-left")),
            "q_len": 33,
            "kv_len": 97,
        }
    if regime is not None and regime.name in _LARGE_GRADIENTS:
        fields |= draw.pick(_LARGE_GRADIENTS[regime.name])
        fields |= {"causal": "none", "scale": None, "layout": menus.CONTIGUOUS}
        most = profile.most_scores
    return Case(**_small_enough(fields, replace(profile, most_scores=most)))


def _fits(entry: Fields, profile: Profile) -> bool:
    """Whether the profile has lengths that a window cuts."""
    return max(entry.get("window", (0, 0))) < max(profile.option_lengths) - 1


def _scores(fields: Fields) -> int:
    return fields["batch"] * fields["heads"] * fields["q_len"] * fields["kv_len"]


def _of(shapes: tuple[tuple[int, int], ...], **fields: Any) -> tuple[Fields, ...]:
    return tuple({"q_len": m, "kv_len": n, **fields} for m, n in shapes)


_SHAPES, _MANY = ((97, 65), (65, 97)), {"batch": 2, "heads": 16, "kv_heads": 16}
#: regimes of gradients that need more than other cases with options have
_LARGE_GRADIENTS: dict[str, tuple[Fields, ...]] = {
    "gradients of many heads": _of(_SHAPES, values="normal", **_MANY),
    "gradients of many heads, similar weights": _of(_SHAPES, values="uniform", **_MANY),
    "gradients over many queries": _of(
        ((257, 129), (271, 97)), batch=1, heads=4, kv_heads=4, values="normal"
    ),
}


def with_values(drawn: Sequence[Case], value_names: Sequence[str]) -> list[Case]:
    """The same shapes with each of the named value distributions, without repetition, name by name."""
    seen: dict[str, Case] = {}
    for value_name in value_names:
        for case in drawn:
            changed = replace(case, values=value_name)
            seen.setdefault(changed.id, changed)
    return list(seen.values())


class Draw:
    """A seeded source of choices.

    It uses only `random.random()`, the one method whose values Python promises to keep for a given seed.
    """

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def pick(self, menu: Sequence[T]) -> T:
        return menu[int(self._random.random() * len(menu))]

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability


_Change = Callable[[Draw, Profile, Fields], Fields]


def _draw_one(draw: Draw, profile: Profile, regime: regimes.Regime, seed: int, dtype: str) -> Case:
    from effattn.case import Case

    fields = _anything(draw, profile, seed) | {"dtype": dtype}
    fields |= _change_for(regime.name)(draw, profile, fields)
    if profile.strided_dims and not regimes.last_axis_contiguous(fields["layout"]):
        fields["head_dim"], fields["v_dim"] = draw.pick(profile.strided_dims)
    case = Case(**_small_enough(fields, profile))
    if not regime.holds(case):
        raise AssertionError(f"drawn for the regime {regime.name!r}, which it is not in: {case!r}")
    return case


def _anything(draw: Draw, profile: Profile, seed: int) -> Fields:
    kv_heads, group = draw.pick(profile.groups)
    head_dim, v_dim = draw.pick(profile.unequal_dims if draw.chance(0.1) else profile.dims)
    causal = draw.pick(("none", "none", "bottom-right", "bottom-right", "top-left"))
    q_len = draw.pick(profile.lengths)
    return {
        "batch": draw.pick(profile.batches),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "q_len": q_len,
        "kv_len": q_len if causal != "none" and draw.chance(0.3) else draw.pick(profile.lengths),
        "head_dim": head_dim,
        "v_dim": v_dim,
        "causal": causal,
        "scale": draw.pick(menus.SCALES) if draw.chance(0.15) else None,
        "layout": draw.pick(profile.layouts) if draw.chance(0.4) else menus.CONTIGUOUS,
        "values": draw.pick(("uniform", "outliers")) if draw.chance(0.25) else "normal",
        "seed": seed,
    }


def _small_enough(fields: Fields, profile: Profile) -> Fields:
    """The same fields with fewer batches and groups while the case is above the profile's limit."""
    fields = dict(fields)
    per_head = fields["q_len"] * fields["kv_len"]
    if fields["batch"] > 2 and fields["batch"] * fields["heads"] * per_head > profile.most_scores:
        fields["batch"] = 2
    while fields["batch"] * fields["heads"] * per_head > profile.most_scores:
        group = fields["heads"] // fields["kv_heads"]
        if fields["kv_heads"] > 2:
            fields |= {"kv_heads": 2, "heads": 2 * group}
        elif group > 2 and group != 7:
            fields |= {"heads": 2 * fields["kv_heads"]}
        else:
            break
    return fields


def _change_for(name: str) -> _Change:
    """What has to change in a freely drawn case for it to lie in the regime."""
    if name.startswith("values "):
        return _values(name.removeprefix("values "))
    return _CHANGES[name]


def _fixed(**fields: Any) -> _Change:
    return lambda draw, profile, drawn: dict(fields)


def _values(value_name: str) -> _Change:
    # Values show what they are for where there are keys enough to be summed.
    return lambda draw, profile, drawn: {
        "values": value_name,
        "kv_len": draw.pick([n for n in profile.lengths if n > 16]),
        "q_len": draw.pick([n for n in profile.lengths if n > 8]),
    }


def _several_tiles(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
    return {"kv_len": draw.pick(profile.long_lengths)}


def _unmasked_several_tiles(**fields: Any) -> _Change:
    """Several KV tiles that all rows, or all but a few, see to the end."""
    return lambda draw, profile, drawn: {
        "kv_len": draw.pick(profile.long_lengths),
        "causal": draw.pick(("none", "bottom-right")),
        **fields,
    }


def _negative_logits(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
    return {
        "values": "negative-logits",
        "causal": draw.pick(("none", "none", "bottom-right")),
        "kv_len": draw.pick([n for n in profile.lengths if n > 1 and n % 16]),
    }


def _square(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
    n = draw.pick([n for n in profile.lengths if n > 16])
    return {"causal": draw.pick(("bottom-right", "top-left")), "q_len": n, "kv_len": n}


def _causal(alignment: str, *, more_keys: bool) -> _Change:
    def change(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
        short = draw.pick([n for n in profile.lengths if 2 < n < 128])
        long = draw.pick([n for n in (*profile.lengths, *profile.long_lengths) if n > short])
        q_len, kv_len = (short, long) if more_keys else (long, short)
        return {"causal": alignment, "q_len": q_len, "kv_len": kv_len}

    return change


def _groups(*, kv_heads: Callable[[int], bool], group: Callable[[int], bool], **fields: Any) -> _Change:
    def change(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
        heads_kv, size = draw.pick([(h, g) for h, g in profile.groups if kv_heads(h) and group(g)])
        # Heads that read the same keys hide a wrong head index.
        return {"kv_heads": heads_kv, "heads": heads_kv * size, "layout": menus.CONTIGUOUS, **fields}

    return change


def _dims(holds: Callable[[int], bool]) -> _Change:
    def change(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
        head_dim, v_dim = draw.pick([(d, v) for d, v in profile.dims if holds(d)])
        return {"head_dim": head_dim, "v_dim": v_dim, "layout": menus.CONTIGUOUS}

    return change


def _unequal_dims(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
    head_dim, v_dim = draw.pick(profile.unequal_dims)
    return {"head_dim": head_dim, "v_dim": v_dim, "layout": menus.CONTIGUOUS}


def _user_scale(draw: Draw, profile: Profile, drawn: Fields) -> Fields:
    # Wide enough that the scale decides which keys win, and none of the menu is the default.
    return {
        "scale": draw.pick(menus.SCALES),
        "head_dim": draw.pick([d for d, v in profile.dims if 16 < d <= 128 and d != 64]),
        "v_dim": None,
        "kv_len": draw.pick([n for n in profile.lengths if n > 8]),
    }


def _layout(holds: Callable[[str], bool], **fields: Any) -> _Change:
    return lambda draw, profile, drawn: {
        "layout": draw.pick([layout for layout in profile.layouts if holds(layout)]),
        "q_len": max(drawn["q_len"], 17),
        "kv_len": max(drawn["kv_len"], 17),
        **fields,
    }


def _with(suffix: str, **fields: Any) -> _Change:
    return _layout(lambda layout: suffix in layout.split("+")[1:], **fields)


_CHANGES: dict[str, _Change] = {
    "no keys": _fixed(kv_len=0),
    "no queries": _fixed(q_len=0),
    "one key": _fixed(kv_len=1),
    "last tile not full": _several_tiles,
    "many keys": lambda draw, profile, drawn: {
        "kv_len": draw.pick([n for n in profile.long_lengths if n > regimes.MANY_KEYS]),
        "q_len": draw.pick([n for n in profile.lengths if n > 32]),
        "causal": draw.pick(("none", "none", "bottom-right")),
        "values": draw.pick(("normal", "uniform", "repeated-max")),
    },
    "whole tiles": lambda draw, profile, drawn: {
        "kv_len": draw.pick([n for n in menus.WHOLE_TILES if n <= max(profile.lengths)])
    },
    "decode": _unmasked_several_tiles(q_len=1),
    "causal, square": _square,
    "causal bottom-right, more keys": _causal("bottom-right", more_keys=True),
    "causal bottom-right, empty rows": _causal("bottom-right", more_keys=False),
    "causal top-left, more keys": _causal("top-left", more_keys=True),
    "causal top-left, more queries": _causal("top-left", more_keys=False),
    "grouped queries": _groups(kv_heads=lambda h: h > 1, group=lambda g: g > 1),
    "group of seven": _groups(kv_heads=lambda h: True, group=lambda g: g == 7),
    "one KV head for all": _groups(kv_heads=lambda h: h == 1, group=lambda g: g > 1),
    "batch and heads": _groups(kv_heads=lambda h: h > 1, group=lambda g: True, batch=2),
    "head_dim not a power of two": _dims(lambda d: d & (d - 1) != 0),
    "head_dim odd": _dims(lambda d: d % 2 == 1 and d > 1),
    "v_dim differs": _unequal_dims,
    "user scale": _user_scale,
    "permuted axes": _layout(lambda layout: layout.split("+")[0] != menus.CONTIGUOUS, batch=2),
    "padded rows": _with("pad"),
    "storage offset": _with("offset"),
    "last axis strided": _with("step"),
    "batch expanded": _with("expand-b", batch=2),
    "heads expanded": _with("expand-h", heads=4, kv_heads=2),
    "keys expanded": _with("expand-s"),
    "rescale over several tiles": _unmasked_several_tiles(values="growing-max"),
    "negative logits, last tile not full": _negative_logits,
    "large logits": lambda draw, profile, drawn: {
        "values": "large-logits",
        "kv_len": draw.pick([n for n in profile.lengths if n > 16]),
    },
    "repeated maximum over several tiles": _unmasked_several_tiles(values="repeated-max"),
}
