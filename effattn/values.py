"""The named distributions that the tensors of a case are drawn from.

Each is there for a reason, which its docstring gives. A distribution draws q, k and v in float64 from
the seed of the case; the case rounds them to its dtype, once. What it draws from is in `effattn.draw`.

A new distribution is one function here with the decorator `@_distribution(name)`. It gets a `Recipe` and
may use elementwise arithmetic, square roots and selections only, since everything else (sums over an
axis, matrix products, sine) differs in the last bit between machines.

Logits are meant with the scale of the case: where a docstring says that logits are near 100, the entries
are sized for that (entries stay below 2^14, so a scale below about 1e-6 gets smaller logits).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from effattn.case import Case
    from effattn.draw import Source

    Floats = NDArray[np.float64]


class Drawn(NamedTuple):
    """What a distribution draws: float64 arrays that broadcast to the shapes of q, k and v."""

    q: Floats
    k: Floats
    v: Floats


class Recipe:
    """What a distribution gets to know of a case: the shapes to draw, the logits' scale, the sources.

    Along an axis that the layout expands, k and v have one entry; everything else follows from it.
    """

    def __init__(self, case: Case) -> None:
        from effattn import layout

        self.case = case
        #: the logits are `scale * (q . k)`
        self.scale = case.softmax_scale
        #: query heads that share a kv head
        self.group = case.heads // case.kv_heads
        flat = layout.parse(case.layout).expanded
        batch, heads, length = (
            min(1, n) if axis in flat else n
            for axis, n in (("b", case.batch), ("h", case.kv_heads), ("s", case.kv_len))
        )
        self.q_shape = (case.batch, case.heads, case.q_len, case.head_dim)
        self.k_shape = (batch, heads, length, case.head_dim)
        self.v_shape = (batch, heads, length, case.v_dim)

    def source(self, tensor: str) -> Source:
        """The stream of random numbers for one tensor."""
        from effattn.draw import Source

        return Source(self.case.values, self.case.seed, tensor)

    def for_queries(self, per_kv_head: Floats) -> Floats:
        """Hands what belongs to a kv head, shape (b, kv_heads, ...), to the query heads that use it."""
        import numpy as np

        shape = (self.case.batch, self.case.kv_heads, *per_kv_head.shape[2:])
        return np.repeat(np.broadcast_to(per_kv_head, shape), self.group, axis=1)

    def direction(self) -> tuple[Floats, Floats]:
        """A vector of signs for each kv head, for the keys (b, h, 1, d) and for the queries that use it.

        The signs for the queries take the sign of the scale along, so that a query along its direction
        has a positive logit with a key along its own.
        """
        import numpy as np

        batch, heads, _, dim = self.k_shape
        signs = self.source("direction").sign((batch, heads, 1, dim))
        return signs, self.for_queries(signs) * float(np.where(self.scale < 0, -1.0, 1.0))

    def size_for(self, logit: float) -> float:
        """The size a of entries for which two vectors of that size along one direction have this logit."""
        gain = abs(self.scale) * self.case.head_dim
        return min(math.sqrt(logit / gain), 2.0**12) if gain > 0 else 1.0


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A named distribution."""

    name: str
    #: why it is there and what it promises
    reason: str
    draw: Callable[[Recipe], Drawn]
    #: raises RequestError for a case that this distribution cannot serve
    check: Callable[[Case], None] = lambda case: None

    @property
    def summary(self) -> str:
        """The first sentence of the reason, on one line."""
        return " ".join(self.reason.split("\n\n")[0].split())


_REGISTRY: dict[str, Distribution] = {}

#: name -> distribution, in the order in which they are listed
VALUES: Mapping[str, Distribution] = MappingProxyType(_REGISTRY)


def _distribution(name: str) -> Callable[[Callable[[Recipe], Drawn]], Callable[[Recipe], Drawn]]:
    def register(draw: Callable[[Recipe], Drawn]) -> Callable[[Recipe], Drawn]:
        reason = "\n".join(line.strip() for line in (draw.__doc__ or "").strip().splitlines())
        _REGISTRY[name] = Distribution(name=name, reason=reason, draw=draw)
        return draw

    return register


def names() -> tuple[str, ...]:
    """The names of the distributions that need nothing but a seed. Real inputs are `real:MODEL/LAYER`."""
    return tuple(_REGISTRY)


