"""The protocol of a method: it computes attention and says what it is to be judged by."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effattn.errors import NotSupported, WrongReturn

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs
    from effattn.tolerances.numerics import Numerics


@dataclass(frozen=True)
class Output:
    """What a method computed, as it came: shapes, dtypes and devices are for the judge to check."""

    out: torch.Tensor  #: (batch, heads, q_len, v_dim), in the dtype of the inputs
    lse: torch.Tensor | None = None  #: (batch, heads, q_len), natural logarithm, -inf in rows that see no key
    #: of "q", "k", "v", "bias", "sinks", those that the case has, for the upstream gradient `extras.d_out`
    gradients: dict[str, torch.Tensor] | None = None
    #: whether `extras.d_lse` went into them as well
    through_lse: bool = False


class Method(ABC):
    """Something that computes attention.

    A method reads its inputs and nothing else of the case than its options; it must not write to the inputs.
    Nothing stops it from doing so, so whoever compares its output with a reference computes that reference
    from tensors that the method never held: `case.tensors()` called again gives the same bits.
    """

    #: short, for tables
    name: str
    #: how the command line names this method again
    spec: str
    #: whether equal questions have equal bits, whatever else is in the batch; laws compare within rounding where not
    same_bits: bool = True
    #: whether NaN and infinity in what a row does not see leave the row alone; laws hide finite numbers only where not
    nan_safe: bool = True
    #: whether `numerics` is somebody's statement about this method, or what is held against any
    declares: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of a gate should know of the method."""
        return ()

    @abstractmethod
    def numerics(self, case: Case) -> Numerics:
        """What the method declares about its arithmetic on this case: what it is judged by."""

    def unsupported(self, case: Case) -> str | None:
        """Why the method does not offer this case, to follow the words "not supported: "; None if it does."""
        return None

    def dropout_mask(self, case: Case, device: torch.device) -> torch.Tensor:
        """(batch, heads, q_len, kv_len) bool: the weights that the method's dropout keeps in this case.

        Asked for only where `unsupported` accepts a case with dropout.
        """
        raise NotSupported("dropout")

    @abstractmethod
    def __call__(self, case: Case, inputs: Inputs) -> Output:
        """Run on the tensors of the case.

        Raises `NotSupported` or `NotImplementedError` for a case that the method turns out not to offer,
        `WrongReturn` where it gave back no output tensor, and whatever the method itself raises.
        """

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.spec}>"


@contextmanager
def triton_on(device: torch.device) -> Iterator[None]:
    """Run Triton kernels inside on the kind of device that the tensors are on.

    Without a GPU there is nothing to choose. With one, Triton would be given tensors in host memory.
    """
    import torch

    if device.type != "cpu" or not torch.cuda.is_available():
        yield
        return
    from effattn import cpu

    with cpu.active():
        yield


def as_output(result: Any) -> Output:
    """The output in what a function returned: `out`, `(out, lse)`, or an object or mapping with these names.

    Only the form is checked here. Raises `WrongReturn` where there is no tensor in the place of one.
    """
    import torch

    expected = "expected a tensor `out` or a tuple `(out, lse)`"
    if isinstance(result, Output):
        out, lse = result.out, result.lse
    elif isinstance(result, torch.Tensor):
        out, lse = result, None
    elif _has_out(result):
        out, lse = result.out, getattr(result, "lse", None)
    elif isinstance(result, tuple):
        if len(result) != 2:
            raise WrongReturn(f"it returned {kind(result)}; {expected}")
        out, lse = result
    elif isinstance(result, Mapping):
        if not set(result) <= {"out", "lse"} or "out" not in result:
            names = ", ".join(sorted(map(repr, result))) or "no keys"
            raise WrongReturn(
                f"it returned {kind(result)} with {names}; {expected}, or the keys 'out' and 'lse'"
            )
        out, lse = result["out"], result.get("lse")
    else:
        raise WrongReturn(f"it returned {kind(result)}; {expected}")
    if not isinstance(out, torch.Tensor):
        raise WrongReturn(f"it returned {kind(out)} as `out`; expected a torch.Tensor")
    if lse is not None and not isinstance(lse, torch.Tensor):
        raise WrongReturn(f"it returned {kind(lse)} as `lse`; expected a torch.Tensor or None")
    return Output(out, lse)


def kind(value: Any) -> str:
    """What a value is, for a message: "None", "a list of 2", "a numpy.ndarray"."""
    if value is None:
        return "None"
    cls = type(value)
    package = cls.__module__.partition(".")[0]
    name = cls.__qualname__ if package == "builtins" else f"{package}.{cls.__qualname__}"
    article = "an" if name[0] in "aeiou" else "a"
    if isinstance(value, (tuple, list, dict)):
        return f"{article} {name} of {len(value)}"
    return f"{article} {name}"


def _has_out(value: Any) -> bool:
    """Whether this is a dataclass or a named tuple with the field `out`."""
    fields = getattr(type(value), "__dataclass_fields__", None) or getattr(type(value), "_fields", ())
    return "out" in fields
