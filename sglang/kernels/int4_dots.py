"""Sums of products of 4-bit weights and one token, on tensor cores.

As operands they take registers as loads fill them. A lane has a chunk of a row, 16 bytes or 32
weights, and the chunk's 32 inputs:

    lane       0 1 2 3 | 4 5 6 7 | ...    mma.m16n8k16 takes a quad of lanes for a row of its left
    chunk      0 1 2 3 | 4 5 6 7 | ...    matrix, and for a column of its right one. So it gets all
    quad          0    |    1    | ...    quads' weights times all quads' inputs, and only the
                                          diagonal, each quad's own, is ever looked at.

A nibble takes no instruction to become a number: in the last bits of a float16 it is the denormal
q 2^-24, or 16 q 2^-24 four bits further up. One AND makes two of them, and their products are exact
in float32. (bfloat16: an AND and OR makes two of 128 + q.) Zero points and scales are for the sums
of a quad, 128 inputs; if groups are smaller each half of it is multiplied by itself, with zeros for
the other one's inputs.

All this takes a tensor [C] of chunks to lie in the lanes of its warps one by one. There is no other
sensible layout of so many elements as lanes (of [C, R] there is: Triton 3.6 and 3.9 choose
differently), but nothing promises it, and the interpreter has no lanes and goes another way. The
tests on a GPU would show it: elsewhere the diagonal means nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang.kernels.int4_weight import scale_and_zero
from sglang.kernels.one_token import columns, on_diagonal

# A word of weights from each half of a tile, times the inputs of its bytes.
#   $0-$3, $4-$7    sums of the low and of the high nibbles: two columns of a row of the first half,
#                   then of the second; $14-$21 are those so far
#   $8, $9          the words
#   $10, $11        inputs of the low nibbles of the bytes 0 2 and 1 3, and
#   $12, $13        of the high ones
FLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, b, c, d, s, t;
shr.b32 s, $8, 8;
shr.b32 t, $9, 8;
and.b32 a, $8, 0x000f000f;
and.b32 b, $9, 0x000f000f;
and.b32 c, s, 0x000f000f;
and.b32 d, t, 0x000f000f;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
    {$0, $1, $2, $3}, {a, b, c, d}, {$10, $11}, {$14, $15, $16, $17};
and.b32 a, $8, 0x00f000f0;
and.b32 b, $9, 0x00f000f0;
and.b32 c, s, 0x00f000f0;
and.b32 d, t, 0x00f000f0;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
    {$4, $5, $6, $7}, {a, b, c, d}, {$12, $13}, {$18, $19, $20, $21};
}""")
BFLOAT16_ASM = tl.constexpr("""{
.reg .b32 a, b, c, d, k;
mov.b32 k, 0x43004300;
shr.b32 c, $8, 8;
shr.b32 d, $9, 8;
lop3.b32 a, $8, 0x000f000f, k, 0xea;
lop3.b32 b, $9, 0x000f000f, k, 0xea;
lop3.b32 c, c, 0x000f000f, k, 0xea;
lop3.b32 d, d, 0x000f000f, k, 0xea;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {$0, $1, $2, $3}, {a, b, c, d}, {$10, $11}, {$14, $15, $16, $17};
shr.b32 a, $8, 4;
shr.b32 b, $9, 4;
shr.b32 c, $8, 12;
shr.b32 d, $9, 12;
lop3.b32 a, a, 0x000f000f, k, 0xea;
lop3.b32 b, b, 0x000f000f, k, 0xea;
lop3.b32 c, c, 0x000f000f, k, 0xea;
lop3.b32 d, d, 0x000f000f, k, 0xea;
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    {$4, $5, $6, $7}, {a, b, c, d}, {$12, $13}, {$18, $19, $20, $21};
}""")
CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 6 + ["f"] * 8))


@triton.jit
def _sixteen(t):
    """[C, 16] -> 16 tensors [C], in order."""
    left, right = tl.split(t.reshape(t.shape[0], 2, 8).permute(0, 2, 1))
    a, b = tl.split(left.reshape(t.shape[0], 2, 4).permute(0, 2, 1))
    c, d = tl.split(right.reshape(t.shape[0], 2, 4).permute(0, 2, 1))
    return columns(a) + columns(b) + columns(c) + columns(d)


