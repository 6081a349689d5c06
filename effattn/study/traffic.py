"""`effattn study traffic`: elements that kernels move between memory and chip, counted by the CPU backend.

Standard attention against FlashAttention, each against its formula, and the formula's order N^2 d^2 / M: with M
elements of fast memory a block of queries has M / (4 d) rows (Dao et al., arXiv:2205.14135, section 3.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effattn.errors import RequestError
from effattn.study.engine import Job, Point, Row
from effattn.study.intervals import slope

if TYPE_CHECKING:
    import torch

HEAD_DIM = 64
COLUMNS = ("elements", "formula", "bytes")
#: how to read the table
NOTES = (
    f"One head, d = {HEAD_DIM}, forward. counted: elements that the kernel loads and stores, by the CPU backend. formula: what"
    " tiles of so many rows have to move. of standard: the share of what standard attention moves.",
)
#: profile -> lengths, rows of a block of queries
PROFILES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "smoke": ((128, 256), (32, 64)),
    "full": ((256, 512, 1024, 2048), (16, 32, 64, 128)),
}


def jobs(name: str) -> list[Job]:
    """All jobs of a profile; nothing is random, so each has one draw."""
    if name not in PROFILES:
        raise RequestError(f"unknown profile {name!r}; expected one of {', '.join(PROFILES)}")
    lengths, blocks = PROFILES[name]
    found = []
    for n in lengths:
        point = Point(part="traffic", n=n, head_dim=HEAD_DIM, method="standard", size=64)
        found.append(Job(point=point, draw=0))
        found += [
            Job(point=Point(part="traffic", n=n, head_dim=HEAD_DIM, method="flash", size=block), draw=0)
            for block in blocks
        ]
    return found


def formula(method: str, n: int, d: int, block: int) -> int:
    """Elements moved, forward, one head.

    flash, queries outermost: 2 n d for q and out, n for the log-sum-exp, 2 n d for k and v in each block of queries.
    standard: 4 n^2 for S and P, written and read; n d for out; and what tiles of `block` read again of q, k and v,
    3 n^2 d / block, where the formula of the literature has 3 n d, for a fast memory that holds them whole.
    """
    if method == "flash":
        return 2 * n * d + n + -(-n // block) * 2 * n * d
    return 4 * n * n + n * d + 3 * n * n * d // block


def measure(job: Job) -> Mapping[str, float]:
    """Count one run."""
    import torch

    from effattn import cpu

    point = job.point
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, point.n, point.head_dim, generator=generator) for _ in range(3))
    with cpu.active(), cpu.checks("traffic") as report:
        _run(point.method, q, k, v, point.size)
    moved = sum(t.loaded + t.stored for t in report.traffic.values())
    return {
        "bytes": moved,
        "elements": moved / q.element_size(),
        "formula": formula(point.method, point.n, point.head_dim, point.size),
    }


def _run(method: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int) -> None:
    if method == "flash":
        from effattn.kernels.flash_forward import flash_attention_forward

        flash_attention_forward(q, k, v, block_m=block, block_n=64)
    else:
        from effattn.kernels.standard_attention import standard_attention

        standard_attention(q, k, v, block=block)


class Exponents(NamedTuple):
    """Slopes of the logarithm of flash's elements."""

    length: float  #: against n, the largest block
    block: float  #: against the block, the longest n; M is 4 d times the block


def exponents(rows: Sequence[Row]) -> Exponents:
    """NaN where there is one length or one block."""
    flash = {
        (r.job.point.n, r.job.point.size): r.measures["elements"]
        for r in rows
        if r.job.point.method == "flash"
    }
    longest, largest = (max(key[i] for key in flash) for i in (0, 1))
    by_length = {n: [e] for (n, b), e in sorted(flash.items()) if b == largest}
    by_block = {b: [e] for (n, b), e in sorted(flash.items()) if n == longest}
    return Exponents(
        slope(list(by_length), list(by_length.values())).median,
        slope(list(by_block), list(by_block.values())).median,
    )


def table(rows: Sequence[Row]) -> list[str]:
    """Counted and computed, as Markdown."""
    lines = [
        "| n | kernel | rows of a block | elements counted | formula | counted / formula | of standard |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    standard = {r.job.point.n: r.measures["elements"] for r in rows if r.job.point.method == "standard"}
    for row in rows:
        point, got = row.job.point, row.measures
        ratio = got["elements"] / got["formula"]
        share = got["elements"] / standard[point.n]
        lines.append(
            f"| {point.n} | {point.method} | {point.size} | {got['elements']:.0f} | {got['formula']:.0f} |"
            f" {ratio:.4f} | {share:.1%} |"
        )
    return lines


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """summary.md and a chart."""
    from effattn.study import charts

    drawn = []
    if charts.available():
        curves = []
        for method, block in dict.fromkeys((r.job.point.method, r.job.point.size) for r in rows):
            points = [r for r in rows if (r.job.point.method, r.job.point.size) == (method, block)]
            label = method if method == "standard" else f"flash, blocks of {block}"
            x = [r.job.point.n for r in points]
            curves.append(charts.Curve(label=label, x=x, y=[r.measures["elements"] for r in points]))
        drawn.append(
            charts.draw(
                charts.Chart(
                    name="traffic", title=f"one head, d = {HEAD_DIM}, forward", x_label="sequence length n",
                    y_label="elements moved", curves=curves,
                ),
                folder,
            )
        )  # fmt: skip
    found = exponents(rows)
    lines = [
        "# Study traffic", "", *(f"![{path.stem}]({path.name})\n" for path in drawn), *table(rows), "",
        f"Exponent of flash's elements in n: {found.length:.3f}; in the rows of a block: {found.block:.3f}.", "",
    ]  # fmt: skip
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")
    return drawn
