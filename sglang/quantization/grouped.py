"""Integer weights with scales for groups of inputs: AWQ, GPTQ, compressed-tensors' pack-quantized.

The formats differ in what is packed how; each reader here undoes that, once, at load. What comes of
it is the same for all: W[n, k] = q[n, k] scale[g, n] + low[g, n].
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.kernels.gated_linear import gated_linear
from sglang.kernels.int4 import can_add, dequantize_int4_triton, int4_added, int4_linear
from sglang.kernels.int4_gemv import MAX_TOKENS, int4_fused_linear
from sglang.kernels.int4_weight import Int4Weight, pack_int4, pack_scales
from sglang.quantization.base import LinearMethod, StoredTensor, ignore_zeros
from sglang.quantization.cpu import CPULinear
from sglang.quantization.schemes import Scheme

if TYPE_CHECKING:
    from sglang.layers.linear import Linear
    from sglang.layers.norm import RMSNorm
    from sglang.models.checkpoint import Checkpoint


MANY_TOKENS = 2048
"""With more, dequantizing costs less than doing SwiGLU in the product's kernel saves."""


@dataclass
class GroupedWeight:
    q: torch.Tensor
    """uint8 [N, K]."""
    scales: torch.Tensor
    """float32 [groups, N]."""
    zeros: torch.Tensor
    """float32 [groups, N], whole numbers."""
    group_of: torch.Tensor | None = None
    """[K], the group of every input, where they are not in order."""


