"""Kernels with a small mistake in a gradient, in an option or in one place only: what a coarse comparison lets pass."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from effattn.zoo.matrices import Setting, Whole
from effattn.zoo.specimen import HALF, wrong
from effattn.zoo.subtle_kernels import ExpOfDegree3, Tf32, _many_rows
from effattn.zoo.tiled import LOG2E, Flash, State

if TYPE_CHECKING:
    from effattn.case import Case

#: dtypes in which a detour through bf16 loses something
WIDER = ("fp16", "fp32")


def _backward(case: Case) -> bool:
    return case.backward


def _grouped(case: Case) -> bool:
    return case.backward and case.heads > case.kv_heads


def _in_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


# Gradients.


@wrong("delta-in-input-dtype", dtypes=HALF, shows=_backward)
class DeltaRounded(Whole):
    """delta is stored in the inputs' dtype."""

    def difference(self, d_p: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return d_p - delta.to(dtype).float()


@wrong("delta-of-bf16-output", dtypes=WIDER, shows=_backward)
class DeltaOfBf16Output(Whole):
    """delta comes from the output rounded to bf16."""

    def output_for_delta(self, out: torch.Tensor, unrounded: torch.Tensor) -> torch.Tensor:
        return out.to(torch.bfloat16).float()


class _QuerySums(Whole):
    """dQ is rounded after each block of 64 keys, the next block added to that."""

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        raise NotImplementedError

    def sum_over_keys(self, d_s: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        kept = self.kept(k.dtype)
        total = torch.zeros((*d_s.shape[:3], k.shape[3]), dtype=kept, device=k.device)
        for j in range(0, k.shape[2], 64):
            total = (total.float() + self.dot(d_s[..., j : j + 64], k[:, :, j : j + 64])).to(kept)
        return total.float()


@wrong("query-sums-in-input-dtype", dtypes=HALF, shows=lambda case: case.backward and case.kv_len > 64)
class QuerySumsRounded(_QuerySums):
    """dQ is accumulated in the inputs' dtype, block by block of 64 keys."""

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        return dtype


@wrong("query-sums-in-bf16", dtypes=WIDER, shows=_backward)
class QuerySumsInBf16(_QuerySums):
    """dQ is accumulated in bf16, block by block of 64 keys."""

    def kept(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16


@wrong("group-summed-in-bf16", dtypes=WIDER, shows=_grouped)
class GroupInBf16(Whole):
    """dK and dV of a group are added up in bf16, head by head."""

    def to_group(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        heads = x.unflatten(1, (kv_heads, -1))
        total = _in_bf16(heads[:, :, 0])
        for h in range(1, heads.shape[2]):
            total = _in_bf16(total + heads[:, :, h])
        return total


@wrong("group-without-its-last-head", shows=_grouped)
class GroupWithoutLast(Whole):
    """dK and dV leave out the last query head of each group."""

    def to_group(self, x: torch.Tensor, kv_heads: int, dtype: torch.dtype) -> torch.Tensor:
        return x.unflatten(1, (kv_heads, -1))[:, :, :-1].sum(2)


@wrong("ds-in-bf16", dtypes=WIDER, shows=_backward)
class DsInBf16(Whole):
    """dS is rounded to bf16, whatever the inputs are."""

    def cast_ds(self, d_s: torch.Tensor, dtype: torch.dtype, setting: Setting) -> torch.Tensor:
        return _in_bf16(d_s)


@wrong("dq-times-1-001", dtypes=WIDER, shows=_backward)
class DqTimes(Whole):
    """dQ a thousandth too large."""

    def scaled(self, x: torch.Tensor, setting: Setting, of: str) -> torch.Tensor:
        return super().scaled(x, setting, of) * (1.001 if of == "q" else 1.0)


@wrong("backward-lse-in-bf16", shows=_backward)
class LseRounded(Whole):
    """P of the backward pass from a log-sum-exp that was stored in bf16."""

    def weights(self, s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return super().weights(s, _in_bf16(lse))


@wrong("backward-exp2-of-degree-3", dtypes=("fp32",), shows=_backward)
class BackwardExpOfDegree3(Whole):
    """P of the backward pass by the polynomial of degree 3 that is too short for fp32."""

    def weights(self, s: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        return ExpOfDegree3().exp((s - torch.where(lse == -math.inf, 0.0, lse)[..., None]) * LOG2E)


@wrong("backward-tf32-products", dtypes=("fp32",), shows=_backward)
class BackwardTf32(Whole):
    """Operands of dV, dQ and dK cut to tf32 in fp32 mode, those of the forward pass not."""

    def sum_over_queries(self, d_s: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return Tf32().dot(d_s.mT, q)

    def sum_over_keys(self, d_s: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return Tf32().dot(d_s, k)


@wrong(
    "backward-window-one-key-too-few",
    shows=lambda case: case.backward and case.window is not None and case.window[0] > 0,
)
class BackwardWindow(Whole):
    """The backward pass sees one key less on the left."""

    def in_window(self, ahead: torch.Tensor, setting: Setting) -> torch.Tensor:
        assert setting.window is not None
        left, right = setting.window
        return super().in_window(
            ahead, replace(setting, window=(left - 1 if setting.backward and left > 0 else left, right))
        )


@wrong(
    "dbias-of-one-head",
    shows=lambda case: (
        case.backward and case.bias != "none" and "h" not in case.bias.split(":")[0] and case.heads > 1
    ),
)
class BiasOfOneHead(Whole):
    """The gradient of a bias that all heads share is that of the first head."""

    def bias_gradient(self, d_s: torch.Tensor, bias: torch.Tensor, setting: Setting) -> torch.Tensor:
        return super().bias_gradient(d_s[:, :1], bias, setting)


# Options.


@wrong(
    "window-one-key-too-many-right",
    shows=lambda case: case.window is not None and case.window[1] >= 0 and case.causal == "none",
)
class WindowTooWideRight(Whole):
    """Sees one key more on the right."""

    def in_window(self, ahead: torch.Tensor, setting: Setting) -> torch.Tensor:
        assert setting.window is not None
        left, right = setting.window
        return super().in_window(ahead, replace(setting, window=(left, right + 1 if right >= 0 else right)))


@wrong("alibi-slopes-in-bf16", shows=lambda case: case.alibi == "drawn")
class SlopesInBf16(Whole):
    """ALiBi's slopes are rounded to bf16, which the usual ones survive."""

    def alibi(self, setting: Setting, m: int, n: int, device: torch.device) -> torch.Tensor:
        assert setting.slopes is not None
        return super().alibi(replace(setting, slopes=_in_bf16(setting.slopes)), m, n, device)


@wrong("sinks-in-bf16", shows=lambda case: case.sinks)
class SinksInBf16(Whole):
    """The sinks are rounded to bf16."""

    def forward(
        self, setting: Setting, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
        sinks: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        return super().forward(setting, q, k, v, bias, None if sinks is None else _in_bf16(sinks))


# Plain cases.


@wrong("lse-in-bf16", shows=lambda case: case.q_len > 0 and case.kv_len > 1)
class LseInBf16(Flash):
    """The log-sum-exp is stored in bf16."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = super().finish(state, dtype)
        return out, _in_bf16(lse)


@wrong(
    "lone-key-of-the-last-tile-dropped",
    shows=lambda case: case.q_len > 0 and case.kv_len in (65, 129, 193, 257),
)
class LoneKeyDropped(Flash):
    """A last tile of a single key is taken for none."""

    def tiles(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        for start, stop in super().tiles(begin, end):
            if stop - start > 1 or start == begin:
                yield start, stop


@wrong("last-head-off-by-a-rounding", dtypes=HALF, shows=_many_rows)
class LastHeadTimes(Flash):
    """The output of the last head, and of no other, times 1 + u of its dtype."""

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        state.acc[:, -1] *= 1.0 + torch.finfo(dtype).eps / 2.0
        return super().finish(state, dtype)
