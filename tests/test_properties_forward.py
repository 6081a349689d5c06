"""Methods are held to the property of the forward pass, on cases that Hypothesis draws."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effattn import methods
from effattn.case import DTYPES
from effattn.properties import forward
from effattn.properties.strategies import cases

ZEROS = """
def zeros(q, k, v, *, causal=False, scale=None):
    return q.new_zeros(*q.shape[:3], v.shape[3])
"""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["flash", "torch"])
@given(data=st.data())
def test_output_is_within_what_rounding_explains(method: str, dtype: str, data: st.DataObject) -> None:
    case = data.draw(cases(dtype=dtype), label="case")
    forward.output_is_within_what_rounding_explains(case, methods.get(method))


@pytest.mark.parametrize("dtype", DTYPES)
def test_property_rejects_a_method_that_returns_zeros(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text(ZEROS)
    zeros = methods.get(f"{tmp_path / 'wrong.py'}:zeros")

    @given(case=cases(dtype=dtype, most_length=40, most_head_dim=32))
    def holds(case):  # type: ignore[no-untyped-def]
        forward.output_is_within_what_rounding_explains(case, zeros)

    with pytest.raises(AssertionError, match=r"effattn replay"):
        holds()
