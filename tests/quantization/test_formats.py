"""Checkpoints as other tools write them. Integers, scales and zero points are drawn at random and
packed here, by loops over bits that follow each format's description; so the weights are known
without being read back, and our logits must be those of transformers with these weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sglang.worker.parallel import TensorParallel
from tests.models import tiny
from tests.models.test_tensor_parallel import build

K_SIZES = {"hidden_size": 128, "intermediate_size": 192}


def words(numbers: np.ndarray, bits: int) -> torch.Tensor:
    """Numbers along the last axis -> int32 words, the first number in the lowest bits."""
    groups = numbers.reshape(*numbers.shape[:-1], -1, 32 // bits).astype(np.uint64)
    out = np.zeros(groups.shape[:-1], np.uint64)
    for i in range(32 // bits):
        out |= groups[..., i] << np.uint64(bits * i)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32))


class Integers:
    """A random layer: W[n, k] = (q[n, k] - zero[g, n]) scale[g, n], g being group_of[k]."""

    def __init__(self, rng, n: int, k: int, bits: int, group: int, group_of: np.ndarray) -> None:
        groups = k // group
        self.q = rng.integers(0, 2**bits, (n, k))
        # Stored less one, a zero point is one of 0 .. 2^bits - 1.
        self.zeros = rng.integers(1, 2**bits, (groups, n))
        scales = rng.uniform(0.5, 1.5, (groups, n)) * 0.4 / 2**bits
        self.scales = torch.from_numpy(scales).half()
        self.group_of = group_of
        zeros, scales = self.zeros[group_of].T, self.scales.float().numpy()[group_of].T
        self.weight = torch.from_numpy((self.q - zeros) * scales).float()


def random_order(rng, k: int, group: int, act_order: bool) -> np.ndarray:
    order = np.arange(k) // group
    return rng.permutation(order) if act_order else order


def write(folder, model, config: dict, make_layer) -> None:
    """The model's linear layers, but for the head, by make_layer(rng, inputs of the layer, n, k) ->
    (its tensors, its weight). Layers that read the same inputs get equal random orders."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if not name.endswith("_proj.weight"):
            tensors[name] = parameter.data.half()
            parameter.data = tensors[name].float()
            continue
        layer, _, projection = name.removesuffix(".weight").rpartition(".")
        kind = {"o_proj": "o", "down_proj": "down"}.get(projection, "hidden")
        order_seed = sum(map(ord, f"{layer} {kind}"))
        stored, weight = make_layer(
            np.random.default_rng(len(tensors)), np.random.default_rng(order_seed), *parameter.shape
        )
        tensors |= {f"{layer}.{projection}.{suffix}": t for suffix, t in stored.items()}
        parameter.data = weight
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    folder.mkdir()
    model.config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors")
    tiny.rewrite_config(folder, quantization_config=config, dtype="float16")


