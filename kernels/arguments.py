"""What the kernels' host functions accept. Tensors come from anywhere, so each check names what it saw."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import Any

import torch

from effattn.errors import ArgumentError, ArgumentTypeError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENTS = ("bottom-right", "top-left")
#: what `tl.dot` takes for float32 operands
INPUT_PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
MAX_HEAD_DIM = 256
#: above this, 32-bit row and key numbers could overflow where a causal mask adds two of them
MAX_LENGTH = 2**30
#: CUDA's limit on the first axis of a grid
MAX_PROGRAMS = 2**31 - 1
_MAX_FLOAT32 = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention problem after checking: plain numbers, nothing optional left."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_dim: int
    causal_shift: int  #: query i sees the keys j <= i + causal_shift; kv_len if it sees all
    scale: float
    input_precision: str

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads


def check_forward(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Any,
    scale: Any,
    causal_alignment: Any,
    input_precision: Any,
    block_m: Any,
    block_n: Any,
) -> Problem:
    """The arguments of a forward pass as a `Problem`.

    Raises ArgumentTypeError for a wrong type, dtype or device, ArgumentError for a wrong shape or value.
    """
    check_tensors(q=q, k=k, v=v)
    batch, heads, q_len, head_dim = q.shape
    k_batch, kv_heads, kv_len, k_dim = k.shape
    v_dim = v.shape[3]
    shapes = f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
    if not batch == k_batch == v.shape[0]:
        raise ArgumentError(f"q, k and v must have the same batch size (axis 0), got {shapes}")
    if v.shape[1] != kv_heads or v.shape[2] != kv_len:
        raise ArgumentError(f"k and v must have the same heads and length (axes 1 and 2), got {shapes}")
    if k_dim != head_dim:
        raise ArgumentError(
            f"q and k must have the same head_dim (axis 3), got {head_dim} and {k_dim}: {shapes}"
        )
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(
            f"the heads of q ({heads}) must be a multiple of the heads of k and v ({kv_heads}), both"
            f" positive: {shapes}"
        )
    for name, dim in (("head_dim", head_dim), ("v_dim", v_dim)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ArgumentError(f"{name} must be 1 to {MAX_HEAD_DIM}, got {dim}: {shapes}")
    for name, length in (("q_len", q_len), ("kv_len", kv_len)):
        if length > MAX_LENGTH:
            raise ArgumentError(f"{name} must be at most {MAX_LENGTH}, got {length}: {shapes}")

    if not isinstance(causal, bool):
        raise ArgumentTypeError(
            f"causal must be True or False, got {causal!r} of type {type(causal).__name__}"
        )
    check_choice("causal_alignment", causal_alignment, ALIGNMENTS)
    check_choice("input_precision", input_precision, INPUT_PRECISIONS)
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        check_block(name, block)
    # Blocks of 16 are the smallest, so this holds whatever the block size.
    if batch * heads * -(-q_len // 16) > MAX_PROGRAMS:
        raise ArgumentError(
            f"batch x heads x q_len is too large for one launch ({MAX_PROGRAMS} blocks): {shapes}"
        )

    return Problem(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        v_dim=v_dim,
        causal_shift=_causal_shift(causal, causal_alignment, q_len, kv_len),
        scale=check_scale(scale, head_dim),
        # The products of 16-bit floats are exact in float32: one spelling, one compiled kernel.
        input_precision=input_precision if q.dtype == torch.float32 else "ieee",
    )


def check_tensors(**tensors: Any) -> None:
    """Dense tensors of rank 4, of one supported dtype, on one device."""
    for name, x in tensors.items():
        if not isinstance(x, torch.Tensor):
            raise ArgumentTypeError(
                f"{name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}"
            )
        if x.layout != torch.strided or x.is_quantized:
            raise ArgumentTypeError(f"{name} must be a dense tensor, got the layout {x.layout}")
        if x.dtype not in DTYPES:
            raise ArgumentTypeError(
                f"{name} must be float16, bfloat16 or float32, got {_dtype(x)}; convert it first"
            )
        if x.dim() != 4:
            raise ArgumentError(
                f"{name} must have the 4 axes (batch, heads, length, head_dim), got {x.dim()}: {_shape(x)}"
            )
    if len({x.dtype for x in tensors.values()}) > 1:
        seen = ", ".join(f"{name} {_dtype(x)}" for name, x in tensors.items())
        raise ArgumentTypeError(f"all tensors must have one dtype, got {seen}")
    if len({x.device for x in tensors.values()}) > 1:
        seen = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        raise ArgumentTypeError(f"all tensors must be on one device, got {seen}")
    device = next(iter(tensors.values())).device
    if device.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"tensors must be on the CPU or on a CUDA device, got {device}")


def check_scale(scale: Any, head_dim: int) -> float:
    """The scale as a float, 1/sqrt(head_dim) for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ArgumentTypeError(
            f"scale must be a real number or None, got {scale!r} of type {type(scale).__name__}"
        )
    scale = float(scale)
    # The kernel multiplies by float32(scale * log2(e)).
    if not abs(scale) * math.log2(math.e) <= _MAX_FLOAT32:
        raise ArgumentError(f"scale must be finite and fit float32, got {scale!r}")
    return scale


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_block(name: str, block: Any) -> None:
    if block is None:
        return
    if isinstance(block, bool) or not isinstance(block, int):
        raise ArgumentTypeError(
            f"{name} must be an int or None, got {block!r} of type {type(block).__name__}"
        )
    if block < 16 or block & (block - 1):
        raise ArgumentError(f"{name} must be a power of two of at least 16, got {block}")


def _causal_shift(causal: bool, alignment: str, q_len: int, kv_len: int) -> int:
    if not causal:
        return kv_len
    return kv_len - q_len if alignment == "bottom-right" else 0


def _shape(x: torch.Tensor) -> str:
    return str(tuple(x.shape))


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
