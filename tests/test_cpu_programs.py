"""Random Triton programs on the CPU backend against an executor of the same source text in numpy.

The generator writes the source of a kernel: elementwise chains, broadcasts, transposes, reductions, products, loads and
stores of scratch memory, and loops, branches and early returns around them. The kernel runs as it is; and the same text
runs as plain Python, with `tl` answered by the numpy executor below. Both must store the same bits (any NaN equals any
NaN). What the planner decides (what is kept, where, what is updated in place, when a value is computed) must not show.

More programs than the suite runs: `python tests/test_cpu_programs.py 1000` (seeds 0 to 999), or `... 7 8` for seed 7.
"""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

SEEDS = range(20)
FLOATS = ("fp32", "fp16", "bf16")
INTS = ("i32", "i64", "i16")
TL_NAME = {
    "fp32": "tl.float32", "fp16": "tl.float16", "bf16": "tl.bfloat16",
    "i32": "tl.int32", "i64": "tl.int64", "i16": "tl.int16", "i1": "tl.int1",
}  # fmt: skip
NUMPY = {
    "fp32": np.float32, "fp16": np.float64, "bf16": np.float64,
    "i32": np.int32, "i64": np.int64, "i16": np.int16, "i1": np.bool_,
}  # fmt: skip
SIZE = 8192  # elements of each input
PROGRAMS = 3  # of the grid
SLOT = 2048  # elements of a stored variable


# ------------------------------------------------------------------------------------------ numpy executor


def rounded(dtype: str, x: np.ndarray) -> np.ndarray:
    """float64 rounded once to a format of 16 bits, to nearest even; the result is a float64."""
    bits, least = {"fp16": (11, -24), "bf16": (8, -133)}[dtype]
    limit = {"fp16": 2.0**16, "bf16": 2.0**128}[dtype]
    with np.errstate(all="ignore"):
        _, e = np.frexp(x)
        q = np.maximum(e - bits, least)
        r = np.ldexp(np.rint(np.ldexp(x, -q)), q)
        return np.where(np.isfinite(x), np.where(np.abs(r) >= limit, np.copysign(np.inf, x), r), x)


def as_dtype(dtype: str, x: Any) -> np.ndarray:
    """A float64 or integer result, brought to a dtype as the IR's operation does."""
    x = np.asarray(x)
    if dtype in ("fp16", "bf16"):
        return rounded(dtype, x.astype(np.float64))
    with np.errstate(all="ignore"):
        return x.astype(NUMPY[dtype])


