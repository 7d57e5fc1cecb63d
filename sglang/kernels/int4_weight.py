"""4-bit weights: W[n, k] = (q[n, k] - zero[g, n]) scale[g, n], g being the group of the input k.

One layout, whatever the checkpoint's was. A row of W is cut into blocks of 64 inputs; byte j of a
block's 32 holds the nibbles of two inputs that are half a block apart, so a tile of bytes becomes
two tiles of weights, each multiplied with its own inputs, and nothing has to be interleaved:

    inputs   0 1 2 ... 31 | 32 33 ... 63      byte j = q[j] | q[j + 32] << 4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

BLOCK = 64
"""Inputs that are packed together; a row is filled up to a multiple of it."""


@dataclass
class Int4Weight:
    packed: torch.Tensor
    """uint8 [N, K / 2], K a multiple of BLOCK."""
    scales: torch.Tensor
    """int32 [groups, N], from pack_scales: words of four bytes can be loaded asynchronously."""
    num_inputs: int
    """Before filling up."""
    group_size: int
    """Inputs that share a scale: a multiple of 32."""


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Integers 0..15 [N, K] of any dtype -> uint8 [N, K / 2], K filled up with zeros."""
    q = F.pad(q.to(torch.uint8), (0, -q.shape[1] % BLOCK))
    low, high = q.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def pack_scales(scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """Scales and zero points 0..16, of one shape -> int32. A scale is a float32 whose last five
    bits are the zero point: what has been a float16 or bfloat16 has zeros there anyway."""
    return scales.float().contiguous().view(torch.int32) & -32 | zeros.to(torch.int32)


def unpack_scales(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 -> (scales, zero points), float32."""
    return (words & -32).view(torch.float32), (words & 31).float()


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K]."""
    blocks = packed.unflatten(1, (-1, BLOCK // 2))
    return torch.stack((blocks & 15, blocks >> 4), 2).flatten(1)


def dequantize_int4_naive(w: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K], computed in float32."""
    q = unpack_int4(w.packed)[:, : w.num_inputs]
    words = w.scales.repeat_interleave(w.group_size, 0)[: w.num_inputs].t().contiguous()
    scales, zeros = unpack_scales(words)
    return ((q.float() - zeros) * scales).to(dtype)


# --- in kernels -----------------------------------------------------------------------------------


@triton.jit
def scale_and_zero(word):
    """int32 -> (scale, zero point), float32."""
    return (word & -32).to(tl.float32, bitcast=True), (word & 31).to(tl.float32)


# Nibbles to numbers, four bytes at a time. A nibble in the low bits of a float16's mantissa, below
# the exponent of 1024, is the number 1024 + q: one instruction makes two numbers, and one more
# takes away 1024 and the zero point. bfloat16: 128 + q.
# (Kim et al., "Who says elephants can't run", 2022.) In registers of two numbers each:
#   $0 .. $3   of the low nibbles the numbers 0 1 and 2 3, of the high ones 0 1 and 2 3
#   $4         the bytes
#   $5 .. $8   what to add to $0 .. $3
_FLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, b, s, k;
mov.b32 k, 0x64006400;
mov.b32 s, 0x2c002c00;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
lop3.b32 $0, a, 0x000f000f, k, 0xea;
lop3.b32 $1, b, 0x000f000f, k, 0xea;
lop3.b32 $2, a, 0x00f000f0, k, 0xea;
lop3.b32 $3, b, 0x00f000f0, k, 0xea;
add.rn.f16x2 $0, $0, $5;
add.rn.f16x2 $1, $1, $6;
fma.rn.f16x2 $2, $2, s, $7;
fma.rn.f16x2 $3, $3, s, $8;
}""")
_BFLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, b, c, d, s, k;
mov.b32 k, 0x43004300;
mov.b32 s, 0x3f803f80;
prmt.b32 a, $4, 0, 0x4140;
prmt.b32 b, $4, 0, 0x4342;
shr.b32 c, a, 4;
shr.b32 d, b, 4;
lop3.b32 $0, a, 0x000f000f, k, 0xea;
lop3.b32 $1, b, 0x000f000f, k, 0xea;
lop3.b32 $2, c, 0x000f000f, k, 0xea;
lop3.b32 $3, d, 0x000f000f, k, 0xea;
fma.rn.bf16x2 $0, $0, s, $5;
fma.rn.bf16x2 $1, $1, s, $6;
fma.rn.bf16x2 $2, $2, s, $7;
fma.rn.bf16x2 $3, $3, s, $8;
}""")
# Early clobber: outputs are written before the last input is read.
_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")


def _and_multiply(unpack: tl.constexpr, kind: str) -> tl.constexpr:
    """The same numbers times $9, those of the low nibbles, and $10."""
    products = [f"mul.rn.{kind} ${i}, ${i}, ${9 + i // 2};" for i in range(4)]
    return tl.constexpr("\n".join([unpack.value[:-1], *products, "}"]))


DEQUANTIZE_FLOAT16 = _and_multiply(_FLOAT16_ASM, "f16x2")
DEQUANTIZE_BFLOAT16 = _and_multiply(_BFLOAT16_ASM, "bf16x2")
DEQUANTIZE_CONSTRAINTS = tl.constexpr(_CONSTRAINTS.value + ",r,r")


@triton.jit
def unpack_nibbles(packed, zero_low, zero_high, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """uint8 tile, zero points of the same shape -> (low - zero_low, high - zero_high), exact."""
    if ASM and tl.float16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            _FLOAT16_ASM,
            _CONSTRAINTS,
            [packed, (-1024.0 - zero_low).to(DTYPE), (-64.0 - zero_high).to(DTYPE)],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    elif ASM and tl.bfloat16 == DTYPE:
        low, high = tl.inline_asm_elementwise(
            _BFLOAT16_ASM,
            _CONSTRAINTS,
            [packed, (-128.0 - zero_low).to(DTYPE), (-128.0 - zero_high).to(DTYPE)],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15).to(tl.float32) - zero_low).to(DTYPE)
        high = ((packed >> 4).to(tl.float32) - zero_high).to(DTYPE)
    return low, high


# The same of two bytes, which hold two pairs of weights, and times a scale. A pair stays in one
# register, as tensor cores want it, so there is nothing to shuffle.
_PAIRS_FLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, k, t;
.reg .b16 h;
mov.b32 k, 0x64006400;
prmt.b32 a, $2, 0, 0x4140;
lop3.b32 $0, a, 0x000f000f, k, 0xea;
lop3.b32 $1, a, 0x00f000f0, k, 0xea;
mov.b32 k, 0x2c002c00;
mov.b32 {h, _}, $3;
mov.b32 t, {h, h};
add.rn.f16x2 $0, $0, t;
mov.b32 {h, _}, $4;
mov.b32 t, {h, h};
fma.rn.f16x2 $1, $1, k, t;
mov.b32 {h, _}, $5;
mov.b32 t, {h, h};
mul.rn.f16x2 $0, $0, t;
mov.b32 {h, _}, $6;
mov.b32 t, {h, h};
mul.rn.f16x2 $1, $1, t;
}""")
_PAIRS_BFLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, b, k, t;
.reg .b16 h;
mov.b32 k, 0x43004300;
prmt.b32 a, $2, 0, 0x4140;
shr.b32 b, a, 4;
lop3.b32 $0, a, 0x000f000f, k, 0xea;
lop3.b32 $1, b, 0x000f000f, k, 0xea;
mov.b32 k, 0x3f803f80;
mov.b32 {h, _}, $3;
mov.b32 t, {h, h};
fma.rn.bf16x2 $0, $0, k, t;
mov.b32 {h, _}, $4;
mov.b32 t, {h, h};
fma.rn.bf16x2 $1, $1, k, t;
mov.b32 k, 0x80008000;
mov.b32 {h, _}, $5;
mov.b32 t, {h, h};
fma.rn.bf16x2 $0, $0, t, k;
mov.b32 {h, _}, $6;
mov.b32 t, {h, h};
fma.rn.bf16x2 $1, $1, t, k;
}""")


@triton.jit
def _halves(pairs, DTYPE: tl.constexpr):
    """int32 [N, W] -> [N, W, 2]."""
    first = pairs.to(tl.int16).to(DTYPE, bitcast=True)
    second = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.join(first, second)


@triton.jit
def dequantize_words(words, scales, high_scales, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """int16 [N, K / 4], two bytes each; from pack_scales, int32 [N], those of the low nibbles and
    those of the high ones -> weights [N, K]. 16-bit types are multiplied with a scale of the type.
    """
    SHAPE: tl.constexpr = words.shape
    scale, zero = scale_and_zero(scales[:, None])
    high_scale, high_zero = scale_and_zero(high_scales[:, None])
    if ASM and (tl.float16 == DTYPE or tl.bfloat16 == DTYPE):
        HALF: tl.constexpr = tl.float16 == DTYPE
        low, high = tl.inline_asm_elementwise(
            _PAIRS_FLOAT16_ASM if HALF else _PAIRS_BFLOAT16_ASM,
            "=&r,=&r,r,r,r,r,r",
            [
                words,
                tl.broadcast_to(((-1024.0 if HALF else -128.0) - zero).to(DTYPE), SHAPE),
                tl.broadcast_to(((-64.0 if HALF else -128.0) - high_zero).to(DTYPE), SHAPE),
                tl.broadcast_to(scale.to(DTYPE), SHAPE),
                tl.broadcast_to(high_scale.to(DTYPE), SHAPE),
            ],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        low, high = _halves(low, DTYPE), _halves(high, DTYPE)
    else:
        w = words.to(tl.int32)
        low = tl.join((w & 15).to(tl.float32), (w >> 8 & 15).to(tl.float32))
        high = tl.join((w >> 4 & 15).to(tl.float32), (w >> 12 & 15).to(tl.float32))
        low = ((low - zero[:, :, None]) * scale[:, :, None]).to(DTYPE)
        high = ((high - high_zero[:, :, None]) * high_scale[:, :, None]).to(DTYPE)
    low = low.reshape(SHAPE[0], SHAPE[1] // 16, 32)
    high = high.reshape(SHAPE[0], SHAPE[1] // 16, 32)
    return tl.join(low, high).permute(0, 1, 3, 2).reshape(SHAPE[0], SHAPE[1] * 4)
