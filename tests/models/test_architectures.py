"""Our logits are transformers', prefill and decode."""

import pytest
import torch

from tests.models import tiny

ARCHITECTURES = {
    "llama": ("Llama", {}),
    "llama, no grouped queries, tied": (
        "Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}
    ),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("Llama", {"head_dim": 32}),
    "llama 3 rope": ("Llama", {"rope_parameters": tiny.LLAMA3_ROPE}),
    "linear rope": (
        "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    ),
    "yarn rope": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn rope, one mscale": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mscale": 2.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "yarn rope, both mscales": (
        "Qwen2",
        {
            "rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mscale": 2.0,
                "mscale_all_dim": 0.5, "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral, window": ("Mistral", {"sliding_window": 9}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window in later layers": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3, tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("family, changes", ARCHITECTURES.values(), ids=ARCHITECTURES.keys())
def test_logits_are_those_of_transformers(family, changes, tmp_path):
    theirs = tiny.make(family, **changes)
    theirs.save_pretrained(tmp_path)
    ours, config = tiny.load(tmp_path)
    assert config.load_format == "safetensors"
    tiny.assert_same_logits(ours, theirs)


def test_a_configuration_of_older_transformers_means_the_same(tmp_path):
    rope = {k: v for k, v in tiny.LLAMA3_ROPE.items() if k != "rope_theta"}
    theirs = tiny.make("Llama", rope_parameters=tiny.LLAMA3_ROPE)
    theirs.save_pretrained(tmp_path)
    tiny.rewrite_config(
        tmp_path, rope_parameters=None, rope_theta=500.0, rope_scaling=rope, torch_dtype="float16"
    )
    tiny.assert_same_logits(tiny.load(tmp_path)[0], theirs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(dtype, tmp_path):
    theirs = tiny.make("Qwen3", head_dim=16, initializer_range=0.1)
    theirs.save_pretrained(tmp_path)
    ours, _ = tiny.load(tmp_path, dtype=dtype)
    ids = list(range(40))
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0]
    error = (tiny.our_logits(ours, ids) - wanted).pow(2).mean().sqrt() / wanted.std()
    assert 1e-5 < error < (0.03 if dtype == "bfloat16" else 0.004)


@pytest.mark.parametrize("window", [None, 7])
def test_the_last_layer_may_go_on_with_the_last_tokens_alone(window, tmp_path):
    tiny.make("Mistral", sliding_window=window).save_pretrained(tmp_path)
    model, _ = tiny.load(tmp_path)
    layers = []
    for layer in model.layers:
        layer.mlp.register_forward_hook(lambda mlp, args, out: layers.append(len(args[0])))
    whole, lasts = tiny.Session(model), tiny.Session(model)
    ids = torch.arange(60).tolist()
    steps = [({0: ids[:20], 1: ids[:5]}, 0), ({1: ids[5:6], 0: ids[20:50], 2: ids[7:9]}, 1)]
    for new, num_decode in steps:
        expected = whole.step(new, num_decode)
        layers.clear()
        got = lasts.step(new, num_decode, of_last=True)
        assert layers[-1] == len(new) < layers[0]
        for wanted, logits in zip(expected, got, strict=True):
            torch.testing.assert_close(logits, wanted[-1:], atol=1e-4, rtol=1e-4)