class T:
    """A tensor or scalar of Triton's language: 16-bit floats are carried in float64."""

    def __init__(self, dtype: str, v: Any) -> None:
        self.dtype = dtype
        self.v = np.asarray(v, NUMPY[dtype])

    def like(self, other: Any) -> T:
        return other if isinstance(other, T) else T(self.dtype, other)

    def binary(self, other: Any, fn: Any) -> T:
        other = self.like(other)
        assert other.dtype == self.dtype, (self.dtype, other.dtype)
        with np.errstate(all="ignore"):
            return T(self.dtype, as_dtype(self.dtype, fn(self.v, other.v)))

    def compare(self, other: Any, fn: Any) -> T:
        return T("i1", fn(self.v, self.like(other).v))

    __add__ = lambda a, b: b.offset(a) if isinstance(b, Pointer) else a.binary(b, np.add)  # noqa: E731
    __radd__ = __add__
    __sub__ = lambda a, b: a.binary(b, np.subtract)  # noqa: E731
    __mul__ = lambda a, b: a.binary(b, np.multiply)  # noqa: E731
    __truediv__ = lambda a, b: a.binary(b, np.divide)  # noqa: E731
    __and__ = lambda a, b: a.binary(b, np.bitwise_and)  # noqa: E731
    __or__ = lambda a, b: a.binary(b, np.bitwise_or)  # noqa: E731
    __xor__ = lambda a, b: a.binary(b, np.bitwise_xor)  # noqa: E731
    __lt__ = lambda a, b: a.compare(b, np.less)  # noqa: E731
    __le__ = lambda a, b: a.compare(b, np.less_equal)  # noqa: E731
    __gt__ = lambda a, b: a.compare(b, np.greater)  # noqa: E731
    __ge__ = lambda a, b: a.compare(b, np.greater_equal)  # noqa: E731
    __eq__ = lambda a, b: a.compare(b, np.equal)  # noqa: E731
    __ne__ = lambda a, b: a.compare(b, np.not_equal)  # noqa: E731
    __hash__ = None  # type: ignore[assignment]
    __neg__ = lambda a: T(a.dtype, -a.v)  # noqa: E731

    def __bool__(self) -> bool:
        return bool(self.v)

    def __index__(self) -> int:
        return int(self.v)

    def __getitem__(self, key: Any) -> T:
        return T(self.dtype, self.v[key])

    def to(self, dtype: str) -> T:
        if self.dtype == dtype:
            return self
        if self.dtype in FLOATS and dtype not in FLOATS:
            info = np.iinfo(NUMPY[dtype])
            big = 1 << (info.bits - 1)
            flat = [
                0 if x != x else int(max(-big, min(big - 1, x)))
                for x in self.v.astype(np.float64).ravel().tolist()
            ]
            return T(dtype, np.array(flat, np.int64).reshape(self.v.shape).astype(NUMPY[dtype]))
        return T(dtype, as_dtype(dtype, self.v))


class Pointer:
    def __init__(self, array: np.ndarray, dtype: str, at: Any = 0) -> None:
        self.array, self.dtype, self.at = array, dtype, np.asarray(at, np.int64)

    def offset(self, by: Any) -> Pointer:
        return Pointer(self.array, self.dtype, self.at + (by.v if isinstance(by, T) else by))

    __add__ = __radd__ = offset


def _lanes(x: np.ndarray) -> np.ndarray:
    """Sum along the last axis in the documented order: 16 lanes, then halves."""
    n = x.shape[-1]
    w = min(n, 16)
    lane = x[..., :w].copy()
    for j in range(w, n, w):
        lane = lane + x[..., j : j + w]
    while w > 1:
        w //= 2
        lane = lane[..., :w] + lane[..., w : 2 * w]
    return lane[..., 0]


def _sum(x: T, axis: int) -> T:
    if x.dtype not in FLOATS:
        return T(x.dtype, x.v.sum(axis, dtype=x.v.dtype))
    assert x.dtype == "fp32"
    with np.errstate(all="ignore"):
        if all(n == 1 for n in x.v.shape[axis + 1 :]):
            return T("fp32", _lanes(np.moveaxis(x.v, axis, -1)))
        parts = np.moveaxis(x.v, axis, 0)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return T("fp32", total)


def _cumsum(x: T, axis: int, reverse: bool) -> T:
    v = np.flip(x.v, axis) if reverse else x.v
    with np.errstate(all="ignore"):
        v = np.cumsum(v, axis, dtype=v.dtype)
    return T(x.dtype, np.flip(v, axis) if reverse else v)


def _dot(a: T, b: T, acc: T | None = None) -> T:
    """One chain per element, in the order of k; products of 16-bit floats are exact in fp32."""
    (m, k), n = a.v.shape, b.v.shape[1]
    c = np.zeros((m, n), np.float32) if acc is None else acc.v
    with np.errstate(all="ignore"):
        for i in range(k):
            c = c + (a.v[:, i : i + 1].astype(np.float32) * b.v[i : i + 1].astype(np.float32))
    return T("fp32", c)


def _pick(a: T, b: T, fn: Any) -> T:
    return T(a.dtype, fn(a.v, a.like(b).v))


