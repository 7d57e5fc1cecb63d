"""Quantized layers on a CPU: as int4 for a few tokens, as floating point for many.

With a few tokens a product takes as long as its weights take to be read, and int4 ones are a
quarter of bfloat16's; with many, dequantizing inside the product costs more than it saves.
Weights of a layer without int4 may be in 16 bits.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.quantization.unquantized import Unquantized

if TYPE_CHECKING:
    from sglang.layers.linear import Linear

_UNQUANTIZED = Unquantized()
_LARGE = 1 << 22
"""So many weights are worth a thread that packs them."""


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def has_float16_weights() -> bool:
    """Whether torch multiplies float32 by float16 weights quickly here, which FBGEMM does."""
    return torch.backends.quantized.engine in ("x86", "fbgemm")


class CPULinear:
    """What a method does with `layer.weight`, [N, K] in floating point, and maybe an int4 form."""

    INT4_TOKENS = 4 if has_bfloat16_units() else 16
    """Up to here int4 is quicker."""

    @classmethod
    def prepare(
        cls,
        layer: Linear,
        int4: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        in_16_bits: bool = False,
    ) -> None:
        """int4: (q uint8 [N, K], scales [groups, N], low [groups, N]), W = q scale + low.
        in_16_bits: other products are in bfloat16, whatever the activations are, on a CPU that has
        units for it; on others in float32, with float16 weights if there is no int4. Otherwise they
        are in the layer's dtype."""
        layer.int4_packed = layer.float16_packed = None
        layer.compute_dtype = layer.dtype
        if int4 is not None and _fits(*int4):
            q, scales, low = int4
            layer.int4_group = q.shape[1] // len(scales)
            layer.int4_packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
            # torch's zero point is what 8 stands for.
            pair = torch.stack((scales, low + 8 * scales), 2)
            layer.int4_scales = pair.bfloat16().contiguous()  # [groups, N, 2]
        if in_16_bits and has_bfloat16_units():
            layer.compute_dtype = torch.bfloat16
        elif in_16_bits and layer.int4_packed is None and has_float16_weights():
            layer.float16_packed = _pack_float16(layer.weight.detach())
            del layer.weight
            return
        elif in_16_bits:
            layer.compute_dtype = torch.float32
        use = layer.compute_dtype
        layer.weight = nn.Parameter(layer.weight.to(use), requires_grad=False)
        dtype, layer.dtype = layer.dtype, use
        _UNQUANTIZED.finish(layer)
        layer.dtype = dtype

    @classmethod
    def apply(cls, layer: Linear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if layer.int4_packed is not None and len(x) <= cls.INT4_TOKENS:
            out = torch.ops.aten._weight_int4pack_mm_for_cpu(
                x.bfloat16(), layer.int4_packed, layer.int4_group, layer.int4_scales
            )
        elif layer.float16_packed is not None:
            out = _float16_linear(x.float(), layer.float16_packed)
        elif layer.compute_dtype == x.dtype:
            return _UNQUANTIZED.apply(layer, x, bias)
        else:
            out = _UNQUANTIZED.apply(layer, x.to(layer.compute_dtype), None)
        out = out.to(x.dtype)
        return out if bias is None else out + bias


def _pack_float16(weight: torch.Tensor) -> list[torch.ScriptObject]:
    """[N, K] -> what FBGEMM makes of its rows, in pieces: a thread packs 25 million weights a
    second."""
    pieces = weight.chunk(min(torch.get_num_threads(), 1 + weight.numel() // _LARGE))
    pack = torch.ops.quantized.linear_prepack_fp16
    with ThreadPoolExecutor(len(pieces)) as pool:
        return list(pool.map(lambda piece: pack(piece.float(), None), pieces))


def _float16_linear(x: torch.Tensor, pieces: list[torch.ScriptObject]) -> torch.Tensor:
    """x float32 [T, K] -> float32 [T, N]."""
    outs = [torch.ops.quantized.linear_dynamic_fp16(x, piece) for piece in pieces]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)


def _fits(q: torch.Tensor, scales: torch.Tensor, low: torch.Tensor) -> bool:
    """What torch's kernel takes."""
    (n, k), group = q.shape, q.shape[1] // len(scales)
    return n % 32 == 0 and k % group == 0 and group in (32, 64, 128, 256)
