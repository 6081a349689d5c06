"""The kernels inside a real language model: its loss is that of exact attention."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch

from effattn import real
from effattn.kernels import hugging_face, register_with_transformers

installed = pytest.mark.skipif(
    bool(real.missing("smollm2")),
    reason=f"not installed: {', '.join(real.missing('smollm2'))}; see {' and '.join(real.how_to_install('smollm2'))}",
)


@installed
def test_loss_of_a_real_model_is_that_of_exact_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf
    import transformers
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def exact(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        out, _ = sdpa_attention_forward(
            module, query.double(), key.double(), value.double(), *rest, **options
        )
        return out.to(query.dtype), None

    def one_key_less(module: Any, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
        value = value.clone()
        value[:, :, 50] = 0
        return sdpa_attention_forward(module, query, key, value, *rest, **options)

    calls = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments[1].shape)
        return hugging_face.attention(*arguments, **options)

    monkeypatch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))
    name = register_with_transformers()
    transformers.AttentionInterface.register(name, counted)
    transformers.AttentionInterface.register("effattn_float64", exact)
    transformers.AttentionInterface.register("effattn_wrong", one_key_less)
    transformers.AttentionMaskInterface.register("effattn_float64", transformers.masking_utils.sdpa_mask)
    transformers.utils.logging.disable_progress_bar()
    file = real.model_file(real.MODELS["smollm2"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokens = tokenizer(real.topics_text()[:2000], return_tensors="pt")["input_ids"][:, :200]
    # The second member is padded on the left: a mask, and rows that see nothing.
    tokens = torch.cat([tokens, tokens])
    seen = torch.ones_like(tokens)
    seen[1, :60] = 0
    labels = tokens.masked_fill(seen == 0, -100)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation=name
    ).eval()
    found = {}
    with torch.no_grad():
        for implementation in (name, "effattn_float64"):
            network.set_attn_implementation(implementation)
            for padded in (False, True):
                given = {"attention_mask": seen, "labels": labels} if padded else {"labels": tokens}
                found[implementation, padded] = float(
                    network(input_ids=tokens, use_cache=False, **given).loss
                )
        network.set_attn_implementation("effattn_wrong")
        found["effattn_wrong", False] = float(network(input_ids=tokens, labels=tokens, use_cache=False).loss)
    assert len(calls) == 2 * real.MODELS["smollm2"].layers
    for padded in (False, True):
        ours, exactly = found[name, padded], found["effattn_float64", padded]
        assert math.isfinite(ours)
        assert 1.0 < exactly < real.MODELS["smollm2"].max_loss
        # Of independent roundings (u = 2^-24), head_dim in a score and kv_len in a sum, 30 layers: six times the root of
        # the sum of their squares, of a loss that is a mean of differences of logits.
        allowed = 6 * math.sqrt(30 * (64 + 200)) * 2.0**-24 * exactly
        assert abs(ours - exactly) <= allowed, (
            f"loss {ours}, with exact attention {exactly}, allowed {allowed}"
        )
        if not padded:
            lost = found["effattn_wrong", False]
            assert abs(lost - exactly) > allowed, (
                f"the bound accepts the loss {lost} of attention that loses a key"
            )
        print(
            f"padded {padded}: loss {ours:.7f}, with exact attention {exactly:.7f}, allowed difference {allowed:.1e}"
        )
