"""The CPU backend around its kernels: threads, launches at once, arguments and grids that are wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import triton
import triton.language as tl

import effattn.cpu
from effattn.errors import ArgumentTypeError, RequestError


@triton.jit(do_not_specialize=["turns"])
def work(x, o, turns, N: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, N)
    v = tl.load(x + pid * N + i)
    for _ in range(turns):
        v = v * 0.5 + 1
    tl.store(o + pid * N + i, v)


@triton.jit
def divide(x, o, N: tl.constexpr):
    tl.store(o + tl.arange(0, N), tl.load(x + tl.arange(0, N)) / 3)


def expected(x: torch.Tensor, turns: int) -> torch.Tensor:
    for _ in range(turns):
        x = x * 0.5 + 1
    return x


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = effattn.cpu.get_num_threads()
    yield effattn.cpu.set_num_threads
    effattn.cpu.set_num_threads(before)


# ------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_any_number_of_threads_gives_the_same(threads: Callable[[int], None], count: int) -> None:
    threads(count)
    assert effattn.cpu.get_num_threads() == count
    # Little and much work in turns: the runtime expects of a launch what the last one took.
    for programs, turns in [(1, 3), (50, 2), (50, 4000), (50, 2), (3, 20000), (2000, 1)]:
        x = torch.randn(programs * 64)
        o = torch.zeros_like(x)
        work[(programs,)](x, o, turns, N=64)
        assert torch.equal(o, expected(x, min(turns, 60)) if turns <= 60 else o)
        if turns > 60:
            assert torch.equal(o, torch.full_like(o, 2.0))


@pytest.mark.parametrize("count", [0, -1, 1 << 17, 2.5, "2"])
def test_a_number_of_threads_that_cannot_be_is_refused(count: int) -> None:
    with pytest.raises(RequestError, match="expected a whole number from 1 to 65536"):
        effattn.cpu.set_num_threads(count)


def test_launches_from_many_python_threads_at_once(threads: Callable[[int], None]) -> None:
    threads(2)
    failures: list[str] = []

    def many(seed: int) -> None:
        for k in range(60):
            x = torch.full((20 * 64,), float(seed + k))
            o = torch.zeros_like(x)
            turns = 3 if k % 3 else 40
            work[(20,)](x, o, turns, N=64)
            if not torch.equal(o, expected(x, turns)):
                failures.append(f"thread {seed}, launch {k}")

    workers = [threading.Thread(target=many, args=(n,)) for n in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_subnormals_count_whatever_the_calling_thread_does_with_them(threads: Callable[[int], None]) -> None:
    x = torch.full((64 * 8,), 3e-39)
    o = torch.zeros_like(x)
    for count in (1, 2):
        threads(count)
        for turns in (0, 0):
            assert torch.set_flush_denormal(True)
            try:
                work[(8,)](x, o, turns, N=64)
                divide[(1,)](x, o, N=16)
                flushed = (torch.tensor(3e-39) * 0.5).item() == 0.0
            finally:
                torch.set_flush_denormal(False)
            assert flushed  # the thread's own setting came back
            assert torch.equal(o[16:], x[16:])
            assert (o[:16] > 9e-40).all()


def test_working_memory_that_cannot_be_had_is_an_error() -> None:
    x, o = torch.ones(64), torch.zeros(64)
    compiled = work[(1,)](x, o, 1, N=64)
    launcher = compiled.run
    before = launcher.arena
    launcher.arena = 1 << 60
    try:
        with pytest.raises(MemoryError, match="working memory"):
            work[(4,)](x, o, 1, N=64)
    finally:
        launcher.arena = before
    work[(1,)](x, o, 1, N=64)
    assert torch.equal(o, expected(x, 1))


def test_tensors_elsewhere_and_wrong_arguments_are_refused() -> None:
    x = torch.ones(64)
    with pytest.raises(RequestError, match=r"kernel work, argument 'o' is on meta; .* host memory: give it"):
        work[(1,)](x, x.to("meta"), 1, N=64)
    for argument, tensors in (("x", (x.to(torch.complex64), x)), ("o", (x, x.to(torch.complex64)))):
        with pytest.raises(
            ArgumentTypeError,
            match=f"kernel work, argument '{argument}': kernels have no pointers to complex64; expected a tensor of bool,",
        ):
            work[(1,)](*tensors, 1, N=64)
    with pytest.raises(TypeError):
        work[(1,)](x, N=64)
    for wrong in ("text", [1.0], x.numpy(), 1j):
        # Triton's own words, which name numpy's arrays with their module or without.
        with pytest.raises(
            TypeError, match=rf"specialize argument of type: (numpy\.)?{type(wrong).__name__}"
        ):
            work[(1,)](wrong, x, 1, N=64)
    with pytest.raises(
        ArgumentTypeError, match="argument 'x': expected a tensor in host memory, or an address, got Tensor"
    ):
        work[(1,)](x.to_sparse(), x, 1, N=64)


@pytest.mark.parametrize(
    ("place", "wrong", "says"),
    [
        (
            0,
            "text",
            "kernel work, argument 'x': expected a tensor in host memory, or an address, got str 'text'",
        ),
        (1, 1.5, "kernel work, argument 'o': expected a tensor in host memory, or an address, got float 1.5"),
        (2, 1.5, "kernel work, argument 'turns': expected a value of type i32, got float 1.5"),
        (2, 1 << 70, "argument 'turns': expected a value of type i32, got int 1180591620717411303424"),
        (
            2,
            torch.ones(2),
            r"argument 'turns': expected a value of type i32, got Tensor tensor\(\[1., 1.\]\)",
        ),
    ],
)
def test_a_compiled_kernel_names_the_argument_that_is_wrong(place: int, wrong: object, says: str) -> None:
    x, o = torch.full((64,), 4.0), torch.zeros(64)
    compiled = work[(1,)](x, o, 1, N=64)
    args: list[object] = [x, torch.zeros(64), 1, 64]
    compiled[(1, 1, 1)](*args)
    assert torch.equal(args[1], x * 0.5 + 1)
    args[place] = wrong
    with pytest.raises(ArgumentTypeError, match=says):
        compiled[(1, 1, 1)](*args)
    with pytest.raises(ArgumentTypeError, match=r"takes 4 arguments \(x, o, turns, N\), .* launched with 2"):
        compiled[(1, 1, 1)](x, o)


def test_a_grid_that_is_no_grid_is_refused() -> None:
    x, o = torch.full((64,), 4.0), torch.zeros(64)
    for size in (1.5, "2"):
        with pytest.raises(ArgumentTypeError, match=f"kernel work: the grid's size along x is {size!r}"):
            work[(size,)](x, o, 1, N=64)
    for grid in ((1 << 31,), (1, 1 << 31), (1, 1, 1 << 31), ((1 << 31) - 1,) * 3):
        with pytest.raises(
            RequestError, match="the grid of kernel work is too large: program ids are 32-bit"
        ):
            work[grid](x, o, 1, N=64)
    compiled = work.warmup(x, o, 1, N=64, grid=(1,))
    for kernel, arguments in ((work, {"N": 64}), (compiled, {})):
        # Triton would drop the fourth.
        with pytest.raises(
            RequestError, match=r"grid of kernel work is \(1, 1, 1, 1\); expected at most three axes"
        ):
            kernel[(1, 1, 1, 1)](x, o, 1, *([64] if not arguments else []), **arguments)
    with pytest.raises(RequestError, match="expected at most three axes"):
        work[lambda meta: (1, 1, 1, 2)](x, o, 1, N=64)
    for grid in ((0,), (5, 0), (-1,)):
        work[grid](x, o, 1, N=64)
    assert not o.any()


def test_a_cooperative_grid_is_refused_since_its_barriers_would_never_be_passed() -> None:
    x, o = torch.full((64,), 4.0), torch.zeros(64)
    with pytest.raises(
        RequestError, match="launch_cooperative_grid=True: on the CPU the programs of a grid run one after"
    ):
        work[(1,)](x, o, 1, N=64, launch_cooperative_grid=True)
    assert not o.any()
    work[(1,)](x, o, 1, N=64, launch_cooperative_grid=False)
    assert torch.equal(o, x * 0.5 + 1)


def test_tuning_options_of_gpus_are_accepted_and_change_nothing() -> None:
    x, o = torch.full((64,), 4.0), torch.zeros(64)
    amd = {"waves_per_eu": 2, "matrix_instr_nonkdim": 16, "kpack": 2, "num_stages": 1}
    compiled = work[(1,)](x, o, 1, N=64, **amd)
    assert torch.equal(o, x * 0.5 + 1)
    assert work[(1,)](x, o, 1, N=64, ptx_options="-O1").hash == work[(1,)](x, o, 1, N=64).hash
    assert compiled.metadata.waves_per_eu is None
    with pytest.raises(KeyError, match="waves_per_ue was specified but unrecognised"):
        work[(1,)](x, o, 1, N=64, waves_per_ue=2)
