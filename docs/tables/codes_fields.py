"""The fields of a declaration of codes, and what may share a scale, as the code describes them."""

from numerics_fields import rows

from effattn.tolerances import codes


def render() -> str:
    """One row a field of `Codes`, then one for each way to share a scale."""
    shared = ["| `scale` | entries with one scale |", "|---|---|"]
    shared += [f'| `"{name}"` | {meaning} |' for name, meaning in codes.SCALES.items()]
    return "\n".join([*rows(codes.Codes), "", *shared])
