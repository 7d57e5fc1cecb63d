"""GGUF files, written by the gguf package, hold the model that they were made from."""

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from sglang.model_config import ModelConfig
from sglang.quantization import cpu
from sglang.server_args import ServerArgs
from tests.kernels.test_cpu import needs_compiler
from tests.models import tiny

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[stem]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def write(model, path, kind: Type, architecture: str, rope_freqs=None):
    """Returns the model with the weights that the file really holds."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_eos_token_id(7)
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", rope_freqs.numpy())
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            quantized = kind if tensor.dim() == 2 else Type.F32
            blocks = gguf.quants.quantize(tensor.numpy(), quantized)
            tensor.copy_(torch.tensor(gguf.quants.dequantize(blocks, quantized)))
            weights = tensor.numpy()
            if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
                heads = config.num_attention_heads
                heads = heads if ".q_proj." in name else config.num_key_value_heads
                shape = (heads, 2, len(weights) // heads // 2, *weights.shape[1:])
                weights = weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)
            stored = gguf.quants.quantize(weights, quantized)
            writer.add_tensor(gguf_name(name), stored, raw_dtype=quantized)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1, Type.Q4_0])
@pytest.mark.parametrize("family", ["Llama", "Llama, biases", "Qwen2", "Qwen3"])
def test_logits_are_those_of_the_weights_in_the_file(family, kind, tmp_path):
    changes = {"attention_bias": True} if "biases" in family else {}
    model = tiny.make(family.split(",")[0], head_dim=32, tie_word_embeddings=True, **changes)
    if "biases" in family:  # llama.cpp has biases on q, k, v only
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias = None
    path = tmp_path / "model.gguf"
    theirs = write(model, path, kind, family.split(",")[0].lower())
    ours, config = tiny.load(path, dtype="float32")
    assert config.load_format == "gguf" and config.eos_token_ids == (7,)
    assert config.quantization is None and ours.few_tokens is None
    tiny.assert_same_logits(ours, theirs)
    as_stored, _ = tiny.load(path)
    tiny.assert_same_logits(as_stored, theirs, of_16_bits=True)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Type.F32, "bfloat16"),
        (Type.BF16, "bfloat16"),
        (Type.F16, "float16"),
        (Type.Q4_1, "float16"),
    ],
)
def test_on_a_gpu_its_numbers_are_as_wide_as_in_the_file(kind, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang.model_config.num_gpus", lambda: 1)
    path = tmp_path / "model.gguf"
    write(tiny.make("Llama"), path, kind, "llama")
    assert ModelConfig.load(ServerArgs(str(path), device="cuda")).dtype == dtype
    assert ModelConfig.load(ServerArgs(str(path), device="cpu")).dtype == "float32"


@needs_compiler
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["Llama", "Qwen3"])  # all layers in one call, and one by one
def test_weights_that_stay_quantized_give_the_same_logits(family, tied, kind, tmp_path):
    path = tmp_path / "model.gguf"
    model = tiny.make(family, tie_word_embeddings=tied, head_dim=32, intermediate_size=128)
    theirs = write(model, path, kind, family.lower())
    ours, _ = tiny.load(path)
    assert all(layer.mlp.down_proj.blocks.bits == 4 for layer in ours.layers)
    assert (ours.few_tokens is not None) == (family == "Llama")
    for _ in range(2):  # KV pools
        tiny.assert_same_logits(ours, theirs, of_16_bits=True)


@needs_compiler
def test_weights_of_8_bits_stay_so_and_others_as_numbers(tmp_path):
    for kind, bits in ((Type.Q8_0, 8), (Type.Q4_1, 4), (Type.F16, None)):
        write(tiny.make("Qwen2"), tmp_path / "model.gguf", kind, "qwen2")
        ours, _ = tiny.load(tmp_path / "model.gguf")
        blocks = ours.layers[0].self_attn.qkv_proj.blocks
        assert (blocks and blocks.bits) == bits


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q8_0, Type.F16])
@pytest.mark.parametrize("has_units", [True, False])
def test_in_bfloat16_logits_are_nearly_the_same(kind, has_units, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "has_bfloat16_units", lambda: has_units)
    theirs = write(tiny.make("Qwen2"), tmp_path / "model.gguf", kind, "qwen2")  # with biases
    ours, _ = tiny.load(tmp_path / "model.gguf", dtype="bfloat16")
    ids = torch.randint(ours.config.vocab_size, (40,), generator=torch.manual_seed(1))
    with torch.inference_mode():
        wanted = theirs(ids[None]).logits[0]
    session = tiny.Session(ours)
    logits = torch.cat([session.step({0: part})[0] for part in ids.view(-1, 4).tolist()])
    assert (logits - wanted).norm() < 0.06 * wanted.norm()


def test_untied_heads_and_rope_factors(tmp_path):
    model = tiny.make("Llama", rope_parameters=tiny.LLAMA3_ROPE)
    plain = 500.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = plain / model.model.rotary_emb.inv_freq
    assert factors.max() > 2
    theirs = write(model, tmp_path / "a.gguf", Type.F32, "llama", rope_freqs=factors)
    ours, config = tiny.load(tmp_path)  # a folder with one .gguf file in it
    assert config.path == str(tmp_path / "a.gguf") and not config.tie_word_embeddings
    tiny.assert_same_logits(ours, theirs)


def test_missing_and_left_over_tensors_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    model = tiny.make("Qwen3", head_dim=32)
    model.model.layers[1].mlp.up_proj = None
    write(model, path, Type.F32, "qwen3")
    with pytest.raises(ValueError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        tiny.load(path)
    model = tiny.make("Qwen3", head_dim=32)
    write(model, path, Type.F32, "qwen2")  # which has no norms of q and k, but biases
    with pytest.raises(ValueError, match=r"no tensor .*q_proj\.bias"):
        tiny.load(path)


def test_a_truncated_file_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    write(tiny.make("Llama"), path, Type.F32, "llama")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="truncated"):
        tiny.load(path)
