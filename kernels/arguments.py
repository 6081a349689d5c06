"""What the kernels' host functions accept. Tensors come from anywhere, so each check names what it saw."""

from __future__ import annotations

import contextlib
import itertools
import math
import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from effattn.errors import ArgumentError, ArgumentTypeError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENTS = ("bottom-right", "top-left")
#: what `tl.dot` takes for float32 operands
INPUT_PRECISIONS = ("ieee", "tf32", "tf32x3", "bf16x3", "bf16x6")
MAX_HEAD_DIM = 256
#: above this, 32-bit row and key numbers could overflow where the mask adds three of them
MAX_LENGTH = 2**29
#: CUDA's limit on the first axis of a grid
MAX_PROGRAMS = 2**31 - 1
_MAX_FLOAT32 = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One attention problem after checking: plain numbers, nothing optional left."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int  #: of the longest member where sequences are packed
    kv_len: int
    head_dim: int
    v_dim: int
    bottom_right: bool = False  #: shift = kv_len - q_len, else 0; see `effattn.kernels.mask`
    left: int  #: query i sees i + shift - left <= j
    right: int  #: and j <= i + shift + right; both more than any length if there is no limit
    scale: float
    softcap: float = 0.0  #: 0 if there is none
    dropout_p: float = 0.0
    dropout_seed: int = 0
    dropout_offset: int = 0
    packed: bool = False  #: sequences follow each other along one axis; lengths are cumulative
    input_precision: str = "ieee"

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.heads // self.kv_heads

    @property
    def has_left(self) -> bool:
        """Whether any query is kept from an early key by its position."""
        return self.left < max(self.q_len, self.kv_len)


