"""Triton's view of this backend at run time: which device, how a library is loaded and launched."""

# Triton's base classes annotate differently from version to version, some not at all.
# pyright: reportIncompatibleMethodOverride=false

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from effattn.cpu import models, session
from effattn.cpu.compiler import BACKEND


def _gpu_driver_active() -> bool:
    from triton.backends import backends

    return any(b.driver.is_active() for b in backends.values() if b.driver is not CPUDriver)


class CPUDriver(DriverBase):
    """Runs kernels on the host's cores, on tensors that live in host memory."""

    def __init__(self) -> None:
        super().__init__()
        from effattn.cpu import launch, refusals

        refusals.install()
        self.utils = launch.Utils()
        self.launcher_cls = launch.Launcher

    @classmethod
    def is_active(cls) -> bool:
        """Active by itself only where no GPU backend is."""
        return not _gpu_driver_active()

    def map_python_to_cpp_type(self, ty: str) -> str:
        from effattn.cpu import launch

        return launch.c_type(ty)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(BACKEND, "host", 1)

    def get_current_device(self) -> str:
        # The key under which JITFunction keeps compiled kernels: a GPU's key is an integer, so the two never mix.
        return session.device_key(models.device_key(BACKEND))

    def set_current_device(self, device: Any) -> None:
        pass

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        import torch

        return torch.cpu

    def get_empty_cache_for_benchmark(self) -> Any:
        import torch

        return torch.empty(1 << 22, dtype=torch.int8)

    def clear_cache(self, cache: Any) -> None:
        cache.zero_()

    def get_benchmarker(self) -> Any:
        from effattn.cpu import launch

        return launch.benchmark
