"""Ragged prefill with log-sum-exp and the merging of states in the manner of FlashInfer, split keys in that of xformers,
grouped queries, fp8 caches. With --wrong, parts are merged without their weights.
"""

import sys

import torch
import triton
import triton.language as tl

WRONG = "--wrong" in sys.argv


@triton.heuristics({"EVEN_D": lambda args: args["D"] == args["BLOCK_D"]})
@triton.jit
def ragged_prefill(
    Q, K, V, Out, Lse, Q_Indptr, Kv_Indptr, k_scale, v_scale, sm_scale, heads, D, Splits,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr,
    EVEN_D: tl.constexpr,
):  # fmt: skip
    start_m, head, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    seq, split = z // Splits, z % Splits
    q0, q1 = tl.load(Q_Indptr + seq), tl.load(Q_Indptr + seq + 1)
    k0, k1 = tl.load(Kv_Indptr + seq), tl.load(Kv_Indptr + seq + 1)
    if start_m * BLOCK_M >= q1 - q0:
        return
    m, n, d = start_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    rows, cols = m < q1 - q0, d < D
    q_at = (q0 + m)[:, None] * heads * D + head * D + d[None, :]
    if EVEN_D:
        q = tl.load(Q + q_at, mask=rows[:, None], other=0.0)
    else:
        q = tl.load(Q + q_at, mask=rows[:, None] & cols[None, :], other=0.0)
    chunk = tl.cdiv(tl.cdiv(k1 - k0, Splits), BLOCK_N) * BLOCK_N
    low, high = split * chunk, min((split + 1) * chunk, k1 - k0)
    shift = (k1 - k0) - (q1 - q0)
    if CAUSAL:
        high = min(high, (start_m + 1) * BLOCK_M + shift)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_N):
        key = start + n
        kv_at = (k0 + key) * (heads // GROUP) * D + (head // GROUP) * D
        k = tl.load(K + kv_at[None, :] + d[:, None], mask=(key < k1 - k0)[None, :] & cols[:, None], other=0.0)
        s = tl.dot(q, k.to(q.dtype), input_precision="ieee") * (sm_scale * k_scale)
        visible = (key < high)[None, :] & rows[:, None]
        if CAUSAL:
            visible = visible & (key[None, :] <= m[:, None] + shift)
        s = tl.where(visible, s, -float("inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp(s - safe[:, None])
        alpha = tl.exp(top - safe)
        v = tl.load(V + kv_at[:, None] + d[None, :], mask=(key < k1 - k0)[:, None] & cols[None, :], other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        total = total * alpha + tl.sum(p, 1)
        top = new
    empty = total == 0.0
    out = acc * v_scale / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, -float("inf"), top + tl.log(tl.where(empty, 1.0, total)))
    row = (split * tl.load(Q_Indptr + tl.num_programs(2) // Splits) + q0 + m) * heads + head
    tl.store(Out + row[:, None] * D + d[None, :], out, mask=rows[:, None] & cols[None, :])
    tl.store(Lse + row, lse, mask=rows)


@triton.jit
def merge_states(Parts, Lses, Out, Lse, count, heads, D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
                 WEIGHTED: tl.constexpr):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, SPLITS)
    lse = tl.load(Lses + (s * count + token) * heads + head)
    top = tl.max(lse, 0)
    weight = tl.exp2((lse - top) * 1.4426950408889634) if WEIGHTED else lse * 0 + 1
    at = ((s[:, None] * count + token) * heads + head) * D + d[None, :]
    part = tl.load(Parts + at, mask=(d < D)[None, :], other=0.0)
    total = tl.sum(weight, 0)
    tl.store(Out + (token * heads + head) * D + d, tl.sum(part * weight[:, None], 0) / total, mask=d < D)
    tl.store(Lse + token * heads + head, top + tl.log(total))


def attention(q, k, v, q_indptr, kv_indptr, *, causal, splits=1, k_scale=1.0, v_scale=1.0):
    if not q.is_cuda:
        raise ValueError("inputs must be on the GPU")
    tokens, heads, dim = q.shape
    parts = torch.empty(splits, tokens, heads, dim, device=q.device, dtype=torch.float32)
    lses = torch.empty(splits, tokens, heads, device=q.device, dtype=torch.float32)
    longest = int((q_indptr[1:] - q_indptr[:-1]).max())
    with torch.cuda.device(q.device.index):
        ragged_prefill[(triton.cdiv(longest, 32), heads, (len(q_indptr) - 1) * splits)](
            q, k, v, parts, lses, q_indptr, kv_indptr, k_scale, v_scale, dim**-0.5, heads, dim, splits,
            GROUP=heads // k.shape[1], BLOCK_M=32, BLOCK_N=32, BLOCK_D=triton.next_power_of_2(dim), CAUSAL=causal,
        )  # fmt: skip
    out = torch.empty(tokens, heads, dim, device=q.device, dtype=q.dtype)
    lse = torch.empty(tokens, heads, device=q.device, dtype=torch.float32)
    merge_states[(tokens, heads)](
        parts,
        lses,
        out,
        lse,
        tokens,
        heads,
        D=dim,
        BLOCK_D=triton.next_power_of_2(dim),
        SPLITS=splits,
        WEIGHTED=not WRONG,
    )
    return out, lse


def exact(q, k, v, causal):
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    s = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones_like(s, dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        s = s.masked_fill(hidden, -torch.inf)
    return (s.softmax(-1) @ v).transpose(0, 1), s.logsumexp(-1).transpose(0, 1)


def main():
    torch.manual_seed(1)
    q_lens, kv_lens = [5, 40, 1], [5, 70, 33]
    q_indptr, kv_indptr = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        for n in (q_lens, kv_lens)
    )
    for dtype, cache, allowed in (
        (torch.float16, torch.float16, 1e-3), (torch.bfloat16, torch.bfloat16, 8e-3), (torch.float32, torch.float32, 2e-6),
        (torch.float16, torch.float8_e4m3fn, 1e-3), (torch.bfloat16, torch.float8_e5m2, 8e-3),
    ):  # fmt: skip
        for dim in (32, 48):
            for splits in (1, 4):
                q = torch.randn(sum(q_lens), 6, dim, device="cuda").to(dtype)
                k, v = (torch.randn(sum(kv_lens), 2, dim, device="cuda").to(cache) for _ in range(2))
                out, lse = attention(
                    q, k, v, q_indptr, kv_indptr, causal=True, splits=splits, k_scale=0.5, v_scale=2.0
                )
                for s in range(len(q_lens)):
                    mine, keys = slice(*q_indptr[s : s + 2].tolist()), slice(*kv_indptr[s : s + 2].tolist())
                    want, want_lse = exact(q[mine], k[keys].double() * 0.5, v[keys].double() * 2.0, True)
                    error = ((out[mine].double() - want).norm() / want.norm()).item()
                    assert error < allowed, (
                        f"{dtype} {cache} dim {dim} splits {splits} sequence {s}: {error:.2e}"
                    )
                    torch.testing.assert_close(
                        lse[mine].double(), want_lse, atol=1e-2 if dtype != torch.float32 else 1e-5, rtol=0
                    )
    print("ragged attention: ok")


if __name__ == "__main__":
    main()
