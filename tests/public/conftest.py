"""Kernels that others published, unchanged, against float64: `tox -e public`, or `pytest --effattn-cpu tests/public`.

They need packages from PyPI that the rest of the tests do not (tox.ini lists them), so without `--effattn-cpu` nothing here
is collected. With it, a missing package is a failure, not a skip.
"""

from __future__ import annotations

import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}

#: Unit roundoff of a format: the largest relative error of one rounding to it.
UNIT = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24, "tf32": 2.0**-11}

#: package -> how many of its results were compared with float64
compared: Counter[str] = Counter()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if config.getoption("--effattn-cpu", default=False) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("default")
            )  # the packages' warnings are not ours to repair


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.section("tensors of public kernels compared with float64")
    for package, count in sorted(compared.items()):
        terminalreporter.write_line(f"{package}: {count}")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small shapes: torch's own threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(20)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def references() -> ModuleType:
    """The formulas in float64 (references.py)."""
    path = Path(__file__).with_name("references.py")
    spec = importlib.util.spec_from_file_location("effattn_public_references", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def allowance(dtype: str, roundings: float, dot: str) -> float:
    """The relative error, in the root mean square, that a correct kernel stays below.

    One rounding to a format of unit roundoff u has a relative error of at most u. `roundings` counts how many the data
    pass on the longest way from the inputs to a result: to the dtype of inputs and outputs, of weights for a second
    product, of stored states. They are added as if all were at their worst and none cancelled. Arithmetic is in fp32: its
    part is 64 roundings to fp32, which stands for sums of a few hundred terms. `dot` is the format of a product's
    operands where that is less than the dtype's (tf32).
    """
    unit = UNIT[dot] if dtype == "fp32" else UNIT[dtype]
    return roundings * unit + 64 * UNIT["fp32"]


def check_close(
    package: str,
    what: str,
    got: torch.Tensor,
    exact: torch.Tensor,
    dtype: str,
    roundings: float,
    dot: str = "fp32",
) -> None:
    """Fail unless `got` is as near to the float64 `exact` as rounding explains, on the whole and in every row.

    A row's error is measured by its own norm, or by the mean row's where that is larger: what cancels in a row was rounded
    at the size of its terms.
    """
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    x, y = (torch.atleast_1d(t.detach().cpu().double()) for t in (got, exact))
    assert y.norm() > 0, f"{what}: the reference is 0, which would compare nothing"
    assert torch.isfinite(x).all(), (
        f"{what}: {int((~torch.isfinite(x)).sum())} of {x.numel()} values are not finite"
    )
    allowed = allowance(dtype, roundings, dot)
    error = float((x - y).norm() / y.norm())
    assert error <= allowed, f"{what} in {dtype}: error {error:.2e} of the norm, allowed {allowed:.2e}"
    rows, norms = (x - y).reshape(-1, x.shape[-1]).norm(dim=-1), y.reshape(-1, x.shape[-1]).norm(dim=-1)
    typical = float(norms.square().mean().sqrt())
    share = rows / norms.clamp(min=typical)
    worst = int(share.argmax())
    # A row has fewer elements to average over than the whole.
    assert share[worst] <= 3 * allowed, (
        f"{what} in {dtype}: row {worst} is off by {share[worst]:.2e}, allowed {3 * allowed:.2e}"
    )
    compared[package] += 1


Kernel = Callable[..., Any]


@pytest.fixture(scope="session")
def compare() -> Callable[..., None]:
    """compare(package, kernel, reference, dtype, *float64 inputs, roundings=...): results and all gradients."""

    def run(
        package: str,
        kernel: Kernel,
        reference: Kernel,
        dtype: str,
        *inputs: torch.Tensor,
        roundings: float,
        dot: str = "fp32",
        grads: bool = True,
        names: Sequence[str] | None = None,
        grad_roundings: float | None = None,
        cancelling: Sequence[int] = (),
    ) -> None:
        # `cancelling`: inputs whose gradient is a running sum of differences of much larger terms.
        # The kernel and the reference start from the same numbers, those of the dtype.
        start = [x.to(TORCH_DTYPE[dtype]).cuda() for x in inputs]
        low = [x.clone().requires_grad_(grads) for x in start]
        high = [x.double().cpu().requires_grad_(grads) for x in start]
        got, exact = _tuple(kernel(*low)), _tuple(reference(*high))
        assert len(got) == len(exact)
        for i, (x, y) in enumerate(zip(got, exact, strict=True)):
            assert x.is_cuda
            check_close(package, f"output {i}", x, y, dtype, roundings, dot)
        if not grads:
            return
        seeds = [
            torch.randn(y.shape, dtype=torch.float64).to(x.dtype) for x, y in zip(got, exact, strict=True)
        ]
        torch.autograd.backward(got, [s.cuda() for s in seeds])
        torch.autograd.backward(exact, [s.double() for s in seeds])
        for i, (x, y) in enumerate(zip(low, high, strict=True)):
            assert x.grad is not None, f"input {i} got no gradient"
            assert y.grad is not None
            name = names[i] if names is not None else f"input {i}"
            passes = (grad_roundings or 2 * roundings) * (3 if i in cancelling else 1)
            check_close(package, f"gradient of {name}", x.grad, y.grad, dtype, passes, dot)

    return run


def _tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


@pytest.fixture(scope="session")
def close() -> Callable[..., None]:
    return check_close
