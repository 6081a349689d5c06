"""What a sweep runs, from a TOML file: methods x dtypes x shapes x values x options x seeds.

    methods = ["flash", "my_kernels/attention.py:attention"]
    dtypes = ["fp16", "bf16"]
    shapes = [{ q_len = 64, kv_len = 64, head_dim = 64 }, { heads = 8, kv_heads = 2, q_len = 1, kv_len = 4096, head_dim = 128 }]
    values = ["normal", "outliers"]               # ["normal"] if left out
    options = [{}, { causal = "bottom-right" }]   # [{}] if left out
    seeds = { from = 0, count = 100 }             # or a list; [0] if left out
    mode = "product"                              # or "zip": item by item; or "random": some of the product
    samples = 1000                                # of "random"
    seed = 0                                      # of "random"

Shapes and options are fields of a case. The cases are numbered, and each is made from its number when its turn comes:
a list of millions is never built.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import random
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from effattn.case import DTYPES, SCHEMA, Case
from effattn.errors import RequestError

#: More cases than that are refused: at a millisecond each they would take three hours on one core.
MOST_CASES = 10_000_000
#: Combinations of dtype, shape, values and options that are tried before the first case runs, so that a contradiction is
#: found at once: 40 us each.
MOST_TRIED = 100_000
MODES = ("product", "zip", "random")
_KEYS = ("methods", "dtypes", "shapes", "values", "options", "seeds", "mode", "samples", "seed")
#: Keys of the mode "random" alone.
_OF_RANDOM = ("samples", "seed")
#: A case has none from there on.
_SEEDS = 2**63
#: The axes in the order of the product, the slowest first.
_AXES = ("methods", "dtypes", "shapes", "values", "options", "seeds")
#: Fields of a case that have an axis of their own.
_OWN_AXIS = {"dtype": "dtypes", "values": "values", "seed": "seeds"}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A checked specification."""

    methods: tuple[str, ...]
    dtypes: tuple[str, ...]
    shapes: tuple[Mapping[str, Any], ...]
    values: tuple[str, ...]
    options: tuple[Mapping[str, Any], ...]
    seeds: Sequence[int]
    mode: str
    samples: int
    seed: int

    @property
    def count(self) -> int:
        """How many cases there are."""
        if self.mode == "zip":
            return max(len(getattr(self, axis)) for axis in _AXES)
        return self.samples if self.mode == "random" else self.product

    @property
    def product(self) -> int:
        """How many combinations there are of everything with everything."""
        return math.prod(len(getattr(self, axis)) for axis in _AXES)

    @property
    def id(self) -> str:
        """A hash of what is to be run."""
        told = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    def cases(self) -> Iterator[tuple[str, Case]]:
        """Method and case, one after the other. Raises RequestError at the first combination that is no case."""
        for number in self._numbers():
            yield self.at(number)

    def _numbers(self) -> Iterator[int]:
        if self.mode == "random":
            yield from random.Random(self.seed).sample(range(self.product), self.samples)
        else:
            yield from range(self.count)

    def at(self, number: int) -> tuple[str, Case]:
        """Method and case of one number."""
        chosen: dict[str, Any] = {}
        for axis in reversed(_AXES):
            items = getattr(self, axis)
            if self.mode == "zip":
                chosen[axis] = _item(items, number)
            else:
                number, place = divmod(number, len(items))
                chosen[axis] = items[place]
        return chosen["methods"], _case(chosen)


def _case(chosen: Mapping[str, Any]) -> Case:
    try:
        return Case.from_dict(
            {
                "schema": SCHEMA,
                **chosen["shapes"],
                **chosen["options"],
                "dtype": chosen["dtypes"],
                "values": chosen["values"],
                "seed": chosen["seeds"],
            }
        )
    except RequestError as error:
        told = {axis: chosen[axis] for axis in _AXES if axis != "methods"}
        raise RequestError(f"the combination {told} is no case: {error}") from None


