"""How published correctness criteria judge right and wrong attention kernels.

    python benchmarks/criteria.py [--dtype fp16,bf16,fp32] [--every 1] [--jobs 2] [--out FILE]

Every kernel of `effattn.zoo`, and `flash`, runs once on each input; every criterion judges the same outputs: those of the
smoke profile (but for its cases without queries or keys), and those of its own project's inputs (`criteria_inputs.py`),
where effattn judges the wrong ones too. A right kernel that a criterion objects to on any input is a false alarm. A wrong
kernel is missed where the criterion objects on no input; only inputs made to show its mistake count (`Specimen.shows`).
Both are counted for each dtype. `--every N` takes every Nth case of the profile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from criteria_inputs import RECIPES
from published_criteria import CRITERIA, References, Trial

OUT = Path(__file__).parents[1] / "docs/measurements/criteria.json"
TRITON_FLASH = "flash (Triton)"
#: right kernels that loop over keys or features in Python: only on cases of at most so many scores a head
SLOW = {"flash-key-by-key": 64 * 64, "one-running-sum": 64 * 64, "term-by-term": 64 * 64}


ALL_CASES = slice(None)
#: into so many pieces the cases of the profile are cut for the processes, in each dtype
PIECES = 4
#: shows only where a gradient goes through the log-sum-exp
NEVER_SHOWN = {"gradient-through-lse-forgotten"}


class Subject:
    """A kernel of the zoo, or flash."""

    def __init__(self, name: str, method: Any, specimen: Any = None) -> None:
        self.name, self.method, self.specimen = name, method, specimen
        self.right = specimen is None or specimen.right
        self.dtypes = ("fp16", "bf16", "fp32") if specimen is None else specimen.dtypes
        #: whether its gradients are part of what it promises; torch differentiates the others, but nobody wrote that
        self.gradients = specimen is None or specimen.offers_options

    def takes(self, case: Any) -> bool:
        """Whether the case is one for it: offered, not too slow, and for a wrong kernel made to show the mistake."""
        if not self.gradients and (case.backward or not case.plain):
            return False
        if self.method.unsupported(case) is not None or case.q_len * case.kv_len > SLOW.get(
            self.name, 1 << 60
        ):
            return False
        return self.right or self.specimen.shows(case)


def subjects() -> list[Subject]:
    """All of them, right ones first."""
    from effattn import methods, zoo

    found = [Subject(TRITON_FLASH, methods.get("flash"))]
    for right in (True, False):
        found += [
            Subject(s.name, s.method(), s) for s in zoo.specimens(right=right) if s.name not in NEVER_SHOWN
        ]
    return found


def problems(inputs: str, dtype: str, chosen: slice) -> Iterator[tuple[Any, Any]]:
    """(case, tensors) of "smoke", these of its cases, or of the inputs of a criterion's project: forward, then with
    gradients."""
    if inputs == "smoke":
        from effattn.properties import profiles

        for case in profiles.cases("smoke", dtype=dtype)[chosen]:
            # Most rules take the largest element of a tensor, so one of no elements is none of theirs.
            if case.q_len and case.kv_len:
                yield case, _without_d_lse(case.tensors())
        return
    yield from RECIPES[inputs].problems(dtype, backward=False)
    if RECIPES[inputs].d_out is not None:
        yield from RECIPES[inputs].problems(dtype, backward=True)


def _without_d_lse(tensors: Any) -> Any:
    """No published test sends a gradient through the log-sum-exp."""
    return type(tensors)(*tensors, extras=replace(tensors.extras, d_lse=None))


class Tally:
    """What came out on one set of inputs."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        #: (kernel, dtype, criterion) -> [judged, objected to, the first objection]
        self.counts: dict[tuple[str, str, str], list[Any]] = {}

    def merge(self, other: Tally) -> None:
        """Add what came out on other cases."""
        for key, (judged, objected, first) in other.counts.items():
            mine = self.counts.setdefault(key, [0, 0, None])
            self.counts[key] = [mine[0] + judged, mine[1] + objected, mine[2] or first]

    def open(self, subject: Subject, dtype: str) -> list[str]:
        """The criteria that still have to see the kernel."""
        asked = [name for name in self.names if dtype in CRITERIA[name].dtypes]
        if subject.right:
            return asked
        return [name for name in asked if not self.counts.get((subject.name, dtype, name), [0, 0])[1]]

    def add(self, subject: Subject, dtype: str, name: str, objection: str | None) -> None:
        entry = self.counts.setdefault((subject.name, dtype, name), [0, 0, None])
        entry[0] += 1
        if objection is not None:
            entry[1] += 1
            entry[2] = entry[2] or objection

    def summary(self, kernels: list[Subject]) -> dict[str, Any]:
        """For each criterion: who was shown, who was wronged, who was missed."""
        right = {s.name: s.right for s in kernels}
        found: dict[str, Any] = {}
        for name in self.names:
            mine = {key[:2]: entry for key, entry in self.counts.items() if key[2] == name}
            result: dict[str, Any] = {"right": {}, "alarms": {}, "wrong": {}, "missed": {}}
            for (kernel, dtype), (judged, objected, objection) in mine.items():
                side = "right" if right[kernel] else "wrong"
                result[side].setdefault(kernel, []).append(dtype)
                if right[kernel] and objected:
                    result["alarms"].setdefault(kernel, {})[dtype] = [objected, judged, objection]
                if not right[kernel] and not objected:
                    result["missed"].setdefault(kernel, []).append(dtype)
            found[name] = result
        return found