def check(folder, theirs) -> None:
    ours, _ = tiny.load(folder, dtype="float32")
    tiny.assert_same_logits(ours, theirs)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "group, act_order, version",
    [(64, False, "gptq"), (32, True, "gptq"), (-1, False, "gptq"), (64, True, "gptq_v2")],
)
def test_gptq(bits, group, act_order, version, tmp_path):
    def layer(rng, order_rng, n, k):
        size = k if group == -1 else group
        w = Integers(rng, n, k, bits, size, random_order(order_rng, k, size, act_order))
        offset = 1 if version == "gptq" else 0
        return {
            "qweight": words(w.q, bits).t(),
            "qzeros": words(w.zeros - offset, bits),
            "scales": w.scales,
            "g_idx": torch.from_numpy(w.group_of).int(),
        }, w.weight

    theirs = tiny.make("Qwen2", **K_SIZES)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    config |= {"sym": False} if version == "gptq" else {"checkpoint_format": version, "sym": True}
    write(tmp_path / "model", theirs, config, layer)
    check(tmp_path / "model", theirs)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_gptq_with_a_bias_that_the_model_has_not(value, tmp_path):
    """AutoGPTQ's older versions stored one of zeros with every layer."""

    def layer(rng, order_rng, n, k):
        w = Integers(rng, n, k, 4, 64, np.arange(k) // 64)
        return {
            "qweight": words(w.q, 4).t(),
            "qzeros": words(w.zeros - 1, 4),
            "scales": w.scales,
            "bias": torch.full((n,), value),
        }, w.weight

    theirs = tiny.make("Llama", **K_SIZES)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": False}
    write(tmp_path / "model", theirs, config, layer)
    if value == 0:
        check(tmp_path / "model", theirs)
    else:
        with pytest.raises(ValueError, match=r"_proj.bias is not zero"):
            tiny.load(tmp_path / "model", dtype="float32")


@pytest.mark.parametrize("group", [32, 64])
def test_awq(group, tmp_path):
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the outputs in a word, from its lowest bits on

    def interleaved(numbers: np.ndarray) -> torch.Tensor:
        return words(numbers.reshape(len(numbers), -1, 8)[:, :, order].reshape(numbers.shape), 4)

    def layer(rng, order_rng, n, k):
        w = Integers(rng, n, k, 4, group, np.arange(k) // group)
        return {
            "qweight": interleaved(w.q.T),
            "qzeros": interleaved(w.zeros),
            "scales": w.scales,
        }, w.weight

    theirs = tiny.make("Llama", **K_SIZES)
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True}
    write(tmp_path / "model", theirs, config, layer)
    check(tmp_path / "model", theirs)


def test_compressed_tensors_with_act_order(tmp_path):
    def layer(rng, order_rng, n, k):
        w = Integers(rng, n, k, 4, 64, random_order(order_rng, k, 64, True))
        return {
            "weight_packed": words(w.q, 4),
            "weight_zero_point": words(w.zeros, 4).t(),
            "weight_scale": w.scales.t(),
            "weight_shape": torch.tensor([n, k]),
            "weight_g_idx": torch.from_numpy(w.group_of).int(),
        }, w.weight

    theirs = tiny.make("Llama", **K_SIZES)
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}
    group = {"weights": weights | {"symmetric": False, "actorder": "group"}, "targets": ["Linear"]}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    write(tmp_path / "model", theirs, config, layer)
    check(tmp_path / "model", theirs)


@pytest.mark.parametrize("static", [False, True])
def test_fp8_with_a_scale_for_a_whole_matrix(static, tmp_path):
    def layer(rng, order_rng, n, k):
        weight = torch.from_numpy(rng.standard_normal((n, k)) * 0.2).float()
        scale = weight.abs().max() / 448
        q = (weight / scale).to(torch.float8_e4m3fn)
        stored = {"weight": q, "weight_scale": scale}
        if static:
            stored["input_scale"] = torch.tensor(0.5)
        return stored, q.float() * scale

    theirs = tiny.make("Llama", **K_SIZES)
    config = {"quant_method": "fp8", "activation_scheme": "static" if static else "dynamic"}
    write(tmp_path / "model", theirs, config, layer)
    ours, _ = tiny.load(tmp_path / "model", dtype="float32")
    for mine, their in zip(ours.layers, theirs.model.layers, strict=True):
        weight = mine.mlp.down_proj.weight.float() * mine.mlp.down_proj.scales[:, None]
        torch.testing.assert_close(weight, their.mlp.down_proj.weight)
        fused = mine.mlp.gate_up_proj.weight.float() * mine.mlp.gate_up_proj.scales[:, None]
        parts = torch.cat([their.mlp.gate_proj.weight, their.mlp.up_proj.weight])
        torch.testing.assert_close(fused, parts)
    ids = list(range(40))
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0]
    error = tiny.our_logits(ours, ids) - wanted
    assert error.pow(2).mean().sqrt() < 0.3 * wanted.std()  # tokens are rounded, here only ours


