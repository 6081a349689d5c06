"""The fields of a case that are options, as the code describes them."""

import importlib.util
from pathlib import Path

from effattn.case import Case


def render() -> str:
    """One row a field that has a description."""
    spec = importlib.util.spec_from_file_location(
        "effattn_docs_numerics_fields", Path(__file__).with_name("numerics_fields.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return "\n".join(module.rows(Case))
