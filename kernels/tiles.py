"""How launches are cut up: block sizes and what else Triton is told. They change rounding and speed, never the meaning.

The lengths, the batch and the number of heads are left out on purpose: a row's sums are then cut in the same places
whatever shares the launch with it, and come out with the same bits.

CPU: a step costs a fixed overhead, so tiles are large; 64 keys keep scores and accumulator in the L1 and L2 caches for
every head_dim up to 256.

GPU: the tiles and two or three stages of what a loop reads have to fit the 99 to 227 KB of shared memory that one block
may take, and the fp32 accumulators and scores have to fit 255 registers a thread; both shrink as the head dimension
grows. fp32 in IEEE precision has no matrix unit to go to: its products run on scalar units out of registers, so its
tiles are small and shared by 8 warps. `python -m effattn.kernels.budget` compiles each entry for compute capability 80, 90
and 100 and says what it takes and which spill.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

#: Left alone, ptxas stops at 128 or 80 registers a thread in some kernels, so that more blocks fit, and spills.
_ALL_REGISTERS = {"maxnreg": 255}


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a launch is cut up."""

    block_m: int  #: queries a program owns, or a step of its loop takes
    block_n: int  #: keys likewise
    #: what else a launch says to Triton
    options: dict[str, Any] = field(default_factory=dict)


def tiles(
    head_dim: int, v_dim: int, dtype: torch.dtype, device_type: str = "cuda", *, rich: bool = False
) -> Tiles:
    """The forward kernel's blocks for a head dimension, a dtype and a kind of device.

    rich: a cap, a bias, ALiBi, a mask or dropout, whose tiles of scores need registers too.
    """
    if device_type == "cpu":
        return Tiles(block_m=64, block_n=64)
    width = max(padded(head_dim), padded(v_dim))
    if dtype == torch.float32:
        return _gpu_tiles(32 if width <= 128 else 16, 16, num_warps=8, num_stages=1)
    if width > 128:
        return _gpu_tiles(64, 16, num_warps=8, num_stages=2)
    if rich:
        return _gpu_tiles(64, 32 if width <= 64 else 16, num_warps=8, num_stages=2, **_ALL_REGISTERS)
    more = _ALL_REGISTERS if width <= 32 else {}
    return _gpu_tiles(128, 64 if width <= 64 else 32, num_warps=8, num_stages=3, **more)


def backward_tiles(
    head_dim: int, v_dim: int, dtype: torch.dtype, device_type: str = "cuda", *, rich: bool = False
) -> tuple[Tiles, Tiles]:
    """The blocks of the backward's (keys kernel, queries kernel)."""
    if device_type == "cpu":
        both = Tiles(block_m=64, block_n=64)
        return both, both
    width = max(padded(head_dim), padded(v_dim))
    if dtype == torch.float32:
        block = 32 if width <= 64 and not rich else 16
        by_keys = _gpu_tiles(block, 16, num_warps=8, num_stages=1, **_ALL_REGISTERS)
        return by_keys, _gpu_tiles(block, block, num_warps=8, num_stages=1)
    # What these take is for `budget` to say; on compute capability 80 registers are shortest.
    if width > 128:
        return _gpu_tiles(16, 16, num_warps=8, num_stages=1), _gpu_tiles(32, 16, num_warps=8, num_stages=1)
    # The keys kernel holds two accumulators; every larger block tried, which wgmma would need, spilled registers on
    # compute capability 90, and 32 queries a step on 80 where strides are unknown.
    by_keys = _gpu_tiles(32 if width == 64 else 16, 32, num_warps=8, num_stages=1, **_ALL_REGISTERS)
    if rich and width <= 64:
        return by_keys, _gpu_tiles(32, 32, num_warps=4, num_stages=1, **_ALL_REGISTERS)
    if rich:
        return by_keys, _gpu_tiles(32, 32, num_warps=8, num_stages=1)
    block_m, block_n = 128 if width <= 64 else 64, 64 if width <= 32 else 32
    return by_keys, _gpu_tiles(block_m, block_n, num_warps=8, num_stages=2)


def bias_tiles(head_dim: int, v_dim: int, dtype: torch.dtype, device_type: str = "cuda") -> Tiles:
    """The blocks of the kernel of the bias' gradient."""
    if device_type == "cpu":
        return Tiles(block_m=64, block_n=64)
    if dtype == torch.float32:
        return _gpu_tiles(16, 16, num_warps=4, num_stages=1)
    if max(padded(head_dim), padded(v_dim)) > 128:
        return _gpu_tiles(16, 32, num_warps=4, num_stages=1)
    return _gpu_tiles(32, 32, num_warps=8, num_stages=1)


def decode_tiles(
    rows: int, head_dim: int, v_dim: int, dtype: torch.dtype, device_type: str = "cuda"
) -> Tiles:
    """The decode kernel's blocks; rows: queries of all heads that share their keys."""
    if device_type == "cpu":
        return Tiles(block_m=min(64, padded(rows)), block_n=64)
    width = max(padded(head_dim), padded(v_dim))
    if dtype == torch.float32:
        return _gpu_tiles(16, 16, num_warps=8, num_stages=1)
    most_rows = 32 if width <= 128 else 16
    num_warps = 8 if width > 32 else 4
    more = _ALL_REGISTERS if width == 128 else {}
    return _gpu_tiles(min(most_rows, padded(rows)), 32, num_warps=num_warps, num_stages=2, **more)


def padded(dim: int) -> int:
    """The next power of two, at least 16: what `tl.arange` and `tl.dot` take."""
    return max(16, 1 << (dim - 1).bit_length())


def _gpu_tiles(block_m: int, block_n: int, *, num_warps: int, num_stages: int, **more: int) -> Tiles:
    # Fused multiply-adds make the scaled score minus its maximum one instruction, and round once less. Triton
    # 3.9 warns where this is left to its default.
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True} | more
    return Tiles(block_m=block_m, block_n=block_n, options=options)
