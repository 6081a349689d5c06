"""Laws: properties that every correct attention kernel has, whatever its accuracy. The machinery; the laws themselves
are in the files `laws_*.py`, a family each, and `effattn.properties.catalogue` has them all.

A law is a function of a `Trial`: it calls the method on related inputs and compares what comes back. Its name is its
sentence, its docstring the statement. Two answers are compared in one of two ways:

- bits: equal as numbers, NaN equal to NaN. What a law of this kind states holds in exact arithmetic and in any order of
  rounding that does not depend on what the law changes.
- rounding: equal within the sum of what the envelope allows each of them.

A method that does not promise equal bits, since its sums depend on the shape of the whole call, declares
`@effattn.method(same_bits=False)`: then laws of the first kind are held to rounding, and what is hidden must still not
show. One that multiplies hidden values by a weight of 0 declares `nan_safe=False`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from effattn.errors import NotSupported, RequestError, WrongReturn

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.methods.base import Method, Output
    from effattn.properties.law_draws import Drawing
    from effattn.tolerances.numerics import Numerics

FAMILIES: dict[str, str] = {
    "values": "what the output is made of",
    "masks": "what a query does not see",
    "options": "options and their neutral values",
    "structure": "batches, heads, rows, strides, splits",
    "memory": "what is read, written and kept",
    "numbers": "large, small, infinite and undefined numbers",
    "gradients": "the backward pass",
    "dropout": "the statistics of dropout",
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where two answers differ most, by more than is allowed."""

    #: "out", "lse", or what the law made of them
    name: str
    index: tuple[int, ...]
    #: what came and what was expected there, float64: for four axes the whole row along the last one
    got: torch.Tensor
    want: torch.Tensor
    allowed: float


class Broken(Exception):
    """The law does not hold; the text says where, what came and what was expected."""

    def __init__(self, text: str, difference: Difference | None = None) -> None:
        super().__init__(text)
        self.difference = difference


class Raised(Exception):
    """The method raised; the cause is what it raised. Whatever else leaves a law is a fault of the law."""


class SetAside(Exception):
    """The case cannot show the law; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Law:
    """One law of the catalogue."""

    name: str
    #: one of FAMILIES
    family: str
    #: the docstring: what is stated, and why it holds
    statement: str
    check: Callable[[Trial], None]
    #: the case of number `index`, drawn from a seed
    draw: Callable[[str, int, str], Case]
    #: the same with some of the options only, for a method that takes the case, and whether it is one of the few that
    #: share kernels; None if the draws find none
    redraw: Callable[[str, int, str, Collection[str], Callable[[Case], bool], bool], Case | None]
    #: whether a case, perhaps a shrunk one, is one that the law speaks of
    holds: Callable[[Case], bool]
    #: whether gradients are asked for
    gradients: bool = False
    #: "bits" or "rounding"
    compares: str = "rounding"
    #: whether it holds where operands are quantised by factors that depend on all of a tensor
    quantised: bool = False

    @property
    def sentence(self) -> str:
        """The name in words."""
        return self.name.replace("_", " ")


LAWS: dict[str, Law] = {}


def law(
    family: str,
    *,
    draw: Drawing,
    holds: Callable[[Case], bool] = lambda case: True,
    gradients: bool = False,
    bits: bool = False,
    quantised: bool = False,
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Puts a function of a `Trial` into the catalogue; see `Law` for the arguments."""

    from effattn.properties.law_draws import FEW

    def first(name: str, index: int, dtype: str) -> Case:
        case = draw(name, index, dtype, holds, None, index < FEW)
        assert case is not None
        return case

    def add(check: Callable[[Trial], None]) -> Callable[[Trial], None]:
        name = check.__name__
        assert family in FAMILIES
        assert name not in LAWS
        assert check.__doc__
        LAWS[name] = Law(
            name=name,
            family=family,
            statement=" ".join(check.__doc__.split()),
            check=check,
            draw=first,
            redraw=lambda name, index, dtype, some, takes, few: draw(
                name, index, dtype, lambda case: holds(case) and takes(case), some, few
            ),
            holds=holds,
            gradients=gradients,
            compares="bits" if bits else "rounding",
            quantised=quantised,
        )
        return check

    return add


