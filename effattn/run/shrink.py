"""Makes a failing case small: the greedy search over its recipe.

Fewer batches, heads, rows, keys and dimensions; a plainer layout, mask, scale and distribution; each step is
kept if the case still fails in the same way. The search is deterministic, its number of judgements bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.judge import Verdict

#: Judgements spent on one counterexample.
MOST_JUDGEMENTS = 200
#: Tried besides the case's own seed where a step changes the shapes.
OTHER_SEEDS = (0, 1)

#: what a case without an option has
_USUAL: dict[str, Any] = {
    "backward": False, "dropout": 0.0, "lengths": "none", "mask": "none", "bias": "none", "alibi": "none",
    "sinks": False, "softcap": None, "window": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Shrunk:
    """The smallest failing case that was found."""

    verdict: Verdict
    #: Judgements that the search took.
    judgements: int
    #: False where the limit ended the search before no step helped any more.
    finished: bool


def shrink(
    verdict: Verdict, judge: Callable[[Case], Verdict], *, most_judgements: int = MOST_JUDGEMENTS
) -> Shrunk:
    """Shrink the case of a failed verdict while its outcome stays.

    Args:
        verdict: a failed verdict.
        judge: judges a case by the same method on the same device.
        most_judgements: limit of the search.
    """
    best = verdict
    seen = {verdict.case.id}
    used = 0
    progress = True
    while progress:
        progress = False
        for candidate in candidates(best.case):
            if candidate.id in seen:
                continue
            if used >= most_judgements:
                return Shrunk(verdict=best, judgements=used, finished=False)
            seen.add(candidate.id)
            used += 1
            judged = judge(candidate)
            if judged.outcome == verdict.outcome:
                best = judged
                progress = True
                break
    return Shrunk(verdict=best, judgements=used, finished=True)


def candidates(case: Case) -> Iterator[Case]:
    """Plainer cases, the boldest steps first."""
    for changes in _changes(case):
        if all(getattr(case, name) == value for name, value in changes.items()):
            continue
        # Other shapes draw other numbers, and whether those fail is a matter of luck where an error is rare.
        others = OTHER_SEEDS if _redraws(changes) else ()
        for seed in dict.fromkeys((case.seed, *others)):
            try:
                candidate = replace(case, **{"seed": seed, **changes})
            except RequestError:
                # A combination that is not a case; other steps lead on.
                break
            yield candidate


def _redraws(changes: Mapping[str, Any]) -> bool:
    return not changes.keys() & {"layout", "causal", "scale", "seed", *_USUAL}


def _changes(case: Case) -> Iterator[dict[str, Any]]:
    yield {"batch": 1}
    for heads, kv_heads in _fewer_heads(case.heads, case.kv_heads):
        yield {"heads": heads, "kv_heads": kv_heads}
    if case.batch > 2:
        yield {"batch": 2}

    yield {"layout": "bhsd"}
    order, *suffixes = case.layout.split("+")
    if suffixes:
        yield {"layout": order}
        for dropped in suffixes:
            yield {"layout": "+".join([order, *(suffix for suffix in suffixes if suffix != dropped)])}
    yield {"layout": "+".join(["bhsd", *suffixes])}

    yield from _fewer_options(case)
    yield {"causal": "none"}
    yield {"scale": None}
    yield {"values": "normal"}

    # Both lengths together first: many failures need the difference, or none, between them.
    for n in _smaller(min(case.q_len, case.kv_len)):
        less = min(case.q_len, case.kv_len) - n
        yield {"q_len": case.q_len - less, "kv_len": case.kv_len - less}
    for n in _smaller(case.q_len):
        yield {"q_len": n}
    for n in _smaller(case.kv_len):
        yield {"kv_len": n}
    if case.v_dim == case.head_dim:
        for n in _smaller(case.head_dim, least=1):
            yield {"head_dim": n, "v_dim": n}
    else:
        yield {"v_dim": case.head_dim}
        for n in _smaller(case.head_dim, least=1):
            yield {"head_dim": n}
        for n in _smaller(case.v_dim, least=1):
            yield {"v_dim": n}
    yield {"seed": 0}


def _fewer_options(case: Case) -> Iterator[dict[str, Any]]:
    """All options left out, each by itself, and what is less of one."""
    yield _USUAL
    for name, value in _USUAL.items():
        yield {name: value}
    if case.lengths == "both":
        yield {"lengths": "kv"}
    yield {"bias": case.bias.partition(":")[0]}
    for name in ("bias", "mask"):
        axes = getattr(case, name).partition(":")[0]
        if axes not in ("none", "qk") and len(axes) > 2:
            yield {name: "qk"}


def _fewer_heads(heads: int, kv_heads: int) -> list[tuple[int, int]]:
    """Fewer (heads, kv_heads), the fewest first: the usual kinds of grouping, or one head less."""
    group = heads // kv_heads
    kinds = [(1, 1), (2, 1), (2, 2), (group, 1), (kv_heads, kv_heads), (4, 2)]
    if kv_heads > 1:
        kinds.append((group * (kv_heads - 1), kv_heads - 1))
    if group > 1:
        kinds.append((kv_heads * (group - 1), kv_heads))
    return sorted({(h, k) for h, k in kinds if h <= heads and k <= kv_heads and (h, k) != (heads, kv_heads)})


def _smaller(n: int, *, least: int = 0) -> Iterator[int]:
    """Smaller numbers, from the smallest up to n - 1, each half as far from n as the one before."""
    yield from (k for k in (least, 1) if least <= k < n)
    distance = n - 1
    while distance > 1:
        distance //= 2
        yield n - distance
