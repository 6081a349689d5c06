"""FlashAttention on codes of e4m3 with a descale per (batch, KV head), and how it is handed to effattn."""

import torch
import triton
import triton.language as tl

import effattn


# Compiled once, not for each pattern of sizes that are 1 or divisible by 16.
@triton.jit(do_not_specialize=["heads", "group", "q_len", "kv_len", "dim", "v_dim"])
def _attend(q_ptr, k_ptr, v_ptr, q_descale, k_descale, v_descale, out_ptr, lse_ptr, heads, group, q_len, kv_len, dim, v_dim,
            factor, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, V: tl.constexpr):  # fmt: skip
    """One block of queries of one head; tensors are contiguous. P is e4m3 after an offset of 2^8."""
    pair = tl.program_id(1)
    kv_pair = pair // heads * (heads // group) + pair % heads // group
    i = tl.program_id(0) * M + tl.arange(0, M)
    d, dv = tl.arange(0, D), tl.arange(0, V)
    q_at = q_ptr + (pair * q_len + i[:, None]) * dim + d[None, :]
    q = tl.load(q_at, mask=(i[:, None] < q_len) & (d[None, :] < dim), other=0.0)
    unit = tl.load(q_descale + kv_pair) * tl.load(k_descale + kv_pair) * factor
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    acc = tl.zeros((M, V), tl.float32)
    for start in range(0, kv_len, N):
        j = start + tl.arange(0, N)
        k_at = k_ptr + (kv_pair * kv_len + j[None, :]) * dim + d[:, None]
        k = tl.load(k_at, mask=(j[None, :] < kv_len) & (d[:, None] < dim), other=0.0)
        v_at = v_ptr + (kv_pair * kv_len + j[:, None]) * v_dim + dv[None, :]
        v = tl.load(v_at, mask=(j[:, None] < kv_len) & (dv[None, :] < v_dim), other=0.0)
        seen = j[None, :] < kv_len
        if CAUSAL:
            seen = seen & (j[None, :] <= i[:, None] + kv_len - q_len)
        scores = tl.where(seen, tl.dot(q, k) * unit, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(scores - safe[:, None] + 8.0)
        decay = tl.exp2(top - safe)
        total = total * decay + tl.sum(p, 1)
        acc = acc * decay[:, None] + tl.dot(p.to(tl.float8e4nv), v)
        top = new
    empty = total == 0.0
    acc = acc * tl.load(v_descale + kv_pair) / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(total) - 8.0) * 0.6931471805599453)
    out_at = out_ptr + (pair * q_len + i[:, None]) * v_dim + dv[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(i[:, None] < q_len) & (dv[None, :] < v_dim))
    tl.store(lse_ptr + pair * q_len + i, lse, mask=i < q_len)


def fp8_attention(q, k, v, q_descale, k_descale, v_descale, *, causal, scale, dtype):
    """q, k, v in float8_e4m3fn, descales fp32 (batch, kv_heads): the interface of FlashAttention-3. Returns out, lse."""
    batch, heads, q_len, dim = q.shape
    kv_len, v_dim = k.shape[2], v.shape[3]
    out = torch.empty((batch, heads, q_len, v_dim), dtype=dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    grid = (triton.cdiv(q_len, 64), batch * heads)
    sizes = (heads, heads // k.shape[1], q_len, kv_len, dim, v_dim)
    padded = [max(32, triton.next_power_of_2(n)) for n in (dim, v_dim)]
    if out.numel():
        _attend[grid](q, k, v, q_descale, k_descale, v_descale, out, lse, *sizes, scale * 1.4426950408889634,
                      CAUSAL=causal, M=64, N=64, D=padded[0], V=padded[1])  # fmt: skip
    return out, lse


def quantise(x, kv_heads):
    """e4m3 codes of x, and the descale of each (batch, KV head): its largest magnitude becomes 448."""
    amax = (
        x.unflatten(1, (kv_heads, -1)).abs().float().amax((2, 3, 4))
        if x.numel()
        else x.new_ones(x.shape[0], kv_heads)
    )
    descale = torch.where(amax > 0, amax / 448, 1.0).float()
    shared = descale.repeat_interleave(x.shape[1] // kv_heads, 1)[:, :, None, None]
    return (x.float() / shared).to(torch.float8_e4m3fn).contiguous(), descale


def numerics(case):
    """What is quantised, and how: fp8 of FlashAttention-3, with descales per (batch, KV head)."""
    from effattn.tolerances.codes import Codes
    from effattn.tolerances.numerics import for_dtype

    per_head = Codes(format="e4m3", scale="kv-head")
    return for_dtype(case.dtype, "fp8-tensor").replace(q=per_head, k=per_head, v=per_head)


# Scales depend on what else is in a head, so equal questions need not have equal bits, and NaN in hidden keys shows.
@effattn.method(numerics=numerics, same_bits=False, nan_safe=False)
def attention(q, k, v, *, causal=False, scale=None):
    """q, k, v in fp16 or bf16, as effattn gives them: quantises, then calls the kernel."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    codes, descales = zip(*(quantise(x, k.shape[1]) for x in (q, k, v)), strict=True)
    return fp8_attention(*codes, *descales, causal=causal, scale=scale, dtype=q.dtype)
