"""One launch of an instrumented kernel: what it may touch, the runs that the checks need, and what they found.

The first run takes the programs in order. `poison` repeats the launch with other values in undefined elements, `order`
with the programs in other orders, each from the memory that the first run began with; what they leave is compared bit for
bit, and in the end memory holds what the first run left.
"""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from effattn.cpu import probes, session
from effattn.cpu.checked_memory import (
    LARGE,
    NAN,
    SMALL,
    ZERO,
    Fill,
    Slot,
    Stale,
    alive,
    copied,
    difference,
    index_of,
    memcmp,
    memory,
    merged,
    slot_of,
    stale_of,
    unmoved,
)
from effattn.cpu.sanitizer import Checks, Fault, Finding, Traffic
from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from effattn.cpu.launch import Launcher

# The same numbers are in checks.c.
_RACES, _TRAFFIC, _WRAPS = 1, 2, 4
_OUTSIDE, _WILD, _WRAPPED, _ZERO_DIVISOR, _ENDLESS, _WAITS, _SIGNAL, _RACE = range(1, 9)
_INTERRUPTED = 2  # of runtime.c
_CAPACITY = 64  # different findings of one launch

_lock = threading.Lock()

if TYPE_CHECKING:
    #: makes a further run and gives what it finds
    _Again = Callable[["_Trial"], list[Finding]]


class _Extent(ctypes.Structure):
    _fields_ = [("lo", ctypes.c_int64), ("hi", ctypes.c_int64)]


class _Site(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int32) for name in ("kind", "base", "size", "flags", "choice_at", "choice_count")
    ]


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
        for name in (
            "args",
            "known",
            "sites",
            "choices",
            "region_of",
            "regions",
            "traffic",
            "order",
            "findings",
        )
    ]


@dataclass(frozen=True)
class _Trial:
    """One further run: what is other than in the first."""

    #: what elements that masked loads leave undefined hold
    fill: Fill = NAN
    #: the order of the programs, and that order in words
    order: NDArray[np.int64] | None = None
    words: str = ""
    #: what elements hold that nobody has written; None: what they held in the first run
    stale: Fill | None = None

    @property
    def instrument(self) -> str:
        return "order" if self.words else "poison"

    @property
    def how(self) -> str:
        if self.words:
            return f"with the programs {self.words}"
        if self.stale is not None:
            return f"with {self.stale.words} in elements that were never written"
        return f"with {self.fill.words} in undefined elements"


