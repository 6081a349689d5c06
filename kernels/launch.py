"""What all launches have in common: the arguments of the mask and of the logits, strides, and widths of addresses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton

from effattn.kernels.arguments import Extras, Problem, on_device
from effattn.kernels.tiles import padded

_LOG2_E = math.log2(math.e)

#: integers for which no kernel is compiled anew: lengths and counts, on any device
LENGTHS = (
    "q_len", "kv_len", "bottom_right", "left", "right", "heads", "group", "dropout_p", "dropout_seed", "dropout_offset",
    "repeat_b", "repeat_h", "page_size", "parts", "split_size", "rows",
)  # fmt: skip
#: strides on which no address inside a tile depends in a way that matters to a compiler
_OUTER = (
    *(f"{x}_stride_{axis}" for x in ("bias", "mask") for axis in "bhm"),
    "alibi_stride_b",
    "alibi_stride_h",
    "table_stride",
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A launch that is ready to run, or to be compiled for a GPU that is not here."""

    kernel: Any
    programs: int  #: one axis, since only the first of a CUDA grid may pass 65,535
    arguments: dict[str, Any]
    options: dict[str, Any]  #: for Triton

    def run(self, where: torch.Tensor) -> None:
        """On the device of a tensor."""
        if self.programs:
            with on_device(where):
                self.kernel[(self.programs,)](**self.arguments, **self.options)


def jit_twice(function: Callable[..., Any], tensors: tuple[str, ...]) -> dict[str, Any]:
    """One kernel, specialised twice: {"cuda": ..., "cpu": ...}.

    Triton compiles anew for every combination of integers that are 1 or, on a GPU, divisible by 16. There that decides
    how wide a load of a row may be, so strides and head sizes keep it. On a CPU it decides nothing, except that a last
    stride of 1 makes a load one of consecutive elements: compiling once for all shapes is worth more there.

    tensors: the names of those whose strides `{name}_stride_{axis}` the kernel takes.
    """
    names = set(function.__code__.co_varnames[: function.__code__.co_argcount])
    gpu = [name for name in LENGTHS if name in names]
    outer = [f"{x}_stride_{axis}" for x in tensors for axis in "bhmn"]
    cpu = [name for name in (*_OUTER, *outer, "head_dim", "v_dim") if name in names]
    return {
        "cuda": triton.jit(function, do_not_specialize=gpu),
        "cpu": triton.jit(function, do_not_specialize=[*gpu, *cpu]),
    }


def shared_arguments(problem: Problem, extras: Extras) -> dict[str, Any]:
    """What every kernel that computes scores is given besides its own tensors, by name."""
    return {
        "bias": extras.bias,
        "mask": extras.mask,
        "alibi_slopes": extras.alibi_slopes,
        "q_lengths": extras.q_lengths,
        "kv_lengths": extras.kv_lengths,
        **stride_arguments("bias", extras.bias, "bhmn"),
        **stride_arguments("mask", extras.mask, "bhmn"),
        **stride_arguments("alibi", extras.alibi_slopes, "bh"),
        "to_cap": problem.scale / problem.softcap if problem.softcap else 0.0,
        "cap_log2": problem.softcap * _LOG2_E,
        "q_len": problem.q_len,
        "kv_len": problem.kv_len,
        "bottom_right": int(problem.bottom_right),
        "left": problem.left,
        "right": problem.right,
        "heads": problem.heads,
        "group": problem.group,
        "head_dim": problem.head_dim,
        "v_dim": problem.v_dim,
        "dropout_p": problem.dropout_p,
        "dropout_seed": problem.dropout_seed,
        "dropout_offset": problem.dropout_offset,
    }


def shared_constants(problem: Problem, *, block_m: int, block_n: int, wide: bool) -> dict[str, Any]:
    """The compile-time arguments of those kernels. Few on purpose: each combination is one more compilation."""
    block_d, block_dv = padded(problem.head_dim), padded(problem.v_dim)
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "PAD_D": block_d != problem.head_dim,
        "PAD_DV": block_dv != problem.v_dim,
        "WIDE": wide,
        "PACKED": problem.packed,
        "HAS_LEFT": problem.has_left,
        "HAS_CAP": problem.softcap > 0,
        "HAS_DROPOUT": problem.dropout_p > 0,
        "INPUT_PRECISION": problem.input_precision,
    }


def is_rich(problem: Problem, extras: Extras) -> bool:
    """Whether scores go through more than a scale and the positions' mask."""
    options = (extras.bias, extras.mask, extras.alibi_slopes)
    return problem.softcap > 0 or problem.dropout_p > 0 or any(x is not None for x in options)


def stride_arguments(name: str, x: torch.Tensor | None, axes: str) -> dict[str, int]:
    """`{name}_stride_{axis}` for each axis of a tensor, 0 where there is none."""
    values = [0] * len(axes) if x is None else strides(x)
    return {f"{name}_stride_{axis}": value for axis, value in zip(axes, values, strict=True)}


def strides(x: torch.Tensor) -> list[int]:
    """Strides; those of axes of length 1, on which no address depends, as they compile to the best code."""
    last = x.dim() - 1
    return [
        stride if size > 1 else int(axis == last)
        for axis, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True))
    ]


def is_wide(x: torch.Tensor | None, rows: int, columns: int | None = None) -> bool:
    """Whether an offset inside one tile of `rows` rows, padding included, can pass 31 bits."""
    if x is None:
        return False
    *_, row_stride, column_stride = strides(x)
    columns = padded(x.shape[-1]) if columns is None else columns
    return (rows - 1) * row_stride + (columns - 1) * column_stride >= 2**31
