"""Calibrated weights make outputs that are nearer than those of weights rounded to nearest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from sglang.calibration import Int4, calibrate, gptq, round_to_int4
from sglang.model_config import ModelConfig
from sglang.quantize import pack_int4, quantize
from sglang.server_args import ServerArgs
from tests.models import tiny
from tests.quantization.test_checkpoints import plain_awq, plain_gptq

WIDE = {"hidden_size": 128, "intermediate_size": 192}


def random_ids(count: int) -> list[int]:
    return torch.randint(99, (count,), generator=torch.manual_seed(2)).tolist()


@pytest.mark.parametrize("group_size", [32, 64])
def test_gptq_errs_less_than_rounding_to_nearest(group_size):
    generator = torch.manual_seed(0)
    x = torch.randn(2000, 40, generator=generator) @ torch.randn(40, 128, generator=generator)
    x += 0.3 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(48, 128, generator=generator)
    seen, unseen = x[:1000], x[1000:]

    def error(int4: Int4) -> float:
        return float((unseen @ (int4.weight() - weight).t()).pow(2).mean())

    nearest = error(round_to_int4(weight, group_size))
    assert error(gptq(weight, seen, group_size)) < 0.6 * nearest


def test_gptq_of_inputs_that_say_nothing_rounds_to_nearest():
    weight = torch.randn(16, 64, generator=torch.manual_seed(0))
    ours, nearest = gptq(weight, torch.zeros(8, 64), 32), round_to_int4(weight, 32)
    assert torch.equal(ours.q, nearest.q)
    assert torch.equal(ours.weight(), nearest.weight())


@pytest.mark.parametrize("family, changes", [("Qwen2", {}), ("Llama", {"mlp_bias": True})])
def test_smoothing_leaves_logits_as_they_are(family, changes, tmp_path):
    theirs = tiny.make(family, **changes)
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.load(ServerArgs(str(tmp_path), device="cpu", dtype="float32"))
    tensors, _ = calibrate(config, random_ids(300), 0)
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    assert all((tensors[name] != before[name]).any() for name in tensors if "norm" in name)
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    merged = {name: tensors.get(name, value) for name, value in before.items()}
    save_file({k: v.contiguous() for k, v in merged.items()}, tmp_path / "model.safetensors")
    ours, _ = tiny.load(tmp_path, dtype="float32")
    tiny.assert_same_logits(ours, theirs)


@pytest.mark.parametrize("method, read", [("awq", plain_awq), ("gptq", plain_gptq)])
def test_int4_weights_read_back_as_they_are(method, read):
    generator = torch.manual_seed(0)
    q, zeros = (torch.randint(16, shape, generator=generator) for shape in ((16, 64), (2, 16)))
    int4 = Int4(q.int(), torch.rand(2, 16, generator=generator).half().float(), zeros.int())
    found = torch.from_numpy(read(pack_int4(method, "layer", int4), "layer"))
    assert torch.equal(found.float(), int4.weight())


def save_with_tokenizer(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    words = models.WordLevel({str(id): id for id in range(99)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("method", ["awq", "gptq", "int8"])
def test_a_calibrated_checkpoint_is_nearer_to_the_model(method, tmp_path):
    theirs = tiny.make("Qwen2", **WIDE)
    with torch.no_grad():  # some channels are larger than others, as in real models
        for layer in theirs.model.layers:
            layer.input_layernorm.weight[:4] *= 30
            layer.post_attention_layernorm.weight[:4] *= 30
            attention, mlp = layer.self_attn, layer.mlp
            for reader in (*(getattr(attention, f"{x}_proj") for x in "qkv"), mlp.gate_proj):
                reader.weight[:, :4] /= 30
            mlp.up_proj.weight[:, :4] /= 30
    save_with_tokenizer(theirs, tmp_path / "in")
    text = " ".join(map(str, random_ids(2048)))
    ids = random_ids(40)
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0]
    errors = []
    for given in (text, None):
        quantize(method, str(tmp_path / "in"), str(tmp_path / "out"), 32, given)
        ours, _ = tiny.load(tmp_path / "out", dtype="float32")
        errors.append(float((tiny.our_logits(ours, ids) - wanted).pow(2).mean()))
    assert errors[0] < 0.8 * errors[1]


def test_too_little_text_is_as_good_as_none(tmp_path, capsys):
    save_with_tokenizer(tiny.make("Llama"), tmp_path / "in")
    for name, text in (("a", "1 2 3"), ("b", None)):
        quantize("gptq", str(tmp_path / "in"), str(tmp_path / name), 32, text)
    assert "3 tokens are too few" in capsys.readouterr().out
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]
