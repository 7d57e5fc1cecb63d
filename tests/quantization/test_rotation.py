"""A rotated checkpoint is of the same model, without its outliers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from sglang.model_config import ModelConfig
from sglang.models.checkpoint import open_checkpoint
from sglang.quantize import quantize
from sglang.rotation import RotatedCheckpoint, random_rotation
from sglang.server_args import ServerArgs
from tests.models import tiny
from tests.quantization.test_calibration import random_ids, save_with_tokenizer


def rotated(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder's checkpoint."""
    config = ModelConfig.load(ServerArgs(str(folder), device="cpu", dtype="float32"))
    checkpoint = RotatedCheckpoint(config, open_checkpoint(config))
    tensors = {name: torch.empty(checkpoint.shape(name)) for name in checkpoint.names}
    for name, tensor in tensors.items():
        checkpoint.load(tensor, name)
    return tensors


@pytest.mark.parametrize("size", [1, 6, 64, 576])
def test_a_random_rotation_is_orthogonal_and_spreads_every_channel(size):
    rotation = random_rotation(size, 1)
    torch.testing.assert_close(rotation @ rotation.t(), torch.eye(size))
    power = size & -size
    assert rotation.abs().max() < 1.001 * power**-0.5
    assert torch.equal(rotation, random_rotation(size, 1))
    assert size == 1 or not torch.equal(rotation, random_rotation(size, 2))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "hidden_size": 72, "head_dim": 24}),
        ("Llama", {"attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("Qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_a_rotated_checkpoint_has_the_same_logits(family, changes, tmp_path):
    theirs = tiny.make(family, **changes)
    theirs.save_pretrained(tmp_path)
    tensors, before = rotated(tmp_path), theirs.state_dict()
    for name in ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"):
        for key in (key for key in before if key.endswith(f"{name}.weight")):
            assert (tensors[key] - before[key]).norm() > 0.5 * before[key].norm()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tiny.rewrite_config(tmp_path, tie_word_embeddings=False)
    ours, _ = tiny.load(tmp_path, dtype="float32")
    tiny.assert_same_logits(ours, theirs)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tiny.assert_same_logits(ours, again)


def test_an_int8_checkpoint_has_no_outlier_channel_and_a_head_of_its_own(tmp_path):
    theirs = tiny.make("Llama", tie_word_embeddings=True)
    with torch.no_grad():
        theirs.model.embed_tokens.weight[:, 3] *= 20
    save_with_tokenizer(theirs, tmp_path / "in")
    text = " ".join(map(str, random_ids(1100)))
    quantize("int8", str(tmp_path / "in"), str(tmp_path / "out"), text=text)
    tensors = load_file(tmp_path / "out" / "model.safetensors")

    @torch.no_grad()
    def peak(embedding: torch.Tensor) -> float:
        sizes = embedding.float().pow(2).mean(0).sqrt()
        return float(sizes.max() / sizes.pow(2).mean().sqrt())

    assert peak(theirs.model.embed_tokens.weight) > 7
    assert peak(tensors["model.embed_tokens.weight"]) < 2
    ours, config = tiny.load(tmp_path / "out", dtype="float32")
    assert not config.tie_word_embeddings
    assert "lm_head.weight" in tensors
    assert all((tensors[name] == 1).all() for name in tensors if "norm" in name)
    ids = random_ids(100)
    with torch.inference_mode():
        wanted = theirs(torch.tensor([ids])).logits[0]
    assert (tiny.our_logits(ours, ids) - wanted).norm() < 0.1 * wanted.norm()