@dataclass(frozen=True, kw_only=True)
class Extras:
    """The optional tensors of a problem; bias and mask expanded to (batch, heads, q_len, kv_len)."""

    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None  #: bytes, not 0 = may be seen
    alibi_slopes: torch.Tensor | None = None  #: (batch, heads)
    sinks: torch.Tensor | None = None
    q_lengths: torch.Tensor | None = None  #: cumulative where the problem is packed
    kv_lengths: torch.Tensor | None = None


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """The shapes of (batch, heads, length, dim) tensors fit each other."""
    shapes = f"q {_shape(q)}, k {_shape(k)}, v {_shape(v)}"
    if not q.shape[0] == k.shape[0] == v.shape[0]:
        raise ArgumentError(f"q, k and v must have the same batch size (axis 0), got {shapes}")
    if v.shape[1] != k.shape[1] or v.shape[2] != k.shape[2]:
        raise ArgumentError(f"k and v must have the same heads and length (axes 1 and 2), got {shapes}")
    if k.shape[3] != q.shape[3]:
        raise ArgumentError(
            f"q and k must have the same head_dim (axis 3), got {q.shape[3]} and {k.shape[3]}: {shapes}"
        )
    heads, kv_heads = q.shape[1], k.shape[1]
    if heads == 0 or kv_heads == 0 or heads % kv_heads:
        raise ArgumentError(
            f"the heads of q ({heads}) must be a multiple of the heads of k and v ({kv_heads}), both"
            f" positive: {shapes}"
        )
    for name, dim in (("head_dim", q.shape[3]), ("v_dim", v.shape[3])):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise ArgumentError(f"{name} must be 1 to {MAX_HEAD_DIM}, got {dim}: {shapes}")
    for name, length in (("q_len", q.shape[2]), ("kv_len", k.shape[2])):
        if length > MAX_LENGTH:
            raise ArgumentError(f"{name} must be at most {MAX_LENGTH}, got {length}: {shapes}")
    # Blocks of 16 are the smallest, so this holds whatever the block size.
    if q.shape[0] * heads * -(-max(q.shape[2], k.shape[2]) // 16) > MAX_PROGRAMS:
        raise ArgumentError(
            f"batch x heads x length is too large for one launch ({MAX_PROGRAMS} blocks): {shapes}"
        )


def problem_of(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bottom_right: bool,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    input_precision: str,
    lengths: tuple[int, int] | None = None,
    **rest: Any,
) -> Problem:
    """The `Problem` of checked tensors and numbers; left and right -1 where there is no limit.

    lengths: those of the longest members, where the axes of q and k are packed.
    """
    q_len, kv_len = (q.shape[2], k.shape[2]) if lengths is None else lengths
    far = max(q_len, kv_len)
    return Problem(
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        q_len=q_len,
        kv_len=kv_len,
        head_dim=q.shape[3],
        v_dim=v.shape[3],
        bottom_right=bottom_right,
        left=far if left < 0 else min(left, far),
        right=far if right < 0 else min(right, far),
        scale=scale,
        softcap=softcap,
        # The products of 16-bit floats are exact in float32: one spelling, one compiled kernel.
        input_precision=input_precision if q.dtype == torch.float32 else "ieee",
        **rest,
    )


class Numbers(NamedTuple):
    """The options of a call that are not tensors, checked, in the order in which the operators take them."""

    bottom_right: bool
    left: int  #: -1 = no limit
    right: int
    scale: float
    softcap: float
    dropout_p: float
    dropout_seed: int
    dropout_offset: int
    input_precision: str


def check_numbers(
    head_dim: int,
    *,
    causal: Any = False,
    causal_alignment: Any = "bottom-right",
    scale: Any = None,
    window: Any = None,
    softcap: Any = None,
    dropout_p: Any = 0.0,
    dropout_seed: Any = 0,
    dropout_offset: Any = 0,
    input_precision: Any = "ieee",
) -> Numbers:
    """Raises ArgumentTypeError for a wrong type, ArgumentError for a wrong value."""
    check_flag("causal", causal)
    check_choice("causal_alignment", causal_alignment, ALIGNMENTS)
    check_choice("input_precision", input_precision, INPUT_PRECISIONS)
    left, right = check_window(window)
    p, seed, offset = check_dropout(dropout_p, dropout_seed, dropout_offset)
    scale = check_scale(scale, head_dim)
    return Numbers(
        bottom_right=causal_alignment == "bottom-right",
        left=left,
        right=0 if causal else right,
        scale=scale,
        softcap=check_softcap(softcap, scale),
        dropout_p=p,
        dropout_seed=seed,
        dropout_offset=offset,
        input_precision=input_precision,
    )


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def check_window(window: Any) -> tuple[int, int]:
    """(left, right), -1 for no limit."""
    expected = "window must be None, an int, or (left, right) with -1 for no limit"
    sides = (window, window) if isinstance(window, int) else (-1, -1) if window is None else window
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise ArgumentTypeError(f"{expected}, got {window!r}")
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, int):
            raise ArgumentTypeError(f"{expected}, got {window!r}")
        if side < -1:
            raise ArgumentError(f"{expected}, got {window!r}")
    return sides[0], sides[1]


def check_softcap(softcap: Any, scale: float) -> float:
    """The cap as a float, 0.0 for None."""
    if softcap is None:
        return 0.0
    if isinstance(softcap, bool) or not isinstance(softcap, numbers.Real):
        raise ArgumentTypeError(
            f"softcap must be a positive number or None, got {softcap!r} of type {type(softcap).__name__}"
        )
    softcap = _float(softcap)
    if not 0 < softcap * math.log2(math.e) <= _MAX_FLOAT32 or not abs(scale) / softcap <= _MAX_FLOAT32:
        raise ArgumentError(
            f"softcap must be positive and finite, and scale / softcap fit float32, got {softcap!r}"
        )
    return softcap


