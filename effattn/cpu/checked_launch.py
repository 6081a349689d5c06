"""One launch of an instrumented kernel: what it may touch, the runs that the checks need, and what they found.

The first run takes the programs in order. `poison` repeats the launch with other values in undefined elements, `order`
with the programs in other orders, each from the memory that the first run began with; what they leave is compared bit for
bit, and in the end memory holds what the first run left.
"""

from __future__ import annotations

import ctypes
import gc
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effattn.cpu import probes, session
from effattn.cpu.sanitizer import Checks, Fault, Finding, Traffic
from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from effattn.cpu.launch import Launcher

# The same numbers are in checks.c.
_RACES, _TRAFFIC, _WRAPS = 1, 2, 4
_OUTSIDE, _WILD, _WRAPPED, _ZERO_DIVISOR, _ENDLESS, _WAITS, _SIGNAL, _RACE = range(1, 9)
_INTERRUPTED = 2  # of runtime.c
_CAPACITY = 64  # different findings of one launch

_lock = threading.Lock()

if TYPE_CHECKING:
    #: a further run: (what undefined elements hold, the order of programs, that order in words) -> findings
    _Again = Callable[["_Fill", NDArray[np.int64] | None, str], list[Finding]]


class _Extent(ctypes.Structure):
    _fields_ = [("lo", ctypes.c_int64), ("hi", ctypes.c_int64)]


class _Site(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "base", "size", "flags")]


class _Region(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("lo", "hi", "shift", "kinds", "loads", "stores", "atomics")
    ]


class _Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("bytes", "sectors", "last")]


class _Found(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("kind", "site", "other_site", "slot")] + [
        (name, ctypes.c_int64) for name in ("program", "other_program", "address", "value", "times")
    ]


class _State(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "flags",
            "site_bits",
            "max_turns",
            "max_spins",
            "max_nanoseconds",
            "slots",
            "known_count",
            "site_count",
            "region_count",
            "finding_count",
            "capacity",
            "stopped",
        )
    ] + [
        (name, ctypes.c_void_p)
        for name in ("args", "known", "sites", "region_of", "regions", "traffic", "order", "findings")
    ]


@dataclass(frozen=True)
class _Fill:
    """What undefined elements hold in one run."""

    float_: float
    half: float
    eighth: float
    integer: int
    words: str


#: Numbers that each float format has: large enough to win any maximum.
_ZERO = _Fill(0.0, 0.0, 0.0, 0, "zeros")
_NAN = _Fill(float("nan"), float("nan"), float("nan"), 0x5A5A5A5A5A5A5A5A, "NaN (0x5a... for integers)")
_LARGE = _Fill(2.0**100, 2.0**15, 240.0, -0x5A5A5A5A5A5A5A5B, "a large number (0xa5... for integers)")
_SMALL = _Fill(-(2.0**100), -(2.0**15), -240.0, -0x5A5A5A5A5A5A5A5B, "a large negative number")


@dataclass
class _Slot:
    """A pointer argument: the tensor that was passed for it."""

    name: str
    value: Any
    lo: int = 0
    hi: int = -1  #: lo > hi: an address of which no more is known
    size: int = 1  #: bytes of an element
    words: str = ""


def _slot(name: str, value: Any) -> _Slot:
    shape: Any = getattr(value, "shape", None)
    stride: Any = getattr(value, "stride", None)
    if stride is None and hasattr(getattr(value, "base", None), "stride"):
        # A tensor under another element type, triton.reinterpret: the same memory.
        inner = _slot(name, value.base)
        return _Slot(name, value.base, inner.lo, inner.hi, inner.size, inner.words)
    if not callable(stride) or shape is None or isinstance(value, int):
        return _Slot(name, None)
    size, lo = int(value.element_size()), int(value.data_ptr())
    shape, strides = tuple(int(n) for n in shape), tuple(int(n) for n in value.stride())
    if 0 in shape:
        return _Slot(name, value, lo, lo, size, f"no access: the tensor has shape {shape}, so no element")
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    words = f"an element from 0 to {last} (shape {shape}, strides {strides})"
    return _Slot(name, value, lo, lo + (last + 1) * size, size, words)


