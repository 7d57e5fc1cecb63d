"""Every format holds the same model; what does not fit it is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny


@pytest.fixture(scope="module")
def llama():
    return tiny.make("Llama", attention_bias=True)


def test_sharded_safetensors(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    tiny.assert_same_logits(tiny.load(tmp_path)[0], llama)


def test_torch_bin_single_and_sharded(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    ours, config = tiny.load(tmp_path)
    assert config.load_format == "pt"
    tiny.assert_same_logits(ours, llama)

    (tmp_path / "pytorch_model.bin").unlink()
    names = sorted(weights)
    files = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
    for file, part in files.items():
        torch.save({n: weights[n] for n in part}, tmp_path / file)
    index = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    tiny.assert_same_logits(tiny.load(tmp_path)[0], llama)


def test_old_torch_files_that_cannot_be_mapped(llama, tmp_path):
    llama.config.save_pretrained(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    torch.save(llama.state_dict(), path, _use_new_zipfile_serialization=False)
    tiny.assert_same_logits(tiny.load(tmp_path)[0], llama)


def test_safetensors_go_before_torch_files_unless_told_otherwise(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert tiny.load(tmp_path)[1].load_format == "safetensors"
    with pytest.raises(ValueError, match=r"no tensor model\.embed_tokens\.weight"):
        tiny.load(tmp_path, load_format="pt")


def test_a_missing_tensor_is_named(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        tiny.load(tmp_path)


def test_a_left_over_tensor_is_named(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not use: model\.extra\.weight"):
        tiny.load(tmp_path)


def test_a_decoder_without_the_names_of_its_wrapper(tmp_path):
    """As Qwen3-Embedding is stored."""
    tied = tiny.make("Qwen3", head_dim=16, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(bare, tmp_path / "model.safetensors")
    tiny.assert_same_logits(tiny.load(tmp_path)[0], tied)
    (tmp_path / "model.safetensors").unlink()
    torch.save(bare, tmp_path / "pytorch_model.bin")
    tiny.assert_same_logits(tiny.load(tmp_path)[0], tied)


def test_what_follows_from_the_configuration_may_be_left_over(llama, tmp_path):
    tied = tiny.make("Llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    tiny.assert_same_logits(tiny.load(tmp_path)[0], tied)


def test_a_wrong_shape_is_named(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    tiny.rewrite_config(tmp_path, intermediate_size=128)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj\.weight is \[96, 64\] .* \[128, 64\]"):
        tiny.load(tmp_path)


def test_broken_and_missing_files_are_named(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].write_bytes(shards[1].read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"cannot read .*{shards[1].name}"):
        tiny.load(tmp_path)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"lacks {shards[1].name}"):
        tiny.load(tmp_path)


def test_dummy_weights_need_a_configuration_only_and_repeat(tmp_path):
    tiny.make("Qwen3", head_dim=16).config.save_pretrained(tmp_path)
    models = [tiny.load(tmp_path, load_format="dummy")[0] for _ in range(2)]
    runs = [tiny.our_logits(model, [1, 2] * 10) for model in models]
    weight = models[0].embed_tokens.weight
    assert weight.abs().max() <= 1e-3 and 5e-4 < weight.std() < 7e-4
    assert runs[0].isfinite().all() and runs[0].std() > 0
    torch.testing.assert_close(*runs, rtol=0, atol=0)
