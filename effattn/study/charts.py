"""Charts of studies as SVG, by matplotlib (the extra `study`). The same data give the same file."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from effattn.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: medians with their intervals."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: str = "method"  #: "method", "theory", "floor" or "control"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One picture with logarithmic axes."""

    name: str  #: of the file, without .svg
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve] = field(default_factory=tuple)
    x_log: bool = True
    y_log: bool = True
    least: float = 0.0  #: smaller values lie below a logarithmic axis, if there are larger ones
    below: str = ""  #: what is written where some do


#: Of the curves of style "method" and of controls: each has a look of its own that needs no colour.
_MARKERS = "os^Dv<>phX*d"
_DASHES: tuple[Any, ...] = ("-", "--", "-.")
_CONTROLS: tuple[Any, ...] = ("-.", (0, (1, 1)), (0, (6, 1, 1, 1, 1, 1)), (0, (8, 3)))


def _looks(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """How each curve is drawn."""
    counts: Counter[str] = Counter()
    found = []
    for curve in curves:
        i = counts[curve.style]
        counts[curve.style] += 1
        if curve.style == "theory":
            look: dict[str, Any] = {"linestyle": "--", "color": "black", "linewidth": 1.2}
        elif curve.style == "floor":
            look = {"linestyle": ":", "color": "black", "linewidth": 1.2}
        elif curve.style == "control":
            look = {"linestyle": _CONTROLS[i % len(_CONTROLS)], "color": "0.55", "linewidth": 1.2}
        else:
            look = {
                "color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)], "markersize": 3.5,
                "linestyle": _DASHES[i // 10 % len(_DASHES)],
            }  # fmt: skip
        found.append(look)
    return found


def available() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def draw(chart: Chart, folder: Path) -> Path:
    """Write FOLDER/NAME.svg. RequestError without matplotlib."""
    if not available():
        raise RequestError("charts need matplotlib; install it with `pip install 'effattn[study]'`")
    import matplotlib

    with matplotlib.rc_context(
        {
            "svg.hashsalt": "effattn", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
        }
    ):  # fmt: skip
        from matplotlib.figure import Figure

        # A figure of its own, without pyplot: no global state and no backend for a screen.
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        axes = figure.add_subplot()
        for curve, look in zip(chart.curves, _looks(chart.curves), strict=True):
            (line,) = axes.plot(curve.x, curve.y, label=curve.label, **look)
            if curve.low is not None and curve.high is not None and len(curve.x) > 1:
                axes.fill_between(
                    curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0
                )
        if chart.x_log:
            axes.set_xscale("log", base=2)
        if chart.y_log:
            axes.set_yscale("log")
        medians = [y for curve in chart.curves for y in curve.y if math.isfinite(y)]
        drawn = [y for y in medians if y >= chart.least]
        if drawn and len(drawn) < len(medians):
            axes.set_ylim(min(drawn) / 1.5, max(drawn) * 1.5)
            figure.supxlabel(chart.below, fontsize=7)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label, title=chart.title)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        path = folder / f"{chart.name}.svg"
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "effattn"})
    return path