def blocks_layer(outputs: int, inputs: int, suffix: str = "weight_scale_inv"):
    def layer(rng, order_rng, n, k):
        q = torch.from_numpy(rng.standard_normal((n, k)) * 100).to(torch.float8_e4m3fn)
        scale = torch.from_numpy(rng.uniform(1e-3, 4e-3, (-(-n // outputs), -(-k // inputs))))
        every = scale.float().repeat_interleave(outputs, 0)[:n].repeat_interleave(inputs, 1)[:, :k]
        return {"weight": q, suffix: scale.float()}, q.float() * every

    return layer


@pytest.mark.parametrize("tool", ["fp8", "compressed-tensors"])
def test_fp8_with_scales_for_blocks(tool, tmp_path):
    """DeepSeek's and Qwen's. What is left is one scale for each output, and rounding once more."""
    config = {"quant_method": "fp8", "weight_block_size": [48, 64]}
    if tool == "compressed-tensors":
        eight = {"num_bits": 8, "type": "float", "symmetric": True}
        group = {"weights": eight | {"strategy": "block", "block_structure": [48, 64]}}
        group |= {"input_activations": eight | {"strategy": "group"}, "targets": ["Linear"]}
        config = {"quant_method": tool, "format": "float-quantized", "config_groups": {"a": group}}
    theirs = tiny.make("Llama", **K_SIZES)
    suffix = "weight_scale_inv" if tool == "fp8" else "weight_scale"
    write(tmp_path / "model", theirs, config, blocks_layer(48, 64, suffix))
    ours, _ = tiny.load(tmp_path / "model", dtype="float32")
    for mine, their in zip(ours.layers, theirs.model.layers, strict=True):
        attention = [getattr(their.self_attn, f"{each}_proj").weight for each in "qkv"]
        for fused, parts in (
            (mine.self_attn.qkv_proj, attention),
            (mine.mlp.gate_up_proj, [their.mlp.gate_proj.weight, their.mlp.up_proj.weight]),
            (mine.mlp.down_proj, [their.mlp.down_proj.weight]),
        ):
            wanted = torch.cat(parts)
            scales = wanted.abs().amax(1, keepdim=True) / 448
            torch.testing.assert_close(fused.scales[:, None], scales)
            rounded = (wanted / scales).to(torch.float8_e4m3fn).float() * scales
            torch.testing.assert_close(fused.weight.float() * fused.scales[:, None], rounded)
            assert ((rounded - wanted).abs() <= wanted.abs() / 16 + scales * 2**-10).all()


@pytest.mark.parametrize("block, works", [((32, 32), True), ((96, 32), False), ((32, 96), False)])
def test_blocks_are_shared_out_over_ranks(block, works, tmp_path):
    config = {"quant_method": "fp8", "weight_block_size": block}
    theirs = tiny.make("Llama", **K_SIZES, num_key_value_heads=4)
    write(tmp_path / "model", theirs, config, blocks_layer(*block))
    whole = build(tmp_path / "model", TensorParallel())
    if not works:
        with pytest.raises(ValueError, match=r"_proj: blocks of .* cannot be split over ranks"):
            build(tmp_path / "model", TensorParallel(1, 2))
        return
    ranks = [build(tmp_path / "model", TensorParallel(rank, 2)) for rank in range(2)]
    gates = [rank.layers[1].mlp.gate_up_proj.weight.chunk(2)[0] for rank in ranks]
    assert torch.equal(torch.cat(gates), whole.layers[1].mlp.gate_up_proj.weight.chunk(2)[0])
    downs = [model.layers[1].mlp.down_proj for model in (whole, *ranks)]
    weight, *shares = (down.weight.float() * down.scales[:, None] for down in downs)
    torch.testing.assert_close(torch.cat(shares, 1), weight, rtol=0.13, atol=1e-3)


def test_layers_of_one_fused_matrix_in_different_orders_are_refused(tmp_path):
    def layer(rng, order_rng, n, k):
        w = Integers(rng, n, k, 4, 64, random_order(rng, k, 64, True))
        return {
            "qweight": words(w.q, 4).t(),
            "qzeros": words(w.zeros - 1, 4),
            "scales": w.scales,
            "g_idx": torch.from_numpy(w.group_of).int(),
        }, w.weight

    theirs = tiny.make("Llama", **K_SIZES)
    config = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
    write(tmp_path / "model", theirs, config, layer)
    with pytest.raises(ValueError, match=r"q_proj.*k_proj.*different orders"):
        tiny.load(tmp_path / "model", dtype="float32")