def load(path: Path) -> Spec:
    """Read and check a specification.

    Raises:
        RequestError: naming the key at fault and what is expected there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the specification {str(path)!r}: {error}") from None
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise RequestError(
            f"{str(path)!r} is nested too deeply; expected lists and tables as in docs/sweep.md"
        ) from None
    except ValueError as error:  # TOMLDecodeError, and that of a number with thousands of digits
        raise RequestError(f"{str(path)!r} is not TOML: {error}") from None
    try:
        return parse(data)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None


def parse(data: Mapping[str, Any]) -> Spec:
    """Check a specification given as data; errors as those of `load`."""
    for key in data:
        if key not in _KEYS:
            # One that is not given yet and, where there is such a one, that fits the mode.
            free = [name for name in _KEYS if name not in data]
            fitting = [name for name in free if name not in _OF_RANDOM or data.get("mode") == "random"]
            close = [
                match
                for names in (fitting, free, _KEYS)
                for match in difflib.get_close_matches(key, names, n=1)
            ]
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise RequestError(f"unknown key {key!r}; expected some of {', '.join(_KEYS)}{hint}")
    for key in ("methods", "dtypes", "shapes"):
        if key not in data:
            raise RequestError(f"{key!r} is missing; expected a list of at least one")
    mode = data.get("mode", "product")
    if mode not in MODES:
        raise RequestError(f"mode {mode!r}; expected one of {', '.join(MODES)}")
    for key in _OF_RANDOM:
        if key in data and mode != "random":
            hint = ", or write 'seeds'" if key == "seed" and "seeds" not in data else ""
            raise RequestError(
                f"{key!r} is for mode 'random', and the mode is {mode!r}; remove one of them{hint}"
            )
    if mode == "random" and "samples" not in data:
        raise RequestError(
            "'samples' is missing, which mode 'random' needs: how many of the combinations to run; write, say, samples = 1000"
        )
    spec = Spec(
        methods=_texts(data, "methods"),
        dtypes=_dtypes(data),
        shapes=_tables(data, "shapes"),
        values=_texts(data, "values") if "values" in data else ("normal",),
        options=_tables(data, "options") if "options" in data else ({},),
        seeds=_seeds(data.get("seeds", [0])),
        mode=mode,
        samples=_count(data, "samples", 0),
        seed=_count(data, "seed", 0),
    )
    _check_size(spec)
    _check_repeats(spec)
    _check_combinations(spec)
    return spec


def _check_size(spec: Spec) -> None:
    if spec.product > sys.maxsize:  # Python counts no range beyond that
        raise RequestError(
            f"{spec.product:,} combinations; expected at most {sys.maxsize:,}: take fewer seeds"
        )
    if spec.mode == "random" and not 1 <= spec.samples <= spec.product:
        raise RequestError(
            f"samples = {spec.samples}; expected 1 to {spec.product:,}, the number of combinations there are"
        )
    if spec.mode == "zip":
        lengths = {axis: len(getattr(spec, axis)) for axis in _AXES}
        if len({n for n in lengths.values() if n > 1}) > 1:
            told = ", ".join(f"{n} {axis}" for axis, n in lengths.items())
            raise RequestError(f"mode 'zip' with {told}; expected lists of one length, or of one item")
    if spec.count > MOST_CASES:
        how = " x ".join(f"{len(getattr(spec, axis)):,} {axis}" for axis in _AXES)
        raise RequestError(
            f'{spec.count:,} cases ({how}); at most {MOST_CASES:,} are run. Take fewer, or mode = "random" with samples'
        )


def _check_repeats(spec: Spec) -> None:
    """Refuse what is given twice: each case is recorded once, so the second would add nothing."""
    if spec.mode == "zip":
        seen: dict[str, int] = {}
        for number in range(min(spec.count, MOST_TRIED)):
            row = json.dumps([_item(getattr(spec, axis), number) for axis in _AXES], sort_keys=True)
            if row in seen:
                raise RequestError(
                    f"items {seen[row] + 1} and {number + 1} of the lists are the same case; expected each once"
                )
            seen[row] = number
        return
    for axis in _AXES:
        items = getattr(spec, axis)
        if isinstance(items, range):
            continue
        counted = Counter(json.dumps(item, sort_keys=True) for item in items)
        for item in items:
            if (times := counted[json.dumps(item, sort_keys=True)]) > 1:
                raise RequestError(f"{axis} has {item!r} {times} times; expected it once")


def _item(items: Sequence[Any], number: int) -> Any:
    """What `zip` takes of a list for one number."""
    return items[number if len(items) > 1 else 0]


def _check_combinations(spec: Spec) -> None:
    for name in sorted({name for shape in spec.shapes for name in shape}):
        if any(name in options for options in spec.options):
            raise RequestError(
                f"{name!r} is in shapes and in options, which contradict each other; keep it in one"
            )
    # Neither method nor seed decides whether a case is one.
    deciding = [len(getattr(spec, axis)) for axis in ("dtypes", "shapes", "values", "options")]
    if spec.mode == "zip":
        for number in range(min(max(deciding), MOST_TRIED)):
            spec.at(number)
        return
    rows = math.prod(deciding)
    if spec.mode == "product":
        wanted: Iterable[int] = range(rows)
    else:
        # In the order in which they come, each once.
        wanted = dict.fromkeys(number // len(spec.seeds) % rows for number in spec._numbers())
    for row in itertools.islice(wanted, MOST_TRIED):
        spec.at(row * len(spec.seeds))


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    given = data[key]
    if not isinstance(given, list):
        raise RequestError(f"{key} = {given!r}; expected a list")
    if not given:
        raise RequestError(f"{key} is empty, so there is no case at all; expected at least one")
    return given


def _texts(data: Mapping[str, Any], key: str) -> tuple[str, ...]:
    given = _list(data, key)
    for item in given:
        if not isinstance(item, str) or not item:
            raise RequestError(f"{key} has {item!r}; expected texts")
    return tuple(given)


def _dtypes(data: Mapping[str, Any]) -> tuple[str, ...]:
    given = _texts(data, "dtypes")
    for dtype in given:
        if dtype not in DTYPES:
            raise RequestError(f"dtypes has {dtype!r}; expected some of {', '.join(DTYPES)}")
    return given


def _tables(data: Mapping[str, Any], key: str) -> tuple[Mapping[str, Any], ...]:
    known = [field.name for field in fields(Case)]
    for table in _list(data, key):
        if not isinstance(table, dict):
            raise RequestError(
                f"{key} has {table!r}; expected tables such as {{ q_len = 64, kv_len = 64, head_dim = 32 }}"
            )
        for name in table:
            if name in _OWN_AXIS:
                raise RequestError(
                    f"{key} has {name!r}, which is given in {_OWN_AXIS[name]!r}; move it there"
                )
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else f"; there are {', '.join(known)}"
                raise RequestError(f"{key} has {name!r}, which is no field of a case{hint}")
            if not _is_plain(table[name]):
                raise RequestError(
                    f"{key} has {name} = {table[name]}; expected a number, a text or a list of those, no date and no time"
                )
    return tuple(data[key])


def _is_plain(value: Any) -> bool:
    """Whether JSON has it too; TOML has dates and times besides."""
    if isinstance(value, (list, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, (str, int, float))


def _seeds(given: Any) -> Sequence[int]:
    if isinstance(given, dict):
        if set(given) - {"from", "count"} or "count" not in given:
            raise RequestError(f"seeds = {given!r}; expected {{ from = 0, count = 100 }} or a list")
        first, count = (_count(given, name, 0) for name in ("from", "count"))
        if count < 1:
            raise RequestError("seeds has count 0, so there is no case at all; expected at least 1")
        if first + count >= _SEEDS:
            raise RequestError(f"seeds = {given!r}; expected seeds below 2**63 - 1")
        return range(first, first + count)
    if not isinstance(given, list) or not given:
        raise RequestError(
            f"seeds = {given!r}; expected {{ from = 0, count = 100 }} or a list of at least one"
        )
    for item in given:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise RequestError(f"seeds has {item!r}; expected whole numbers from 0")
    return tuple(given)


def _count(data: Mapping[str, Any], key: str, default: int) -> int:
    given = data.get(key, default)
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise RequestError(f"{key} = {given!r}; expected a whole number from 0")
    return given


def _plain(value: Any) -> Any:
    if isinstance(value, range):
        return {"from": value.start, "count": len(value)}
    return list(value) if isinstance(value, tuple) else value
