"""4-bit weights (int4_weight.py) in registers, from which tensor cores take them as their left
operand, in Gluon on Hopper. A thread loads what its own weights are made of: lane l of a warp has
the rows l / 4 and l / 4 + 8 of 16, and the words 2 (l % 4) and the next one of a block.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sglang.kernels.int4_weight import (
    BFLOAT16_ASM,
    BFLOAT16_SCALE_ASM,
    CONSTRAINTS,
    FLOAT16_ASM,
    FLOAT16_SCALE_ASM,
    MINUS_64_ASM,
    MINUS_128_ASM,
    MINUS_1024_ASM,
    SCALED_BFLOAT16_ASM,
    SCALED_CONSTRAINTS,
    SCALED_FLOAT16_ASM,
)

ROWS = gl.constexpr(64)
"""Of weights, in a group of four warps."""
INPUTS = gl.constexpr(128)
"""Of a row, at a time."""

WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [8, 0], [0, 8]],
        [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 16],
    )
)
"""int32 [ROWS, INPUTS / 8]."""


@gluon.constexpr_function
def scales_layout(groups):
    """Of [groups, ROWS]."""
    registers = [[0, 8]] + [[1 << i, 0] for i in range(groups.bit_length() - 1)]
    lanes = [[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 16], [0, 32]], [], [groups, 64])


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
    IS_HALF: gl.constexpr,
):  # fmt: skip
    """A block, int32 [ROWS, 8] -> int32 [ROWS, 32], pairs of weights. `first` of the inputs."""
    scale, zero = of_group(scales, first // GROUP)
    high_scale, high_zero = of_group(scales, (first + 32) // GROUP)
    zero = _twice(zero, MINUS_1024_ASM if IS_HALF else MINUS_128_ASM, words)
    high_zero = _twice(high_zero, MINUS_64_ASM if IS_HALF else MINUS_128_ASM, words)
    if SCALED:
        SCALE_ASM: gl.constexpr = FLOAT16_SCALE_ASM if IS_HALF else BFLOAT16_SCALE_ASM
        a, b, c, d = gl.inline_asm_elementwise(
            SCALED_FLOAT16_ASM if IS_HALF else SCALED_BFLOAT16_ASM,
            SCALED_CONSTRAINTS,
            [words, zero, high_zero, _twice(scale, SCALE_ASM, words),
             _twice(high_scale, SCALE_ASM, words)],
            dtype=(gl.int32,) * 4,
            is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            FLOAT16_ASM if IS_HALF else BFLOAT16_ASM,
            CONSTRAINTS,
            [words, zero, high_zero],
            dtype=(gl.int32,) * 4,
            is_pure=True,
            pack=1,
        )
    of_lanes = gl.join(gl.join(a, b), gl.join(c, d)).reshape([ROWS, 4, 2, 2, 2])
    return of_lanes.permute((0, 4, 2, 3, 1)).reshape([ROWS, 32])


@gluon.jit
def dequantize(
    words, scales, GROUP: gl.constexpr, SCALED: gl.constexpr, dtype: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """int32 [ROWS, INPUTS / 8], scales [groups, ROWS] -> weights [ROWS, INPUTS]; not SCALED:
    what is to be multiplied with a group's scales."""
    IS_HALF: gl.constexpr = dtype == gl.float16
    left, right = words.reshape([ROWS, 2, 8]).permute((0, 2, 1)).split()
    left = _pairs(left, scales, 0, GROUP, SCALED, IS_HALF)
    right = _pairs(right, scales, INPUTS // 2, GROUP, SCALED, IS_HALF)
    pairs = gl.join(left, right).permute((0, 2, 1)).reshape([ROWS, INPUTS // 2])
    first = pairs.to(gl.int16).to(dtype, bitcast=True)
    second = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(first, second).reshape([ROWS, INPUTS]), LAYOUT)