def get(name: str) -> Distribution:
    """The distribution of that name; RequestError with close matches if there is none."""
    if name.startswith("real:"):
        from effattn import real

        return real.distribution(name)
    if name in _REGISTRY:
        return _REGISTRY[name]
    near = difflib.get_close_matches(name, [*_REGISTRY, "real:smollm2"], n=3)
    hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    raise RequestError(
        f"values {name!r} is unknown. Expected one of {', '.join(_REGISTRY)}, or real:smollm2/LAYER.{hint}"
    )


@_distribution("normal")
def _normal(r: Recipe) -> Drawn:
    """Independent standard normal entries: the usual starting point.

    Logits are near standard normal too, so that every key counts a little and the errors of all keys
    average out. A kernel that is wrong only for unusual numbers passes here.
    """
    return Drawn(
        r.source("q").normal(r.q_shape), r.source("k").normal(r.k_shape), r.source("v").normal(r.v_shape)
    )


@_distribution("uniform")
def _uniform(r: Recipe) -> Drawn:
    """Q and K uniform in (-1, 1) and V uniform in (0, 1): nothing cancels when P V is summed.

    All of V has one sign, so an accumulator that truncates, or stops growing, shows as an error of one
    sign. The logits are small: the weights are nearly equal, and all rows have to use all their keys.
    """
    return Drawn(
        r.source("q").uniform(r.q_shape, -1.0, 1.0),
        r.source("k").uniform(r.k_shape, -1.0, 1.0),
        r.source("v").uniform(r.v_shape),
    )


@_distribution("outliers")
def _outliers(r: Recipe) -> Drawn:
    """N(0, 1) and, in one entry of a thousand, N(0, 100) added: activations of trained models.

    The distribution of table 3 in FlashAttention-3 (arXiv 2407.08608). A few large entries set the range
    of a whole block, which costs formats with few bits, and methods that scale by block, their accuracy.
    """

    def mixed(tensor: str, shape: tuple[int, ...]) -> Floats:
        import numpy as np

        source = r.source(tensor)
        base, chance, extra = source.normal(shape), source.uniform(shape), source.normal(shape)
        return base + np.where(chance < 0.001, 10.0 * extra, 0.0)

    return Drawn(mixed("q", r.q_shape), mixed("k", r.k_shape), mixed("v", r.v_shape))


def _shifted(r: Recipe, low: float, high: float) -> Drawn:
    """Logits of one sign, around a level that each query draws between `low` and `high` (in magnitude).

    Each entry keeps its sign and is within [0.85, 1.2] of its size, so that a logit is within
    [0.72, 1.44] of its level whatever is drawn, and whatever the head dimension.
    """
    keys, queries = r.direction()
    middle = math.sqrt(low * high)
    size = r.size_for(middle)
    source = r.source("q")
    level = source.uniform((*r.q_shape[:3], 1), low, high) / middle
    q = size * level * queries * source.uniform(r.q_shape, 0.85, 1.2)
    k = size * keys * r.source("k").uniform(r.k_shape, 0.85, 1.2)
    return Drawn(q, k, r.source("v").normal(r.v_shape))


@_distribution("large-logits")
def _large_logits(r: Recipe) -> Drawn:
    """All logits between 100 and 220, where exp overflows in fp32 unless the row's maximum is subtracted.

    exp overflows at 88.7 in fp32 and bf16, at 11.1 in fp16. Q and K stay small enough for fp16, so the
    inputs are fine and what overflows is the kernel's own. The logits of a row differ, for most head
    dimensions by several units, so the softmax is not flat.
    """
    return _shifted(r, 140.0, 150.0)


@_distribution("negative-logits")
def _negative_logits(r: Recipe) -> Drawn:
    """All logits between -300 and -105, where a padded or masked key that is scored 0 wins the softmax.

    Without a subtracted maximum every exp underflows in fp32 (below -104) and the row becomes 0/0. A
    kernel that fills the last partial block with zeros, or starts the running maximum at 0, is far off.
    """
    drawn = _shifted(r, 150.0, 200.0)
    return drawn._replace(q=-drawn.q)


