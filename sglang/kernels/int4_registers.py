"""4-bit weights (int4_weight.py) in registers, from which tensor cores take them as their left
operand, in Gluon on Hopper. A thread loads what its own weights are made of: lane l of a warp has
the rows l / 4 and l / 4 + 8 of 16, and of 8 inputs 2 (l % 4) and the next one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(64)
"""Of weights, in a group of four warps."""
INPUTS = gl.constexpr(128)
"""Of a row, at a time."""

WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0], [0, 4], [0, 8], [0, 16]],
        [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 32],
    )
)
"""Of two bytes each, int16 [ROWS, INPUTS / 4]."""


@gluon.constexpr_function
def scales_layout(groups):
    """Of [groups, ROWS]."""
    registers = [[0, 8]] + [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    lanes = [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 16], [0, 32]], [], [groups, 64])


# As int4_weight.py's, of two bytes.
#   $0, $1   of the low nibbles and of the high ones two numbers
#   $2       the bytes
#   $3, $4   what to add to $0 and $1, twice
_FLOAT16_ASM = gl.constexpr("""{
.reg .b32 a, k, s;
mov.b32 k, 0x64006400;
mov.b32 s, 0x2c002c00;
prmt.b32 a, $2, 0, 0x4140;
lop3.b32 $0, a, 0x000f000f, k, 0xea;
lop3.b32 $1, a, 0x00f000f0, k, 0xea;
add.rn.f16x2 $0, $0, $3;
fma.rn.f16x2 $1, $1, s, $4;
}""")
_BFLOAT16_ASM = gl.constexpr("""{
.reg .b32 a, b, k, s;
mov.b32 k, 0x43004300;
mov.b32 s, 0x3f803f80;
prmt.b32 a, $2, 0, 0x4140;
shr.b32 b, a, 4;
lop3.b32 $0, a, 0x000f000f, k, 0xea;
lop3.b32 $1, b, 0x000f000f, k, 0xea;
fma.rn.bf16x2 $0, $0, s, $3;
fma.rn.bf16x2 $1, $1, s, $4;
}""")


def _and_multiply(asm: gl.constexpr, kind: str) -> gl.constexpr:
    """The same numbers times $5 and $6, which are there twice, too."""
    return gl.constexpr(f"{asm.value[:-1]}mul.rn.{kind} $0, $0, $5;\nmul.rn.{kind} $1, $1, $6;\n}}")


_SCALED_FLOAT16_ASM = _and_multiply(_FLOAT16_ASM, "f16x2")
_SCALED_BFLOAT16_ASM = _and_multiply(_BFLOAT16_ASM, "bf16x2")


# What to add and to multiply with, in one instruction each: two equal numbers of a 16-bit type.
# A zero point z goes into the mantissa of -1024 - z, of -64 - z (float16) or -128 - z (bfloat16).
_MINUS_1024_ASM = gl.constexpr("mad.lo.u32 $0, $1, 0x00010001, 0xe400e400;")
_MINUS_64_ASM = gl.constexpr("mad.lo.u32 $0, $1, 0x00100010, 0xd400d400;")
_MINUS_128_ASM = gl.constexpr("mad.lo.u32 $0, $1, 0x00010001, 0xc300c300;")
_FLOAT16_SCALE_ASM = gl.constexpr("cvt.rn.f16x2.f32 $0, $1, $1;")
_BFLOAT16_SCALE_ASM = gl.constexpr("cvt.rn.bf16x2.f32 $0, $1, $1;")


@gluon.jit
def _twice(values, asm: gl.constexpr, like):
    """[ROWS] of four bytes -> int32, like that tensor."""
    pairs = gl.inline_asm_elementwise(asm, "=r,r", [values], dtype=gl.int32, is_pure=True, pack=1)
    pairs = gl.convert_layout(pairs, gl.SliceLayout(1, like.type.layout), assert_trivial=True)
    return gl.expand_dims(pairs, 1).broadcast_to(like.shape)


@gluon.jit
def of_group(scales, g: gl.constexpr):
    """From [groups, ROWS] -> (scales, float32 [ROWS], zero points, int32 [ROWS])."""
    group = gl.arange(0, scales.shape[0], layout=gl.SliceLayout(1, scales.type.layout))[:, None]
    word = gl.sum(gl.where(group == g, scales, 0), 0)
    return (word & -32).to(gl.float32, bitcast=True), word & 31


@gluon.jit
def _pairs(
    words, scales, first: gl.constexpr, GROUP: gl.constexpr, SCALED: gl.constexpr,
    dtype: gl.constexpr,
):  # fmt: skip
    """int32 [ROWS, 16], two bytes each -> int32 [ROWS, 32], pairs of weights. `first` of the
    inputs."""
    IS_HALF: gl.constexpr = dtype == gl.float16
    SCALE_ASM: gl.constexpr = _FLOAT16_SCALE_ASM if IS_HALF else _BFLOAT16_SCALE_ASM
    scale, zero = of_group(scales, first // GROUP)
    high_scale, high_zero = of_group(scales, (first + 32) // GROUP)
    zero = _twice(zero, _MINUS_1024_ASM if IS_HALF else _MINUS_128_ASM, words)
    high_zero = _twice(high_zero, _MINUS_64_ASM if IS_HALF else _MINUS_128_ASM, words)
    if SCALED:
        scale = _twice(scale, SCALE_ASM, words)
        high_scale = _twice(high_scale, SCALE_ASM, words)
        low, high = gl.inline_asm_elementwise(
            _SCALED_FLOAT16_ASM if IS_HALF else _SCALED_BFLOAT16_ASM,
            "=&r,=&r,r,r,r,r,r",
            [words, zero, high_zero, scale, high_scale],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = gl.inline_asm_elementwise(
            _FLOAT16_ASM if IS_HALF else _BFLOAT16_ASM,
            "=&r,=&r,r,r,r",
            [words, zero, high_zero],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    return gl.join(low, high).permute((0, 2, 1)).reshape([ROWS, 32])


@gluon.jit
def dequantize(
    words, scales, GROUP: gl.constexpr, SCALED: gl.constexpr, dtype: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """int16 [ROWS, INPUTS / 4], scales [groups, ROWS] -> weights [ROWS, INPUTS]; not SCALED:
    what is to be multiplied with a group's scales."""
    left, right = words.to(gl.int32).reshape([ROWS, 2, 16]).permute((0, 2, 1)).split()
    left = _pairs(left, scales, 0, GROUP, SCALED, dtype)
    right = _pairs(right, scales, INPUTS // 2, GROUP, SCALED, dtype)
    pairs = gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, INPUTS // 2])
    first = pairs.to(gl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(first, second).reshape([ROWS, INPUTS]), LAYOUT)
