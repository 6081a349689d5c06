import torch

import effattn


# A matrix product sums in an order that depends on the whole call, and gives 0 * NaN where V is hidden.
@effattn.method(same_bits=False, nan_safe=False)
def attention(q, k, v, *, causal=False, scale=None):
    """q (batch, heads, q_len, d), k and v (batch, kv_heads, kv_len, d); fp16, bf16 or fp32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).float() for x in (k, v))
    scores = q.float() @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:  # the last query sees the last key
        seen = seen.tril(k.shape[2] - q.shape[2])
    weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).masked_fill(~seen, 0.0)
    return (weights @ v).to(q.dtype)
