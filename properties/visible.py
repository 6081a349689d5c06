"""Which query sees which key, as a matrix: the definition, written out once more for the laws.

For small cases only. The reference has its own, in tiles; that the two agree is a test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from effattn.case import Case, Inputs


def visible(case: Case, inputs: Inputs) -> torch.Tensor:
    """(batch, heads, q_len, kv_len) bool: True where the query sees the key."""
    import torch

    extras, device = inputs.extras, inputs.q.device
    rows = torch.arange(case.q_len, device=device).view(1, 1, -1, 1)
    keys = torch.arange(case.kv_len, device=device).view(1, 1, 1, -1)
    seen = (keys < _lengths(extras.kv_lengths, case.batch, case.kv_len, device)) & (
        rows < _lengths(extras.q_lengths, case.batch, case.q_len, device)
    )
    away = distance(case, inputs)
    if case.causal != "none":
        seen = seen & (away <= 0)
    if case.window is not None:
        left, right = case.window
        if left >= 0:
            seen = seen & (away >= -left)
        if right >= 0:
            seen = seen & (away <= right)
    if extras.mask is not None:
        seen = seen & extras.mask
    return seen.expand(case.batch, case.heads, case.q_len, case.kv_len)


def distance(case: Case, inputs: Inputs) -> torch.Tensor:
    """(batch or 1, 1, q_len, kv_len) int64: key position less query position, in the case's alignment."""
    import torch

    extras, device = inputs.extras, inputs.q.device
    rows = torch.arange(case.q_len, device=device).view(1, 1, -1, 1)
    keys = torch.arange(case.kv_len, device=device).view(1, 1, 1, -1)
    q_end = _lengths(extras.q_lengths, case.batch, case.q_len, device)
    k_end = _lengths(extras.kv_lengths, case.batch, case.kv_len, device)
    shift = k_end - q_end if case.alignment == "bottom-right" else torch.zeros_like(k_end)
    return keys - rows - shift


def _lengths(given: torch.Tensor | None, batch: int, full: int, device: torch.device) -> torch.Tensor:
    import torch

    lengths = torch.full((batch,), full, device=device) if given is None else given.to(torch.int64)
    return lengths.view(-1, 1, 1, 1)
