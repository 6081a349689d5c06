"""Attention over a paged KV cache in the manner of vLLM: decoding with split keys and a second pass that merges the parts,
and one kernel for prefills and decodes of different lengths. With --wrong, the block table is read one page too far.
"""

import sys

import torch
import triton
import triton.language as tl

WRONG = "--wrong" in sys.argv


@triton.jit
def _decode_stage1(
    Q, K_Cache, V_Cache, Block_Tables, Seq_Lens, Mid_O, Mid_Lse, sm_scale,
    stride_bt, stride_page, stride_slot, stride_head, stride_qb, stride_qh,
    KV_GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr, OFF: tl.constexpr,
):  # fmt: skip
    batch, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = head // KV_GROUP
    seq_len = tl.load(Seq_Lens + batch)
    per_split = tl.cdiv(tl.cdiv(seq_len, SPLITS), BLOCK_N) * BLOCK_N
    start, end = split * per_split, tl.minimum((split + 1) * per_split, seq_len)
    d = tl.arange(0, HEAD_DIM)
    at = (batch * HEADS + head) * SPLITS + split
    e_max = -float("inf")
    e_sum = 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    if end > start:
        q = tl.load(Q + batch * stride_qb + head * stride_qh + d).to(tl.float32)
        for n in range(start, end, BLOCK_N):
            offs = n + tl.arange(0, BLOCK_N)
            page = tl.load(
                Block_Tables + batch * stride_bt + offs // PAGE + OFF, mask=offs < end, other=0
            ).to(tl.int64)
            slot = page * stride_page + (offs % PAGE) * stride_slot + kv_head * stride_head
            k = tl.load(K_Cache + slot[:, None] + d[None, :], mask=offs[:, None] < end, other=0.0).to(
                tl.float32
            )
            qk = tl.sum(q[None, :] * k, 1) * sm_scale
            qk = tl.where(offs < end, qk, -float("inf"))
            v = tl.load(V_Cache + slot[:, None] + d[None, :], mask=offs[:, None] < end, other=0.0).to(
                tl.float32
            )
            n_max = tl.maximum(tl.max(qk, 0), e_max)
            scale = tl.exp(e_max - n_max)
            p = tl.exp(qk - n_max)
            acc = acc * scale + tl.sum(p[:, None] * v, 0)
            e_sum = e_sum * scale + tl.sum(p, 0)
            e_max = n_max
        tl.store(Mid_O + at * HEAD_DIM + d, acc / e_sum)
        tl.store(Mid_Lse + at, e_max + tl.log(e_sum))
    else:
        tl.store(Mid_Lse + at, -float("inf"))


@triton.jit
def _decode_stage2(Mid_O, Mid_Lse, Out, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    batch, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, HEAD_DIM)
    row = batch * HEADS + head
    top, total = -float("inf"), 0.0
    acc = tl.zeros([HEAD_DIM], tl.float32)
    for split in range(SPLITS):
        lse = tl.load(Mid_Lse + row * SPLITS + split)
        if lse > -float("inf"):
            new = tl.maximum(top, lse)
            old = tl.exp(top - new)
            weight = tl.exp(lse - new)
            acc = acc * old + weight * tl.load(Mid_O + (row * SPLITS + split) * HEAD_DIM + d)
            total = total * old + weight
            top = new
    tl.store(Out + row * HEAD_DIM + d, (acc / total).to(Out.dtype.element_ty))


@triton.jit
def _find_sequence(Starts, target, num_seqs, BLOCK_Q: tl.constexpr):
    left: tl.int32 = 0
    right = num_seqs
    while left < right:
        middle = (left + right) // 2
        if tl.load(Starts + middle) // BLOCK_Q + middle <= target:
            left = middle + 1
        else:
            right = middle
    return left - 1


