"""Published criteria: rules, sources and inputs."""

from __future__ import annotations

import json
from pathlib import Path

RECORD = Path(__file__).parent.parent / "measurements" / "criteria.json"


def render() -> str:
    if not RECORD.exists():
        return "No measurement is recorded: run the command above, then `python docs/update_tables.py`."
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = [
        "| criterion | rule | dtypes | looks at | source | its inputs here |",
        "|---|---|---|---|---|---|",
    ]
    for name, criterion in record["criteria"].items():
        recipe = record["recipes"].get(name)
        inputs = "the smoke profile" if recipe is None else f"{recipe['what']} ({recipe['source']})"
        rule = (
            criterion["rule"]
            .replace("|got - expected|", "abs(got - expected)")
            .replace("|expected|", "abs(expected)")
        )
        lines.append(
            f"| {name} | {rule} | {', '.join(criterion['dtypes'])} | {', '.join(criterion['reads'])}"
            f" | {criterion['source']} | {inputs} |"
        )
    return "\n".join(lines)
