"""Fresh memory that shows: `torch.empty` and its like give tensors that hold one NaN (floats) or one number (integers).

A kernel that reads such memory before anything is written there gives a NaN that it would not give otherwise, and elements
that still hold the pattern when the checks end were never written.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from effattn.cpu.sanitizer import Finding

#: by bytes of an element: bits of a NaN that arithmetic does not make, in each float type of that size
_NANS = {"float16": 0x7E5A, "bfloat16": 0x7FDA, "float32": 0x7FC5A5A5, "float64": 0x7FF85A5A5A5A5A5A}
#: integers of 32 bits and more; less would be met by chance
_NUMBER = {4: 0x5A5A5A5A, 8: 0x5A5A5A5A5A5A5A5A}
_BYTE = 0x5A


def _bits(x: torch.Tensor) -> tuple[torch.dtype, int] | None:
    """The integer type of the same size and the pattern; None for types that are left alone."""
    import torch

    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    name = str(x.dtype).removeprefix("torch.")
    if name in _NANS:
        return sizes[x.element_size()], _NANS[name]
    if x.dtype in (torch.int32, torch.int64):
        return sizes[x.element_size()], _NUMBER[x.element_size()]
    if x.dtype in (torch.int8, torch.uint8, torch.int16):
        return x.dtype, _BYTE
    return None


def mark(x: torch.Tensor) -> tuple[torch.dtype, int] | None:
    """The integer type of the same size and the pattern, where no number would be met that has it by chance."""
    import torch

    small = x.element_size() == 1 or x.dtype == torch.int16
    return None if small else _bits(x)


def _plain(x: torch.Tensor) -> bool:
    """A dense tensor in host memory."""
    import torch

    in_memory = x.is_cpu or getattr(x, "_effattn_in_host_memory", False)
    return bool(in_memory) and x.layout == torch.strided and not x.is_quantized


def fill(x: torch.Tensor) -> bool:
    """Fill a fresh tensor with the pattern; whether that was done."""
    import torch

    pattern = _bits(x)
    if not _plain(x) or pattern is None or x.numel() == 0:
        return False
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        x.detach().view(pattern[0]).fill_(pattern[1])
    return True


def _caller() -> str:
    """File and line outside of torch and effattn that asked for memory."""
    frame = sys._getframe(2)
    here = str(Path(__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(here) and "/torch/" not in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def _storage(x: torch.Tensor) -> int:
    """Where the storage of a tensor begins."""
    import torch

    with torch._C.DisableTorchFunctionSubclass():
        return x.untyped_storage().data_ptr()


class Allocations:
    """The tensors that were made without contents since `begin`."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        #: id -> (tensor, what made it and where)
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        #: where a storage begins -> what made it and where
        self._storages: dict[int, str] = {}
        #: spans of memory that kernels store to: addresses -> kernel, argument
        self._stored: dict[tuple[int, int], tuple[str, str]] = {}
        #: those that were to be stored to by programs that were ended: that nobody wrote there is no finding of its own
        self._cut_short: set[tuple[int, int]] = set()

    def begin(self) -> None:
        """Patch the functions of torch that give memory without contents."""
        import torch

        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch, "empty_permuted"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            own = name in vars(owner)
            before = getattr(owner, name)
            setattr(owner, name, self._filling(before, name))
            if own:
                self._undo.callback(setattr, owner, name, before)
            else:
                self._undo.callback(delattr, owner, name)

    def end(self) -> None:
        self._undo.close()

    def _filling(self, make: Callable[..., Any], name: str) -> Callable[..., Any]:
        def empty(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            if fill(made):
                origin = f"torch.{name} at {_caller()}"
                self._made[id(made)] = (weakref.ref(made), origin)
                self._storages[_storage(made)] = origin
            return made

        return empty

    def origin_of(self, x: torch.Tensor) -> str | None:
        """What made the memory of a tensor without contents, and where; None for any other memory."""
        return self._storages.get(_storage(x))

    def stored(self, lo: int, hi: int, kernel: str, argument: str, *, whole: bool) -> None:
        """Note that a kernel stores to a tensor that lies at these addresses; `whole`: all its programs came to their end."""
        self._stored.setdefault((lo, hi), (kernel, argument))
        if not whole:
            self._cut_short.add((lo, hi))

    def unwritten(self) -> list[Finding]:
        """Of tensors that are still alive and that some kernel was to fill: elements that hold the pattern."""
        import torch

        from effattn.cpu.sanitizer import Finding

        found = []
        for reference, origin in list(self._made.values()):
            x = reference()
            if x is None:
                continue
            with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
                lo = x.data_ptr()
                hi = lo + x.element_size() * (
                    1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                )
                writers = [who for (a, b), who in self._stored.items() if a < hi and lo < b]
                pattern = mark(x)
                if not writers or pattern is None or any(a < hi and lo < b for a, b in self._cut_short):
                    continue
                left = x.detach().view(pattern[0]) == pattern[1]
                count = int(left.sum())
                if not count:
                    continue
                first = tuple(int(i) for i in left.nonzero()[0])
            kernel, argument = writers[0]
            shape = tuple(x.shape)
            found.append(
                Finding(
                    instrument="poison",
                    kernel=kernel,
                    argument=argument,
                    times=1,
                    done=f"element {first} of {argument}, of shape {shape}, was never written, one of {count} (memory of "
                    f"{origin})",
                    expected="every element of a tensor that was made without contents to be written before it is used",
                )
            )
        return found
