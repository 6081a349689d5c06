"""Regimes: the parts of the input space where attention kernels have gone wrong, each with a name.

A profile promises several cases in each regime, `event()` names those that a Hypothesis run reached, and the
tests of the generators show that none is missed. A regime's predicate reads only the recipe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from effattn.properties import menus

if TYPE_CHECKING:
    from effattn.case import Case

#: More keys than one tile of any usual kernel (the largest is 128).
SEVERAL_TILES = 128
#: Independent heads enough for what the keys of a head have in common to average out.
MANY_HEADS = 16
#: Keys enough for a sum in 16 bits to lose terms: a bf16 sum of ones stops at 256.
MANY_KEYS = 192


@dataclass(frozen=True, kw_only=True)
class Regime:
    """A named part of the input space."""

    #: A short name, shown by `event()` and in the messages of tests.
    name: str
    #: Which mistake of a kernel shows here.
    exposes: str
    #: True where a case lies in the regime.
    holds: Callable[[Case], bool]
    #: How many cases a profile draws for it, in units of the profile's repeats.
    weight: int = 1
    #: needs more heads or queries than Hypothesis draws, whose cases are to be small
    large: bool = False


def group(case: Case) -> int:
    """Query heads for each KV head."""
    return case.heads // kv_heads(case)


def kv_heads(case: Case) -> int:
    """KV heads of the case (`None` stands for as many as query heads)."""
    return case.heads if case.kv_heads is None else case.kv_heads


def v_dim(case: Case) -> int:
    """Dimension of V (`None` stands for that of Q and K)."""
    return case.head_dim if case.v_dim is None else case.v_dim


def last_axis_contiguous(layout: str) -> bool:
    """True where the elements of a row lie next to each other."""
    order, *suffixes = layout.split("+")
    return order.endswith("d") and "step" not in suffixes


def _power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _filled(case: Case) -> bool:
    """There is a query and a key, so that something can come out wrong."""
    return case.q_len > 0 and case.kv_len > 0


def _suffix(text: str) -> Callable[[Case], bool]:
    return lambda case: _filled(case) and text in case.layout.split("+")[1:]


#: in the order in which profiles draw cases for them: their first cases should find most mistakes
REGIMES: tuple[Regime, ...] = (
    Regime(
        name="no keys",
        exposes="division by a zero sum, an output that is never written",
        holds=lambda c: c.kv_len == 0 and c.q_len > 0,
    ),
    Regime(name="no queries", exposes="an empty grid", holds=lambda c: c.q_len == 0),
    Regime(
        name="one key",
        exposes="keys beyond the length that take part; the output must be V itself",
        holds=lambda c: c.kv_len == 1 and c.q_len > 0,
    ),
    Regime(
        name="last tile not full",
        exposes="a last tile that is dropped, or read to its end",
        holds=lambda c: c.q_len > 0 and c.kv_len > SEVERAL_TILES and c.kv_len % 16 != 0,
    ),
    Regime(
        name="many keys",
        exposes="sums that are kept in few bits",
        holds=lambda c: c.q_len > 8 and c.kv_len > MANY_KEYS and c.causal != "top-left",
        weight=2,
    ),
    Regime(
        name="decode",
        exposes="the path for a single query",
        holds=lambda c: c.q_len == 1 and c.kv_len > SEVERAL_TILES,
    ),
    Regime(
        name="causal, square",
        exposes="a diagonal that is off by one",
        holds=lambda c: c.causal != "none" and c.q_len == c.kv_len > 16,
    ),
    Regime(
        name="causal bottom-right, more keys",
        exposes="the other alignment",
        holds=lambda c: c.causal == "bottom-right" and 1 < c.q_len < c.kv_len,
    ),
    Regime(
        name="causal bottom-right, empty rows",
        exposes="rows that see no key: NaN, or the mean of V",
        holds=lambda c: c.causal == "bottom-right" and c.q_len > c.kv_len > 0,
    ),
    Regime(
        name="causal top-left, more keys",
        exposes="the other alignment",
        holds=lambda c: c.causal == "top-left" and 1 < c.q_len < c.kv_len,
    ),
    Regime(
        name="causal top-left, more queries",
        exposes="the other alignment",
        holds=lambda c: c.causal == "top-left" and c.q_len > c.kv_len > 1,
    ),
    Regime(
        name="grouped queries",
        exposes="query heads that are interleaved instead of blocked",
        holds=lambda c: _filled(c) and kv_heads(c) > 1 and group(c) > 1,
    ),
    Regime(
        name="one KV head for all",
        exposes="a KV head index that is not divided",
        holds=lambda c: _filled(c) and kv_heads(c) == 1 and c.heads > 1,
    ),
    Regime(
        name="batch and heads",
        exposes="the strides of batch and head confused",
        holds=lambda c: _filled(c) and c.batch > 1 and kv_heads(c) > 1,
    ),
    Regime(
        name="head_dim not a power of two",
        exposes="the scale of the padded head_dim, padded columns that take part",
        holds=lambda c: _filled(c) and not _power_of_two(c.head_dim),
    ),
    Regime(
        name="head_dim odd",
        exposes="vector loads that assume an alignment",
        holds=lambda c: _filled(c) and c.head_dim % 2 == 1 and c.head_dim > 1,
    ),
    Regime(
        name="v_dim differs",
        exposes="V taken to be as wide as K",
        holds=lambda c: _filled(c) and v_dim(c) != c.head_dim,
    ),
    Regime(
        name="user scale",
        exposes="a scale that is ignored, or applied twice",
        holds=lambda c: _filled(c) and c.kv_len > 1 and c.scale is not None,
    ),
    Regime(
        name="rescale over several tiles",
        exposes="an accumulator that is not rescaled when the maximum grows",
        holds=lambda c: c.values == "growing-max" and c.q_len > 0 and c.kv_len > SEVERAL_TILES,
        weight=2,
    ),
    Regime(
        name="negative logits, last tile not full",
        exposes="keys beyond the length that are attended with score 0, which wins here",
        holds=lambda c: c.values == "negative-logits" and c.q_len > 0 and c.kv_len % 16 != 0,
    ),
    Regime(
        name="large logits",
        exposes="exp without the maximum subtracted",
        holds=lambda c: c.values == "large-logits" and c.q_len > 0 and c.kv_len > 1,
    ),
    Regime(
        name="repeated maximum over several tiles",
        exposes="rounding that is not to nearest",
        holds=lambda c: c.values == "repeated-max" and c.q_len > 0 and c.kv_len > SEVERAL_TILES,
    ),
    Regime(
        name="whole tiles",
        exposes="a tile too many or too few",
        holds=lambda c: c.q_len > 0 and c.kv_len in menus.WHOLE_TILES,
    ),
    Regime(
        name="group of seven",
        exposes="group sizes taken for powers of two",
        holds=lambda c: _filled(c) and group(c) == 7,
    ),
    Regime(
        name="permuted axes",
        exposes="strides that are ignored",
        holds=lambda c: _filled(c) and c.layout.split("+")[0] != menus.CONTIGUOUS,
    ),
    Regime(name="padded rows", exposes="strides that are computed from the shape", holds=_suffix("pad")),
    Regime(name="storage offset", exposes="loads that assume an alignment", holds=_suffix("offset")),
    Regime(name="last axis strided", exposes="a last stride taken to be one", holds=_suffix("step")),
    Regime(name="batch expanded", exposes="strides of zero", holds=_suffix("expand-b")),
    Regime(name="heads expanded", exposes="strides of zero", holds=_suffix("expand-h")),
    Regime(name="keys expanded", exposes="strides of zero", holds=_suffix("expand-s")),
)


def _has(field: str, plain: object) -> Callable[[Case], bool]:
    return lambda case: (
        _filled(case) and getattr(case, field) != plain and (field not in _SHOWN or _SHOWN[field](case))
    )


def _differentiated(holds: Callable[[Case], bool]) -> Callable[[Case], bool]:
    return lambda case: case.backward and _filled(case) and case.kv_len > 1 and holds(case)


#: option -> the value that says that a case does not have it
_WITHOUT: dict[str, object] = {
    "window": None, "softcap": None, "alibi": "none", "bias": "none", "mask": "none", "sinks": False, "lengths": "none",
    "dropout": 0.0,
}  # fmt: skip

#: the options that a case may have, as `options_of` names them
OPTIONS = tuple(_WITHOUT)

#: option -> what else a case with it must have, to show a mistake in it
_SHOWN: dict[str, Callable[[Case], bool]] = {
    "window": lambda case: case.window is not None and cuts(case.window, case.q_len, case.kv_len),
}

#: option -> what it exposes in a forward pass
_EXPOSED: dict[str, str] = {
    "window": "an edge that is off by one, tiles that are skipped though a row sees them",
    "softcap": "a cap before the scale, or after the mask",
    "alibi": "the sign, the alignment, the slopes of another head",
    "bias": "strides of broadcast axes, a bias that is scaled",
    "mask": "rows and tiles of which nothing is seen",
    "sinks": "a normaliser without the sink, an output with it",
    "lengths": "padding that is attended, lengths of another entry",
    "dropout": "weights that are not divided by 1 - p",
}

#: regimes of options and gradients, drawn apart from those above, so that these stay the cases that they are
OPTION_REGIMES: tuple[Regime, ...] = (
    *(Regime(name=name, exposes=_EXPOSED[name], holds=_has(name, plain)) for name, plain in _WITHOUT.items()),
    *(
        Regime(
            name=f"gradients with {name}",
            exposes="a backward pass without it, or with another",
            holds=_differentiated(_has(name, plain)),
        )
        for name, plain in _WITHOUT.items()
    ),
    Regime(
        name="gradients",
        exposes="a gradient that is not scaled, not summed, or summed in few bits",
        holds=_differentiated(lambda case: case.q_len > 16),
    ),
    Regime(
        name="gradients of groups",
        exposes="gradients of K and V of one query head instead of all",
        holds=_differentiated(lambda case: group(case) > 1),
    ),
    Regime(
        name="gradients, causal, more keys",
        exposes="a backward pass with the other alignment",
        holds=_differentiated(lambda case: case.causal != "none" and case.q_len != case.kv_len),
    ),
    # What the keys of a head have in common hides a small mistake in a few heads; many heads are independent.
    Regime(
        name="gradients of many heads",
        exposes="a factor near 1, sums in few bits",
        holds=_differentiated(lambda case: _many_heads(case) and case.values == "normal"),
        weight=2,
        large=True,
    ),
    Regime(
        name="gradients of many heads, similar weights",
        exposes="a delta in few bits: with many similar weights, and values of one sign, it is large beside all else",
        holds=_differentiated(lambda case: _many_heads(case) and case.values == "uniform"),
        weight=2,
        large=True,
    ),
    Regime(
        name="gradients over many queries",
        exposes="dK and dV that are kept in few bits from block to block",
        holds=_differentiated(lambda case: case.q_len > MANY_KEYS and case.kv_len > 64 and case.plain),
        weight=2,
    ),
)


def _many_heads(case: Case) -> bool:
    return case.plain and case.batch * kv_heads(case) >= MANY_HEADS and case.q_len > 32 and case.kv_len > 32


def cuts(window: tuple[int, int], q_len: int, kv_len: int) -> bool:
    """Whether each limited side of a window hides a key next to those that some row sees, the last query at the last key."""
    left, right = window
    return (left < 0 or kv_len > left + 1) and (right < 0 or min(q_len, kv_len) > right + 1)


def options_of(case: Case) -> tuple[str, ...]:
    """The options that a case has."""
    return tuple(name for name, plain in _WITHOUT.items() if getattr(case, name) != plain)


def _drawn_from(name: str) -> Callable[[Case], bool]:
    return lambda case: _filled(case) and case.values == name


def plain_regimes() -> tuple[Regime, ...]:
    """The regimes of cases without options, and one for each named value distribution."""
    return REGIMES + tuple(
        Regime(name=f"values {name}", exposes="see `effattn values`", holds=_drawn_from(name))
        for name in menus.value_names()
    )


def all_regimes() -> tuple[Regime, ...]:
    """All of them."""
    return plain_regimes() + OPTION_REGIMES


def of(case: Case) -> tuple[str, ...]:
    """The names of all regimes that a case lies in."""
    return tuple(regime.name for regime in all_regimes() if regime.holds(case))
