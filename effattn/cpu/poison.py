"""Fresh memory that shows: `torch.empty` and its like give tensors that hold one NaN (floats) or one number (integers).

A kernel that reads such memory before anything is written there gives a NaN that it would not give otherwise, and elements
that still hold the pattern when the checks end, or when host code reads them, were never written.

That memory is given back with such elements is no finding: kernels rightly fill some workspaces in part. So only reads count
that need every element they are given: of single numbers, and sums and the like over whole tensors. Moves and elementwise
arithmetic do not, since what comes of them may be masked or cut off.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.cpu.sanitizer import Finding

if TYPE_CHECKING:
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

#: by bytes of an element: bits of a NaN that arithmetic does not make, in each float type of that size
_NANS = {"float16": 0x7E5A, "bfloat16": 0x7FDA, "float32": 0x7FC5A5A5, "float64": 0x7FF85A5A5A5A5A5A}
#: integers of 32 bits and more; less would be met by chance
_NUMBER = {4: 0x5A5A5A5A, 8: 0x5A5A5A5A5A5A5A5A}
_BYTE = 0x5A

#: what reads one number
_NUMBERS = ("item", "__bool__", "__float__", "__int__")
#: what makes one number of all elements, unless it is given an axis or a second operand
_REDUCTIONS = (
    "sum",
    "mean",
    "prod",
    "max",
    "min",
    "amax",
    "amin",
    "std",
    "var",
    "argmax",
    "argmin",
    "all",
    "any",
    "norm",
)
#: what makes one number of two tensors
_COMPARISONS = ("equal", "allclose")


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
    """File and line outside of torch and effattn that asked for memory, or read it."""
    frame = sys._getframe(2)
    here = str(Path(__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(here) and "/torch/" not in file:
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The addresses of a tensor's elements, from the first to behind the last."""
    lo = x.data_ptr()
    last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return lo, lo + x.element_size() * (1 + last)


def _storage(x: torch.Tensor) -> torch.UntypedStorage:
    import torch

    with torch._C.DisableTorchFunctionSubclass():
        return x.untyped_storage()


