"""tests/kernels_budget.toml is what the kernels take on GPUs, and none of them spills or wants memory that is not there.

It is not among the tests of Triton's other versions (`tests/test_kernels_*`): what a compiler makes of a kernel is its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import triton

from effattn.errors import RequestError
from effattn.kernels import ahead_of_time, budget, decode, tiles

FILE = Path(__file__).with_name("kernels_budget.toml")
WRITE = "run `python -m effattn.kernels.budget --out tests/kernels_budget.toml`"
#: compiled here: each kernel, each dtype, and each compute capability, where registers are short
COMPILED = (
    "forward-bf16-64-plain-80",
    "forward-bf16-128-packed-90",
    "forward-bf16-256-all-100",
    "forward-fp32-64-all-90",
    "keys-bf16-256-packed-90",
    "queries-bf16-256-packed-80",
    "keys-fp32-64-packed-100",
    "bias-bf16-256-all-90",
    "delta-bf16-256-packed-90",
    "decode-bf16-64-paged-90",
    "merge-fp32-256-plain-90",
    "gradients-fp32-256-plain-90",
)


@pytest.fixture(scope="module")
def recorded() -> tuple[str, dict[str, budget.Entry]]:
    return budget.read(FILE)


def test_file_has_every_configuration_as_it_is_cut_now(recorded: tuple[str, dict[str, budget.Entry]]) -> None:
    assert budget.stale(recorded[1]) == [], WRITE


def test_no_configuration_spills_or_takes_more_than_there_is(
    recorded: tuple[str, dict[str, budget.Entry]],
) -> None:
    assert [fault for name, found in recorded[1].items() for fault in budget.faults(name, found)] == []


def test_forward_kernels_in_16_bits_use_each_generations_matrix_units(
    recorded: tuple[str, dict[str, budget.Entry]],
) -> None:
    for name, found in recorded[1].items():
        kernel, dtype, _dim, _option, capability = name.split("-")
        if dtype == "fp32" or kernel in ("delta", "merge"):
            assert found.products == "fma", name
        elif kernel == "forward":
            assert found.products == {"80": "mma", "90": "wgmma", "100": "tcgen05"}[capability], name
        else:
            assert found.products != "fma", name


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_configuration_takes_what_the_file_says(
    name: str, recorded: tuple[str, dict[str, budget.Entry]]
) -> None:
    found = budget.entry(name)
    assert budget.faults(name, found) == []
    version, entries = recorded
    if version == triton.__version__:
        assert found == entries[name], WRITE


def test_a_file_that_is_out_of_date_is_told(recorded: tuple[str, dict[str, budget.Entry]]) -> None:
    entries = recorded[1]
    name = COMPILED[0]
    assert budget.stale({n: e for n, e in entries.items() if n != name}) == [f"{name} is missing"]
    changed = entries | {name: dataclasses.replace(entries[name], warps=4)}
    (line,) = budget.stale(changed)
    assert line.startswith(f"{name} has ")
    (line,) = budget.stale({**entries, "forward-bf16-65-plain-80": entries[name]})
    assert line == "forward-bf16-65-plain-80 is no configuration"


def test_what_takes_too_much_is_a_fault(recorded: tuple[str, dict[str, budget.Entry]]) -> None:
    name = "forward-bf16-64-plain-80"
    found = recorded[1][name]
    assert budget.faults(name, dataclasses.replace(found, shared=163 * 1024)) == []
    (fault,) = budget.faults(name, dataclasses.replace(found, shared=163 * 1024 + 1))
    assert fault == f"{name} takes 166913 bytes of shared memory, more than 166912"
    assert budget.faults(name, dataclasses.replace(found, spills=1)) == [
        f"{name} spills registers, by 1 instructions"
    ]


def test_blocks_that_are_too_large_spill_when_they_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = tiles.Tiles(
        block_m=32, block_n=64, options={"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    )
    monkeypatch.setattr(decode, "decode_tiles", lambda *_: cut)
    name = "decode-bf16-128-paged-90"
    found = budget.entry(name)
    assert found.blocks == "32x64"
    assert found.spills > 0
    assert any("spills" in fault for fault in budget.faults(name, found))


def test_file_is_read_as_it_was_written(
    tmp_path: Path, recorded: tuple[str, dict[str, budget.Entry]]
) -> None:
    budget.write(tmp_path / "file.toml", recorded[1])
    assert budget.read(tmp_path / "file.toml") == (triton.__version__, recorded[1])


def test_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no configuration's name contains 'sideways'"):
        budget.main(["--only", "sideways"])
    with pytest.raises(RequestError, match="leave --only and --every out"):
        budget.main(["--only", "forward", "--out", str(tmp_path / "part.toml")])


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [(32, 0, 8, 8), (255, 0, 8, 1), (128, 0, 8, 2), (32, 100 * 1024, 4, 2), (40, 0, 1, 32)],
)
def test_resident_blocks_are_limited_by_what_is_short(
    registers: int, shared: int, warps: int, resident: int
) -> None:
    usage = ahead_of_time.Usage(shared=shared, registers=registers, spills=0, ptx="", cubin=b"")
    assert ahead_of_time.resident_blocks(usage, warps, 90) == resident
