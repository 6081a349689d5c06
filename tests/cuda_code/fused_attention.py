"""FlashAttention in the manner of Triton's tutorial 06: tensor descriptors made by the host, autotuned, with a backward.

Code for a GPU: run it by `effattn cpu -- python fused_attention.py`. With --wrong, the causal mask is off by one.
"""

import sys

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

WRONG = "--wrong" in sys.argv
DEVICE = triton.runtime.driver.active.get_active_torch_device()


@triton.jit
def _attn_fwd_inner(
    acc, l_i, m_i, q, desc_k, desc_v, offset_y, dtype: tl.constexpr, start_m, qk_scale,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, STAGE: tl.constexpr,
    offs_m: tl.constexpr, offs_n: tl.constexpr, N_CTX: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    if STAGE == 1:
        lo, hi = 0, start_m * BLOCK_M
    elif STAGE == 2:
        lo, hi = start_m * BLOCK_M, (start_m + 1) * BLOCK_M
        lo = tl.multiple_of(lo, BLOCK_M)
    else:
        lo, hi = 0, N_CTX
    for start_n in tl.range(lo, hi, BLOCK_N):
        start_n = tl.multiple_of(start_n, BLOCK_N)
        k = desc_k.load([offset_y + start_n, 0]).T
        qk = tl.dot(q, k, input_precision="ieee")
        if STAGE == 2:
            mask = offs_m[:, None] >= (start_n + offs_n[None, :] + SHIFT)
            qk = qk * qk_scale + tl.where(mask, 0, -1.0e6)
            m_ij = tl.maximum(m_i, tl.max(qk, 1))
            qk -= m_ij[:, None]
        else:
            m_ij = tl.maximum(m_i, tl.max(qk, 1) * qk_scale)
            qk = qk * qk_scale - m_ij[:, None]
        p = tl.math.exp2(qk)
        alpha = tl.math.exp2(m_i - m_ij)
        l_ij = tl.sum(p, 1)
        acc = acc * alpha[:, None]
        v = desc_v.load([offset_y + start_n, 0])
        acc = tl.dot(p.to(dtype), v, acc, input_precision="ieee")
        l_i = l_i * alpha + l_ij
        m_i = m_ij
    return acc, l_i, m_i


def _host_descriptor_pre_hook(nargs):
    for name, rows in (
        ("desc_q", "BLOCK_M"),
        ("desc_v", "BLOCK_N"),
        ("desc_k", "BLOCK_N"),
        ("desc_o", "BLOCK_M"),
    ):
        nargs[name].block_shape = [nargs[rows], nargs["HEAD_DIM"]]


configs = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_stages=s, num_warps=w, pre_hook=_host_descriptor_pre_hook)
    for m in (32, 64) for n in (32, 64) for s in (2, 3) for w in (4, 8)
]  # fmt: skip


def keep(configs, named_args, **kwargs):
    return [
        c
        for c in configs
        if c.kwargs["BLOCK_M"] >= c.kwargs["BLOCK_N"] and c.kwargs["BLOCK_M"] <= kwargs["N_CTX"]
    ]