def judge_all(
    kernels: list[Subject],
    inputs: str,
    names: Sequence[str],
    dtypes: Sequence[str],
    chosen: slice = ALL_CASES,
) -> Tally:
    """Every kernel on every problem, judged by the criteria of that name."""
    import torch

    from effattn.errors import NotSupported
    from effattn.judge import _copies

    tally = Tally(names)
    for dtype in dtypes:
        for case, tensors in problems(inputs, dtype, chosen):
            kept = _copies(tensors)
            references: dict[str, References] = {}
            for subject in kernels:
                if (
                    dtype not in subject.dtypes
                    or not (asked := tally.open(subject, dtype))
                    or not subject.takes(case)
                ):
                    continue
                keep = None
                try:
                    output = subject.method(case, tensors)
                    if case.dropout:
                        keep = subject.method.dropout_mask(case, tensors.q.device)
                except (NotSupported, NotImplementedError):
                    continue  # it does not offer the case, so there is nothing to judge
                # Zoo kernels drop the same weights.
                key = TRITON_FLASH if case.dropout and subject.name == TRITON_FLASH else "zoo"
                if key not in references:
                    references[key] = References(case, kept, keep)
                trial = Trial(case, output, subject.method.numerics(case), references[key])
                for name in asked:
                    tally.add(subject, dtype, name, CRITERIA[name].objects(trial))
            if not all(torch.equal(a, b) for a, b in zip(tensors, kept, strict=True)):
                raise SystemExit(f"a kernel wrote to the inputs of {case.describe()}")
    return tally


_KERNELS: list[Subject] = []


def _work(item: tuple[str, str, slice]) -> Tally:
    """Some cases of one set of inputs in one dtype, in a process of its own."""
    warnings.simplefilter("ignore")  # of torch, about what wrong kernels do
    inputs, dtype, chosen = item
    names = criteria_for(inputs)
    if inputs == "smoke":
        return judge_all(_KERNELS, inputs, names, [dtype], chosen)
    # Compiling Triton's flash for the shapes of all projects would take longer than everything else here.
    right = [s for s in _KERNELS if s.right and s.name != TRITON_FLASH]
    tally = judge_all(right, inputs, names[1:], [dtype])
    tally.merge(judge_all([s for s in _KERNELS if not s.right], inputs, names, [dtype]))
    return tally


def criteria_for(inputs: str) -> list[str]:
    """Who judges on a set of inputs: all on smoke, else effattn and the criteria whose inputs they are."""
    if inputs == "smoke":
        return list(CRITERIA)
    return ["effattn", *(name for name in RECIPES if RECIPES[name].cases == RECIPES[inputs].cases)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="fp16,bf16,fp32")
    parser.add_argument("--every", type=int, default=1, help="take every Nth case of the smoke profile")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    import torch

    from effattn.run import provenance

    torch.set_num_threads(1)
    _KERNELS[:] = kernels = subjects()
    started = time.monotonic()
    # Of recipes with the same cases, the first stands for all.
    sets = ["smoke", *(name for name in RECIPES if criteria_for(name)[1] == name)]
    items = [
        (inputs, dtype, chosen)
        for inputs in sets
        for dtype in arguments.dtype.split(",")
        if any(dtype in CRITERIA[name].dtypes for name in criteria_for(inputs)[1:])
        for chosen in (
            [slice(i * arguments.every, None, PIECES * arguments.every) for i in range(PIECES)]
            if inputs == "smoke"
            else [ALL_CASES]
        )
    ]
    tallies: dict[str, Tally] = {}
    # Forked, since what a process imports takes longer than many an item; no kernel has run yet.
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
        for (inputs, dtype, _), tally in zip(items, pool.imap(_work, items, chunksize=1), strict=True):
            print(f"{time.monotonic() - started:.0f} s: {inputs}, {dtype}", flush=True)
            tallies.setdefault(inputs, Tally(criteria_for(inputs))).merge(tally)
    found = {inputs: tally.summary(kernels) for inputs, tally in tallies.items()}
    for inputs, results in found.items():
        for name, result in results.items():
            print(f"{inputs}, {name}: {told(result)}")
    record = {
        "what": "published correctness criteria on right and wrong attention kernels",
        "command": f"python benchmarks/criteria.py --every {arguments.every}",
        "every": arguments.every,
        "date": provenance.now(),
        "seconds": round(time.monotonic() - started),
        **provenance.collect(device="cpu"),
        "seeds": {"smoke": "those of the profile", **{name: list(r.seeds) for name, r in RECIPES.items()}},
        "kernels": {
            s.name: {"right": s.right, "dtypes": list(s.dtypes), "gradients": s.gradients} for s in kernels
        },
        "criteria": {
            name: {"rule": c.rule, "source": c.source, "dtypes": list(c.dtypes), "reads": list(c.reads)}
            for name, c in CRITERIA.items()
        },
        "recipes": {name: {"source": recipe.source, "what": recipe.what} for name, recipe in RECIPES.items()},
        "inputs": found,
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


def told(result: dict[str, Any]) -> str:
    """The counts in words."""
    right, wrong, missed = (sum(map(len, result[side].values())) for side in ("right", "wrong", "missed"))
    alarms = sum(map(len, result["alarms"].values()))
    return f"{alarms} of {right} right ones objected to, {missed} of {wrong} wrong ones missed"


if __name__ == "__main__":
    main()
