"""Softmax, dropout and layer norm in the manner of Triton's tutorials 02, 04 and 05.

With --wrong, the variance is not centred.
"""

import sys

import torch
import triton
import triton.language as tl
from triton.runtime import driver

WRONG = "--wrong" in sys.argv
DEVICE = triton.runtime.driver.active.get_active_torch_device()
properties = driver.active.utils.get_device_properties(torch.cuda.current_device())
NUM_SM = properties["multiprocessor_count"]


@triton.jit
def softmax_kernel(
    out, x, in_stride, out_stride, n_rows, n_cols, BLOCK: tl.constexpr, num_stages: tl.constexpr
):
    for row in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=num_stages):
        at = tl.arange(0, BLOCK)
        values = tl.load(x + row * in_stride + at, mask=at < n_cols, other=-float("inf"))
        numerator = tl.exp((values - tl.max(values, axis=0)).to(tl.float32))
        tl.store(
            out + row * out_stride + at,
            (numerator / tl.sum(numerator, axis=0)).to(out.dtype.element_ty),
            mask=at < n_cols,
        )


@triton.jit
def seeded_dropout(x, out, n, p, seed, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keep = tl.rand(seed, at) > p
    tl.store(out + at, tl.where(keep, tl.load(x + at, mask=at < n) / (1 - p), 0.0), mask=at < n)


@triton.jit
def layer_norm_fwd(X, Y, W, B, Mean, Rstd, stride, N, eps, BLOCK: tl.constexpr, CENTRED: tl.constexpr):
    row = tl.program_id(0)
    X += row * stride
    Y += row * stride
    _mean = tl.zeros([BLOCK], dtype=tl.float32)
    for off in range(0, N, BLOCK):
        cols = off + tl.arange(0, BLOCK)
        _mean += tl.load(X + cols, mask=cols < N, other=0.0).to(tl.float32)
    mean = tl.sum(_mean, axis=0) / N
    _var = tl.zeros([BLOCK], dtype=tl.float32)
    for off in range(0, N, BLOCK):
        cols = off + tl.arange(0, BLOCK)
        x = tl.load(X + cols, mask=cols < N, other=0.0).to(tl.float32)
        x = tl.where(cols < N, x - mean if CENTRED else x, 0.0)
        _var += x * x
    rstd = 1 / tl.sqrt(tl.sum(_var, axis=0) / N + eps)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)
    for off in range(0, N, BLOCK):
        cols = off + tl.arange(0, BLOCK)
        mask = cols < N
        w, b = tl.load(W + cols, mask=mask), tl.load(B + cols, mask=mask)
        x = tl.load(X + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(Y + cols, (x - mean) * rstd * w + b, mask=mask)


@triton.jit
def layer_norm_bwd_dx(
    DX, DY, DW, DB, X, W, Mean, Rstd, Lock, stride, N, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < N
    X += row * stride
    DY += row * stride
    DX += row * stride
    lock_id = row % GROUP
    Lock += lock_id
    Count = Lock + GROUP
    DW = DW + lock_id * N + cols
    DB = DB + lock_id * N + cols
    x = tl.load(X + cols, mask=mask, other=0).to(tl.float32)
    dy = tl.load(DY + cols, mask=mask, other=0).to(tl.float32)
    w = tl.load(W + cols, mask=mask).to(tl.float32)
    mean, rstd = tl.load(Mean + row), tl.load(Rstd + row)
    xhat = tl.where(mask, (x - mean) * rstd, 0.0)
    wdy = tl.where(mask, w * dy, 0.0)
    c1, c2 = tl.sum(xhat * wdy, axis=0) / N, tl.sum(wdy, axis=0) / N
    tl.store(DX + cols, (wdy - (xhat * c1 + c2)) * rstd, mask=mask)
    partial_dw, partial_db = dy * xhat, dy
    while tl.atomic_cas(Lock, 0, 1) == 1:
        pass
    if tl.load(Count) == 0:
        tl.atomic_xchg(Count, 1)
    else:
        partial_dw += tl.load(DW, mask=mask)
        partial_db += tl.load(DB, mask=mask)
    tl.store(DW, partial_dw, mask=mask)
    tl.store(DB, partial_db, mask=mask)
    tl.debug_barrier()
    tl.atomic_xchg(Lock, 0)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        rows, n = x.shape
        y = torch.empty_like(x)
        mean, rstd = (torch.empty((rows,), dtype=torch.float32, device=x.device) for _ in range(2))
        max_fused = 65536 // x.element_size()
        assert triton.next_power_of_2(n) <= max_fused
        layer_norm_fwd[(rows,)](
            x, y, weight, bias, mean, rstd, x.stride(0), n, eps, BLOCK=64, CENTRED=not WRONG, num_warps=4
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        rows, n = x.shape
        group = 8
        locks = torch.zeros(2 * group, dtype=torch.int32, device=weight.device)
        dw, db = (torch.zeros((group, n), dtype=torch.float32, device=weight.device) for _ in range(2))
        dx = torch.empty_like(dy)
        layer_norm_bwd_dx[(rows,)](
            dx,
            dy,
            dw,
            db,
            x,
            weight,
            mean,
            rstd,
            locks,
            x.stride(0),
            n,
            GROUP=group,
            BLOCK=triton.next_power_of_2(n),
        )
        return dx, dw.sum(0).to(weight.dtype), db.sum(0).to(weight.dtype), None


def check(got, want, allowed, what):
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < allowed, f"{what}: {error:.2e}"


def main():
    torch.manual_seed(0)
    assert torch.cuda.is_available()
    for dtype, allowed in ((torch.float16, 1e-3), (torch.bfloat16, 8e-3), (torch.float32, 1e-6)):
        x = torch.randn(30, 100, device=DEVICE).to(dtype)
        y = torch.empty_like(x)
        softmax_kernel[(min(NUM_SM, 30),)](y, x, x.stride(0), y.stride(0), 30, 100, BLOCK=128, num_stages=4)
        check(y, x.double().softmax(-1), allowed, f"softmax {dtype}")
        dropped, again, other = (torch.empty_like(x) for _ in range(3))
        for out, seed in ((dropped, 123), (again, 123), (other, 512)):
            seeded_dropout[(triton.cdiv(x.numel(), 1024),)](x, out, x.numel(), 0.5, seed, BLOCK=1024)
        assert torch.equal(dropped, again)
        assert not torch.equal(dropped, other)
        assert 0.4 < (dropped == 0).float().mean().item() < 0.6
        x = (torch.randn(37, 100, device=DEVICE) + 2).to(dtype).requires_grad_()
        w, b = (torch.rand(100, device=DEVICE).to(dtype).requires_grad_() for _ in range(2))
        out = LayerNorm.apply(x, w, b, 1e-5)
        dy = torch.randn_like(out)
        wide = [t.detach().double().requires_grad_() for t in (x, w, b)]
        exact = torch.nn.functional.layer_norm(wide[0], (100,), wide[1], wide[2], 1e-5)
        check(out, exact, allowed, f"layer norm {dtype}")
        got, want = torch.autograd.grad(out, (x, w, b), dy), torch.autograd.grad(exact, wide, dy.double())
        for name, g, e in zip(("dx", "dw", "db"), got, want, strict=True):
            check(g, e, allowed, f"layer norm {name} {dtype}")
    print("layers: ok")


if __name__ == "__main__":
    main()
