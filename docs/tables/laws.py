"""The catalogue of laws."""

from effattn.properties.catalogue import all_laws
from effattn.properties.law import FAMILIES, grouped


def render() -> str:
    """One section a family, one row a law."""
    lines = []
    for family, members in grouped(list(all_laws().values())):
        lines += [
            f"### {family.capitalize()}: {FAMILIES[family]}",
            "",
            "| law | what it states | compares |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{law.name}` | {law.statement.replace('|', chr(92) + '|')} | {law.compares} |"
            for law in members
        ]
        lines.append("")
    return "\n".join(lines)
