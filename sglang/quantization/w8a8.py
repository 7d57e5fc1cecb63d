"""8-bit weights and activations: int8 (SmoothQuant and its like) and FP8. A weight has a scale for
each output; a token gets its own when it is multiplied. Scales for activations that a checkpoint
brings along are not used: a token's own is as near or nearer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.kernels.activation import silu_and_mul
from sglang.kernels.quant_tokens import norm_and_quantize, quantize_tokens, silu_and_quantize
from sglang.kernels.quant_w8a8 import scaled_matmul
from sglang.kernels.w8a8_gemv import is_few, w8a8_fused_linear
from sglang.quantization.base import LinearMethod, Quantization, StoredTensor, ignore_zeros
from sglang.quantization.schemes import Scheme
from sglang.quantization.unquantized import Unquantized

if TYPE_CHECKING:
    from sglang.layers.linear import Linear
    from sglang.layers.norm import RMSNorm
    from sglang.models.checkpoint import Checkpoint

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass
class QuantizedTokens:
    """What one of these layers hands to the next, if it knows that no other reads it."""

    q: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype
    """Of the activations that it stands for."""


class _EightBit(LinearMethod):
    """Works on layer.weight, int8 or float8_e4m3fn [N, K], and layer.scales, float32 [N]."""

    def keep(self, layer: Linear, weight: torch.Tensor, scales: torch.Tensor) -> None:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.scales = nn.Parameter(scales.float().contiguous(), requires_grad=False)

    def apply(
        self, layer: Linear, x: torch.Tensor | QuantizedTokens, bias: torch.Tensor | None
    ) -> torch.Tensor:
        if isinstance(x, QuantizedTokens):
            return scaled_matmul(x.q, x.scales, layer.weight, layer.scales, x.dtype, bias)
        if is_few(x, layer.weight):
            return w8a8_fused_linear(x, layer.weight, layer.scales, bias)[0]
        quantized = quantize_tokens(x, layer.weight.dtype)
        return scaled_matmul(*quantized, layer.weight, layer.scales, x.dtype, bias)

    def apply_normed(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> tuple[torch.Tensor | QuantizedTokens, torch.Tensor]:
        weight, scales = layer.weight, layer.scales
        if is_few(x, weight):
            return w8a8_fused_linear(
                x, weight, scales, bias, residual, norm.weight, norm.eps, gated
            )
        q, q_scales, residual = norm_and_quantize(x, residual, norm.weight, norm.eps, weight.dtype)
        out = scaled_matmul(q, q_scales, weight, scales, x.dtype, bias)
        if not gated:
            return out, residual
        if layer.readers and all(isinstance(r.method, _EightBit) for r in layer.readers):
            return QuantizedTokens(*silu_and_quantize(out, weight.dtype), x.dtype), residual
        return silu_and_mul(out), residual


class W8A8Linear(_EightBit):
    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        shape = (out_features, in_features)
        weight = StoredTensor("weight", shape, DTYPES[self.scheme.kind], output_dim=0, input_dim=1)
        if self.scheme.block:
            suffix = "weight_scale_inv" if self.scheme.format == "fp8" else "weight_scale"
            blocks = tuple(-(-n // size) for n, size in zip(shape, self.scheme.block, strict=True))
            scale = StoredTensor(suffix, blocks, torch.float32, output_dim=0, input_dim=1)
        elif not self.scheme.per_tensor:
            scale = StoredTensor("weight_scale", (out_features, 1), torch.float32, output_dim=0)
        else:
            scale = StoredTensor("weight_scale", (), torch.float32)
        return [weight, scale]

    def load(self, layer: Linear, checkpoint: Checkpoint) -> None:
        super().load(layer, checkpoint)
        for part in layer.parts:
            checkpoint.ignore(f"{part.name}.input_scale")
            for each in ("weight", "input"):  # stored though they say nothing
                name = f"{part.name}.{each}_zero_point"
                ignore_zeros(checkpoint, name, "asymmetric numbers are not supported")

    def finish(self, layer: Linear) -> None:
        if self.scheme.block:
            return self._finish_blocks(layer, *self.scheme.block)
        scales = layer.weight_scale.data.flatten()
        del layer.weight_scale
        if self.scheme.per_tensor:  # [parts]
            sizes = [part.shard.length(part.out_features) for part in layer.parts]
            counts = torch.tensor(sizes, device=scales.device)
            scales = scales.repeat_interleave(counts, output_size=sum(sizes))
        self.keep(layer, layer.weight.data, scales)

    def _finish_blocks(self, layer: Linear, outputs: int, inputs: int) -> None:
        """Rounded anew, to one scale for each output: our products know no others."""
        name = self.tensors(1, 1, layer.dtype)[1].suffix
        weight, scales = layer.weight.data, getattr(layer, name).data
        delattr(layer, name)
        counts = []
        for part in layer.parts:
            rows, columns = part.shard.length(part.out_features), weight.shape[1]
            split_inside = part.shard.size > 1 and rows % outputs
            if split_inside or (layer.input_shard.size > 1 and columns % inputs):
                raise ValueError(
                    f"{part.name}: blocks of {outputs} x {inputs} cannot be split over ranks here: "
                    "choose another --tp-size"
                )
            counts += [min(outputs, rows - first) for first in range(0, rows, outputs)]
        scales = scales.repeat_interleave(torch.tensor(counts, device=scales.device), 0)
        scales = scales.repeat_interleave(inputs, 1)[:, : weight.shape[1]]
        self.keep(layer, *quantize_tokens(weight.float() * scales, weight.dtype))


class QuantizedAtLoad(_EightBit, Quantization):
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
        self.keep(layer, *quantize_tokens(layer.weight.data, self._format))
