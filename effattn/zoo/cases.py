"""A modest list of cases in which every wrong kernel of the zoo shows, each at least once in each of its dtypes."""

from __future__ import annotations

from typing import Any

from effattn.case import Case

#: fields of a `Case` besides dtype and seed
_RECIPES: tuple[dict[str, Any], ...] = (
    {"heads": 2, "q_len": 64, "kv_len": 64, "head_dim": 32},
    {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 129, "kv_len": 211, "head_dim": 40},
    {"heads": 4, "q_len": 97, "kv_len": 97, "head_dim": 64, "causal": "bottom-right"},
    {"heads": 3, "q_len": 70, "kv_len": 131, "head_dim": 48, "v_dim": 17, "causal": "bottom-right"},
    {"heads": 3, "q_len": 131, "kv_len": 70, "head_dim": 33, "causal": "bottom-right"},
    {"heads": 2, "q_len": 131, "kv_len": 100, "head_dim": 80, "causal": "top-left"},
    {"heads": 6, "kv_heads": 2, "q_len": 40, "kv_len": 150, "head_dim": 16, "layout": "bshd+pad"},
    {"heads": 2, "q_len": 33, "kv_len": 193, "head_dim": 64, "layout": "bhds"},
    {"heads": 2, "q_len": 130, "kv_len": 257, "head_dim": 64, "values": "growing-max"},
    {"heads": 2, "q_len": 130, "kv_len": 100, "head_dim": 64, "values": "large-logits"},
    {"heads": 2, "q_len": 100, "kv_len": 100, "head_dim": 32, "values": "negative-logits"},
    {"heads": 4, "q_len": 100, "kv_len": 300, "head_dim": 32, "values": "uniform", "scale": 0.5},
    {"heads": 4, "q_len": 257, "kv_len": 300, "head_dim": 64},
    {"heads": 4, "q_len": 64, "kv_len": 1024, "head_dim": 17},
)

#: the same with options and gradients
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"heads": 2, "q_len": 64, "kv_len": 64, "head_dim": 32, "backward": True},
    {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 97, "kv_len": 129, "head_dim": 40, "causal": "bottom-right",
     "backward": True},
    {"heads": 3, "q_len": 131, "kv_len": 100, "head_dim": 33, "v_dim": 17, "window": (40, 7), "backward": True},
    {"heads": 2, "q_len": 100, "kv_len": 129, "head_dim": 32, "softcap": 2.0, "mask": "bhqk", "backward": True},
    {"batch": 2, "heads": 4, "kv_heads": 2, "q_len": 65, "kv_len": 97, "head_dim": 24, "alibi": "drawn",
     "lengths": "both", "backward": True},
    {"batch": 2, "heads": 3, "q_len": 65, "kv_len": 90, "head_dim": 32, "bias": "qk", "sinks": True, "backward": True},
    {"heads": 4, "kv_heads": 1, "q_len": 80, "kv_len": 80, "head_dim": 32, "causal": "top-left", "dropout": 0.2,
     "layout": "bshd+pad", "backward": True},
    {"batch": 3, "heads": 4, "kv_heads": 2, "q_len": 70, "kv_len": 111, "head_dim": 16, "causal": "bottom-right",
     "window": (50, -1), "softcap": 20.0, "alibi": "geometric", "bias": "bhqk:fp32", "mask": "bk", "sinks": True,
     "lengths": "kv", "dropout": 0.1, "backward": True},
    {"heads": 8, "q_len": 256, "kv_len": 256, "head_dim": 64, "backward": True},
    {"heads": 2, "q_len": 50, "kv_len": 140, "head_dim": 32, "alibi": "geometric", "sinks": True},
)  # fmt: skip


def cases(dtype: str) -> list[Case]:
    """The list in one dtype."""
    return [Case(dtype=dtype, seed=seed, **recipe) for seed, recipe in enumerate(_RECIPES)]


def option_cases(dtype: str) -> list[Case]:
    """The list with options and gradients in one dtype."""
    return [Case(dtype=dtype, seed=seed, **recipe) for seed, recipe in enumerate(_OPTIONS)]
