"""Which cases a method is asked under a law: those that it offers and in which the law has something to compare.

The first draws are the same for every method. Where it does not offer one of them, or the law would compare nothing, others
are drawn in its place, with the options that the method has: plain ones first, at most `MOST_DRAWS`. A law that still has
no case is one that the method cannot be asked, and the case that is left says why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from effattn.methods.base import Method, Output
from effattn.properties.law import Law, SetAside, Trial, excluded
from effattn.properties.law_draws import FEW, OPTIONS
from effattn.properties.profiles import Draw
from effattn.properties.regimes import options_of

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics

#: cases drawn in place of those that the method cannot be asked
MOST_DRAWS = 60
#: of these, draws in vain after which there is no hope
MOST_IN_VAIN = 10


def candidates(law: Law, method: Method, dtype: str, count: int) -> Iterator[Case]:
    """Cases that show the law by this method, the first `count` of every method first; the same on every machine."""
    met: set[Case] = set()
    for index in range(count):
        case = law.draw(law.name, index, dtype)
        if case not in met and silence(law, case, method) is None:
            yield case
        met.add(case)
    options = offered(method, dtype)
    vain = 0
    for index in range(MOST_DRAWS):
        few = count <= FEW or index < FEW
        case = law.redraw(law.name, index, dtype, options, lambda case: method.unsupported(case) is None, few)
        if case is None or case in met or silence(law, case, method) is not None:
            vain += 1
            if vain == MOST_IN_VAIN:
                return
            continue
        met.add(case)
        yield case


def unasked(law: Law, method: Method, dtype: str, count: int) -> Case:
    """The case that says best why the method cannot be asked: the plainest that would show the law by another method."""
    drawn = [law.draw(law.name, index, dtype) for index in range(max(count, MOST_IN_VAIN))]

    def plainness(case: Case) -> tuple[int, int]:
        reason = method.unsupported(case)
        return len(options_of(case)) + (case.scale is not None), 0 if reason is None else len(reason)

    for case in sorted(dict.fromkeys(drawn), key=plainness):
        if silence(law, case, method) is not None and silence(law, case, method, anything=True) is None:
            return case
    return drawn[0]


def offered(method: Method, dtype: str) -> tuple[str, ...]:
    """The options, of those that laws draw, of which the method takes at least one value in a plain case."""
    return tuple(option for option in OPTIONS if any(_takes(method, dtype, option, n) for n in range(4)))


def _takes(method: Method, dtype: str, option: str, number: int) -> bool:
    from effattn.case import Case

    fields: dict[str, Any] = {"q_len": 64, "kv_len": 64, "head_dim": 64, "dtype": dtype}
    return method.unsupported(Case(**fields | OPTIONS[option](Draw(f"{option} {number}")))) is None


def silence(law: Law, case: Case, method: Method, *, anything: bool = False) -> str | None:
    """Why the law would compare nothing on the case, found without running the method; None if it compares something.

    Args:
        law, case, method: as for `effattn.properties.law.check`.
        anything: take the method for one that offers everything.
    """
    if not law.holds(case):
        return "the law does not speak of this case"
    if not anything:
        if (reason := method.unsupported(case)) is not None:
            return f"not supported: {reason}"
        if (reason := excluded(law, case, method)) is not None:
            return reason
    trial = _Listening(law, case, _Zeros(method, anything=anything))
    try:
        law.check(trial)
    except _Compares:
        return None
    except SetAside as aside:
        return str(aside)
    return "there was nothing to compare"


class _Compares(BaseException):
    """The law has come to a comparison. Not an `Exception`: that would be taken for one that the method raised."""


@dataclasses.dataclass
class _Listening(Trial):
    """A trial that ends at the first comparison."""

    def true(self, holds: bool, message: str) -> None:
        raise _Compares

    def bounds(self, inputs: Inputs, case: Case | None = None) -> dict[str, torch.Tensor]:
        raise _Compares  # asked for to compare, and slow to find

    def _compare(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        allowed: torch.Tensor,
        why: str,
        slack: Callable[[], torch.Tensor] | None,
    ) -> None:
        if got.numel():
            raise _Compares


class _Zeros(Method):
    """Answers zeros to whatever a method offers."""

    def __init__(self, method: Method, *, anything: bool) -> None:
        self.name, self.spec = method.name, method.spec
        self.same_bits, self.nan_safe = method.same_bits, method.nan_safe
        self._method, self._anything = method, anything

    def unsupported(self, case: Case) -> str | None:
        return None if self._anything else self._method.unsupported(case)

    def numerics(self, case: Case) -> Numerics:
        return self._method.numerics(case)

    def dropout_mask(self, case: Case, device: torch.device) -> torch.Tensor:
        import torch

        return torch.ones(case.batch, case.heads, case.q_len, case.kv_len, dtype=torch.bool, device=device)

    def __call__(self, case: Case, inputs: Inputs) -> Output:
        import torch

        shape = (case.batch, case.heads, case.q_len, case.v_dim)
        out = torch.zeros(shape, dtype=case.torch_dtype, device=inputs.q.device)
        tensors = {**dict(zip("qkv", inputs, strict=True)), **inputs.extras.present()}
        wanted = [name for name in ("q", "k", "v", "bias", "sinks") if name in tensors]
        gradients = {name: torch.zeros_like(tensors[name]) for name in wanted} if case.backward else None
        return Output(out, out.new_zeros(shape[:3], dtype=torch.float32), gradients)
