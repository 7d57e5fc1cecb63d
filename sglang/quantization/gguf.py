"""A GGUF file's own blocks of 4 and 8 bits (Q4_0, Q4_1, Q8_0), multiplied as they are, on a CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.kernels import cpu
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
        if blocks is not None:
            CPULinear.prepare(layer, 4, blocks)
        elif (stored := _in_8_bits(layer.weight.detach())) is not None:
            CPULinear.prepare(layer, 8, stored)
        else:
            CPULinear.prepare(layer)

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return CPULinear.apply(layer, x, bias)


def _blocks(
    layer: Linear, checkpoint: GGUFCheckpoint
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(q [N, K], scales [N, groups], low [N, groups]) of a fused layer, if all parts have them."""
    parts = []
    for part in layer.parts:
        dim, shard = (0, part.shard) if part.shard.size > 1 else (1, layer.input_shard)
        blocks = checkpoint.int4(f"{part.name}.weight", dim, shard)
        if blocks is None or part.padded:
            return None
        parts.append(blocks)
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _in_8_bits(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """[N, K] that were stored as Q8_0 -> (q uint8 [N, K], scales [N, groups], low [N, groups]).
    None: they were not, and nothing but rounding would make them so."""
    if weight.shape[1] % cpu.GROUP:
        return None
    if len(weight) > 1 and _in_8_bits(weight[:1]) is None:  # one row tells most of them
        return None
    groups = weight.float().unflatten(1, (-1, cpu.GROUP))
    scales = (groups.abs().amax(2) / 127).half().float()
    q = (groups / scales.clamp(min=1e-30)[:, :, None]).round_()
    if not torch.equal(q * scales[:, :, None], groups):
        return None
    return (q + 128).to(torch.uint8).flatten(1), scales, -128 * scales
