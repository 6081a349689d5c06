"""Small kernels that Hypothesis draws, on the CPU backend and under Triton's own interpreter: the same bits.

The interpreter is a property of a process (TRITON_INTERPRET=1 before triton is imported), so it has one of its own.

The interpreter computes each operation with numpy, one rounding each, so elementwise arithmetic of integers, fp16 and
fp32 must agree bit for bit. Sums and products are drawn over small whole numbers, where every order of summation is exact.
Left out is what the interpreter is known to do differently: bf16 (it multiplies bit patterns), tf32, division of integers
by zero, and what the IR leaves open (the sign of the larger of two zeros, the bits of a NaN).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import recording
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

N = 64
ROWS, COLUMNS = 16, 32
_numbers = itertools.count()

HEAD = "import triton\nimport triton.language as tl\n\n\n@triton.jit\n"

FLOAT_BINARY = [
    "{} + {}",
    "{} - {}",
    "{} * {}",
    "tl.maximum({}, {})",
    "tl.minimum({}, {})",
    "tl.where(b0, {}, {})",
]
FLOAT_UNARY = ["-{}", "tl.abs({})", "{} * 0.5", "{} + 1.5"]
SINGLE_UNARY = [
    "tl.sqrt(tl.abs({}))",
    "tl.floor({})",
    "tl.ceil({})",
    "{}.to(tl.float16).to(tl.float32)",
    "{} / 3.0",
]
INT_BINARY = [
    *(
        "{} + {}",
        "{} - {}",
        "{} * {}",
        "{} & {}",
        "{} | {}",
        "{} ^ {}",
        "tl.maximum({}, {})",
        "tl.minimum({}, {})",
    ),
    *(
        "tl.where(b0, {}, {})",
        "{} << ({} & 15)",
        "{} >> ({} & 15)",
        "{} // (({} & 7) + 1)",
        "{} % (({} & 7) + 1)",
    ),
]
INT_UNARY = ["-{}", "~{}", "tl.abs({})", "{} + 7", "{} * 3"]
COMPARE = ["{} < {}", "{} <= {}", "{} > {}", "{} == {}", "{} != {}"]


@dataclass(frozen=True)
class Program:
    """The source of a kernel `kernel(x, y, k, o, oi, n, N)`, and how many values it compares."""

    text: str


@st.composite
def chains(draw: st.DrawFn, kind: str) -> Program:
    """A chain of elementwise operations of one float type and int32, with masks, ending in stores and reductions."""
    lines = [
        "def kernel(x, y, k, o, oi, n, N: tl.constexpr):", "    pid = tl.program_id(0)", "    i = tl.arange(0, N)",
        "    at = pid * N + i", f"    f0 = tl.load(x + at).to(tl.{kind})",
        f"    f1 = tl.load(y + at, mask=i < n, other=0.25).to(tl.{kind})", "    i0 = tl.load(k + at)", "    b0 = i0 > 2",
    ]  # fmt: skip
    floats, ints = ["f0", "f1"], ["i0"]
    unary = FLOAT_UNARY + (SINGLE_UNARY if kind == "float32" else [])
    for step in range(draw(st.integers(3, 10))):
        what = draw(
            st.sampled_from(["binary", "unary", "integer", "integer unary", "mask", "cast", "branch"])
        )
        a, b = draw(st.sampled_from(floats)), draw(st.sampled_from(floats))
        p, q = draw(st.sampled_from(ints)), draw(st.sampled_from(ints))
        name = f"v{step}"
        if what == "binary":
            lines.append(f"    {name} = ({draw(st.sampled_from(FLOAT_BINARY)).format(a, b)}).to(tl.{kind})")
            floats.append(name)
        elif what == "unary":
            lines.append(f"    {name} = ({draw(st.sampled_from(unary)).format(a)}).to(tl.{kind})")
            floats.append(name)
        elif what == "integer":
            lines.append(f"    {name} = {draw(st.sampled_from(INT_BINARY)).format(p, q)}")
            ints.append(name)
        elif what == "integer unary":
            lines.append(f"    {name} = {draw(st.sampled_from(INT_UNARY)).format(p)}")
            ints.append(name)
        elif what == "mask":
            lines.append(
                f"    b0 = b0 & ({draw(st.sampled_from(COMPARE)).format(a, b)}) | ({draw(st.sampled_from(COMPARE)).format(p, q)})"
            )
        elif what == "cast":
            lines.append(f"    {name} = ({p} & 1023).to(tl.{kind})")
            floats.append(name)
        else:
            lines += [f"    {name} = {a}", f"    for t in range({draw(st.integers(0, 3))}):", "        if (pid + t) % 2 == 0:",
                      f"            {name} = ({name} + {b}).to(tl.{kind})"]  # fmt: skip
            floats.append(name)
    lines += [
        f"    tl.store(o + at, {floats[-1]}.to(tl.float32))",
        f"    tl.store(o + 2 * N + at, {floats[-2]}.to(tl.float32), mask=b0)",
        f"    tl.store(oi + at, {ints[-1]})",
        f"    tl.store(oi + 2 * N + pid, tl.sum({ints[-1]}, 0))",
        f"    tl.store(oi + 2 * N + 2 + pid, tl.max({ints[-1]}, 0))",
        "    tl.store(oi + 2 * N + 4 + pid, tl.sum(b0.to(tl.int32), 0))",
        "    tl.store(oi + 3 * N + at, tl.cumsum(i0, 0))",
        f"    tl.store(o + 4 * N + pid, tl.max(tl.where({floats[-1]} == {floats[-1]}, {floats[-1]}, 0.0), 0).to(tl.float32))",
    ]
    return Program("\n".join(lines) + "\n")


@st.composite
def products(draw: st.DrawFn) -> Program:
    """A product of tiles and reductions of it, over whole numbers, in fp16 or fp32 operands."""
    kind = draw(st.sampled_from(["float16", "float32"]))
    precision = ", input_precision='ieee'"
    update = draw(st.sampled_from(["c", "c + 1.0", "tl.where(c > 4.0, c, -c)", "c * 2.0"]))
    transposed = draw(st.booleans())
    axis = draw(st.sampled_from([0, 1]))
    turns = draw(st.integers(1, 3))
    reduction = draw(st.sampled_from(["tl.sum(c, {})", "tl.max(c, {})", "tl.min(c, {})"])).format(axis)
    left = f"tl.arange(0, {COLUMNS if axis == 0 else ROWS})"
    lines = [
        "def kernel(x, y, k, o, oi, n, N: tl.constexpr):",
        f"    r = tl.arange(0, {ROWS})", f"    j = tl.arange(0, {COLUMNS})",
        f"    a = tl.load(x + r[:, None] * {ROWS} + r[None, :]).to(tl.{kind})",
        (f"    b = tl.trans(tl.load(y + j[:, None] * {ROWS} + r[None, :])).to(tl.{kind})" if transposed
         else f"    b = tl.load(y + r[:, None] * {COLUMNS} + j[None, :]).to(tl.{kind})"),
        f"    c = tl.zeros([{ROWS}, {COLUMNS}], tl.float32)",
        f"    for t in range({turns}):", f"        c = tl.dot(a, b, c{precision})", f"        c = {update}",
        f"    tl.store(o + r[:, None] * {COLUMNS} + j[None, :], c)",
        f"    tl.store(o + {ROWS * COLUMNS} + {left}, {reduction})",
        f"    tl.store(oi + {left}, tl.argmax(c, {axis}))",
    ]  # fmt: skip
    return Program("\n".join(lines) + "\n")


def run(path: Path, data: list[np.ndarray], grid: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """What the kernel of a file stores, in this process: compiled, or interpreted."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    o, oi = torch.full((1024,), 77.0), torch.full((1024,), 77, dtype=torch.int32)
    module.kernel[(grid,)](*map(torch.from_numpy, data), o, oi, n, N=N)
    return o.numpy(), oi.numpy()