def run(launcher: Launcher, function: int, grid: tuple[int, int, int], args: Sequence[Any]) -> None:
    """Launch an instrumented kernel. Raises Fault where something was found and the checks raise.

    Outside of every block, as for a kernel that was kept from inside of one, accesses alone are looked at.
    """
    checks = session.current() or Checks("bounds")
    with _lock:
        launch = _Launch(launcher, function, grid, args, checks)
        try:
            launch.run()
        except KeyboardInterrupt:
            checks.note(_distinct(launch.found))
            raise
    checks.record(launch.found)


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
        table, objects, names = launcher.probes
        self.sites = [probes.Site(*row[:-1], choice=tuple(row[-1])) for row in table["sites"]]
        self.undefined: list[tuple[str, int]] = [tuple(place) for place in table["undefined"]]
        self.float_atomics: list[tuple[str, int]] = [tuple(place) for place in table["float_atomics"]]
        self.steered = bool(table["steered"])
        #: what undefined elements hold where they are not looked at: what they hold without checks. On a GPU nothing happens
        #: where one is divided by and masked off afterwards, so none is a zero then.
        self.zero = replace(ZERO, integer=1, words="zeros (1 for integers)") if table["divided"] else ZERO
        #: what is tried in undefined elements beside NaN
        self.fills = [
            LARGE,
            *([self.zero] if table["computed"] else []),
            *([SMALL] if table["ordered"] else []),
        ]
        self.slots = [slot_of(name, x) for name, x in zip(names, objects(*args), strict=True)]
        accesses = [s for s in self.sites if s.kind in (probes.LOAD, probes.STORE, probes.ATOMIC)]
        self.loose = any(self._anywhere(s) for s in accesses)
        self.written = self._written(accesses)
        self.found: list[Finding] = []

    def _written(self, accesses: list[probes.Site]) -> list[Slot]:
        """The tensors that the kernel may write to."""
        writes = [s for s in accesses if s.kind != probes.LOAD]
        bases = {b for s in writes for b in s.slots}
        if any(self._anywhere(s) for s in writes):
            bases = set(range(len(self.slots)))
        return [self.slots[b] for b in sorted(bases) if self.slots[b].lo < self.slots[b].hi]

    def _anywhere(self, site: probes.Site) -> bool:
        """Whether an access may be to any tensor, as far as is known."""
        return not site.slots or any(self.slots[b].hi < self.slots[b].lo for b in site.slots)

    # -- the runs

    def run(self) -> None:
        """All runs; what they find is in `found`, at any time."""
        checks = self.checks
        poisons = "poison" in self.asked and bool(self.undefined)
        count = self.grid[0] * self.grid[1] * self.grid[2]
        orders = "order" in self.asked and count > 1
        self.stale = self._stale()
        read = [(s.slot.lo, s.slot.hi) for s in self.stale]
        self.spans = merged([(slot.lo, slot.hi) for slot in self.written] + read)
        # Nothing that is written is read: each run begins alike by itself, and a digest says whether it ends alike.
        fresh = not self.stale and not self._reads_what_it_writes() and not (poisons and self.steered)
        again = poisons or orders or bool(self.stale)
        before = [copied(k, *span) for k, span in enumerate(self.spans)] if again and not fresh else None
        state = self._state()
        if "races" in self.asked:
            state.flags |= _RACES
        if "traffic" in self.asked:
            state.flags |= _TRAFFIC
        first = _Trial(NAN if "poison" in self.asked else self.zero)
        whole = False
        try:
            self.found += self._once(state, first, cut_short=self.found)
            whole = not any(f.instrument == "bounds" for f in self.found)
        finally:
            self._count_traffic()
            if checks.allocations is not None:
                for slot in self.written:
                    checks.allocations.stored(slot.lo, slot.hi, self.kernel, slot.name, whole=whole)
        if not (whole and again):
            return
        # Each further run leaves memory as the first one did.
        repeat = self._afresh(first) if before is None else self._restored(before)
        for trial in self._trials(first, poisons, count if orders else 0):
            self.found += repeat(trial)
        self.found = _distinct(self.found)

    def _trials(self, first: _Trial, poisons: bool, count: int) -> Iterator[_Trial]:
        """The further runs. `count`: programs, where their order is looked at."""
        if self.stale:
            yield from (replace(first, stale=fill) for fill in (LARGE, SMALL, ZERO))
        if poisons:
            yield from (replace(first, fill=fill) for fill in self.fills)
        if count:
            yield from (replace(first, words=words, order=order) for words, order in self._orders(count))

    def _stale(self) -> list[Stale]:
        """Of the tensors that may be read, the elements that nobody has written."""
        allocations = self.checks.allocations
        if allocations is None:
            return []
        read = {b for s in self.sites if s.kind in (probes.LOAD, probes.ATOMIC) for b in s.slots}
        found = (stale_of(self.slots[b], allocations) for b in sorted(read))
        return [x for x in found if x is not None]

    def _reads_what_it_writes(self) -> bool:
        """Whether a kernel may read memory that it may also write to."""
        if self.loose:
            return True
        read = [self.slots[b] for s in self.sites if s.kind in (probes.LOAD, probes.ATOMIC) for b in s.slots]
        return any(slot.lo < hi and lo < slot.hi for slot in read for lo, hi in self.spans)

    def _orders(self, count: int) -> Iterator[tuple[str, NDArray[np.int64]]]:
        import numpy as np

        yield "reversed", np.arange(count, dtype=np.int64)[::-1].copy()
        shuffled = np.random.default_rng(self.checks.seed).permutation(count).astype(np.int64)
        yield f"shuffled (seed {self.checks.seed})", shuffled

    def _restored(self, before: list[NDArray[np.uint8]]) -> _Again:
        """One more run from the memory of before, compared with copies of what the first run has left."""
        after = [copied(k + len(self.spans), *span) for k, span in enumerate(self.spans)]

        def again(trial: _Trial) -> list[Finding]:
            for (lo, hi), kept in zip(self.spans, before, strict=True):
                ctypes.memmove(lo, kept.ctypes.data, hi - lo)
            if trial.stale is not None:
                for stale in self.stale:
                    stale.refill(trial.stale)
            found = self._stopped(trial)
            if not found:
                for (lo, hi), kept in zip(self.spans, after, strict=True):
                    if not found and memcmp(lo, kept.ctypes.data, hi - lo):
                        found = self._compared(lo, hi, kept, memory(lo, hi), trial)
            for (lo, hi), kept in zip(self.spans, after, strict=True):
                ctypes.memmove(lo, kept.ctypes.data, hi - lo)
            return found

        return again

    def _afresh(self, first: _Trial) -> _Again:
        """One more run over the memory as it is; only where the digests differ is anything copied and compared."""
        digests = [self.library.effattn_digest(lo, hi - lo) for lo, hi in self.spans]

        def again(trial: _Trial) -> list[Finding]:
            found = self._stopped(trial)
            now = [self.library.effattn_digest(lo, hi - lo) for lo, hi in self.spans]
            if now == digests:
                return found
            others = [copied(k, *span) for k, span in enumerate(self.spans)]
            self._once(self._state(), first)
            for (lo, hi), other in zip(self.spans, others, strict=True):
                if not found and memcmp(lo, other.ctypes.data, hi - lo):
                    found = self._compared(lo, hi, memory(lo, hi), other, trial)
            return found

        return again

    def _stopped(self, trial: _Trial) -> list[Finding]:
        """Run once more; the findings of a program that was stopped in this run and in no other."""
        found = self._once(self._state(), trial)
        return [replace(f, instrument=trial.instrument, done=f"{f.done} ({trial.how})") for f in found]

    def _compared(
        self, lo: int, hi: int, first: NDArray[np.uint8], second: NDArray[np.uint8], trial: _Trial
    ) -> list[Finding]:
        """The first element of each tensor in a span of memory that two runs have left different."""
        found = []
        for slot in self.written:
            if lo <= slot.lo and slot.hi <= hi:
                there = slice(slot.lo - lo, slot.hi - lo)
                left = second[there]
                if trial.stale is not None:
                    left = unmoved(slot, first[there], left, trial.stale)
                different = difference(slot, first[there], left)
                if different is not None:
                    found.append(self._differs(slot, *different, trial))
        return found[:1]

    def _differs(self, slot: Slot, at: int, first: str, second: str, trial: _Trial) -> Finding:
        index = index_of(slot, at)
        common = {
            "kernel": self.kernel,
            "argument": slot.name,
            "offset": at,
            "offset_bytes": at * slot.size,
        }
        if trial.stale is not None:
            return self._never_written(f"element {index} of {slot.name}", first, second, trial.stale, common)
        if trial.words:
            writers = [s for s in self.sites if s.size and s.kind != probes.LOAD]
            here = [s for s in writers if any(self.slots[b] is slot for b in s.slots)] or writers
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
                done=f"element {index} of {slot.name} is {first} with the programs in order and {second} with them {trial.words}",
                expected=f"the same bits in any order{why}",
                **common,
            )
        file, line = self.undefined[0]
        lines = ", ".join(sorted({str(line) for _, line in self.undefined}, key=int))
        return Finding(
            instrument="poison",
            file=file,
            line=line,
            done=f"element {index} of {slot.name} is {first} with NaN and {second} with {trial.fill.words} in the elements that "
            f"masked loads without `other` leave undefined (line {lines})",
            expected="no undefined element to reach an output: give the load an `other`, or mask what is computed from it",
            **common,
        )

    def _never_written(
        self, element: str, first: str, second: str, fill: Fill, common: dict[str, Any]
    ) -> Finding:
        """An output that depends on memory without contents."""
        slots = [s.slot for s in self.stale]
        loads = [s for s in self.sites if s.kind in (probes.LOAD, probes.ATOMIC)]
        here = [s for s in loads if any(self.slots[b] in slots for b in s.slots)]
        lines = ", ".join(sorted({str(s.line) for s in here}, key=int))
        of = " and ".join(f"{s.slot.name} ({s.origin})" for s in self.stale)
        return Finding(
            instrument="poison",
            file=here[0].file,
            line=here[0].line,
            done=f"{element} is {first} with NaN (0x5a... for integers) and {second} with {fill.words} in the "
            f"elements of {of} that nobody has written (read in line {lines})",
            expected="every element that reaches an output to be written before it is read",
            **common,
        )

    def _state(self) -> _State:
        checks = self.checks
        state = _State()
        state.flags = _WRAPS if "bounds" in self.asked else 0
        state.max_turns, state.max_spins = checks.max_turns, checks.max_spins
        state.max_nanoseconds = int(checks.max_seconds * 1e9)
        return state

    def _once(self, state: _State, trial: _Trial, cut_short: list[Finding] | None = None) -> list[Finding]:
        """Run the grid once. `cut_short` gets what was found by then where Ctrl-C ends the run."""
        order = trial.order
        count = self.grid[0] * self.grid[1] * self.grid[2]
        extents = (_Extent * max(1, len(self.slots)))(*((s.lo, s.hi) for s in self.slots))
        choices: list[int] = []
        rows: list[tuple[int, ...]] = []
        for s in self.sites:
            choice = () if self._anywhere(s) else s.choice
            rows.append((s.kind, s.base, s.size, s.flags, len(choices), len(choice)))
            choices += choice
        sites = (_Site * max(1, len(self.sites)))(*rows)
        chosen = (ctypes.c_int32 * max(1, len(choices)))(*choices)
        known = alive() if self.loose else []
        living = (_Extent * max(1, len(known)))(*known)
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
        state.args, state.known = ctypes.addressof(extents), ctypes.addressof(living)
        state.sites, state.traffic = ctypes.addressof(sites), ctypes.addressof(self.counts)
        state.choices = ctypes.addressof(chosen)
        state.regions, state.region_of = ctypes.addressof(regions), ctypes.addressof(region_of)
        state.findings = ctypes.addressof(findings)
        state.order = None if order is None else order.ctypes.data
        self._fill(trial.fill)
        try:
            # Python's own handler raises as soon as this returns; only one that does not raise lets us come further.
            status = self.library.effattn_launch_checked(self.packed, ctypes.byref(state))
            if status == _INTERRUPTED:
                raise KeyboardInterrupt(
                    f"the launch of {self.kernel} ended before all its programs were done"
                )
        except KeyboardInterrupt:
            if cut_short is not None:
                cut_short += [self._finding(f) for f in findings[: state.finding_count]]
            raise
        if status:
            raise MemoryError(
                f"could not get {self.arena} bytes of working memory for kernel {self.kernel}, or the memory to check it"
            )
        return [self._finding(f) for f in findings[: state.finding_count]]

    def _fill(self, fill: Fill) -> None:
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
        anywhere = [s for s in accesses if self._anywhere(s)]
        region_of = (ctypes.c_int64 * max(1, len(self.slots)))(*(-1 for _ in self.slots))
        found = []
        for lo, hi in merged((s.lo, s.hi) for s in slots):
            inside = [k for k, s in enumerate(self.slots) if s.lo < s.hi and lo <= s.lo < hi]
            touching = [s for s in accesses if not set(s.slots).isdisjoint(inside)] + anywhere
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
            names = [self.slots[b].name for b in site.slots]
            argument = " or ".join(names) if names else "(addresses from memory)"
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
        if f.kind == _WILD and not self._anywhere(site):
            # Of the arguments that the address is chosen from, the one that it misses by least.
            choice = [self.slots[b] for b in site.slots]
            slot = min(choice, key=lambda x: max(x.lo - f.address, f.address + site.size - x.hi))
        offset = offset_bytes = None
        element = f"address {f.address % (1 << 64):#x}"
        if slot is not None and f.kind in (_OUTSIDE, _WILD, _RACE, _WAITS):
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

    def _words(self, f: _Found, site: probes.Site, slot: Slot | None, element: str) -> tuple[str, str]:
        verb = _VERBS.get(site.kind, "access to")
        if f.kind in (_OUTSIDE, _WILD) and slot is not None:
            others = [x.name for b in site.slots if (x := self.slots[b]) is not slot]
            beside = f", or an element of {' or '.join(others)}" if others else ""
            return f"{verb} {element}", slot.words + beside
        if f.kind == _WILD:
            return f"{verb} {element}", "an address in a tensor of the launch or in another one that is alive"
        if f.kind == _WRAPPED:
            to = f", which goes to an address in {slot.name}" if slot is not None else ""
            # The product of two unsigned numbers of 32 bits has 64.
            value = f.value % (1 << 64) if site.flags and site.what == "*" else f.value
            return (
                f"the result of `{site.what}` is {value}{to}; as an integer of 32 bits or less it wraps around",
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
                f"the program was stopped by {name} at address {f.address % (1 << 64):#x}, in or after this access",
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


def _distinct(found: list[Finding]) -> list[Finding]:
    """One finding for each argument that differs, and no more."""
    kept: dict[tuple[str, str, int, str], Finding] = {}
    for f in found:
        kept.setdefault(
            (f.instrument, f.argument, f.line, f.done if f.instrument in ("bounds", "races") else ""), f
        )
    return list(kept.values())


__all__ = ["Fault", "run"]
