"""Records a finished study for the pages: docs/measurements/study-NAME.json, and its charts in docs/charts/.

    python docs/record_study.py FOLDER NAME "effattn study ..."

Then `python docs/update_tables.py` writes the tables anew. `python docs/record_study.py --charts` draws the charts of errors
and spectra that are in docs/charts/ again, from what is recorded.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from effattn.study import charts, complexity, model, plans, recorded, results, traffic

ROOT = Path(__file__).resolve().parent
#: name -> which of the study's charts the pages show, if not all
CHARTS = {
    "performer-axes": (
        "along-n-m64-d16-normal-x0.5-fp32.svg",
        "along-head-dim-m64-n512-normal-x0.5-fp32.svg",
        "along-input-scale-m64-n512-d16-normal-fp32.svg",
    )
}


def main(folder: Path, name: str, command: str) -> None:
    """One study."""
    asked = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    columns = {
        "complexity": (*plans.COST_COLUMNS, "error"),
        "traffic": traffic.COLUMNS,
        "model": model.COLUMNS,
    }.get(asked["study"], plans.ERROR_COLUMNS)
    data = recorded.record(folder, columns, command=command)
    if asked["study"] == "complexity":
        data["exponents"] = {
            line.method: {"seconds": line.time_exponent[:3], "bytes": line.memory_exponent[:3]}
            for line in complexity.lines(recorded.rows_of(folder, columns))
        }
    target = ROOT / "measurements" / f"study-{name}.json"
    lists = {key: data.pop(key) for key in ("points", "slopes", "along") if key in data}
    body = json.dumps(data, indent=1)[:-2]
    for key, entries in lists.items():
        lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
        body += f',\n "{key}": [\n{lines}\n ]'
    target.write_text(body + "\n}\n", encoding="utf-8")
    for drawn in CHARTS.get(name) or [path.name for path in folder.glob("*.svg")]:
        shutil.copyfile(folder / drawn, ROOT / "charts" / f"{name}-{drawn}")


def redraw() -> None:
    """The charts of errors and spectra that are there, from docs/measurements/."""
    for file in sorted((ROOT / "measurements").glob("study-*.json")):
        name = file.stem.removeprefix("study-")
        size = "k" if name.startswith("linformer") else "m"
        for where, curves in recorded.curves(recorded.load(file)).items():
            target = ROOT / "charts" / f"{name}-{where.slug()}.svg"
            if where.part in ("error", "spectrum") and target.exists():
                charts.draw(results.chart(where, curves, size=size), target.parent).replace(target)


if __name__ == "__main__":
    if sys.argv[1:] == ["--charts"]:
        redraw()
        raise SystemExit(0)
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
