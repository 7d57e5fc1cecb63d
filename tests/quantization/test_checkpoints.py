"""Every format is read as it is meant: logits are those of transformers with the weights that a
plain reading of the format, word by word, gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sglang.model_config import ModelConfig
from sglang.quantization.schemes import parse_scheme
from sglang.quantize import quantize
from sglang.server_args import ServerArgs
from tests.models import tiny


def nibbles(word: int) -> list[int]:
    return [(int(word) >> 4 * i) & 15 for i in range(8)]


def plain_awq(t: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """[N, K]. AutoAWQ puts the outputs 0 2 4 6 1 3 5 7 into a word's nibbles, lowest first."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def numbers(words: torch.Tensor) -> np.ndarray:
        out = np.zeros((words.shape[0], words.shape[1] * 8))
        for (row, column), word in np.ndenumerate(words.numpy()):
            out[row, column * 8 + np.array(order)] = nibbles(word)
        return out

    q, zeros = numbers(t[f"{name}.qweight"]), numbers(t[f"{name}.qzeros"])
    scales = t[f"{name}.scales"].float().numpy()
    group = np.arange(len(q)) // (len(q) // len(scales))
    return ((q - zeros[group]) * scales[group]).T


def plain_gptq(t: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """[N, K]. Inputs in a word in order; zero points of outputs, their words less 0x11111111."""
    words = t[f"{name}.qweight"].numpy()
    q = np.zeros((words.shape[0] * 8, words.shape[1]))
    for (row, column), word in np.ndenumerate(words):
        q[row * 8 : row * 8 + 8, column] = nibbles(word)
    words = t[f"{name}.qzeros"].numpy() + np.int32(0x11111111)
    zeros = np.zeros((words.shape[0], words.shape[1] * 8))
    for (row, column), word in np.ndenumerate(words):
        zeros[row, column * 8 : column * 8 + 8] = nibbles(word)
    group = t[f"{name}.g_idx"].numpy()
    return ((q - zeros[group]) * t[f"{name}.scales"].float().numpy()[group]).T


def plain_w8(t: dict[str, torch.Tensor], name: str) -> np.ndarray:
    return (t[f"{name}.weight"].float() * t[f"{name}.weight_scale"]).numpy()


PLAIN = {"awq": plain_awq, "gptq": plain_gptq, "int8": plain_w8, "fp8": plain_w8}


class RoundedInput(torch.nn.Linear):
    """A linear layer whose every token is rounded to 8 bits first."""

    largest = 127.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) / self.largest
        q = x / scale
        q = q.round() if self.largest == 127.0 else q.to(torch.float8_e4m3fn).float()
        return super().forward(q * scale)


@pytest.mark.parametrize("method", PLAIN)
def test_logits_are_those_of_the_dequantized_weights(method, tmp_path):
    theirs = tiny.make("Qwen2", hidden_size=128, intermediate_size=192)
    theirs.save_pretrained(tmp_path / "in")
    quantize(method, str(tmp_path / "in"), str(tmp_path / "out"))
    ours, _ = tiny.load(tmp_path / "out", dtype="float32")

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if name.endswith("_proj"):
                weight = torch.from_numpy(PLAIN[method](tensors, name)).float()
                change = (weight - module.weight).pow(2).mean().sqrt() / module.weight.std()
                assert 1e-4 < change < (0.2 if method in ("awq", "gptq") else 0.04)
                module.weight.copy_(weight)
                if method in ("int8", "fp8"):
                    module.__class__ = RoundedInput
                    module.largest = 127.0 if method == "int8" else 448.0
            if isinstance(getattr(module, "bias", None), torch.nn.Parameter):
                module.bias.copy_(tensors[f"{name}.bias"].float())
        for name, parameter in theirs.named_parameters():
            if "norm" in name or "embed" in name or "lm_head" in name:
                parameter.copy_(tensors[name].float())
    if method in ("awq", "gptq"):
        tiny.assert_same_logits(ours, theirs)
        return
    # A number near a tie may be rounded either way, and what follows sees that.
    ids = list(range(40))
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0]
    error = tiny.our_logits(ours, ids) - wanted
    assert error.pow(2).mean().sqrt() < 0.02 * wanted.std()


def test_a_models_own_folder_is_not_written_to_and_anothers_rest_goes(tmp_path):
    tiny.make("Llama").save_pretrained(tmp_path / "in")
    before = (tmp_path / "in" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="its weights would be lost"):
        quantize("int8", str(tmp_path / "in"), str(tmp_path / "in"))
    assert (tmp_path / "in" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="--group-size must be"):
        quantize("awq", str(tmp_path / "in"), str(tmp_path / "out"), -32)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model-1-of-2.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"another model's weights: model-1-of-2.safetensors"):
        quantize("int8", str(tmp_path / "in"), str(tmp_path / "out"))
    (tmp_path / "out" / "model-1-of-2.safetensors").unlink()
    (tmp_path / "out" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    quantize("int8", str(tmp_path / "in"), str(tmp_path / "out"))
    assert tiny.load(tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("method, held_in", [("awq", "float16"), ("int8", "bfloat16")])
def test_a_checkpoint_runs_in_what_it_is_held_in(method, held_in, tmp_path, monkeypatch):
    monkeypatch.setattr("sglang.model_config.num_gpus", lambda: 1)
    model = tiny.make("Qwen2", hidden_size=128, intermediate_size=192)
    wrong = "bfloat16" if held_in == "float16" else "float16"
    model.to(getattr(torch, wrong)).save_pretrained(tmp_path / "in")
    quantize(method, str(tmp_path / "in"), str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == getattr(torch, held_in)
    assert ModelConfig.load(ServerArgs(str(tmp_path / "out"), device="cuda")).dtype == held_in


@pytest.mark.parametrize(
    "config, found",
    [
        ({"quant_method": "bitsandbytes"}, "the method bitsandbytes"),
        ({"quant_method": "awq", "bits": 8}, "awq with 8 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "awq in the layout gemv"),
        ({"quant_method": "awq", "group_size": 48}, "awq with groups of 48"),
        ({"quant_method": "gptq", "bits": 3}, "gptq with 3 bits"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "fp8 with scales for blocks"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors with 0 groups"),
        ({"load_in_4bit": True}, "the method bitsandbytes"),
        ({"w_bit": 4, "q_group_size": 16}, "awq with groups of 16"),
        ({"quant_method": "gptq", "group_size": 0}, "gptq with groups of 0"),
        ({"quant_method": "gptq", "bits": "4"}, "gptq with '4' bits"),
        ({"quant_method": "gptq", "is_marlin_format": True}, "gptq in the layout marlin"),
        ({"quant_method": "gptq", "dynamic": {"+:.*": {"bits": 8}}}, r"gptq with .*\(dynamic\)"),
    ],
)
def test_what_is_not_supported_is_named(config, found):
    with pytest.raises(ValueError, match=rf"{found}.*; supported: awq"):
        parse_scheme(config)


@pytest.mark.parametrize(
    "config",
    [
        "gptq",
        {"quant_method": "compressed-tensors", "config_groups": [{"targets": ["Linear"]}]},
        {"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}},
        {"quant_method": "fp8", "ignored_layers": ["re:*lm_head"]},
    ],
)
def test_what_cannot_be_read_is_one_line(config):
    with pytest.raises(ValueError, match=r"^cannot read the checkpoint's quantization_config: .+$"):
        parse_scheme(config)
