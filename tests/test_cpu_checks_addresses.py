"""The sanitizer: which argument an address belongs to, what it is called, and unsigned offsets that wrap around."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from effattn import cpu
from effattn.cpu.sanitizer import Finding


def _found(launch: Any, *instruments: str) -> list[Finding]:
    with cpu.checks(*(instruments or ("bounds",)), raise_=False) as report:
        launch()
    return report.findings


def _line(kernel: Any, text: str) -> int:
    lines, start = inspect.getsourcelines(kernel.fn)
    (found,) = [start + k for k, line in enumerate(lines) if text in line]
    return found


# ----------------------------------------------------------------------------------------------- unsigned offsets


@triton.jit
def _multiplied(x, o, stride, WIDE: tl.constexpr):
    p = (tl.program_id(0) * 4).to(tl.uint32)
    if WIDE:
        p = p.to(tl.uint64)
    at = p * stride  # here
    tl.store(o + p, tl.load(x + at))


@triton.jit
def _added(x, o, start, more):
    i = tl.arange(0, 4).to(tl.uint32)
    at = (i + start) + (more + 10)  # here
    tl.store(o + i, tl.load(x + at, mask=i < 2))


@triton.jit
def _shifted(x, o, by):
    i = tl.arange(0, 4).to(tl.uint32)
    at = i << by  # here
    tl.store(o + i, tl.load(x + at, mask=i != 1))


def test_unsigned_offsets_that_wrap_around_are_found_though_the_address_is_inside() -> None:
    x, o = torch.zeros(8), torch.zeros(8)
    (found,) = _found(lambda: _multiplied[(2,)](x, o, 1 << 30, False))
    assert (found.line, found.argument, found.program) == (_line(_multiplied, "# here"), "x", (1, 0, 0))
    assert f"`*` is {1 << 32}, which goes to an address in x" in found.done
    (found,) = _found(lambda: _multiplied[(2,)](x, o, 1 << 30, True))
    assert found.offset == 1 << 32, "in 64 bits it is outside of the tensor and wraps nowhere"
    (found,) = _found(lambda: _added[(1,)](x, o, (1 << 31) - 5, (1 << 31) - 5))
    assert (found.line, f"`+` is {1 << 32}" in found.done) == (_line(_added, "# here"), True)
    (found,) = _found(lambda: _shifted[(1,)](x, o, 31))
    assert (found.line, f"`<<` is {1 << 32}," in found.done) == (_line(_shifted, "# here"), True)


@triton.jit
def _largest(x, o, a, b):
    tl.store(o, tl.load(x + a.to(tl.uint32) * b.to(tl.uint32)))


def test_a_product_of_64_bits_is_told_as_it_is() -> None:
    (found,) = _found(lambda: _largest[(1,)](torch.zeros(8), torch.zeros(1), -1, -1))
    assert f"`*` is {(2**32 - 1) ** 2}," in found.done


@triton.jit
def _back_again(x, o, n):
    i = tl.arange(0, 4).to(tl.uint32)
    less = (n - 9).to(tl.uint32)
    v = (
        tl.load(x + (i + 8 - n))
        + tl.load(x + (n - 1 - i))
        + tl.load(x + (i - n + 8))
        + tl.load(x + (i + 9 + less))
    )
    tl.store(o + i, v)


def test_unsigned_offsets_that_are_negative_on_their_way_are_none() -> None:
    x, o = torch.arange(16.0), torch.zeros(4)
    assert _found(lambda: _back_again[(1,)](x, o, 5), "bounds", "races", "poison", "order") == []
    assert o.tolist() == [3 + 4 + 3 + 5 + 2 * i for i in range(4)]


# -------------------------------------------------------------------------------------------- chosen between arguments


@triton.jit
def _branches(x, y, z, o, which, n):
    i = tl.arange(0, 16)
    q = x
    if which == 2:
        q = y
    elif which == 3:
        q = z + 1
    tl.store(o + i, tl.load(q + i, mask=i < n, other=0.0))  # here


@triton.jit
def _where(x, y, o):
    i = tl.arange(0, 16)
    tl.store(o + i, tl.load(tl.where(i < 8, x + i, y + i)))  # here


@triton.jit
def _stores(x, y, at):
    q = x if tl.program_id(0) % 2 == 0 else y
    tl.store(q + at, 1.0)


@pytest.mark.parametrize(
    ("which", "name", "others"), [(4, "x", "y or z"), (2, "y", "x or z"), (3, "z", "x or y")]
)
def test_an_address_chosen_between_arguments_must_be_in_one_of_them(
    which: int, name: str, others: str
) -> None:
    # All in one block of memory: what lies behind each is alive, and `o` is another argument of the launch.
    memory = torch.arange(64.0)
    x, o, y, z = memory[:8], memory[8:24], memory[24:32], memory[48:56]
    n = 8 if which == 3 else 9
    (found,) = _found(lambda: _branches[(1,)](x, y, z, o, which, n))
    assert (found.argument, found.offset, found.line) == (name, 8, _line(_branches, "# here"))
    assert found.expected == f"an element from 0 to 7 (shape (8,), strides (1,)), or an element of {others}"
    assert (
        _found(lambda: _branches[(1,)](x, y, z, o, which, n - 1), "bounds", "races", "poison", "order") == []
    )


def test_addresses_chosen_element_by_element() -> None:
    memory = torch.arange(40.0)
    (found,) = _found(lambda: _where[(1,)](memory[:8], memory[8:23], torch.zeros(16)))
    assert (found.argument, found.offset, found.line) == ("y", 15, _line(_where, "# here"))
    assert _found(lambda: _where[(1,)](memory[:8], memory[8:24], torch.zeros(16))) == []


def test_races_through_chosen_addresses() -> None:
    x, y = torch.zeros(8), torch.zeros(8)
    assert _found(lambda: _stores[(2,)](x, y, 0), "bounds", "races", "order") == []
    (found,) = _found(lambda: _stores[(3,)](x, y, 3), "races")
    assert (found.argument, found.offset, found.program, found.other_program) == (
        "x",
        3,
        (2, 0, 0),
        (0, 0, 0),
    )


@triton.jit
def _addressed(table, o):
    tl.store(o, tl.load(tl.load(table).to(tl.pointer_type(tl.float32))))


def test_an_address_is_written_as_the_machine_has_it() -> None:
    (found,) = _found(lambda: _addressed[(1,)](torch.tensor([-8]), torch.zeros(1)))
    assert "address 0xfffffffffffffff8" in found.done


# ------------------------------------------------------------------------------------------------ names of arguments


class _Pair(NamedTuple):
    ptr: Any
    start: Any


@triton.jit
def _renamed(source, o):
    q = source
    tl.store(o, tl.load(q + 1))


@triton.jit
def _tuples(pair, nested, o):
    tl.store(o, tl.load(pair.ptr + pair.start))
    tl.store(o, tl.load(nested[1][0] + nested[0]))


@triton.jit
def _described(d, o):
    tl.store(o + tl.arange(0, 128), d.load([0, 0]).reshape(128))


def test_arguments_have_the_names_of_the_signature() -> None:
    x, o = torch.zeros(1), torch.zeros(128)
    assert [f.argument for f in _found(lambda: _renamed[(1,)](x, o))] == ["source"]
    launch = _tuples[(1,)]
    assert [f.argument for f in _found(lambda: launch(_Pair(x, 3), (0, (x, 5)), o))] == ["pair.ptr"]
    assert [f.argument for f in _found(lambda: launch(_Pair(x, 0), (3, (x, 5)), o))] == ["nested[1][0]"]
    short = TensorDescriptor(torch.zeros(4, 16), [5, 16], [16, 1], [8, 16])
    assert [(f.argument, f.offset) for f in _found(lambda: _described[(1,)](short, o))] == [("d", 64)]
