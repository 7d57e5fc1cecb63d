"""4-bit weights: W[n, k] = (q[n, k] - zero[g, n]) scale[g, n], g being the group of the input k.

One layout, whatever the checkpoint's was: that in which tensor cores want weights in registers. Of
16 inputs in a row the lane c of four has those at 2 c, 2 c + 1, 2 c + 8 and 2 c + 9. So a row of W
is cut into blocks of 64 inputs, a block into eight words, two for each lane, and a word has a
lane's share of 16 inputs in the first half of the block and of those that are 32 further:

    word 2 c + t     i = 16 t + 2 c
    nibble           0    1       2      3       4      5       6      7
    input            i    i + 32  i + 8  i + 40  i + 1  i + 33  i + 9  i + 41

Nibbles that are half a word apart become the two numbers of a register, and nothing has to be
interleaved.
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
    low, high = q.unflatten(1, (-1, 2, 2, 2, 4, 2)).permute(2, 0, 1, 5, 3, 6, 4)
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
    nibbles = torch.stack((packed & 15, packed >> 4)).unflatten(2, (-1, 4, 2, 2, 2))
    return nibbles.permute(1, 2, 0, 4, 6, 3, 5).flatten(1)


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


# Nibbles to numbers, a word at a time. A nibble in the low bits of a float16's mantissa, below the
# exponent of 1024, is the number 1024 + q: one instruction makes two numbers, and one more takes
# away 1024 and the zero point. bfloat16: 128 + q.
# (Kim et al., "Who says elephants can't run", 2022.) In registers of two numbers each:
#   $0 .. $3   those of the nibbles 0 and 4, 2 and 6, 1 and 5, 3 and 7
#   $4         the word
#   $5, $6     what to add to $0 and $1, and to $2 and $3, twice
FLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, k, s;
mov.b32 k, 0x64006400;
mov.b32 s, 0x2c002c00;
shr.b32 a, $4, 8;
lop3.b32 $0, $4, 0x000f000f, k, 0xea;
lop3.b32 $1, a, 0x000f000f, k, 0xea;
lop3.b32 $2, $4, 0x00f000f0, k, 0xea;
lop3.b32 $3, a, 0x00f000f0, k, 0xea;
add.rn.f16x2 $0, $0, $5;
add.rn.f16x2 $1, $1, $5;
fma.rn.f16x2 $2, $2, s, $6;
fma.rn.f16x2 $3, $3, s, $6;
}""")
BFLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, b, c, k, s;
mov.b32 k, 0x43004300;
mov.b32 s, 0x3f803f80;
shr.b32 a, $4, 8;
shr.b32 b, $4, 4;
shr.b32 c, $4, 12;
lop3.b32 $0, $4, 0x000f000f, k, 0xea;
lop3.b32 $1, a, 0x000f000f, k, 0xea;
lop3.b32 $2, b, 0x000f000f, k, 0xea;
lop3.b32 $3, c, 0x000f000f, k, 0xea;
fma.rn.bf16x2 $0, $0, s, $5;
fma.rn.bf16x2 $1, $1, s, $5;
fma.rn.bf16x2 $2, $2, s, $6;
fma.rn.bf16x2 $3, $3, s, $6;
}""")


def _and_multiply(asm: tl.constexpr, product: str) -> tl.constexpr:
    """The same numbers times $7, those of $0 and $1, and $8, which are there twice, too."""
    products = [product.format(f"${i}, ${i}, ${7 + i // 2}") for i in range(4)]
    return tl.constexpr("\n".join([asm.value[:-1], *products, "}"]))


# Early clobber: outputs are written before the last input is read.
CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,r,r,r")

SCALED_FLOAT16_ASM = _and_multiply(FLOAT16_ASM, "mul.rn.f16x2 {};")
# Plus -0, which changes nothing: before Hopper there is no product of bfloat16 alone.
SCALED_BFLOAT16_ASM = _and_multiply(
    BFLOAT16_ASM, "{{.reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 {}, none;}}"
)
SCALED_CONSTRAINTS = tl.constexpr(CONSTRAINTS.value + ",r,r")


# What to add and to multiply with, in one instruction each: two equal numbers of a 16-bit type.
# A zero point z goes into the mantissa of -1024 - z, of -64 - z (float16) or -128 - z (bfloat16).
MINUS_1024_ASM = tl.constexpr("mad.lo.u32 $0, $1, 0x00010001, 0xe400e400;")
MINUS_64_ASM = tl.constexpr("mad.lo.u32 $0, $1, 0x00100010, 0xd400d400;")
MINUS_128_ASM = tl.constexpr("mad.lo.u32 $0, $1, 0x00010001, 0xc300c300;")
FLOAT16_SCALE_ASM = tl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")
BFLOAT16_SCALE_ASM = tl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")


@triton.jit
def _twice(values, asm: tl.constexpr, like):
    """Four bytes each -> int32, like that tensor."""
    pairs = tl.inline_asm_elementwise(asm, "=r,r", [values], dtype=tl.int32, is_pure=True, pack=1)
    return tl.broadcast_to(pairs, like.shape)


@triton.jit
def _pairs(words, scales, high_scales, IS_HALF: tl.constexpr, SCALED: tl.constexpr):
    """Arguments of dequantize_words -> pairs of weights, int32, of a word's nibbles 0 and 4, 2 and
    6, 1 and 5, 3 and 7."""
    zero = _twice(scales & 31, MINUS_1024_ASM if IS_HALF else MINUS_128_ASM, words)
    high_zero = _twice(high_scales & 31, MINUS_64_ASM if IS_HALF else MINUS_128_ASM, words)
    if SCALED:
        SCALE_ASM: tl.constexpr = FLOAT16_SCALE_ASM if IS_HALF else BFLOAT16_SCALE_ASM
        scale = _twice((scales & -32).to(tl.float32, bitcast=True), SCALE_ASM, words)
        high_scale = _twice((high_scales & -32).to(tl.float32, bitcast=True), SCALE_ASM, words)
        return tl.inline_asm_elementwise(
            SCALED_FLOAT16_ASM if IS_HALF else SCALED_BFLOAT16_ASM,
            SCALED_CONSTRAINTS,
            [words, zero, high_zero, scale, high_scale],
            dtype=(tl.int32,) * 4,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.inline_asm_elementwise(
            FLOAT16_ASM if IS_HALF else BFLOAT16_ASM,
            CONSTRAINTS,
            [words, zero, high_zero],
            dtype=(tl.int32,) * 4,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _nibbles(words, zero, high_zero, FIRST: tl.constexpr):
    """Of the nibbles FIRST, FIRST + 2, FIRST + 1 and FIRST + 3, without scales, float32."""
    a = (words >> FIRST * 4 & 15).to(tl.float32) - zero
    b = (words >> FIRST * 4 + 8 & 15).to(tl.float32) - zero
    c = (words >> FIRST * 4 + 4 & 15).to(tl.float32) - high_zero
    d = (words >> FIRST * 4 + 12 & 15).to(tl.float32) - high_zero
    return a, b, c, d


@triton.jit
def _times(four, scale, high_scale):
    return four[0] * scale, four[1] * scale, four[2] * high_scale, four[3] * high_scale


@triton.jit
def _in_order(four):
    """What words have for pairs of inputs, [N, W] each, as _pairs has it -> [N, 4 W]."""
    N: tl.constexpr = four[0].shape[0]
    W: tl.constexpr = four[0].shape[1]
    of_lanes = tl.join(tl.join(four[0], four[1]), tl.join(four[2], four[3]))
    of_lanes = of_lanes.reshape(N, W // 8, 4, 2, 2, 2)
    return of_lanes.permute(0, 1, 5, 3, 4, 2).reshape(N, 4 * W)


@triton.jit
def dequantize_words(
    words, scales, high_scales, SCALED: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr
):
    """int32 [N, W]; from pack_scales, [N, W] or what becomes that, those of inputs in the first
    half of a block and in the second -> weights [N, 8 W]. 16-bit types are multiplied with a scale
    of the type. Not SCALED: what is to be multiplied with scales, exact."""
    if ASM and (tl.float16 == DTYPE or tl.bfloat16 == DTYPE):
        pairs = _in_order(_pairs(words, scales, high_scales, tl.float16 == DTYPE, SCALED))
        first = pairs.to(tl.int16).to(DTYPE, bitcast=True)
        second = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    else:
        scale, zero = scale_and_zero(scales)
        high_scale, high_zero = scale_and_zero(high_scales)
        first = _nibbles(words, zero, high_zero, 0)
        second = _nibbles(words, zero, high_zero, 4)
        if SCALED:
            first = _times(first, scale, high_scale)
            second = _times(second, scale, high_scale)
        first, second = _in_order(first).to(DTYPE), _in_order(second).to(DTYPE)
    return tl.join(first, second).reshape(words.shape[0], 8 * words.shape[1])
