"""Block pointers for Triton 3.9, which removed them: kernels written for earlier versions compile all the same.

`tl.make_block_ptr` gives a value that holds the base, the shape, the strides and the offsets; `tl.advance` one with other
offsets; `tl.load` and `tl.store` make addresses and a mask of it. Up to 3.7 a pass of Triton lowers block pointers to the
same arithmetic, in 64 bits (`add_rewrite_tensor_pointer`), in 3.8 its front end does; there nothing is installed. In kernels
that are compiled for another backend, Triton's own functions answer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import triton.language as tl
from triton._C.libtriton import ir
from triton.language import core

_PADDING = {"": None, "zero": 0, "nan": float("nan")}


class BlockPointerType(core.base_type):
    """The type of a block pointer; `element_ty` is the block that it points to, as in versions that have them."""

    def __init__(self, base: Any, block_shape: tuple[int, ...]) -> None:
        self.base = base
        self.block_shape = block_shape

    @property
    def element_ty(self) -> Any:
        return core.block_type(self.base.element_ty, list(self.block_shape))

    @property
    def scalar(self) -> Any:
        return self.base

    def is_ptr(self) -> bool:
        return True

    def is_block(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BlockPointerType)
            and self.base == other.base
            and self.block_shape == other.block_shape
        )

    def __hash__(self) -> int:
        return hash((str(self.base), self.block_shape))

    def __repr__(self) -> str:
        return f"block_pointer<{self.base}, {list(self.block_shape)}>"

    def mangle(self) -> str:
        return f"BP{self.base.mangle()}S{'_'.join(map(str, self.block_shape))}S"

    def _flatten_ir_types(self, builder: Any, out: list[Any]) -> None:
        out.append(self.base.to_ir(builder))
        out += [core.int64.to_ir(builder)] * (3 * len(self.block_shape))

    def _unflatten_ir(self, handles: list[Any], cursor: int) -> tuple[Any, int]:
        rank = len(self.block_shape)
        base = core.tensor(handles[cursor], self.base)
        numbers = [core.tensor(h, core.int64) for h in handles[cursor + 1 : cursor + 1 + 3 * rank]]
        parts = (numbers[:rank], numbers[rank : 2 * rank], numbers[2 * rank :])
        return BlockPointer(base, *parts, self.block_shape), cursor + 1 + 3 * rank


class BlockPointer(core.base_value):
    """A block of a tensor in memory. Shape, strides and offsets are scalars of 64 bits."""

    def __init__(
        self,
        base: Any,
        shape: list[Any],
        strides: list[Any],
        offsets: list[Any],
        block_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.base = base
        self.bounds = shape
        self.strides = strides
        self.offsets = offsets
        self.block_shape = block_shape
        self.type = BlockPointerType(base.type, block_shape)

    @property
    def dtype(self) -> Any:
        return self.base.type

    @property
    def shape(self) -> Any:
        return core.tuple([core.constexpr(n) for n in self.block_shape])

    def _set_name(self, builder: Any, name: str) -> None:
        for part, value in zip(("base", "shape", "stride", "offset"), self._parts(), strict=True):
            for i, x in enumerate(value):
                x._set_name(builder, f"{name}.{part}{i}")

    def _flatten_ir(self, handles: list[Any]) -> None:
        for value in self._parts():
            for x in value:
                x._flatten_ir(handles)

    def _parts(self) -> tuple[list[Any], ...]:
        return [self.base], self.bounds, self.strides, self.offsets

    @core.builtin
    def advance(self, offsets: Any, _semantic: Any = None) -> BlockPointer:
        steps = _scalars(offsets, _semantic)
        if len(steps) != len(self.offsets):
            raise ValueError(
                f"tl.advance: {len(steps)} offsets for a block pointer of {len(self.offsets)} dimensions"
            )
        moved = [_semantic.add(a, b, False) for a, b in zip(self.offsets, steps, strict=True)]
        return BlockPointer(self.base, self.bounds, self.strides, moved, self.block_shape)

    def addresses(self, checked: Iterable[int], _semantic: Any) -> tuple[Any, Any]:
        """A tensor of addresses; a mask of what lies inside along the dimensions in `checked`, None if there are none."""
        block_shape = self.block_shape
        rank = len(block_shape)
        pointers, mask = self.base, None
        checked = {axis % rank for axis in checked}
        for axis, n in enumerate(block_shape):
            index = _semantic.add(
                _semantic.cast(_semantic.arange(0, n), core.int64), self.offsets[axis], False
            )
            for other in range(rank):
                if other != axis:
                    index = _semantic.expand_dims(index, other)
            pointers = _semantic.add(pointers, _semantic.mul(index, self.strides[axis], False), False)
            if axis in checked:
                zero = _semantic.make_scalar(0, core.int64)
                inside = _semantic.and_(
                    _semantic.greater_equal(index, zero), _semantic.less_than(index, self.bounds[axis])
                )
                mask = inside if mask is None else _semantic.and_(mask, inside)
        return pointers, mask


def _unwrapped(value: Any) -> Any:
    return value.value if isinstance(value, core.constexpr) else value


def _list(value: Any) -> list[Any]:
    """One value or several, as a list; a constexpr may hold a tuple."""
    value = _unwrapped(value)
    several = isinstance(value, (list, tuple, core.tuple))
    return [_unwrapped(x) for x in value] if several else [value]


def _scalars(values: Any, semantic: Any) -> list[Any]:
    return [semantic.make_scalar(x, core.int64) for x in _list(values)]


def _for_this_backend(semantic: Any) -> bool:
    from effattn.cpu.compiler import BACKEND

    return getattr(semantic.builder.options, "backend_name", None) == BACKEND


def are_missing() -> bool:
    """Whether this Triton has no block pointers of its own."""
    # Operations of the IR up to 3.7, tuples of the front end in 3.8, an error in 3.9.
    return not hasattr(ir.builder, "create_make_block_ptr") and not hasattr(core, "_is_block_ptr")


def install() -> None:
    """Give `triton.language` its block pointers back, for kernels of this backend. Once a process."""
    if not are_missing() or getattr(core.make_block_ptr, "effattn", False):
        return
    own: dict[str, Any] = {
        name: getattr(core, name) for name in ("make_block_ptr", "advance", "load", "store")
    }

    @core.builtin
    def make_block_ptr(
        base: Any,
        shape: Any,
        strides: Any,
        offsets: Any,
        block_shape: Any,
        order: Any,
        _semantic: Any = None,
    ) -> Any:
        if not _for_this_backend(_semantic):
            return own["make_block_ptr"](
                base, shape, strides, offsets, block_shape, order, _semantic=_semantic
            )
        if not base.type.is_ptr():
            raise ValueError(f"tl.make_block_ptr: `base` is a {base.type}, expected one pointer")
        if base.type.element_ty == core.int1:
            base = _semantic.cast(base, core.pointer_type(core.int8, base.type.address_space))
        block = tuple(_list(block_shape))
        parts = [_scalars(x, _semantic) for x in (shape, strides, offsets)]
        if not all(isinstance(n, int) for n in block):
            raise ValueError(
                f"tl.make_block_ptr: `block_shape` is {block}, expected numbers known at compile time"
            )
        if sorted(_list(order)) != list(range(len(block))) or any(len(p) != len(block) for p in parts):
            raise ValueError(
                "tl.make_block_ptr: shape, strides, offsets, block_shape and order have different lengths, or order "
                "is no permutation of the dimensions"
            )
        return BlockPointer(base, parts[0], parts[1], parts[2], block)

    @core.builtin
    def advance(base: Any, offsets: Any, _semantic: Any = None) -> Any:
        if isinstance(base, BlockPointer):
            return base.advance(offsets, _semantic=_semantic)
        return own["advance"](base, offsets, _semantic=_semantic)

    @core.builtin
    def load(
        pointer: Any,
        mask: Any = None,
        other: Any = None,
        boundary_check: Any = (),
        padding_option: Any = "",
        cache_modifier: Any = "",
        eviction_policy: Any = "",
        volatile: Any = False,
        _semantic: Any = None,
    ) -> Any:
        checked, padding = _list(boundary_check), _unwrapped(padding_option) or ""
        if isinstance(pointer, BlockPointer):
            if _unwrapped(mask) is not None or _unwrapped(other) is not None:
                raise ValueError("tl.load: a block pointer takes `boundary_check`, not `mask` and `other`")
            if padding not in _PADDING:
                raise ValueError(
                    f"tl.load: padding_option {padding!r} is not known; expected 'zero' or 'nan'"
                )
            pointer, mask = pointer.addresses(checked, _semantic)
            other = None if mask is None else _PADDING[padding]
        elif checked or padding:
            raise ValueError("tl.load: `boundary_check` and `padding_option` are for block pointers")
        return own["load"](
            pointer,
            mask,
            other,
            cache_modifier=cache_modifier,
            eviction_policy=eviction_policy,
            volatile=volatile,
            _semantic=_semantic,
        )

    @core.builtin
    def store(
        pointer: Any,
        value: Any,
        mask: Any = None,
        boundary_check: Any = (),
        cache_modifier: Any = "",
        eviction_policy: Any = "",
        _semantic: Any = None,
    ) -> Any:
        checked = _list(boundary_check)
        if isinstance(pointer, BlockPointer):
            if _unwrapped(mask) is not None:
                raise ValueError("tl.store: a block pointer takes `boundary_check`, not `mask`")
            pointer, mask = pointer.addresses(checked, _semantic)
        elif checked:
            raise ValueError("tl.store: `boundary_check` is for block pointers")
        return own["store"](
            pointer,
            value,
            mask,
            cache_modifier=cache_modifier,
            eviction_policy=eviction_policy,
            _semantic=_semantic,
        )

    make_block_ptr.effattn = True  # pyright: ignore[reportFunctionMemberAccess]
    for name, function in (
        ("make_block_ptr", make_block_ptr),
        ("advance", advance),
        ("load", load),
        ("store", store),
    ):
        for module in (core, tl):
            setattr(module, name, function)
