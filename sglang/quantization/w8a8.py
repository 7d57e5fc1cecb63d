"""8-bit weights and activations: int8 (SmoothQuant and its like) and FP8. A weight has a scale for
each output; a token gets its own when it is multiplied. Scales for activations that a checkpoint
brings along are not used: a token's own is as near or nearer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.kernels.quant_w8a8 import quantize_tokens, w8a8_linear
from sglang.quantization.base import LinearMethod, Quantization, StoredTensor
from sglang.quantization.schemes import Scheme
from sglang.quantization.unquantized import Unquantized

if TYPE_CHECKING:
    from sglang.layers.linear import Linear
    from sglang.models.checkpoint import Checkpoint

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class W8A8Linear(LinearMethod):
    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        shape = (out_features, in_features)
        weight = StoredTensor("weight", shape, DTYPES[self.scheme.kind], output_dim=0, input_dim=1)
        if not self.scheme.per_tensor:
            scale = StoredTensor("weight_scale", (out_features, 1), torch.float32, output_dim=0)
        elif self.scheme.format == "fp8":
            scale = StoredTensor("weight_scale", (), torch.float32)
        else:
            scale = StoredTensor("weight_scale", (1,), torch.float32)
        return [weight, scale]

    def load(self, layer: Linear, checkpoint: Checkpoint) -> None:
        super().load(layer, checkpoint)
        for part in layer.parts:
            checkpoint.ignore(f"{part.name}.input_scale")

    def finish(self, layer: Linear) -> None:
        scales = layer.weight_scale.data.flatten()
        del layer.weight_scale
        if self.scheme.per_tensor:  # [parts]
            sizes = [part.shard.length(part.out_features) for part in layer.parts]
            counts = torch.tensor(sizes, device=scales.device)
            scales = scales.repeat_interleave(counts, output_size=sum(sizes))
        _keep(layer, layer.weight.data, scales)

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _apply(layer, x, bias)


class QuantizedAtLoad(Quantization, LinearMethod):
    """A checkpoint in floating point whose layers, all but the output head, are rounded."""

    def __init__(self, kind: str) -> None:
        self._format = DTYPES[kind]
        self._unquantized = Unquantized()

    def linear(self, name: str) -> LinearMethod:
        return self._unquantized if name == "lm_head" else self

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        return self._unquantized.tensors(in_features, out_features, dtype)

    def finish(self, layer: Linear) -> None:
        _keep(layer, *quantize_tokens(layer.weight.data, self._format))

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _apply(layer, x, bias)


def _keep(layer: Linear, weight: torch.Tensor, scales: torch.Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.scales = nn.Parameter(scales.float().contiguous(), requires_grad=False)


def _apply(layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return w8a8_linear(x, layer.weight, layer.scales, bias)
