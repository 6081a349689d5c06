"""Expected failures: laws that a method is known to break, each with the reason, in a file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

from effattn.errors import RequestError

#: the name under which the comparison with exact attention stands among the laws
ACCURACY = "output_is_within_what_rounding_explains"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """A failure that is known: an entry of a file of expected failures."""

    law: str
    #: "*" for all
    dtype: str
    reason: str

    def covers(self, law: str | None, dtype: str) -> bool:
        """Whether it speaks of this law in this dtype."""
        return law == self.law and self.dtype in ("*", dtype)


def expected_failures(path: str | Path) -> list[Expected]:
    """Reads a TOML file of expected failures.

        [[expected]]
        law = "the_same_call_twice_gives_the_same_bits"
        dtype = "bf16"          # left out: every dtype
        reason = "atomics in the backward pass"

    Raises:
        RequestError: no such file, not TOML, unknown keys or laws, or an entry without a reason.
    """
    from effattn.case import DTYPES
    from effattn.properties import law

    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"expected failures {path}: there is no such file. Check the path.") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RequestError(
            f"expected failures {path}: {error}. Expected TOML with [[expected]] entries."
        ) from None
    unknown = set(data) - {"expected"}
    if unknown or not isinstance(data.get("expected", []), list):
        raise RequestError(
            f"expected failures {path}: expected [[expected]] entries only, not {sorted(unknown)}"
        )
    entries = []
    for entry in data.get("expected", []):
        if (
            not isinstance(entry, dict)
            or not set(entry) <= {"law", "dtype", "reason"}
            or not {"law", "reason"} <= set(entry)
        ):
            raise RequestError(
                f"expected failures {path}: {entry!r}; expected law, reason, and perhaps dtype"
            )
        if entry["law"] != ACCURACY:
            law.get(entry["law"])
        if not str(entry["reason"]).strip():
            raise RequestError(
                f"expected failures {path}: the entry for {entry['law']!r} has no reason; give one"
            )
        if entry.get("dtype", "*") not in ("*", *DTYPES):
            raise RequestError(
                f"expected failures {path}: dtype {entry['dtype']!r}; expected one of {', '.join(DTYPES)}, or none"
            )
        entries.append(Expected(law=entry["law"], dtype=entry.get("dtype", "*"), reason=entry["reason"]))
    return entries
