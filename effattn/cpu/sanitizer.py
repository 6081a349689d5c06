"""The sanitizer: `with effattn.cpu.checks("bounds", "races") as report:`.

Kernels that are launched inside the block are compiled with instruments, and every launch is looked at:

  bounds   each load, store and atomic operation stays inside the tensor that its address was made from: between the
           first and the last element of the view that the kernel was given (gaps between the rows of a strided view are
           not told apart from its elements; masked-off elements are not looked at). An address that was loaded from
           memory must lie in some tensor that is alive. Also: 32-bit offsets that wrap around on their way to an address,
           integer divisions by zero, loops that do not end.
  races    two programs touch one element, one of them with a plain store, and nothing orders them. Atomic operations
           order: what a program did before an atomic update that is not relaxed is seen by who acquires the same address
           afterwards and looks at the result.
  poison   elements that masked loads without `other` leave undefined, and memory of `torch.empty` and its like, reach no
           output. The launch is repeated with other values in the undefined elements, from the same inputs.
  order    programs in reversed and in shuffled order give the same bits.
  traffic  bytes loaded and stored for each argument.

Programs run one after the other on one thread. A program that does something forbidden ends there, before it does it, so
nothing outside of a tensor is read or written and the process lives on. Whichever instruments are on, no access leaves its
tensor. Outside of such a block nothing of this exists: kernels and launches are what they are without it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from effattn.cpu import session
from effattn.errors import EffattnError, RequestError

if TYPE_CHECKING:
    from effattn.cpu.poison import Allocations

#: what can be asked for
INSTRUMENTS = ("bounds", "races", "poison", "order", "traffic")
#: What a program may do before it is taken not to end. Turns of loops, all loops of a program together; seconds.
MAX_TURNS, MAX_SECONDS = 100_000_000, 300.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that a kernel does and must not do."""

    #: the instrument: "bounds", "races", "poison" or "order"
    instrument: str
    kernel: str
    file: str = ""
    line: int = 0
    #: the kernel's argument that is accessed; empty where it is not known
    argument: str = ""
    program: tuple[int, int, int] | None = None
    #: of the element, from the first element of the tensor that was passed: in elements, in bytes
    offset: int | None = None
    offset_bytes: int | None = None
    #: races: the other access
    other_line: int = 0
    other_program: tuple[int, int, int] | None = None
    #: how often it was met; for accesses, in how many programs or rows
    times: int = 1
    #: what was done, and what was expected, in words
    done: str
    expected: str

    @property
    def place(self) -> str:
        """Kernel, line and program."""
        where = f", {Path(self.file).name}:{self.line}" if self.file else ""
        program = f", program {self.program}" if self.program is not None else ""
        return f"kernel {self.kernel}{where}{program}"

    def __str__(self) -> str:
        again = f" ({self.times} times)" if self.times > 1 else ""
        return f"{self.instrument}: {self.place}: {self.done}; expected {self.expected}{again}"


class Fault(EffattnError):
    """Raised by a launch in which a check found something; `findings` has it all."""

    def __init__(self, findings: list[Finding]) -> None:
        self.findings = tuple(findings)
        more = len(findings) - 1
        super().__init__(
            str(findings[0]) + (f"\nand {more} more:\n" + "\n".join(map(str, findings[1:])) if more else "")
        )


@dataclass
class Traffic:
    """What the launches of a kernel moved through one argument."""

    loaded: int = 0  #: bytes of the elements that were loaded; an element counts as often as it is loaded
    stored: int = 0  #: bytes of the elements that were stored or updated
    loaded_sectors: int = 0  #: 32-byte sectors that the rows of each tile touch
    stored_sectors: int = 0


