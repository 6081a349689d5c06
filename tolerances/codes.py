"""How an operand of a product becomes codes of 8 bits, as data: the quantisation that a method declares.

An entry x of Q, K or V is stored as the code of x / scale, and stands for scale * code. The scale of a group of entries is
their largest magnitude divided by a code, the largest of the format unless said otherwise. So what is multiplied is known
from the inputs alone, but for the few entries that lie at the boundary of two codes (`effattn.tolerances.quantise`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from effattn.errors import RequestError
from effattn.tolerances import formats
from effattn.tolerances.formats import Format

#: the formats of codes
FORMATS = ("e4m3", "e5m2", "int8")

#: what shares a scale -> in words, for messages and docs
SCALES: dict[str, str] = {
    "tensor": "the whole tensor",
    "kv-head": "a (batch, KV head), all query heads of its group together, as in FlashAttention-3",
    "head": "a (batch, head)",
    "block": "every `rows` rows of a (batch, head), the last block may have fewer, as in SageAttention",
    "channel": "a column of a (batch, head), all rows together; for V",
    "none": "nothing: the scale is 1, entries are rounded to codes as they are",
}


def _hint(given: object, known: Iterable[str]) -> str:
    close = get_close_matches(str(given).removeprefix("float8_"), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """The quantisation of one operand: Q (batch, heads, q_len, head_dim), K or V (batch, kv_heads, kv_len, ...).

    A row is one query or one key. The largest magnitude is taken over all rows that the tensor has, padding and hidden keys
    too. Raises RequestError where the fields contradict each other.
    """

    #: format of the codes: "e4m3" (torch.float8_e4m3fn), "e5m2" or "int8" (-127 to 127)
    format: str = "e4m3"
    #: what shares a scale: a name of `SCALES`
    scale: str = "tensor"
    #: rows of a block, with scale="block"; 1 is a scale for each row
    rows: int | None = None
    #: the code that the largest magnitude becomes; None: the largest of the format, 448, 57344 or 127
    top: float | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise RequestError(
                f"codes of format {self.format!r}: expected one of {', '.join(FORMATS)}{_hint(self.format, FORMATS)}"
            )
        if self.scale not in SCALES:
            raise RequestError(
                f"codes with scale {self.scale!r}: expected what shares a scale, one of {', '.join(SCALES)}"
                f"{_hint(self.scale, SCALES)}"
            )
        rows = self.rows
        if (self.scale == "block") != (rows is not None):
            raise RequestError(
                f"codes with scale {self.scale!r} and rows {rows!r}: rows is the size of a block,"
                ' given with scale="block" and with nothing else'
            )
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise RequestError(f"codes in blocks of {rows!r} rows: expected 1 or more")
        if self.scale == "none" and self.format == "int8":
            raise RequestError(
                "codes of int8 without a scale: entries would be rounded to integers; give a scale"
            )
        if self.top is not None:
            if self.scale == "none":
                raise RequestError(f"codes with top {self.top!r} without a scale: give one, or leave top out")
            if not (math.isfinite(self.top) and 1.0 <= self.top <= self.code_format.largest):
                raise RequestError(
                    f"codes with top {self.top!r}: expected the code that the largest magnitude becomes, from 1 to"
                    f" {self.code_format.largest:g}, the largest of {self.format}"
                )

    @property
    def code_format(self) -> Format:
        """The format of the codes."""
        return formats.get(self.format)

    @property
    def top_code(self) -> float:
        """The code that the largest magnitude becomes."""
        return self.code_format.largest if self.top is None else float(self.top)

    @property
    def text(self) -> str:
        """In words, for messages: "e4m3, a scale per 64 rows"."""
        if self.scale == "none":
            return f"{self.format} without a scale"
        shared = f"{self.rows} rows" if self.scale == "block" else self.scale.replace("kv-head", "KV head")
        return f"{self.format}, a scale per {shared}"
