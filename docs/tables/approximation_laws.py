"""The laws of approximations."""

from effattn.properties.approximation import all_laws


def render() -> str:
    """One row a law."""
    lines = ["| law | of | claimed | what it states |", "|---|---|---|---|"]
    for law in all_laws().values():
        claims = ", ".join(law.claims) or "-"
        lines.append(
            f"| `{law.name}` | `{law.needs}` | {claims} | {law.statement.replace('|', chr(92) + '|')} |"
        )
    return "\n".join(lines)