@_distribution("growing-max")
def _growing_max(r: Recipe) -> Drawn:
    """Each later block of keys raises the maximum of every row, so every block rescales the accumulator.

    Keys climb in levels of 16 keys (of more where kv_len is above 2048: there are at most 128 levels) and
    all logits of a level are above all logits of the level before. A missing, late or doubled rescale of
    the accumulator or of the sum is wrong by a factor that grows with every block.
    """
    import numpy as np

    length = r.k_shape[2]
    width = 16 * max(1, -(-length // 2048))
    levels = max(1, -(-length // width))
    step = min(4.0, 128.0 / levels)
    keys, queries = r.direction()
    top = step * max(levels - 1, 1) / 2
    size = r.size_for(max(top, 1.0))
    level = (np.arange(length) // width - (levels - 1) / 2) * (step / max(top, 1.0))
    within = r.source("k").uniform(r.k_shape, -0.2, 0.2) * (step / max(top, 1.0))
    k = size * keys * (level[:, None] + within)
    # A query weighs the entries of a key, all with one sign, so the order of the levels is the same for all.
    q = size * queries * r.source("q").uniform(r.q_shape, 0.75, 1.25)
    return Drawn(q, k, r.source("v").normal(r.v_shape))


def _below_top(r: Recipe, logit: float) -> tuple[Floats, Floats, Floats, float]:
    """Queries, a direction, and keys of at most half the logit that a key along the direction has."""
    keys, queries = r.direction()
    size = r.size_for(logit)
    q = size * queries * r.source("q").uniform(r.q_shape, 0.75, 1.25)
    others = size * keys * r.source("k").uniform(r.k_shape, -1.0, 0.5)
    return q, keys, others, size


@_distribution("repeated-max")
def _repeated_max(r: Recipe) -> Drawn:
    """A quarter of the keys are one and the same key, which is every row's maximum, and V < 0.

    Several entries of P are then exactly 1 and V has one sign. Sums of such products in a low precision
    round to one side each time; the bias was found in training runs (arXiv 2510.04212). The error of a
    correct kernel has no sign.
    """
    import numpy as np

    q, keys, others, size = _below_top(r, 6.0)
    top = r.source("choice").uniform((*r.k_shape[:3], 1)) < 0.25
    top[:, :, :1] = True  # a causal row sees the first key if it sees any
    k = np.where(top, size * keys, others)
    return Drawn(q, k, -0.25 - np.abs(r.source("v").normal(r.v_shape)))


@_distribution("near-ties")
def _near_ties(r: Recipe) -> Drawn:
    """A quarter of the keys tie for the maximum but for 0 to 3 units in the last place of the dtype.

    Which key is the maximum is decided by the last bits, so different orders of summation decide
    differently. That must not matter; it does where scores are rounded to the dtype of the inputs, or
    where a comparison decides what is kept.
    """
    import numpy as np

    q, keys, others, size = _below_top(r, 8.0)
    digits = {"fp16": 10, "bf16": 7, "fp32": 23}[r.case.dtype]
    # A size of 1.5 times a power of two leaves room for the units below it.
    power = math.ldexp(1.0, math.frexp(size)[1] - 1)
    source = r.source("choice")
    top = source.uniform((*r.k_shape[:3], 1)) < 0.25
    top[:, :, :1] = True
    units = np.floor(source.uniform((*r.k_shape[:3], 1), 0.0, 4.0))
    k = np.where(top, keys * power * (1.5 - units * 2.0**-digits), others)
    return Drawn(q, k, r.source("v").normal(r.v_shape))


@_distribution("one-hot")
def _one_hot(r: Recipe) -> Drawn:
    """One key outweighs all others of its row by a factor of 1e12 or more: the output is one row of V.

    The key is at one of four positions: the first, and three that are drawn, each above the ones before,
    so that every row of a causal mask has such a key. All weights but one vanish beside it, hence the
    output shows at once if a key is dropped, shifted or taken from another head.
    """
    import numpy as np

    steps = 4
    keys, queries = r.direction()
    size = r.size_for(40.0 * steps)
    q = size * queries * r.source("q").uniform(r.q_shape, 0.75, 1.25)
    k = size * keys * r.source("k").uniform(r.k_shape, -1.0, 0.0)
    batch, heads, length, _ = r.k_shape
    if length:
        drawn = np.floor(r.source("choice").uniform((batch, heads, steps)) * length)
        places = np.sort(np.minimum(drawn, length - 1), axis=-1).astype(np.int64)
        places[:, :, 0] = 0
        b, h = np.ogrid[:batch, :heads]
        for rank in range(steps):
            k[b, h, places[:, :, rank]] = size * keys[:, :, 0] * ((rank + 1) / steps)
    return Drawn(q, k, r.source("v").normal(r.v_shape))


@_distribution("constant")
def _constant(r: Recipe) -> Drawn:
    """All entries of Q are one number, all of K another, all of V a third: the output is that third one.

    All logits are equal, so the weights are 1/n and a normaliser that counts one key too many or too few
    is seen in every element. The errors of all elements are the same, so there is one sample, not many.
    """
    import numpy as np

    def one(tensor: str, shape: tuple[int, ...]) -> Floats:
        source = r.source(tensor)
        return np.full(shape, source.sign(()) * source.uniform((), 0.25, 2.0))

    return Drawn(one("q", r.q_shape), one("k", r.k_shape), one("v", r.v_shape))


@_distribution("subnormal")
def _subnormal(r: Recipe) -> Drawn:
    """Every other feature of V is subnormal in the dtype, and one entry of K in eight.

    The outputs of those features are subnormal too, so a kernel or a machine that flushes subnormal
    numbers to zero loses all of them, and relative error is no measure. The other features are normal.
    """
    import numpy as np

    smallest = 2.0**-14 if r.case.dtype == "fp16" else 2.0**-126
    source = r.source("v")
    tiny = smallest * source.sign(r.v_shape) * source.uniform(r.v_shape, 0.01, 0.99)
    v = np.where(np.arange(r.case.v_dim) % 2 == 0, tiny, source.normal(r.v_shape))
    source = r.source("k")
    tiny = smallest * source.sign(r.k_shape) * source.uniform(r.k_shape, 0.01, 0.99)
    k = np.where(source.uniform(r.k_shape) < 0.125, tiny, source.normal(r.k_shape))
    return Drawn(r.source("q").normal(r.q_shape), k, v)


def _of_rank(r: Recipe, tensor: str, shape: tuple[int, ...], basis: Floats) -> Floats:
    """Rows mixed at random from the rows of `basis` (b, h, rank, d), added up in a fixed order."""
    mix = r.source(tensor).normal((*shape[:3], basis.shape[2]))
    total = mix[..., :1] * basis[:, :, :1]
    for i in range(1, basis.shape[2]):
        total = total + mix[..., i : i + 1] * basis[:, :, i : i + 1]
    return total / math.sqrt(basis.shape[2])


@_distribution("low-rank")
def _low_rank(r: Recipe) -> Drawn:
    """The rows of Q, K and V of a head lie in a space of four dimensions, up to the rounding to the dtype.

    Attention of trained models is close to low rank, and approximations live on it. For exact kernels:
    features are correlated, so the errors of a dot product's terms don't average out as they do for
    independent features.
    """
    batch, heads, _, dim = r.k_shape
    shared = r.source("basis").normal((batch, heads, min(4, dim), dim))
    v_dim = r.v_shape[3]
    v_basis = r.source("v-basis").normal((batch, heads, min(4, v_dim), v_dim))
    return Drawn(
        _of_rank(r, "q", r.q_shape, r.for_queries(shared)),
        _of_rank(r, "k", r.k_shape, shared),
        _of_rank(r, "v", r.v_shape, v_basis),
    )


@_distribution("smooth-keys")
def _smooth_keys(r: Recipe) -> Drawn:
    """Keys change smoothly with their position; a query then attends to whole stretches of positions.

    Neighbouring keys are nearly equal, as they are after position encodings and pooling. Methods that pool
    or project along the sequence converge here and don't for independent keys. Q and V are normal.
    """
    import numpy as np

    batch, heads, length, dim = r.k_shape
    pieces = 8
    knots = r.source("k").normal((batch, heads, pieces + 3, dim))
    at = (np.arange(length) + 0.5) * (pieces / max(length, 1))
    piece = np.minimum(at.astype(np.int64), pieces - 1)
    t = (at - piece)[:, None]
    # Catmull-Rom: the cubic through the knots whose slope at each is that between its neighbours
    p0, p1, p2, p3 = (knots[:, :, piece + i] for i in range(4))
    k = p1 + 0.5 * t * ((p2 - p0) + t * ((2 * p0 - 5 * p1 + 4 * p2 - p3) + t * (3 * (p1 - p2) + p3 - p0)))
    return Drawn(r.source("q").normal(r.q_shape), k, r.source("v").normal(r.v_shape))
