"""Model folders with a configuration and no weights, for `--load-format dummy`.

    python benchmarks/models.py qwen3-0.6b --tokenizer     writes a folder and prints its path

Speed does not depend on what the weights are. Over HTTP a server wants a tokenizer too: --tokenizer
makes one of the model's size, whose tokens past the 256 bytes are made-up words.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

_LLAMA2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA2_13B: dict[str, Any] = _LLAMA2_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
}
_QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
# The demo model's shapes, for engines that cannot read its GGUF file.
_SMOLLM2_135M: dict[str, Any] = _LLAMA2_7B | {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
CONFIGS = {
    "qwen3-0.6b": _QWEN3_06B,
    "llama2-7b": _LLAMA2_7B,
    "llama2-13b": _LLAMA2_13B,
    "llama2-7b-awq": _LLAMA2_7B | {"quantization_config": _AWQ},
    "smollm2-135m": _SMOLLM2_135M,
}
DEMO = "demo"
"""The demo model itself, with its weights; only sglang has it."""


def model_folder(name: str, tokenizer: bool = False, root: str | None = None) -> str:
    """Writes CONFIGS[name] into a folder of its own; returns its path. Another name is taken for a
    path, and returned as it is."""
    if name not in CONFIGS:
        return name
    folder = Path(root or tempfile.gettempdir(), "nano-sglang-models", name)
    folder.mkdir(parents=True, exist_ok=True)
    config = CONFIGS[name]
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if tokenizer:
        (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(config["vocab_size"])))
    return str(folder)


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level BPE without merges, in the format of Hugging Face's tokenizers."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = sorted(ByteLevel.alphabet())
    tokens += [f"\u0120word{i}" for i in range(vocab_size - len(tokens))]  # U+0120 is a space
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--tokenizer", action="store_true", help="with a made-up tokenizer")
    parser.add_argument("--root", help="where its folder is made (default: the temporary folder)")
    args = parser.parse_args()
    print(model_folder(args.name, args.tokenizer, args.root))


if __name__ == "__main__":
    main()