@dataclass
class Report:
    """What the checks found."""

    instruments: tuple[str, ...]
    findings: list[Finding] = field(default_factory=list)
    #: by kernel and argument
    traffic: dict[tuple[str, str], Traffic] = field(default_factory=dict)
    launches: int = 0
    #: findings that a traceback on the standard error has told already
    told: set[Finding] = field(default_factory=set)

    def summary(self) -> str:
        """All of it as text: one line for each finding that was not told, and the table of traffic."""
        lines = [str(finding) for finding in self.findings if finding not in self.told]
        launches = "1 launch" if self.launches == 1 else f"{self.launches} launches"
        found = {0: "nothing found", 1: "1 finding"}.get(len(self.findings), f"{len(self.findings)} findings")
        before = len(self.findings) - len(lines)
        above = "" if not before else ", told above" if not lines else f", {before} told above"
        lines.append(f"checked {', '.join(self.instruments)} in {launches}: {found}{above}")
        return "\n".join([*lines, *self.traffic_lines()])

    def traffic_lines(self) -> list[str]:
        """The table of traffic; empty where it was not counted."""
        if not self.traffic:
            return []
        rows: list[tuple[str, ...]] = [("kernel", "argument", "loaded", "in sectors", "stored", "in sectors")]
        total: dict[str, Traffic] = {}
        for (kernel, argument), t in self.traffic.items():
            rows.append((kernel, argument, *_cells(t)))
            whole = total.setdefault(kernel, Traffic())
            for name in ("loaded", "stored", "loaded_sectors", "stored_sectors"):
                setattr(whole, name, getattr(whole, name) + getattr(t, name))
        rows += [(kernel, "total", *_cells(t)) for kernel, t in total.items()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return [
            "  ".join(
                text.ljust(n) if i < 2 else text.rjust(n)
                for i, (text, n) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]


def _cells(t: Traffic) -> tuple[str, ...]:
    numbers = (t.loaded, 32 * t.loaded_sectors, t.stored, 32 * t.stored_sectors)
    return tuple(f"{n:,} B" for n in numbers)


def parse(names: str | tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """Names of instruments, from a list or from a text with commas, in the order of INSTRUMENTS.

    Raises RequestError for a name that is not known, and where there is none.
    """
    given = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    given = [name for name in given if name]
    for name in given:
        if name not in INSTRUMENTS:
            close = get_close_matches(name, INSTRUMENTS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RequestError(f"unknown check {name!r}; expected some of {', '.join(INSTRUMENTS)}{hint}")
    if not given:
        raise RequestError(f"no check was named; expected some of {', '.join(INSTRUMENTS)}")
    return tuple(name for name in INSTRUMENTS if name in given)


class Checks:
    """Check the kernels that are launched inside the block; gives a Report.

    Args:
        instruments: names out of INSTRUMENTS.
        raise_: a launch with a finding raises Fault. If false, findings only go into the report, and the host's code
            goes on with what the kernel has written by then.
        max_turns: turns of its loops after which a program is taken not to end.
        max_seconds: the same in seconds of one program.
        max_spins: reads of one and the same element, with no other access between, after which a program is taken to
            wait for another one. max_turns / 100 if not given.
        seed: of the shuffled order.

    Raises:
        RequestError: a name that is not known, or none; a limit that is not positive.
    """

    def __init__(
        self,
        *instruments: str,
        raise_: bool = True,
        max_turns: int = MAX_TURNS,
        max_seconds: float = MAX_SECONDS,
        max_spins: int | None = None,
        seed: int = 0,
    ) -> None:
        self.instruments = parse(instruments)
        spins = max(1, max_turns // 100) if max_spins is None else max_spins
        for name, value in (("max_turns", max_turns), ("max_seconds", max_seconds), ("max_spins", spins)):
            if value <= 0:
                raise RequestError(f"{name}={value}: expected a positive number")
        self.raises = raise_
        self.max_turns, self.max_seconds, self.max_spins, self.seed = max_turns, max_seconds, spins, seed
        self.report = Report(self.instruments)
        self.allocations: Allocations | None = None

    def begin(self) -> Report:
        """Start; `end` stops."""
        if "poison" in self.instruments:
            from effattn.cpu.poison import Allocations

            self.allocations = Allocations(functools.partial(self.record, launches=0))
            self.allocations.begin()
        session.begin(self)
        return self.report

    def end(self) -> list[Finding]:
        """Stop. Returns what can only be known at the end: elements of outputs that no kernel has written."""
        session.end(self)
        if self.allocations is None:
            return []
        self.allocations.end()
        found = self.allocations.unwritten()
        self.report.findings += found
        self.allocations = None
        return found

    def note(self, found: list[Finding], *, launches: int = 1) -> None:
        """Take findings, and the number of launches that they are all of."""
        self.report.launches += launches
        self.report.findings += found

    def record(self, found: list[Finding], *, launches: int = 1) -> None:
        """Take the findings of one launch. Raises Fault where there are some and the checks raise."""
        self.note(found, launches=launches)
        if found and self.raises:
            raise Fault(found)

    def __enter__(self) -> Report:
        return self.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = self.end()
        if found and self.raises and error is None:
            raise Fault(found)


#: as it is used: `with effattn.cpu.checks(...)`
checks = Checks
