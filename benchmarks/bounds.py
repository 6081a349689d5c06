"""What bound and expected noise cost beside the exact pass that they belong to.

    python benchmarks/bounds.py --out docs/measurements/bounds.json

On one thread, in processor time, exact pass and envelope in turn; the median ratio of the pairs. For gradients the exact pass is
that of the output and of all gradients.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from timing import DTYPES, cpu_seconds, inputs, paired

from effattn import exact
from effattn.exact import backward
from effattn.exact.scores import Options
from effattn.run import provenance
from effattn.tolerances.envelope import forward_envelope
from effattn.tolerances.gradients import gradient_envelopes
from effattn.tolerances.numerics import for_dtype

#: (heads, q_len and kv_len, head_dim)
SHAPES = ((8, 128, 64), (4, 1024, 64), (4, 1024, 128), (1, 4096, 128))


def compare(dtype: str, heads: int, length: int, head_dim: int, rounds: int) -> dict[str, Any]:
    """The row of one shape."""
    q, k, v = inputs(dtype, head_dim, batch=1, heads=heads, length=length)
    numerics, options = for_dtype(dtype), Options()
    reference = exact.attention(q, k, v)
    forward = forward_envelope(q, k, v, numerics=numerics, exact=reference)
    gradients = backward.gradients(q, k, v, q, options, exact=reference)

    def exact_gradients() -> None:
        backward.gradients(q, k, v, q, options, exact=exact.attention(q, k, v))

    def envelopes() -> None:
        gradient_envelopes(
            q,
            k,
            v,
            q,
            numerics=numerics,
            exact=reference,
            gradients=gradients,
            forward=forward,
            options=options,
        )

    row: dict[str, Any] = {"dtype": dtype, "heads": heads, "length": length, "head_dim": head_dim}
    for name, ours, other in (
        (
            "output",
            lambda: forward_envelope(q, k, v, numerics=numerics, exact=reference),
            lambda: exact.attention(q, k, v),
        ),
        ("gradients", envelopes, exact_gradients),
    ):
        found = paired(ours, other, rounds=rounds, clock=cpu_seconds)
        row[name] = {key: float(f"{value:.4g}") for key, value in found.items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in DTYPES:
        for shape in SHAPES:
            rows.append(compare(dtype, *shape, options.rounds))
            print(json.dumps(rows[-1]), flush=True)
    if options.out is not None:
        written = {"schema": 1, "date": provenance.now(), **provenance.collect(device="cpu"), "rows": rows}
        options.out.write_text(json.dumps(written, indent=1, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
