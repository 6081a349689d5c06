"""What the options of a case add to q, k and v: their tensors, drawn from the case's seed.

All are drawn in float64 and rounded once, like q, k and v, so they are the same on every machine. Nothing here imports
torch or numpy before a tensor is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from effattn.case import Case
    from effattn.draw import Source
    from effattn.layout import Layout

#: the axes of a score, in the order in which `bias` and `mask` name those along which they vary
AXES = "bhqk"

#: slopes of ALiBi: none; the geometric rule, one for each head; one for each batch entry and head, drawn from (0, 0.5)
ALIBI = ("none", "geometric", "drawn")

#: padding: none; each batch entry has its number of keys; its numbers of queries and of keys
LENGTHS = ("none", "kv", "both")


@dataclass(frozen=True, kw_only=True)
class Extras:
    """The tensors besides q, k and v; None where the case has no such option."""

    #: (heads,) or (batch, heads) fp32: the score of query i and key j gets - slope |i + shift - j|
    alibi_slopes: torch.Tensor | None = None
    #: four axes that broadcast to (batch, heads, q_len, kv_len), in the dtype of q or fp32: added to the scores
    bias: torch.Tensor | None = None
    #: bool, likewise: True where the key may be seen
    mask: torch.Tensor | None = None
    #: (heads,) fp32: the logit of one more key without a value
    sinks: torch.Tensor | None = None
    #: (batch,) int32: queries and keys from there on are padding
    q_lengths: torch.Tensor | None = None
    kv_lengths: torch.Tensor | None = None
    #: (batch, heads, q_len, v_dim) in the dtype of q: the upstream gradient of the output
    d_out: torch.Tensor | None = None
    #: (batch, heads, q_len) fp32: that of the log-sum-exp, for methods whose log-sum-exp can be differentiated
    d_lse: torch.Tensor | None = None

    def present(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        return {f.name: x for f in fields(self) if (x := getattr(self, f.name)) is not None}


def checked_window(window: Any) -> tuple[int, int] | None:
    """(left, right), -1 for no limit; one number w stands for (w, w). None where nothing is limited."""
    if window is None:
        return None
    pair = (window, window) if isinstance(window, int) and not isinstance(window, bool) else window
    if (
        not isinstance(pair, (tuple, list))
        or len(pair) != 2
        or any(isinstance(side, bool) or not isinstance(side, int) or not -1 <= side < 2**31 for side in pair)
    ):
        raise RequestError(
            f"window {window!r}: expected two numbers of keys (left, right), -1 for no limit on that side, or one"
            " number for both."
        )
    left, right = pair
    return None if left == right == -1 else (left, right)


def checked_number(field: str, value: Any, low: float, high: float, what: str) -> float:
    """A float with low <= value < high."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise RequestError(f"{field} {value!r}: expected {what}.")
    return float(value)


def checked_axes(field: str, value: Any, *, dtypes: tuple[str, ...] = ()) -> str:
    """ "none", or the axes along which a tensor of scores varies: `bhqk`, `qk`, `bk`; perhaps with `:fp32`."""
    axes, colon, dtype = value.partition(":") if isinstance(value, str) else ("", "", "")
    ordered = "".join(axis for axis in AXES if axis in axes)
    if value == "none" or (axes and axes == ordered and (not colon or dtype in dtypes)):
        return value
    ending = f", perhaps with :{' or :'.join(dtypes)}" if dtypes else ""
    raise RequestError(
        f"{field} {value!r}: expected 'none', or some of the letters b, h, q, k in this order, the axes along which it"
        f" varies{ending}."
    )


