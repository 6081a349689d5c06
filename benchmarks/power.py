"""Which law finds which wrong kernel: every kernel of `effattn.zoo.lawless` against every law.

    python benchmarks/power.py --profile smoke --out power.json

With `--profile ci` the same on four times as many cases.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def matrix_row(name: str, profile: str, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """The laws that find a kernel, and whether accuracy does; "dense" is the right one."""
    import torch

    from effattn import laws
    from effattn.methods.user import UserFunction
    from effattn.zoo import lawless
    from effattn.zoo.dense import Dense

    torch.set_num_threads(1)
    kernel = Dense if name == "dense" else lawless.LAWLESS[name]
    started = time.perf_counter()
    found: dict[str, list[str]] = {}
    judged: dict[str, int] = {}
    for law in laws.choose():
        for dtype in dtypes:
            # A kernel of its own for each law: what it keeps from call to call is part of some mistakes.
            method = UserFunction(
                lawless.function_of(kernel, name), spec=f"effattn.zoo:{name.replace('-', '_')}"
            )
            verdicts = []
            for case in laws.cases_of(law, profile, dtype):
                verdicts.append(laws.judge_law(law, case, method))
                if laws.failed(verdicts[-1]):
                    found.setdefault(law.name, []).append(dtype)
                    break
            judged[law.name] = judged.get(law.name, 0) + len(verdicts)
    accuracy = []
    for dtype in dtypes:
        method = UserFunction(lawless.function_of(kernel, name), spec=f"effattn.zoo:{name.replace('-', '_')}")
        if laws.try_accuracy(method, dtype=dtype, profile="smoke", shrinking=False).failure is not None:
            accuracy.append(dtype)
    return {
        "what": " ".join((kernel.__doc__ or "").split()),
        "found_by": found,
        "accuracy": accuracy,
        "seconds": round(time.perf_counter() - started, 1),
        "cases": sum(judged.values()),
    }


def main() -> None:
    """The command."""
    from effattn.run import provenance
    from effattn.zoo import lawless

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--profile", default="smoke", choices=("smoke", "ci"))
    parser.add_argument("--dtype", default="fp16,bf16,fp32")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", default="", help="names of kernels, with commas")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    names = given.only.split(",") if given.only else ["dense", *lawless.LAWLESS]
    dtypes = tuple(given.dtype.split(","))
    rows: dict[str, Any] = {}
    with ProcessPoolExecutor(given.processes) as pool:
        waiting = {name: pool.submit(matrix_row, name, given.profile, dtypes) for name in names}
        for name, row in waiting.items():
            rows[name] = row.result()
            laws_found = ", ".join(rows[name]["found_by"]) or "no law"
            print(
                f"{name}: {laws_found}; accuracy {rows[name]['accuracy']}; {rows[name]['seconds']} s",
                file=sys.stderr,
            )
    data = {
        "profile": given.profile,
        "dtypes": list(dtypes),
        **provenance.collect(device="cpu"),
        "kernels": rows,
    }
    text = json.dumps(data, indent=1) + "\n"
    if given.out:
        given.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