@triton.jit
def prepare(x, norm_scale, UNIT: tl.constexpr, DTYPE: tl.constexpr, TENSOR: tl.constexpr):
    """Inputs, float32 [32 C] -> (sums of those of a chunk's low nibbles, of its high ones [C], all
    of them as _dots wants them)."""
    C: tl.constexpr = x.shape[0] // 32
    part = x * norm_scale
    if TENSOR:
        part = part.to(DTYPE)
    # Blocks; halves, 16 inputs, eight; chunks, pairs, two -> chunks of pairs, word by word.
    part = part.reshape(C // 2, 2, 2, 2, 2, 2, 2).permute(0, 4, 1, 5, 2, 3, 6)
    if TENSOR:
        bits = part.to(tl.uint16, bitcast=True).to(tl.uint32)
        first, second = tl.split(bits)
        pairs = (first | second << 16).to(tl.int32, bitcast=True).reshape(C, 16)
        made = _sixteen(pairs)
        low = 0.0
        high = 0.0
        for i in tl.static_range(8):
            low += _sum_of_pair(made[i], DTYPE)
            high += _sum_of_pair(made[i + 8], DTYPE)
    else:
        low, high = tl.split(tl.sum(part.reshape(C, 2, 16), 2))
        a, b = tl.split(part.reshape(C, 2, 16).permute(0, 2, 1))
        made = _sixteen(a) + _sixteen(b)
    return low * UNIT, high * UNIT, made


@triton.jit
def _sum_of_pair(pair, DTYPE: tl.constexpr):
    first = pair.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    second = (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    return first + second


@triton.jit
def _rows(chunks):
    """From _load_chunks: (its words, its scales), four tensors [C] each, of each row."""
    words, scales = chunks
    a, b, c, d = columns(words)
    a, b, c, d = columns(a), columns(b), columns(c), columns(d)
    s, t = columns(scales[0]), columns(scales[1])
    u, v = columns(scales[2]), columns(scales[3])
    rows = ()
    for r in tl.static_range(len(a)):
        rows += (((a[r], b[r], c[r], d[r]), (s[r], t[r], u[r], v[r])),)
    return rows


@triton.jit
def _dot_naive(words, x):
    low = 0.0
    high = 0.0
    for i in tl.static_range(16):
        byte = words[i // 4] >> i % 4 * 8
        at = i // 4 * 4 + i % 2 * 2 + i % 4 // 2  # among the inputs of low nibbles
        low += (byte & 15).to(tl.float32) * x[at]
        high += (byte >> 4 & 15).to(tl.float32) * x[16 + at]
    return low, high


@triton.jit
def _dots(first, second, x, DTYPE: tl.constexpr, TENSOR: tl.constexpr):
    """The words of a row of each half of a tile -> sums of their low nibbles, of their high ones
    [C]: (first low, second low, first high, second high). The sum of a quad is in one of its
    chunks, and the others have zeros."""
    if TENSOR:
        zero = tl.zeros(first[0].shape, tl.float32)
        sums = (zero, zero, zero, zero, zero, zero, zero, zero)
        for i in tl.static_range(4):
            low = (x[2 * i], x[2 * i + 1])
            high = (x[2 * i + 8], x[2 * i + 9])
            sums = tl.inline_asm_elementwise(
                FLOAT16_ASM if tl.float16 == DTYPE else BFLOAT16_ASM,
                CONSTRAINTS,
                (first[i], second[i]) + low + high + sums,  # noqa: RUF005 (for Triton)
                dtype=(tl.float32,) * 8,
                is_pure=False,
                pack=1,
            )
        return (
            on_diagonal(sums[0], sums[1]),
            on_diagonal(sums[2], sums[3]),
            on_diagonal(sums[4], sums[5]),
            on_diagonal(sums[6], sums[7]),
        )
    else:
        low, high = _dot_naive(first, x)
        second_low, second_high = _dot_naive(second, x)
        return low, second_low, high, second_high


@triton.jit
def _half_of(inputs, HALF: tl.constexpr):
    """The inputs of one half of each quad, with zeros for the other one's."""
    low, high, x = inputs
    here = tl.arange(0, low.shape[0]) % 4 // 2 == HALF
    masked = ()
    for i in tl.static_range(len(x)):
        masked += (tl.where(here, x[i], 0),)
    return tl.where(here, low, 0.0), tl.where(here, high, 0.0), masked


@triton.jit
def _scaled(
    low, high, scales, high_scales, inputs, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    TENSOR: tl.constexpr,
):  # fmt: skip
    """Sums of low and of high nibbles [C] -> what their weights' would be."""
    UP: tl.constexpr = 1 / 16 if TENSOR and tl.float16 == DTYPE else 1.0  # where high ones were
    OFFSET: tl.constexpr = 128.0 if TENSOR and tl.bfloat16 == DTYPE else 0.0
    scale, zero = scale_and_zero(scales)
    zero += OFFSET
    if GROUP % 64 == 0:
        return (low + high * UP - zero * (inputs[0] + inputs[1])) * scale
    else:
        high_scale, high_zero = scale_and_zero(high_scales)
        high_zero += OFFSET
        out = (low - zero * inputs[0]) * scale
        return out + (high * UP - high_zero * inputs[1]) * high_scale


@triton.jit
def times(first, second, inputs, GROUP: tl.constexpr, DTYPE: tl.constexpr, TENSOR: tl.constexpr):
    """The chunks of both halves of a tile times the inputs -> for each row float32 [C], to be added
    up."""
    HALVES: tl.constexpr = 2 if GROUP % 128 else 1
    a, b = _rows(first), _rows(second)
    outs = ()
    outs_2 = ()
    for r in tl.static_range(len(a)):
        out = 0.0
        out_2 = 0.0
        for i in tl.static_range(HALVES):
            x = inputs
            if HALVES == 2:
                x = _half_of(inputs, i)
            low, low_2, high, high_2 = _dots(a[r][0], b[r][0], x[2], DTYPE, TENSOR)
            s, t = a[r][1][2 * i], a[r][1][2 * i + 1]
            out += _scaled(low, high, s, t, x, GROUP, DTYPE, TENSOR)
            s, t = b[r][1][2 * i], b[r][1][2 * i + 1]
            out_2 += _scaled(low_2, high_2, s, t, x, GROUP, DTYPE, TENSOR)
        outs += (out,)
        outs_2 += (out_2,)
    return outs + outs_2


@triton.jit
def plus(a, b):
    sums = ()
    for i in tl.static_range(len(a)):
        sums += (a[i] + b[i],)
    return sums
