"""How many threads torch gets for a case."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.case import Case

#: Multiplications of a case below which torch gets one thread. Threads gain little there, and where other
#: programs want the cores too, waiting for each other makes a case ten times slower.
SMALL = 1 << 27


@contextlib.contextmanager
def fitted(case: Case) -> Iterator[None]:
    """As many as suit the size of the case: the same in a gate, in a replay and under pytest."""
    work = case.batch * case.heads * case.q_len * case.kv_len * max(case.head_dim, case.v_dim)
    if work >= SMALL:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
