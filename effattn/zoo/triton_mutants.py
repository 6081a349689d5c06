"""Wrong Triton kernels: the source of `effattn.kernels.flash_forward` or of its mask with one mistake put in.

They differ from the torch kernels of the zoo in that they are compiled and run as a user's kernel would be,
so a test with them is one of the whole way from a kernel's source to a verdict. The command line takes them
too: `effattn gate effattn.zoo.triton_mutants:no_rescale`.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import linecache
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from effattn.errors import RequestError

ALL = ("fp16", "bf16", "fp32")
HALF = ("fp16", "bf16")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A mistake as an edit of the source, and a case in which it shows."""

    name: str
    #: the mistake, in words
    what: str
    #: (text of the source, what replaces it); each text occurs exactly once
    edits: tuple[tuple[str, str], ...]
    #: where it makes a difference
    dtypes: tuple[str, ...]
    #: fields of a `Case` in which it shows, besides `dtype`
    case: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        """The wrong kernel's host function."""
        return _module(self).flash_attention_forward


_MUTANTS: dict[str, Mutant] = {}

#: more than one block of queries and of keys, the last ones partly filled
_PLAIN = {"heads": 2, "q_len": 100, "kv_len": 150, "head_dim": 32}
_CAUSAL = {**_PLAIN, "causal": "bottom-right"}
#: enough rows for an error that hides inside the bound to stand out of the noise
_MANY = {"heads": 8, "q_len": 256, "kv_len": 256, "head_dim": 32}


def _mutant(
    name: str,
    what: str,
    *edits: tuple[str, str],
    case: dict[str, Any] = _PLAIN,
    dtypes: tuple[str, ...] = ALL,
) -> None:
    _MUTANTS[name] = Mutant(name=name, what=what, edits=edits, dtypes=dtypes, case=case)


_mutant(
    "no_rescale",
    "the accumulator is not rescaled when the maximum grows",
    ("acc * decay[:, None]", "acc"),
    case={**_PLAIN, "values": "growing-max"},
)
_mutant(
    "sum_not_rescaled",
    "the normaliser is not rescaled when the maximum grows",
    ("row_sum * decay + tl.sum", "row_sum + tl.sum"),
    case={**_PLAIN, "values": "growing-max"},
)
_mutant(
    "no_maximum",
    "exp of the scores as they are, without subtracting their maximum",
    (
        "new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)",
        'new_max = tl.where(tl.maximum(row_max, tl.max(scores, 1)) > float("-inf"), 0.0, float("-inf"))',
    ),
    case={**_PLAIN, "values": "large-logits"},
)
_mutant(
    "weights_truncated",
    "the weights are cut off to the inputs' dtype instead of rounded",
    ("weights.to(v_tile.dtype)", "_cut(weights, v_tile.dtype)"),
    (
        "@triton.jit\ndef _attend(",
        """@triton.jit
def _cut(x, dtype: tl.constexpr):
    bits = x.to(tl.int32, bitcast=True)
    bits = bits & (-65536 if dtype == tl.bfloat16 else -8192)
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def _attend(""",
    ),
    case=_MANY,
    dtypes=HALF,
)
_mutant(
    "scores_rounded",
    "the scores are rounded to the inputs' dtype",
    (
        "tl.trans(k_tile), input_precision=INPUT_PRECISION)",
        "tl.trans(k_tile), input_precision=INPUT_PRECISION).to(q_tile.dtype).to(tl.float32)",
    ),
    case=_MANY,
    dtypes=HALF,
)
_mutant(
    "accumulator_rounded",
    "the accumulator is rounded to the inputs' dtype after each block of keys",
    (
        "    return acc, row_sum, row_max, spoilt",
        "        acc = acc.to(v_tile.dtype).to(tl.float32)\n    return acc, row_sum, row_max, spoilt",
    ),
    case={**_MANY, "kv_len": 1024},
    dtypes=HALF,
)
_mutant(
    "tf32",
    "products of fp32 go through tf32",
    ("        input_precision=input_precision,\n", '        input_precision="tf32",\n'),
    dtypes=("fp32",),
)
_mutant(
    "causal_one_more",
    "a query sees one key too many",
    ("* bottom_right\n", "* bottom_right + (right == 0).to(tl.int32)\n"),
    case=_CAUSAL,
)
_mutant(
    "causal_one_less",
    "a query does not see the key at its own position",
    ("* bottom_right\n", "* bottom_right - (right == 0).to(tl.int32)\n"),
    case=_CAUSAL,
)
_mutant(
    "other_alignment",
    "the causal mask starts at the top left whatever is asked for",
    ("        causal_alignment=causal_alignment,\n", '        causal_alignment="top-left",\n'),
    case=_CAUSAL,
)
_mutant(
    "causal_ignored",
    "causal is accepted and ignored",
    ("        causal=causal,\n", "        causal=False,\n"),
    case=_CAUSAL,
)
_mutant(
    "tail_attended",
    "keys beyond kv_len are attended with score 0",
    (
        "end = tl.minimum(i + shift + right + 1, kv_len)\n",
        "end = i + shift + right + 1\n",
    ),
)
_mutant(
    "tail_dropped",
    "the last block of keys is dropped where it is not full",
    ("    end = tl.maximum(end, 0)\n", "    end = tl.maximum(end, 0) // BLOCK_N * BLOCK_N\n"),
)
_mutant(
    "heads_interleaved",
    "query head h reads key head h % kv_heads",
    ("kv_h = ((head % heads) // group)", "kv_h = (head % (heads // group))"),
    case={**_PLAIN, "heads": 4, "kv_heads": 2},
)
_mutant(
    "head_offset_missing",
    "all heads read the first head's keys",
    ("k_head = k + b * k_stride_b + kv_h * k_stride_h", "k_head = k + b * k_stride_b"),
)
_mutant(
    "strides_ignored",
    "tensors are taken for contiguous",
    ('("q", q, "bhmd")', '("q", q.contiguous(), "bhmd")'),
    ('("k", k, "bhnd")', '("k", k.contiguous(), "bhnd")'),
    ('("v", v, "bhnd")', '("v", v.contiguous(), "bhnd")'),
    case={**_PLAIN, "layout": "bshd"},
)
_mutant(
    "padded_scale",
    "the scale is that of the padded head dimension",
    ("abs(problem.scale) * _LOG2_E", "max(16, 1 << (problem.head_dim - 1).bit_length()) ** -0.5 * _LOG2_E"),
    case={**_PLAIN, "head_dim": 40},
)
_mutant(
    "scale_ignored",
    "the scale is accepted and ignored",
    ("abs(problem.scale) * _LOG2_E", "problem.head_dim ** -0.5 * _LOG2_E"),
    case={**_PLAIN, "scale": 0.3},
)
_mutant(
    "scale_sign_ignored",
    "a negative scale is taken for a positive one",
    ('"SCALE_SIGN": (problem.scale > 0) - (problem.scale < 0)', '"SCALE_SIGN": 1'),
    case={**_PLAIN, "scale": -0.2},
)
_mutant(
    "exp_for_exp2",
    "scores are not converted to base 2",
    ("abs(problem.scale) * _LOG2_E", "abs(problem.scale)"),
)
_mutant(
    "output_times_1_001",
    "the output is 1.001 times as large",
    ("acc / total[:, None]", "acc / total[:, None] * 1.001"),
    case=_MANY,
)
_mutant("lse_in_base_2", "the log-sum-exp is in base 2", ("* LN_2\n", "* 1.0\n"))
_mutant(
    "empty_rows_divided",
    "rows that see no key are 0 / 0",
    ("total = tl.where(seen_end > first_seen, row_sum, 1.0)", "total = row_sum"),
    case={**_CAUSAL, "q_len": 90, "kv_len": 20},
)


