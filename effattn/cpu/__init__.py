"""A Triton backend that runs kernels on the CPU: TTIR to C to a shared library.

Triton finds it through the entry point group `triton.backends`. Where no GPU backend is active it is the default, and
`kernel[grid](cpu_tensors...)` simply works. On a GPU machine choose it explicitly:

    with effattn.cpu.active():
        kernel[grid](cpu_tensors...)

Code that was written for device "cuda" runs unchanged inside `effattn.cpu.as_cuda()`.

What is exact and what is declared:
  - arithmetic is IEEE in the declared type; conversions to fp16 and bf16 round once, to nearest even; signed integers
    wrap; there is no contraction.
  - where the IR leaves the result open: integers divided by 0 give -1 (all ones), and their remainder the dividend;
    shifts by the width or more give 0, or the sign; floats become integers toward zero, saturating, NaN to 0.
  - any NaN stays one and its bits are not specified, except where a value is only moved (loaded, stored, selected,
    bitcast): that keeps every bit. `tl.maximum` and `tl.minimum` return the number where one side is NaN, and either
    of two zeros; with `propagate_nan` the NaN, and -0 is less than +0.
  - `tl.dot` is one chain per element in the order of k, c = fma(a, b, c), starting from the accumulator; accumulators
    of 16 bits are summed in fp32 and rounded at the end. Other dot models, those of tensor cores, are in models.py. For
    fp32 operands Triton's own default where `input_precision` is not given is tf32, and it is tf32 here too: the
    operands are rounded to 11 significant bits,
    ties away from zero.
  - a sum of fp32 or fp64 along the last axis (of more than one element) uses min(n, 16) lanes, lane l taking the
    elements l, l + 16, ..., and then adds halves; any other reduction, and every scan, goes through the axis in order.
  - exp2 and exp of fp32 are polynomials with an error below 0.95 ulp; other functions are the C library's.
  - a masked-off element is neither read nor written; without `other` it is 0.

Triton imports this package while it imports itself, so nothing here imports triton, torch or numpy at the top.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from effattn.cpu.compat import as_cuda
from effattn.cpu.sanitizer import Fault, Finding, Report, checks

__all__ = ["Fault", "Finding", "Report", "active", "as_cuda", "checks", "get_num_threads", "set_num_threads"]


@contextmanager
def active(*, dot_model: str | None = None) -> Iterator[None]:
    """Run Triton kernels on this backend inside the block, also where a GPU is present.

    `dot_model`: how `tl.dot` accumulates, a name that `effattn.cpu.models` lists, such as "hopper"; None leaves it as
    it is. It holds for all threads, and for processes that are started inside. RequestError for an unknown name.
    """
    from triton.runtime.driver import driver

    from effattn.cpu import models
    from effattn.cpu.driver import CPUDriver

    with ExitStack() as undo:
        if dot_model is not None:
            undo.enter_context(models.use(dot_model))
        before = driver.active
        if not isinstance(before, CPUDriver):
            driver.set_active(CPUDriver())
            undo.callback(driver.set_active, before)
        yield


def get_num_threads() -> int:
    """Threads that a launch uses."""
    from effattn.cpu import launch

    return launch.get_num_threads()


def set_num_threads(count: int) -> None:
    """Set the number of threads of later launches (at least 1)."""
    from effattn.cpu import launch

    launch.set_num_threads(count)
