"""Published criteria: rules, sources and inputs."""

from __future__ import annotations

from criteria_record import NOT_RECORDED, load


def render() -> str:
    record = load()
    if record is None:
        return NOT_RECORDED
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
