"""What Triton answers while a GPU is emulated: target, device, properties; and how autotuners choose."""

from __future__ import annotations

from typing import Any

import triton.testing
from triton.backends.compiler import GPUTarget

from effattn.cpu import compat_storage, launch, models, session
from effattn.cpu.compat_gpus import GPUS
from effattn.cpu.compat_tensor import DEVICE, Patch
from effattn.cpu.compiler import BACKEND, CPUBackend
from effattn.cpu.driver import CPUDriver
from effattn.errors import RequestError


class _Utils:
    """Loads as the CPU driver does; says of the device what the declared GPU would."""

    def __init__(self, utils: Any, capability: tuple[int, int]) -> None:
        self._utils = utils
        self._capability = capability

    def __getattr__(self, name: str) -> Any:
        return getattr(self._utils, name)

    def get_device_properties(self, device: Any = 0) -> dict[str, int]:
        gpu = GPUS[self._capability]
        return {
            "max_shared_mem": gpu.shared_memory,
            "max_num_regs": 65536,
            "multiprocessor_count": gpu.multiprocessors,
            "warpSize": 32,
            "sm_clock_rate": gpu.clock * 1000,
            "mem_clock_rate": gpu.memory_clock,
            "mem_bus_width": gpu.bus_width,
        }


def _device_address(value: Any) -> int:
    """The address that a pointer argument stands for. ValueError, in Triton's words, for memory that a GPU cannot reach."""
    import torch

    # Pinned memory is mapped into the device's address space; an empty tensor's address is 0.
    if isinstance(value, torch.Tensor) and value.is_cpu and not compat_storage.is_pinned(value):
        address = value.data_ptr()
        if address:
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        return address
    return launch.address_of(value)


#: programs along the second and the third axis of a grid (CUDA programming guide, technical specifications)
_MOST_YZ = 65535


class _Launcher(launch.Launcher):
    pointer = staticmethod(_device_address)

    def __call__(self, grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        for axis, size in (("y", grid_y), ("z", grid_z)):
            if isinstance(size, int) and size > _MOST_YZ:
                raise RequestError(
                    f"the grid of kernel {self.name} is ({grid_x}, {grid_y}, {grid_z}); a GPU has at most {_MOST_YZ} programs "
                    f"along {axis}: put the large axis first"
                )
        super().__call__(grid_x, grid_y, grid_z, *rest)


class EmulatedDriver(CPUDriver):
    """The CPU driver under the name of a GPU."""

    def __init__(self, capability: tuple[int, int]) -> None:
        super().__init__()
        self.launcher_cls = _Launcher
        self.capability = capability
        self.utils = _Utils(self.utils, capability)
        # Kernels ask at compile time which target they are for, so each has its own cache.
        self.key = f"{BACKEND}/cuda{capability[0]}{capability[1]}"

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_current_device(self) -> str:
        return session.device_key(models.device_key(self.key))

    def get_active_torch_device(self) -> Any:
        return DEVICE

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda


def _answers_for(target: GPUTarget) -> bool:
    return target.backend in (BACKEND, "cuda")


def _first_valid(original: Any) -> Any:
    """`Autotuner.prune_configs` that leaves the first configuration which compiles."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources

    def prune_configs(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs = list(original(self, kwargs))
        for config in configs[:-1]:
            given = {**kwargs, **config.all_kwargs()}
            if kwargs.keys() & config.kwargs.keys():
                break  # the autotuner itself explains this one
            given["warmup"] = True
            try:
                if config.pre_hook is not None:
                    # It may change arguments, such as the block shape of a descriptor, that the kernel is compiled for.
                    config.pre_hook({**self.nargs, **given})
                self.fn.run(*self.nargs.values(), **given)
            except (CompileTimeAssertionFailure, OutOfResources):
                continue
            return [config]
        return configs[-1:]

    return prune_configs


def _unmeasured(original: Any) -> Any:
    """`Autotuner._bench` for the one configuration that is left: older versions time it all the same."""

    def _bench(self: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
        return [0.0, 0.0, 0.0]

    return _bench


def _do_bench_without_graph(
    fn: Any, rep: int = 20, grad_to_none: Any = None, quantiles: Any = None, return_mode: str = "mean"
) -> Any:
    """`triton.testing.do_bench_cudagraph`, timed as do_bench does."""
    return triton.testing.do_bench(
        fn, rep=rep, grad_to_none=grad_to_none, quantiles=quantiles, return_mode=return_mode
    )


def install(patch: Patch, capability: tuple[int, int], autotune: str) -> None:
    """Choose the emulated driver, let the CPU backend answer for its target, and limit autotuners."""
    import torch._library.triton
    from triton.backends import backends
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.driver import driver

    _ = driver.active  # chosen before torch.cuda says that there is a GPU
    patch(driver, "_active", EmulatedDriver(capability))
    patch(CPUBackend, "supports_target", staticmethod(_answers_for))
    for name, backend in list(backends.items()):
        if name == "nvidia":
            patch(backend.compiler, "supports_target", staticmethod(lambda target: False))
    # torch.library.wrap_triton makes a kernel something that torch.compile can trace; nothing is traced here.
    patch(torch._library.triton, "is_wrap_triton_enabled", lambda: False)
    # It would capture a graph, which is not emulated.
    patch(triton.testing, "do_bench_cudagraph", _do_bench_without_graph)
    if autotune == "first":
        patch(Autotuner, "prune_configs", _first_valid(Autotuner.prune_configs))
        patch(Autotuner, "_bench", _unmeasured(Autotuner._bench))