def _load(p: Pointer, mask: T | None = None, other: Any = 0) -> T:
    on = np.ones(p.at.shape, bool) if mask is None else np.broadcast_to(mask.v, p.at.shape)
    return T(p.dtype, np.where(on, p.array[np.where(on, p.at, 0)], NUMPY[p.dtype](other)))


def _store(p: Pointer, value: T, mask: T | None = None) -> None:
    at = np.broadcast_to(p.at, np.broadcast_shapes(p.at.shape, value.v.shape))
    on = np.ones(at.shape, bool) if mask is None else np.broadcast_to(mask.v, at.shape)
    p.array[at[on]] = np.broadcast_to(value.v, at.shape)[on]


def language(pid: int) -> SimpleNamespace:
    return SimpleNamespace(
        program_id=lambda axis: T("i32", pid),
        arange=lambda a, b: T("i32", np.arange(a, b)),
        load=_load, store=_store, sum=_sum, dot=_dot,
        max=lambda x, axis: T(x.dtype, np.fmax.reduce(x.v, axis)),
        min=lambda x, axis: T(x.dtype, np.fmin.reduce(x.v, axis)),
        trans=lambda x: T(x.dtype, x.v.T),
        reshape=lambda x, shape: T(x.dtype, x.v.reshape(shape)),
        where=lambda c, a, b: T(a.dtype, np.where(c.v, a.v, a.like(b).v)),
        maximum=lambda a, b: _pick(a, b, np.fmax), minimum=lambda a, b: _pick(a, b, np.fmin),
        abs=lambda a: T(a.dtype, np.abs(a.v)),
        floor=lambda a: T(a.dtype, np.floor(a.v)),
        full=lambda shape, value, dtype: T(dtype, np.full(shape, value)),
        cumsum=_cumsum,
        argmax=lambda x, axis: T("i32", x.v.argmax(axis)),
        broadcast_to=lambda x, shape: T(x.dtype, np.broadcast_to(x.v, shape)),
        static_range=range,
        float32="fp32", float16="fp16", bfloat16="bf16", int32="i32", int64="i64", int16="i16", int1="i1",
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------- generator

Kind = tuple[str, tuple[int, ...]]


class Generator:
    """Writes one kernel. `env` maps the variables in scope to (dtype, shape)."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.lines: list[str] = []
        self.depth = 1
        self.count = 0
        self.scratch = 0
        self.sizes = [self.rng.choice([1, 2, 4, 8, 16, 32]) for _ in range(2)]
        self.env: dict[str, Kind] = {}
        self.fixed: set[str] = set()
        self.inside = 0

    def write(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    def fresh(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def define(self, kind: Kind, text: str) -> str:
        name = self.fresh()
        self.write(f"{name} = {text}")
        self.env[name] = kind
        return name

    def shape(self) -> tuple[int, ...]:
        m, n = self.sizes
        return self.rng.choice([(m, n), (m, n), (n, m), (m,), (n,)])

    def some(self, test: Any) -> str | None:
        names = [n for n, k in self.env.items() if test(*k)]
        return self.rng.choice(names[-12:]) if names else None

    def need(self, dtype: str, shape: tuple[int, ...]) -> str:
        found = self.some(lambda d, s: (d, s) == (dtype, shape))
        return found if found and self.rng.random() < 0.93 else self.load(dtype, shape)

    def index(self, shape: tuple[int, ...], transposed: bool = False) -> str:
        if len(shape) == 1:
            return f"tl.arange(0, {shape[0]})"
        a, b = (1, shape[0]) if transposed else (shape[1], 1)
        return f"(tl.arange(0, {shape[0]})[:, None] * {a} + tl.arange(0, {shape[1]})[None, :] * {b})"

    def load(self, dtype: str, shape: tuple[int, ...]) -> str:
        if dtype == "i1":
            a = self.need("i32", shape)
            return self.define(("i1", shape), f"{a} > {self.rng.choice([-3, 0, 5])}")
        if dtype in ("i64", "i16"):
            return self.define((dtype, shape), f"{self.need('i32', shape)}.to({TL_NAME[dtype]})")
        start = self.rng.randrange(0, SIZE - 3 * 1024 - 40)
        base = f"x_{dtype} + {start}" + (" + pid * 7" if self.rng.random() < 0.5 else "")
        if not shape:
            return self.define((dtype, ()), f"tl.load({base})")
        at = self.index(shape, self.rng.random() < 0.3)
        kind = self.rng.random()
        if kind < 0.6:
            return self.define((dtype, shape), f"tl.load({base} + {at})")
        mask = self.mask(shape)
        return self.define(
            (dtype, shape), f"tl.load({base} + {at}, mask={mask}, other={self.rng.choice([0, 1, 3])})"
        )

    def mask(self, shape: tuple[int, ...]) -> str:
        found = self.some(lambda d, s: d == "i1" and s == shape)
        if found and self.rng.random() < 0.4:
            return found
        limit = self.rng.randrange(0, shape[-1] + 2)
        if len(shape) == 1:
            return f"(tl.arange(0, {shape[0]}) < {limit})"
        rows = f"(tl.arange(0, {shape[0]})[:, None] < {self.rng.randrange(0, shape[0] + 2)})"
        columns = f"(tl.arange(0, {shape[1]})[None, :] < {limit})"
        both = f"({self.index(shape)} >= 0)"
        return self.rng.choice([f"({rows} & {both})", f"({columns} & {both})", f"({rows} & {columns})"])

    # -- statements

    def elementwise(self) -> tuple[Kind, str]:
        rng = self.rng
        dtype = rng.choice(["fp32", "fp32", "fp16", "bf16", "i32", "i64", "i16"])
        shape = rng.choice([self.shape(), self.shape(), ()])
        a, b = self.need(dtype, shape), self.need(dtype, shape)
        roll = rng.random()
        if dtype in FLOATS:
            if roll < 0.6:
                text = f"{a} {rng.choice('+-*')} {b}"
            elif roll < 0.7 and dtype == "fp32":
                text = f"{a} / {b}"
            elif roll < 0.85:
                # Some versions of Triton answer in fp32 to bf16.
                text = f"tl.{rng.choice(['maximum', 'minimum'])}({a}, {b}).to({TL_NAME[dtype]})"
            else:
                # Not -a: some versions of Triton make it 0 - a.
                text = rng.choice([f"{a} * -1.0", f"tl.abs({a})"])
            if shape and rng.random() < 0.2:
                s = self.need(dtype, ())
                text = f"({text}) * {s}"
        else:
            text = f"{a} {rng.choice('+-*&|^')} {b}"
            if rng.random() < 0.2:
                text = f"tl.{rng.choice(['maximum', 'minimum'])}({a}, {b})"
        return (dtype, shape), text

    def expression(self) -> tuple[Kind, str]:
        """A random expression of what is in scope."""
        rng = self.rng
        m, n = self.sizes
        roll = rng.random()
        if roll < 0.40:
            return self.elementwise()
        if roll < 0.50:  # a row and a column
            dtype = rng.choice(["fp32", "i32", "fp16"])
            op = rng.choice("+-*")
            if rng.random() < 0.5:
                a, b = self.need(dtype, (m, n)), self.need(dtype, (m,))
                return (dtype, (m, n)), f"{a} {op} {b}[:, None]"
            a, b = self.need(dtype, (m,)), self.need(dtype, (n,))
            return (dtype, (m, n)), f"{a}[:, None] {op} {b}[None, :]"
        if roll < 0.58:
            dtype = rng.choice(["fp32", "fp16", "bf16", "i32"])
            shape = rng.choice([(m, n), (n, m)])
            return (dtype, shape[::-1]), f"tl.trans({self.need(dtype, shape)})"
        if roll < 0.70:
            dtype = rng.choice(["fp32", "fp32", "i32", "i64"])
            name = rng.choice(["sum", "max", "min"])
            shape = self.shape()
            a = self.need(dtype, shape)
            axis = rng.randrange(len(shape))
            return (dtype, shape[:axis] + shape[axis + 1 :]), f"tl.{name}({a}, {axis})"
        if roll < 0.78:
            dtype = rng.choice(["fp16", "bf16"])
            a, b = self.need(dtype, (m, n)), self.need(dtype, (n, m))
            if rng.random() < 0.6:
                return ("fp32", (m, m)), f"tl.dot({a}, {b}, {self.need('fp32', (m, m))})"
            if rng.random() < 0.3:
                b = f"tl.trans({a})"
            # Triton turns a product plus a tensor into a product that starts from the tensor; not so with this.
            return ("fp32", (m, m)), f"tl.abs(tl.dot({a}, {b}))"
        if roll < 0.86:
            target = rng.choice(["fp32", "fp16", "bf16", "i32", "i64", "i16"])
            source = rng.choice([d for d in ("fp32", "fp16", "bf16", "i32", "i64") if d != target])
            shape = rng.choice([self.shape(), ()])
            return (target, shape), f"{self.need(source, shape)}.to({TL_NAME[target]})"
        if roll < 0.93:
            dtype, shape = rng.choice(["fp32", "i32", "bf16"]), self.shape()
            condition = self.need("i1", shape)
            return (
                dtype,
                shape,
            ), f"tl.where({condition}, {self.need(dtype, shape)}, {self.need(dtype, shape)})"
        if roll < 0.96:
            dtype = rng.choice(["fp32", "i32"])
            a = self.need(dtype, (m, n))
            return (dtype, (n, m)), f"tl.reshape({a}, ({n}, {m}))"
        if roll < 0.98:
            dtype, axis = rng.choice(["i32", "fp32"]), rng.randrange(2)
            return (
                dtype,
                (m, n),
            ), f"tl.cumsum({self.need(dtype, (m, n))}, {axis}, reverse={rng.random() < 0.5})"
        if roll < 0.99:
            return ("i32", (m,)), f"tl.argmax({self.need('i32', (m, n))}, 1)"
        dtype = rng.choice(["fp32", "bf16"])
        return (dtype, (m, n)), f"tl.broadcast_to({self.need(dtype, (n,))}[None, :], ({m}, {n}))"

    def statement(self) -> None:
        rng = self.rng
        roll = rng.random()
        if roll < 0.72 or self.depth > 3:
            kind, text = self.expression()
            target = (
                self.some(lambda d, s: (d, s) == kind)
                if rng.random() < (0.75 if self.inside else 0.4)
                else None
            )
            if target and target not in self.fixed:
                self.write(f"{target} = {text}")
            else:
                self.define(kind, text)
        elif roll < 0.78:
            self.memory()
        elif roll < 0.81:
            self.swap()
        elif roll < 0.90:
            self.loop()
        else:
            self.branch()

    def swap(self) -> None:
        a = self.some(lambda d, s: True)
        b = a and self.some(lambda d, s: (d, s) == self.env[a])
        if a and b and a != b and not {a, b} & self.fixed:
            self.write(f"{a}, {b} = {b}, {a}")

    def memory(self) -> None:
        """Store to scratch, store over a part of it, load it again."""
        shape = self.shape()
        a, b = self.need("fp32", shape), self.need("fp32", shape)
        at = f"scratch + pid * {SLOT}"
        self.write(f"tl.store({at} + {self.index(shape)}, {a})")
        self.write(f"tl.store({at} + {self.index(shape)}, {b}, mask={self.mask(shape)})")
        self.define(("fp32", shape), f"tl.load({at} + {self.index(shape, self.rng.random() < 0.5)})")

    def block(self, count: int) -> None:
        """Statements in a nested scope: what they define is forgotten, what they assign stays."""
        before = dict(self.env)
        self.depth += 1
        self.inside += 1
        start = len(self.lines)
        for _ in range(count):
            self.statement()
        if len(self.lines) == start:
            self.write("pass")
        self.depth -= 1
        self.inside -= 1
        self.env = before

    def loop(self) -> None:
        rng = self.rng
        bound = rng.choice(["0", "1", "2", "3", "n", "n - 3"])
        counter = self.fresh()
        if rng.random() < 0.15:
            self.write(f"{counter} = pid * 0")
            self.env[counter] = ("i32", ())
            self.fixed.add(counter)
            self.write(f"while {counter} < {bound}:")
            self.write(f"    {counter} = {counter} + 1")
        else:
            start = rng.choice(["0", "0", "1", "pid"])
            self.write(f"for {counter} in range({start}, {bound}):")
            if rng.random() < 0.6:
                self.walking(counter)
                return
        self.block(rng.randrange(2, 7))

    def walking(self, counter: str) -> None:
        """The body of a loop that walks over memory: by an index, or by pointers or offsets that it carries."""
        dtype, shape = self.rng.choice(["fp32", "fp16", "i32"]), self.shape()
        head = self.lines.pop()
        start, at = self.rng.randrange(0, 3000), self.index(shape, self.rng.random() < 0.3)
        kind = self.rng.random()
        step = self.rng.choice(["5", "n", "-2", f"{counter} + 1"])
        moving = self.fresh()
        if kind < 0.35:
            self.write(f"{moving} = x_{dtype} + {start} + {at}")
        elif kind < 0.7:
            self.write(f"{moving} = {start} + {at}")
        self.lines.append(head)
        pointers = f"x_{dtype} + {counter} * 5 + {at}" if kind >= 0.7 else moving
        if 0.35 <= kind < 0.7:
            pointers = f"x_{dtype} + {moving}"
        self.depth += 1
        mask = f", mask={self.mask(shape)}, other=2" if self.rng.random() < 0.3 else ""
        value = self.define((dtype, shape), f"tl.load({pointers}{mask})")
        early = kind < 0.7 and self.rng.random() < 0.3
        if early:
            self.write(f"{moving} += {step}")
        self.depth -= 1
        self.block(self.rng.randrange(2, 7))
        if kind < 0.7 and not early:
            self.lines.append("    " * (self.depth + 1) + f"{moving} += {step}")
        del self.env[value]
        if kind < 0.7 and self.rng.random() < 0.3:
            self.define((dtype, shape), f"tl.load({moving if kind < 0.35 else f'x_{dtype} + {moving}'})")

    def branch(self) -> None:
        s = self.need("i32", ())
        self.write(f"if {s} {self.rng.choice(['<', '>', '=='])} {self.rng.choice([0, 1, 4])}:")
        self.block(self.rng.randrange(1, 5))
        if self.rng.random() < 0.6:
            self.write("else:")
            self.block(self.rng.randrange(1, 5))

    def run(self) -> str:
        rng = self.rng
        for _ in range(rng.randrange(2, 6)):
            self.load(rng.choice(["fp32", "fp32", "fp16", "bf16", "i32"]), self.shape())
        early = rng.random() < 0.2
        for step in range(rng.randrange(6, 22)):
            self.statement()
            if early and step == 3:
                self.write("if pid == 1:")
                self.write(f"    tl.store(out_i + pid * {SLOT}, pid + 7)")
                self.write("    return")
        slot = 0
        for name, (dtype, shape) in list(self.env.items()):
            at = f" + {self.index(shape)}" if shape else ""
            out, cast = ("out_f", "tl.float32") if dtype in FLOATS else ("out_i", "tl.int64")
            self.write(f"tl.store({out} + (pid + {slot * PROGRAMS}) * {SLOT}{at}, {name}.to({cast}))")
            slot += 1
        self.slots = slot + 1
        head = "def kernel(x_fp32, x_fp16, x_bf16, x_i32, scratch, out_f, out_i, n):\n    pid = tl.program_id(0)\n"
        return head + "\n".join(self.lines) + "\n"


# ------------------------------------------------------------------------------------------------ comparing


def inputs(seed: int) -> dict[str, torch.Tensor]:
    g = np.random.default_rng(seed)
    x = np.where(g.random(SIZE) < 0.3, g.integers(-4, 5, SIZE), g.standard_normal(SIZE))
    x[g.integers(0, SIZE, 12)] = [0.0, -0.0, 1e-40, 3e4, 1.5, -2.0, 1e-7, 65504.0, 1.0, -1.0, 6e-8, 100.0]
    f32 = torch.from_numpy(x.astype(np.float32))
    i32 = torch.from_numpy(g.integers(-6, 7, SIZE).astype(np.int32))
    return {"x_fp32": f32, "x_fp16": f32.to(torch.float16), "x_bf16": f32.to(torch.bfloat16), "x_i32": i32}


def source_of(seed: int) -> tuple[str, int]:
    generator = Generator(seed)
    return generator.run(), generator.slots


def mismatch(seed: int, folder: Path) -> str | None:
    """Run one program both ways; None, or what differs."""
    text, slots = source_of(seed)
    path = folder / f"program_{seed}.py"
    path.write_text("import triton\nimport triton.language as tl\n\n\n@triton.jit\n" + text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data = inputs(seed)
    size = slots * PROGRAMS * SLOT
    scratch = torch.zeros(PROGRAMS * SLOT)
    out_f, out_i = torch.zeros(size), torch.zeros(size, dtype=torch.int64)
    n = 4
    module.kernel[(PROGRAMS,)](*data.values(), scratch, out_f, out_i, n)
    want_f, want_i = np.zeros(size, np.float32), np.zeros(size, np.int64)
    memory = np.zeros(PROGRAMS * SLOT, np.float32)
    code = compile(text, str(path), "exec")
    for pid in range(PROGRAMS):
        scope: dict[str, Any] = {"tl": language(pid)}
        exec(code, scope)
        pointers = [
            Pointer(value.double().numpy() if name[2:] in ("fp16", "bf16") else value.numpy(), name[2:])
            for name, value in data.items()
        ]
        scope["kernel"](
            *pointers, Pointer(memory, "fp32"), Pointer(want_f, "fp32"), Pointer(want_i, "i64"), T("i32", n)
        )
    got_f, got_i = out_f.numpy(), out_i.numpy()
    same = (got_f.view(np.int32) == want_f.view(np.int32)) | (np.isnan(got_f) & np.isnan(want_f))
    # The sign of the larger of two zeros is left open by the IR.
    same |= (got_f == 0) & (want_f == 0)
    wrong = np.flatnonzero(~same), np.flatnonzero(got_i != want_i)
    for name, where, got, want in (("out_f", wrong[0], got_f, want_f), ("out_i", wrong[1], got_i, want_i)):
        if where.size:
            k = int(where[0])
            slot = k // SLOT
            return (
                f"seed {seed}: {name}: {where.size} elements differ, first in slot {slot // PROGRAMS} of program "
                f"{slot % PROGRAMS} at {k % SLOT}: got {got[k]!r}, expected {want[k]!r}\n{text}"
            )
    assert math.isfinite(want_f[np.isfinite(want_f)].sum())
    return None


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program_stores_what_numpy_stores(seed: int, tmp_path: Path) -> None:
    assert (found := mismatch(seed, tmp_path)) is None, found


if __name__ == "__main__":
    import tempfile

    low, high = (0, int(sys.argv[1])) if len(sys.argv) == 2 else (int(sys.argv[1]), int(sys.argv[2]))
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        for number in range(low, high):
            try:
                problem = mismatch(number, Path(name))
            except Exception as error:
                text = source_of(number)[0]
                problem = f"seed {number}: {type(error).__name__}: {error}\n{text}"
            if problem:
                bad += 1
                print(problem, flush=True)
    print(f"{bad} of {high - low} programs differ")
    sys.exit(bool(bad))
