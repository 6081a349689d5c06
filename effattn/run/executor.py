"""Runs cases one after the other in this process.

Verdicts come in the order of the cases, one at a time, so that a caller can record and show each as it comes.
Whatever a method does becomes a verdict. What is effattn's own fault is not caught.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.judge import Verdict
    from effattn.methods.base import Method

#: Multiplications of a case below which torch gets one thread. Threads gain little there, and where other
#: programs want the cores too, waiting for each other makes a case ten times slower.
SMALL = 1 << 27


def run(cases: Iterable[Case], method: Method, *, device: str = "cpu") -> Iterator[Verdict]:
    """Judge each case in turn; the verdicts in the same order."""
    for case in cases:
        yield judge(case, method, device=device)


def judge(case: Case, method: Method, *, device: str = "cpu") -> Verdict:
    """Judge one case, with the number of threads that suits its size: the same for a gate and for a replay."""
    from effattn import judge as judging

    with _threads(case):
        return judging.judge(case, method, device=device)


@contextlib.contextmanager
def _threads(case: Case) -> Iterator[None]:
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