def _alive() -> list[tuple[int, int]]:
    """The memory of all tensors that this process holds, as disjoint sorted spans."""
    import torch

    spans = set()
    with torch._C.DisableTorchFunctionSubclass():
        for x in gc.get_objects():
            if not issubclass(type(x), torch.Tensor):
                continue
            try:
                if not (x.is_cpu or getattr(x, "_effattn_in_host_memory", False)):
                    continue
                storage = x.untyped_storage()
                spans.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
            except (RuntimeError, NotImplementedError):
                continue  # a tensor without memory of its own
    return _merged(spans)


def _merged(spans: Any) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for lo, hi in sorted(span for span in spans if span[0] < span[1]):
        if out and lo <= out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], hi))
        else:
            out.append((lo, hi))
    return out


def _memory(lo: int, hi: int) -> NDArray[np.uint8]:
    import numpy as np

    return np.ctypeslib.as_array((ctypes.c_uint8 * (hi - lo)).from_address(lo))


#: Copies of memory, kept from launch to launch: fresh pages cost more than the copy. Larger ones are not kept.
_copies: dict[int, NDArray[np.uint8]] = {}
_MOST_KEPT = 1 << 26

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def _kept(number: int, lo: int, hi: int) -> NDArray[np.uint8]:
    """A copy of memory; `number` tells those of one launch apart."""
    import numpy as np

    size = hi - lo
    buffer = _copies.get(number)
    if buffer is None or buffer.size < size:
        buffer = np.empty(size, dtype=np.uint8)
        if size <= _MOST_KEPT:
            _copies[number] = buffer
    ctypes.memmove(buffer.ctypes.data, lo, size)
    return buffer[:size]


