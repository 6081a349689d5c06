"""`flash` is held to its bounds on drawn cases with options, forward and backward: each alone, and every pair of them.

All pairs of eight options are in six groups of four. Shapes are small, and of one padded head_dim, so that most of the time
goes into cases and not into compiling kernels for each combination of options.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effattn import methods
from effattn.case import DTYPES, Case, Inputs
from effattn.methods import arguments
from effattn.methods.base import Output
from effattn.properties import forward, menus, regimes
from effattn.properties.strategies import cases, layouts

#: what `regimes.options_of` says of a case without the rest
COUPLES = (("window", "lengths"), ("softcap", "bias"), ("alibi", "mask"), ("sinks", "dropout"))
GROUPS = [a + b for a, b in itertools.combinations(COUPLES, 2)]
COMBINATIONS = [(), *((name,) for name in menus.OPTIONS), *GROUPS]
#: rows that lie next to each other, which one compiled kernel serves
ROWS = ("bhsd", "bshd", "bhsd+pad", "sbhd+offset", "bshd+pad+offset")
#: of each combination, in the profile of pull requests and in the nightly one
EXAMPLES = max(4, settings.default.max_examples // 15) if settings.default else 4


def with_options(
    dtype: str, names: tuple[str, ...], layout: st.SearchStrategy[str]
) -> st.SearchStrategy[Case]:
    """Small cases with all of these options, with gradients."""
    plain = cases(dtype=dtype, most_length=96, most_head_dim=15, most_scores=40_000)
    options = st.tuples(*(st.sampled_from(menus.OPTIONS[name]) for name in names))
    return st.builds(
        lambda case, layout, chosen: dataclasses.replace(
            case, backward=True, layout=layout, **{k: v for part in chosen for k, v in part.items()}
        ),
        plain,
        layout,
        options,
    )


def test_every_option_is_there_alone_and_with_every_other() -> None:
    together = {frozenset(pair) for names in COMBINATIONS for pair in itertools.combinations(names, 2)}
    assert together == {frozenset(pair) for pair in itertools.combinations(menus.OPTIONS, 2)}
    assert {names[0] for names in COMBINATIONS if len(names) == 1} == set(menus.OPTIONS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("names", COMBINATIONS, ids="+".join)
def test_flash_with_options_is_within_what_rounding_explains(names: tuple[str, ...], dtype: str) -> None:
    @settings(max_examples=EXAMPLES)
    @given(case=with_options(dtype, names, st.sampled_from(ROWS)))
    def holds(case: Case) -> None:
        assert set(regimes.options_of(case)) == set(names)
        forward.output_is_within_what_rounding_explains(case, methods.get("flash"))

    holds()


@pytest.mark.parametrize("dtype", DTYPES)
def test_flash_of_any_strides_is_within_what_rounding_explains(dtype: str) -> None:
    @settings(max_examples=2 * EXAMPLES)
    @given(case=with_options(dtype, ("mask", "bias"), layouts()))
    def holds(case: Case) -> None:
        forward.output_is_within_what_rounding_explains(case, methods.get("flash"))

    holds()


#: option -> the keywords of `flash_attention` that it is given by
KEYWORDS = {"alibi": ("alibi_slopes",), "lengths": ("q_lengths", "kv_lengths"), "dropout": ("dropout_p",)}


@pytest.mark.parametrize("name", menus.OPTIONS)
def test_property_rejects_a_kernel_that_ignores_an_option(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flash = methods.get("flash")

    class Forgetful(type(flash)):  # type: ignore[misc]
        def __call__(self, case: Case, inputs: Inputs) -> Output:
            given_all = arguments.keywords

            def keywords(case: Case, extras: Any) -> dict[str, Any]:
                left_out = KEYWORDS.get(name, (name,))
                return {key: x for key, x in given_all(case, extras).items() if key not in left_out}

            with monkeypatch.context() as patch:
                patch.setattr(arguments, "keywords", keywords)
                return super().__call__(dataclasses.replace(case, backward=False), inputs)

    @settings(max_examples=40)
    @given(case=with_options("fp32", (name,), st.just("bhsd")))
    def holds(case: Case) -> None:
        forward.output_is_within_what_rounding_explains(
            dataclasses.replace(case, backward=False), Forgetful()
        )

    with pytest.raises(AssertionError, match="effattn replay"):
        holds()
