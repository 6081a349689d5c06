"""The catalogue of laws: importing it fills it."""

from __future__ import annotations

from effattn.properties import (  # noqa: F401  each import adds its laws
    laws_bias_gradients,
    laws_dropout,
    laws_gradients,
    laws_masks,
    laws_memory,
    laws_numbers,
    laws_options,
    laws_structure,
    laws_values,
)
from effattn.properties.law import FAMILIES, LAWS, Law


def all_laws() -> dict[str, Law]:
    """All laws by name, family by family."""
    order = list(FAMILIES)
    return dict(sorted(LAWS.items(), key=lambda item: order.index(item[1].family)))