def mutants() -> tuple[Mutant, ...]:
    """All of them."""
    return tuple(_MUTANTS.values())


def get(name: str) -> Mutant:
    """A mutant by name. Raises `RequestError` for an unknown one."""
    if name in _MUTANTS:
        return _MUTANTS[name]
    close = difflib.get_close_matches(name, _MUTANTS, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise RequestError(f"unknown mutant {name!r}: expected one of {', '.join(_MUTANTS)}{hint}")


def __getattr__(name: str) -> Callable[..., Any]:
    """`effattn.zoo.triton_mutants:NAME` on the command line: the wrong kernel of that name."""
    if name in _MUTANTS:
        return _MUTANTS[name].function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def edited(edits: tuple[tuple[str, str], ...], *, name: str) -> dict[str, str]:
    """The kernel's sources, edited: module -> text. Raises `RequestError` where a text does not occur exactly once."""
    from effattn.kernels import flash_forward, mask

    sources = {"mask": inspect.getsource(mask), "flash_forward": inspect.getsource(flash_forward)}
    for old, new in edits:
        times = sum(source.count(old) for source in sources.values())
        if times != 1:
            raise RequestError(
                f"mutant {name!r}: {old!r} occurs {times} times in the kernel's source, not once;"
                " the kernel has changed, so the mutant has to"
            )
        sources = {module: source.replace(old, new) for module, source in sources.items()}
    return sources


def made(name: str, source: str) -> ModuleType:
    """A module with this source, which `inspect` can read: Triton compiles from what `inspect` finds."""
    file = f"<{name}>"
    module = ModuleType(name)
    module.__file__ = file
    # No modification time: the entry is never compared with a file.
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.modules[name] = module
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    return module


@functools.cache
def _module_of(name: str, mask: str, forward: str) -> ModuleType:
    """The kernel's module with this source, and with a mask of that source."""
    masked = made(f"{__name__}.{name}_mask", mask)
    forward = forward.replace("from effattn.kernels.mask import", f"from {masked.__name__} import")
    return made(f"{__name__}.{name}", forward)


def _module(mutant: Mutant) -> ModuleType:
    sources = edited(mutant.edits, name=mutant.name)
    return _module_of(mutant.name, sources["mask"], sources["flash_forward"])
