"""What the compressed-tensors library writes is read as the library itself reads it."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    apply_quantization_config,
    disable_quantization,
)
from compressed_tensors.quantization.utils import calculate_qparams

from tests.models import tiny
from tests.quantization.test_checkpoints import RoundedInput

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}
CASES = {
    "symmetric": INT4,
    "asymmetric": INT4 | {"symmetric": False},
    "one group": INT4 | {"strategy": "channel", "group_size": None},
    "int8": INT8,
    "fp8": FP8,
    "fp8 per tensor": FP8 | {"strategy": "tensor"},
}


def compressed(folder, weights: dict):
    """Writes a tiny model as the library compresses it; returns it as the library decompresses it,
    its inputs not rounded."""
    model = tiny.make("Llama", hidden_size=128, intermediate_size=192)
    inputs = None
    if weights["num_bits"] == 8:
        inputs = {**weights, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is None:
            continue
        weight, by = module.weight.data, scheme.weights.strategy
        if by == "tensor":
            low, high = weight.min(), weight.max()
        else:
            size = scheme.weights.group_size if by == "group" else weight.shape[1]
            groups = weight.unflatten(1, (-1, size))
            low, high = groups.amin(2), groups.amax(2)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    compressor.decompress_model(model)
    return model.apply(disable_quantization)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_library_s_weights(case, tmp_path):
    theirs = compressed(tmp_path, CASES[case])
    ours, config = tiny.load(tmp_path, dtype="float32")
    assert config.quantization_config is not None
    if CASES[case]["num_bits"] == 4:
        tiny.assert_same_logits(ours, theirs)
        return
    for mine, their in zip(ours.layers, theirs.model.layers, strict=True):
        down = mine.mlp.down_proj
        weight = down.weight.float() * down.scales[:, None]
        torch.testing.assert_close(weight, their.mlp.down_proj.weight)
    for module in theirs.modules():
        if hasattr(module, "quantization_scheme"):
            module.__dict__.pop("forward", None)
            module.__class__ = RoundedInput
            module.largest = 127.0 if case == "int8" else 448.0
    # A number near a tie may be rounded either way, and what follows sees that.
    ids = list(range(40))
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0]
    error = tiny.our_logits(ours, ids) - wanted
    assert error.pow(2).mean().sqrt() < 0.05 * wanted.std()
