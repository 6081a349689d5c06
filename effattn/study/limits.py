"""What a study refuses before it starts: numbers that no machine has the memory for, or this one hasn't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from effattn.errors import RequestError

if TYPE_CHECKING:
    from effattn.study.engine import Job, Point

#: the most tokens, features, slots, head dimensions and draws: exact attention of so many tokens takes hours for each draw
MOST = 2**20
_FLOAT64 = 8


def check_count(option: str, value: int, what: str = "1") -> None:
    """RequestError for a number that is not from 1 to MOST; `what` follows "at least"."""
    if value < 1:
        raise RequestError(f"{option} {value}: expected at least {what}")
    if value > MOST:
        raise RequestError(f"{option} {value}: expected at most {MOST}, which is 2^20")


def check_memory(study: str, jobs: Sequence[Job]) -> None:
    """RequestError where a job must hold more than the memory that is available now."""
    from effattn.run.isolation import available_memory

    if not jobs:
        return
    need, point = max(
        ((least_bytes(study, point), point) for point in {job.point for job in jobs}),
        key=lambda pair: pair[0],
    )
    available = available_memory()
    if need > available:
        size = f", --size {point.size}" if point.part == "error" and point.size else ""
        raise RequestError(
            f"{point.method} with --n {point.n}{size}, --head-dim {point.head_dim} has to hold {_giga(need)}"
            f" at least, and {_giga(available)} are available; give smaller numbers, or take a larger machine"
        )


def least_bytes(study: str, point: Point) -> int:
    """What a point's measurement holds at one time at least. Of a user's own method that is what it gets and returns."""
    from effattn.study import linformer, performer
    from effattn.study.problems import real_shape

    n, d, size = point.n, point.head_dim, point.size
    if point.part == "moments":
        return 0
    if point.part == "lemma":
        return _FLOAT64 * n * n
    heads = real_shape(point.values).heads if point.values.startswith("real:") else 1
    # q, k, v, the output and the exact one
    held = 5 * heads * n * d
    if point.part != "error":
        held += 3 * heads * n * n  # singular vectors, or scores and their kernel, beside the weights
    elif study == "performer" and point.method in performer.METHODS:
        held += size * d // 2  # features may come in pairs
        if performer.METHODS[point.method][1] != "iid":
            held += 2 * d * d  # a block before and after it is made orthogonal
        if not point.causal:
            held += 2 * heads * n * size  # features of all queries and keys
    elif study == "linformer" and point.method in linformer.METHODS:
        held += (1 + heads) * n * size  # a projection, and the weights
    return _FLOAT64 * held


def _giga(count: int) -> str:
    return f"{count / 1e9:,.0f} GB" if count >= 1e10 else f"{count / 1e9:.2g} GB"
