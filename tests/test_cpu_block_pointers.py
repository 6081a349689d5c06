"""Block pointers: with the versions of Triton that have them, and with those that have removed them."""

from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effattn.cpu import block_pointers

pytestmark = pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")  # said by 3.7

DTYPES = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float32, id="fp32"),
]


@triton.jit
def _row_sums(block, WIDTH: tl.constexpr):
    return tl.sum(tl.load(block, boundary_check=(0, 1), padding_option="zero").to(tl.float32), 1)


@triton.jit
def _transpose_and_sum(x, y, sums, M, N, stride, BM: tl.constexpr, BN: tl.constexpr):
    """y = 2 x^T; sums of the rows of x. Block pointers go through a loop, a condition and a function."""
    i = tl.program_id(0)
    p = tl.make_block_ptr(x, (M, N), (stride, 1), (i * BM, 0), (BM, BN), (1, 0))
    q = tl.make_block_ptr(
        base=y, shape=[N, M], strides=[M, 1], offsets=[0, i * BM], block_shape=[BN, BM], order=[0, 1]
    )
    total = tl.zeros((BM,), tl.float32)
    for n in range(0, N, BN):
        block = tl.load(p, boundary_check=(0, 1), padding_option="zero")
        total += _row_sums(p, BN)
        tl.store(q, (tl.trans(block) * 2).to(q.dtype.element_ty), boundary_check=(0, 1))
        if n % 2 == 0:
            p = tl.advance(p, (0, BN))
        else:
            p = tl.advance(p, [0, BN])
        q = tl.advance(q, (BN, 0))
    o = tl.make_block_ptr(sums, (M,), (1,), (i * BM,), (BM,), (0,))
    tl.store(o, total, boundary_check=(0,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_stay_inside_and_move(dtype: torch.dtype) -> None:
    whole = torch.randn(40, 60).to(dtype)
    x = whole[:37, :50]
    y, sums = torch.zeros(50, 37, dtype=dtype), torch.zeros(37)
    _transpose_and_sum[(3,)](x, y, sums, 37, 50, 60, 16, 16)
    assert torch.equal(y, (x * 2).T)
    assert torch.allclose(sums.double(), x.double().sum(1), rtol=0, atol=1e-4)
    assert not torch.allclose(sums.double(), whole[:37].double().sum(1), atol=1e-2), "the columns behind"


@triton.jit
def _padded(x, out, N, START, PADDING: tl.constexpr, BLOCK: tl.constexpr):
    p = tl.make_block_ptr(x, (N,), (1,), (START,), (BLOCK,), (0,))
    tl.store(out + tl.arange(0, BLOCK), tl.load(p, boundary_check=(0,), padding_option=PADDING))


@pytest.mark.parametrize(("padding", "outside"), [("zero", 0.0), ("nan", math.nan)])
def test_what_lies_outside_is_padding_on_both_sides(padding: str, outside: float) -> None:
    """Zeros, or NaN; below the first element as behind the last."""
    x = torch.arange(1.0, 6.0)
    for start, expected in ((-3, [outside] * 3 + [1, 2, 3, 4, 5]), (2, [3, 4, 5] + [outside] * 5)):
        out = torch.zeros(8)
        _padded[(1,)](x, out, 5, start, padding, 8)
        assert torch.allclose(out, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@triton.jit
def _third_row(row, out, stride, BLOCK: tl.constexpr):
    x = row - 3 * stride.to(tl.int64)
    p = tl.make_block_ptr(x, (4, BLOCK), (stride, 1), (3, 0), (1, BLOCK), (1, 0))
    tl.store(out + tl.arange(0, BLOCK)[None, :], tl.load(p))


def test_offsets_do_not_wrap_at_32_bits() -> None:
    """Rows 2^30 elements apart, of which only the third is there: an address in 32 bits is somewhere else."""
    row, out = torch.arange(8.0), torch.zeros(8)
    _third_row[(1,)](row, out, 1 << 30, 8)
    assert torch.equal(out, row)


def _two_pointers(x):
    tl.load(tl.make_block_ptr(x, (4,), (1,), (0,), (4,), (0,)), mask=tl.arange(0, 4) < 2)


def _order(x):
    tl.load(tl.make_block_ptr(x, (4,), (1,), (0,), (4,), (1,)))


def _no_block(x):
    tl.load(x + tl.arange(0, 4), boundary_check=(0,))


@pytest.mark.parametrize("kernel", [_two_pointers, _order, _no_block], ids=lambda f: f.__name__)
def test_wrong_uses_are_refused(kernel) -> None:
    with pytest.raises(triton.CompilationError):
        triton.jit(kernel)[(1,)](torch.zeros(4))


@triton.jit
def _for_a_gpu(x):
    tl.store(x, tl.sum(tl.load(tl.make_block_ptr(x, (4,), (1,), (0,), (4,), (0,)))))


def test_kernels_for_a_gpu_are_compiled_as_triton_compiles_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # 3.9 warns where nothing is said
    x = torch.arange(4.0)
    _for_a_gpu[(1,)](x)
    assert x[0] == 6
    source = ASTSource(_for_a_gpu, {"x": "*fp32"}, {})
    if block_pointers.are_missing():
        with pytest.raises(triton.CompilationError, match="Block pointers have been removed"):
            triton.compile(source, target=GPUTarget("cuda", 90, 32))
    else:
        assert "tt.load" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
