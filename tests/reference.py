"""The demo model in transformers, with the weights that its GGUF file holds."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import gguf
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sglang import demo_model
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import open_checkpoint
from sglang.models.gguf import GGUFFile
from sglang.models.gguf_checkpoint import hf_name
from sglang.server_args import ServerArgs


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


def demo_model_for_ranks(folder: Path) -> None:
    """Writes the demo model as a checkpoint that 2 and 4 ranks can share: to its nine heads and
    three KV heads come three and one that say nothing, so it computes what it does."""
    config = ModelConfig.load(ServerArgs(device="cpu"))
    checkpoint = open_checkpoint(config)
    weights = {}
    for name in checkpoint.names:
        weight = torch.empty(checkpoint.shape(name))
        checkpoint.load(weight, name)
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weight = torch.cat([weight, torch.zeros(len(weight) // 3, weight.shape[1])])
        elif name.endswith("o_proj.weight"):
            weight = torch.cat([weight, torch.zeros(len(weight), weight.shape[1] // 3)], 1)
        weights[name] = weight
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": True,
        "eos_token_id": list(config.eos_token_ids),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    save_file(weights, folder / "model.safetensors")