def geometric_slopes(heads: int) -> list[float]:
    """The slopes of ALiBi (O. Press et al., arXiv 2108.12409, section 3): 2^(-8/n), 2^(-16/n), ... for n heads.

    Where n is no power of two: those of the power below, then every other one of the power above, as in its code.
    """

    def of_power(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    power = 1 << (heads.bit_length() - 1)
    return of_power(power) + of_power(2 * power)[0::2][: heads - power]


class _Drawing:
    """The extras of one case, drawn."""

    def __init__(self, case: Case, device: torch.device) -> None:
        from effattn import layout

        self.case, self.device = case, device
        self.layout: Layout = layout.parse(case.layout)
        self.sizes = {"b": case.batch, "h": case.heads, "q": case.q_len, "k": case.kv_len}

    def source(self, tensor: str) -> Source:
        from effattn.draw import Source

        return Source("option", self.case.seed, tensor)

    def shape(self, axes: str) -> tuple[int, ...]:
        return tuple(self.sizes[axis] if axis in axes else 1 for axis in AXES)

    def placed(self, x: NDArray[np.float64], dtype: str) -> torch.Tensor:
        """With four axes, in the layout of the case."""
        from effattn import layout
        from effattn.rounding import round_bits

        return layout.build(round_bits(x, dtype), self.layout, dtype=dtype, expand=False, device=self.device)

    def float32(self, x: Any) -> torch.Tensor:
        import torch

        return torch.tensor(x, dtype=torch.float32).to(self.device)

    def slopes(self) -> torch.Tensor | None:
        case = self.case
        if case.alibi == "none":
            return None
        if case.alibi == "geometric":
            return self.float32(geometric_slopes(case.heads))
        return self.float32(self.source("slopes").uniform((case.batch, case.heads), 0.0, 0.5))

    def bias(self) -> torch.Tensor | None:
        if self.case.bias == "none":
            return None
        axes, _, dtype = self.case.bias.partition(":")
        return self.placed(self.source("bias").normal(self.shape(axes)), dtype or self.case.dtype)

    def mask(self) -> torch.Tensor | None:
        """A fifth of all pairs hidden; besides, one row in eight sees nothing, and one stretch of keys is unseen."""
        import numpy as np
        import torch

        axes = self.case.mask
        if axes == "none":
            return None
        shape = self.shape(axes)
        seen = self.source("mask").uniform(shape) < 0.8
        if "q" in axes:
            seen &= self.source("mask rows").uniform((*shape[:3], 1)) >= 0.125
        if "k" in axes:
            # Longer than a tile of any kernel where there are keys enough, so that whole tiles are hidden.
            length = self.case.kv_len * 2 // 5
            start = np.floor(
                self.source("mask keys").uniform((*shape[:2], 1, 1)) * (self.case.kv_len - length + 1)
            )
            at = np.arange(self.case.kv_len)
            unseen = (at >= start) & (at < start + length)
            if "q" in axes:
                unseen = unseen & (self.source("mask stretch").uniform((*shape[:3], 1)) < 0.5)
            seen &= ~unseen
        return torch.from_numpy(np.ascontiguousarray(seen)).to(self.device)

    def sinks(self) -> torch.Tensor | None:
        return (
            self.float32(2.0 * self.source("sinks").normal((self.case.heads,))) if self.case.sinks else None
        )

    def lengths(self, which: str) -> torch.Tensor | None:
        """From 0 to all, one entry with all; with more than two entries, one has none."""
        import numpy as np
        import torch

        case = self.case
        if case.lengths == "none" or (which == "q" and case.lengths == "kv"):
            return None
        most = self.sizes[which]
        drawn = np.floor(self.source(f"{which} lengths").uniform((case.batch,)) * (most + 1))
        if case.batch == 1:
            drawn = np.maximum(drawn, (most + 1) // 2)
        else:
            full = case.seed % case.batch
            drawn[full] = most
            if case.batch > 2:
                drawn[(full + 1) % case.batch] = 0
        return torch.from_numpy(drawn.astype(np.int32)).to(self.device)

    def d_out(self) -> torch.Tensor | None:
        case = self.case
        if not case.backward:
            return None
        shape = (case.batch, case.heads, case.q_len, case.v_dim)
        return self.placed(self.source("d_out").normal(shape), case.dtype)

    def d_lse(self) -> torch.Tensor | None:
        case = self.case
        if not case.backward:
            return None
        return self.float32(self.source("d_lse").normal((case.batch, case.heads, case.q_len)))


def draw(case: Case, device: torch.device) -> Extras:
    """The tensors that the options of the case add, on the device."""
    drawing = _Drawing(case, device)
    return Extras(
        alibi_slopes=drawing.slopes(),
        bias=drawing.bias(),
        mask=drawing.mask(),
        sinks=drawing.sinks(),
        q_lengths=drawing.lengths("q"),
        kv_lengths=drawing.lengths("k"),
        d_out=drawing.d_out(),
        d_lse=drawing.d_lse(),
    )


def is_plain(case: Case) -> bool:
    """Whether the case has none of the options: scores are scale q.k under a causal mask at most."""
    return (
        case.window is None
        and case.softcap is None
        and case.alibi == case.bias == case.mask == case.lengths == "none"
        and not case.sinks
        and case.dropout == 0.0
    )


def described(case: Case) -> list[str]:
    """The options in words, for `Case.describe`."""
    parts = []
    if case.window is not None:
        parts.append("window " + ",".join("all" if side < 0 else str(side) for side in case.window))
    if case.softcap is not None:
        parts.append(f"softcap {case.softcap:g}")
    parts += [
        f"{name} {text}" for name in ("alibi", "bias", "mask") if (text := getattr(case, name)) != "none"
    ]
    if case.sinks:
        parts.append("sinks")
    if case.lengths != "none":
        parts.append("kv lengths" if case.lengths == "kv" else "lengths")
    if case.dropout:
        parts.append(f"dropout {case.dropout:g}")
    if case.backward:
        parts.append("backward")
    return parts


#: the largest number that a softcap may be
MOST_SOFTCAP = math.ldexp(1.0, 20)
