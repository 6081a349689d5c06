"""z = error / expected deviation of a method, by dtype, quantity, option and value distribution, out of recorded runs.

    effattn gate flash --profile ci --laws none --out RUN
    python benchmarks/noise.py RUN... --out docs/measurements/noise.json

The root mean square is over all elements of all cases that have the option, or are drawn from the distribution;
`fraction` is the median over the cases of (largest error / bound). docs/tables/noise.py makes the table of docs/theory.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from effattn.properties import regimes
from effattn.run import provenance, store


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    found: dict[tuple[str, str, str], dict[str, list[Any]]] = {}
    for run in given.runs:
        for verdict in store.read_verdicts(run):
            if verdict.law is not None:
                continue
            case = verdict.case
            groups = ["all", f"values {case.values}"]
            groups += [f"option {option}" for option in regimes.options_of(case) or ("none",)]
            for quantity in verdict.quantities:
                if not quantity.count:
                    continue
                for group in groups:
                    row = found.setdefault((group, case.dtype, quantity.name), {"z": [], "fraction": []})
                    if quantity.z_rms is not None:
                        row["z"].append((quantity.count, quantity.z_rms))
                    row["fraction"].append(quantity.fraction)
    if not found:
        print(f"no judged case in {', '.join(map(str, given.runs))}", file=sys.stderr)
        return 1
    rows = [
        {
            "group": group,
            "dtype": dtype,
            "quantity": name,
            "cases": len(row["fraction"]),
            "z_rms": math.sqrt(sum(n * z * z for n, z in row["z"]) / sum(n for n, _ in row["z"]))
            if row["z"]
            else None,
            "fraction": statistics.median(row["fraction"]),
        }
        for (group, dtype, name), row in sorted(found.items())
    ]
    document = {
        "schema": 1,
        "date": provenance.now(),
        **provenance.collect(device="cpu"),
        "runs": [_origin(run) for run in given.runs],
        "rows": rows,
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _origin(run: Path) -> dict[str, Any]:
    found = store.read_provenance(run)
    return {
        name: found[name] for name in ("method", "profile", "dtypes", "cases", "exit_code") if name in found
    }


if __name__ == "__main__":
    sys.exit(main())
