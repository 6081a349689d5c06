"""How far a gate is, on the standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from effattn.gate import Progress, Question
    from effattn.verdict import Verdict

#: seconds between two lines
EVERY = 60.0


@contextlib.contextmanager
def shown(questions: Sequence[Question]) -> Iterator[Progress]:
    """What to call after each verdict."""
    if not sys.stderr.isatty():
        yield Lines(questions)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from effattn.report import terminal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
        task = bar.add_task("judging", total=len(questions))

        def advance(_verdict: Verdict, remaining: int) -> None:
            bar.update(
                task,
                completed=len(questions) - remaining,
                description="judging" if remaining else "shrinking failures",
            )

        yield advance


class Lines:
    """A line where a dtype begins, and one with counts where `every` seconds have passed since the last line."""

    def __init__(self, questions: Sequence[Question], every: float = EVERY) -> None:
        self._dtypes = [question.case.dtype for question in questions]
        self._cases = Counter(self._dtypes)
        self._every = every
        self._begun: set[str] = set()
        self._failed = 0
        self._begin(0)

    def __call__(self, verdict: Verdict, remaining: int) -> None:
        from effattn.report import summary

        self._failed += summary.failed(verdict.outcome)
        done = len(self._dtypes) - remaining
        if not remaining:
            if self._failed:
                self._say(f"{self._failed} of {done} cases failed; making one of each kind small")
        elif self._dtypes[done] not in self._begun:
            self._begin(done)
        elif time.monotonic() - self._last >= self._every:
            self._say(f"{done} of {len(self._dtypes)} cases judged, {self._failed} failed")

    def _begin(self, at: int) -> None:
        if at < len(self._dtypes):
            dtype = self._dtypes[at]
            self._begun.add(dtype)
            count = self._cases[dtype]
            self._say(f"judging {count} {dtype} {'case' if count == 1 else 'cases'}")

    def _say(self, words: str) -> None:
        self._last = time.monotonic()
        click.echo(f"effattn: {words}", err=True)
