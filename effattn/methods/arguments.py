"""The keywords that a case stands for, as users' functions and this package's kernels take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effattn.case import Case
    from effattn.options import Extras

#: options: given only where the case has them
OPTIONS = (
    "window",
    "softcap",
    "alibi_slopes",
    "bias",
    "mask",
    "sinks",
    "q_lengths",
    "kv_lengths",
    "dropout_p",
)


def needed(case: Case) -> list[str]:
    """The keywords of `OPTIONS` that a case needs."""
    has = {
        "window": case.window is not None,
        "softcap": case.softcap is not None,
        "alibi_slopes": case.alibi != "none",
        "bias": case.bias != "none",
        "mask": case.mask != "none",
        "sinks": case.sinks,
        "q_lengths": case.lengths == "both",
        "kv_lengths": case.lengths != "none",
        "dropout_p": case.dropout > 0.0,
    }
    return [name for name in OPTIONS if has[name]]


def dropout_seed(case: Case) -> int:
    """The seed of a case's dropout: that of the case, in 31 bits."""
    return case.seed % 2**31


def keywords(case: Case, extras: Extras) -> dict[str, Any]:
    """Everything besides q, k and v: mask and scale always, options where the case has them."""
    given: dict[str, Any] = {
        "causal": case.causal != "none",
        "scale": case.softmax_scale,
        "causal_alignment": case.alignment,
    }
    if case.dropout:
        given |= {"dropout_p": case.dropout, "dropout_seed": dropout_seed(case), "dropout_offset": 0}
    names = needed(case)
    given |= {name: getattr(case, name) for name in ("window", "softcap") if name in names}
    return given | {name: x for name, x in extras.present().items() if name in names}
