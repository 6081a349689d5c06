import torch


def attention(q, k, v, *, causal=False, scale=None):
    """q (batch, heads, q_len, d), k and v (batch, kv_heads, kv_len, d); fp16, bf16 or fp32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).float() for x in (k, v))
    scores = q.float() @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:  # the last query sees the last key
        q_len, kv_len = scores.shape[-2:]
        hidden = torch.ones(q_len, kv_len, dtype=torch.bool, device=q.device).triu(kv_len - q_len + 1)
        scores = scores.masked_fill(hidden, float("-inf"))
    weights = scores.softmax(dim=-1).nan_to_num()  # rows that see no key: 0
    return (weights @ v).to(q.dtype)
