"""Quantized layers on a CPU: as they are stored for a few tokens, in floating point for many.

With a few tokens a product takes as long as its weights take to be read, and those of 4 bits are an
eighth of float32's; with many, dequantizing inside the product costs more than it saves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.kernels import cpu
from sglang.quantization.unquantized import Unquantized

if TYPE_CHECKING:
    from sglang.layers.linear import Linear

_UNQUANTIZED = Unquantized()


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class CPULinear:
    """What a method does with `layer.weight`, [N, K] in floating point, and maybe a form of it in 4
    or 8 bits."""

    @classmethod
    def prepare(cls, layer: Linear, bits: int = 0, stored: tuple[torch.Tensor, ...] = ()) -> None:
        """stored: (q uint8 [N, K] of so many bits, scales [N, groups], low [N, groups]),
        W = q scale + low."""
        layer.blocks = None
        if bits and cpu.library() is not None:
            layer.blocks = cpu.pack_blocks(*stored, bits)
        dtype = layer.dtype
        layer.compute_dtype = dtype
        on_cpu = layer.device.type == "cpu"  # 8-bit GPTQ is dequantized on a GPU, too
        if on_cpu and dtype == torch.bfloat16 and not has_bfloat16_units():
            layer.compute_dtype = torch.float32
        weight = layer.weight.to(layer.compute_dtype)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.dtype = layer.compute_dtype
        _UNQUANTIZED.finish(layer)
        layer.dtype = dtype

    @classmethod
    def apply(cls, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if layer.blocks is not None and len(x) <= cpu.FEW_TOKENS:
            bias = None if bias is None else bias.float()
            return cpu.linear(x.float(), layer.blocks, bias).to(x.dtype)
        if layer.compute_dtype == x.dtype:
            return _UNQUANTIZED.apply(layer, x, bias)
        out = _UNQUANTIZED.apply(layer, x.to(layer.compute_dtype), None).to(x.dtype)
        return out if bias is None else out + bias
