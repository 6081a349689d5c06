"""Published criteria, kernel by kernel."""

from __future__ import annotations

from typing import Any

from criteria_record import NOT_RECORDED, load, own

SHORT = {
    "FlashAttention-2": "FA-2",
    "FlashAttention-3": "FA-3",
    "PyTorch, tolerances": "PyTorch tol.",
    "PyTorch, errors": "PyTorch err.",
    "flash-linear-attention": "fla",
    "flash-linear-attention, CI": "fla CI",
    "flashinfer-bench": "flashinfer",
    "TransformerEngine": "TE",
}


def render() -> str:
    record = load()
    if record is None:
        return NOT_RECORDED
    names, sets = list(record["criteria"]), record["inputs"]
    mine = {
        name: None if (found := own(sets, name)) is None else found[name]
        for name in names
        if name != "effattn"
    }
    smoke = {name: sets["smoke"][name] for name in names}
    parts = [
        "### Wrong kernels, on the smoke profile",
        _matrix(record, smoke, right=False),
        "### Wrong kernels, on the inputs of each project",
        _matrix(record, mine, right=False),
        "### Right kernels that something objects to, on the smoke profile",
        _matrix(record, smoke, right=True),
        "### Right kernels that something objects to, on the inputs of each project",
        _matrix(record, mine, right=True),
    ]
    return "\n\n".join(parts)


def _matrix(record: dict[str, Any], results: dict[str, Any], *, right: bool) -> str:
    lines = [
        f"| kernel | {' | '.join(SHORT.get(name, name) for name in results)} |",
        "|---" * (len(results) + 1) + "|",
    ]
    for kernel, about in record["kernels"].items():
        if about["right"] != right:
            continue
        cells = [_cell(kernel, result, right=right) for result in results.values()]
        if right and not any(cell.strip(".") for cell in cells):
            continue
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "None."


def _cell(kernel: str, result: dict[str, Any] | None, *, right: bool) -> str:
    """Empty: it was not shown. A dot: judged as it should be. Else the dtypes in which it was not."""
    if result is None or kernel not in (shown := result["right" if right else "wrong"]):
        return ""
    dtypes = shown[kernel]
    bad = [dtype for dtype in dtypes if dtype in result["alarms" if right else "missed"].get(kernel, ())]
    if not bad:
        return "."
    return "all" if len(bad) == len(dtypes) > 1 else " ".join(bad)
