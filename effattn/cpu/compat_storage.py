"""What belongs to a tensor's memory while a GPU is emulated: whether it is pinned, and the device that a file names.

Both are marks on the storage, so views share them. A file saved from the emulated device names it, as one from a GPU does:
inside the emulation it loads on the device, and elsewhere torch asks for `map_location`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import _utils

from effattn.cpu.compat_tensor import CudaTensor, Patch, is_cuda_device, plain, state, tag

_ON_DEVICE = "_effattn_on_device"
_PINNED = "_effattn_pinned"


def _storage(x: torch.Tensor) -> Any:
    return plain(x).untyped_storage()


def mark_pinned(x: torch.Tensor) -> torch.Tensor:
    setattr(_storage(x), _PINNED, True)
    return x


def is_pinned(x: torch.Tensor) -> bool:
    """Whether host memory is page-locked, which a GPU's kernel may read: `pin_memory` was called on it."""
    return not isinstance(x, CudaTensor) and getattr(_storage(x), _PINNED, False)


def mark_on_device(x: torch.Tensor) -> None:
    """Let what is saved of this tensor name the device."""
    setattr(_storage(x), _ON_DEVICE, True)


def _tag_of(storage: Any) -> str | None:
    untyped = getattr(storage, "_untyped_storage", storage)
    return "cuda:0" if state.active and getattr(untyped, _ON_DEVICE, False) else None


def _restored(storage: Any, location: str) -> Any:
    if not state.active or not location.startswith("cuda"):
        return None
    is_cuda_device(location)
    return _on_device(storage)


def _on_device(storage: Any, *_: Any, **__: Any) -> Any:
    setattr(getattr(storage, "_untyped_storage", storage), _ON_DEVICE, True)
    return storage


def _pinned(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    if isinstance(self, CudaTensor):
        raise RuntimeError(f"cannot pin '{self.type()}' only dense CPU tensors can be pinned")
    return self if is_pinned(self) else mark_pinned(self.clone())


def _set_data(original: Any) -> property:
    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        if isinstance(self, CudaTensor) == isinstance(value, CudaTensor):
            original.__set__(self, value)
            return
        # The class says where a tensor is, so the two change places; references to `self` stay good.
        new = value.detach()
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, requires_grad=self.requires_grad)
        else:
            new.requires_grad_(self.requires_grad)
        torch.utils.swap_tensors(self, new)

    return property(original.__get__, set_data)


def install(patch: Patch) -> Callable[[], None]:
    """Patch pinning, saving, loading and `.data`. Returns what undoes the rest."""
    patch(torch.Tensor, "pin_memory", _pinned)
    patch(torch.Tensor, "is_pinned", lambda self, device=None: is_pinned(self))
    patch(torch.Tensor, "data", _set_data(torch._C.TensorBase.data))
    patch(torch.UntypedStorage, "cuda", _on_device)
    rebuild = _utils._rebuild_tensor

    @functools.wraps(rebuild)
    def rebuilt(storage: Any, *args: Any) -> torch.Tensor:
        x = rebuild(storage, *args)
        return tag(x) if getattr(storage._untyped_storage, _ON_DEVICE, False) else x

    patch(_utils, "_rebuild_tensor", rebuilt)
    # Before the CPU's (10), to which every storage here belongs.
    entry = (5, _tag_of, _restored)
    torch.serialization.register_package(*entry)
    return lambda: torch.serialization._package_registry.remove(entry)
