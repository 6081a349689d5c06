"""Standard, Linformer, Performer and FlashAttention side by side, every figure measured."""

from __future__ import annotations

from pathlib import Path

from effattn.report import text
from effattn.study import recorded

MEASUREMENTS = Path(__file__).parent.parent / "measurements"
ROWS = (
    ("standard", "Standard", "all pairs, the matrix written out", "the definition"),
    ("flash", "FlashAttention", "all pairs, tile by tile on the chip", "a running softmax; nothing n x n leaves the chip"),
    ("linformer", "Linformer, k = 256", "k averages of keys and of values", "attention has few large singular values"),
    ("performer", "Performer, m = 256", "random features of queries and keys",
     "exp(q.k) is a mean of products: sum over the keys first"),
)  # fmt: skip


def render() -> str:
    """The table, and where its figures come from."""
    costs = recorded.load(MEASUREMENTS / "study-complexity.json")
    lines = [
        "| | approach | time | memory | n = 16,384: CPU time, memory | error, n = 4,096 | key idea |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, name, approach, idea in ROWS:
        (at,) = recorded.find(costs, method=method, n=16384)
        (near,) = recorded.find(costs, method=method, n=4096)
        time, memory = recorded.exponents(costs, method)
        lines.append(
            f"| {name} | {approach} | n^{time.median:.2f} | n^{memory.median:.2f} |"
            f" {text.seconds(at['seconds'][0])}, {at['bytes'][0] / 2**20:.0f} MB | {_error(near['error'][0])} | {idea} |"
        )
    known = recorded.load(MEASUREMENTS / "study-controls.json")
    for method, name in (("uniform", "the average of all values"), ("zero", "zeros")):
        (point,) = recorded.find(known, method=method)
        lines.append(
            f"| *{name}* | knows nothing of q and k | | | | {_error(point['error'][0])} | a control |"
        )
    return "\n".join(lines)


def _error(x: float) -> str:
    return f"{x:.1e}" if x < 1e-3 else f"{100 * x:.0f} %"