def serve() -> None:
    """The interpreter's process: each line names a folder with a program and its data, and is answered when it has run."""
    for line in sys.stdin:
        folder, grid, n = line.split()
        with np.load(Path(folder) / "data.npz") as file:
            data = [file[name] for name in ("x", "y", "k")]
        with np.errstate(all="ignore"):
            o, oi = run(Path(folder) / "program.py", data, int(grid), int(n))
        np.savez(Path(folder) / "stored.npz", o=o, oi=oi)
        print("done", flush=True)


Interpret = Callable[[Path, int, int], tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def interpret() -> Iterator[Interpret]:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def interpreted(folder: Path, grid: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        process.stdin.write(f"{folder} {grid} {n}\n")
        process.stdin.flush()
        if process.stdout.readline().strip() != "done":
            raise RuntimeError(f"the interpreter failed:\n{process.communicate()[1]}")
        with np.load(folder / "stored.npz") as file:
            return file["o"], file["oi"]

    yield interpreted
    process.stdin.close()
    process.wait()
    process.stdout.close()
    process.stderr.close()


def both(
    program: Program, data: list[np.ndarray], grid: int, n: int, folder: Path, interpret: Interpret
) -> int:
    """Run a program both ways and compare what it stores; returns the number of values."""
    folder = folder / f"drawn_{next(_numbers)}"
    folder.mkdir()
    (folder / "program.py").write_text(HEAD + program.text)
    np.savez(folder / "data.npz", **dict(zip("xyk", data, strict=True)))
    o, oi = run(folder / "program.py", data, grid, n)
    want, want_i = interpret(folder, grid, n)
    same = (
        (o.view(np.int32) == want.view(np.int32)) | (np.isnan(o) & np.isnan(want)) | ((o == 0) & (want == 0))
    )
    assert same.all(), (
        f"floats differ at {np.flatnonzero(~same)[:5]}: {o[~same][:5]} and {want[~same][:5]}\n{program.text}"
    )
    assert np.array_equal(oi, want_i), (
        f"integers differ at {np.flatnonzero(oi != want_i)[:5]}\n{program.text}"
    )
    return int((want != 77.0).sum() + (want_i != 77).sum())


def data_of(seed: int, whole: bool) -> list[np.ndarray]:
    g = np.random.default_rng(seed)
    if whole:
        x, y = g.integers(-4, 5, 1024), g.integers(-4, 5, 1024)
    else:
        x, y = g.standard_normal(1024) * 2.0 ** g.integers(-4, 5, 1024), np.round(g.standard_normal(1024), 1)
        x[:6] = [0.0, -0.0, np.inf, -np.inf, 6e-8, 65504.0]
    k = g.integers(-50, 50, 1024).astype(np.int32)
    return [x.astype(np.float32), y.astype(np.float32), k]


# Not shrunk: each attempt compiles, and the program is printed.
drawn = settings(
    max_examples=25 if recording.many() else 10,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.mark.parametrize("kind", ["float32", "float16"])
@drawn
@given(st.data())
def test_chains_store_what_the_interpreter_stores(
    kind: str, tmp_path: Path, interpret: Interpret, data: st.DataObject
) -> None:
    program, seed, n = data.draw(chains(kind)), data.draw(st.integers(0, 9)), data.draw(st.integers(0, N))
    count = both(program, data_of(seed, whole=False), 2, n, tmp_path, interpret)
    recording.compared(
        "random kernels (chains, masks, branches, reductions)",
        f"{kind}, int32",
        "Triton's interpreter",
        count,
    )


@drawn
@given(products(), st.integers(0, 9))
def test_products_store_what_the_interpreter_stores(
    tmp_path: Path, interpret: Interpret, program: Program, seed: int
) -> None:
    count = both(program, data_of(seed, whole=True), 1, N, tmp_path, interpret)
    recording.compared("random kernels (dot, reductions)", "float16, float32", "Triton's interpreter", count)


def test_a_difference_is_seen(tmp_path: Path, interpret: Interpret) -> None:
    """tl.sum of numbers that are not whole: the interpreter adds in another order."""
    text = "def kernel(x, y, k, o, oi, n, N: tl.constexpr):\n    tl.store(o, tl.sum(tl.load(x + 8 + tl.arange(0, 512)), 0))\n"
    with pytest.raises(AssertionError, match="floats differ"):
        both(Program(text), data_of(1, whole=False), 1, N, tmp_path, interpret)


if __name__ == "__main__":
    serve()
