"""Charts of studies as SVG, by matplotlib (the extra `study`). The same data give the same file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
        looks = {
            "theory": {"linestyle": "--", "color": "black", "linewidth": 1.2},
            "floor": {"linestyle": ":", "color": "black", "linewidth": 1.2},
            "control": {"linestyle": "-.", "color": "0.6", "linewidth": 1.0},
        }
        for number, curve in enumerate(chart.curves):
            look = looks.get(curve.style, {"color": f"C{number % 10}", "marker": "o", "markersize": 3.5})
            (line,) = axes.plot(curve.x, curve.y, label=curve.label, **look)
            if curve.low is not None and curve.high is not None and len(curve.x) > 1:
                axes.fill_between(
                    curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0
                )
        if chart.x_log:
            axes.set_xscale("log", base=2)
        if chart.y_log:
            axes.set_yscale("log")
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label, title=chart.title)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        path = folder / f"{chart.name}.svg"
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": "effattn"})
    return path
