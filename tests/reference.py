"""The demo model in transformers, with the weights that its GGUF file holds."""

from __future__ import annotations

from functools import cache

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sglang import demo_model
from sglang.models.gguf import GGUFFile
from sglang.models.gguf_checkpoint import hf_name


@cache
def demo_model_in_transformers() -> tuple[LlamaForCausalLM, LlamaConfig]:
    """In float32. Dequantized by the `gguf` package, not by what is under test; the way that
    transformers itself offers takes a minute."""
    file = GGUFFile(demo_model.fetch())
    meta = {k.removeprefix("llama."): v for k, v in file.metadata.items()}
    heads = {".q_proj.": meta["attention.head_count"], ".k_proj.": meta["attention.head_count_kv"]}
    config = LlamaConfig(
        vocab_size=meta["vocab_size"],
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=meta["block_count"],
        num_attention_heads=meta["attention.head_count"],
        num_key_value_heads=meta["attention.head_count_kv"],
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
    )
    weights = {}
    for stored in file.tensors.values():
        name = hf_name(stored.name)
        kind = gguf.GGMLQuantizationType[stored.type]
        weight = torch.tensor(gguf.quants.dequantize(file.rows(stored.name), kind))
        weight = weight.reshape(stored.shape)
        for projection, count in heads.items():
            if projection in name:  # llama.cpp keeps the rows of a head in another order
                rows = (count, weight.shape[0] // count // 2, 2, weight.shape[1])
                weight = weight.view(rows).transpose(1, 2).reshape(weight.shape)
        weights[name] = weight
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval().requires_grad_(False), config