def unpack_words(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """int32, each with 32 / bits numbers along `dim`, lowest bits first -> uint8."""
    shifts = range(0, 32, bits)
    numbers = [(words >> shift & (1 << bits) - 1).to(torch.uint8) for shift in shifts]
    return torch.stack(numbers, dim + 1).flatten(dim, dim + 1)


class GroupedLinear(LinearMethod):
    def __init__(self, scheme: Scheme) -> None:
        self.scheme = scheme

    def groups(self, in_features: int) -> int:
        size = self.scheme.group_size
        if size == -1:
            return 1
        if in_features % size:
            raise ValueError(f"{in_features} inputs are no whole number of groups of {size}")
        return in_features // size

    def group_dim(self, dim: int, in_features: int) -> int | None:
        """`dim`, along which groups run, as an input dimension: None where every rank wants all
        groups, because there is one, or they are in no order."""
        return None if self.groups(in_features) == 1 or self.scheme.act_order else dim

    @abstractmethod
    def read(self, layer: Linear) -> GroupedWeight:
        """From the parameters that were loaded."""

    def finish(self, layer: Linear) -> None:
        names = [stored.suffix for stored in self.tensors(layer.in_features, 8, layer.dtype)]
        weight = self.read(layer)
        for name in names:
            delattr(layer, name)
        if layer.device.type == "cpu" or self.scheme.bits != 4:
            return self._finish_dense(layer, weight)
        self._finish_int4(layer, weight)

    def _finish_dense(self, layer: Linear, weight: GroupedWeight) -> None:
        """In floating point; on a CPU that computes in bfloat16 as int4 besides, if it can be."""
        group_of = weight.group_of
        if group_of is None:
            k = torch.arange(weight.q.shape[1], device=layer.device)
            group_of = k // (weight.q.shape[1] // len(weight.scales))
        dense = weight.q.float()
        dense -= weight.zeros[group_of].t()
        dense *= weight.scales[group_of].t()
        layer.weight = nn.Parameter(dense.to(layer.dtype), requires_grad=False)
        layer.int4 = None
        if layer.dtype == torch.bfloat16 and self.scheme.bits == 4 and weight.group_of is None:
            scales, low = weight.scales.t(), -(weight.zeros * weight.scales).t()
            CPULinear.prepare(layer, 4, (weight.q, scales, low))
        else:
            CPULinear.prepare(layer)

    def _finish_int4(self, layer: Linear, weight: GroupedWeight) -> None:
        q, num_inputs = weight.q, weight.q.shape[1]
        order = None
        if weight.group_of is not None:
            order = weight.group_of.argsort(stable=True)
            counts = weight.group_of.bincount(minlength=len(weight.scales))
            if (counts != num_inputs // len(weight.scales)).any():
                raise ValueError(
                    f"{layer.parts[0].name}: with desc_act its inputs cannot be split over ranks"
                )
            q = q[:, order]
        layer.int4 = Int4Weight(
            pack_int4(q).contiguous(),
            pack_scales(weight.scales, weight.zeros),
            num_inputs,
            num_inputs // len(weight.scales),
        )
        layer.input_order = order

    def apply(self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if layer.int4 is None:
            return CPULinear.apply(layer, x, bias)
        if layer.input_order is not None:
            x = x[:, layer.input_order]
        return int4_linear(x, layer.int4, bias)

    def apply_normed(
        self,
        layer: Linear,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        norm: RMSNorm,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer.int4 is None or layer.input_order is not None or len(x) > MAX_TOKENS:
            return super().apply_normed(layer, x, bias, norm, residual, gated)
        return int4_fused_linear(x, layer.int4, bias, residual, norm.weight, norm.eps, gated)

    def apply_gated(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:  # fmt: skip
        many = layer.int4 is not None and len(x) > MANY_TOKENS
        if many and layer.input_order is None and bias is None:
            return gated_linear(x, dequantize_int4_triton(layer.int4, x.dtype))
        return super().apply_gated(layer, x, bias)

    def apply_added(
        self, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if layer.int4 is None or layer.input_order is not None or not can_add(x, layer.int4):
            return super().apply_added(layer, x, bias, residual)
        return int4_added(x, layer.int4, bias, residual), None


class AWQLinear(GroupedLinear):
    """AutoAWQ's "gemm" layout: [K, N] with eight outputs in a word, their order interleaved."""

    ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which nibble has the outputs 0, 1, 2...

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        k, n, groups = in_features, out_features, self.groups(in_features)
        by_group = self.group_dim(0, k)
        return [
            StoredTensor("qweight", (k, n // 8), torch.int32, output_dim=1, input_dim=0),
            StoredTensor("qzeros", (groups, n // 8), torch.int32, output_dim=1, input_dim=by_group),
            StoredTensor("scales", (groups, n), torch.float32, output_dim=1, input_dim=by_group),
        ]

    def read(self, layer: Linear) -> GroupedWeight:
        q, zeros = (
            unpack_words(words, 4, 1).unflatten(1, (-1, 8))[:, :, self.ORDER].flatten(1)
            for words in (layer.qweight.data, layer.qzeros.data)
        )
        return GroupedWeight(q.t(), layer.scales.data, zeros.float())


class GPTQLinear(GroupedLinear):
    """[K, N] with several inputs in a word; of zero points several outputs."""

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        k, n, groups, bits = in_features, out_features, self.groups(in_features), self.scheme.bits
        by_group = self.group_dim(0, k)
        stored = [
            StoredTensor("qweight", (k * bits // 32, n), torch.int32, output_dim=1, input_dim=0),
            StoredTensor(
                "qzeros", (groups, n * bits // 32), torch.int32, output_dim=1, input_dim=by_group
            ),
            StoredTensor("scales", (groups, n), torch.float32, output_dim=1, input_dim=by_group),
        ]
        if self.scheme.act_order:
            stored.append(StoredTensor("g_idx", (k,), torch.int32, input_dim=0))
        return stored

    def load(self, layer: Linear, checkpoint: Checkpoint) -> None:
        super().load(layer, checkpoint)
        for part in layer.parts:
            if not self.scheme.act_order:  # stored even if it says nothing
                self._check_order(checkpoint, f"{part.name}.g_idx", layer.in_features)
            if not layer.has_bias:
                ignore_zeros(checkpoint, f"{part.name}.bias", "the model has no bias there")

    def _check_order(self, checkpoint: Checkpoint, name: str, in_features: int) -> None:
        if not checkpoint.has(name):
            return
        group_of = checkpoint.stored(name)
        in_order = torch.arange(in_features, device="cpu") * self.groups(in_features) // in_features
        if group_of.any() and (group_of != in_order).any():
            raise ValueError(f"{name} has another order than desc_act says")

    def read(self, layer: Linear) -> GroupedWeight:
        bits = self.scheme.bits
        q = unpack_words(layer.qweight.data, bits, 0).t()
        # In words, as GPTQModel does it: of a zero point of 0 one is taken from the next, too.
        ones = sum(1 << shift for shift in range(0, 32, bits))
        zeros = unpack_words(layer.qzeros.data + ones * self.scheme.zero_offset, bits, 1).float()
        group_of = None
        if self.scheme.act_order:
            group_of = _one_order(layer, layer.g_idx.data, len(zeros))
        return GroupedWeight(q, layer.scales.data, zeros, group_of)


class PackedLinear(GroupedLinear):
    """compressed-tensors' "pack-quantized": [N, K] with eight inputs in a word, less 8."""

    def tensors(
        self, in_features: int, out_features: int, dtype: torch.dtype
    ) -> list[StoredTensor]:
        k, n, groups = in_features, out_features, self.groups(in_features)
        by_group = self.group_dim(1, k)
        stored = [
            StoredTensor("weight_packed", (n, k // 8), torch.int32, output_dim=0, input_dim=1),
            StoredTensor(
                "weight_scale", (n, groups), torch.float32, output_dim=0, input_dim=by_group
            ),
        ]
        if not self.scheme.symmetric:
            stored.append(
                StoredTensor(
                    "weight_zero_point", (n // 8, groups), torch.int32, output_dim=0,
                    input_dim=by_group,
                )
            )  # fmt: skip
        if self.scheme.act_order:
            stored.append(StoredTensor("weight_g_idx", (k,), torch.int32, input_dim=0))
        return stored

    def load(self, layer: Linear, checkpoint: Checkpoint) -> None:
        super().load(layer, checkpoint)
        for part in layer.parts:
            checkpoint.ignore(f"{part.name}.weight_shape")

    def read(self, layer: Linear) -> GroupedWeight:
        q = unpack_words(layer.weight_packed.data, 4, 1)
        scales = layer.weight_scale.data.t()
        zeros = torch.full_like(scales, 8.0)
        if not self.scheme.symmetric:
            zeros = unpack_words(layer.weight_zero_point.data, 4, 0).float().t()
        group_of = None
        if self.scheme.act_order:
            group_of = _one_order(layer, layer.weight_g_idx.data, len(scales))
        return GroupedWeight(q, scales, zeros, group_of)


def _one_order(layer: Linear, group_of: torch.Tensor, groups: int) -> torch.Tensor | None:
    """[parts, K] -> [K]: layers that are fused see the same inputs, so quantizers give them the
    same order. None: their own one, as compressed-tensors says by -1."""
    if (group_of == -1).all():
        return None
    if group_of.min() < 0 or group_of.max() >= groups:
        raise ValueError(f"{layer.parts[0].name} has inputs of groups that there are not")
    if (group_of != group_of[0]).any():
        names = ", ".join(part.name for part in layer.parts)
        raise ValueError(f"{names} have their inputs in different orders, which cannot be served")
    return group_of[0].long()


METHODS = {"awq": AWQLinear, "gptq": GPTQLinear, "compressed-tensors": PackedLinear}
