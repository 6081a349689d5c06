"""Dot models: in what order, to what width and with what rounding `tl.dot` accumulates. Data, chosen by name.

A model says what happens to fp16, bf16, fp8 and tf32 products. Products of fp32 in IEEE precision run on ordinary units
on every GPU and are one chain of fused multiply-adds in every model.

Tensor cores, as reverse-engineered on hardware (Fasi, Higham, Mikaitis, Pranesh 2021; Hickmann and Bradford 2019; FTTN,
arXiv:2403.00232; MMA-Sim, arXiv:2511.10909; Khattak and Mikaitis, arXiv:2512.07004): the products of one block, and the
accumulator, are aligned to the largest exponent among them; each is truncated to F fractional bits there; they are
summed exactly; the sum is rounded toward zero to fp32. A product's exponent is the sum of its operands' exponents, with
subnormal operands at the smallest normal exponent of their type; its significand, in [1, 4), is not normalised first.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from effattn.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class DotModel:
    """One way to accumulate a tile product."""

    name: str
    meaning: str
    #: element type of the operands -> number of products that are summed at once; a chain of fma where absent
    block: dict[str, int]
    #: fractional bits kept at the largest exponent, for fp16, bf16 and tf32
    fraction_bits: int = 0
    #: the same for fp8
    fraction_bits_fp8: int = 0
    #: how fp32 operands become tf32: "nearest" (ties away, as cvt.rna) or "truncate" (the unit ignores the low bits)
    tf32: str = "nearest"

    def bits_for(self, elem: str) -> int:
        return self.fraction_bits_fp8 if elem.startswith("f8") else self.fraction_bits


def _blocks(half: int, tf32: int, fp8: int) -> dict[str, int]:
    return {"f16": half, "bf16": half, "tf32": tf32, "f8E4M3FN": fp8, "f8E5M2": fp8}


MODELS: dict[str, DotModel] = {
    model.name: model
    for model in (
        DotModel(
            name="ieee",
            meaning="one chain of fp32 fused multiply-adds per element, in the order of k",
            block={},
        ),
        DotModel(
            name="volta",
            meaning="NVIDIA V100: blocks of 4, 23 fractional bits, toward zero (fp16 only)",
            block={"f16": 4},
            fraction_bits=23,
        ),
        DotModel(
            name="ampere",
            meaning="NVIDIA A100: blocks of 8 (tf32: 4), 24 fractional bits, toward zero; tf32 inputs truncated",
            block={"f16": 8, "bf16": 8, "tf32": 4},
            fraction_bits=24,
            tf32="truncate",
        ),
        DotModel(
            name="ada",
            meaning="NVIDIA L40, RTX 40: as ampere; fp8 in blocks of 16 with 13 fractional bits",
            block=_blocks(8, 4, 16),
            fraction_bits=24,
            fraction_bits_fp8=13,
            tf32="truncate",
        ),
        DotModel(
            name="hopper",
            meaning="NVIDIA H100, H200 (wgmma): blocks of 16 (tf32: 8, fp8: 32), 25 fractional bits (fp8: 13), toward zero",
            block=_blocks(16, 8, 32),
            fraction_bits=25,
            fraction_bits_fp8=13,
            tf32="truncate",
        ),
        DotModel(
            name="blackwell",
            meaning="NVIDIA B200: blocks of 16 (tf32: 8, fp8: 32), 25 fractional bits, toward zero",
            block=_blocks(16, 8, 32),
            fraction_bits=25,
            fraction_bits_fp8=25,
            tf32="truncate",
        ),
    )
}


def get(name: str) -> DotModel:
    """The model of that name; RequestError names the known ones."""
    model = MODELS.get(name)
    if model is None:
        close = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(f"unknown dot model {name!r}; there are {', '.join(MODELS)}{hint}")
    return model
