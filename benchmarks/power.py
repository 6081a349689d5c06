"""Which law finds which wrong kernel: every kernel of `effattn.zoo.lawless` against every law.

    nice python benchmarks/power.py --processes 2 --out docs/measurements/power.json
    nice python benchmarks/power.py --only NAME,NAME --out docs/measurements/power.json

The second form keeps the other rows of the file; each row has the commit that it was recorded at.

In one dtype, up to the first case of the profile `smoke` that a law finds the kernel by, and by the comparison with exact
attention up to the first failure. What no law finds is tried on the cases of `ci` too, of which those of `smoke` are the first,
and in the other dtypes. The failure of the law that a kernel was made for is made small, as the gate does it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from effattn.methods.user import UserFunction
    from effattn.properties.law import Law


def method(name: str) -> UserFunction:
    """A kernel of its own for each law: what it keeps from call to call is part of some mistakes."""
    from effattn.methods.user import UserFunction
    from effattn.zoo import lawless
    from effattn.zoo.dense import Dense

    kernel = Dense if name == "dense" else lawless.LAWLESS[name]
    return UserFunction(lawless.function_of(kernel, name), spec=f"effattn.zoo:{name.replace('-', '_')}")


def found_by(name: str, laws: list[Law], profile: str, dtype: str) -> tuple[dict[str, int], int]:
    """law -> number of the first case of the profile by which it finds the kernel; cases judged."""
    from effattn import laws as judging

    found: dict[str, int] = {}
    judged = 0
    for law in laws:
        subject = method(name)
        for number, case in enumerate(judging.cases_of(law, profile, dtype)):
            judged += 1
            if judging.failed(judging.judge_law(law, case, subject)):
                found[law.name] = number
                break
    return found, judged


def matrix_row(name: str, dtype: str, every_law: bool) -> dict[str, Any]:
    """What finds a kernel, and the small case of its own law; "dense" is the right one."""
    import torch

    from effattn import laws
    from effattn.zoo import lawless
    from effattn.zoo.dense import Dense

    torch.set_num_threads(1)
    started = time.perf_counter()
    row: dict[str, Any] = {"what": " ".join((lawless.LAWLESS.get(name, Dense).__doc__ or "").split())}
    own = laws.choose([lawless.BROKEN_LAW[name]]) if name in lawless.BROKEN_LAW else []
    row["smoke"], row["cases"] = found_by(name, laws.choose() if every_law else own, "smoke", dtype)
    accuracy = laws.try_accuracy(method(name), dtype=dtype, profile="smoke", shrinking=False)
    row["accuracy"] = accuracy.failure is not None
    if own:
        row["law"] = own[0].name
        row["dtype"] = dtype
        if own[0].name not in row["smoke"]:
            # Some mistakes show in one dtype only, some on the cases of ci only.
            for other, profile in ((dtype, "ci"), ("fp32", "ci"), ("bf16", "ci")):
                row["ci"], _ = found_by(name, own, profile, other)
                if row["ci"]:
                    row["dtype"] = other
                    break
        tried = laws.try_law(own[0], method(name), dtype=row["dtype"], profile="ci")
        if tried.failure is not None:
            case = tried.failure.case
            row["small"] = {
                "batch": case.batch, "heads": case.heads, "q_len": case.q_len, "kv_len": case.kv_len,
                "head_dim": case.head_dim, "v_dim": case.v_dim,
            }  # fmt: skip
            row["message"] = tried.failure.message.splitlines()[0]
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def main() -> None:
    """The command."""
    from effattn.run import provenance
    from effattn.zoo import lawless

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="fp16")
    parser.add_argument(
        "--own", action="store_true", help="the law that each kernel was made for only: in minutes"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only", default="", help="names of kernels, with commas")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    names = given.only.split(",") if given.only else ["dense", *lawless.LAWLESS]
    here = provenance.collect(device="cpu")
    rows: dict[str, Any] = {}
    if given.only and given.out and given.out.exists():
        rows = json.loads(given.out.read_text())["kernels"]
    with ProcessPoolExecutor(given.processes) as pool:
        waiting = {name: pool.submit(matrix_row, name, given.dtype, not given.own) for name in names}
        for name, row in waiting.items():
            rows[name] = {**row.result(), "commit": here["effattn"]["commit"]}
            count = len(rows[name]["smoke"])
            print(
                f"{name}: {count} laws, accuracy {rows[name]['accuracy']}, {rows[name]['seconds']} s",
                file=sys.stderr,
            )
    data = {
        "what": "which law finds which wrong kernel",
        "command": f"python benchmarks/power.py{' --own' if given.own else ''}",
        "dtype": given.dtype,
        "laws": "own" if given.own else "all",
        **here,
        "kernels": {name: rows[name] for name in ("dense", *lawless.LAWLESS) if name in rows},
    }
    text = json.dumps(data, indent=1) + "\n"
    if given.out:
        given.out.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
