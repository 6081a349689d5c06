"""Judges cases in this process.

What a method raises becomes a verdict; a method that ends the process ends it (`effattn.run.isolation` is for that).
What is effattn's own fault is not caught.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.gate import Question
    from effattn.judge import Verdict

T = TypeVar("T")


class Local:
    """Judges cases by one method in this process, where a debugger can follow; `isolation.Isolated` has the same form.

    Args:
        spec: the method as the command line names it.
        device: where it runs.
        checks: instruments that look at its kernels, see `effattn.cpu.checks`.

    Raises:
        RequestError: there is no such method, or no such device.
    """

    def __init__(self, spec: str, *, device: str = "cpu", checks: Sequence[str] = ()) -> None:
        from effattn import methods
        from effattn.methods import surroundings
        from effattn.run import work

        work.check_device(device)
        self.device, self.checks = device, tuple(checks)
        #: None: nothing can end a case in this process
        self.time_limit = None
        with surroundings.noted_import() as notes:
            self._method = methods.get(spec)
        self.notes = (*notes, *self._method.notes)
        self.name, self.spec = self._method.name, self._method.spec

    def judge(self, case: Case, law: str | None = None, *, weigh: str = "", explain: bool = False) -> Verdict:
        """Compare one case with exact attention, or try a law on it; `weigh` and `explain` as in `effattn.judge`."""
        from effattn import judge as judging
        from effattn import laws
        from effattn.properties.law import get

        if law is None:
            return judging.judge(
                case, self._method, device=self.device, checks=self.checks, weigh=weigh, explain=explain
            )

        return laws.judge_law(get(law), case, self._method, device=self.device)

    def judge_all(self, questions: Sequence[Question]) -> Generator[tuple[int, Verdict], None, None]:
        """Judge all of them, one after the other: the number of a question and its verdict."""
        for number, asked in enumerate(questions):
            yield number, self.judge(asked.case, asked.law, weigh=asked.weigh)

    def call(self, function: str, *arguments: Any) -> Any:
        """Call a function of effattn, `module:function`."""
        from effattn.methods import surroundings
        from effattn.run import work

        pid = os.getpid()
        try:
            return work.find(function)(*arguments)
        finally:
            surroundings.end_of_child(pid)

    def call_all(
        self, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Call a function of effattn for each tuple of arguments: the results, in order."""
        yield from (function(*one) for one in arguments)

    def close(self) -> None:
        """Nothing to end."""

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
