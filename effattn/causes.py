"""What a wrong output would be right for: the usual mistakes, tried one by one.

A failed case is compared with exact attention of other questions: the other alignment of the mask, no scale, a window of
one key more, K and V of other heads, padding that is counted. Where the output lies within the bound of such a question
everywhere, that is most likely the mistake. A gradient or a log-sum-exp that is a constant multiple of the exact one is
told by its factor. It is a guess, said as such, and never part of the verdict.

Nothing is named that explains little: of what is beyond the bound, most of the error must be gone with the mistake.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from effattn.case import Case, Inputs
    from effattn.exact import Options
    from effattn.judgement import Part
    from effattn.tolerances.numerics import Numerics

    Floats = NDArray[np.float64]

#: pairs of a query and a key from which on a case is not looked into: each question is exact attention once more
MOST_PAIRS = 1 << 23
#: a question whose answer hardly differs from the right one explains nothing: of the elements that are beyond the bound, it
#: must leave at most this share of the error, root mean square
MOST_LEFT = 0.5
#: the same for a factor, of all elements
MOST_LEFT_BY_FACTOR = 1.0 / 3.0
#: elements that would be beyond the bound by the factor alone; of fewer, some number is nearly always a factor
FEWEST_MULTIPLES = 8
#: questions that are named where the output agrees with several
MOST_NAMED = 3
#: sizes of blocks whose last, partial one kernels forget, or fill with keys of zeros
_BLOCKS = (16, 32, 64, 128)


class Question(NamedTuple):
    """Another attention problem, in words that end "right for attention ..."."""

    words: str
    inputs: Inputs
    options: Options


def find(
    case: Case, inputs: Inputs, options: Options, numerics: Numerics, parts: Sequence[Part]
) -> list[str]:
    """Sentences about the most likely mistake; none where nothing fits, or the case is larger than `MOST_PAIRS`.

    `parts` are the output and gradients beside what they should be; `options` what the case asks for.
    """
    if case.batch * case.heads * case.q_len * case.kv_len > MOST_PAIRS:
        return []
    wrong = [part for part in parts if part.wrong.any()]
    if any(part.name == "out" for part in wrong):
        (out,) = (part for part in wrong if part.name == "out")
        found = [
            question.words
            for question in questions(case, inputs, options)
            if _agrees(out, question, numerics)
        ]
        if found:
            return [f"the output is right for attention {words}" for words in found[:MOST_NAMED]]
    return [sentence for part in wrong if (sentence := _multiple(part, case))]


def _beyond(error: Floats, part: Part, times: float = 1.0) -> bool:
    import numpy as np

    with np.errstate(invalid="ignore", over="ignore"):
        outside = ~(np.abs(error) <= times * part.bound)
    if part.judged is not None:
        outside &= part.judged
    return bool(outside.any())


def _agrees(out: Part, question: Question, numerics: Numerics) -> bool:
    import numpy as np

    from effattn import exact as reference
    from effattn.errors import RequestError
    from effattn.tolerances.envelope import forward_envelope

    inputs, options = question.inputs, question.options
    with np.errstate(all="ignore"):
        try:
            exact = reference.attention_with(*inputs, options)
            envelope = forward_envelope(*inputs, numerics=numerics, exact=exact, options=options)
        except RequestError:  # a window or a mask that this problem cannot have
            return False
        judged = envelope.judged[..., None]
        left = out.got - exact.out.cpu().numpy()
        close = np.abs(left) <= envelope.out_bound
        wrong = out.wrong & judged
        if not wrong.any() or not (close | ~judged).all():
            return False
        # What is not finite was, and is not now: all answers within a bound are.
        before = np.where(np.isfinite(out.error), out.error, np.inf)[wrong]
        return _rms(left[wrong]) <= MOST_LEFT * _rms(before)


def _rms(x: Floats) -> float:
    import numpy as np

    return math.sqrt(float(np.mean(np.square(x)))) if x.size else 0.0


# Questions


def questions(case: Case, inputs: Inputs, options: Options) -> Iterator[Question]:
    """Problems that kernels solve by mistake instead of this one; only those that this case can tell from it."""
    for words, other in (
        *_scales(case, options),
        *_masks(case, inputs, options),
        *_left_out(options),
        *_windows(options),
        *_keys(case, inputs, options),
    ):
        yield Question(words, inputs, other)
    for words, k, v in _heads(case, inputs):
        yield Question(words, type(inputs)(inputs.q, k, v, extras=inputs.extras), options)


def _scales(case: Case, options: Options) -> Iterator[tuple[str, Options]]:
    d, scale = case.head_dim, options.scale_for(case.head_dim)
    tried = [scale]
    for value, words in (
        (d**-0.5, f"with the scale 1 / sqrt(head_dim) = {d**-0.5:.6g} instead of the {scale:.6g} that is given"),
        (1.0, "without a scale"),
        (scale**2, "with the scale applied twice"),
        (1.0 / d, "with the scale 1 / head_dim"),
        (case.v_dim**-0.5, "with the scale 1 / sqrt(v_dim)"),
        (scale * math.log2(math.e), "with the scale times log2(e): exp of what was meant for exp2"),
        (scale * math.log(2.0), "with the scale times ln 2: exp2 of what was meant for exp"),
        (2 ** round(math.log2(d)) ** -0.5 if d > 1 else 1.0, "with the scale of a head_dim that is a power of two"),
        (-scale, "with the scale negated"),
    ):  # fmt: skip
        if not any(math.isclose(value, other) for other in tried):
            tried.append(value)
            yield words, replace(options, scale=value)


def _masks(case: Case, inputs: Inputs, options: Options) -> Iterator[tuple[str, Options]]:
    if options.causal != "none":
        other = "top-left" if options.causal == "bottom-right" else "bottom-right"
        if case.q_len != case.kv_len:
            yield (
                f"whose causal mask is aligned {other}, not {options.causal}",
                replace(options, causal=other),
            )
        yield "without the causal mask", replace(options, causal="none")
        if options.window is None:
            later, earlier = (
                replace(options, causal="none", mask=_up_to(case, inputs, options, i)) for i in (1, -1)
            )
            yield "whose causal mask lets through one key too many", later
            yield "whose causal mask hides the query's own key", earlier
    else:
        yield "with a causal mask (bottom-right)", replace(options, causal="bottom-right")
        if case.q_len != case.kv_len:
            yield "with a causal mask (top-left)", replace(options, causal="top-left")


def _up_to(case: Case, inputs: Inputs, options: Options, right: int) -> torch.Tensor:
    """The mask that lets query i see the keys up to i + shift + right; of members of one length."""
    import torch

    shift = case.kv_len - case.q_len if options.causal == "bottom-right" else 0
    seen = torch.ones(case.q_len, case.kv_len, dtype=torch.bool, device=inputs.q.device)
    seen = seen.tril(shift + right)[None, None]
    return seen if options.mask is None else options.mask & seen


def _left_out(options: Options) -> Iterator[tuple[str, Options]]:
    for name, words in (
        ("window", "without the window"),
        ("softcap", "without the softcap"),
        ("alibi_slopes", "without ALiBi"),
        ("bias", "without the bias"),
        ("mask", "without the mask"),
        ("sinks", "without the sinks"),
        ("kv_lengths", "without the lengths of the keys"),
        ("keep", "without dropout"),
    ):
        if getattr(options, name) is not None:
            more = {"dropout": 0.0} if name == "keep" else {}
            yield words, replace(options, **{name: None}, **more)
    if options.alibi_slopes is not None:
        yield "with ALiBi added instead of taken away", replace(options, alibi_slopes=-options.alibi_slopes)
    if options.mask is not None:
        yield "with the mask turned round: True hides", replace(options, mask=~options.mask)
    if options.bias is not None:
        scaled = options.bias.double() * options.scale_for(1) if options.scale is not None else None
        if scaled is not None:
            yield "with the bias multiplied by the scale", replace(options, bias=scaled)
        yield "with the bias taken away instead of added", replace(options, bias=-options.bias)
    if options.keep is not None and options.dropout:
        # keep / (1 - p) becomes keep: weights that are not divided.
        yield "whose dropout does not divide by 1 - p", replace(options, dropout=0.0)
        yield "with the dropout mask turned round", replace(options, keep=~options.keep)


def _windows(options: Options) -> Iterator[tuple[str, Options]]:
    if options.window is None:
        return
    left, right = options.window
    for name, sides in (("left", (1, 0)), ("right", (0, 1))):
        for step, words in ((1, "more"), (-1, "less")):
            changed = (left + step * sides[0], right + step * sides[1])
            if (left, right)[sides[1]] >= 0 and min(changed) >= -1 and changed != (-1, -1):
                yield f"whose window has one key {words} on the {name}", replace(options, window=changed)
    if left != right:
        yield "whose window has its sides exchanged", replace(options, window=(right, left))


def _keys(case: Case, inputs: Inputs, options: Options) -> Iterator[tuple[str, Options]]:
    import torch

    n = case.kv_len
    place = torch.arange(n, device=inputs.q.device)

    def only(seen: torch.Tensor) -> Options:
        seen = seen.expand(1, 1, 1, n)
        return replace(options, mask=seen if options.mask is None else options.mask & seen)

    if n > 1:
        yield "without the last key", only(place < n - 1)
        yield "without the first key", only(place > 0)
    cuts: dict[int, list[int]] = {}
    for block in _BLOCKS:
        if n % block and n > block:
            cuts.setdefault(n - n % block, []).append(block)
    for cut, blocks in cuts.items():
        if cut < n - 1:
            yield f"without the last {n - cut} keys, a partial block of {_or(blocks)}", only(place < cut)
    if options.sinks is None and options.causal == "none" and options.plain:
        # Keys of zeros have the score 0 and the value 0, as so many sinks do.
        fills: dict[int, list[int]] = {}
        for block in _BLOCKS:
            if n % block:
                fills.setdefault(block - n % block, []).append(block)
        for fill, blocks in fills.items():
            sinks = torch.full((case.heads,), math.log(fill), device=inputs.q.device)
            words = f"in which {fill} keys of zeros fill up a block of {_or(blocks)} and are counted"
            yield words, replace(options, sinks=sinks)


def _heads(case: Case, inputs: Inputs) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    import torch

    heads, kv_heads = case.heads, case.kv_heads
    if 1 < kv_heads < heads:
        order = torch.arange(heads) % kv_heads
        k, v = (x[:, order] for x in (inputs.k, inputs.v))
        yield "in which query head h reads key head h % kv_heads, not h // (heads // kv_heads)", k, v
    if kv_heads > 1:
        k, v = (x[:, :1].expand(x.shape) for x in (inputs.k, inputs.v))
        yield "in which all heads read K and V of the first", k, v
        yield "in which all heads read V of the first", inputs.k, v
    if case.batch > 1:
        k, v = (x[:1].expand(x.shape) for x in (inputs.k, inputs.v))
        yield "in which all of the batch read K and V of its first member", k, v


def _or(blocks: Sequence[int]) -> str:
    return " or ".join(map(str, blocks))


# Factors


def _multiple(part: Part, case: Case) -> str | None:
    """The constant that the exact value is multiplied by, if there is one."""
    import numpy as np

    exact, got = (np.broadcast_to(x, part.got.shape) for x in (part.exact, part.got))
    good = np.isfinite(exact) & np.isfinite(got)
    if part.judged is not None:
        good = good & part.judged
    if not good.any():
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        square = float(exact[good] @ exact[good])
        factor = float(got[good] @ exact[good]) / square if square > 0.0 else math.nan
    if (
        not math.isfinite(factor)
        or not (np.abs(exact[good]) > 8.0 * np.broadcast_to(part.bound, exact.shape)[good]).any()
    ):
        return None
    if not np.abs(got[good]).any():
        return f"{part.title} is 0 everywhere"
    with np.errstate(invalid="ignore", over="ignore"):
        left = np.where(good, got - factor * exact, 0.0)
    # A factor next to 1 has to explain all of the errors.
    near = abs(factor - 1.0) <= 0.01
    if _beyond(left, part, 1.0 if near else 2.0 * max(1.0, abs(factor))):
        return None
    with np.errstate(invalid="ignore", over="ignore"):
        carried = good & (np.abs((factor - 1.0) * exact) > part.bound)
        before = np.where(good, got - exact, 0.0)
    if carried.sum() < FEWEST_MULTIPLES or _rms(left[good]) > MOST_LEFT_BY_FACTOR * _rms(before[good]):
        return None
    shown = f"{factor:.7g}" if near else f"{factor:.4g}"
    called = "" if near else _called(factor, part, case)
    return f"{part.title} is {shown} times what it should be{called}"


def _called(factor: float, part: Part, case: Case) -> str:
    scale, group = case.softmax_scale, case.heads // case.kv_heads
    for value, words in (
        (1.0 / scale if scale else math.nan, "1 / scale: the scale is missing"),
        (scale, "the scale: it is applied once too often"),
        (math.log2(math.e), "log2(e): in base 2, not e"),
        (math.log(2.0), "ln 2: from base 2 once too often"),
        (1.0 / (1.0 - case.dropout) if case.dropout else math.nan, "1 / (1 - p) of the dropout"),
        (1.0 - case.dropout if case.dropout else math.nan, "1 - p of the dropout"),
        (
            float(group) if group > 1 and part.name in ("dk", "dv") else math.nan,
            "the query heads of a key head",
        ),
        (-1.0, "the sign is wrong"),
        (2.0, "counted twice"),
        (0.5, "half of it is missing"),
    ):
        if abs(factor - value) <= 0.002 * abs(value):
            return f" ({words})"
    return ""
