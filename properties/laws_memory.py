"""Laws about memory: what is read, what is written, and what is kept."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effattn.properties.law import SetAside, Trial, law, parts, twin
from effattn.properties.law_draws import cases
from effattn.properties.laws_structure import _one, select

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs

_SPACED = ("bhsd+pad", "bshd+pad+offset", "bhsd+step", "bhds+pad", "sbhd+pad+step")


def _tensors(inputs: Inputs) -> dict[str, torch.Tensor]:
    return {**dict(zip("qkv", inputs, strict=True)), **inputs.extras.present()}


def _fill_around(inputs: Inputs, value: float) -> Inputs:
    """Equal inputs, with `value` in all memory around q, k and v that does not belong to them."""
    copy = twin(inputs)
    for x in copy:
        kept = x.clone()
        flat = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
        flat.fill_(value)
        x.copy_(kept) if 0 not in x.stride() else _write_expanded(x, kept)
    return copy


def _write_expanded(x: torch.Tensor, kept: torch.Tensor) -> None:
    """Writes to a tensor with strides of 0 through the part that is stored."""
    at = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride())
    x[at].copy_(kept[at])


@law(
    "memory",
    draw=cases(layouts=_SPACED, change=lambda draw, fields: {"layout": draw.pick(_SPACED)}),
    bits=True,
    quantised=True,
)
def nothing_outside_the_tensors_is_read(it: Trial) -> None:
    """The memory around and between the rows of Q, K and V may hold NaN or zeros: the output is the same."""
    inputs = it.inputs()
    dirty, clean = it(_fill_around(inputs, math.nan)), it(_fill_around(inputs, 0.0))
    for (name, got), (_, want) in zip(parts(dirty), parts(clean), strict=True):
        it.same(name, got, want, "the memory around Q, K and V holds NaN in place of 0")


def _bytes(x: torch.Tensor) -> torch.Tensor:
    """All bytes of the memory that a tensor lies in, its surroundings included."""
    import torch

    storage = x.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=x.device)
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))


@law("memory", draw=cases(layouts=("bhsd", *_SPACED)), bits=True, quantised=True)
def inputs_and_what_surrounds_them_are_not_written(it: Trial) -> None:
    """After the call all inputs, and the memory around them, hold the bytes that they held before."""
    import torch

    case = it.case
    reason = it.method.unsupported(case)
    if reason is not None:
        raise SetAside(f"not supported: {reason}")
    inputs = it.inputs()
    before = {name: _bytes(x).clone() for name, x in _tensors(inputs).items()}
    versions = {name: x._version for name, x in _tensors(inputs).items()}
    it.on(inputs)
    for name, x in _tensors(inputs).items():
        it.true(
            torch.equal(_bytes(x), before[name]) and x._version == versions[name],
            f"the call wrote to {name}, or next to it; expected it to be left as it was",
        )


@law("memory", draw=cases(), bits=True, quantised=True)
def outputs_lie_in_memory_of_their_own(it: Trial) -> None:
    """The output shares no memory with an input, nor with the LSE, and a later call leaves it as it is."""
    case = it.case
    reason = it.method.unsupported(case)
    if reason is not None:
        raise SetAside(f"not supported: {reason}")
    inputs = it.inputs()
    output = it.on(inputs)
    made = dict(parts(output))
    held = {x.untyped_storage().data_ptr(): name for name, x in _tensors(inputs).items() if x.numel()}
    for name, x in made.items():
        if x.numel():
            other = held.get(x.untyped_storage().data_ptr())
            it.true(other is None, f"{name} lies in the memory of {other}: writing to one changes the other")
    if output.lse is not None and output.lse.numel() and output.out.numel():
        a, b = output.out, output.lse
        shared = a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        it.true(not shared or not _overlap(a, b), "out and lse lie in the same memory")
    kept = {name: x.clone() for name, x in made.items()}
    it.on(replace(case, seed=case.seed + 1).tensors(it.device))
    for name, x in made.items():
        it.same(name, x, kept[name], "a later call changed the output of an earlier one")


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    def span(x: torch.Tensor) -> tuple[int, int]:
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    (a0, a1), (b0, b1) = span(a), span(b)
    return a0 < b1 and b0 < a1


@contextlib.contextmanager
def uninitialised_memory_is_nan() -> Iterator[None]:
    """Inside, `torch.empty` and its like hold NaN (integers: their largest number) in place of what was there before."""
    import torch

    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fill


@law(
    "memory",
    draw=cases(
        change=lambda draw, fields: (
            {"q_len": fields["kv_len"] + 40, "causal": "bottom-right"} if draw.chance(0.3) else {}
        )
    ),
    bits=True,
    quantised=True,
)
def every_element_of_the_output_is_written(it: Trial) -> None:
    """With fresh memory full of NaN the output is the same: nothing is left as it was found."""
    import warnings

    inputs = it.inputs()
    plain = it(inputs)
    with uninitialised_memory_is_nan(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch tells of operations that it cannot make deterministic
        poisoned = it(inputs)
    for (name, got), (_, want) in zip(parts(poisoned), parts(plain), strict=True):
        it.same(name, got, want, "fresh memory was filled with NaN before the call")


@law("memory", draw=cases(options=("causal", "softcap", "scale")), bits=True, quantised=True)
def the_state_of_torch_is_left_alone(it: Trial) -> None:
    """Default dtype and device, random states, gradient mode, threads and the folder are what they were before the call."""
    import torch

    from effattn.methods import surroundings

    inputs = it.inputs()
    own = torch.get_rng_state()
    try:
        torch.manual_seed(20_260_000 + it.case.seed)  # a state that no one sets by chance
        before = [thing.read() for thing in surroundings.RANDOM]
        it(inputs)
        after = [thing.read() for thing in surroundings.RANDOM]
    finally:
        torch.set_rng_state(own)
    for thing, was, now in zip(surroundings.RANDOM, before, after, strict=True):
        it.true(now == was, f"the call changed {thing.name}; expected it to be left as it was")
    for what in surroundings.STATED:
        changed = it.changed.get(what)
        it.true(changed is None, f"the call changed {what}{changed}; expected it to be left as it was")


#: elements between two entries of a batch: the stride itself passes 2^31, and whoever passes it on has to widen it
_FAR = 2**31 + 8
#: elements between three: the stride fits 32 bits, and twice the stride does not
_HALF_WAY = 2**30


@law(
    "memory",
    draw=cases(
        options=("causal",), layouts=("bhsd",), lengths=(2, 17, 33, 65), dims=((40, 40), (64, 64)),
        change=lambda draw, fields: {"batch": 3, "heads": 1, "kv_heads": 1},
    ),
    holds=lambda case: (
        case.batch in (2, 3) and case.kv_heads == 1 and case.layout == "bhsd" and case.kv_len > 0
    ),
    bits=True, quantised=True)  # fmt: skip
def offsets_beyond_two_to_the_31_are_right(it: Trial) -> None:
    """Two entries of a batch 2^31 elements apart, and three 2^30 apart, whose stride fits 32 bits, give the usual output.

    They lie in address space that is not filled.
    """
    inputs = it.inputs()
    _apart(it, select(inputs, "b", _one(0, 2)), replace(it.case, batch=2), _FAR)
    if it.case.batch > 2:
        _apart(it, inputs, it.case, _HALF_WAY)


def _apart(it: Trial, inputs: Inputs, case: Case, distance: int) -> None:
    """K and V with the entries of the batch so many elements apart give the bits of dense ones."""
    far = type(inputs)(
        inputs.q, _spread(inputs.k, distance), _spread(inputs.v, distance), extras=inputs.extras
    )
    one, other = it(inputs, case), it.on(far, case)
    for (name, got), (_, want) in zip(parts(other), parts(one), strict=True):
        it.same(
            name, got, want, f"the {case.batch} entries of K and V lie {distance} elements apart",
            slack=lambda name=name: 2.0 * it.bounds(inputs, case)[name],
        )  # fmt: skip


def _spread(x: torch.Tensor, distance: int) -> torch.Tensor:
    """Equal values with the entries of the batch `distance` elements apart. Untouched pages of the memory cost nothing."""
    import mmap

    import torch

    size = ((x.shape[0] - 1) * distance + x[0].numel() + 64) * x.element_size()
    if x.device.type == "cpu":
        # Shared, so that it does not count as memory that the process allocates, of which it may have less.
        flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            room = mmap.mmap(-1, size, flags=flags)
        except OSError as error:
            raise SetAside(
                f"not supported: there is no address space of {size / 2**30:.0f} GiB here ({error})"
            ) from None
        memory = torch.frombuffer(room, dtype=x.dtype)
    else:
        memory = torch.empty(size // x.element_size(), dtype=x.dtype, device=x.device)
    placed = memory.as_strided(x.shape, (distance, *x[0].contiguous().stride()))
    placed.copy_(x)
    return placed
