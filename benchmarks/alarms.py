"""False alarms: many drawn cases of kernels that are right, judged; how often does the judge say that one is not?

    python benchmarks/alarms.py [--method flash] [--dtype fp16,bf16,fp32] [--cases 2000] [--out FILE]
    python benchmarks/alarms.py --method zoo --small --cases 1500 --jobs 2 --out docs/measurements/alarms-zoo.json
    python benchmarks/alarms.py --method zoo-quantised --dtype fp16,bf16 --small --cases 400 --jobs 2 \
        --out docs/measurements/alarms-quantised.json

Cases are drawn like those of the ci profile (`--small`: like those of the smoke profile, with lengths that make one a matter
of milliseconds), by the same generator under another name, so none of them is in a profile. `zoo` stands for all right
kernels of `effattn.zoo`, of very different design, in torch, `zoo-quantised` for those whose operands are quantised (fp16 and
bf16, forward only).
Prints the share of alarms, z over all cases, and the share of elements that equal the correctly rounded exact value bit for
bit. `--out` writes the same as JSON, with versions, machine and every alarm's case.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

#: changes of the smoke profile: what is left of it takes some 10 ms a case
SMALL: dict[str, Any] = {
    "lengths": (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33),
    "long_lengths": (129, 211, 257),
    "most_scores": 25_000,
    "option_lengths": (1, 2, 5, 16, 17, 33, 97),
    "option_dims": ((33, None), (7, None)),
    "most_option_scores": 5_000,
}


def drawn(dtype: str, count: int, small: bool) -> list[Any]:
    """So many cases, of all regimes."""
    from effattn.properties import profiles

    base = profiles.get("smoke" if small else "ci")
    changes = SMALL if small else {}
    repeats = 1
    while len(found := _cases(base, changes, repeats, dtype)) < count:
        repeats += 1 + repeats * (count - len(found)) // (2 * len(found))
    # Those with options come last: cut evenly.
    return [found[i * len(found) // count] for i in range(count)]


def _cases(base: Any, changes: dict[str, Any], repeats: int, dtype: str) -> list[Any]:
    from effattn.properties import profiles

    profile = replace(base, name="alarms", longest=(), repeats=2 * repeats, option_repeats=repeats, **changes)
    return list(profiles.cases(profile, dtype=dtype))


def names_of(method: str) -> list[str]:
    """The methods that an argument names."""
    if method not in ("zoo", "zoo-quantised"):
        return method.split(",")
    from effattn import zoo

    found = zoo.specimens(right=True, quantised=method != "zoo")
    return [f"effattn.zoo:{s.name.replace('-', '_')}" for s in found]


def campaign(method_name: str, dtype: str, count: int, small: bool = False) -> dict[str, Any]:
    import torch

    from effattn import methods, zoo
    from effattn.judge import judge

    torch.set_num_threads(1)
    method = methods.get(method_name)
    # Gradients that torch makes of a kernel that is written forward only are not that kernel's promise.
    forward_only = False
    if method_name.startswith("effattn.zoo:"):
        specimen = zoo.get(method_name.partition(":")[2].replace("_", "-"))
        forward_only = not specimen.offers_options or specimen.numerics is not None
    outcomes: dict[str, int] = {}
    alarms: list[dict[str, Any]] = []
    squares, elements, equal, fractions, rms, extremes = 0.0, 0, 0.0, [], [], []
    lse_squares, lse_elements = 0.0, 0
    start = time.perf_counter()
    for case in drawn(dtype, count, small):
        verdict = judge(replace(case, backward=False) if forward_only else case, method)
        outcomes[str(verdict.outcome)] = outcomes.get(str(verdict.outcome), 0) + 1
        if str(verdict.outcome) not in ("pass", "not supported", "not judged"):
            alarms.append(
                {"case": case.to_dict(), "outcome": str(verdict.outcome), "message": verdict.message}
            )
        for q in verdict.quantities:
            if q.z_rms is None or not q.count:
                continue
            if q.name == "lse":
                lse_squares += q.z_rms**2 * q.count
                lse_elements += q.count
                continue
            squares += q.z_rms**2 * q.count
            elements += q.count
            equal += (q.bit_equal or 0.0) * q.count
            rms.append(q.z_rms)
            extremes.append(abs(q.z_max or 0.0))
            fractions.append(q.fraction or 0.0)
    rms.sort()
    return {
        "method": method_name,
        "dtype": dtype,
        "cases": count,
        "outcomes": outcomes,
        "alarms": alarms,
        "elements": elements,
        "z_rms_all_elements": math.sqrt(squares / elements),
        "z_rms_lse": math.sqrt(lse_squares / lse_elements) if lse_elements else None,
        "z_rms_case_median": statistics.median(rms),
        "z_rms_case_5_95": [rms[len(rms) // 20], rms[-1 - len(rms) // 20]],
        "z_max": max(extremes),
        "fraction_median": statistics.median(fractions),
        "fraction_max": max(fractions),
        "bit_equal": equal / elements,
        "seconds": time.perf_counter() - start,
    }


def _campaign(item: tuple[str, str, int, bool]) -> dict[str, Any]:
    return campaign(*item)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--method", default="flash")
    parser.add_argument("--dtype", default="fp16,bf16,fp32")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true", help="small cases")
    parser.add_argument("--jobs", type=int, default=1, help="processes (1)")
    options = parser.parse_args()
    rows = []
    items = [
        (name, dtype, options.cases, options.small)
        for name in names_of(options.method)
        for dtype in options.dtype.split(",")
    ]
    pool = multiprocessing.get_context("spawn").Pool(options.jobs)
    for row in pool.imap(_campaign, items):
        rows.append(row)
        low, high = row["z_rms_case_5_95"]
        print(
            f"{row['method']} {row['dtype']}: {len(row['alarms'])} alarms in {row['cases']} cases; "
            f"z rms {row['z_rms_all_elements']:.3f} "
            f"(cases: median {row['z_rms_case_median']:.2f}, 5 to 95 % {low:.2f} to {high:.2f}), "
            f"largest {row['z_max']:.1f}; lse z rms {row['z_rms_lse'] or math.nan:.3f}; "
            f"error/bound at most {row['fraction_max']:.2f}; bit-equal {row['bit_equal']:.1%}; {row['seconds']:.0f} s",
            flush=True,
        )
        for alarm in row["alarms"][:5]:
            print(
                f"  {alarm['outcome']}: {json.dumps(alarm['case'])}\n    {alarm['message'].splitlines()[0]}",
                flush=True,
            )
    judged = sum(sum(row["outcomes"].values()) - row["outcomes"].get("not supported", 0) for row in rows)
    print(f"{sum(len(row['alarms']) for row in rows)} alarms in {judged} verdicts")
    if options.out is not None:
        from effattn.run import provenance

        record = {
            "schema": 1,
            "date": provenance.now(),
            **provenance.collect(device="cpu"),
            "verdicts": judged,
            "small": options.small,
            "results": rows,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
