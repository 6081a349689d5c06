"""Errors of Performer against the sequence length, the head dimension and the scale of the inputs."""

from __future__ import annotations

from pathlib import Path

from effattn.study import axes, recorded

DATA = Path(__file__).parent.parent / "measurements" / "study-performer-axes.json"
#: what is held where another axis varies
HELD = {"n": 512, "head_dim": 16, "input_scale": 0.5}


def render() -> str:
    """One table an axis."""
    data = recorded.load(DATA)
    lines = [f"`{data['command']}`: medians of 9 draws, 95 % intervals of the medians."]
    for found in axes.along(recorded.curves(data)):
        if any(getattr(found.where, name) != value for name, value in HELD.items() if name != found.axis):
            continue
        slopes = {
            entry["method"]: None if None in entry["slope"] else recorded.interval(entry["slope"])
            for entry in data["along"]
            if entry["axis"] == found.axis
            and all(entry[name] == value for name, value in found.where._asdict().items())
        }
        lines += ["", f"{axes.heading(found)} ({found.title('m')}):", "", *axes.table(found, slopes)]
    return "\n".join(lines)
