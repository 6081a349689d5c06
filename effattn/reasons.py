"""Why so much is allowed and no more, in words: made from the declared numerics alone, field by field."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.judgement import Part
    from effattn.tolerances.numerics import Numerics


def of_output(part: Part, index: tuple[int, ...], numerics: Numerics, case: Case, keys: int) -> str:
    """What an element of the output or of the log-sum-exp is allowed to be off by, of a row that sees `keys` keys."""
    if keys == 0:
        return "allowed is 0: the row sees no key, so its output is 0 and its lse -inf, exactly"
    codes = [
        f"{name.upper()} as {codes.text}" for name in "qkv" if (codes := getattr(numerics, name)) is not None
    ]
    scores = f"scores of {case.head_dim} terms"
    sums = f"sums over {keys} keys in {numerics.acc}"
    if _narrow(numerics, "score"):
        how = f"{scores} kept in {_format(numerics, 'score')}, {sums}"
    else:
        how = f"{scores} and {sums}"
    weights = (
        f"weights rounded to {_format(numerics, 'p')}" if numerics.rounds_p else f"weights in {numerics.p}"
    )
    if numerics.rounds_p and numerics.sum_of == "rounded":
        weights += ", whose sum is that of the rounded ones"
    return (
        f"{_rounding(part, index)} {', '.join([*_operands(numerics), how, *_exp(numerics), weights])}"
        f"{'; exact is that of the codes: ' if codes else ''}{', '.join(codes)} (numerics {numerics.title})"
    )


def of_gradient(part: Part, index: tuple[int, ...], numerics: Numerics, case: Case) -> str:
    """What an element of a gradient is allowed to be off by."""
    if part.bound[index] == 0.0:
        return "allowed is 0: nothing that is visible takes part in this gradient, so it is 0, exactly"
    how = [*_operands(numerics), "P from the log-sum-exp"]
    if _narrow(numerics, "score"):
        how.append(f"scores kept in {_format(numerics, 'score')}")
    how += _exp(numerics)
    if part.name == "dv":  # P^T dO: neither dP nor delta is part of it
        how.append(f"sums in {numerics.acc}")
    elif _narrow(numerics, "dp"):
        how += [f"dP kept in {_format(numerics, 'dp')}", f"delta in {numerics.acc}"]
    else:
        how.append(f"dP and delta in {numerics.acc}")
    how += [
        f"{what} rounded to {_format(numerics, field)}"
        for what, field, rounds in (("P", "p", numerics.rounds_p), ("dS", "ds", numerics.rounds_ds))
        if rounds and not (field == "ds" and part.name == "dv") and not (field == "p" and part.name != "dv")
    ]
    if part.name in ("dk", "dv"):
        if numerics.stored_keys is not None:
            how.append(
                f"{part.title} kept in {numerics.input}, rounded after every {numerics.stored_keys} queries"
            )
        if numerics.group_sum == "input" and case.heads > case.kv_heads:
            how.append(f"that of each query head rounded to {numerics.input} before they are added up")
    if part.name == "dq" and numerics.stored_queries is not None:
        how.append(f"dQ kept in {numerics.input}, rounded after every {numerics.stored_queries} keys")
    return f"{_rounding(part, index)} {', '.join(how)} (numerics {numerics.title})"


def _rounding(part: Part, index: tuple[int, ...]) -> str:
    import numpy as np

    spacing = float(part.format.ulp(np.array([part.exact[index]], dtype=np.float64))[0])
    rest = part.bound[index] - 0.5 * spacing
    return f"allowed is {0.5 * spacing:.2g} for rounding to {part.format.name} and {rest:.2g} for what goes before:"


def _narrow(numerics: Numerics, field: str) -> bool:
    """Whether numbers that are computed in `acc` lose bits in the format of this field."""
    return numerics.format(field).precision < numerics.format("acc").precision


def _format(numerics: Numerics, field: str) -> str:
    fmt = numerics.format(field)
    return f"{fmt.name} (u = {fmt.unit_roundoff_text})"


def _operands(numerics: Numerics) -> list[str]:
    fmt = numerics.operand_format
    return [] if fmt is None else [f"operands rounded to {fmt.name} (u = {fmt.unit_roundoff_text})"]


def _exp(numerics: Numerics) -> list[str]:
    """What is said of an exp with larger errors than those of the units that compute it for most kernels."""
    from effattn.tolerances.envelope import FINE_EXP

    return [f"an exp within {numerics.exp_ulps:g} ulp"] if numerics.exp_ulps > FINE_EXP else []
