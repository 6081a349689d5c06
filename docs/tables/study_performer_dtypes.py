"""Approximation and rounding apart, by dtype."""

from __future__ import annotations

from pathlib import Path

from effattn.study import recorded, results

DATA = Path(__file__).parent.parent / "measurements" / "study-performer-dtypes.json"
SIZE, HEAD_DIM, SCALE = 256, 64, 0.5
METHODS = (
    "positive, orthogonal",
    "hyperbolic, orthogonal",
    "trigonometric, orthogonal",
    "favor++, orthogonal",
    "relu, orthogonal",
)


def render() -> str:
    """Medians at one number of features; the features in float64, and what each dtype adds."""
    data = recorded.load(DATA)
    lines = [
        f"`{data['command']}`: n = {data['points'][0]['n']}, d = {HEAD_DIM}, entries N(0, {SCALE}^2), m = {SIZE}; medians of"
        f" {data['points'][0]['draws']} draws with their range.",
        "",
        "| features | approximation | rounding in fp32 | fp16 | bf16 |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS:
        cells = []
        for dtype, measure in (
            ("fp32", "approximation"),
            ("fp32", "rounding"),
            ("fp16", "rounding"),
            ("bf16", "rounding"),
        ):
            (point,) = recorded.find(
                data,
                part="error",
                method=method,
                dtype=dtype,
                size=SIZE,
                head_dim=HEAD_DIM,
                input_scale=SCALE,
            )
            cells.append(results.cell(recorded.interval(point[measure])))
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
