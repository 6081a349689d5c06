import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(Q, K, V, Out, heads, group, q_len, kv_len, dim, scale, qb, qh, qs, qd, kb, kh, ks, kd, vb, vh, vs, vd,
            DIM: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    row, b, h = tl.program_id(0), (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    d = tl.arange(0, DIM)
    q = tl.load(Q + b * qb + h * qh + row * qs + d * qd, mask=d < dim, other=0.0).to(tl.float32)
    top, total, out = -float("inf"), 0.0, tl.zeros([DIM], tl.float32)
    for start in range(0, kv_len, KEYS):
        j = start + tl.arange(0, KEYS)[:, None]
        there = (j < kv_len) & (d < dim)[None, :]
        k = tl.load(K + b * kb + h // group * kh + j * ks + d[None, :] * kd, mask=there, other=0.0).to(
            tl.float32
        )
        v = tl.load(V + b * vb + h // group * vh + j * vs + d[None, :] * vd, mask=there, other=0.0).to(
            tl.float32
        )
        s = tl.where(start + tl.arange(0, KEYS) < kv_len, tl.sum(k * q[None, :], 1) * scale, -float("inf"))
        larger = tl.maximum(top, tl.max(s, 0))
        p, back = tl.exp(s - larger), tl.exp(top - larger)
        out, total, top = out * back + tl.sum(p[:, None] * v, 0), total * back + tl.sum(p, 0), larger
    tl.store(Out + ((b * heads + h) * q_len + row) * dim + d, out / total, mask=d < dim)


def attention(q, k, v, *, scale=None):
    if v.shape[-1] != q.shape[-1] or k.shape[2] == 0:
        raise NotImplementedError("v_dim that differs from head_dim, no keys")
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    batch, heads, q_len, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    sizes = (heads, heads // k.shape[1], q_len, k.shape[2], dim, scale)
    if out.numel():
        grid, padded = (q_len, batch * heads), triton.next_power_of_2(dim)
        _kernel[grid](q, k, v, out, *sizes, *q.stride(), *k.stride(), *v.stride(), DIM=padded, KEYS=16)
    return out
