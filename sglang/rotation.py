"""A rotated checkpoint: its logits stay what they were, but its activations lose their outliers.

An outlier takes a token's 8 bits for itself; a rotation spreads it over all channels. What is
rotated is the residual stream (QuaRot: Ashkboos et al., 2024; R1 of SpinQuant: Liu et al., 2024):
layers that write to it have the rotation in their weights, those that read it the inverse, so that
nothing is left to do when the model runs. RMSNorm is the same of a rotated vector if its weight is
one; the weight goes into the layers after it. A head tied to the embedding is on its own from then
on, and hidden states, as embeddings are made of, are others. What down_proj reads has been through
SwiGLU, and cannot be rotated this way.
"""

from __future__ import annotations

import torch

from sglang.model_config import ModelConfig
from sglang.models.checkpoint import Checkpoint

_NORM_BEFORE = {
    "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm",
    "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm",
}  # fmt: skip


def random_rotation(size: int, seed: int) -> torch.Tensor:
    """float32 [size, size], orthogonal. Of a power of two: a Hadamard matrix, whose numbers are all
    of one size, with random signs; its Kronecker product with a random rotation for the rest."""
    generator = torch.Generator().manual_seed(seed)
    odd = size // (size & -size)
    normal = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(normal).Q.contiguous()
    while len(rotation) < size:
        rotation = torch.kron(rotation, torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double() / 2**0.5)
    signs = torch.randint(2, (size, 1), generator=generator) * 2 - 1
    return (signs * rotation).float()


class RotatedCheckpoint(Checkpoint):
    """Rotates what is read of another, which must be in floating point. Its head is not tied."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint.names | {"lm_head.weight"}, show_progress=False)
        self._checkpoint = checkpoint
        self._head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        self._rotation = random_rotation(config.hidden_size, 0)

    def shape(self, name: str) -> tuple[int, ...]:
        name = f"{self._head}.weight" if name == "lm_head.weight" else name
        return self._checkpoint.shape(name)

    def _read(self, out: torch.Tensor, name: str, index: tuple[slice, ...]) -> None:
        out.copy_(self._rotated(name)[index])

    def _rotated(self, name: str) -> torch.Tensor:
        path, _, attribute = name.rpartition(".")
        where, _, layer = path.rpartition(".")
        if layer in _NORM_BEFORE and attribute == "weight":
            block = where.rpartition(".")[0]  # model.layers.0
            return self._reader(name, f"{block}.{_NORM_BEFORE[layer]}")
        match layer:
            case "embed_tokens":
                return self._stored(name) @ self._rotation
            case "lm_head":
                return self._reader(f"{self._head}.weight", "model.norm")
            case "norm" | "input_layernorm" | "post_attention_layernorm":
                return torch.ones(self.shape(name))
            case "o_proj" | "down_proj":
                return self._rotation.t() @ self._stored(name)
        return self._stored(name)

    def _stored(self, name: str) -> torch.Tensor:
        out = torch.empty(self.shape(name))
        self._checkpoint.load(out, name)
        return out

    def _reader(self, name: str, norm: str) -> torch.Tensor:
        """The weight [N, H] of a layer after a norm."""
        return (self._stored(name) * self._stored(f"{norm}.weight")) @ self._rotation
