"""Weights in floating point, as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang.kernels.activation import silu_and_mul
from sglang.kernels.few_linear import few_linear, is_small
from sglang.kernels.gated_linear import gated_linear
from sglang.kernels.gemv import fused_linear, is_few
from sglang.kernels.linear import add_linear, linear
from sglang.kernels.row_scale import MAX_INPUTS, RowScale, row_scale
from sglang.quantization.base import LinearMethod, Quantization, StoredTensor

if TYPE_CHECKING:
    from sglang.layers.linear import Linear
    from sglang.layers.norm import RMSNorm


class Unquantized(LinearMethod, Quantization):
    def linear(self, name: str) -> LinearMethod:
        return self

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        shape = (out_features, in_features)
        return [StoredTensor("weight", shape, dtype, output_dim=0, input_dim=1)]

    def finish(self, layer: Linear) -> None:
        layer.packed = None
        if layer.device.type == "cpu" and _onednn_can(layer.dtype):
            # oneDNN's own blocked layout: 2 to 3 times as quick as row-major at any batch size.
            # Packed for 32 rows, it is as good for 1 as for 512.
            weight = layer.weight.detach()
            layer.packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
            del layer.weight

    def take_norm(self, layer: Linear, norm: RMSNorm) -> None:
        # float16 might not hold the outputs of tokens that are not normed, a bias is not to be
        # scaled, and with several ranks the norm has a sum to make anyway.
        fits = layer.dtype == torch.bfloat16 and layer.bias is None
        is_quicker = layer.in_features <= MAX_INPUTS and layer.parts[0].shard.size == 1
        if layer.device.type == "cuda" and fits and is_quicker:
            norm.move_weight_into(layer.weight)

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if is_few(x):
            return fused_linear(x, layer.weight, bias)[0]
        if layer.packed is None:
            return linear(x, layer.weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, layer.packed, bias, "none", [], "")

    def apply_normed(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if is_few(x):
            return fused_linear(x, layer.weight, bias, residual, norm.weight, norm.eps, gated)
        if layer.packed is None and residual is None and is_small(x, layer.weight):
            return few_linear(x, layer.weight, bias, norm.weight, norm.eps, gated), x
        if gated and residual is None and (scale := self._scale_of(x, norm)) is not None:
            return silu_and_mul(linear(x, layer.weight), scale), x
        return super().apply_normed(layer, x, bias, norm, residual, gated)

    def apply_unscaled(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, RowScale | None]:
        scale = self._scale_of(x, norm) if residual is None else None
        if scale is None or is_few(x) or is_small(x, layer.weight):
            return super().apply_unscaled(layer, x, bias, norm, residual)
        return linear(x, layer.weight), x, scale

    def _scale_of(self, x: torch.Tensor, norm: RMSNorm) -> RowScale | None:
        """What outputs of x without the norm are to be multiplied by, if that is the quick way."""
        return row_scale(x, norm.eps) if norm.is_plain else None

    def apply_gated(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        if layer.packed is None and bias is None:
            return gated_linear(x, layer.weight)
        return super().apply_gated(layer, x, bias)

    def apply_added(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if layer.packed is None and not is_few(x):
            if is_small(x, layer.weight):
                return few_linear(x, layer.weight, bias, added=residual), None
            if bias is None:
                return add_linear(residual, x, layer.weight), None
        return super().apply_added(layer, x, bias, residual)


def _onednn_can(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32
