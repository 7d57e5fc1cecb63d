"""A GGUF file's own 4-bit blocks (Q4_0, Q4_1), multiplied as they are, on a CPU. Weights of other
types are kept in 16 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.quantization.base import LinearMethod, Quantization, StoredTensor
from sglang.quantization.cpu import CPULinear
from sglang.quantization.unquantized import Unquantized

if TYPE_CHECKING:
    from sglang.layers.linear import Linear
    from sglang.models.checkpoint import Checkpoint
    from sglang.models.gguf_checkpoint import GGUFCheckpoint


class GGUFQuantization(Quantization, LinearMethod):
    def linear(self, name: str) -> LinearMethod:
        return self

    def tied_head(self) -> LinearMethod:
        return self

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        return Unquantized().tensors(in_features, out_features, dtype)

    def load(self, layer: Linear, checkpoint: Checkpoint) -> None:
        super().load(layer, checkpoint)
        layer.int4_blocks = None
        if hasattr(checkpoint, "int4"):
            layer.int4_blocks = _blocks(layer, checkpoint)

    def finish(self, layer: Linear) -> None:
        blocks = getattr(layer, "int4_blocks", None)
        layer.int4_blocks = None
        CPULinear.prepare(layer, blocks, in_16_bits=True)

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return CPULinear.apply(layer, x, bias)


def _blocks(
    layer: Linear, checkpoint: GGUFCheckpoint
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(q [N, K], scales [groups, N], low [groups, N]) of a fused layer, if all parts have them."""
    parts = []
    for part in layer.parts:
        dim, shard = (0, part.shard) if part.shard.size > 1 else (1, layer.input_shard)
        blocks = checkpoint.int4(f"{part.name}.weight", dim, shard)
        if blocks is None or part.padded:
            return None
        parts.append(blocks)
    q, scales, low = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return q, scales.t(), low.t()