class Allocations:
    """The tensors that were made without contents since `begin`.

    `report` is called with what reads of host code find, and may raise it.
    """

    def __init__(self, report: Callable[[list[Finding]], None]) -> None:
        self._report = report
        self._undo = ExitStack()
        #: id -> (tensor, what made it and where)
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], str]] = {}
        #: where a storage begins -> the storage, and what made it and where
        self._storages: dict[int, tuple[StorageWeakRef, str]] = {}
        #: spans of memory that kernels store to: addresses -> kernel, argument
        self._stored: dict[tuple[int, int], tuple[str, str]] = {}
        #: those that were to be stored to by programs that were ended: that nobody wrote there is no finding of its own
        self._cut_short: set[tuple[int, int]] = set()
        #: where storages begin of which a read has told already
        self._told: set[int] = set()

    def begin(self) -> None:
        """Patch the functions of torch that give memory without contents, and those that make one number of it."""
        import torch

        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch, "empty_permuted"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            self._patch(owner, name, self._filling)
        for name in (*_NUMBERS, *_REDUCTIONS, *_COMPARISONS):
            self._patch(torch.Tensor, name, self._reading)
        for name in (*_REDUCTIONS, *_COMPARISONS):
            self._patch(torch, name, self._reading)

    def _patch(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any], str], Any]) -> None:
        own = name in vars(owner)
        before = getattr(owner, name)
        setattr(owner, name, wrap(before, name))
        if own:
            self._undo.callback(setattr, owner, name, before)
        else:
            self._undo.callback(delattr, owner, name)

    def end(self) -> None:
        self._undo.close()

    def _filling(self, make: Callable[..., Any], name: str) -> Callable[..., Any]:
        from torch.multiprocessing.reductions import StorageWeakRef

        @functools.wraps(make)
        def empty(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            if fill(made):
                origin = f"torch.{name} at {_caller()}"
                storage = _storage(made)
                lo, hi = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
                # What kernels have done to tensors that were there before is nothing to this one.
                for span in [span for span in self._stored if span[0] < hi and lo < span[1]]:
                    del self._stored[span]
                    self._cut_short.discard(span)
                self._told.discard(lo)
                self._made[id(made)] = (weakref.ref(made), origin)
                self._storages[lo] = (StorageWeakRef(storage), origin)
            return made

        return empty

    def _reading(self, read: Callable[..., Any], name: str) -> Callable[..., Any]:
        import torch

        operands = 2 if name in _COMPARISONS else 1

        @functools.wraps(read)
        def reading(*args: Any, **kwargs: Any) -> Any:
            # torch reads for itself where it prints a tensor.
            if "/torch/" not in sys._getframe(1).f_code.co_filename and (
                operands == 2 or (len(args) == 1 and not kwargs.keys() - {"dtype", "p"})
            ):
                for x in args[:operands]:
                    if isinstance(x, torch.Tensor):
                        self._look(x, name)
            return read(*args, **kwargs)

        return reading

    def _look(self, x: torch.Tensor, name: str) -> None:
        """Report what host code reads of a tensor that some kernel was to fill and nobody has written."""
        import torch

        origin = self.origin_of(x)
        if origin is None:
            return
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            begins = _storage(x).data_ptr()
            unwritten = None if begins in self._told else self._unwritten(x)
            if unwritten is None:
                return
            first, count, kernel, argument = unwritten
            at = x.storage_offset() + sum(i * s for i, s in zip(first, x.stride(), strict=True))
        self._told.add(begins)
        more = f", one of {count}" if count > 1 else ""
        finding = Finding(
            instrument="poison",
            kernel=kernel,
            argument=argument,
            offset=int(at),
            offset_bytes=int(at) * x.element_size(),
            done=f"element {at} of {argument}, counted from the start of its memory ({origin}), was never written{more}, and is "
            f"read by {name} at {_caller()}",
            expected="every element of a tensor that was made without contents to be written before it is used",
        )
        self._report([finding])

    def origin_of(self, x: torch.Tensor) -> str | None:
        """What made the memory of a tensor without contents, and where; None for any other memory."""
        if not _plain(x):
            return None
        storage, origin = self._storages.get(_storage(x).data_ptr(), (None, None))
        return None if storage is None or storage.expired() else origin

    def stored(self, lo: int, hi: int, kernel: str, argument: str, *, whole: bool) -> None:
        """Note that a kernel stores to a tensor that lies at these addresses; `whole`: all its programs came to their end."""
        self._stored.setdefault((lo, hi), (kernel, argument))
        if not whole:
            self._cut_short.add((lo, hi))

    def _unwritten(self, x: torch.Tensor) -> tuple[tuple[int, ...], int, str, str] | None:
        """The first element that holds the pattern, their number, and the kernel and its argument that were to fill it.

        None where there is none, or no kernel that stores to this memory, or one that was stopped.
        """
        pattern = mark(x)
        if pattern is None or x.numel() == 0:
            return None
        lo, hi = _span(x)
        writers = [who for (a, b), who in self._stored.items() if a < hi and lo < b]
        if not writers or any(a < hi and lo < b for a, b in self._cut_short):
            return None
        left = (x.detach().view(pattern[0]) == pattern[1]).nonzero()
        if not len(left):
            return None
        return (tuple(int(i) for i in left[0]), len(left), *writers[0])

    def unwritten(self) -> list[Finding]:
        """Of tensors that are still alive and that some kernel was to fill: elements that hold the pattern."""
        import torch

        found = []
        for reference, origin in list(self._made.values()):
            x = reference()
            if x is None:
                continue
            with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
                unwritten = None if _storage(x).data_ptr() in self._told else self._unwritten(x)
            if unwritten is None:
                continue
            first, count, kernel, argument = unwritten
            found.append(
                Finding(
                    instrument="poison",
                    kernel=kernel,
                    argument=argument,
                    times=1,
                    done=f"element {first} of {argument}, of shape {tuple(x.shape)}, was never written, one of {count} "
                    f"(memory of {origin})",
                    expected="every element of a tensor that was made without contents to be written before it is used",
                )
            )
        return found
