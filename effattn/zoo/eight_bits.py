"""Attention with quantised operands, tile by tile in torch: Q, K and V as codes with scales, P as e4m3 after an offset.

Products of codes are exact in fp32, and so is what sums them, but for rounding to nearest. Each step is a method of
`EightBits`, so that a kernel of the zoo, right or wrong, is a subclass that changes one step. It forms its codes in fp32, as
kernels do, and shares no code with `effattn.tolerances`, which it is judged by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from effattn.zoo.tiled import LOG2E

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.tolerances.numerics import Numerics

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8

#: dtype of codes -> name of the format, largest code
CODES = {E4M3: ("e4m3", 448.0), E5M2: ("e5m2", 57344.0), INT8: ("int8", 127.0)}


@dataclass(frozen=True)
class Scaled:
    """Codes (batch, heads, rows, columns) and what they are multiplied by, fp32 in a shape that broadcasts to theirs."""

    codes: torch.Tensor
    scale: torch.Tensor


@dataclass(frozen=True)
class EightBits:
    """The kernel as it should be. Call it with q, k, v as a `Case` gives them; it returns (out, lse)."""

    #: of the codes of Q and K
    dtype: torch.dtype = E4M3
    #: what shares a scale, as in `effattn.tolerances.codes.SCALES`
    scales: str = "tensor"
    #: rows of a block
    rows: int = 64
    #: of the codes of V; None where V stays as it is
    v_dtype: torch.dtype | None = E4M3
    #: what shares a scale of V; None as for Q and K
    v_scales: str | None = None
    #: of P; None for the dtype of V
    p_dtype: torch.dtype | None = E4M3
    #: log2 of what P is multiplied by before it is rounded
    offset: float = 8.0
    #: keys a step
    block: int = 64
    #: take the last block of keys first
    reverse: bool = False
    #: codes by a product with the scale's reciprocal
    reciprocal: bool = False
    #: Q is multiplied by the softmax scale before it is quantised
    scaled_q: bool = False

    def numerics(self, case: Case) -> Numerics:
        """What it declares."""
        from effattn.tolerances.codes import Codes
        from effattn.tolerances.numerics import for_dtype

        def codes(dtype: torch.dtype, scales: str) -> Codes:
            rows = self.rows if scales == "block" else None
            return Codes(format=CODES[dtype][0], scale=scales, rows=rows)

        return for_dtype(case.dtype, "flash").replace(
            name=f"{type(self).__name__} {case.dtype}",
            q=codes(self.dtype, self.scales),
            k=codes(self.dtype, self.scales),
            v=None if self.v_dtype is None else codes(self.v_dtype, self.v_scales or self.scales),
            p=case.dtype if self.p_dtype is None else CODES[self.p_dtype][0],
            p_scale=round(2.0**self.offset, 6),
        )

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: str = "none",
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (b, h, m, d), k (b, h_kv, n, d), v (b, h_kv, n, dv), one dtype; causal "none", "bottom-right", "top-left".

        Returns out (b, h, m, dv) in that dtype and lse (b, h, m) in fp32.
        """
        group = q.shape[1] // k.shape[1]
        factor = (q.shape[-1] ** -0.5 if scale is None else scale) * LOG2E
        queries = q.float()
        if self.scaled_q:
            queries, factor = queries * factor, 1.0
        a = self.quantise(queries, self.dtype, self.scales, group)
        b = self.expand(self.quantise(k.float(), self.dtype, self.scales), group)
        c = self.expand(self.values(v), group)
        m, n = q.shape[2], k.shape[2]
        top = torch.full(q.shape[:3], -math.inf)
        total, acc = torch.zeros(q.shape[:3]), torch.zeros((*q.shape[:3], v.shape[3]))
        starts = range(0, n, self.block)
        for start in reversed(starts) if self.reverse else starts:
            at = slice(start, min(start + self.block, n))
            s = self.scores(a, self.tile(b, at), factor)
            j = torch.arange(at.start, at.stop)
            i = torch.arange(m)[:, None] + (n - m if causal == "bottom-right" else 0)
            if causal != "none":
                s = s.masked_fill(j > i, -math.inf)
            new = torch.maximum(top, s.amax(-1))
            safe = torch.where(new == -math.inf, 0.0, new)
            decay = torch.exp2(top - safe)
            p = torch.exp2(s - safe[..., None] + self.exponent())
            total = total * decay + p.sum(-1)
            acc = acc * decay[..., None] + self.product(self.cast(p, v.dtype), self.tile(c, at))
            top = new
        return self.finish(total, acc, top, v.dtype)

    # Steps, in the order in which they happen.

    def quantise(self, x: torch.Tensor, dtype: torch.dtype, scales: str, group: int = 1) -> Scaled:
        """x in fp32 as codes; `group` query heads share a KV head."""
        if scales == "none":
            scale = torch.ones(1, 1, 1, 1)
        else:
            scale = self.scale_of(self.largest(x, scales, group), CODES[dtype][1])
        return Scaled(self.encode(x, scale, dtype), scale)

    def largest(self, x: torch.Tensor, scales: str, group: int) -> torch.Tensor:
        """The largest magnitude of what shares a scale, (b or 1, h or 1, rows or 1, columns or 1)."""
        size = x.abs()
        if not x.numel():
            return torch.zeros((1, 1, 1, 1))
        if scales == "tensor":
            return size.max().reshape(1, 1, 1, 1)
        if scales == "channel":
            return size.amax(2, keepdim=True)
        if scales in ("head", "kv-head"):
            of_head = size.amax((2, 3), keepdim=True)
            if scales == "head":
                return of_head
            groups = of_head.split(group, 1)
            return torch.cat([g.amax(1, keepdim=True).expand(-1, group, 1, 1) for g in groups], 1)
        blocks = [
            b.amax((2, 3), keepdim=True).expand(-1, -1, b.shape[2], 1) for b in size.split(self.rows, 2)
        ]
        return torch.cat(blocks, 2)

    def scale_of(self, largest: torch.Tensor, top: float) -> torch.Tensor:
        return torch.where(largest > 0.0, largest / top, 1.0)

    def encode(self, x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        y = x * (1.0 / scale) if self.reciprocal else x / scale
        if dtype != INT8:
            return y.clamp(-CODES[dtype][1], CODES[dtype][1]).to(dtype)
        # Halves away from zero, as a kernel does that adds a half and truncates.
        return (y + torch.where(y < 0.0, -0.5, 0.5)).trunc().to(dtype)

    def values(self, v: torch.Tensor) -> Scaled:
        if self.v_dtype is None:
            return Scaled(v, torch.ones(1, 1, 1, 1))
        return self.quantise(v.float(), self.v_dtype, self.v_scales or self.scales)

    def expand(self, x: Scaled, group: int) -> Scaled:
        """Each KV head for the block of query heads that uses it."""

        def each(y: torch.Tensor) -> torch.Tensor:
            # Not `repeat_interleave`, which not every version of torch has for codes of 8 bits.
            return y[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)

        shared = x.scale.shape[1] == 1 and x.codes.shape[1] != 1
        return Scaled(each(x.codes), x.scale if shared else each(x.scale))

    def tile(self, x: Scaled, at: slice) -> Scaled:
        """Some rows."""
        return Scaled(x.codes[:, :, at], x.scale if x.scale.shape[2] == 1 else x.scale[:, :, at])

    def scores(self, q: Scaled, k: Scaled, factor: float) -> torch.Tensor:
        """In log2 units."""
        return q.codes.float() @ k.codes.float().mT * (q.scale * factor) * k.scale.mT

    def exponent(self) -> float:
        """What is added to the exponent of P before it is rounded."""
        return self.offset

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.p_dtype == INT8:
            return p.round().to(INT8)
        return p.to(self.p_dtype or dtype)

    def product(self, p: torch.Tensor, v: Scaled) -> torch.Tensor:
        """A scale of rows is that of a block, so it can be taken out of the sum over its rows."""
        if v.scale.shape[2] == 1:
            return p.float() @ v.codes.float() * v.scale
        total = torch.zeros((*p.shape[:3], v.codes.shape[-1]))
        # Rows with equal scales together; a tile may have rows of two blocks.
        start = 0
        while start < p.shape[3]:
            same = (v.scale == v.scale[:, :, start : start + 1]).flatten(0, 1).all(0).flatten()
            stop = start + int(same[start:].int().cumprod(0).sum())
            part = p[..., start:stop].float() @ v.codes[:, :, start:stop].float()
            total = total + part * v.scale[:, :, start : start + 1]
            start = stop
        return total

    def finish(
        self, total: torch.Tensor, acc: torch.Tensor, top: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        empty = total == 0.0
        out = acc / torch.where(empty, 1.0, total)[..., None]
        lse = (top + torch.log2(total) - self.offset) * math.log(2.0)
        return out.to(dtype), torch.where(empty, -math.inf, lse)
