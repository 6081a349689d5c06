"""The sanitizer of the CPU backend: wrong kernels that each instrument must find, right ones on which it is silent."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
import triton
import triton.language as tl

from effattn import cpu
from effattn.cpu.sanitizer import Finding, Report


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
