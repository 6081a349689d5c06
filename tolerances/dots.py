"""What the accumulation of a matrix unit adds to the error of a product: one-sided truncation.

Tensor cores (MMA-Sim, arXiv:2511.10909; FTTN, 2403.00232; Khattak and Mikaitis, 2512.07004) sum K products and the
accumulator c at once: each is truncated to F fractional bits at the largest exponent e of the block, and the sum is
truncated to the accumulator's G fraction bits. A block is therefore off by at most

    (K + 1) 2^(e - F) + 2^-G |c'|,     2^e <= max(|a_k b_k|, |c|),

always toward zero for each term. No partial sum, and no product, is larger than the sum of the terms of one sign,
P = (sum |a b| + |sum a b|) / 2. So n products, in ceil(n / K) blocks, are off by at most

    ceil(n / K) ((K + 1) 2^-F + 2^-G) P.

What is cut is half a quantum on the average where all terms have one sign: ceil(n / K) (K 2^-F + 2^-G - 2^-F) / 2 P where P
is reached at once; c itself has no more than G bits, and a sum of multiples of 2^-F loses those below 2^-G. Errors of one
sign do not average out over terms, elements or rows: they enter the noise with their full size, and never divided by a
square root of n.

Tile sizes are taken to be multiples of K, as they are in kernels for these units; one block more is allowed for the end
of the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from effattn.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Count = TypeVar("Count", float, NDArray[np.float64])


@dataclass(frozen=True, kw_only=True)
class Block:
    """How a unit sums the products of one input format."""

    #: K: products that are summed at once
    terms: int
    #: F: fractional bits at the largest exponent
    bits: int
    #: G: fraction bits of the accumulator
    kept: int = 23

    @property
    def loss(self) -> float:
        """Largest error of one block, in units of the largest partial sum."""
        return (self.terms + 1) * 2.0**-self.bits + 2.0**-self.kept

    @property
    def mean_loss(self) -> float:
        """Expected error of one block of terms of one sign, in the same units."""
        return 0.5 * (self.terms * 2.0**-self.bits + 2.0**-self.kept - 2.0**-self.bits)


#: Any order of additions with one rounding to nearest each: the model of a kernel that declares nothing.
ANY = "ieee"

#: model -> format of the factors -> block; formats that are missing go through ordinary units
MODELS: Mapping[str, Mapping[str, Block]] = {
    ANY: {},
    "volta": {"fp16": Block(terms=4, bits=23)},
    "turing": {"fp16": Block(terms=8, bits=24)},
    "ampere": {
        "fp16": Block(terms=8, bits=24), "bf16": Block(terms=8, bits=24), "tf32": Block(terms=4, bits=24),
    },
    "ada": {
        "fp16": Block(terms=8, bits=24), "bf16": Block(terms=8, bits=24), "tf32": Block(terms=4, bits=24),
        "e4m3": Block(terms=16, bits=13, kept=13), "e5m2": Block(terms=16, bits=13, kept=13),
    },
    "hopper": {
        "fp16": Block(terms=16, bits=25), "bf16": Block(terms=16, bits=25), "tf32": Block(terms=8, bits=25),
        "e4m3": Block(terms=32, bits=13, kept=13), "e5m2": Block(terms=32, bits=13, kept=13),
    },
    "blackwell": {
        "fp16": Block(terms=16, bits=25), "bf16": Block(terms=16, bits=25), "tf32": Block(terms=8, bits=25),
        "e4m3": Block(terms=32, bits=25), "e5m2": Block(terms=32, bits=25),
    },
}  # fmt: skip


def get(name: str) -> Mapping[str, Block]:
    """The blocks of a model by the format of the factors; RequestError for an unknown name."""
    if name not in MODELS:
        close = get_close_matches(str(name), MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(f"unknown dot model {name!r}: expected one of {', '.join(MODELS)}{hint}")
    return MODELS[name]


def dot_bound(block: Block | None, n: Count) -> Count:
    """Largest error of a sum of n products in units of P; 0 for no block, where the sum's own bound holds."""
    return 0.0 * n if block is None else _blocks(block, n) * block.loss


def dot_sigma(block: Block | None, n: Count) -> Count:
    """Expected one-sided error of a sum of n products in units of P: a bias, to be added with its full size."""
    return 0.0 * n if block is None else _blocks(block, n) * block.mean_loss


def _blocks(block: Block, n: Count) -> Count:
    return np.ceil(n / block.terms) + 1.0  # pyright: ignore[reportReturnType]
