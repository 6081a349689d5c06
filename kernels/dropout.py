"""Dropout of attention weights: which are kept depends on a seed and on their place alone, so nothing is stored.

The weight of query i and key j is kept where uniform(philox(seed, offset + index)) > p, with

    index = ((b * heads + h) * q_len + i) * kv_len + j

as `tl.rand(seed, offset + index)` draws. Philox is that of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
easy as 1, 2, 3" (SC 2011), with 10 rounds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from effattn.kernels.arguments import check_dropout, on_device


@triton.jit
def kept(seed, index, p):
    """Whether the weights with these 64-bit indices are kept; p is the probability of dropping."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    drawn, _, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    return tl.uint_to_uniform_float(drawn) > p


@triton.jit(do_not_specialize=["count", "p", "seed", "offset"])
def _mask_kernel(out, count, p, seed, offset, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + index, kept(seed, offset + index, p).to(tl.int8), mask=index < count)


def dropout_mask(
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    p: float,
    seed: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The weights that `flash_attention` keeps with `dropout_p`, `dropout_seed` and `dropout_offset`.

    A bool tensor (batch, heads, q_len, kv_len), True where the weight is kept. Raises ArgumentError for p outside
    [0, 1) or a negative seed or offset.
    """
    p, seed, offset = check_dropout(p, seed, offset)
    out = torch.ones((batch, heads, q_len, kv_len), dtype=torch.int8, device=device)
    if p > 0 and out.numel():
        block = 1024
        with on_device(out):
            _mask_kernel[(triton.cdiv(out.numel(), block),)](
                out,
                out.numel(),
                p,
                seed,
                offset,
                BLOCK=block,
                **({"enable_fp_fusion": True} if out.is_cuda else {}),
            )
    return out.view(torch.bool)