@triton.jit
def _unified(
    Out, Q, K_Cache, V_Cache, Block_Tables, Seq_Lens, Query_Starts, scale, softcap, num_seqs,
    stride_bt, stride_page, stride_slot, stride_head, stride_qt, stride_qh,
    QUERIES_PER_KV: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr,
    WINDOW: tl.constexpr, USE_SOFTCAP: tl.constexpr, OFF: tl.constexpr,
):  # fmt: skip
    q_block, kv_head = tl.program_id(0), tl.program_id(1)
    seq = _find_sequence(Query_Starts, q_block, num_seqs, BLOCK_Q)
    q_start = tl.load(Query_Starts + seq)
    local = q_block - (q_start // BLOCK_Q + seq)
    q_len = tl.load(Query_Starts + seq + 1) - q_start
    if local * BLOCK_Q >= q_len:
        return
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    position = local * BLOCK_Q + m // QUERIES_PER_KV
    head = kv_head * QUERIES_PER_KV + m % QUERIES_PER_KV
    at = (q_start + position)[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :]
    seen = position < q_len
    q = tl.load(Q + at, mask=seen[:, None], other=0.0)
    seq_len = tl.load(Seq_Lens + seq)
    context = seq_len - q_len
    M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    L = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    longest = tl.minimum(context + local * BLOCK_Q + (BLOCK_M - 1) // QUERIES_PER_KV + 1, seq_len)
    for j in range(tl.cdiv(longest, PAGE)):
        page = tl.load(Block_Tables + seq * stride_bt + j + OFF).to(tl.int64)
        n = tl.arange(0, PAGE)
        slot = page * stride_page + kv_head * stride_head + n * stride_slot
        k = tl.load(K_Cache + slot[None, :] + d[:, None])
        v = tl.load(V_Cache + slot[:, None] + d[None, :])
        key = j * PAGE + n
        visible = key[None, :] < context + position[:, None] + 1
        S = scale * tl.dot(q, k, input_precision="ieee")
        if USE_SOFTCAP:
            x = S / softcap
            up, down = tl.exp(x), tl.exp(-x)
            S = softcap * (up - down) / (up + down)
        S = tl.where(seen[:, None] & visible, S, float("-inf"))
        if WINDOW > 0:
            S = tl.where((context + position[:, None] - key[None, :]) < WINDOW, S, float("-inf"))
        m_j = tl.maximum(M, tl.max(S, axis=1))
        m_j = tl.where(m_j > float("-inf"), m_j, 0.0)
        P = tl.exp(S - m_j[:, None])
        alpha = tl.exp(M - m_j)
        acc = acc * alpha[:, None]
        L = L * alpha + tl.sum(P, axis=1)
        M = m_j
        acc = tl.dot(P.to(v.dtype), tl.where(key[:, None] < seq_len, v, 0.0), acc, input_precision="ieee")
    # The sum started from 1, which the first factor exp(-inf) removed.
    tl.store(Out + at, (acc / L[:, None]).to(Out.dtype.element_ty), mask=seen[:, None])


def make_cache(lengths, kv_heads, dim, page, dtype):
    """Pages in a random order, NaN where nothing was written; and the keys and values by sequence."""
    pages = [-(-n // page) for n in lengths]
    order = torch.randperm(sum(pages) + 2)
    cache = torch.full((2, sum(pages) + 2, page, kv_heads, dim), torch.nan, dtype=dtype)
    tables = torch.zeros(len(lengths), max(pages) + 1, dtype=torch.int32)
    content, used = [], 0
    for s, n in enumerate(lengths):
        kv = torch.randn(2, n, kv_heads, dim).to(dtype)
        content.append(kv)
        for p in range(pages[s]):
            tables[s, p] = order[used]
            part = kv[:, p * page : (p + 1) * page]
            cache[:, order[used], : part.shape[1]] = part
            used += 1
    tables[:, -1] = order[used]
    return cache.cuda(), tables.cuda(), content


def exact(q, kv, scale, window=0, softcap=0.0):
    """(queries, heads, dim) against (2, keys, kv_heads, dim), the last query at the last key; float64."""
    q, (k, v) = q.double().transpose(0, 1), kv.double().transpose(1, 2)
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    s = q @ k.transpose(-1, -2) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    i, j = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])[None, :]
    s = s.masked_fill((j > i) | ((i - j >= window) if window else False), -torch.inf)
    return (s.softmax(-1) @ v).transpose(0, 1)


def check(got, want, allowed, what):
    error = ((got.double().cpu() - want).norm() / want.norm()).item()
    assert error < allowed, f"{what}: {error:.2e}"


def main():
    torch.manual_seed(3)
    heads, kv_heads, dim, page = 4, 2, 32, 16
    off = 1 if WRONG else 0
    for dtype, allowed in ((torch.float16, 2e-3), (torch.bfloat16, 1.5e-2), (torch.float32, 3e-6)):
        lengths = [1, 37, 64, 100]
        cache, tables, content = make_cache(lengths, kv_heads, dim, page, dtype)
        k_cache, v_cache = cache[0], cache[1]
        seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        q = torch.randn(len(lengths), heads, dim, device="cuda").to(dtype)
        splits, scale = 4, dim**-0.5
        mid = torch.empty(len(lengths), heads, splits, dim, device="cuda")
        lse = torch.empty(len(lengths), heads, splits, device="cuda")
        out = torch.empty_like(q)
        _decode_stage1[(len(lengths), heads, splits)](
            q, k_cache, v_cache, tables, seq_lens, mid, lse, scale, tables.stride(0), *k_cache.stride()[:3], q.stride(0),
            q.stride(1), KV_GROUP=heads // kv_heads, HEADS=heads, HEAD_DIM=dim, PAGE=page, BLOCK_N=16, SPLITS=splits, OFF=off,
        )  # fmt: skip
        _decode_stage2[(len(lengths), heads)](mid, lse, out, HEADS=heads, HEAD_DIM=dim, SPLITS=splits)
        for s in range(len(lengths)):
            check(
                out[s : s + 1],
                exact(q[s : s + 1].cpu(), content[s], scale),
                allowed,
                f"decode {dtype} sequence {s}",
            )
        # Prefills and decodes in one launch.
        q_lens = [1, 5, 64, 1]
        starts = torch.tensor([0, *torch.tensor(q_lens).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
        tokens = torch.randn(sum(q_lens), heads, dim, device="cuda").to(dtype)
        group = heads // kv_heads
        block_m = 16
        block_q = block_m // group
        for window, softcap in ((0, 0.0), (20, 0.0), (0, 5.0)):
            result = torch.empty_like(tokens)
            _unified[(sum(q_lens) // block_q + len(q_lens), kv_heads)](
                result, tokens, k_cache, v_cache, tables, seq_lens, starts, scale, softcap, len(q_lens), tables.stride(0),
                *k_cache.stride()[:3], tokens.stride(0), tokens.stride(1), QUERIES_PER_KV=group, HEAD_DIM=dim, PAGE=page,
                BLOCK_Q=block_q, BLOCK_M=block_m, WINDOW=window, USE_SOFTCAP=softcap > 0, OFF=off,
            )  # fmt: skip
            for s, (a, b) in enumerate(zip(starts.tolist()[:-1], starts.tolist()[1:], strict=True)):
                want = exact(tokens[a:b].cpu(), content[s], scale, window, softcap)
                check(
                    result[a:b],
                    want,
                    allowed,
                    f"unified {dtype} window {window} softcap {softcap} sequence {s}",
                )
    print("paged attention: ok")


if __name__ == "__main__":
    main()
