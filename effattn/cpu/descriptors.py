"""Tensor descriptors that the host makes, as arguments of a kernel.

Triton lowers each to an address with its shape and strides. How its parts follow each other in the kernel's arguments is
the order of Triton's own `decompose_descriptor`; version 3.6 has no flag for rounding to tf32.
"""

from __future__ import annotations

import re


def parts(type_: str, expr: str) -> list[tuple[str, str]]:
    """(struct code, Python expression) of each argument that a descriptor of this type stands for.

    `type_`: "tensordesc<fp16[64, 32]>" or with more words after the block's shape. In the expressions `pointer` is the
    function that turns a tensor into an address.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    block = re.search(r"\[([^\]]*)\]", type_)
    assert block is not None, type_
    rank = block.group(1).count(",") + 1
    places = [("q", f"{expr}.{part}[{d}]") for part in ("shape", "strides") for d in range(rank)]
    flags = [("q", f"int({expr}.padding == 'nan')")]
    if "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__:
        flags.append(("q", f"int({expr}.round_f32_to_tf32)"))
    return [("Q", f"pointer({expr}.base)"), *places, *flags, *places]
