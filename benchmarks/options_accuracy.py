"""Worst error/bound of `flash` for each option, dtype and quantity, out of recorded runs.

    effattn gate flash --profile ci --out RUN
    python benchmarks/options_accuracy.py RUN... --out docs/measurements/flash-options.json

A case counts for each option that it has. docs/tables/flash_options.py makes
the table of docs/flash-attention.md out of the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from datetime import date
from pathlib import Path
from typing import Any

from effattn.properties import regimes
from effattn.run import store


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run in given.runs:
        for verdict in store.read_verdicts(run):
            if not verdict.quantities:
                continue
            for option in regimes.options_of(verdict.case) or ("none",):
                row = rows.setdefault((option, verdict.case.dtype), {"cases": 0, "failed": 0, "worst": {}})
                row["cases"] += 1
                row["failed"] += str(verdict.outcome) != "pass"
                for quantity in verdict.quantities:
                    if quantity.fraction is not None and math.isfinite(quantity.fraction):
                        worst = row["worst"]
                        worst[quantity.name] = max(worst.get(quantity.name, 0.0), float(quantity.fraction))
    if not rows:
        print(f"no judged case in {', '.join(map(str, given.runs))}", file=sys.stderr)
        return 1
    document = {
        "date": date.today().isoformat(),
        "runs": [_provenance(run) for run in given.runs],
        "rows": [{"option": option, "dtype": dtype, **row} for (option, dtype), row in sorted(rows.items())],
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _provenance(run: Path) -> dict[str, Any]:
    """What of a run's provenance a table needs."""
    found = store.read_provenance(run)
    packages = {name: found["packages"][name] for name in ("torch", "triton")}
    kept = {name: found[name] for name in ("profile", "dtypes", "cases", "exit_code")}
    return kept | {"packages": packages, "cpu": found["machine"]["cpu"]}


if __name__ == "__main__":
    sys.exit(main())
