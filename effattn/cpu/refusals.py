"""What Triton lets through, or answers with a bare KeyError, before a launch gets to this backend: here it has words.

Installed with the driver. Kernels of other backends are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import triton.compiler.compiler
import triton.runtime.jit
from triton.runtime.driver import driver

from effattn.errors import ArgumentTypeError, RequestError

#: the dtypes that Triton has pointers to, in words
_DTYPES = "bool, int8 to int64, uint8 to uint64, the float8 types, float16, bfloat16, float32 or float64"


@functools.cache
def install() -> None:
    """Put the checks in front of Triton's own code, once for the process."""
    function, kernel = triton.runtime.jit.JITFunction, triton.compiler.compiler.CompiledKernel
    function.run = _saying_which_argument(function.run)
    kernel.launch_metadata = _of_three_axes(kernel.launch_metadata)


def _saying_which_argument(run: Any) -> Any:
    """`JITFunction.run` that says which argument has a dtype that Triton does not know."""

    @functools.wraps(run)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return run(self, *args, **kwargs)
        except KeyError as error:
            words = _unknown_dtype(self, args, kwargs, error.args) if _is_ours() else ""
            if not words:
                raise
            raise ArgumentTypeError(words) from error

    return checked


def _is_ours() -> bool:
    from effattn.cpu.driver import CPUDriver

    return isinstance(driver.active, CPUDriver)


def _unknown_dtype(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], missing: tuple[Any, ...]
) -> str:
    """The message for a tensor whose dtype was looked up in vain; empty where that is not what happened."""
    for name, value in [*zip(function.arg_names, args, strict=False), *kwargs.items()]:
        dtype = str(getattr(value, "dtype", "")).removeprefix("torch.")
        if dtype and missing == (dtype,):
            hint = "; pass torch.view_as_real of it" if dtype.startswith("complex") else ""
            return (
                f"kernel {function.__name__}, argument {name!r}: kernels have no pointers to {dtype}; expected a tensor of "
                f"{_DTYPES}{hint}"
            )
    return ""


def _of_three_axes(launch_metadata: Any) -> Any:
    """`CompiledKernel.launch_metadata`, which sees the whole grid: Triton drops what comes after the third axis."""

    @functools.wraps(launch_metadata)
    def checked(self: Any, grid: Any, stream: Any, *args: Any) -> Any:
        if len(grid) > 3 and hasattr(self.metadata, "cpu_arguments"):
            raise RequestError(
                f"the grid of kernel {self.metadata.name} is {tuple(grid)}; expected at most three axes"
            )
        return launch_metadata(self, grid, stream, *args)

    return checked