@dataclass
class Trial:
    """One law, one case, one method: what a law asks and what it compares with."""

    law: Law
    case: Case
    method: Method
    device: str = "cpu"
    #: comparisons made: a law that made none has judged nothing
    compared: int = field(default=0, init=False)
    #: what calls changed of the process, see `effattn.methods.surroundings`
    changed: dict[str, str] = field(default_factory=dict, init=False)
    #: whether the law hid NaN or infinity in K or V
    hid: bool = field(default=False, init=False)

    def inputs(self) -> Inputs:
        """The tensors of the case, fresh."""
        return self.case.tensors(self.device)

    def __call__(self, inputs: Inputs, case: Case | None = None) -> Output:
        """The method on these tensors, which it does not get itself but equal ones in the same layout."""
        case = self.case if case is None else case
        reason = self.method.unsupported(case)
        if reason is not None:
            raise SetAside(f"not supported: {reason}")
        output = self.on(twin(inputs), case)
        wrong = _wrong_form(case, output)
        if wrong is not None:
            raise Broken(wrong)
        return output

    def on(self, inputs: Inputs, case: Case | None = None) -> Output:
        """The method on these very tensors; `Raised` where it raises what is no answer."""
        from effattn.methods import surroundings

        try:
            with surroundings.watched() as changed:
                output = self.method(self.case if case is None else case, inputs)
            self.changed |= changed
            return output
        except (NotSupported, NotImplementedError, WrongReturn, RequestError):
            raise
        except BaseException as error:
            if surroundings.interrupted(error):
                raise
            raise Raised(type(error).__name__) from error  # its text may be what raises next

    @property
    def same_bits(self) -> bool:
        """Whether the method promises that equal questions have equal bits."""
        return self.method.same_bits

    @property
    def nan_safe(self) -> bool:
        """Whether the method promises that NaN and infinity in what a row does not see leave the row alone."""
        return self.method.nan_safe

    def garbage(self, *, keys: bool = True) -> float:
        """What a law puts where nobody looks: NaN or an infinity, or a large number if these may show.

        Args:
            keys: it goes into hidden keys and values, so that 0 * NaN explains a NaN in the output.
        """
        self.hid |= keys and self.nan_safe
        return (math.nan, math.inf, -math.inf)[self.case.seed % 3] if self.nan_safe else 1000.0

    def bounds(self, inputs: Inputs, case: Case | None = None) -> dict[str, torch.Tensor]:
        """What a correct kernel may be off by, per element: "out", "lse" and gradients by name, float64."""
        from effattn.properties.allowance import bounds

        case = self.case if case is None else case
        keep = self.method.dropout_mask(case, inputs.q.device) if case.dropout else None
        return bounds(case, inputs, self.numerics(case), keep=keep)

    def numerics(self, case: Case) -> Numerics:
        """What the method declares, under the dot model that is in force."""
        from effattn.judge import declared

        return declared(self.method, case, self.device)

    # -- comparisons ------------------------------------------------------------------------------------------------

    def same(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        why: str,
        *,
        slack: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        """Bits. Where the method does not promise them, `slack()` is what rounding allows; None: bits all the same."""
        import torch

        if self.same_bits or slack is None:
            got, want = _plain(got), _plain(want)
            self._compare(name, got, want, torch.zeros_like(want), f"{why}, bit for bit", slack)
        else:
            self.close(name, got, want, slack(), why)

    def close(
        self, name: str, got: torch.Tensor, want: torch.Tensor, allowed: torch.Tensor, why: str
    ) -> None:
        """Within `allowed`, per element. NaN equals NaN; an infinity itself."""
        self._compare(name, _plain(got), _plain(want), _plain(allowed), why, None)

    def true(self, holds: bool, message: str) -> None:
        """A condition that is not about elements."""
        self.compared += 1
        if not holds:
            raise Broken(message)

    def _compare(
        self,
        name: str,
        got: torch.Tensor,
        want: torch.Tensor,
        allowed: torch.Tensor,
        why: str,
        slack: Callable[[], torch.Tensor] | None,
    ) -> None:
        import torch

        if got.shape != want.shape:
            raise Broken(f"{name} has the shape {tuple(got.shape)}; expected {tuple(want.shape)}: {why}")
        if not want.numel():
            return
        self.compared += 1
        difference = (got - want).abs()
        right = (got == want) | (got.isnan() & want.isnan()) | (difference <= allowed)
        if bool(right.all()):
            return
        worst = torch.where(
            right, -1.0, torch.nan_to_num(difference / allowed.clamp(min=1e-300), nan=torch.inf)
        )
        index = tuple(int(i) for i in torch.unravel_index(worst.argmax(), worst.shape))
        allowed_here = float(allowed.expand_as(want)[index])
        text = (
            f"{name}[{', '.join(map(str, index))}] is {float(got[index])!r}; expected {float(want[index])!r}"
            + (f" within {allowed_here:.3g}" if allowed_here else "")
            + f": {why}. {int((~right).sum())} of {right.numel()} elements are wrong"
        )
        if self.hid and bool((got.isnan() & ~want.isnan()).any()):
            text += (
                ". This is what 0 * NaN (or 0 * infinity) in a masked tile gives: a weight of 0 does not hide a value."
                " Mask V as well (`other=0` where it is loaded), or declare @effattn.method(nan_safe=False)"
            )
        elif slack is not None:
            small = difference <= _plain(slack())
            if bool((small | right).all()):
                text += (
                    "; all of them are within rounding. If the kernel does not promise equal bits, declare"
                    " @effattn.method(same_bits=False)"
                )
        row = index[:3] if len(index) == 4 else index
        raise Broken(
            text, Difference(name=name, index=index, got=got[row], want=want[row], allowed=allowed_here)
        )


def twin(inputs: Inputs) -> Inputs:
    """Equal tensors in memory of their own, in the same layout, with the same surroundings.

    Tensors that share memory do so in the copy.
    """
    copies: dict[int, Any] = {}

    def copy(x: torch.Tensor) -> torch.Tensor:
        import torch

        storage = x.untyped_storage()
        if storage.data_ptr() not in copies:
            copies[storage.data_ptr()] = storage.clone()
        fresh = torch.empty(0, dtype=x.dtype, device=x.device)
        return fresh.set_(copies[storage.data_ptr()], x.storage_offset(), x.shape, x.stride())

    extras = replace(inputs.extras, **{name: copy(x) for name, x in inputs.extras.present().items()})
    return type(inputs)(*(copy(x) for x in inputs), extras=extras)


def with_tensors(inputs: Inputs, **tensors: torch.Tensor) -> Inputs:
    """The inputs with q, k or v replaced."""
    replaced = (tensors.get(name, x) for name, x in zip("qkv", inputs, strict=True))
    return type(inputs)(*replaced, extras=inputs.extras)


def check(law: Law, case: Case, method: Method, *, device: str = "cpu") -> Trial:
    """Tries the law on the case.

    Raises `Broken`, `SetAside`, `Raised` where the method raised, and what says that the method does not offer the case.
    """
    if (reason := excluded(law, case, method)) is not None:
        raise SetAside(reason)
    trial = Trial(law, case, method, device)
    law.check(trial)
    if not trial.compared:
        raise SetAside("there was nothing to compare")
    return trial


def excluded(law: Law, case: Case, method: Method) -> str | None:
    """Why the law cannot be asked of the method on the case; None if it can, as far as one can tell before."""
    if not law.holds(case):
        return "the law does not speak of this case"
    if not law.quantised and (numerics := method.numerics(case)).quantised:
        return (
            "not supported: operands are quantised by factors that depend on all of a tensor, and the law changes tensors"
            f" (numerics {numerics.name!r})"
        )
    return None


def get(name: str) -> Law:
    """The law of that name. Raises `RequestError` with the closest names for an unknown one."""
    from difflib import get_close_matches

    from effattn.properties import catalogue

    laws = catalogue.all_laws()
    if name in LAWS:
        return LAWS[name]
    close = [known for known in laws if name in known][:3] or get_close_matches(name, laws, n=3)
    hint = f"; did you mean {', '.join(close)}?" if close else ""
    raise RequestError(f"unknown law {name!r}: `effattn laws` lists them{hint}")


def _plain(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x.detach().to("cpu", torch.float64)


def _wrong_form(case: Case, output: Output) -> str | None:
    """What is wrong with the shape or dtype of an output; None if nothing."""
    import torch

    shape = (case.batch, case.heads, case.q_len, case.v_dim)
    if tuple(output.out.shape) != shape:
        return f"out has the shape {tuple(output.out.shape)}; expected {shape}"
    if output.out.dtype != case.torch_dtype:
        return f"out has the dtype {output.out.dtype}; expected {case.torch_dtype}"
    if output.lse is not None:
        if tuple(output.lse.shape) != shape[:3]:
            return f"lse has the shape {tuple(output.lse.shape)}; expected {shape[:3]}"
        if output.lse.dtype not in (torch.float32, torch.float64, case.torch_dtype):
            return f"lse has the dtype {output.lse.dtype}; expected torch.float32"
    return None


def parts(output: Output) -> Iterator[tuple[str, torch.Tensor]]:
    """out, and lse where there is one."""
    yield "out", output.out
    if output.lse is not None:
        yield "lse", output.lse


def grouped(laws: Sequence[Law]) -> Iterator[tuple[str, list[Law]]]:
    """The laws, family by family, in the order of FAMILIES."""
    for family, members in itertools.groupby(laws, key=lambda one: one.family):
        yield family, list(members)
