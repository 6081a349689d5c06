"""Dot models: in what order, to what width and with what rounding `tl.dot` accumulates. Data, chosen by name.

    with effattn.cpu.active(dot_model="hopper"): ...        EFFATTN_DOT_MODEL=hopper        kernel[grid](..., dot_model="hopper")

A model says what happens to fp16, bf16, fp8 and tf32 products. Products of fp32 in IEEE precision and of fp64 are one
chain per element in every model, in the order of k, fused unless the model says otherwise; products of int8 are exact.

Tensor cores, as reverse-engineered on hardware (Fasi, Higham, Mikaitis, Pranesh 2021; Hickmann and Bradford 2019; FTTN,
arXiv:2403.00232; MMA-Sim, arXiv:2511.10909; Khattak and Mikaitis, arXiv:2512.07004): the products of one block, and the
accumulator, are aligned to the largest exponent among them, at least -126; each is truncated to F fractional bits there;
they are summed exactly; the sum is rounded toward zero to fp32 (to 13 fraction bits where F is 13; to nearest even where
the accumulator is fp16). A product's exponent is the sum of its operands' exponents, with subnormal operands at the
smallest normal exponent of their type; its significand, in [1, 4), is not normalised first. Longer rows are chains of
blocks in the order of k.

Which instruction a GPU's compiler chooses is not modelled: `hopper` is wgmma throughout. What is taken from Triton's
compiler for these GPUs: fp8 operands are widened to fp16 where there are no fp8 units; on Hopper the sum of fp8
products is added to an fp32 accumulator after every `max_num_imprecise_acc` products.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from effattn.errors import RequestError

#: environment variable with the name of the model that a process starts with
VARIABLE = "EFFATTN_DOT_MODEL"
DEFAULT = "ieee"

#: smallest normal exponent of an operand's type
LOWEST = {"f16": -14, "bf16": -126, "tf32": -126, "f8E4M3FN": -6, "f8E5M2": -14}


@dataclass(frozen=True, kw_only=True)
class DotModel:
    """One way to accumulate a tile product."""

    name: str
    meaning: str
    #: element type of the operands -> number of products that are summed at once; a chain of fma where absent
    block: dict[str, int] = field(default_factory=dict)
    #: fractional bits kept at the largest exponent, for fp16, bf16 and tf32
    fraction_bits: int = 0
    #: the same for fp8
    fraction_bits_fp8: int = 0
    #: how fp32 operands become tf32: "nearest" (ties away, as cvt.rna), "truncate" (the unit ignores the low bits), or
    #: "none" where there are no tf32 units and the product is one of fp32
    tf32: str = "nearest"
    #: whether chains multiply and add with one rounding or with two
    fused: bool = True
    #: whether sums of fp8 products move to an fp32 accumulator after `max_num_imprecise_acc` products
    promotes_fp8: bool = False

    def bits_for(self, elem: str) -> int:
        """F of an element type."""
        return self.fraction_bits_fp8 if elem.startswith("f8") else self.fraction_bits

    def multiplied_as(self, elem: str) -> str:
        """The element type that an operand is multiplied as: fp8 becomes fp16 where there are no units for it."""
        return "f16" if elem.startswith("f8") and elem not in self.block and "f16" in self.block else elem


def _blocks(half: int, tf32: int, fp8: int) -> dict[str, int]:
    return {"f16": half, "bf16": half, "tf32": tf32, "f8E4M3FN": fp8, "f8E5M2": fp8}


_HOPPER = DotModel(
    name="hopper",
    meaning="NVIDIA H100, H200 (wgmma): blocks of 16 (tf32: 8, fp8: 32), 25 fractional bits (fp8: 13), toward zero",
    block=_blocks(16, 8, 32),
    fraction_bits=25,
    fraction_bits_fp8=13,
    tf32="truncate",
    promotes_fp8=True,
)

MODELS: dict[str, DotModel] = {
    model.name: model
    for model in (
        DotModel(
            name=DEFAULT,
            meaning="one chain of fp32 fused multiply-adds per element, in the order of k; tf32 inputs rounded",
        ),
        DotModel(
            name="ieee-unfused",
            meaning="the same with the product rounded before it is added",
            fused=False,
        ),
        DotModel(
            name="ieee-tf32-truncated",
            meaning="as ieee, with tf32 inputs truncated",
            tf32="truncate",
        ),
        DotModel(
            name="volta",
            meaning="NVIDIA V100: fp16 in blocks of 4, 23 fractional bits, toward zero; bf16 and tf32 as fp32",
            block={"f16": 4},
            fraction_bits=23,
            tf32="none",
        ),
        DotModel(
            name="turing",
            meaning="NVIDIA T4, RTX 20: fp16 in blocks of 8, 24 fractional bits, toward zero; bf16 and tf32 as fp32",
            block={"f16": 8},
            fraction_bits=24,
            tf32="none",
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
        _HOPPER,
        replace(
            _HOPPER,
            name="hopper-tf32-rounded",
            meaning="as hopper, with tf32 inputs rounded to nearest, as kernels that use cvt.rna or TMA rounding do",
            tf32="nearest",
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


# ----------------------------------------------------------------------------------------------- choosing

_chosen: str | None = None


def selected() -> str:
    """The name of the model that kernels are compiled for now: `use`, else EFFATTN_DOT_MODEL, else "ieee".

    The variable is read once. Raises RequestError where it names no model.
    """
    global _chosen
    if _chosen is None:
        given = os.environ.get(VARIABLE) or DEFAULT
        if given not in MODELS:
            try:
                get(given)
            except RequestError as error:
                raise RequestError(f"{VARIABLE}: {error}") from None
        _chosen = given
    return _chosen


@contextmanager
def use(name: str) -> Iterator[None]:
    """Compile and run kernels with a model inside the block, in all threads and in processes started there.

    RequestError for an unknown name.
    """
    global _chosen
    get(name)
    before, variable = _chosen, os.environ.get(VARIABLE)
    _chosen = os.environ[VARIABLE] = name
    try:
        yield
    finally:
        _chosen = before
        if variable is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = variable


def device_key(base: str) -> str:
    """The key under which Triton keeps kernels compiled for the selected model."""
    name = selected()
    return base if name == DEFAULT else f"{base}/{name}"
