"""A case: the recipe of one attention problem, about 150 bytes of JSON that any machine turns into the
same tensors, bit for bit.

The problem is `softmax(scale * q k^T + mask) v`. Query head h uses kv head `h // (heads // kv_heads)`.
Query i sees key j (both from 0):

- causal "none": always
- causal "bottom-right": where j <= i + kv_len - q_len, as in FlashAttention since 2.1
- causal "top-left": where j <= i, as with `is_causal=True` in torch's scaled_dot_product_attention

A row that sees no key has output 0 and log-sum-exp -inf.

Options change a score in this order: scale, softcap, bias, ALiBi; then window, lengths and mask hide pairs. Positions
count with the mask's alignment: query i stands at i + shift, shift = kv_len - q_len (top-left: 0), with an entry's own
lengths where it has some. A window shows the keys from i + shift - left to i + shift + right.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from effattn import options
from effattn.errors import RequestError, TooLarge
from effattn.options import Extras

if TYPE_CHECKING:
    import torch

#: the dtypes of q, k and v
DTYPES = ("fp16", "bf16", "fp32")

#: which keys a query sees
CAUSAL = ("none", "bottom-right", "top-left")

#: version of the JSON form; a file with a higher one comes from a newer effattn
SCHEMA = 1

#: the largest extent of an axis; indices along one axis fit 32 bits
_MAX_EXTENT = 2**31 - 1

#: no case file is nearly as long, so a file that is longer is something else
_MAX_FILE = 1 << 16

#: the text that an id is the hash of; made once, since making it takes longer than using it
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


class _Tensors(NamedTuple):
    #: (batch, heads, q_len, head_dim)
    q: torch.Tensor
    #: (batch, kv_heads, kv_len, head_dim)
    k: torch.Tensor
    #: (batch, kv_heads, kv_len, v_dim)
    v: torch.Tensor


class Inputs(_Tensors):
    """The tensors of a case: the three that every case has, all of its dtype, and `extras`, those of its options."""

    extras: Extras

    def __new__(
        cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras | None = None
    ) -> Inputs:
        inputs = super().__new__(cls, q, k, v)
        inputs.extras = Extras() if extras is None else extras
        return inputs


def id_of(data: Mapping[str, Any]) -> str:
    """The id of the case that `Case.to_dict` gave this of."""
    return hashlib.sha256(_CANONICAL.encode(data).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class Case:
    """The recipe of one attention problem. Making one checks it: RequestError names the field at fault."""

    batch: int = 1
    heads: int = 1
    #: None means as many as heads
    kv_heads: int = cast(int, None)
    q_len: int
    kv_len: int
    head_dim: int
    #: None means head_dim
    v_dim: int = cast(int, None)
    #: one of DTYPES: fp16, bf16, fp32
    dtype: str
    #: one of CAUSAL: none, bottom-right, top-left
    causal: str = "none"
    #: None means head_dim ** -0.5, and that number becomes None; `softmax_scale` has the number
    scale: float | None = None
    #: (left, right): how many keys before and after its own position a query sees, -1 for all; a number w for (w, w)
    window: tuple[int, int] | None = None
    #: scores become softcap * tanh(score / softcap)
    softcap: float | None = None
    #: one of `options.ALIBI`: none, geometric (the usual slopes), drawn
    alibi: str = "none"
    #: "none", or the axes along which it varies, some of b, h, q, k; in the dtype of q, or with ":fp32" in that
    bias: str = "none"
    #: the same for a boolean mask, without a dtype
    mask: str = "none"
    #: whether each head has one more logit, without a value
    sinks: bool = False
    #: one of `options.LENGTHS`: none, kv (keys are padded), both (queries too)
    lengths: str = "none"
    #: the probability with which a weight is dropped
    dropout: float = 0.0
    #: whether the gradients are asked for as well
    backward: bool = False
    #: the order of the axes in memory and what else is special about it, see `effattn.layout`
    layout: str = "bhsd"
    #: a distribution's name, see `effattn.values`
    values: str = "normal"
    seed: int = 0

    def __post_init__(self) -> None:
        from effattn import layout, values

        def put(field: str, value: object) -> None:
            object.__setattr__(self, field, value)

        if self.kv_heads is None:
            put("kv_heads", self.heads)
        if self.v_dim is None:
            put("v_dim", self.head_dim)
        for field, least, most in (
            ("batch", 1, _MAX_EXTENT),
            ("heads", 1, _MAX_EXTENT),
            ("kv_heads", 1, _MAX_EXTENT),
            ("q_len", 0, _MAX_EXTENT),
            ("kv_len", 0, _MAX_EXTENT),
            ("head_dim", 1, _MAX_EXTENT),
            ("v_dim", 1, _MAX_EXTENT),
            ("seed", 0, 2**63 - 1),
        ):
            put(field, _integer(field, getattr(self, field), least, most))
        if self.heads % self.kv_heads:
            raise RequestError(
                f"heads {self.heads} with kv_heads {self.kv_heads}: expected heads to be a multiple of"
                " kv_heads, since each kv head serves the same number of query heads. Change one of them."
            )
        for field, allowed in (("dtype", DTYPES), ("causal", CAUSAL)):
            value = getattr(self, field)
            if not isinstance(value, str) or value not in allowed:
                raise RequestError(f"{field} {value!r}: expected one of {', '.join(allowed)}.")
        put("scale", self._checked_scale())
        self._check_options(put)
        for field in ("layout", "values"):
            if not isinstance(getattr(self, field), str):
                raise RequestError(f"{field} {getattr(self, field)!r}: expected a text, in quotes.")
        put("layout", layout.parse(self.layout).text)
        values.get(self.values).check(self)

    def _check_options(self, put: Callable[[str, object], None]) -> None:
        put("window", options.checked_window(self.window))
        if self.softcap is not None:
            what = f"a positive number below {options.MOST_SOFTCAP:.0f}, or nothing for no cap"
            put(
                "softcap",
                options.checked_number("softcap", self.softcap, 2.0**-20, options.MOST_SOFTCAP, what),
            )
        put(
            "dropout",
            options.checked_number(
                "dropout", self.dropout, 0.0, 1.0, "a probability, at least 0 and below 1"
            ),
        )
        for field, allowed in (("alibi", options.ALIBI), ("lengths", options.LENGTHS)):
            if getattr(self, field) not in allowed:
                raise RequestError(f"{field} {getattr(self, field)!r}: expected one of {', '.join(allowed)}.")
        options.checked_axes("bias", self.bias, dtypes=("fp32",))
        options.checked_axes("mask", self.mask)
        if self.bias == f"{self.bias.partition(':')[0]}:{self.dtype}":
            put("bias", self.bias.partition(":")[0])
        for field in ("sinks", "backward"):
            if not isinstance(getattr(self, field), bool):
                raise RequestError(f"{field} {getattr(self, field)!r}: expected true or false.")

    def _checked_scale(self) -> float | None:
        scale = self.scale
        if scale is None:
            return None
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise RequestError(f"scale {scale!r}: expected a number, or nothing for head_dim ** -0.5.")
        try:
            scale = float(scale)
        except OverflowError:
            scale = math.inf
        if not math.isfinite(scale):
            raise RequestError(f"scale {scale!r}: expected a finite number, or nothing for head_dim ** -0.5.")
        # head_dim ** -0.5 and 1 / sqrt(head_dim) may differ in the last bit, and mean the same.
        return None if math.isclose(scale, self._usual_scale, rel_tol=2.0**-51, abs_tol=0.0) else scale

    @property
    def _usual_scale(self) -> float:
        # A root and a division are the same on every machine; the last bit of a power is not.
        return 1.0 / math.sqrt(self.head_dim)

    @property
    def softmax_scale(self) -> float:
        """The scale in effect: `scale`, or head_dim ** -0.5 where that is None."""
        return self._usual_scale if self.scale is None else self.scale

    @property
    def plain(self) -> bool:
        """Whether the case has no option that changes scores, weights or what is visible, but for the causal mask."""
        return options.is_plain(self)

    @property
    def alignment(self) -> str:
        """Where positions count from, for the window and ALiBi too: that of the causal mask, or bottom-right."""
        return "bottom-right" if self.causal == "none" else self.causal

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch dtype of q, k and v."""
        import torch

        return {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[self.dtype]

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from what they default to, and the schema; `from_dict` takes it back."""
        data: dict[str, Any] = {"schema": SCHEMA}
        values = vars(self)
        usual = {**_DEFAULTS, "kv_heads": self.heads, "v_dim": self.head_dim}
        for name, default in usual.items():
            value = values[name]
            if value != default:
                data[name] = list(value) if isinstance(value, tuple) else value
        return data

    def to_json(self) -> str:
        """One line of JSON; equal cases have equal lines."""
        return json.dumps(self.to_dict(), separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_dict(cls, data: object) -> Case:
        """The case that `to_dict` described; RequestError for anything else."""
        if not isinstance(data, dict):
            raise RequestError(
                f"a case given as {_json_type(data)}: expected a JSON object with the fields of a case, such"
                " as"
                ' {"schema":1,"q_len":64,"kv_len":64,"head_dim":32,"dtype":"fp16"}.'
            )
        data = dict(data)
        schema = data.pop("schema", None)
        if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
            given = "no schema" if schema is None else f"schema {schema!r}"
            raise RequestError(
                f'a case with {given}: expected "schema": {SCHEMA}. Is this a case file of effattn?'
            )
        if schema > SCHEMA:
            raise RequestError(
                f"a case with schema {schema}: this effattn reads schema {SCHEMA}. A newer effattn wrote it;"
                " upgrade with `pip install --upgrade effattn`."
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(name) for name in data if name not in known)
        if unknown:
            raise RequestError(
                f"a case with unknown field {', '.join(map(repr, unknown))}: expected only"
                f" {', '.join(known)}. Remove it, or correct its name."
            )
        missing = [name for name in ("q_len", "kv_len", "head_dim", "dtype") if name not in data]
        if missing:
            raise RequestError(
                f"a case without {', '.join(missing)}: expected at least q_len, kv_len, head_dim, dtype. Add"
                " them."
            )
        for name, value in data.items():
            if value is None:
                raise RequestError(f"{name} null: expected a value. Leave the field out for its default.")
        return cls(**data)

    @classmethod
    def from_json(cls, text: str) -> Case:
        """The case that `to_json` wrote; RequestError for anything else."""

        def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            data = dict(pairs)
            if len(data) < len(pairs):
                names = [name for name, _ in pairs]
                twice = sorted({name for name in names if names.count(name) > 1})
                raise RequestError(
                    f"a case with field {', '.join(map(repr, twice))} given twice. Give it once."
                )
            return data

        def no_constant(name: str) -> float:
            raise RequestError(f"a case with the number {name}: expected finite numbers; JSON has no {name}.")

        try:
            data = json.loads(text, object_pairs_hook=once, parse_constant=no_constant)
        except RequestError:
            raise
        except (ValueError, RecursionError) as error:
            start = text if len(text) <= 60 else text[:60] + "..."
            raise RequestError(
                f"a case that is not JSON ({error}): {start!r}. Expected one JSON object; if the file was cut"
                " off, write it again."
            ) from None
        return cls.from_dict(data)

    @classmethod
    def load(cls, path: str | Path) -> Case:
        """Reads a case from a JSON file; RequestError names the file and what is wrong with it."""
        path = Path(path)
        if path.is_dir():
            raise RequestError(f"case file {path}: this is a directory. Give the JSON file of one case.")
        try:
            with path.open("rb") as file:
                content = file.read(_MAX_FILE + 1)
        except FileNotFoundError:
            raise RequestError(f"case file {path}: there is no such file. Check the path.") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RequestError(
                f"case file {path}: cannot be read ({reason}). Check the path and its rights."
            ) from None
        if len(content) > _MAX_FILE:
            raise RequestError(
                f"case file {path}: longer than {_MAX_FILE} bytes, but a case is about 150. Give the JSON"
                " file of one case."
            )
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise RequestError(
                f"case file {path}: not text in UTF-8. Give the JSON file of one case."
            ) from None
        try:
            return cls.from_json(text)
        except RequestError as error:
            raise RequestError(f"case file {path}: {error}") from None

    @property
    def id(self) -> str:
        """A hash of the content: 12 hexadecimal digits, the same on every machine."""
        return id_of(self.to_dict())

    def describe(self) -> str:
        """One line for people."""
        heads = f"{self.heads} head" + ("s" if self.heads > 1 else "")
        if self.kv_heads != self.heads:
            heads += f" ({self.kv_heads} kv)"
        width = f"d={self.head_dim}" + (f" v_dim={self.v_dim}" if self.v_dim != self.head_dim else "")
        parts = [self.dtype, f"batch {self.batch}", heads, f"{self.q_len}x{self.kv_len}", width]
        if self.causal != "none":
            parts.append(f"causal {self.causal}")
        if self.scale is not None:
            parts.append(f"scale {self.scale:g}")
        parts += options.described(self)
        if self.layout != "bhsd":
            parts.append(f"layout {self.layout}")
        return ", ".join([*parts, f"{self.values} seed {self.seed}"])

    def tensors(self, device: str | torch.device = "cpu") -> Inputs:
        """Builds q, k, v and the tensors of the options: fresh memory in the case's layout, NaN all around.

        The values are drawn in float64 from the seed and rounded to the dtype once, so they are the same,
        bit for bit, on every machine. RequestError where the device isn't there or memory doesn't suffice.
        """
        import numpy as np
        import torch

        from effattn import layout, values
        from effattn.rounding import round_bits

        device = _device(device)
        placed = layout.parse(self.layout)
        try:
            if (
                self.batch * self.heads * max(self.q_len, self.kv_len) * max(self.head_dim, self.v_dim)
                > 2**44
            ):
                raise MemoryError  # numpy has another error for sizes that no address can reach
            drawn = values.get(self.values).draw(values.Recipe(self))
            tensors = []
            for name, data, shape in (
                ("q", drawn.q, (self.batch, self.heads, self.q_len, self.head_dim)),
                ("k", drawn.k, (self.batch, self.kv_heads, self.kv_len, self.head_dim)),
                ("v", drawn.v, (self.batch, self.kv_heads, self.kv_len, self.v_dim)),
            ):
                bits = np.broadcast_to(round_bits(data, self.dtype), shape)
                tensors.append(
                    layout.build(bits, placed, dtype=self.dtype, expand=name != "q", device=device)
                )
            extras = options.draw(self, device)
        except (MemoryError, torch.OutOfMemoryError):
            raise TooLarge(
                f"case {self.describe()}: its tensors don't fit into the memory of {device}. Take a smaller"
                " case."
            ) from None
        return Inputs(*tensors, extras=extras)


#: Field -> what it is unless given, of `Case.to_dict`, which every record of a sweep comes through.
_DEFAULTS = {field.name: field.default for field in fields(Case)}


def _integer(field: str, value: object, least: int, most: int) -> int:
    expected = f"an integer from {least} to {most}"
    if isinstance(value, bool):
        raise RequestError(f"{field} {value!r}: expected {expected}, not true or false.")
    try:
        number = operator.index(cast(Any, value))
    except TypeError:
        raise RequestError(f"{field} {value!r}: expected {expected}.") from None
    if not least <= number <= most:
        raise RequestError(f"{field} {number}: expected {expected}.")
    return number


def _device(device: str | torch.device) -> torch.device:
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise RequestError(f"device {device!r} is unknown. Expected cpu, or cuda with a GPU.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(
            f"device {device!r}: torch finds no usable GPU here. Use cpu, or a build of torch for it."
        )
    return found


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return {list: "an array", str: "a text", int: "a number", float: "a number"}.get(
        type(value), type(value).__name__
    )
