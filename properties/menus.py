"""What cases are drawn from: the shapes and options at which attention kernels have gone wrong.

Both the Hypothesis strategies and the profiles draw from these menus, so that a regime that one of them
reaches is open to the other. Nothing here imports torch.
"""

from __future__ import annotations

from typing import Any

#: Lengths around the edges of tiles of 16, 32, 64 and 128, the empty and the single row, and primes.
LENGTHS: tuple[int, ...] = (
    0, 1, 2, 3, 5, 7, 11, 15, 16, 17, 23, 31, 32, 33, 41, 47, 63, 64, 65, 79, 97, 113,
    127, 128, 129, 131, 151, 173, 191, 192, 193, 211, 241, 255, 256, 257, 271, 293, 300,
)  # fmt: skip

#: Lengths that need several KV tiles of any size up to 64, with a last tile that is not full.
SEVERAL_PARTIAL_TILES: tuple[int, ...] = (129, 131, 151, 173, 191, 193, 211, 241, 255, 257, 271, 293, 300)

#: Lengths that fill whole tiles.
WHOLE_TILES: tuple[int, ...] = (16, 32, 64, 128, 192, 256)

#: Head dimensions: powers of two, odd, prime, and the usual models' 64, 80, 96, 128 and 256.
HEAD_DIMS: tuple[int, ...] = (
    1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 33, 40, 48, 56, 61, 64, 65, 72, 80, 96, 100, 127, 128,
)  # fmt: skip
LARGE_HEAD_DIMS: tuple[int, ...] = (129, 160, 192, 255, 256)

#: (KV heads, query heads per KV head). Groups of 7 are those of a real model, and no power of two.
GROUPS: tuple[tuple[int, int], ...] = (
    (1, 1), (2, 1), (3, 1), (4, 1),
    (1, 2), (1, 4), (1, 7), (1, 8),
    (2, 2), (2, 3), (3, 2), (2, 4), (2, 7), (3, 3),
)  # fmt: skip

BATCHES: tuple[int, ...] = (1, 2, 3)

CAUSAL: tuple[str, ...] = ("none", "bottom-right", "top-left")

#: Scales besides the usual head_dim ** -0.5. All are exact in binary, so that a case's JSON is short.
SCALES: tuple[float, ...] = (0.03125, 0.0625, 0.25, 0.5)

#: Orders of the axes in memory, outermost first, besides the contiguous "bhsd".
PERMUTED_LAYOUTS: tuple[str, ...] = ("bshd", "sbhd", "hbsd", "bhds", "bdhs", "shbd", "dbhs", "bsdh")

#: What may be added to any order of the axes.
LAYOUT_SUFFIXES: tuple[str, ...] = ("+pad", "+offset", "+step")
EXPANDED_SUFFIXES: tuple[str, ...] = ("+expand-b", "+expand-h", "+expand-s")

#: Every kind of layout, at least once: what the profiles draw from.
LAYOUTS: tuple[str, ...] = (
    *PERMUTED_LAYOUTS,
    "bhsd+pad", "bhsd+offset", "bhsd+step",
    "bshd+pad", "bshd+offset", "sbhd+step", "bhds+pad+offset", "bshd+pad+offset+step",
    "bhsd+expand-b", "bhsd+expand-h", "bhsd+expand-s", "bshd+expand-h+pad", "bshd+expand-b+offset",
)  # fmt: skip
CONTIGUOUS = "bhsd"


def value_names() -> tuple[str, ...]:
    """The names of all generated value distributions (not those captured from a real model)."""
    from effattn import values

    return tuple(name for name in values.names() if not name.startswith("real:"))


#: option -> fields of a case that have it, in the order in which profiles take them. Windows are cut inside and at the edges
#: of tiles, down to the own position.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "window": tuple({"window": w} for w in ((7, 40), (32, -1), (-1, 16), (64, 64), (0, 0))),
    "softcap": ({"softcap": 20.0}, {"softcap": 2.0}),
    "alibi": ({"alibi": "geometric"}, {"alibi": "drawn"}),
    "bias": tuple({"bias": axes} for axes in ("bhqk", "qk", "bk", "hqk", "bhqk:fp32", "hqk:fp32")),
    "mask": tuple({"mask": axes} for axes in ("bhqk", "bqk", "qk", "bk")),
    "sinks": ({"sinks": True},),
    "lengths": ({"lengths": "kv"}, {"lengths": "both"}),
    "dropout": ({"dropout": 0.25}, {"dropout": 0.5}),
}
