"""What an approximation may claim."""

from effattn.approximation import CLAIM_WORDS


def render() -> str:
    """One row a word."""
    lines = ["| claim | what is then tried |", "|---|---|"]
    lines += [f"| `{word}` | {what.replace('|', chr(92) + '|')} |" for word, what in CLAIM_WORDS.items()]
    return "\n".join(lines)
