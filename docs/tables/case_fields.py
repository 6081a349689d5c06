"""The fields of a case that are options, as the code describes them."""

from numerics_fields import rows

from effattn.case import Case


def render() -> str:
    """One row a field that has a description."""
    return "\n".join(rows(Case))
