"""FlashAttention's forward pass tile by tile in torch, with every rounding of the flash numerics.

Products of fp16 and bf16 numbers are exact in fp32; scores, weights, l and the accumulator are fp32; P is rounded to
the inputs' dtype for the second product; the output is rounded once. Each step is a method of `Flash`, so that a
kernel of the zoo, right or wrong, is a subclass that changes one step.

This shares no code with `effattn.exact` and `effattn.tolerances`, which it is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

LOG2E = 1.4426950408889634


@dataclass
class State:
    """The running softmax of all rows: maximum (log2 units), sum, accumulator, each (b, h, q_len, ...) in fp32."""

    top: torch.Tensor
    total: torch.Tensor
    acc: torch.Tensor
    blocks: int = 0


@dataclass(frozen=True)
class Flash:
    """The kernel as it should be. Call it with q, k, v as a `Case` gives them; it returns (out, lse)."""

    #: keys a step
    block: int = 64
    #: take the last block of keys first
    reverse: bool = False
    #: independent parts of the keys, merged by their log-sum-exp
    splits: int = 1
    #: find the maximum of all keys first
    two_pass: bool = False

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        causal: str = "none",
        scale: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (b, h, m, d), k (b, h_kv, n, d), v (b, h_kv, n, dv), one dtype; causal "none", "bottom-right",
        "top-left". Returns out (b, h, m, dv) in that dtype and lse (b, h, m) in fp32."""
        q, k, v = self.read(q, k, v)
        factor = self.scale(q, scale)
        k, v = self.expand(k, q.shape[1]), self.expand(v, q.shape[1])
        parts = [self.part(q, k, v, span, causal, factor) for span in self.spans(k.shape[2])]
        state = parts[0] if len(parts) == 1 else self.merge(parts)
        out, lse = self.finish(state, v.dtype)
        return self.write(out, q), lse

    # Steps, in the order in which they happen.

    def read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return q, k, v

    def scale(self, q: torch.Tensor, scale: float | None) -> float:
        """The factor on the scores, log2(e) folded in."""
        return (q.shape[-1] ** -0.5 if scale is None else scale) * LOG2E

    def expand(self, t: torch.Tensor, heads: int) -> torch.Tensor:
        """Each KV head for the block of query heads that uses it."""
        return t.repeat_interleave(heads // t.shape[1], dim=1)

    def spans(self, n: int) -> list[tuple[int, int]]:
        size = max(1, -(-n // self.splits))
        return [(i * size, min(n, (i + 1) * size)) for i in range(self.splits)]

    def tiles(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        starts = range(begin, end, self.block)
        for start in reversed(starts) if self.reverse else starts:
            yield start, min(start + self.block, end)

    def visible(self, m: int, n: int, columns: torch.Tensor, causal: str) -> torch.Tensor:
        """(m, columns) of bool: which keys each row sees."""
        rows = torch.arange(m, device=columns.device)[:, None]
        if causal == "none":
            return (columns[None, :] < n) & (rows >= 0)
        return columns[None, :] <= rows + (n - m if causal == "bottom-right" else 0)

    def dot(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a @ b, operands exact in fp32, accumulated in fp32."""
        return a.float() @ b.float()

    def scores(self, q: torch.Tensor, k: torch.Tensor, factor: float) -> torch.Tensor:
        return self.dot(q, k.mT) * factor

    def masked(self, s: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return s.masked_fill(~visible, -math.inf)

    def exp(self, x: torch.Tensor) -> torch.Tensor:
        return torch.exp2(x)

    def weights(self, s: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        return self.exp(s - top[..., None])

    def cast(self, p: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return p.to(dtype)

    def summed(self, p: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
        return p.sum(-1)

    def growth(self, s: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        return torch.maximum(top, s.amax(-1))

    def decay(self, old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return self.exp(old - new)

    def step(self, state: State, s: torch.Tensor, v: torch.Tensor, dtype: torch.dtype) -> None:
        top = self.growth(s, state.top)
        safe = torch.where(top == -math.inf, 0.0, top)  # -inf - -inf is NaN
        decay = self.decay(state.top, safe)
        p = self.weights(s, safe)
        cast = self.cast(p, dtype)
        state.total = self.carry_sum(state.total, decay) + self.summed(p, cast)
        state.acc = self.keep(self.carry(state.acc, decay, state) + self.dot(cast, v))
        state.top = top
        state.blocks += 1

    def carry(self, acc: torch.Tensor, decay: torch.Tensor, state: State) -> torch.Tensor:
        return acc * decay[..., None]

    def carry_sum(self, total: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return total * decay

    def keep(self, acc: torch.Tensor) -> torch.Tensor:
        """What storing the accumulator between steps does to it."""
        return acc

    def start(self, q: torch.Tensor, v: torch.Tensor) -> State:
        shape = q.shape[:3]
        options = {"dtype": torch.float32, "device": q.device}
        return State(
            torch.full(shape, -math.inf, **options),
            torch.zeros(shape, **options),
            torch.zeros((*shape, v.shape[-1]), **options),
        )

    def part(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        span: tuple[int, int],
        causal: str,
        factor: float,
    ) -> State:
        state = self.start(q, v)
        m, n = q.shape[2], k.shape[2]
        tiles = list(self.tiles(*span))
        if self.two_pass:
            for a, b in tiles:
                state.top = self.growth(self.tile(q, k, a, b, m, n, causal, factor), state.top)
        for a, b in tiles:
            s = self.tile(q, k, a, b, m, n, causal, factor)
            self.step(state, s, v[:, :, a:b], v.dtype)
        return state

    def tile(
        self, q: torch.Tensor, k: torch.Tensor, a: int, b: int, m: int, n: int, causal: str, factor: float
    ) -> torch.Tensor:
        s = self.scores(q, k[:, :, a:b], factor)
        return self.masked(s, self.visible(m, n, torch.arange(a, b, device=q.device), causal))

    def merge(self, parts: list[State]) -> State:
        """Parts that saw nothing have maximum -inf and weigh nothing."""
        top = torch.stack([p.top for p in parts]).amax(0)
        safe = torch.where(top == -math.inf, 0.0, top)
        weights = [self.exp(p.top - safe) for p in parts]
        total, acc = torch.zeros_like(parts[0].total), torch.zeros_like(parts[0].acc)
        for part, weight in zip(parts, weights, strict=True):
            total = total + part.total * weight
            acc = acc + part.acc * weight[..., None]
        return State(top, total, acc)

    def finish(self, state: State, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        empty = state.total == 0
        out = state.acc / torch.where(empty, 1.0, state.total)[..., None]
        lse = (state.top + torch.log2(state.total)) * math.log(2.0)
        return out.to(dtype), torch.where(empty, -math.inf, lse)

    def write(self, out: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return out


Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]
