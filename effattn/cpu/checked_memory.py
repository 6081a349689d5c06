"""The memory of a launch that is looked at: the tensors behind its arguments, copies of them, what two runs left different."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effattn.cpu import poison

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Fill:
    """What undefined elements hold in one run."""

    float_: float
    half: float
    eighth: float
    integer: int
    words: str

    def bits(self, like: torch.Tensor) -> Any:
        """The bits of an element of a tensor's type, as a NumPy integer of its size."""
        import numpy as np
        import torch

        size = like.element_size()
        if not like.is_floating_point():
            return np.array(self.integer).astype(f"i{size}")
        if like.dtype == torch.bfloat16:
            return np.array(self.float_, "f4").view("i4")[()].astype("i4") >> 16
        number = self.half if like.dtype == torch.float16 else self.float_
        return np.array(number, f"f{size}").view(f"i{size}")[()]


#: Numbers that each float format has: large enough to win any maximum.
ZERO = Fill(0.0, 0.0, 0.0, 0, "zeros")
NAN = Fill(float("nan"), float("nan"), float("nan"), 0x5A5A5A5A5A5A5A5A, "NaN (0x5a... for integers)")
LARGE = Fill(2.0**100, 2.0**15, 240.0, -0x5A5A5A5A5A5A5A5B, "a large number (0xa5... for integers)")
SMALL = Fill(-(2.0**100), -(2.0**15), -240.0, 1, "a large negative number (1 for integers)")


@dataclass
class Slot:
    """A pointer argument: the tensor that was passed for it."""

    name: str
    value: Any
    lo: int = 0
    hi: int = -1  #: lo > hi: an address of which no more is known
    size: int = 1  #: bytes of an element
    words: str = ""


def slot_of(name: str, value: Any) -> Slot:
    shape: Any = getattr(value, "shape", None)
    stride: Any = getattr(value, "stride", None)
    if stride is None and hasattr(getattr(value, "base", None), "stride"):
        # A tensor under another element type, triton.reinterpret: the same memory.
        inner = slot_of(name, value.base)
        return Slot(name, value.base, inner.lo, inner.hi, inner.size, inner.words)
    if not callable(stride) or shape is None or isinstance(value, int):
        return Slot(name, None)
    size, lo = int(value.element_size()), int(value.data_ptr())
    shape, strides = tuple(int(n) for n in shape), tuple(int(n) for n in value.stride())
    if 0 in shape:
        return Slot(name, value, lo, lo, size, f"no access: the tensor has shape {shape}, so no element")
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    words = f"an element from 0 to {last} (shape {shape}, strides {strides})"
    return Slot(name, value, lo, lo + (last + 1) * size, size, words)


def alive() -> list[tuple[int, int]]:
    """The memory of all tensors that this process holds, as disjoint sorted spans."""
    import torch

    spans = set()
    with torch._C.DisableTorchFunctionSubclass():
        for x in gc.get_objects():
            if not issubclass(type(x), torch.Tensor):
                continue
            try:
                if not (x.is_cpu or getattr(x, "_effattn_in_host_memory", False)):
                    continue
                storage = x.untyped_storage()
                spans.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
            except (RuntimeError, NotImplementedError):
                continue  # a tensor without memory of its own
    return merged(spans)


def merged(spans: Any) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(span for span in spans if span[0] < span[1]):
        if out and lo <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], hi))
        else:
            out.append((lo, hi))
    return out


def memory(lo: int, hi: int) -> NDArray[np.uint8]:
    import numpy as np

    return np.ctypeslib.as_array((ctypes.c_uint8 * (hi - lo)).from_address(lo))


#: Copies of memory, kept from launch to launch: fresh pages cost more than the copy. Larger ones are not kept.
_copies: dict[int, NDArray[np.uint8]] = {}
_MOST_KEPT = 1 << 26

memcmp = ctypes.CDLL(None).memcmp
memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def copied(number: int, lo: int, hi: int) -> NDArray[np.uint8]:
    """A copy of memory; `number` tells those of one launch apart."""
    import numpy as np

    size = hi - lo
    buffer = _copies.get(number)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, dtype=np.uint8)
        if size <= _MOST_KEPT:
            _copies[number] = buffer
    ctypes.memmove(buffer.ctypes.data, lo, size)
    return buffer[:size]


def difference(slot: Slot, first: Any, second: Any) -> tuple[int, str, str] | None:
    """The first element that differs, and both values. Two NaN are the same: their bits are not specified."""
    rows = (first.reshape(-1, slot.size) != second.reshape(-1, slot.size)).any(1)
    a, b = (_elements(slot.value, x, rows) for x in (first, second))
    for place, x, y in zip(rows.nonzero()[0].tolist(), a.tolist(), b.tolist(), strict=True):
        if x == x or y == y:
            return place, repr(x), repr(y)
    return None


def _elements(like: torch.Tensor, raw: Any, rows: Any) -> torch.Tensor:
    import torch

    size = like.element_size()
    chosen = torch.from_numpy(raw.reshape(-1, size)[rows].copy()).reshape(-1).view(like.dtype)
    return chosen.to(torch.float64) if chosen.is_floating_point() else chosen


def index_of(slot: Slot, at: int) -> str:
    """The index of an element of a view, from its offset; the offset alone where strides overlap."""
    shape, strides = tuple(slot.value.shape), tuple(slot.value.stride())
    rest, index = at, [0] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda d: -strides[d]):
        if shape[axis] > 1 and strides[axis] > 0:
            index[axis], rest = divmod(rest, strides[axis])
    if rest or any(i >= n for i, n in zip(index, shape, strict=True)):
        return f"at offset {at}"
    return "[" + ", ".join(map(str, index)) + "]"


@dataclass
class Stale:
    """The elements of an argument that are as `torch.empty` has made them: places, counted from the first element."""

    slot: Slot
    places: NDArray[np.int64]
    #: what made the memory, and where
    origin: str

    def refill(self, fill: Fill) -> None:
        """Give them other contents."""
        _integers(memory(self.slot.lo, self.slot.hi), self.slot)[self.places] = fill.bits(self.slot.value)


def _integers(raw: NDArray[np.uint8], slot: Slot) -> NDArray[Any]:
    """Memory of a slot as integers of the size of its elements."""
    return raw.view(f"i{slot.size}")


def stale_of(slot: Slot, allocations: poison.Allocations) -> Stale | None:
    """What nobody has written of an argument's tensor; None where that is nothing, or not known."""
    if slot.lo >= slot.hi:
        return None
    pattern, origin = poison.mark(slot.value), allocations.origin_of(slot.value)
    if pattern is None or origin is None:
        return None
    places = (_integers(memory(slot.lo, slot.hi), slot) == pattern[1]).nonzero()[0]
    return Stale(slot, places, origin) if len(places) else None


def unmoved(slot: Slot, first: NDArray[np.uint8], second: NDArray[np.uint8], fill: Fill) -> NDArray[np.uint8]:
    """What a second run has left, with those elements that it has only moved as the first run has them."""
    pattern = poison.mark(slot.value)
    if pattern is None:
        return second
    out = second.copy()
    a, b = _integers(first, slot), _integers(out, slot)
    b[(a == pattern[1]) & (b == fill.bits(slot.value))] = pattern[1]
    return out
