"""False alarms: many drawn cases of a kernel that is right, judged; how often does the judge say that it is not?

    python benchmarks/alarms.py [--method flash] [--dtype fp16,bf16,fp32] [--cases 2000] [--out FILE]

Cases are drawn like those of the ci profile, by the same generator under another name, so none of them is in the profile.
Prints the share of alarms, z over all cases, and the share of elements that equal the correctly rounded exact value bit for
bit. `--out` writes the same as JSON, with versions, machine and every alarm's case.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any


def campaign(method_name: str, dtype: str, count: int) -> dict[str, Any]:
    from effattn import methods
    from effattn.judge import judge
    from effattn.properties import profiles, regimes

    method = methods.get(method_name)
    repeats = -(-count // len(regimes.all_regimes()))
    profile = replace(profiles.get("ci"), name="alarms", repeats=repeats)
    outcomes: dict[str, int] = {}
    alarms: list[dict[str, Any]] = []
    squares, elements, equal, fractions, rms, extremes = 0.0, 0, 0.0, [], [], []
    lse_squares, lse_elements = 0.0, 0
    start = time.perf_counter()
    for case in profiles.cases(profile, dtype=dtype)[:count]:
        verdict = judge(case, method)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--method", default="flash")
    parser.add_argument("--dtype", default="fp16,bf16,fp32")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for dtype in options.dtype.split(","):
        row = campaign(options.method, dtype, options.cases)
        rows.append(row)
        low, high = row["z_rms_case_5_95"]
        print(
            f"{dtype}: {len(row['alarms'])} alarms in {row['cases']} cases; z rms {row['z_rms_all_elements']:.3f} "
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
    if options.out is not None:
        from effattn.run import provenance

        record = {"schema": 1, "date": provenance.now(), **provenance.collect(device="cpu"), "results": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written to {options.out}")


if __name__ == "__main__":
    main()
