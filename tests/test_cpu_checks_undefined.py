"""The sanitizer: undefined elements whose effect shows for some contents only, and memory that nobody has written."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from effattn import cpu
from effattn.cpu.sanitizer import Finding


def _found(launch: Any, *instruments: str) -> list[Finding]:
    with cpu.checks(*(instruments or ("poison",)), raise_=False) as report:
        alive = launch()
    del alive
    return report.findings


def _line(kernel: Any, text: str) -> int:
    lines, start = inspect.getsourcelines(kernel.fn)
    (found,) = [start + k for k, line in enumerate(lines) if text in line]
    return found


# --------------------------------------------------------------------------------------------------- masked stores


@triton.jit
def _quotients(a_ptr, b_ptr, y_ptr, N: tl.constexpr, MASKED: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(y_ptr + at, a // b, mask=(b != 0) | (not MASKED))


@pytest.mark.parametrize("zeros", [[3], [0, 5], [6, 7], []])
@pytest.mark.parametrize("masked", [True, False])
def test_a_division_by_zero_is_found_where_its_result_is_stored(zeros: list[int], masked: bool) -> None:
    a, b, y = torch.arange(8) + 70, torch.arange(8) + 1, torch.full((8,), -7)
    b[zeros] = 0
    found = _found(lambda: _quotients[(1,)](a, b, y, N=8, MASKED=masked), "bounds")
    assert bool(found) == (bool(zeros) and not masked)
    here = b != 0
    if not found:
        assert torch.equal(y[here], a[here] // b[here])
    if masked:
        assert bool((y[~here] == -7).all())
        y.fill_(-7)
        _quotients[(1,)](a, b, y, N=8, MASKED=True)
        assert torch.equal(y, torch.where(here, a // b.clamp(min=1), -7))


# ---------------------------------------------------------------------------------------------------- masked loads


@triton.jit
def _counts(x_ptr, y_ptr, n, BLOCK: tl.constexpr, KIND: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)  # here
    if KIND == "below":
        tl.store(y_ptr, tl.sum((x < -1000).to(tl.int32)))
    elif KIND == "above":
        tl.store(y_ptr, tl.sum((x > 1000).to(tl.int32)))
    elif KIND == "zero":
        tl.store(y_ptr, tl.sum((x == 0).to(tl.int32)))
    elif KIND == "near":
        tl.store(y_ptr, tl.sum((tl.abs(x) < 0.5).to(tl.int32)))
    elif KIND == "all":
        tl.store(y_ptr, tl.min(tl.where(x > 0, 1, 0)))
    elif KIND == "argmin":
        tl.store(y_ptr, tl.argmin(x, 0))
    elif KIND == "twice":
        tl.store(y_ptr + at, x + x, mask=at < n)
    else:
        tl.store(y_ptr, tl.sum(((x < -1000) & (at < n)).to(tl.int32)))


@pytest.mark.parametrize(
    "torch_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64]
)
@pytest.mark.parametrize("kind", ["below", "above", "zero", "near", "all", "argmin"])
def test_comparisons_with_undefined_elements_are_found(kind: str, torch_dtype: torch.dtype) -> None:
    x, y = torch.randint(1, 5, (50,)).to(torch_dtype), torch.zeros(64, dtype=torch.int32)
    (found,) = _found(lambda: _counts[(1,)](x, y, 50, BLOCK=64, KIND=kind))
    assert (found.argument, found.offset, found.line) == ("y_ptr", 0, _line(_counts, "# here"))


@pytest.mark.parametrize("kind", ["twice", "masked"])
def test_comparisons_that_are_masked_are_none(kind: str) -> None:
    x, y = torch.randint(1, 5, (50,)).float(), torch.zeros(64)
    assert _found(lambda: _counts[(1,)](x, y, 50, BLOCK=64, KIND=kind)) == []


@triton.jit
def _overflowing(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr, tl.sum(tl.exp(tl.load(x_ptr + at, mask=at < n)) * 0))


def test_an_output_that_is_nan_but_for_zeros_is_found() -> None:
    """On a GPU such elements mostly are zero; NaN from NaN and from a large number would be the same bits."""
    (found,) = _found(lambda: _overflowing[(1,)](torch.zeros(50), torch.zeros(1), 50, BLOCK=64))
    assert "is nan with NaN and 0.0 with zeros in the elements" in found.done


# ------------------------------------------------------------------------------------------ memory nobody has written


@triton.jit
def _write(y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, at.to(y_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _twice(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) * 2)  # here


@triton.jit
def _moved(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


@triton.jit
def _masked(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.where(at < n, tl.load(x_ptr + at), 0))


@triton.jit
def _lowered(y_ptr):
    tl.store(y_ptr, tl.minimum(tl.load(y_ptr), 3))  # here


@triton.jit
def _counted(y_ptr):
    tl.atomic_add(y_ptr, 1)  # here


@triton.jit
def _scattered(x_ptr, y_ptr):
    tl.store(y_ptr + tl.load(x_ptr) % 4, 1)  # here


_TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64]


@pytest.mark.parametrize("torch_dtype", _TYPES)
def test_reading_what_nobody_has_written_is_found_where_it_reaches_an_output(
    torch_dtype: torch.dtype,
) -> None:
    def launch(written: int, view: bool = False) -> None:
        x = torch.empty(2, 4, dtype=torch_dtype).T if view else torch.empty(8, dtype=torch_dtype)
        y = torch.zeros(8)
        _write[(1,)](x, written, BLOCK=8)
        _twice[(1,)](x, y, 8, BLOCK=8)
        assert y[:written].tolist() == [2 * k for k in range(written)], "memory is as the first run leaves it"

    for view in (False, True):
        (found,) = _found(partial(launch, 6, view))
        assert (found.argument, found.offset, found.line) == ("y_ptr", 6, _line(_twice, "# here"))
        assert "in the elements of x_ptr (torch.empty at test_cpu_checks_undefined.py:" in found.done
        assert "that nobody has written" in found.done
    assert _found(lambda: launch(8)) == []


@pytest.mark.parametrize("torch_dtype", _TYPES)
def test_elements_that_are_only_moved_or_masked_are_none(torch_dtype: torch.dtype) -> None:
    def launch() -> torch.Tensor:
        x, moved, y = (torch.empty(8, dtype=torch_dtype) for _ in range(3))
        _write[(1,)](x, 6, BLOCK=8)
        _moved[(1,)](x, moved, 8, BLOCK=8)
        _masked[(1,)](moved, y, 6, BLOCK=8)
        assert y.tolist() == [0, 1, 2, 3, 4, 5, 0, 0]
        return y

    assert _found(launch, "bounds", "races", "poison", "order") == []


def test_updates_of_what_nobody_has_written_are_found() -> None:
    for kernel in (_lowered, _counted):
        for torch_dtype in (torch.float32, torch.int32):
            (found,) = _found(lambda run=kernel, of=torch_dtype: run[(1,)](torch.empty(1, dtype=of)))
            assert (found.argument, found.line) == ("y_ptr", _line(kernel, "# here"))


def test_an_index_that_nobody_has_written_is_found() -> None:
    (found,) = _found(lambda: _scattered[(1,)](torch.empty(1, dtype=torch.int32), torch.zeros(4)))
    assert (found.instrument, found.line) == ("poison", _line(_scattered, "# here"))
    assert found.done.endswith(
        "(with a large number (0xa5... for integers) in elements that were never written)"
    )


@pytest.mark.parametrize("torch_dtype", _TYPES)
def test_memory_nobody_has_written_on_an_emulated_gpu_that_is_the_default_device(
    torch_dtype: torch.dtype,
) -> None:
    def launch() -> None:
        x, y = torch.empty(8, dtype=torch_dtype), torch.zeros(8)
        assert x.is_cuda
        assert y.is_cuda
        _write[(1,)](x, 6, BLOCK=8)
        _twice[(1,)](x, y, 8, BLOCK=8)

    with cpu.as_cuda(), torch.device("cuda"):
        (found,) = _found(launch)
    assert (found.argument, found.offset) == ("y_ptr", 6)


# ------------------------------------------------------------------------------------------- reads of the host's code


def _filled(written: int, of: torch.dtype = torch.float32) -> torch.Tensor:
    """Eight elements; nobody else holds the tensor, so nothing is known of it when the checks end."""
    x = torch.empty(8, dtype=of)
    _write[(1,)](x, written, BLOCK=8)
    return x


_READS = [
    lambda x: x[-1].item(),
    lambda x: float(x.view(2, 4)[1, 3]),
    lambda x: bool(x[6]),
    lambda x: x.sum(),
    lambda x: torch.max(x),
    lambda x: x.view(2, 4).T[1:].amax(),
    lambda x: torch.allclose(torch.zeros(8, dtype=x.dtype), x),
    lambda x: x.equal(x),
]


@pytest.mark.parametrize("torch_dtype", _TYPES)
@pytest.mark.parametrize("read", _READS)
def test_what_host_code_reads_and_nobody_has_written_is_found(read: Any, torch_dtype: torch.dtype) -> None:
    (found,) = _found(lambda: read(_filled(6, torch_dtype)) and None)
    assert (found.instrument, found.kernel, found.argument) == ("poison", "_write", "y_ptr")
    assert found.offset in (6, 7)
    assert "(torch.empty at test_cpu_checks_undefined.py:" in found.done
    assert " at test_cpu_checks_undefined.py:" in found.done.partition("is read by")[2]
    assert _found(lambda: read(_filled(8, torch_dtype)) and None) == []


def test_a_read_of_the_host_raises_and_is_told_once() -> None:
    with cpu.checks("poison") as report:
        x = _filled(6)
        with pytest.raises(cpu.Fault, match="element 6 of y_ptr"):
            x.sum()
        x.sum()
    assert len(report.findings) == 1
    assert report.launches == 1
    assert torch.Tensor.sum is torch._C.TensorBase.sum, "the functions of torch are themselves again"


def test_workspaces_that_are_filled_in_part_are_none() -> None:
    def launch() -> None:
        x, untouched = _filled(6), torch.empty(8)
        y = torch.zeros(8)
        _masked[(1,)](x, y, 6, BLOCK=8)
        assert y.sum() == 15
        assert x[:6].sum() == 15
        x.clone(), x * 2, x.cpu(), x.sum(0, keepdim=True), torch.max(x, y), str(x)  # moves, rows, prints
        assert untouched.sum().isnan(), "no kernel is to write it"

    assert _found(launch) == []


def test_what_a_kernel_did_to_memory_before_it_was_given_back_is_nothing_to_a_new_tensor() -> None:
    def launch(*, again: bool) -> torch.Tensor:
        x = _filled(6)
        # The same memory, without contents again.
        return torch.empty(8, out=x) if again else x

    assert _found(partial(launch, again=True)) == []
    assert len(_found(partial(launch, again=False))) == 1
