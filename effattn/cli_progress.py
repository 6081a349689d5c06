"""How far a gate or a sweep is, on the standard error: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from effattn.gate import Question
    from effattn.verdict import Verdict

#: seconds between two lines
EVERY = 60.0


@contextlib.contextmanager
def shown() -> Iterator[Lines | Bar]:
    """What a gate tells how far it is."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from effattn.report import terminal

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
        yield Bar(bar)


@contextlib.contextmanager
def counted(total: int) -> Iterator[Callable[[int, int], None]]:
    """What a sweep of so many cases tells how far it is: called with the number that are done, and of all, at first, too."""
    if not sys.stderr.isatty():
        yield Count().done
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from effattn.report import terminal

    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal.console(stderr=True), transient=True) as bar:
        task = bar.add_task("judging", total=total)
        yield lambda done, _total: bar.update(task, completed=done)


class Count:
    """A line at the begin, and one where `every` seconds have passed since the last, and something may be left."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self._last: float | None = None

    def done(self, done: int, total: int) -> None:
        """So many cases are done; combinations that are the same case as another count in the total alone."""
        now = time.monotonic()
        if done >= total or (self._last is not None and now - self._last < self._every):
            return
        if self._last is not None:
            words = f"{done:,} of {_counted(total, 'case')} judged"
        elif done:
            words = f"judging {_counted(total, 'case')}, of which {done:,} are recorded"
        else:
            words = f"judging {_counted(total, 'case')}"
        self._last = now
        click.echo(f"effattn: {words}", err=True)


class Bar:
    """On a terminal."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None)
        self._total = 0

    def begin(self, questions: Sequence[Question]) -> None:
        """The questions to come."""
        self._total = len(questions)
        self._bar.update(self._task, total=self._total, completed=0, description="judging")

    def judged(self, verdict: Verdict, remaining: int) -> None:
        """One has been answered."""
        self._bar.update(self._task, completed=self._total - remaining)

    def stage(self, words: str) -> None:
        """What is done besides."""
        self._bar.update(self._task, description=words)


class Lines:
    """A line at the begin, and one where `every` seconds have passed since the last."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self._total = self._failed = 0
        self._last = time.monotonic()

    def begin(self, questions: Sequence[Question]) -> None:
        """The questions to come."""
        self._total, self._failed = len(questions), 0
        compared = [question for question in questions if question.law is None]
        parts = [_counted(len(compared), "case")] if compared else []
        if len(compared) < len(questions):
            laws = len({question.law for question in questions} - {None})
            parts.append(f"{_counted(laws, 'law')} on {_counted(len(questions) - len(compared), 'case')}")
        dtypes = ", ".join(dict.fromkeys(question.case.dtype for question in questions))
        self._say(f"judging {' and '.join(parts)}: {dtypes}")

    def judged(self, verdict: Verdict, remaining: int) -> None:
        """One has been answered."""
        from effattn.report import summary

        self._failed += summary.failed(verdict.outcome)
        if not remaining and self._failed:
            self._say(f"{self._failed} of {self._total} cases failed; making one of each kind small")
        elif remaining and self._late:
            self._say(f"{self._total - remaining} of {self._total} cases judged, {self._failed} failed")

    def stage(self, words: str) -> None:
        """What is done besides: said only where it takes long."""
        if self._late:
            self._say(words)

    @property
    def _late(self) -> bool:
        return time.monotonic() - self._last >= self._every

    def _say(self, words: str) -> None:
        self._last = time.monotonic()
        click.echo(f"effattn: {words}", err=True)


def _counted(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n:,} {what}s"
