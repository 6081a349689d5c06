"""The cases on which laws are tried: small shapes around the edges of tiles, one option at a time or two.

Each law names the options that it speaks of and what must be so; the rest is drawn. The draw is that of the profiles:
the same on every machine, from the law's name, the dtype and the number of the case.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError
from effattn.properties.profiles import SMOKE, Draw

if TYPE_CHECKING:
    from effattn.case import Case

Fields = dict[str, Any]
#: law's name, number of the case, dtype, what the case must be, options to choose from (None: all), whether it shares
#: compiled kernels with the first cases -> the case. None where some options only may be chosen and the draws found no case.
Drawing = Callable[[str, int, str, Callable[["Case"], bool], Collection[str] | None, bool], "Case | None"]
#: draws of one case among some of the options: what cannot be had is soon given up
_DRAWS_OF_SOME = 30

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 97, 127, 128, 129)
#: few, since kernels are compiled for each padded pair
DIMS = ((64, 64), (40, 40), (64, 40), (32, 32), (40, 64), (17, 17), (128, 128), (33, 100), (1, 1))
GROUPS = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 7), (3, 1))
_SEVERAL_HEADS = tuple(pair for pair in GROUPS if pair != (1, 1))
#: of the first cases: no power of two, so that a kernel pads it
_FIRST_DIMS = ((40, 40),)
#: options that are numbers to most kernels, for which none is compiled
_NUMBERS = ("causal", "scale")
#: other options that first cases have together: those of the profile `smoke`, whose kernels they share
_PAIRS = tuple(map(frozenset, SMOKE.pairs))
#: how many cases of each law are drawn so that few kernels are compiled: those of the profile `smoke`
FEW = 4
LAYOUTS = ("bhsd", "bhsd", "bshd", "bhsd+pad", "bshd+pad+offset", "bhds", "bhsd+step", "sbhd+pad")

#: option -> a value of it
OPTIONS: dict[str, Callable[[Draw], Fields]] = {
    "causal": lambda d: {"causal": d.pick(("bottom-right", "bottom-right", "top-left"))},
    "window": lambda d: {
        "window": d.pick(((3, 0), (16, -1), (5, 7), (-1, 2), (0, 0), (64, 3), (20, 20))),
        "causal": d.pick(("none", "bottom-right")),
    },
    "softcap": lambda d: {"softcap": d.pick((0.5, 2.0, 30.0))},
    "alibi": lambda d: {"alibi": d.pick(("geometric", "drawn"))},
    "bias": lambda d: {"bias": d.pick(("bhqk", "qk", "bk", "hqk", "qk:fp32", "bhqk:fp32"))},
    "mask": lambda d: {"mask": d.pick(("bhqk", "qk", "bk"))},
    "sinks": lambda d: {"sinks": True},
    "lengths": lambda d: {"lengths": d.pick(("kv", "both")), "batch": d.pick((2, 3))},
    "scale": lambda d: {"scale": d.pick((0.25, 0.5, 0.0625))},
}
ALL_OPTIONS = tuple(OPTIONS)


def cases(
    *,
    options: Sequence[str] = ALL_OPTIONS,
    always: Sequence[str] = (),
    change: Callable[[Draw, Fields], Fields] = lambda draw, fields: {},
    lengths: Sequence[int] = LENGTHS,
    dims: Sequence[tuple[int, int]] = DIMS,
    layouts: Sequence[str] = LAYOUTS,
    values: Sequence[str] = ("normal",),
    backward: bool = False,
) -> Drawing:
    """A drawing of cases.

    Args:
        options: those that a case may have. Case 0 has none of them, the next ones one each in turn, then two.
        always: options that every case has.
        change: what must be so, given everything else.
        lengths, dims, layouts, values: the menus.
        backward: ask for gradients.
    """

    def draw(
        law: str,
        index: int,
        dtype: str,
        holds: Callable[[Case], bool],
        some: Collection[str] | None,
        few: bool,
    ) -> Case | None:
        from effattn.case import Case

        source = Draw(f"effattn law {law} {index}" + ("" if some is None else " again"))
        free = [name for name in options if name not in always and (some is None or name in some)]
        if few:
            free = [name for name in free if all(_together(name, other) for other in always)]
        for attempt in range(400 if some is None else _DRAWS_OF_SOME):
            # The option whose turn it is may be one that the law does not speak of: then any two.
            turn = index if attempt < 50 else 10_000 + attempt
            menus = (lengths, dims, GROUPS, layouts)
            fields = _shape(source, *(_few(lengths, dims, layouts, index) if few else menus))
            for name in always:
                fields |= OPTIONS[name](source)
            chosen = _chosen(source, free, turn, start=len(law))
            if few and not all(map(_together, chosen, chosen[1:])):
                chosen = chosen[:1]
            for name in chosen:
                fields |= OPTIONS[name](source)
            fields |= {"values": source.pick(values), "seed": index, "dtype": dtype, "backward": backward}
            fields |= change(source, fields)
            try:
                case = Case(**fields)
            except RequestError:
                continue  # options that exclude each other
            if holds(case):
                return case
        if some is not None:
            return None
        raise AssertionError(f"no case for the law {law!r} in 400 draws")

    return draw


def _few(
    lengths: Sequence[int], dims: Sequence[tuple[int, int]], layouts: Sequence[str], index: int
) -> tuple[Sequence[int], Sequence[tuple[int, int]], Sequence[tuple[int, int]], Sequence[str]]:
    """The menus for the first cases of a law, which share compiled kernels.

    Triton compiles a kernel for each padded head_dim, and for each set of integers that are 1: one head_dim, several heads,
    lengths of more than 1, and rows whose elements are consecutive, every second time in the plain layout. Most kernels
    are also compiled for the options that they are given: see `_PAIRS`.
    """
    longer = [n for n in lengths if n > 1]
    dense = [name for name in layouts if name.partition("+")[0].endswith("d") and "step" not in name]
    return (
        longer or lengths,
        _FIRST_DIMS if _FIRST_DIMS[0] in dims else dims[:1],
        _SEVERAL_HEADS,
        (dense or layouts) if index % 2 else ("bhsd",),
    )


def _together(one: str, other: str) -> bool:
    """Whether first cases may have both options."""
    return one == other or one in _NUMBERS or other in _NUMBERS or frozenset((one, other)) in _PAIRS


def _shape(
    draw: Draw,
    lengths: Sequence[int],
    dims: Sequence[tuple[int, int]],
    groups: Sequence[tuple[int, int]],
    layouts: Sequence[str],
) -> Fields:
    kv_heads, group = draw.pick(groups)
    head_dim, v_dim = draw.pick(dims)
    return {
        "batch": draw.pick((1, 2)),
        "heads": kv_heads * group,
        "kv_heads": kv_heads,
        "q_len": draw.pick(lengths),
        "kv_len": draw.pick(lengths),
        "head_dim": head_dim,
        "v_dim": v_dim,
        "layout": draw.pick(layouts),
    }


def _chosen(draw: Draw, options: Sequence[str], index: int, *, start: int) -> list[str]:
    """None, then each in turn, then two; laws begin at different ones, so that a few cases of each reach all."""
    if not options or index == 0:
        return []
    if index <= len(options):
        return [options[(index + start) % len(options)]]
    first = draw.pick(options)
    return [first, draw.pick(options)] if draw.chance(0.7) else [first]
