"""Captures q, k and v of a real model into a file: `python -m effattn.capture MODEL FILE`.

Run by `effattn.real` as a process of its own, with the environment that keeps it off the network.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effattn import real


def capture(model: real.Model, target: Path) -> None:
    """Runs the model over the text and writes q, k, v of all layers, float32, and the metadata to"
    " `target`."""
    import gguf
    import transformers

    # transformers reads the file from its start for the configuration, the tokenizer and the weights, and
    # the reader takes ten seconds for the vocabulary alone. One reader does for all three.
    gguf.GGUFReader = functools.cache(gguf.GGUFReader)
    transformers.utils.logging.disable_progress_bar()
    start = time.perf_counter()
    arrays: dict[str, Any] = {}

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Keeps what attention is given: (1, heads, tokens, head_dim), after the rotary embedding.

        The mask, if there is one, is the causal one: a single text, nothing padded.
        """
        usual = model.head_dim**-0.5
        if scaling not in (None, usual):
            raise SystemExit(f"expected logits with a scale of {usual}, got {scaling}")
        for name, tensor, heads in (
            ("q", query, model.heads),
            ("k", key, model.kv_heads),
            ("v", value, model.kv_heads),
        ):
            if tuple(tensor.shape) != (1, heads, model.tokens, model.head_dim):
                raise SystemExit(f"unexpected shape of {name}: {tuple(tensor.shape)}")
            arrays[f"{name}{module.layer_idx}"] = tensor[0].float().contiguous().numpy()
        # enable_gqa shares kv heads blockwise, as the model does; a wrong guess would show in the loss.
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("effattn_capture", attention)
    file = real.model_file(model)
    text = real.topics_text()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # A token is at least one character, and English has about four in one.
    tokens = tokenizer(text[: 16 * model.tokens], return_tensors="pt")["input_ids"][:, : model.tokens]
    network = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="effattn_capture"
    ).eval()
    with torch.no_grad():
        loss = float(network(input_ids=tokens, labels=tokens, use_cache=False).loss)
    if len(arrays) != 3 * model.layers:
        raise SystemExit(f"expected {model.layers} layers, attention was called for {len(arrays) // 3}")
    metadata = {
        "model": model.title,
        "loss": loss,
        "tokens": model.tokens,
        "seconds": round(time.perf_counter() - start, 1),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "python": sys.version.split()[0],
        "versions": {
            p: importlib.metadata.version(p) for p in ("torch", "transformers", "gguf", model.distribution)
        },
    }
    arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    with target.open("wb") as out:
        np.savez(out, **arrays)


if __name__ == "__main__":
    capture(real.MODELS[sys.argv[1]], Path(sys.argv[2]))
