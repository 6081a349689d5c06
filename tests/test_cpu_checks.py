"""The sanitizer of the CPU backend: wrong kernels that each instrument must find, right ones on which it is silent.

One file, longer than others: the kernels of one instrument are the right ones of the next.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import mmap
import re
import textwrap

import pytest
import torch
import triton
import triton.language as tl

from effattn import cpu
from effattn.case import Case
from effattn.cpu.sanitizer import Finding, Report
from effattn.errors import RequestError
from effattn.run.executor import Local
from effattn.verdict import Outcome


@triton.jit
def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(y_ptr + offs + SHIFT, x, mask=mask)


def line_of(kernel, text: str) -> int:
    """The line of a kernel's source that holds a text."""
    lines, start = inspect.getsourcelines(kernel.fn)
    found = [start + k for k, line in enumerate(lines) if text in line]
    assert len(found) == 1, (text, found)
    return found[0]


def only(report: Report) -> Finding:
    assert len(report.findings) == 1, report.summary()
    return report.findings[0]


# -------------------------------------------------------------------------------------------------- bounds


def test_a_kernel_from_the_cache_is_reported_where_it_lies_now(tmp_path):
    text = textwrap.dedent(
        """
        import triton
        import triton.language as tl

        @triton.jit
        def beyond(x_ptr):
            tl.store(x_ptr + 5, 1.0)
        """
    )
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        path = tmp_path / place / "moved_kernel.py"
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(f"moved_kernel_{place}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with cpu.checks("bounds", raise_=False) as report:
            module.beyond[(1,)](torch.zeros(3))
        assert only(report).file == str(path)


@pytest.mark.parametrize(("shift", "program", "offset"), [(1, (7, 0, 0), 1000), (-1, (0, 0, 0), -1)])
def test_a_store_that_is_off_by_one_is_reported_with_its_place(shift, program, offset):
    x, y = torch.randn(1000), torch.zeros(1002)
    with cpu.checks("bounds", raise_=False) as report:
        copy[(8,)](x, y[1:1001], 1000, BLOCK=128, SHIFT=shift)
    found = only(report)
    assert (found.instrument, found.kernel, found.argument) == ("bounds", "copy", "y_ptr")
    assert (found.offset, found.offset_bytes, found.program) == (offset, 4 * offset, program)
    assert found.line == line_of(copy, "tl.store")
    assert found.file == __file__
    assert "an element from 0 to 999" in found.expected
    assert y[0] == 0, "nothing outside of the view was written"
    assert y[1001] == 0, "nothing outside of the view was written"


def test_a_launch_with_a_finding_raises_it():
    x, y = torch.randn(100), torch.empty(100)
    words = r"bounds: kernel copy, test_cpu_checks.py:\d+, program \(0, 0, 0\): load of element 100 of x_ptr \(byte 400"
    with cpu.checks("bounds") as report, pytest.raises(cpu.Fault, match=words):
        copy[(1,)](x, y, 128, BLOCK=128, SHIFT=0)
    assert len(report.findings) == 1


def test_a_right_kernel_gives_no_finding_and_the_same_bits():
    x, y = torch.randn(1000), torch.zeros(1000)
    with cpu.checks("bounds", "races", "poison", "order", "traffic") as report:
        copy[(8,)](x, y, 1000, BLOCK=128, SHIFT=0)
    assert torch.equal(x, y)
    assert report.findings == []
    assert re.search(
        r"checked bounds, races, poison, order, traffic in 1 launch: nothing found", report.summary()
    )


@triton.jit
def rows(x_ptr, y_ptr, stride_x, stride_y, n, ROWS: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr):
    """Rows of n elements; LIMIT is what the mask compares with: n where it is right."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    mask = (c[None, :] < (n if LIMIT == 0 else LIMIT)) & (r[:, None] >= 0)
    x = tl.load(x_ptr + r[:, None] * stride_x + c[None, :], mask=mask, other=0.0)
    tl.store(y_ptr + r[:, None] * stride_y + c[None, :], x * 2, mask=mask)


def test_reading_past_the_end_of_the_last_row_is_found():
    x, y = torch.randn(8, 50), torch.zeros(8, 64)
    with cpu.checks("bounds", raise_=False) as report:
        rows[(2,)](x, y, 50, 64, 50, ROWS=4, BLOCK=64, LIMIT=64)
    found = only(report)
    assert (found.argument, found.program, found.offset) == ("x_ptr", (1, 0, 0), 400)
    assert found.line == line_of(rows, "tl.load")
    assert "shape (8, 50), strides (50, 1)" in found.expected


def test_views_reach_from_their_first_element_to_their_last():
    base = torch.arange(4 * 64, dtype=torch.float32).reshape(4, 64)
    view, out = base[:, 8:40], torch.zeros(4, 64)[:, :32]
    with cpu.checks("bounds") as report:
        rows[(1,)](view, out, 64, 64, 32, ROWS=4, BLOCK=32, LIMIT=0)
    assert torch.equal(out, view * 2)
    # One element more in each row is a gap in the first three, and outside in the last.
    with cpu.checks("bounds", raise_=False) as report:
        rows[(1,)](view, torch.zeros(4, 64), 64, 64, 33, ROWS=4, BLOCK=64, LIMIT=0)
    assert only(report).offset == 3 * 64 + 32


def test_expanded_and_empty_tensors_and_two_on_one_storage():
    x = torch.randn(1, 32).expand(8, 32)
    storage = torch.zeros(1, 2, 8, 32)
    k, v = storage.unbind(1)
    with cpu.checks("bounds", "races", "poison", "order") as report:
        rows[(2,)](x, k, 0, 32, 32, ROWS=4, BLOCK=32, LIMIT=0)
        rows[(2,)](k, v, 32, 32, 32, ROWS=4, BLOCK=32, LIMIT=0)
        copy[(1,)](torch.empty(0), torch.empty(0), 0, BLOCK=16, SHIFT=0)
        rows[(0,)](x, k, 0, 32, 32, ROWS=4, BLOCK=32, LIMIT=0)
    assert torch.equal(v[0], x * 4)
    assert report.findings == []


def test_an_access_to_an_empty_tensor_is_found():
    with cpu.checks("bounds", raise_=False) as report:
        copy[(1,)](torch.empty(0), torch.zeros(16), 16, BLOCK=16, SHIFT=0)
    assert only(report).argument == "x_ptr"
    assert "no element" in report.findings[0].expected


@triton.jit
def gathered(x_ptr, index_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + at, mask=at < n, other=0)
    tl.store(y_ptr + at, tl.load(x_ptr + index, mask=at < n, other=0.0), mask=at < n)


@pytest.mark.parametrize("wrong", [100, -3, 1 << 60])
def test_an_index_from_memory_is_checked(wrong):
    x, y = torch.randn(100), torch.zeros(70)
    index = torch.randint(0, 100, (70,))
    with cpu.checks("bounds", "races", "poison", "order") as report:
        gathered[(2,)](x, index, y, 70, BLOCK=64)
    assert torch.equal(y, x[index])
    index[66] = wrong
    with cpu.checks("bounds", raise_=False) as report:
        gathered[(2,)](x, index, y, 70, BLOCK=64)
    found = only(report)
    assert (found.argument, found.program) == ("x_ptr", (1, 0, 0))
    assert found.line == line_of(gathered, "tl.load(x_ptr")
    if wrong < 1 << 40:
        assert found.offset == wrong


@triton.jit
def scattered(x_ptr, index_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.atomic_add(y_ptr + tl.load(index_ptr + at), tl.load(x_ptr + at))


def test_atomics_are_checked():
    x, y, index = torch.ones(64), torch.zeros(8), torch.arange(64) % 8
    with cpu.checks("bounds") as report:
        scattered[(1,)](x, index, y, BLOCK=64)
    assert torch.equal(y, torch.full((8,), 8.0))
    index[5] = 8
    with cpu.checks("bounds", raise_=False) as report:
        scattered[(1,)](x, index, y, BLOCK=64)
    found = only(report)
    assert (found.argument, found.offset, found.line) == ("y_ptr", 8, line_of(scattered, "atomic_add"))
    assert "atomic update of element 8 of y_ptr" in found.done


@triton.jit
def through_addresses(address_ptr, y_ptr, n, BLOCK: tl.constexpr):
    source = tl.load(address_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    at = tl.arange(0, BLOCK)
    x = tl.load(source + at, mask=at < n, other=0.0)
    tl.store(y_ptr + tl.program_id(0) * n + at, x, mask=at < n)


def test_addresses_from_memory_must_lie_in_a_living_tensor():
    parts = [torch.randn(40) for _ in range(3)]
    table, y = torch.tensor([x.data_ptr() for x in parts]), torch.zeros(3, 40)
    with cpu.checks("bounds", "races", "poison", "order") as report:
        through_addresses[(3,)](table, y, 40, BLOCK=64)
    assert torch.equal(y, torch.stack(parts))
    table[1] = 4096
    with cpu.checks("bounds", raise_=False) as report:
        through_addresses[(3,)](table, y, 40, BLOCK=64)
    found = only(report)
    assert (found.argument, found.program) == ("", (1, 0, 0))
    assert "load of address 0x1000" in found.done
    assert found.line == line_of(through_addresses, "tl.load(source")


@triton.jit
def scalar_offset(x_ptr, y_ptr, stride):
    i = tl.program_id(0)
    start = i * stride
    tl.store(y_ptr + i, tl.load(x_ptr + start))


def test_a_scalar_offset_that_overflows_32_bits_names_the_multiplication():
    x, y = torch.zeros(8), torch.zeros(4)
    with cpu.checks("bounds", raise_=False) as report:
        scalar_offset[(4,)](x, y, 1 << 30)
    overflows = [f for f in report.findings if "wraps around" in f.done]
    assert [(f.line, f.argument) for f in overflows] == [(line_of(scalar_offset, "i * stride"), "x_ptr")]
    assert f"`*` is {2 << 30}" in overflows[0].done
    assert overflows[0].program == (2, 0, 0)
    assert overflows[0].times == 2
    # Program 1 leaves the tensor without an overflow.
    assert [f.program for f in report.findings if f not in overflows] == [(1, 0, 0)]


@triton.jit
def tensor_offset(x_ptr, y_ptr, stride, row, BLOCK: tl.constexpr):
    r = tl.arange(0, BLOCK)[:, None]
    c = tl.arange(0, 16)[None, :]
    far = r * stride
    tl.store(y_ptr + r * 16 + c, tl.load(x_ptr + (far + c), mask=r == row, other=0.0))


def test_a_tensor_offset_that_overflows_names_the_multiplication_and_only_where_it_is_used():
    x, y = torch.zeros(16), torch.zeros(8, 16)
    with cpu.checks("bounds", "races", "poison", "order") as report:
        tensor_offset[(1,)](x, y, 1 << 30, 0, BLOCK=8)  # the other rows overflow and are masked off
    assert report.findings == []
    with cpu.checks("bounds", raise_=False) as report:
        tensor_offset[(1,)](x, y, 1 << 30, 4, BLOCK=8)  # 4 * stride wraps around to 0, inside of x
    found = only(report)
    assert (found.line, found.argument) == (line_of(tensor_offset, "r * stride"), "x_ptr")
    assert f"`*` is {4 << 30}" in found.done


@triton.jit
def wrapping_sum(x_ptr, y_ptr, start, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(
        y_ptr + at,
        tl.load(
            x_ptr + (at + start),
            mask=at > 5,
        ),
    )


def test_a_row_along_which_a_sum_wraps_is_looked_at_element_by_element():
    x, y = torch.zeros(64), torch.zeros(16)
    with cpu.checks("bounds", raise_=False) as report:
        wrapping_sum[(1,)](x, y, (1 << 31) - 6, BLOCK=16)
    found = only(report)
    assert found.line == line_of(wrapping_sum, "(at + start)")
    assert f"`+` is {1 << 31}" in found.done
    with cpu.checks("bounds") as report:
        wrapping_sum[(1,)](x, y, -6, BLOCK=16)


@triton.jit
def hashed(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + ((at * 1103515245 + 12345) & 63)))


def test_numbers_that_may_wrap_before_they_are_offsets_are_left_alone():
    x, y = torch.randn(64), torch.zeros(64)
    with cpu.checks("bounds", "races", "poison", "order") as report:
        hashed[(1,)](x, y, BLOCK=64)
    assert report.findings == []
    assert torch.equal(y, x[(torch.arange(64) * 1103515245 + 12345) & 63])


@triton.jit
def divided(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) // n)


@triton.jit
def divided_by_elements(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 100 % tl.load(x_ptr + at))


def test_a_tensor_on_memory_that_cannot_be_accessed_does_not_end_the_process():
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    closed = libc.mmap(None, 4096, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    x = torch.frombuffer((ctypes.c_float * 1024).from_address(closed), dtype=torch.float32)
    with cpu.checks("bounds", raise_=False) as report:
        copy[(1,)](x, torch.zeros(1024), 1024, BLOCK=1024, SHIFT=0)
    found = only(report)
    assert f"SIGSEGV at address {closed:#x}" in found.done
    assert (found.argument, found.line) == ("x_ptr", line_of(copy, "tl.load"))


def test_integer_division_by_zero_is_found():
    x, y = torch.arange(16, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    with cpu.checks("bounds", raise_=False) as report:
        divided[(1,)](x, y, 0, BLOCK=16)
        divided_by_elements[(1,)](x, y, BLOCK=16)
    assert [f.line for f in report.findings] == [
        line_of(divided, "// n"),
        line_of(divided_by_elements, "100 %"),
    ]
    assert "integer division by zero (`//`)" in report.findings[0].done
    with cpu.checks("bounds"):
        divided[(1,)](x, y, 2, BLOCK=16)
        divided_by_elements[(1,)](x + 1, y, BLOCK=16)
    assert torch.equal(y, 100 % (x + 1))


@triton.jit
def _quotient(a, b):
    return a // b


@triton.jit
def combined_quotients(x_ptr, y_ptr, SCAN: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 8))
    if SCAN:
        tl.store(y_ptr + tl.arange(0, 8), tl.associative_scan(x, 0, _quotient))
    else:
        tl.store(y_ptr, tl.reduce(x, 0, _quotient))


@pytest.mark.parametrize("scan", [False, True])
def test_division_by_zero_in_a_combine_function_is_found(scan: bool):
    x, y = torch.ones(8, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    with cpu.checks("bounds"):
        combined_quotients[(1,)](x, y, SCAN=scan)
    x[5] = 0
    with cpu.checks("bounds", raise_=False) as report:
        combined_quotients[(1,)](x, y, SCAN=scan)
    assert "integer division by zero (`//`)" in only(report).done
    assert only(report).line == line_of(_quotient, "a // b")


@triton.jit
def masked_quotients(x_ptr, y_ptr, o_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    y = tl.load(y_ptr + at, mask=at < n)
    tl.store(o_ptr + at, x // y + x % y, mask=at < n)


@pytest.mark.parametrize(
    "instruments", [("bounds",), ("bounds", "poison"), ("bounds", "races", "poison", "order")]
)
def test_undefined_divisors_that_are_masked_off_are_none(instruments: tuple[str, ...]):
    x, y, o = torch.arange(10), torch.arange(1, 11), torch.zeros(10, dtype=torch.int64)
    with cpu.checks(*instruments):
        masked_quotients[(1,)](x, y, o, 10, BLOCK=16)
    assert torch.equal(o, x // y + x % y)
    with cpu.checks(*instruments, raise_=False) as report:
        masked_quotients[(1,)](x, x, o, 10, BLOCK=16)
    assert "integer division by zero" in only(report).done


@triton.jit
def endless(x_ptr, step):
    x = tl.load(x_ptr)
    while x > 0:
        x = x - step
    tl.store(x_ptr, x)


@triton.jit
def endless_for(x_ptr, step):
    x = 0.0
    for i in range(0, 10, step):
        x += i
    tl.store(x_ptr, x)


def test_a_loop_that_does_not_end_is_found():
    x = torch.full((1,), 10, dtype=torch.int32)
    with cpu.checks("bounds", raise_=False, max_turns=10_000) as report:
        endless[(1,)](x, 0)
        endless_for[(1,)](torch.zeros(1), 0)
    assert [f.line for f in report.findings] == [
        line_of(endless, "while"),
        line_of(endless_for, "for i"),
    ]
    assert "a loop does not end" in report.findings[0].done
    assert "10000 turns (max_turns)" in report.findings[0].expected
    with cpu.checks("bounds", max_turns=10_000):
        endless[(1,)](x, 1)
        endless_for[(1,)](torch.zeros(1), 2)
    assert x.item() == 0


@triton.jit
def waits_for_the_next(flag_ptr, y_ptr, n):
    """Each program waits until the next one has run."""
    i = tl.program_id(0)
    if i + 1 < n:
        while tl.atomic_add(flag_ptr + i + 1, 0) == 0:
            pass
    tl.store(y_ptr + i, i)
    tl.atomic_xchg(flag_ptr + i, 1)


@triton.jit
def counts_under_a_lock(lock_ptr, y_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(y_ptr, tl.load(y_ptr) + 1)
    tl.atomic_xchg(lock_ptr, 0)


def test_a_program_that_waits_for_a_later_one_is_named():
    flags, y = torch.zeros(5, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with cpu.checks("bounds", raise_=False, max_turns=1_000_000) as report:
        waits_for_the_next[(4,)](flags, y, 4)
    found = only(report)
    assert (found.line, found.argument) == (line_of(waits_for_the_next, "atomic_add"), "flag_ptr")
    assert (found.program, found.offset) == ((0, 0, 0), 1)
    assert "the program waits" in found.done


def test_what_a_lock_protects_is_in_order():
    lock, y = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with cpu.checks("bounds", "races", "order") as report:
        counts_under_a_lock[(16,)](lock, y)
    assert y.item() == 16
    assert report.findings == []


# --------------------------------------------------------------------------------------------------- races


@triton.jit
def accumulate(x_ptr, y_ptr, ATOMIC: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0))
    if ATOMIC:
        tl.atomic_add(y_ptr, x)
    else:
        tl.store(y_ptr, tl.load(y_ptr) + x)


def test_a_sum_without_atomics_is_a_race_and_one_with_them_is_none():
    x, y = torch.arange(8, dtype=torch.float32), torch.zeros(1)
    with cpu.checks("races", "order") as report:
        accumulate[(8,)](x, y, ATOMIC=True)
    assert y.item() == 28
    assert report.findings == []
    with cpu.checks("races", raise_=False) as report:
        accumulate[(8,)](x, y, ATOMIC=False)
    line = line_of(accumulate, "tl.store(y_ptr, tl.load")
    assert {(f.instrument, f.line, f.other_line, f.argument, f.offset) for f in report.findings} == {
        ("races", line, line, "y_ptr", 0)
    }
    assert {(f.program, f.other_program) for f in report.findings} == {((1, 0, 0), (0, 0, 0))}
    assert any("load of element 0 of y_ptr" in f.done for f in report.findings)
    assert any("store to element 0 of y_ptr" in f.done for f in report.findings)


@triton.jit
def overlapping(y_ptr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    tl.store(y_ptr + tl.program_id(0) * STEP + tl.arange(0, BLOCK), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int8])
def test_two_programs_that_store_to_one_element_are_found_also_where_they_store_the_same(dtype: torch.dtype):
    y = torch.zeros(64, dtype=dtype)
    with cpu.checks("races", raise_=False) as report:
        overlapping[(3,)](y, BLOCK=16, STEP=16)
    assert report.findings == []
    with cpu.checks("races", raise_=False) as report:
        overlapping[(3,)](y, BLOCK=16, STEP=15)
    found = only(report)
    assert (found.offset, found.program, found.other_program) == (15, (1, 0, 0), (0, 0, 0))
    assert found.times == 2
    assert re.search(
        r"store to element 15 of y_ptr \(byte \d+ .*, which program \(0, 0, 0\) stored to at line \d+",
        found.done,
    )


@triton.jit
def neighbours(x_ptr, y_ptr, n):
    i = tl.program_id(0)
    tl.store(y_ptr + i, tl.load(x_ptr + (i + 1) % n) + 1)


def test_reading_what_another_program_writes_is_found_through_another_argument_too():
    x, y = torch.zeros(8), torch.zeros(8)
    with cpu.checks("races", "order") as report:
        neighbours[(8,)](x, y, 8)
    assert report.findings == []
    with cpu.checks("races", raise_=False) as report:
        neighbours[(8,)](x, x, 8)
    assert {f.argument for f in report.findings} == {"x_ptr", "y_ptr"}
    assert any("which program (0, 0, 0) loaded" in f.done for f in report.findings)
    with cpu.checks("races", raise_=False) as report:
        neighbours[(4,)](x[:5], x[2:], 4)
    assert report.findings, "two views that overlap"


@triton.jit
def mixed(y_ptr):
    if tl.program_id(0) == 0:
        tl.store(y_ptr, 1.0)
    else:
        tl.atomic_add(y_ptr, 1.0)


@triton.jit
def last_one_sums(x_ptr, parts_ptr, count_ptr, y_ptr, n: tl.constexpr, SEM: tl.constexpr):
    i = tl.program_id(0)
    tl.store(parts_ptr + i, tl.load(x_ptr + i) * 2)
    if tl.atomic_add(count_ptr, 1, sem=SEM) == n - 1:
        tl.store(y_ptr, tl.sum(tl.load(parts_ptr + tl.arange(0, n))))


def test_a_store_against_an_atomic_update_is_a_race():
    with cpu.checks("races", raise_=False) as report:
        mixed[(2,)](torch.zeros(1))
    found = only(report)
    assert found.line == line_of(mixed, "atomic_add")
    assert found.other_line == line_of(mixed, "tl.store")


def test_the_last_program_may_sum_up_what_an_atomic_counter_has_released():
    x, y = torch.arange(16, dtype=torch.float32), torch.zeros(1)

    def launch(sem: str) -> cpu.Report:
        parts, count = torch.zeros(16), torch.zeros(1, dtype=torch.int32)
        with cpu.checks("bounds", "races", "order", raise_=False) as report:
            last_one_sums[(16,)](x, parts, count, y, 16, sem)
        return report

    assert launch("acq_rel").findings == []
    assert y.item() == 240
    found = [f for f in launch("relaxed").findings if f.instrument == "races"]
    assert found, "a relaxed update orders nothing"
    assert found[0].argument == "parts_ptr"


# -------------------------------------------------------------------------------------------------- poison


@triton.jit
def row_sums(x_ptr, y_ptr, n, BLOCK: tl.constexpr, KIND: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if KIND == "other":
        x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    else:
        x = tl.load(x_ptr + at, mask=at < n)
    if KIND == "where":
        x = tl.where(at < n, x, 0.0)
    if KIND == "max":
        tl.store(y_ptr, tl.max(x))
    elif KIND == "min":
        tl.store(y_ptr, tl.min(x))
    elif KIND == "product":
        tl.store(y_ptr, tl.sum(x * tl.where(at < n, 1.0, 0.0)))
    else:
        tl.store(y_ptr, tl.sum(x))


@pytest.mark.parametrize("torch_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["sum", "max", "min", "product"])
def test_undefined_elements_that_reach_an_output_are_found(kind: str, torch_dtype: torch.dtype):
    x, y = torch.randn(50).to(torch_dtype), torch.zeros(1, dtype=torch_dtype)
    with cpu.checks("poison", raise_=False) as report:
        row_sums[(1,)](x, y, 50, BLOCK=64, KIND=kind)
    found = only(report)
    assert (found.instrument, found.argument, found.offset) == ("poison", "y_ptr", 0)
    assert found.line == line_of(row_sums, "x = tl.load(x_ptr + at, mask=at < n)")
    assert "element [0] of y_ptr" in found.done


@pytest.mark.parametrize("kind", ["other", "where"])
def test_undefined_elements_that_reach_no_output_are_none(kind: str):
    x, y = torch.randn(50), torch.zeros(1)
    with cpu.checks("poison", "bounds") as report:
        row_sums[(1,)](x, y, 50, BLOCK=64, KIND=kind)
    assert report.findings == []
    torch.testing.assert_close(y[0], x.sum())


def test_undefined_integers_are_found():
    x, y = torch.arange(50, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with cpu.checks("poison", raise_=False) as report:
        row_sums[(1,)](x, y, 50, BLOCK=64, KIND="sum")
    assert only(report).instrument == "poison"


@triton.jit
def marks(x_ptr, y_ptr, n, BLOCK: tl.constexpr, WAY: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)
    if WAY == "mask":
        tl.store(y_ptr + at, 1, mask=x > 0)
    else:
        if tl.max(x) > 1000:
            tl.store(y_ptr, 1)


@pytest.mark.parametrize("way", ["mask", "branch"])
def test_undefined_elements_that_decide_whether_something_is_stored_are_found(way: str):
    # The first run stores what the second one does not: a run over the memory of the first would not show it.
    x, y = torch.zeros(50, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    with cpu.checks("poison", raise_=False) as report:
        marks[(1,)](x, y, 50, BLOCK=64, WAY=way)
    assert only(report).argument == "y_ptr"
    with cpu.checks("poison") as report:
        marks[(1,)](torch.zeros(64, dtype=torch.int32), y, 64, BLOCK=64, WAY=way)
    assert report.findings == []


@triton.jit
def fill(y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, (at * 2).to(y_ptr.dtype.element_ty), mask=at < n)


@pytest.mark.parametrize(
    "torch_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64]
)
def test_an_output_that_is_not_wholly_written_is_found(torch_dtype: torch.dtype):
    def partly() -> None:
        with cpu.checks("poison"):
            y = torch.empty(50, dtype=torch_dtype)
            fill[(3,)](y, 50, BLOCK=16)

    with pytest.raises(
        cpu.Fault, match=r"element \(48,\) of y_ptr, of shape \(50,\), was never written, one of 2"
    ):
        partly()
    with cpu.checks("poison") as report:
        y = torch.empty(50, dtype=torch_dtype)
        fill[(4,)](y, 50, BLOCK=16)
        spare = torch.empty_like(y)  # no kernel is to write it
    assert report.findings == []
    assert spare.shape == y.shape
    assert torch.equal(y, (torch.arange(50) * 2).to(torch_dtype))


def test_what_programs_that_were_ended_did_not_write_is_no_finding_of_its_own():
    with cpu.checks("bounds", "poison", raise_=False) as report:
        x, y = torch.randn(20), torch.empty(32)
        copy[(2,)](x, y, 32, BLOCK=16, SHIFT=0)
    assert only(report).instrument == "bounds"
    assert y[16:].isnan().all()


def test_reading_memory_without_contents_gives_nan():
    with cpu.checks("poison", raise_=False):
        x, y = torch.randn(3).new_empty(16), torch.zeros(16)
        copy[(1,)](x, y, 16, BLOCK=16, SHIFT=0)
    assert y.isnan().all()
    assert torch.empty(3).shape == (3,)
    assert "_made" not in str(torch.empty), "the functions of torch are themselves again"


def test_memory_without_contents_of_an_emulated_gpu():
    with cpu.as_cuda(), cpu.checks("poison", raise_=False) as report:
        y = torch.empty(50, device="cuda")
        assert all(x.isnan().all() for x in (y, torch.empty_like(y), y.new_empty(3)))
        fill[(3,)](y, 50, BLOCK=16)
    assert "element (48,) of y_ptr" in only(report).done


# --------------------------------------------------------------------------------------------------- order


@triton.jit
def last_wins(y_ptr):
    tl.store(y_ptr, tl.program_id(0).to(tl.float32))


def test_an_output_that_depends_on_the_order_of_programs_is_found_with_both_values():
    y = torch.full((1,), -1.0)
    with cpu.checks("order", raise_=False) as report:
        last_wins[(8,)](y)
    found = only(report)
    assert (found.instrument, found.argument, found.offset) == ("order", "y_ptr", 0)
    assert "element [0] of y_ptr is 7.0 with the programs in order and 0.0 with them reversed" in found.done
    assert y.item() == 7.0, "memory holds what the programs in order have left"


def test_the_order_of_floating_point_atomics_shows():
    x, y = torch.tensor([1e8, 1.0, -1e8, 1.0]), torch.zeros(1)
    with cpu.checks("order", raise_=False) as report:
        accumulate[(4,)](x, y, ATOMIC=True)
    assert "adds floating-point numbers atomically" in only(report).expected


@triton.jit
def in_place(x_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at) * 2 + 1)


def test_kernels_that_work_in_place_begin_each_run_with_their_inputs():
    x = torch.randn(64)
    expected = x * 2 + 1
    with cpu.checks("order", "poison", "races") as report:
        in_place[(4,)](x, BLOCK=16)
    assert report.findings == []
    assert torch.equal(x, expected)


# ------------------------------------------------------------------------------------------------- traffic


def test_traffic_counts_bytes_and_sectors_of_each_argument():
    x, y = torch.randn(4, 64), torch.zeros(4, 64)
    with cpu.checks("traffic") as report:
        rows[(1,)](x, y, 64, 64, 10, ROWS=4, BLOCK=64, LIMIT=0)
        gathered[(1,)](x, torch.arange(0, 64, 8), y, 8, BLOCK=8)
    t = report.traffic["rows", "x_ptr"]
    assert (t.loaded, t.stored) == (4 * 10 * 4, 0)
    assert t.loaded_sectors == 4 * ((x.data_ptr() % 32 + 40 + 31) // 32)
    assert report.traffic["rows", "y_ptr"].stored == 160
    t = report.traffic["gathered", "x_ptr"]
    assert (t.loaded, t.loaded_sectors) == (32, 8)
    table = report.traffic_lines()
    assert table[0].split() == ["kernel", "argument", "loaded", "in", "sectors", "stored", "in", "sectors"]
    assert any(line.split()[:4] == ["rows", "total", "160", "B"] for line in table)


def test_the_traffic_of_standard_attention_is_what_its_formula_says():
    from effattn.kernels.standard_attention import standard_attention

    n, d, heads, block = 128, 16, 3, 64
    q, k, v = (torch.randn(1, heads, n, d) for _ in range(3))
    with cpu.checks("bounds", "races", "poison", "order", "traffic") as report:
        standard_attention(q, k, v, block=block)
    assert report.findings == []
    moved = sum(t.loaded + t.stored for t in report.traffic.values())
    assert moved == 4 * heads * (4 * n * n + n * d + 3 * n * n * d // block)


# ---------------------------------------------------------------------------------- the project's kernels


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("causal", ["none", "bottom-right"])
def test_the_flash_kernel_passes_every_check(dtype: str, causal: str):
    case = Case(dtype=dtype, heads=2, q_len=37, kv_len=70, head_dim=24, causal=causal, layout="bshd")
    with_checks = Local("flash", checks=("bounds", "races", "poison", "order")).judge(case)
    assert with_checks.outcome == Outcome.PASS, with_checks.message
    assert "nothing was checked" not in with_checks.message


# ----------------------------------------------------------------------------------------------- when off


def test_without_checks_a_kernel_has_the_c_that_it_has_without_the_feature():
    def c_code() -> str:
        args = (torch.zeros(4, 8), torch.zeros(4, 8), 8, 8, 8)
        return rows.warmup(*args, grid=(1,), ROWS=4, BLOCK=8, LIMIT=0).asm["c"]

    plain = c_code()
    with cpu.checks("bounds"):
        checked = c_code()
    assert "effattn_access" in checked
    # The kernel, and what every kernel finds in the runtime library.
    assert "effattn_" not in re.sub(r"effattn_(kernel|dot|turn|load_row|front|reduce)_?", "", plain)
    assert plain == c_code()
    # What is added are whole lines.
    rest = iter(checked.splitlines())
    assert all(line in rest for line in plain.splitlines())


@pytest.mark.parametrize(
    ("names", "words"),
    [(("bonds",), "unknown check 'bonds'; expected some of bounds, races"), ((), "no check was named")],
)
def test_unknown_checks_are_refused(names, words):
    with pytest.raises(RequestError, match=words):
        cpu.checks(*names)


def test_limits_must_be_positive():
    with pytest.raises(RequestError, match="max_turns=0: expected a positive number"):
        cpu.checks("bounds", max_turns=0)