def check_dropout(p: Any, seed: Any, offset: Any) -> tuple[float, int, int]:
    if isinstance(p, bool) or not isinstance(p, numbers.Real):
        raise ArgumentTypeError(f"dropout_p must be a number, got {p!r} of type {type(p).__name__}")
    if not 0 <= float(p) < 1:
        raise ArgumentError(f"dropout_p must be in [0, 1), got {p!r}")
    for name, value in (("dropout_seed", seed), ("dropout_offset", offset)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ArgumentTypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
        if not 0 <= value < 2**62:
            raise ArgumentError(f"{name} must be in [0, 2^62), got {value}")
    return float(p), seed, offset


def check_extras(
    q: torch.Tensor,
    kv_len: int,
    *,
    bias: Any = None,
    mask: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    q_len: int | None = None,
) -> Extras:
    """Bring the optional tensors into one form; only shapes, dtypes and devices are looked at.

    q_len and kv_len: those of the longest members, where sequences are packed.
    """
    batch, heads = q.shape[:2]
    full = (batch, heads, q.shape[2] if q_len is None else q_len, kv_len)
    seen = {
        "bias": (bias, (q.dtype, torch.float32)),
        "mask": (mask, (torch.bool,)),
        "alibi_slopes": (alibi_slopes, (torch.float32,)),
        "sinks": (sinks, (torch.float32,)),
        "q_lengths": (q_lengths, (torch.int32,)),
        "kv_lengths": (kv_lengths, (torch.int32,)),
    }
    for name, (x, dtypes) in seen.items():
        if x is not None:
            check_extra(name, x, dtypes, q)
    if bias is not None:
        bias = _expanded("bias", bias, full)
    if mask is not None:
        mask = _expanded("mask", mask, full).view(torch.uint8)
    if alibi_slopes is not None:
        if tuple(alibi_slopes.shape) not in ((heads,), (batch, heads)):
            raise ArgumentError(
                f"alibi_slopes must have the shape ({heads},) or ({batch}, {heads}), got {_shape(alibi_slopes)}"
            )
        alibi_slopes = alibi_slopes.expand(batch, heads)
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise ArgumentError(f"sinks must have the shape ({heads},), one logit a head, got {_shape(sinks)}")
    for name, x in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths)):
        if x is not None and tuple(x.shape) != (batch,):
            raise ArgumentError(
                f"{name} must have the shape ({batch},), one length a member, got {_shape(x)}"
            )
    return Extras(
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=None if sinks is None else sinks.contiguous(),
        q_lengths=None if q_lengths is None else q_lengths.contiguous(),
        kv_lengths=None if kv_lengths is None else kv_lengths.contiguous(),
    )


def check_extra(name: str, x: Any, dtypes: tuple[torch.dtype, ...], q: torch.Tensor) -> None:
    """A dense tensor of one of some dtypes, on the device of q."""
    check_dense(name, x)
    if x.dtype not in dtypes:
        wanted = " or ".join(dict.fromkeys(str(d).removeprefix("torch.") for d in dtypes))
        instead = (
            "pass what may be seen as mask"
            if name == "bias" and x.dtype == torch.bool
            else "convert it first"
        )
        raise ArgumentTypeError(f"{name} must be {wanted}, got {_dtype(x)}; {instead}")
    if x.device != q.device:
        raise ArgumentTypeError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def check_lengths(name: str, lengths: torch.Tensor | None, most: int) -> None:
    """The values of a tensor of lengths. Reads them: on a GPU this waits for it."""
    if lengths is None or lengths.numel() == 0:
        return
    values = lengths.tolist()
    for b, value in enumerate(values):
        if not 0 <= value <= most:
            raise ArgumentError(f"{name} must be 0 to {most}, got {value} for member {b}")


