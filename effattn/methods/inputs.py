"""What the approximations of attention accept: the checks that Linformer and Performer share.

Tensors come from anywhere, so each check names what it saw, what was expected and what to do.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from typing import Any, NamedTuple

import torch

from effattn.errors import ArgumentError, ArgumentTypeError

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Sizes(NamedTuple):
    """The sizes of one problem."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads


def check_tensors(q: Any, k: Any, v: Any) -> Sizes:
    """The sizes of q (batch, heads, q_len, head_dim), k and v (batch, kv_heads, kv_len, head_dim / v_dim).

    Raises ArgumentTypeError for a wrong type, dtype or device, ArgumentError for a wrong shape.
    """
    named = {"q": q, "k": k, "v": v}
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise ArgumentTypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise ArgumentTypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {_dtype(x)}; convert it first"
            )
        if x.dim() != 4:
            raise ArgumentError(
                f"{name} must have the 4 axes (batch, heads, length, head_dim), got {x.dim()}: {tuple(x.shape)}"
            )
    if len({x.dtype for x in named.values()}) > 1 or len({x.device for x in named.values()}) > 1:
        seen = ", ".join(f"{name} {_dtype(x)} on {x.device}" for name, x in named.items())
        raise ArgumentTypeError(f"q, k and v must have one dtype and be on one device, got {seen}")
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ArgumentError(f"q, k and v must have the same batch size (axis 0), got {shapes}")
    if k.shape[1:3] != v.shape[1:3]:
        raise ArgumentError(f"k and v must have the same heads and length (axes 1 and 2), got {shapes}")
    if q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ArgumentError(f"q and k must have the same head_dim (axis 3), at least 1, got {shapes}")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ArgumentError(
            f"the heads of q ({q.shape[1]}) must be a positive multiple of those of k and v ({k.shape[1]}): {shapes}"
        )
    return Sizes(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def visible_only(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v with zeros at the tokens that `mask` (batch, kv_len) hides, whose gradients are zeros too.

    Hidden memory may hold anything. A weight of 0 doesn't make it harmless, since 0 * NaN is NaN.

    Raises ArgumentError for NaN or infinity in q or at a visible token: sums over all keys would spread one to every
    row, and a row of q to the gradients of all keys.
    """
    if mask is not None:
        hidden = ~mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    if not bool(torch.isfinite(q.detach()).all()):
        raise ArgumentError(
            "q has NaN or infinite entries, which would reach the gradients of all keys. Replace them: padding_mask"
            " hides keys and values, not rows of q"
        )
    for name, x in (("k", k), ("v", v)):
        if not bool(torch.isfinite(x.detach()).all()):
            raise ArgumentError(
                f"{name} has NaN or infinite entries at visible tokens; an approximation mixes all keys, so that one"
                " would reach every row. Replace them, or hide their tokens with padding_mask"
            )
    return k, v


def without_keys(sizes: Sizes, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """The output where there is no query or no key: zeros (batch, heads, q_len, v_dim) in the dtype of q, that depend on q
    and the others as exact attention's do, so that `backward` runs and gives zeros."""
    # Sums over nothing are 0 whatever the tensors hold; 0 * x would not be.
    nothing = sum((x[..., :0].sum().to(q) for x in others), q[..., :0].sum())
    return q.new_zeros((*q.shape[:3], sizes.v_dim)) + nothing


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Where products are in the dtype of their operands, also under `torch.autocast`: `compute_dtype` says which."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def check_finite(name: str, x: torch.Tensor) -> None:
    """Raises ArgumentError for NaN or infinity in projections."""
    if not bool(torch.isfinite(x.detach()).all()):
        raise ArgumentError(f"{name} has NaN or infinite entries; draw or fit the projections again")


def check_bool(name: str, value: Any) -> bool:
    """True or False. Raises ArgumentTypeError."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_dtype(name: str, value: Any) -> torch.dtype:
    """A floating dtype. Raises ArgumentTypeError."""
    if value not in DTYPES:
        raise ArgumentTypeError(f"{name} must be torch.float16, bfloat16, float32 or float64, got {value!r}")
    return value


def check_generator(value: Any) -> torch.Generator:
    """Where projections are drawn from. Raises ArgumentTypeError."""
    if not isinstance(value, torch.Generator):
        raise ArgumentTypeError(
            f"generator must be a torch.Generator, got {type(value).__name__}; projections never depend on data or on"
            " a global state. Make one: torch.Generator().manual_seed(0)"
        )
    return value


def check_scale(scale: Any, head_dim: int) -> float:
    """The scale as a finite float, 1/sqrt(head_dim) for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ArgumentTypeError(f"scale must be a real number or None, got {scale!r}")
    if not math.isfinite(float(scale)):
        raise ArgumentError(f"scale must be finite, got {scale!r}")
    return float(scale)


def check_padding(mask: Any, sizes: Sizes, device: torch.device) -> torch.Tensor | None:
    """A padding mask (batch, kv_len) of bools, True where there is a token."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        given = _dtype(mask) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ArgumentTypeError(
            f"padding_mask must be a bool tensor, True where there is a token, got {given}"
        )
    if tuple(mask.shape) != (sizes.batch, sizes.kv_len):
        raise ArgumentError(
            f"padding_mask must have the shape (batch, kv_len) = {(sizes.batch, sizes.kv_len)}, got"
            f" {tuple(mask.shape)}"
        )
    return mask.to(device)


def compute_dtype(given: torch.dtype | None, inputs: torch.dtype) -> torch.dtype:
    """The dtype of all that lies between inputs and output: float32 for inputs of 16 bits if None."""
    if given is None:
        return torch.float32 if inputs.itemsize == 2 else inputs
    return check_dtype("compute_dtype", given)


def check_count(name: str, value: Any, *, least: int = 1, most: int | None = None, why: str = "") -> int:
    """An int of at least `least` and at most `most`; `why` explains the upper limit."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ArgumentError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ArgumentError(f"{name} must be at most {most}{why}, got {value}")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
