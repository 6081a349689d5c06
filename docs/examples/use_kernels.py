"""The kernels of effattn, on CUDA tensors or on those of a CPU: training, packed sequences, decoding from pages."""

import torch

from effattn.kernels import flash_attention, flash_attention_varlen, flash_decode

torch.manual_seed(0)
dtype = torch.bfloat16

# 8 query heads share 2 key heads; each query sees at most 128 keys before it; gradients.
q = torch.randn(2, 8, 300, 64, dtype=dtype, requires_grad=True)
k, v = (torch.randn(2, 2, 300, 64, dtype=dtype, requires_grad=True) for _ in range(2))
out, lse = flash_attention(q, k, v, causal=True, window=(127, 0), return_lse=True)
out.float().square().mean().backward()
print("trained", tuple(out.shape), tuple(lse.shape), "and the gradients of q, k and v")

# Sequences of 100, 0 and 57 rows, one after the other: (rows, heads, head_dim).
ends = torch.tensor([0, 100, 100, 157], dtype=torch.int32)
q, k, v = (torch.randn(157, heads, 64, dtype=dtype) for heads in (8, 2, 2))
print("packed", tuple(flash_attention_varlen(q, k, v, ends, ends, causal=True).shape))

# One new token each for 3 sequences whose keys lie in pages of 16.
keys, values = (torch.randn(40, 2, 16, 64, dtype=dtype) for _ in range(2))
pages = torch.randperm(40)[:39].view(3, 13).int()
lengths = torch.tensor([200, 17, 0], dtype=torch.int32)
token = torch.randn(3, 8, 1, 64, dtype=dtype)
out, lse = flash_decode(
    token, keys, values, page_table=pages, kv_lengths=lengths, split_size=64, return_lse=True
)
print("decoded", tuple(out.shape), "of a sequence without keys:", float(out[2].abs().max()))
