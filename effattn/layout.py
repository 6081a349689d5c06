"""Memory layouts of the tensors of a case: the order of the axes, and how the memory around is used.

A layout is written as a permutation of b, h, s, d in the order of memory (outermost first), followed by
any of the suffixes in `SUFFIXES`, each joined with "+": `bshd+pad`, `bhds+step+offset`. It says nothing
about the order in which a method gets to see the axes, which is always (b, h, s, d).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

#: the axes of q, k and v as methods see them: batch, head, position, feature
AXES = "bhsd"

#: all 24 orders of the axes in memory
ORDERS: tuple[str, ...] = tuple("".join(p) for p in permutations(AXES))

#: suffix -> what it does, in the order in which a layout lists them
SUFFIXES: dict[str, str] = {
    "pad": "every axis is allocated larger than it is used",
    "step": "the elements of the innermost axis lie two apart",
    "offset": "the tensor starts one element further on, which breaks the alignment to 16 bytes",
    "expand-b": "k and v repeat one batch entry with stride 0",
    "expand-h": "k and v repeat one head with stride 0",
    "expand-s": "k and v repeat one position with stride 0",
}

#: elements of NaN before and after every tensor; a multiple of 16 bytes in every dtype
GUARD = 64


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A layout taken apart; `parse` makes one from its text."""

    #: the axes in the order of memory, outermost first
    order: str
    suffixes: frozenset[str]

    @property
    def text(self) -> str:
        """The layout as it is written, its suffixes in the usual order."""
        return "+".join([self.order, *(s for s in SUFFIXES if s in self.suffixes)])

    @property
    def expanded(self) -> frozenset[str]:
        """The axes along which k and v are the same everywhere."""
        return frozenset(s[-1] for s in self.suffixes if s.startswith("expand-"))


def parse(text: str) -> Layout:
    """Takes a layout's text apart; RequestError if it isn't one."""
    order, *suffixes = text.split("+")
    if order not in ORDERS:
        raise RequestError(
            f"layout {text!r}: {order!r} is not an order of axes. Expected each of the letters b, h, s, d"
            " once, in the order of memory with the outermost first, for example 'bhsd' or 'bshd+pad'."
        )
    for suffix in suffixes:
        if suffix not in SUFFIXES:
            near = difflib.get_close_matches(suffix, SUFFIXES, n=2)
            hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
            raise RequestError(
                f"layout {text!r}: unknown suffix {suffix!r}. Expected any of {', '.join(SUFFIXES)}.{hint}"
            )
        if suffixes.count(suffix) > 1:
            raise RequestError(f"layout {text!r}: the suffix {suffix!r} is given twice. Give it once.")
    return Layout(order=order, suffixes=frozenset(suffixes))


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a tensor lies in its memory, counted in elements."""

    #: elements of the whole allocation
    size: int
    #: index of the first element
    offset: int
    #: steps from one element to the next along b, h, s, d
    strides: tuple[int, ...]


def place(layout: Layout, shape: tuple[int, ...], *, expand: bool) -> Placement:
    """Places a tensor of `shape` (b, h, s, d) in memory; `expand` says whether the expand suffixes count."""
    flat = layout.expanded if expand else frozenset()
    used = {axis: 1 if axis in flat else n for axis, n in zip(AXES, shape, strict=True)}
    inner = layout.order[-1]
    step = 2 if "step" in layout.suffixes else 1
    offset = GUARD + (1 if "offset" in layout.suffixes else 0)
    strides = dict.fromkeys(AXES, 0)
    stride = step
    for axis in reversed(layout.order):
        strides[axis] = 0 if axis in flat else stride
        extent = used[axis]
        if "pad" in layout.suffixes:
            # Room behind the innermost axis, and on both sides of the others: reading too far in either
            # direction meets NaN, and a row keeps its distance to a multiple of 16 bytes.
            if axis == inner:
                extent += 8
            else:
                offset += stride
                extent += 2
        stride *= max(extent, 1)
    size = stride + offset + GUARD
    return Placement(size=size, offset=offset, strides=tuple(strides[a] for a in AXES))


def build(
    bits: NDArray[np.uint16 | np.uint32],
    layout: Layout,
    *,
    dtype: str,
    expand: bool,
    device: torch.device,
) -> torch.Tensor:
    """A tensor holding `bits` (b, h, s, d; patterns of `dtype`) in `layout`, all other memory being NaN.

    Where `expand` is set, only the first entry along the axes that the layout expands is stored.
    """
    import numpy as np
    import torch

    from effattn.rounding import QUIET_NAN

    shape = bits.shape
    placement = place(layout, shape, expand=expand)
    memory = np.full(placement.size, QUIET_NAN[dtype], bits.dtype)
    if bits.size:
        flat = layout.expanded if expand else frozenset()
        stored = bits[tuple(slice(0, 1) if axis in flat else slice(None) for axis in AXES)]
        window = np.ndarray(
            stored.shape,
            bits.dtype,
            buffer=memory,
            offset=placement.offset * bits.itemsize,
            strides=[s * bits.itemsize for s in placement.strides],
        )
        window[...] = stored
    if dtype == "bf16":
        flat_tensor = torch.from_numpy(memory.view(np.int16)).view(torch.bfloat16)
    else:
        flat_tensor = torch.from_numpy(memory.view(np.float16 if dtype == "fp16" else np.float32))
    return torch.as_strided(flat_tensor.to(device), shape, placement.strides, placement.offset)
