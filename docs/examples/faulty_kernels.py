"""Four kernels, each with one mistake that a GPU may never show."""

import torch
import triton
import triton.language as tl


@triton.jit
def scale_rows(x_ptr, y_ptr, stride, n, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row * stride + column)  # no mask: columns beyond n
    tl.store(y_ptr + row * stride + column, x * 2, mask=column < n)


@triton.jit
def total(x_ptr, y_ptr):
    i = tl.program_id(0)
    tl.store(y_ptr, tl.load(y_ptr) + tl.load(x_ptr + i))  # no atomic


@triton.jit
def largest(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n)  # no `other`
    tl.store(y_ptr, tl.max(x))


@triton.jit
def far_row(x_ptr, y_ptr, stride):
    i = tl.program_id(0)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))  # 32 bits


def main():
    torch.manual_seed(0)
    x, y = torch.randn(6, 50, device="cuda"), torch.zeros(6, 50, device="cuda")
    launches = [
        lambda: scale_rows[(3,)](x, y, 50, 50, ROWS=2, BLOCK=64),
        lambda: total[(50,)](x, y),
        lambda: largest[(1,)](x, y, 50, BLOCK=64),
        lambda: far_row[(3,)](x, y, 1 << 30),
    ]
    for launch in launches:
        try:
            launch()
        except Exception as error:
            print(f"{type(error).__name__}: {len(error.findings)} found")


def attention(q, k, v, *, scale=None):
    scores = q.float() @ k.float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    out = (scores.softmax(-1) @ v.float() / 2).to(q.dtype)
    d = out.shape[-1]
    flat = out.view(-1, d)
    scale_rows[(len(flat),)](flat, flat, d, d, ROWS=1, BLOCK=triton.next_power_of_2(d))
    return out


if __name__ == "__main__":
    main()
