"""Hypothesis strategies that draw cases: recipes of about 150 bytes, never arrays.

A recipe is drawn in a fraction of a millisecond, shrinks field by field, and is printed as what it is. The
strategies draw from the same menus as the profiles do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from effattn.errors import RequestError
from effattn.properties import menus

if TYPE_CHECKING:
    from effattn.case import Case

#: Upper limit of batch * heads * q_len * kv_len of a drawn case.
MOST_SCORES = 500_000


def lengths(*, most: int = 300, least: int = 0) -> st.SearchStrategy[int]:
    """Sequence lengths from `least` to `most`: mostly at the edges of tiles, sometimes anything."""
    if not 0 <= least <= most:
        raise RequestError(f"lengths(least={least}, most={most}): expected 0 <= least <= most")
    edges = [n for n in menus.LENGTHS if least <= n <= most]
    anything = st.integers(least, most)
    return st.one_of(st.sampled_from(edges), st.sampled_from(edges), anything) if edges else anything


def head_dims(*, most: int = 256) -> st.SearchStrategy[int]:
    """Head dimensions from 1 to `most`, mostly at most 128."""
    if not 1 <= most <= 256:
        raise RequestError(f"head_dims(most={most}): expected 1 <= most <= 256")
    menu = [d for d in menus.HEAD_DIMS if d <= most]
    choices: list[st.SearchStrategy[int]] = [st.sampled_from(menu)] * 6
    choices.append(st.integers(1, min(most, 128)))
    if most > 128:
        choices.append(st.sampled_from([d for d in menus.LARGE_HEAD_DIMS if d <= most]))
    return st.one_of(choices)


def layouts() -> st.SearchStrategy[str]:
    """Layouts of every kind: the order of the axes, then any of the ways to be not contiguous."""
    order = st.one_of(st.just(menus.CONTIGUOUS), st.permutations("bhsd").map("".join))
    suffixes = st.lists(st.sampled_from(menus.LAYOUT_SUFFIXES), unique=True, max_size=3).map(sorted)
    expanded = st.one_of(st.just(()), st.sampled_from(menus.EXPANDED_SUFFIXES).map(lambda suffix: (suffix,)))
    built = st.builds(lambda o, s, e: o + "".join(s) + "".join(e), order, suffixes, expanded)
    return st.one_of(st.just(menus.CONTIGUOUS), built)


def cases(
    *,
    dtype: str | None = None,
    causal: Sequence[str] = menus.CAUSAL,
    values: Sequence[str] | None = None,
    most_length: int = 300,
    most_head_dim: int = 256,
    most_scores: int = MOST_SCORES,
    options: Sequence[str] = (),
    backward: bool = False,
) -> st.SearchStrategy[Case]:
    """Cases of any kind.

    Args:
        dtype: "fp16", "bf16" or "fp32"; None draws one of them.
        causal: the masks to draw from.
        values: the value distributions to draw from; None stands for all generated ones.
        most_length: the longest q_len and kv_len.
        most_head_dim: the largest head_dim and v_dim.
        most_scores: the largest batch * heads * q_len * kv_len; larger draws lose batches and heads.
        options: options of `menus.OPTIONS`, of which a case has none, one or two.
        backward: whether gradients may be asked for.

    Raises:
        RequestError: an argument that no case can satisfy, at once and not at the first draw.
    """
    from effattn.case import CAUSAL, DTYPES

    dtypes = DTYPES if dtype is None else (dtype,)
    names = menus.value_names() if values is None else tuple(values)
    for what, given, known in (
        ("dtype", dtypes, DTYPES),
        ("causal", tuple(causal), CAUSAL),
        # A distribution's name is checked when a case is made: names of real inputs are not listed.
        ("values", names, names),
        ("options", tuple(options), tuple(menus.OPTIONS)),
    ):
        if not given and what != "options":
            raise RequestError(f"cases({what}=()): expected at least one to draw from")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise RequestError(
                f"cases({what}=...): unknown {', '.join(unknown)}; expected some of {', '.join(known)}"
            )
    if most_scores < most_length**2:
        raise RequestError(
            f"cases(most_scores={most_scores}, most_length={most_length}): one head of the longest lengths "
            f"has {most_length**2} scores; expected most_scores to be at least that"
        )
    length, dim = lengths(most=most_length), head_dims(most=most_head_dim)
    return _cases(
        dtype=st.sampled_from(dtypes),
        causal=st.sampled_from(tuple(causal)),
        values=st.sampled_from(names),
        q_len=st.one_of(length, length, st.just(min(1, most_length))),
        kv_len=st.one_of(length, length, st.none()),
        head_dim=dim,
        v_dim=st.one_of(st.none(), st.none(), st.none(), dim),
        scale=st.one_of(st.none(), st.none(), st.none(), st.sampled_from(menus.SCALES)),
        layout=layouts(),
        seed=st.integers(0, 2**16 - 1),
        backward=st.booleans() if backward else st.just(False),
        extra=_options(tuple(options)),
        most_scores=most_scores,
    )


def _options(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, Any]]:
    """Fields of none, one or two of these options."""
    if not names:
        return st.just({})
    # Most cases have one: each option, with and without gradients, is a regime of its own.
    some = st.lists(st.sampled_from(names), unique=True, min_size=1, max_size=2)
    fields = st.one_of(some, some, some, st.just([])).flatmap(
        lambda chosen: st.tuples(*(st.sampled_from(menus.OPTIONS[name]) for name in chosen))
    )
    return fields.map(lambda parts: {name: value for part in parts for name, value in part.items()})


@st.composite
def _cases(draw: st.DrawFn, *, most_scores: int, **fields: st.SearchStrategy[Any]) -> Case:
    """A case with these fields; a kv_len of None stands for that of q_len."""
    from effattn.case import Case

    kv_heads, group = draw(st.sampled_from(menus.GROUPS))
    batch = draw(st.sampled_from(menus.BATCHES))
    drawn = {name: draw(strategy) for name, strategy in fields.items()}
    if drawn["kv_len"] is None:
        drawn["kv_len"] = drawn["q_len"]
    per_head = max(1, drawn["q_len"] * drawn["kv_len"])
    batch = max(1, min(batch, most_scores // (kv_heads * group * per_head)))
    group = max(1, min(group, most_scores // (batch * kv_heads * per_head)))
    kv_heads = max(1, min(kv_heads, most_scores // (batch * group * per_head)))
    return Case(batch=batch, heads=kv_heads * group, kv_heads=kv_heads, **drawn.pop("extra"), **drawn)