def run(launcher: Launcher, function: int, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
    """Launch an instrumented kernel. Raises Fault where something was found and the checks raise.

    Outside of every block, as for a kernel that was kept from inside of one, accesses alone are looked at.
    """
    checks = session.current() or Checks("bounds")
    with _lock:
        found = _Launch(launcher, function, grid, args, checks).run()
    checks.record(found)


class _Launch:
    def __init__(
        self,
        launcher: Launcher,
        function: int,
        grid: tuple[int, int, int],
        args: Sequence[Any],
        checks: Checks,
    ) -> None:
        self.checks = checks
        self.asked = frozenset(checks.instruments)
        self.library = launcher.library
        self.kernel = launcher.name
        self.arena = launcher.arena
        self.packed = launcher.packed(function, grid, args)
        self.grid = tuple(int(n) for n in grid)
        assert launcher.probes is not None
        table, objects = launcher.probes
        self.sites = [probes.Site(*row) for row in table["sites"]]
        self.undefined: list[tuple[str, int]] = [tuple(place) for place in table["undefined"]]
        self.float_atomics: list[tuple[str, int]] = [tuple(place) for place in table["float_atomics"]]
        self.takes_minima = bool(table["takes_minima"])
        self.steered = bool(table["steered"])
        names = table["arguments"]
        self.slots = [_slot(name, x) for name, x in zip(names, objects(*args), strict=True)]
        accesses = [s for s in self.sites if s.kind in (probes.LOAD, probes.STORE, probes.ATOMIC)]
        self.loose = any(s.base < 0 or self.slots[s.base].hi < self.slots[s.base].lo for s in accesses)
        self.written = self._written(accesses)

    def _written(self, accesses: list[probes.Site]) -> list[_Slot]:
        """The tensors that the kernel may write to."""
        bases = {s.base for s in accesses if s.kind != probes.LOAD}
        if -1 in bases or any(self.slots[b].hi < self.slots[b].lo for b in bases):
            bases = set(range(len(self.slots)))
        return [self.slots[b] for b in sorted(bases) if self.slots[b].lo < self.slots[b].hi]

    # -- the runs

    def run(self) -> list[Finding]:
        """All runs; the findings."""
        checks, report = self.checks, self.checks.report
        report.launches += 1
        poisons = "poison" in self.asked and bool(self.undefined)
        count = self.grid[0] * self.grid[1] * self.grid[2]
        orders = "order" in self.asked and count > 1
        self.spans = _merged((slot.lo, slot.hi) for slot in self.written)
        # Nothing that is written is read: each run begins alike by itself, and a digest says whether it ends alike.
        fresh = not self._reads_what_it_writes() and not (poisons and self.steered)
        before = (
            [_kept(k, *span) for k, span in enumerate(self.spans)]
            if (poisons or orders) and not fresh
            else None
        )
        state = self._state()
        if "races" in self.asked:
            state.flags |= _RACES
        if "traffic" in self.asked:
            state.flags |= _TRAFFIC
        first = _NAN if "poison" in self.asked else _ZERO
        found = self._once(state, first, None)
        self._count_traffic()
        if checks.allocations is not None:
            for slot in self.written:
                checks.allocations.stored(slot.lo, slot.hi, self.kernel, slot.name)
        if not (poisons or orders) or any(f.instrument == "bounds" for f in found):
            return found
        # Each further run leaves memory as the first one did.
        again = self._afresh(first) if before is None else self._restored(before)
        if poisons:
            for fill in (_LARGE, *([_SMALL] if self.takes_minima else [])):
                found += again(fill, None, "")
        if orders:
            for words, order in self._orders(count):
                found += again(first, order, words)
        return _distinct(found)

    def _reads_what_it_writes(self) -> bool:
        """Whether a kernel may read memory that it may also write to."""
        if self.loose:
            return True
        read = [self.slots[s.base] for s in self.sites if s.kind in (probes.LOAD, probes.ATOMIC)]
        return any(slot.lo < hi and lo < slot.hi for slot in read for lo, hi in self.spans)

    def _orders(self, count: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
        import numpy as np

        yield "reversed", np.arange(count, dtype=np.int64)[::-1].copy()
        shuffled = np.random.default_rng(self.checks.seed).permutation(count).astype(np.int64)
        yield f"shuffled (seed {self.checks.seed})", shuffled

    def _restored(self, before: list[NDArray[np.uint8]]) -> _Again:
        """One more run from the memory of before, compared with copies of what the first run has left."""
        after = [_kept(k + len(self.spans), *span) for k, span in enumerate(self.spans)]

        def again(fill: _Fill, order: NDArray[np.int64] | None, words: str) -> list[Finding]:
            for (lo, hi), kept in zip(self.spans, before, strict=True):
                ctypes.memmove(lo, kept.ctypes.data, hi - lo)
            found = self._stopped(fill, order, words)
            if not found:
                for (lo, hi), kept in zip(self.spans, after, strict=True):
                    if not found and _memcmp(lo, kept.ctypes.data, hi - lo):
                        found = self._compared(lo, hi, kept, _memory(lo, hi), fill, words)
            for (lo, hi), kept in zip(self.spans, after, strict=True):
                ctypes.memmove(lo, kept.ctypes.data, hi - lo)
            return found

        return again

    def _afresh(self, first: _Fill) -> _Again:
        """One more run over the memory as it is; only where the digests differ is anything copied and compared."""
        digests = [self.library.effattn_digest(lo, hi - lo) for lo, hi in self.spans]

        def again(fill: _Fill, order: NDArray[np.int64] | None, words: str) -> list[Finding]:
            found = self._stopped(fill, order, words)
            now = [self.library.effattn_digest(lo, hi - lo) for lo, hi in self.spans]
            if now == digests:
                return found
            others = [_kept(k, *span) for k, span in enumerate(self.spans)]
            self._once(self._state(), first, None)
            for (lo, hi), other in zip(self.spans, others, strict=True):
                if not found and _memcmp(lo, other.ctypes.data, hi - lo):
                    found = self._compared(lo, hi, _memory(lo, hi), other, fill, words)
            return found

        return again

    def _stopped(self, fill: _Fill, order: NDArray[np.int64] | None, words: str) -> list[Finding]:
        """Run once more; the findings of a program that was stopped in this run and in no other."""
        how = f" (with the programs {words})" if words else f" (with {fill.words} in undefined elements)"
        found = self._once(self._state(), fill, order)
        return [_because(f, "order" if words else "poison", how) for f in found]

    def _compared(
        self, lo: int, hi: int, first: NDArray[np.uint8], second: NDArray[np.uint8], fill: _Fill, words: str
    ) -> list[Finding]:
        """The first element of each tensor in a span of memory that two runs have left different."""
        found = []
        for slot in self.written:
            if lo <= slot.lo and slot.hi <= hi:
                there = slice(slot.lo - lo, slot.hi - lo)
                difference = _difference(slot, first[there], second[there])
                if difference is not None:
                    found.append(self._differs(slot, *difference, fill, words))
        return found[:1]

    def _differs(self, slot: _Slot, at: int, first: str, second: str, fill: _Fill, words: str) -> Finding:
        index = _index(slot, at)
        common = {
            "kernel": self.kernel,
            "argument": slot.name,
            "offset": at,
            "offset_bytes": at * slot.size,
        }
        if words:
            writers = [s for s in self.sites if s.size and s.kind != probes.LOAD]
            here = [s for s in writers if s.base >= 0 and self.slots[s.base] is slot] or writers
            file, line = (here[0].file, here[0].line) if here else ("", 0)
            why = (
                "; the kernel adds floating-point numbers atomically, and the rounding of their sum depends on the order"
                if self.float_atomics
                else ""
            )
            return Finding(
                instrument="order",
                file=file,
                line=line,
                done=f"element {index} of {slot.name} is {first} with the programs in order and {second} with them {words}",
                expected=f"the same bits in any order{why}",
                **common,
            )
        file, line = self.undefined[0]
        lines = ", ".join(sorted({str(line) for _, line in self.undefined}, key=int))
        return Finding(
            instrument="poison",
            file=file,
            line=line,
            done=f"element {index} of {slot.name} is {first} with NaN and {second} with {fill.words} in the elements that "
            f"masked loads without `other` leave undefined (line {lines})",
            expected="no undefined element to reach an output: give the load an `other`, or mask what is computed from it",
            **common,
        )

    def _state(self) -> _State:
        checks = self.checks
        state = _State()
        state.flags = _WRAPS if "bounds" in self.asked else 0
        state.max_turns, state.max_spins = checks.max_turns, checks.max_spins
        state.max_nanoseconds = int(checks.max_seconds * 1e9)
        return state

    def _once(self, state: _State, fill: _Fill, order: NDArray[np.int64] | None) -> list[Finding]:
        """Run the grid once."""
        count = self.grid[0] * self.grid[1] * self.grid[2]
        extents = (_Extent * max(1, len(self.slots)))(*((s.lo, s.hi) for s in self.slots))
        sites = (_Site * max(1, len(self.sites)))(*((s.kind, s.base, s.size, s.flags) for s in self.sites))
        known = _alive() if self.loose else []
        alive = (_Extent * max(1, len(known)))(*known)
        regions, region_of = self._regions(state.flags & _RACES)
        self.counts = (_Counts * max(1, len(self.sites)))(*((0, 0, -1) for _ in self.sites))
        findings = (_Found * _CAPACITY)()
        state.site_bits = len(self.sites).bit_length()
        if state.flags & _RACES and (count + 2) << state.site_bits >= 1 << 32:
            raise RequestError(
                f"races: kernel {self.kernel} is launched with {count} programs; at most {(1 << 32 >> state.site_bits) - 3} "
                "can be told apart in a kernel of its size: check it on a smaller grid"
            )
        state.slots, state.known_count = len(self.slots), len(known)
        state.site_count, state.region_count = len(self.sites), len(regions)
        state.capacity = _CAPACITY
        state.args, state.known = ctypes.addressof(extents), ctypes.addressof(alive)
        state.sites, state.traffic = ctypes.addressof(sites), ctypes.addressof(self.counts)
        state.regions, state.region_of = ctypes.addressof(regions), ctypes.addressof(region_of)
        state.findings = ctypes.addressof(findings)
        state.order = None if order is None else order.ctypes.data
        self._fill(fill)
        status = self.library.effattn_launch_checked(self.packed, ctypes.byref(state))
        if status == _INTERRUPTED:
            raise KeyboardInterrupt(f"the launch of {self.kernel} ended before all its programs were done")
        if status:
            raise MemoryError(
                f"could not get {self.arena} bytes of working memory for kernel {self.kernel}, or the memory to check it"
            )
        return [self._finding(f) for f in findings[: state.finding_count]]

    def _fill(self, fill: _Fill) -> None:
        for name, value in (
            ("effattn_fill_float", fill.float_),
            ("effattn_fill_half", fill.half),
            ("effattn_fill_eighth", fill.eighth),
        ):
            ctypes.c_float.in_dll(self.library, name).value = value
        ctypes.c_int64.in_dll(self.library, "effattn_fill_int").value = fill.integer

    def _regions(self, wanted: int) -> tuple[Any, Any]:
        """Memory in which races are looked for, and the region of each slot (-1: none).

        Tensors that overlap are one region; what no site stores to is none, since loads and atomics alone never race.
        """
        slots = [s for s in self.slots if s.lo < s.hi] if wanted else []
        accesses = [s for s in self.sites if s.size]
        anywhere = [s for s in accesses if s.base < 0 or self.slots[s.base].hi < self.slots[s.base].lo]
        region_of = (ctypes.c_int64 * max(1, len(self.slots)))(*(-1 for _ in self.slots))
        found = []
        for lo, hi in _merged((s.lo, s.hi) for s in slots):
            inside = [k for k, s in enumerate(self.slots) if s.lo < s.hi and lo <= s.lo < hi]
            touching = [s for s in accesses if s.base in inside] + anywhere
            kinds = {s.kind for s in touching}
            if probes.STORE not in kinds:
                continue
            for k in inside:
                region_of[k] = len(found)
            # Elements of the smallest size, so that every access is a whole number of cells.
            size = min([self.slots[k].size for k in inside] + [s.size for s in touching])
            found.append((lo, hi, size.bit_length() - 1, sum(1 << kind for kind in kinds), 0, 0, 0))
        return (_Region * len(found))(*found), region_of

    def _count_traffic(self) -> None:
        if "traffic" not in self.asked:
            return
        for site, counts in zip(self.sites, self.counts, strict=False):
            if site.kind not in (probes.LOAD, probes.STORE, probes.ATOMIC):
                continue
            argument = self.slots[site.base].name if site.base >= 0 else "(addresses from memory)"
            t = self.checks.report.traffic.setdefault((self.kernel, argument), Traffic())
            if site.kind != probes.STORE:
                t.loaded += counts.bytes
                t.loaded_sectors += counts.sectors
            if site.kind != probes.LOAD:
                t.stored += counts.bytes
                t.stored_sectors += counts.sectors

    # -- what was found

    def _program(self, number: int) -> tuple[int, int, int]:
        x, y, _ = self.grid
        return (number % x, number // x % y, number // (x * y))

    def _finding(self, f: _Found) -> Finding:
        site = self.sites[f.site] if f.site >= 0 else probes.Site(-1, "", 0)
        slot = self.slots[f.slot] if f.slot >= 0 else None
        offset = offset_bytes = None
        element = f"address {f.address:#x}"
        if slot is not None and f.kind in (_OUTSIDE, _RACE, _WAITS):
            offset_bytes = f.address - slot.lo
            offset = offset_bytes // slot.size
            element = f"element {offset} of {slot.name} (byte {offset_bytes} from its first element)"
        done, expected = self._words(f, site, slot, element)
        other = self.sites[f.other_site] if f.kind == _RACE else None
        return Finding(
            instrument="races" if f.kind == _RACE else "bounds",
            kernel=self.kernel,
            file=site.file,
            line=site.line,
            argument=slot.name if slot is not None else "",
            program=self._program(f.program),
            offset=offset,
            offset_bytes=offset_bytes,
            other_line=other.line if other is not None else 0,
            other_program=self._program(f.other_program) if other is not None else None,
            times=f.times,
            done=done,
            expected=expected,
        )

    def _words(self, f: _Found, site: probes.Site, slot: _Slot | None, element: str) -> tuple[str, str]:
        verb = _VERBS.get(site.kind, "access to")
        if f.kind == _OUTSIDE:
            assert slot is not None
            return f"{verb} {element}", slot.words
        if f.kind == _WILD:
            return f"{verb} {element}", "an address in a tensor of the launch or in another one that is alive"
        if f.kind == _WRAPPED:
            to = f", which goes to an address in {slot.name}" if slot is not None else ""
            return (
                f"the result of `{site.what}` is {f.value}{to}; as an integer of 32 bits or less it wraps around",
                "offsets that fit: compute them in 64 bits, as by .to(tl.int64)",
            )
        if f.kind == _ZERO_DIVISOR:
            return f"integer division by zero (`{site.what}`)", "a divisor other than 0"
        if f.kind == _ENDLESS:
            return (
                f"a loop does not end: the program's loops have turned {f.value} times",
                f"at most {self.checks.max_turns} turns (max_turns) and {self.checks.max_seconds:g} s (max_seconds)",
            )
        if f.kind == _WAITS:
            return (
                f"the program waits: {f.value} times in a row it has read {element}, which no program that ran before "
                "changes any more; programs run one after the other here",
                "programs that wait for none that comes later in the order",
            )
        if f.kind == _SIGNAL:
            name = signal.Signals(f.value).name
            return (
                f"the program was stopped by {name} at address {f.address:#x}, in or after this access",
                "memory that can be accessed: the tensor says more than it has",
            )
        other = self.sites[f.other_site]
        return (
            f"{verb} {element}, which program {self._program(f.other_program)} "
            f"{_PAST.get(other.kind, 'accessed')} at line {other.line}",
            "no two programs at one element, unless both only load or update it atomically",
        )


_VERBS = {probes.LOAD: "load of", probes.STORE: "store to", probes.ATOMIC: "atomic update of"}
_PAST = {probes.LOAD: "loaded", probes.STORE: "stored to", probes.ATOMIC: "updated atomically"}


def _because(finding: Finding, instrument: str, how: str) -> Finding:
    from dataclasses import replace

    return replace(finding, instrument=instrument, done=finding.done + how)


def _distinct(found: list[Finding]) -> list[Finding]:
    """One finding for each argument that differs, and no more."""
    kept: dict[tuple[str, str, int, str], Finding] = {}
    for f in found:
        kept.setdefault(
            (f.instrument, f.argument, f.line, f.done if f.instrument in ("bounds", "races") else ""), f
        )
    return list(kept.values())


def _difference(slot: _Slot, first: Any, second: Any) -> tuple[int, str, str] | None:
    """The first element that differs, and both values. Two NaN are the same: their bits are not specified."""
    rows = (first.reshape(-1, slot.size) != second.reshape(-1, slot.size)).any(1)
    a, b = (_elements(slot.value, x, rows) for x in (first, second))
    for place, x, y in zip(rows.nonzero()[0].tolist(), a.tolist(), b.tolist(), strict=True):
        if x == x or y == y:
            return place, repr(x), repr(y)
    return None


def _elements(like: torch.Tensor, raw: Any, rows: Any) -> torch.Tensor:
    import torch

    size = like.element_size()
    chosen = torch.from_numpy(raw.reshape(-1, size)[rows].copy()).reshape(-1).view(like.dtype)
    return chosen.to(torch.float64) if chosen.is_floating_point() else chosen


def _index(slot: _Slot, at: int) -> str:
    """The index of an element of a view, from its offset; the offset alone where strides overlap."""
    shape, strides = tuple(slot.value.shape), tuple(slot.value.stride())
    rest, index = at, [0] * len(shape)
    for axis in sorted(range(len(shape)), key=lambda d: -strides[d]):
        if shape[axis] > 1 and strides[axis] > 0:
            index[axis], rest = divmod(rest, strides[axis])
    if rest or any(i >= n for i, n in zip(index, shape, strict=True)):
        return f"at offset {at}"
    return "[" + ", ".join(map(str, index)) + "]"


__all__ = ["Fault", "run"]
