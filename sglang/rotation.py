"""A rotated checkpoint: its logits stay what they were, but its activations lose their outliers.

An outlier takes a token's 8 bits for itself; a rotation spreads it over all channels. Where two
layers meet with nothing but linear maps between them, one makes its outputs rotated, and the next
has the inverse in its weights, so that nothing is left to do when the model runs. There are two
such places, by SpinQuant's names (Liu et al., 2024):

* R1 [H, H], the residual stream. RMSNorm is the same of a rotated vector if its weight is one; the
  weight goes into the layers after it. A head tied to the embedding is on its own from then on.
* R2 [D, D], of each layer, the values of a head, between v_proj and o_proj.

Both are random Hadamard matrices, as in QuaRot (Ashkboos et al., 2024). What down_proj reads has
been through SwiGLU, and cannot be rotated this way.
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
        self._head_dim = config.head_dim
        self._r1 = random_rotation(config.hidden_size, 0)

    def shape(self, name: str) -> tuple[int, ...]:
        name = f"{self._head}.weight" if name == "lm_head.weight" else name
        return self._checkpoint.shape(name)

    def _read(self, out: torch.Tensor, name: str, index: tuple[slice, ...]) -> None:
        out.copy_(self._rotated(name)[index])

    def _rotated(self, name: str) -> torch.Tensor:
        path, _, attribute = name.rpartition(".")
        where, _, layer = path.rpartition(".")
        block = where.rpartition(".")[0]  # model.layers.0
        match layer:
            case "embed_tokens":
                return self._stored(name) @ self._r1
            case "lm_head":
                return self._reader(f"{self._head}.weight", "model.norm")
            case "norm" | "input_layernorm" | "post_attention_layernorm":
                return torch.ones(self.shape(name))
            case "q_proj" | "k_proj" | "v_proj" | "gate_proj" | "up_proj":
                norm = f"{block}.{_NORM_BEFORE[layer]}"
                out = self._reader(name, norm) if attribute == "weight" else self._stored(name)
                return self._by_head(out.t(), block).t() if layer == "v_proj" else out
            case "o_proj" | "down_proj":
                out = self._stored(name)
                if layer == "o_proj" and attribute == "weight":
                    out = self._by_head(out, block)
                return self._r1.t() @ out
        return self._stored(name)

    def _stored(self, name: str) -> torch.Tensor:
        out = torch.empty(self.shape(name))
        self._checkpoint.load(out, name)
        return out

    def _reader(self, name: str, norm: str) -> torch.Tensor:
        """The weight [N, H] of a layer after a norm."""
        return (self._stored(name) * self._stored(f"{norm}.weight")) @ self._r1

    def _by_head(self, x: torch.Tensor, block: str) -> torch.Tensor:
        """[..., heads D], values of a layer's heads in their last dimension."""
        r2 = random_rotation(self._head_dim, 1 + int(block.rpartition(".")[2]))
        return (x.unflatten(-1, (-1, self._head_dim)) @ r2).flatten(-2)
