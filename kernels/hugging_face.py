"""The kernels in models of Hugging Face's transformers, through its interface for attention functions."""

from __future__ import annotations

from typing import Any

import torch

from effattn.kernels.attention import flash_attention

#: what `attn_implementation` is called; transformers takes names with "flash" in them for kernels of its own hub
NAME = "effattn"


def register_with_transformers() -> str:
    """Offer `flash_attention` to models of transformers, under the name that this returns.

        model = AutoModelForCausalLM.from_pretrained(..., attn_implementation=register_with_transformers())

    Masks are made as for "sdpa". Raises ImportError without transformers (4.56 or later, the extra `real`).
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls: (batch, heads, length, head_dim) in, (batch, length, heads, v_dim) out.

    attention_mask: bool, or a float that is added. s_aux: the sinks, as some models call them.
    """
    q_len, kv_len = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and q_len > 1
    if causal and kv_len > q_len:
        # A cache that is filled for the first time: its room beyond the queries holds nothing yet.
        key, value = key[:, :, :q_len], value[:, :, :q_len]
    mask, bias = attention_mask, position_bias
    if attention_mask is not None:
        if attention_mask.dtype != torch.bool:
            bias = attention_mask if bias is None else attention_mask + bias
            mask = None
        else:
            mask = attention_mask[..., :kv_len]
    if bias is not None:
        bias = bias[..., : key.shape[2]]
    # Drawn from torch's generator, so that torch.manual_seed decides it.
    seed = int(torch.randint(2**31 - 1, ())) if dropout > 0 else 0
    out = flash_attention(
        query,
        key,
        value,
        causal=causal,
        scale=scaling,
        softcap=softcap,
        bias=bias,
        mask=mask,
        sinks=None if s_aux is None else s_aux.float(),
        dropout_p=dropout,
        dropout_seed=seed,
    )
    assert isinstance(out, torch.Tensor)
    return out.transpose(1, 2).contiguous(), None
