"""Calibrated weights make outputs that are nearer than those of weights rounded to nearest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from sglang.calibration import (
    EightBit,
    EightBits,
    Format,
    FourBits,
    Int4,
    Rounded,
    calibrate,
    clipped_int4_grid,
    gptq,
    int4_grid,
    round_to_8_bits,
    round_to_int4,
)  # fmt: skip
from sglang.model_config import ModelConfig
from sglang.models.checkpoint import open_checkpoint
from sglang.quantization.w8a8 import DTYPES
from sglang.quantize import METHODS, pack, quantize
from sglang.server_args import ServerArgs
from tests.models import tiny
from tests.quantization.test_checkpoints import plain_awq, plain_gptq

WIDE = {"hidden_size": 128, "intermediate_size": 192}


def random_ids(count: int) -> list[int]:
    return torch.randint(99, (count,), generator=torch.manual_seed(2)).tolist()


FORMATS: list[tuple[Format, Callable[[torch.Tensor], Rounded]]] = [
    (FourBits(32), lambda weight: round_to_int4(weight, 32)),
    (FourBits(64), lambda weight: round_to_int4(weight, 64)),
    *((EightBits(dtype), partial(round_to_8_bits, dtype=dtype)) for dtype in DTYPES.values()),
]


@pytest.mark.parametrize("format, nearest", FORMATS)
def test_layers_of_rounded_inputs_err_less_than_with_the_nearest_weights(format, nearest):
    generator = torch.manual_seed(0)
    x = torch.randn(2000, 40, generator=generator) @ torch.randn(40, 192, generator=generator)
    x += 0.3 * torch.randn(x.shape, generator=generator)
    weight = torch.randn(48, 192, generator=generator)
    seen, unseen = x[:1000], x[1000:]

    def error(rounded: Rounded) -> float:
        return float((unseen @ (rounded.weight() - weight).t()).pow(2).mean())

    assert error(format.round(weight, format.inputs(seen))) < 0.6 * error(nearest(weight))


@pytest.mark.parametrize("format, nearest", FORMATS)
def test_inputs_that_say_nothing_leave_the_nearest_weights(format, nearest):
    weight = torch.randn(16, 192, generator=torch.manual_seed(0))
    ours, wanted = format.round(weight, torch.zeros(8, 192)), nearest(weight)
    assert torch.equal(ours.q, wanted.q)
    assert torch.equal(ours.weight(), wanted.weight())


def test_columns_of_the_largest_inputs_are_rounded_first():
    generator = torch.manual_seed(0)
    sizes = torch.randperm(96, generator=generator) + 1.0
    x = torch.randn(500, 96, generator=generator) * sizes
    weight = 9 * torch.randn(16, 96, generator=generator)
    order: list[int] = []

    def nearest(k: int, column: torch.Tensor) -> torch.Tensor:
        order.append(k)
        return column.round()

    rounded = gptq(weight, x, nearest)
    assert order == x.pow(2).sum(0).argsort(descending=True).tolist()
    assert torch.equal(rounded[:, order[0]], weight[:, order[0]].round())
    assert (rounded - weight).abs().mean() < 1


def test_a_large_weight_that_hardly_matters_is_clipped():
    groups = torch.randn(16, 3, 32, generator=torch.manual_seed(0))
    groups[:, :, 0] = 8.0
    importance = torch.ones(96)
    importance[::32] = 1e-6

    def error(grid: tuple[torch.Tensor, torch.Tensor]) -> float:
        scales, zeros = (each[:, :, None] for each in grid)
        q = ((groups / scales).round() + zeros).clamp(0, 15)
        return float((((q - zeros) * scales - groups).pow(2).flatten(1) * importance).mean())

    assert error(clipped_int4_grid(groups, importance)) < 0.9 * error(int4_grid(groups))


class Exact(EightBits):
    """Smooths as it does, but rounds nothing."""

    def inputs(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def round(self, weight: torch.Tensor, x: torch.Tensor) -> EightBit:
        return EightBit(weight.clone(), torch.ones(len(weight)))


@pytest.mark.parametrize("family, changes", [("Qwen2", {}), ("Llama", {"mlp_bias": True})])
def test_smoothing_leaves_logits_as_they_are(family, changes, tmp_path):
    theirs = tiny.make(family, **changes)
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.load(ServerArgs(str(tmp_path), device="cpu", dtype="float32"))
    tensors, layers = calibrate(config, open_checkpoint(config), random_ids(300), Exact(torch.int8))
    tensors |= {f"{name}.weight": layer.weight() for name, layer in layers.items()}
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
    found = torch.from_numpy(read(pack(method, "layer", int4), "layer"))
    assert torch.equal(found.float(), int4.weight())


def save_with_tokenizer(model: torch.nn.Module, folder: Path) -> None:
    model.save_pretrained(folder)
    words = models.WordLevel({str(id): id for id in range(99)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("method", METHODS)
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
    ids = random_ids(200)
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
