"""What a method declares about its own arithmetic, as data.

The envelope derives bound and noise from this record alone; nothing is fitted to a kernel. A kernel that does
something else than it declares is judged by its declaration, which is the point.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from effattn.errors import RequestError
from effattn.tolerances import dots, formats
from effattn.tolerances.codes import Codes
from effattn.tolerances.formats import Format

#: when the weights are divided by their sum
NORMALISE = ("after", "before", "any")
#: the output that delta = dO.O of the backward pass is computed from
DELTA_OF = ("rounded", "unrounded", "any")
#: how the gradients of K and V of the query heads of a group are added up
GROUP_SUM = ("acc", "input", "any")
#: what the error of tanh is relative to
TANH_OF = ("tanh", "one")
#: below it lie the errors of exp and tanh that can be declared: from there on nothing that is computed means anything
LARGEST_ERROR = 1 << 20
#: what the normaliser sums
SUM_OF = ("unrounded", "rounded")


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """How one method computes softmax(scale Q K^T) V.

    Scores s = scale * q.k are accumulated in `acc` and kept in `score`; weights p = exp(s - m) are computed in
    `acc` with a relative error of at most `exp_ulps` units in the last place, rounded to `p`, multiplied by V and
    accumulated in `acc`; the normaliser l is summed in `acc`.

    Where `q`, `k` or `v` are declared as codes, these are what is multiplied, and the exact result is that of the numbers
    they stand for. P is multiplied by `p_scale` before it is rounded. Gradients of such methods are not judged.

    The backward pass computes P = exp(s - lse) again from the stored log-sum-exp (or has kept it), dP = dO V^T,
    delta = dO.O, dS = P (dP - delta) in `acc`, rounds dS to `ds` and P to `p`, and accumulates their products in `acc`.

    Raises RequestError where a format or word is unknown or where the fields contradict each other.
    """

    #: shown where an allowance is explained
    name: str
    #: format of Q, K and V
    input: str
    #: format of the output
    output: str
    #: format that scores are kept in between the first product and the exponential
    score: str = "fp32"
    #: format of both accumulators and of all arithmetic on scores and weights
    acc: str = "fp32"
    #: format that operands of a product are rounded to before multiplying (tf32 for fp32 inputs on tensor cores)
    operand: str | None = None
    #: Q as it is multiplied, where it is quantised: a `Codes`
    q: Codes | None = None
    #: the same for K
    k: Codes | None = None
    #: the same for V
    v: Codes | None = None
    #: format that the weights are rounded to for the second product
    p: str = "fp32"
    #: what the weights are multiplied by before they are rounded to `p`, such as 2^8 for e4m3 (FlashAttention-3), so that
    #: fewer of them are subnormal
    p_scale: float = 1.0
    #: format of the log-sum-exp
    lse: str = "fp32"
    #: largest error of exp or exp2 in units in the last place of `acc` (PTX: ex2.approx.f32 within 2)
    exp_ulps: float = 2.0
    #: "after": (sum p v) / l with p = 1 at the maximum, as flash kernels do; "before": sum round(p / l) v; "any": one
    #: of the two, or p relative to something else than the maximum
    normalise: str = "any"
    #: whether l sums p before or after its rounding to `p`
    sum_of: str = "unrounded"
    #: weights below the smallest normal number of `acc` may become 0 (ftz)
    flush: bool = True
    #: the fewest keys a step, which limits how often sums are rescaled to a new maximum; for the bound
    smallest_block: int = 1
    #: l is summed in blocks of so many keys, then over the blocks; None: key by key. For the predicted noise only:
    #: the bound holds for every order.
    sum_block: int | None = None
    #: the same for the second product
    product_block: int | None = None
    #: largest error of tanh, in unit roundoffs of `acc`
    tanh_error: float = 8.0
    #: what it is relative to: "tanh", or "one", since 1 - 2 / (1 + exp(2 x)) cancels near 0
    tanh_of: str = "one"
    #: format that dP is kept in before delta is subtracted
    dp: str = "fp32"
    #: format that dS is rounded to for the products with Q and K
    ds: str = "fp32"
    #: delta from the output "rounded" to `output` or "unrounded" (as sum P dP does), or "any" of these
    delta_of: str = "any"
    #: whether gradients of K and V are added up over a group of query heads in `acc`, or each rounded to `input`
    #: before, or "any"
    group_sum: str = "any"
    #: dK and dV are kept in `input` and rounded to it after every so many queries; None: kept in `acc`
    stored_keys: int | None = None
    #: the same for dQ, after every so many keys
    stored_queries: int | None = None
    #: how a matrix unit sums products: a name of `dots.MODELS`, such as "hopper"; "ieee" is any order of additions, each
    #: rounded to nearest
    dot: str = dots.ANY

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and self.name.isprintable()):
            raise RequestError(
                f"numerics {self.name!r}: its name goes into reports and terminals; expected a string without control"
                " characters"
            )
        for field in ("input", "output", "score", "acc", "p", "lse", "dp", "ds"):
            formats.get(getattr(self, field))
        if self.operand is not None:
            formats.get(self.operand)
        dots.get(self.dot)
        for field in ("input", "output", "score", "acc", "lse", "dp", "ds", "operand"):
            if getattr(self, field) is not None and formats.get(getattr(self, field)).integer:
                raise RequestError(
                    f"numerics {self.name!r}: {field} is {getattr(self, field)!r}, a format of codes; expected a"
                    " floating-point format (q, k, v and p may be int8)"
                )
        self._check_codes()
        for field, words in (
            ("normalise", NORMALISE),
            ("sum_of", SUM_OF),
            ("delta_of", DELTA_OF),
            ("group_sum", GROUP_SUM),
            ("tanh_of", TANH_OF),
        ):
            if getattr(self, field) not in words:
                raise RequestError(
                    f"numerics {self.name!r}: {field} is {getattr(self, field)!r}; expected {' or '.join(words)}"
                )
        if not 1.0 <= self.tanh_error < LARGEST_ERROR:
            raise RequestError(
                f"numerics {self.name!r}: tanh_error is {self.tanh_error!r}; expected the largest error of tanh in unit "
                f"roundoffs, at least 1 and below {LARGEST_ERROR}"
            )
        if not 0.5 <= self.exp_ulps < LARGEST_ERROR:
            raise RequestError(
                f"numerics {self.name!r}: exp_ulps is {self.exp_ulps!r}; expected the largest error of exp in units "
                f"in the last place, at least 0.5 (correct rounding) and below {LARGEST_ERROR}"
            )
        for field in ("smallest_block", "sum_block", "product_block", "stored_keys", "stored_queries"):
            size = getattr(self, field)
            if not (isinstance(size, int) and size >= 1) and (size is not None or field == "smallest_block"):
                raise RequestError(f"numerics {self.name!r}: {field} is {size!r}; expected 1 or more keys")
        acc = formats.get(self.acc).precision
        for field in ("score", "p", "output", "dp", "ds"):
            given = formats.get(getattr(self, field))
            if given.precision > acc:
                raise RequestError(
                    f"numerics {self.name!r}: {field} is {given.name}, wider than the accumulator {self.acc} that it "
                    f"comes from; declare {field}={self.acc!r} or a wider acc"
                )
        if (
            self.operand is not None
            and formats.get(self.operand).precision > formats.get(self.input).precision
        ):
            raise RequestError(
                f"numerics {self.name!r}: operands of {self.operand} are wider than the input {self.input}; "
                "leave operand out"
            )

    def _check_codes(self) -> None:
        """Raises RequestError where what is declared of codes contradicts itself."""
        for field in ("q", "k", "v"):
            codes = getattr(self, field)
            if codes is not None and not isinstance(codes, Codes):
                raise RequestError(
                    f"numerics {self.name!r}: {field} is {codes!r}; expected a Codes, such as"
                    ' Codes(format="e4m3", scale="tensor"), or None'
                )
        for field in ("q", "k"):
            codes = getattr(self, field)
            if codes is not None and codes.scale == "channel":
                raise RequestError(
                    f"numerics {self.name!r}: {field} has a scale per channel, which cannot be taken out of a sum over"
                    ' the channels; declare scale="tensor", "head" or "block"'
                )
        if self.operand is not None and self.quantised:
            raise RequestError(
                f"numerics {self.name!r}: operands of {self.operand} and codes exclude each other; leave operand out"
            )
        p = formats.get(self.p)
        if not 0.0 < self.p_scale <= p.largest:
            raise RequestError(
                f"numerics {self.name!r}: p_scale is {self.p_scale!r}; expected what weights up to 1 are multiplied by,"
                f" above 0 and at most {p.largest:g}, the largest of {p.name}"
            )
        if p.integer and self.p_scale == 1.0:
            raise RequestError(
                f"numerics {self.name!r}: weights up to 1 rounded to {p.name} without a p_scale would be 0 or 1;"
                f" declare p_scale={p.largest:g}"
            )

    @property
    def title(self) -> str:
        """Its quoted name, and what differs from the preset of that name: "'flash fp16' with score=fp16"."""
        presets = (one for by_dtype in PRESETS.values() for one in by_dtype.values())
        preset = next((one for one in presets if one.name == self.name), self)
        changed = [
            f"{field.name}={value.text if isinstance(value, Codes) else value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) != getattr(preset, field.name)
        ]
        return f"{self.name!r}{' with ' if changed else ''}{', '.join(changed)}"

    def format(self, field: str) -> Format:
        """The format that a field names."""
        return formats.get(getattr(self, field))

    @property
    def operand_format(self) -> Format | None:
        """The format that inputs are rounded to before multiplying, or None where they are used as they are."""
        return None if self.operand in (None, self.input) else formats.get(self.operand)

    @property
    def quantised(self) -> bool:
        """Whether Q, K or V become codes."""
        return any(codes is not None for codes in (self.q, self.k, self.v))

    @property
    def narrow_p(self) -> bool:
        """Whether P is rounded to fewer bits than bf16 has: its subnormals matter, and each rounding is looked at alone."""
        return self.format("p").precision < formats.get("bf16").precision

    def multiplied(self, operand: str) -> Format:
        """The format in which "q", "k" or "v" is multiplied."""
        codes: Codes | None = getattr(self, operand)
        return formats.get(self.operand or self.input) if codes is None else codes.code_format

    @property
    def dot_block(self) -> dots.Block | None:
        """How the declared unit sums products of Q and K; None where they are added one by one."""
        return self._block(self.multiplied("q"), self.multiplied("k"))

    @property
    def value_block(self) -> dots.Block | None:
        """The same for products of P and V."""
        if self.v is None and not self.narrow_p:
            return dots.get(self.dot).get(self.operand or self.input)
        return self._block(self.format("p"), self.multiplied("v"))

    def _block(self, *factors: Format) -> dots.Block | None:
        # Of two formats the wider one: the other is converted to it, as a unit has one kind of operands.
        return dots.get(self.dot).get(max(factors, key=lambda fmt: fmt.precision).name)

    @property
    def exact_products(self) -> bool:
        """Whether a product of Q and K is a number of `acc`, so that it is never rounded (underflow apart)."""
        return self.multiplied("q").precision + self.multiplied("k").precision <= self.format("acc").precision

    @property
    def rounds_p(self) -> bool:
        """Whether the weights lose bits before the second product."""
        return self.format("p").precision < self.format("acc").precision

    @property
    def rounds_ds(self) -> bool:
        """Whether dS loses bits before the products with Q and K."""
        return self.format("ds").precision < self.format("acc").precision

    def replace(self, **changes: Any) -> Numerics:
        """A copy with some fields changed, validated again. Raises RequestError for an unknown field."""
        known = [f.name for f in fields(self)]
        for name in changes:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise RequestError(
                    f"numerics has no field {name!r}: expected one of {', '.join(known)}{hint}"
                )
        return replace(self, **changes)


def _presets(kind: str, **given: Any) -> dict[str, Numerics]:
    """The same numerics for each dtype of the inputs; p="input" stands for that dtype, and dS is rounded as P is."""
    out = {}
    for dtype in ("fp16", "bf16", "fp32"):
        changed: dict[str, Any] = given | ({"p": dtype, "ds": dtype} if given["p"] == "input" else {})
        out[dtype] = Numerics(name=f"{kind} {dtype}", input=dtype, output=dtype, **changed)
    return out


#: What is held against a kernel that declares nothing: scores, weights, l and the output in fp32 until the end, P
#: rounded to the inputs' dtype for the second product only, before or after it is divided by l, relative to the
#: maximum or not, l the sum of the unrounded weights. Sums may run in any order, key by key at worst.
DEFAULT: dict[str, Numerics] = _presets("default", p="input")

#: Flash kernels: the same, with l summed block by block, and a tanh that keeps its digits near 0.
FLASH: dict[str, Numerics] = _presets(
    "flash", p="input", normalise="after", smallest_block=16, sum_block=64, tanh_of="tanh"
)

#: torch's scaled_dot_product_attention on CPU, fused path: measured to round as FLASH does in all three dtypes. In fp16
#: and bf16 its exp is a polynomial of degree 3 (torch 2.13: relative error up to 1.1e-4, so that the log-sum-exp of 97
#: equal scores is off by 5e-5; one of 1 key, which is not vectorised, by 1e-7).
TORCH_FLASH: dict[str, Numerics] = {
    dtype: preset.replace(exp_ulps=2.0 if dtype == "fp32" else 1024.0)
    for dtype, preset in _presets(
        "torch-flash", p="input", normalise="after", smallest_block=16, sum_block=64
    ).items()
}

#: torch's math path: fp16 and bf16 are computed in fp32 (torch 2.5 and later), weights normalised before they
#: multiply V, one rounding at the end.
TORCH_MATH: dict[str, Numerics] = _presets("torch-math", p="fp32", normalise="before", sum_block=64)

#: FlashAttention-2: as FLASH, at least 32 keys a step (its smallest tile).
FA2: dict[str, Numerics] = {
    dtype: preset.replace(name=f"fa2 {dtype}", smallest_block=32)
    for dtype, preset in FLASH.items()
    if dtype != "fp32"
}

#: FlashAttention-3 (arXiv 2407.08608): Hopper's matrix unit, at least 64 keys a step.
FA3: dict[str, Numerics] = {
    dtype: preset.replace(name=f"fa3 {dtype}", smallest_block=64, dot="hopper")
    for dtype, preset in FA2.items()
}

#: FlashAttention-4: exp2 by a polynomial of degree 3 on ordinary units, off by up to 8.8e-5 relative; sums are rescaled
#: only where the maximum grew by more than 8 (in log2), so P may be as large as 2^8 and is relative to a former maximum.
FA4: dict[str, Numerics] = {
    dtype: preset.replace(
        name=f"fa4 {dtype}", smallest_block=128, dot="blackwell", exp_ulps=736.0, normalise="any"
    )
    for dtype, preset in FA2.items()
}

#: torch's FlexAttention: its Triton template, which is a flash kernel; scores of any form, in fp32.
FLEX: dict[str, Numerics] = {
    dtype: preset.replace(name=f"flex {dtype}", tanh_of="one") for dtype, preset in FLASH.items()
}

_E4M3_TENSOR = Codes(format="e4m3", scale="tensor")
_E4M3_BLOCK = Codes(format="e4m3", scale="block", rows=64)
_INT8_BLOCK = Codes(format="int8", scale="block", rows=64)

#: Attention in e4m3 as FlashAttention-3 does it: Q, K and V with a scale per tensor, P as e4m3 after an offset of 2^8, sums in
#: fp32, the output in the dtype of the inputs. Hopper's unit sums e4m3 in 14 bits: on one, .replace(dot="hopper").
FP8_TENSOR: dict[str, Numerics] = {
    dtype: FLASH[dtype].replace(
        name=f"fp8-tensor {dtype}", q=_E4M3_TENSOR, k=_E4M3_TENSOR, v=_E4M3_TENSOR, p="e4m3", p_scale=256.0
    )
    for dtype in ("fp16", "bf16")
}

#: The same with a scale for each 64 rows of a head (FlashAttention-3, section 3.3, block quantisation).
FP8_BLOCK: dict[str, Numerics] = {
    dtype: preset.replace(name=f"fp8-block {dtype}", q=_E4M3_BLOCK, k=_E4M3_BLOCK, v=_E4M3_BLOCK)
    for dtype, preset in FP8_TENSOR.items()
}

#: Q and K as int8 with a scale for each 64 rows of a head, P and V in the dtype of the inputs, sums of P V in fp32, as
#: SageAttention (arXiv 2410.02367) does where it keeps its accumulator in fp32; without its smoothing of K.
INT8_BLOCK: dict[str, Numerics] = {
    dtype: FLASH[dtype].replace(name=f"int8-block {dtype}", q=_INT8_BLOCK, k=_INT8_BLOCK)
    for dtype in ("fp16", "bf16")
}

#: name -> dtype -> numerics
PRESETS: dict[str, dict[str, Numerics]] = {
    "default": DEFAULT,
    "flash": FLASH,
    "torch-flash": TORCH_FLASH,
    "torch-math": TORCH_MATH,
    "fa2": FA2,
    "fa3": FA3,
    "fa4": FA4,
    "flex": FLEX,
    "fp8-tensor": FP8_TENSOR,
    "fp8-block": FP8_BLOCK,
    "int8-block": INT8_BLOCK,
}


def for_dtype(dtype: str, preset: str = "default") -> Numerics:
    """A preset by the dtype of the inputs; "default" is for kernels that declare nothing.

    Raises RequestError for an unknown preset, or a dtype that it has no entry for.
    """
    dtypes_of(preset)
    try:
        return PRESETS[preset][dtype]
    except KeyError:
        raise RequestError(
            f"no numerics for dtype {dtype!r}: {preset} is declared for {', '.join(PRESETS[preset])}"
        ) from None


def dtypes_of(preset: str) -> tuple[str, ...]:
    """The dtypes that a preset is for; RequestError for an unknown one."""
    if preset not in PRESETS:
        close = get_close_matches(str(preset), PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise RequestError(f"unknown numerics {preset!r}: expected one of {', '.join(PRESETS)}{hint}")
    return tuple(PRESETS[preset])
