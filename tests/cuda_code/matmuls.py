"""Products in the manner of Triton's tutorials 03 and 08, and split-k with atomics. With --wrong, the tail of K is not masked."""

import sys

import torch
import triton
import triton.language as tl

WRONG = "--wrong" in sys.argv
DEVICE = triton.runtime.driver.active.get_active_torch_device()


def is_cuda():
    return triton.runtime.driver.active.get_current_target().backend == "cuda"


def get_cuda_autotune_config():
    sizes = [(128, 256, 64, 3, 8), (64, 128, 32, 4, 4), (32, 32, 32, 5, 2)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_stages=s, num_warps=w)
        for m, n, k, s, w in sizes
    ]


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.autotune(configs=get_cuda_autotune_config(), key=["M", "N", "K"])
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(axis=0)
    num_pid_m, num_pid_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    num_pid_in_group = GROUP_M * num_pid_n
    group_id = pid // num_pid_in_group
    first_pid_m = group_id * GROUP_M
    group_size_m = min(num_pid_m - first_pid_m, GROUP_M)
    pid_m = first_pid_m + ((pid % num_pid_in_group) % group_size_m)
    pid_n = (pid % num_pid_in_group) // group_size_m
    tl.assume(pid_m >= 0)
    tl.assume(pid_n >= 0)
    offs_am = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    offs_bn = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (offs_am[:, None] * stride_am + offs_k[None, :] * stride_ak)
    b_ptrs = b_ptr + (offs_k[:, None] * stride_bk + offs_bn[None, :] * stride_bn)
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        left = K - k * BLOCK_K if MASK else BLOCK_K
        a = tl.load(a_ptrs, mask=offs_k[None, :] < left, other=0.0)
        b = tl.load(b_ptrs, mask=offs_k[:, None] < left, other=0.0)
        accumulator = tl.dot(a, b, accumulator, input_precision="ieee")
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if ACTIVATION == "leaky_relu":
        accumulator = leaky_relu(accumulator)
    c = accumulator.to(c_ptr.dtype.element_ty)
    offs_cm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_cn = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + stride_cm * offs_cm[:, None] + stride_cn * offs_cn[None, :]
    tl.store(c_ptrs, c, mask=(offs_cm[:, None] < M) & (offs_cn[None, :] < N))


@triton.jit
def split_k_kernel(a_ptr, b_ptr, c_ptr, M, N, K, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    pid_m, pid_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = pid_m * BLOCK + tl.arange(0, BLOCK)
    n = pid_n * BLOCK + tl.arange(0, BLOCK)
    k = split * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for _ in range(tl.cdiv(K, BLOCK * SPLITS)):
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + n[None, :], mask=(k[:, None] < K) & (n[None, :] < N), other=0.0)
        acc += tl.dot(a, b, input_precision="ieee")
        k += BLOCK * SPLITS
    tl.atomic_add(
        c_ptr + m[:, None] * N + n[None, :], acc, mask=(m[:, None] < M) & (n[None, :] < N), sem="relaxed"
    )


@triton.jit
def grouped_matmul_kernel(
    group_a_ptrs, group_b_ptrs, group_c_ptrs, group_gemm_sizes, g_lds, group_size, KIND: tl.constexpr,
    NUM_SM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_idx = tl.program_id(0)
    last_problem_end = 0
    for g in range(group_size):
        gm = tl.load(group_gemm_sizes + g * 3)
        gn = tl.load(group_gemm_sizes + g * 3 + 1)
        gk = tl.load(group_gemm_sizes + g * 3 + 2)
        num_n_tiles = tl.cdiv(gn, BLOCK_N)
        num_tiles = tl.cdiv(gm, BLOCK_M) * num_n_tiles
        while tile_idx >= last_problem_end and tile_idx < last_problem_end + num_tiles:
            lda = tl.load(g_lds + g * 3)
            ldb = tl.load(g_lds + g * 3 + 1)
            ldc = tl.load(g_lds + g * 3 + 2)
            a_ptr = tl.load(group_a_ptrs + g).to(tl.pointer_type(KIND))
            b_ptr = tl.load(group_b_ptrs + g).to(tl.pointer_type(KIND))
            c_ptr = tl.load(group_c_ptrs + g).to(tl.pointer_type(KIND))
            tile = tile_idx - last_problem_end
            m = (tile // num_n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
            n = (tile % num_n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            a_ptrs = a_ptr + m[:, None] * lda + k[None, :]
            b_ptrs = b_ptr + k[:, None] * ldb + n[None, :]
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
            for _ in range(tl.cdiv(gk, BLOCK_K)):
                tl.multiple_of(a_ptrs, [16, 16])
                acc += tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), input_precision="ieee")
                a_ptrs += BLOCK_K
                b_ptrs += BLOCK_K * ldb
            tl.store(c_ptr + m[:, None] * ldc + n[None, :], acc.to(KIND))
            tile_idx += NUM_SM
        last_problem_end = last_problem_end + num_tiles


def check(got, want, allowed, what):
    error = ((got.double() - want).norm() / want.norm()).item()
    assert error < allowed, f"{what}: {error:.2e}"


def main():
    torch.manual_seed(0)
    assert is_cuda()
    kinds = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
    for dtype, allowed in ((torch.float16, 5e-4), (torch.bfloat16, 4e-3), (torch.float32, 2e-6)):
        a, b = (
            torch.randn((70, 90), device=DEVICE, dtype=dtype),
            torch.randn((100, 90), device=DEVICE, dtype=dtype).T,
        )
        a, b = (torch.nn.functional.pad(x, pad, value=3.0) for x, pad in ((a, (0, 70)), (b, (0, 0, 0, 70))))
        a, b = a[:, :90], b[:90]
        c = torch.empty((70, 100), device=DEVICE, dtype=dtype)
        matmul_kernel[lambda meta: (triton.cdiv(70, meta["BLOCK_M"]) * triton.cdiv(100, meta["BLOCK_N"]),)](
            a,
            b,
            c,
            70,
            100,
            90,
            *a.stride(),
            *b.stride(),
            *c.stride(),
            ACTIVATION="leaky_relu",
            MASK=not WRONG,
        )
        wide = a.double() @ b.double()
        check(c, torch.where(wide >= 0, wide, 0.01 * wide), allowed, f"matmul {dtype}")
        total = torch.zeros((70, 100), device=DEVICE)
        split_k_kernel[(3, 4, 3)](a.contiguous(), b.contiguous(), total, 70, 100, 90, BLOCK=32, SPLITS=3)
        check(total, wide, 2e-6, f"split-k {dtype}")
        sizes = [(64, 32, 64), (32, 96, 32), (96, 64, 128)]
        group = [
            [torch.randn(s, device="cuda", dtype=dtype) for s in ((m, k), (k, n), (m, n))]
            for m, n, k in sizes
        ]
        pointers = [torch.tensor([g[j].data_ptr() for g in group], device=DEVICE) for j in range(3)]
        gemm_sizes = torch.tensor(sizes, dtype=torch.int32, device=DEVICE)
        lds = torch.tensor([[x.stride(0) for x in g] for g in group], dtype=torch.int32, device=DEVICE)
        grouped_matmul_kernel[(4,)](
            *pointers,
            gemm_sizes,
            lds,
            len(group),
            KIND=kinds[dtype],
            NUM_SM=4,
            BLOCK_M=32,
            BLOCK_N=32,
            BLOCK_K=32,
        )
        for x, y, z in group:
            check(z, x.double() @ y.double(), allowed, f"grouped {dtype}")
    print("matmuls: ok")


if __name__ == "__main__":
    main()
