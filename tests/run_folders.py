"""Run folders for tests: with verdicts that were made up, and with a provenance that says something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from effattn.case import Case
from effattn.run import store
from effattn.verdict import Outcome, Quantity, Verdict


def say(folder: Path, **facts: Any) -> None:
    """Put facts into the provenance of a run, with the checksum that belongs to them."""
    file = folder / store.PROVENANCE
    file.write_text(store.provenance_text({**json.loads(file.read_text()), **facts}))


def verdicts(method: str = "mine", *, bad: int = 0, cases: int = 6, factor: float = 1.0) -> list[Verdict]:
    """Verdicts of which the first `bad` fail."""
    found = []
    for seed in range(cases):
        fraction = factor * (2.0 + seed if seed < bad else 0.5)
        outcome = Outcome.INACCURATE if fraction > 1 else Outcome.PASS
        quantity = Quantity(name="out", count=64, fraction=fraction, z_rms=0.5)
        case = Case(q_len=8, kv_len=8, head_dim=8, dtype="fp16", seed=seed)
        found.append(
            Verdict(
                case=case, method=method, outcome=outcome, message="m", quantities=(quantity,), replay="r"
            )
        )
    return found


def write(folder: Path, items: list[Verdict], **facts: Any) -> Path:
    with store.RunWriter(folder, spec=f"{items[0].method}.py:f") as writer:
        for item in items:
            writer.add(item)
        writer.commit({"started": "2030-01-01T00:00:00+00:00", "ended": "x", "kind_of_run": "gate", **facts})
    return folder