def check_packed(q: torch.Tensor, cu_seqlens_q: Any, cu_seqlens_k: Any) -> int:
    """The batch size of packed sequences; looks at shapes, dtypes and devices."""
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_extra(name, x, (torch.int32,), q)
        if x.dim() != 1 or x.shape[0] < 1:
            raise ArgumentError(f"{name} must have the shape (batch + 1,), got {_shape(x)}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ArgumentError(
            "cu_seqlens_q and cu_seqlens_k must have one length, batch + 1, got"
            f" {cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )
    return cu_seqlens_q.shape[0] - 1


def check_cumulative(name: str, lengths: torch.Tensor, total: int, longest: int) -> None:
    """Cumulative lengths rise from 0 to the total. Reads them: on a GPU this waits for it."""
    values = lengths.tolist()
    if values[0] != 0 or values[-1] != total:
        raise ArgumentError(
            f"{name} must begin with 0 and end with the total length {total}, got {values[0]} and {values[-1]}"
        )
    for b, (start, end) in enumerate(itertools.pairwise(values)):
        if end < start:
            raise ArgumentError(f"{name} must not fall, got {start} and then {end} for member {b}")
        if end - start > longest:
            raise ArgumentError(
                f"{name}: member {b} has {end - start} rows, more than the longest length given, {longest}"
            )


def _expanded(name: str, x: torch.Tensor, full: tuple[int, ...]) -> torch.Tensor:
    sizes = (1,) * (4 - x.dim()) + tuple(x.shape)
    if x.dim() > 4 or any(size not in (1, wanted) for size, wanted in zip(sizes, full, strict=False)):
        raise ArgumentError(
            f"{name} must be broadcastable to (batch, heads, q_len, kv_len) = {full}, got {_shape(x)}"
        )
    return x.expand(full)


@contextmanager
def on_device(x: torch.Tensor) -> Iterator[None]:
    """Launch on the device of a tensor."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield


def check_dense(name: str, x: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise ArgumentTypeError(
            f"{name} must be a torch.Tensor, got {type(x).__module__}.{type(x).__qualname__}"
        )
    if x.layout != torch.strided or x.is_quantized:
        raise ArgumentTypeError(f"{name} must be a dense tensor, got the layout {x.layout}")


BATCHED = ("batch", "heads", "length", "head_dim")
PACKED = ("total length", "heads", "head_dim")


def check_tensors(axes: tuple[str, ...] = BATCHED, /, **tensors: Any) -> None:
    """Dense tensors with these axes, of one supported dtype, on one device."""
    for name, x in tensors.items():
        check_dense(name, x)
        if x.dtype not in DTYPES:
            raise ArgumentTypeError(
                f"{name} must be float16, bfloat16 or float32, got {_dtype(x)}; convert it first"
            )
        if x.dim() != len(axes):
            raise ArgumentError(
                f"{name} must have the {len(axes)} axes ({', '.join(axes)}), got {x.dim()}: {_shape(x)}"
            )
    if len({x.dtype for x in tensors.values()}) > 1:
        seen = ", ".join(f"{name} {_dtype(x)}" for name, x in tensors.items())
        raise ArgumentTypeError(f"all tensors must have one dtype, got {seen}")
    if len({x.device for x in tensors.values()}) > 1:
        seen = ", ".join(f"{name} {x.device}" for name, x in tensors.items())
        raise ArgumentTypeError(f"all tensors must be on one device, got {seen}")
    device = next(iter(tensors.values())).device
    if device.type not in ("cpu", "cuda"):
        raise ArgumentTypeError(f"tensors must be on the CPU or on a CUDA device, got {device}")


def check_scale(scale: Any, head_dim: int) -> float:
    """The scale as a float, 1/sqrt(head_dim) for None."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise ArgumentTypeError(
            f"scale must be a real number or None, got {scale!r} of type {type(scale).__name__}"
        )
    scale = _float(scale)
    # The kernel multiplies by float32(scale * log2(e)).
    if not abs(scale) * math.log2(math.e) <= _MAX_FLOAT32:
        raise ArgumentError(f"scale must be finite and fit float32, got {scale!r}")
    return scale


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ArgumentError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_block(name: str, block: Any) -> None:
    if block is None:
        return
    if isinstance(block, bool) or not isinstance(block, int):
        raise ArgumentTypeError(
            f"{name} must be an int or None, got {block!r} of type {type(block).__name__}"
        )
    if block < 16 or block & (block - 1):
        raise ArgumentError(f"{name} must be a power of two of at least 16, got {block}")


def check_no_tangents(function: str, *values: Any) -> None:
    """Raise ArgumentError where a tensor carries a forward-mode tangent, which would be dropped."""
    for x in values:
        if isinstance(x, torch.Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise no_forward_mode(function)


def no_forward_mode(function: str) -> ArgumentError:
    return ArgumentError(
        f"forward-mode derivatives (torch.func.jvp, jacfwd, forward_ad) of {function} are not offered; use reverse mode"
        " (torch.func.vjp, jacrev, backward) where there is a gradient, or effattn.exact.attention"
    )


def _float(x: Any) -> float:
    try:
        return float(x)
    except OverflowError:  # an int of more than 1,024 bits
        return math.inf if x > 0 else -math.inf


def _shape(x: torch.Tensor) -> str:
    return str(tuple(x.shape))


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