@triton.autotune(
    configs=configs, key=["N_CTX", "HEAD_DIM", "STAGE"], prune_configs_by={"early_config_prune": keep}
)
@triton.jit
def _attn_fwd(
    sm_scale, M, Z, H, desc_q, desc_k, desc_v, desc_o, N_CTX, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = desc_q.dtype
    start_m = tl.program_id(0)
    off_hz = tl.program_id(1)
    offset_y = off_hz * N_CTX
    qo_offset_y = offset_y + start_m * BLOCK_M
    offs_m = start_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    m_i = tl.zeros([BLOCK_M], dtype=tl.float32) - float("inf")
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    qk_scale = sm_scale * 1.44269504
    q = desc_q.load([qo_offset_y, 0])
    if STAGE & 1:
        acc, l_i, m_i = _attn_fwd_inner(acc, l_i, m_i, q, desc_k, desc_v, offset_y, dtype, start_m, qk_scale,
                                        BLOCK_M, HEAD_DIM, BLOCK_N, 4 - STAGE, offs_m, offs_n, N_CTX, SHIFT)  # fmt: skip
    if STAGE & 2:
        acc, l_i, m_i = _attn_fwd_inner(acc, l_i, m_i, q, desc_k, desc_v, offset_y, dtype, start_m, qk_scale,
                                        BLOCK_M, HEAD_DIM, BLOCK_N, 2, offs_m, offs_n, N_CTX, SHIFT)  # fmt: skip
    m_i += tl.math.log2(l_i)
    acc = acc / l_i[:, None]
    tl.store(M + off_hz * N_CTX + offs_m, m_i)
    desc_o.store([qo_offset_y, 0], acc.to(dtype))


@triton.jit
def _attn_bwd_preprocess(Out, DO, Delta, N_CTX, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr):
    off_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    off_hz = tl.program_id(1)
    off_n = tl.arange(0, HEAD_DIM)
    at = off_hz * HEAD_DIM * N_CTX + off_m[:, None] * HEAD_DIM + off_n[None, :]
    delta = tl.sum(tl.load(Out + at).to(tl.float32) * tl.load(DO + at).to(tl.float32), axis=1)
    tl.store(Delta + off_hz * N_CTX + off_m, delta)


@triton.jit
def _attn_bwd(
    Q, K, V, sm_scale, DO, DQ, DK, DV, M, D, N_CTX, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    LN2: tl.constexpr = 0.6931471824645996
    adj = (tl.program_id(1) * N_CTX).to(tl.int64)
    pid = tl.program_id(0)
    Q += adj * HEAD_DIM
    K += adj * HEAD_DIM
    V += adj * HEAD_DIM
    DO += adj * HEAD_DIM
    DQ += adj * HEAD_DIM
    DK += adj * HEAD_DIM
    DV += adj * HEAD_DIM
    M += adj
    D += adj
    offs_k = tl.arange(0, HEAD_DIM)
    mine = pid * BLOCK + tl.arange(0, BLOCK)
    rows = mine[:, None] * HEAD_DIM + offs_k[None, :]
    # Keys and values of this block: from the first query that sees them.
    k, v = tl.load(K + rows), tl.load(V + rows)
    dk = tl.zeros([BLOCK, HEAD_DIM], dtype=tl.float32)
    dv = tl.zeros([BLOCK, HEAD_DIM], dtype=tl.float32)
    first = pid * BLOCK if CAUSAL else 0
    for start in range(first, N_CTX, BLOCK):
        offs_m = start + tl.arange(0, BLOCK)
        qT = tl.load(Q + offs_m[None, :] * HEAD_DIM + offs_k[:, None])
        m = tl.load(M + offs_m)
        pT = tl.math.exp2(tl.dot(k, qT, input_precision="ieee") * sm_scale / LN2 - m[None, :])
        if CAUSAL:
            pT = tl.where(offs_m[None, :] >= mine[:, None], pT, 0.0)
        do = tl.load(DO + offs_m[:, None] * HEAD_DIM + offs_k[None, :])
        dv += tl.dot(pT.to(do.dtype), do, input_precision="ieee")
        dpT = tl.dot(v, tl.trans(do), input_precision="ieee")
        dsT = pT * (dpT - tl.load(D + offs_m)[None, :])
        dk += tl.dot(dsT.to(qT.dtype), tl.trans(qT), input_precision="ieee")
    tl.store(DV + rows, dv.to(v.dtype))
    tl.store(DK + rows, (dk * sm_scale).to(k.dtype))
    # The same block as queries.
    q, do = tl.load(Q + rows), tl.load(DO + rows)
    m, delta = tl.load(M + mine)[:, None], tl.load(D + mine)[:, None]
    dq = tl.zeros([BLOCK, HEAD_DIM], dtype=tl.float32)
    end = (pid + 1) * BLOCK if CAUSAL else N_CTX
    for start in range(0, end, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        at = offs_n[None, :] * HEAD_DIM + offs_k[:, None]
        kT, vT = tl.load(K + at), tl.load(V + at)
        p = tl.math.exp2(tl.dot(q, kT, input_precision="ieee") * sm_scale / LN2 - m)
        if CAUSAL:
            p = tl.where(mine[:, None] >= offs_n[None, :], p, 0.0)
        ds = (p * (tl.dot(do, vT, input_precision="ieee") - delta)).to(kT.dtype)
        dq += tl.dot(ds, tl.trans(kT), input_precision="ieee")
    tl.store(DQ + rows, (dq * sm_scale).to(q.dtype))


class _attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, sm_scale):
        assert q.is_cuda
        assert torch.cuda.get_device_capability()[0] >= 9
        head_dim = q.shape[-1]
        o = torch.empty_like(q)
        M = torch.empty((q.shape[0], q.shape[1], q.shape[2]), device=q.device, dtype=torch.float32)
        y = q.shape[0] * q.shape[1] * q.shape[2]
        descriptors = [
            TensorDescriptor(x, shape=[y, head_dim], strides=[head_dim, 1], block_shape=[1, 1])
            for x in (q, k, v, o)
        ]

        def grid(meta):
            return triton.cdiv(q.shape[2], meta["BLOCK_M"]), q.shape[0] * q.shape[1], 1

        _attn_fwd[grid](
            sm_scale, M, q.shape[0], q.shape[1], *descriptors, N_CTX=q.shape[2], HEAD_DIM=head_dim,
            STAGE=3 if causal else 1, SHIFT=1 if WRONG else 0,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, o, M)
        ctx.sm_scale, ctx.causal = sm_scale, causal
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, M = ctx.saved_tensors
        do = do.contiguous()
        assert do.is_cuda
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        batch, heads, n_ctx, head_dim = q.shape
        delta = torch.empty_like(M)
        grid = (n_ctx // 32, batch * heads)
        _attn_bwd_preprocess[grid](o, do, delta, n_ctx, BLOCK_M=32, HEAD_DIM=head_dim)
        _attn_bwd[grid](
            q,
            k,
            v,
            ctx.sm_scale,
            do,
            dq,
            dk,
            dv,
            M,
            delta,
            n_ctx,
            BLOCK=32,
            HEAD_DIM=head_dim,
            CAUSAL=ctx.causal,
        )
        return dq, dk, dv, None, None


def reference(q, k, v, causal, scale):
    s = q @ k.transpose(-1, -2) * scale
    if causal:
        s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    return s.softmax(-1) @ v


def main():
    torch.manual_seed(20)
    for dtype, allowed in ((torch.float16, 2e-3), (torch.bfloat16, 1.6e-2), (torch.float32, 4e-6)):
        for causal in (True, False):
            q, k, v = (
                torch.empty((1, 2, 128, 32), dtype=dtype, device=DEVICE).normal_(0.0, 0.5).requires_grad_()
                for _ in range(3)
            )
            do = torch.randn_like(q)
            wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
            out, exact = _attention.apply(q, k, v, causal, 0.5), reference(*wide, causal, 0.5)
            got = (out, *torch.autograd.grad(out, (q, k, v), do))
            want = (exact, *torch.autograd.grad(exact, wide, do.double()))
            for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
                assert a.device.type == "cuda"
                error = ((a.double() - b).norm() / b.norm()).item()
                assert error < allowed, f"{name} {dtype} causal={causal}: {error:.2e}"
    print("fused attention: ok")


if __name__ == "__main__":
    main()
