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


def cases(dtype: str) -> list[Case]:
    """The list in one dtype."""
    return [Case(dtype=dtype, seed=seed, **recipe) for seed, recipe in enumerate(_RECIPES)]
