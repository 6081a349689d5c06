"""Numbers and names as text, the same in every report.

Names and messages come from users' files: `plain` makes them harmless on a terminal, `markdown` in Markdown.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence

MISSING = "-"
#: What means something inside a line of Markdown: emphasis, code, links, table cells, mathematics.
_MARKDOWN = frozenset("\\`*_[]|~$")
#: What begins a numbered list.
_NUMBERED = re.compile(r"^(\d{1,9})([.)])(?=\s|$)")
#: What would become HTML, or notify the person of that name.
_ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;", "@": "&#64;"}


def number(x: float | None, *, digits: int = 2) -> str:
    """About three figures: 0.41, 12.3, 4.1e+06; inf and nan as words."""
    if x is None:
        return MISSING
    if math.isnan(x) or math.isinf(x):
        return str(x)
    if abs(x) > 1e100:  # an error where none is allowed
        return "inf" if x > 0.0 else "-inf"
    magnitude = abs(x)
    if x == 0 or 10**-digits <= magnitude < 100:
        return f"{x + 0.0:.{digits}f}"  # no minus before 0.00
    if 100 <= magnitude < 100_000:
        return f"{x:.0f}"
    return f"{x:.1e}"


def fraction(x: float | None, *, digits: int = 2) -> str:
    """error/bound, with as many figures as it takes to tell which side of 1 it is on: 1.003, where `number` has 1.00."""
    if x is not None and x != 1 and round(x, digits) == 1:
        return next(shown for n in range(digits, 18) if float(shown := f"{x:.{n}f}") != 1)
    return number(x, digits=digits)


def ulps(x: float | None) -> str:
    """A distance in units of the last place: 0, 1.5, 85, 5e6."""
    if x is None:
        return MISSING
    if math.isnan(x) or math.isinf(x):
        return str(x)
    if x >= 100_000:
        mantissa, exponent = f"{x:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{x:.0f}" if x >= 10 or x == int(x) else f"{x:.1f}"


def share(x: float | None) -> str:
    """A share between 0 and 1 in percent, never rounded up to 100 %."""
    if x is None:
        return MISSING
    percent = math.floor(x * 1000) / 10
    return f"{percent:.1f} %"


def seconds(x: float) -> str:
    """A time: 0.4 ms, 12 ms, 3.4 s."""
    if x < 0.01:
        return f"{x * 1e3:.1f} ms"
    if x < 1:
        return f"{x * 1e3:.0f} ms"
    return f"{x:.1f} s"


def counts(failed: Mapping[str, int]) -> str:
    """Failing outcomes with their numbers, the most frequent first: 3 inaccurate, 1 non-finite."""
    ordered = sorted(failed.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {outcome}" for outcome, n in ordered) if failed else "0"


def plain(text: str) -> str:
    """The text without control characters (escape sequences of terminals, changes of direction, ends of lines but one)."""
    return "".join(
        c if c == "\n" or not _is_control(unicodedata.category(c)) else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )


def _is_control(category: str) -> bool:
    return category.startswith("C") or category in ("Zl", "Zp")


def one_line(text: str) -> str:
    """The text on one line, without control characters."""
    return plain(" ".join(text.split()))


def markdown(text: str) -> str:
    """The text as Markdown that shows it as it is: no markup, no HTML, no table cell ended early."""
    line = one_line(text)
    shown = "".join("\\" + c if c in _MARKDOWN else _ENTITIES.get(c, c) for c in line)
    # At the start of a line: headings, also of the line above, and lists.
    if line[:1] in ("#", "+", "-", "="):
        return "\\" + shown
    return _NUMBERED.sub(r"\1\\\2", shown)


def code(text: str) -> str:
    """The text as a Markdown code span, whatever backticks are in it."""
    line = one_line(text)
    longest = run = 0
    for c in line:
        run = run + 1 if c == "`" else 0
        longest = max(longest, run)
    fence = "`" * (longest + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line.strip() else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def some(names: Sequence[str], *, most: int = 3) -> str:
    """A few names, the rest counted: "a, b, c and 4 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
