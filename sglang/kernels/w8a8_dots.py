"""Sums of products of 8-bit weights and one token, on tensor cores.

As in int4_dots.py operands take registers as loads fill them. A lane has chunks of rows, 16 weights
each, and the chunk's 16 inputs; a quad of lanes is a row of the left matrix and a column of the
right one, and of the product only the diagonal, each quad's weights times its own inputs, is ever
looked at. Sums stay where tensor cores leave them until the row is at its end.

int8 is multiplied as it is, into int32. FP8 becomes float16, two numbers in one instruction; these
and their products, in float32, are exact.

Tensors [C] must lie in the lanes of their warps one by one: int4_dots.py has more on that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from sglang.kernels.one_token import columns, on_diagonal
from sglang.kernels.quant_tokens import round_to

# Words of a row of each half of a tile, times their inputs.
#   $0-$3     two columns of the row of the first half, two of the second's; the last four
#             arguments are those so far
#   FP8       $4, $5: a word of each row; $6, $7: the inputs of its first two bytes and its last
#   int8      $4, $5: two words of the first row; $6, $7: of the second; $8, $9: their inputs
_FP8_ASM = tl.constexpr("""{
.reg .b16 s, t, u, v;
.reg .b32 a, b, c, d;
mov.b32 {s, t}, $4;
mov.b32 {u, v}, $5;
cvt.rn.f16x2.e4m3x2 a, s;
cvt.rn.f16x2.e4m3x2 b, u;
cvt.rn.f16x2.e4m3x2 c, t;
cvt.rn.f16x2.e4m3x2 d, v;
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
    {$0, $1, $2, $3}, {a, b, c, d}, {$6, $7}, {$8, $9, $10, $11};
}""")
_FP8_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["r"] * 4 + ["f"] * 4))
_INT8_ASM = tl.constexpr("""
mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32
    {$0, $1, $2, $3}, {$4, $6, $5, $7}, {$8, $9}, {$10, $11, $12, $13};
""")
_INT8_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 10))


@triton.jit
def as_stored(x, DTYPE: tl.constexpr, TENSOR: tl.constexpr):
    """float32 -> what it would be if it had been stored, float32."""
    if TENSOR and tl.bfloat16 == DTYPE:
        # Triton has an instruction for each number, and a slow one.
        x = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;",
            "=r,f,f",
            [x],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def _joined(x, BITS: tl.constexpr):
    """uint32 [C, n] -> [C, n / 2], two neighbours in one number."""
    low, high = tl.split(x.reshape(x.shape[0], x.shape[1] // 2, 2))
    return low | high << BITS


@triton.jit
def prepare(x, scale, FORMAT: tl.constexpr, LARGEST: tl.constexpr):
    """float32 [C, 8] -> the inputs rounded to 8 bits, as `times` takes them: int32 [C], two of four
    int8 each, or FP8, held as float16, in four pairs."""
    q = round_to(x / scale, FORMAT, LARGEST)
    if tl.int8 == FORMAT:
        words = _joined(_joined(q.to(tl.uint8, bitcast=True).to(tl.uint32), 8), 16)
        return tl.split(words.to(tl.int32, bitcast=True))
    else:
        halves = q.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        return columns(_joined(halves, 16).to(tl.int32, bitcast=True))


@triton.jit
def _times_naive(words, x, INT8: tl.constexpr):
    """Four words of a row [C] -> the sum of their products with their inputs."""
    out = 0 if INT8 else 0.0
    for i in tl.static_range(16):
        byte = (words[i // 4] >> i % 4 * 8).to(tl.uint8)
        if INT8:
            other = (x[i // 4] >> i % 4 * 8).to(tl.int8)
            out += byte.to(tl.int8, bitcast=True).to(tl.int32) * other.to(tl.int32)
        else:
            other = (x[i // 2] >> i % 2 * 16).to(tl.int16).to(tl.float16, bitcast=True)
            weight = byte.to(tl.float8e4nv, bitcast=True).to(tl.float32)
            out += weight * other.to(tl.float32)
    return out


@triton.jit
def times(first, second, x, sums, INT8: tl.constexpr, TENSOR: tl.constexpr):
    """A chunk of a row of each half of a tile, int32 [C, 4], times its inputs, added to `sums`,
    from `zeros` or here."""
    a, b = columns(first), columns(second)
    if not TENSOR:
        sums = (
            sums[0] + _times_naive(a, x, INT8),
            sums[1],
            sums[2] + _times_naive(b, x, INT8),
            sums[3],
        )
    elif INT8:
        for i in tl.static_range(2):
            words = (a[2 * i], a[2 * i + 1], b[2 * i], b[2 * i + 1])
            sums = tl.inline_asm_elementwise(
                _INT8_ASM,
                _INT8_CONSTRAINTS,
                words + (x[2 * i], x[2 * i + 1]) + sums,  # noqa: RUF005 (for Triton)
                dtype=(tl.int32,) * 4,
                is_pure=False,
                pack=1,
            )
    else:
        for i in tl.static_range(4):
            sums = tl.inline_asm_elementwise(
                _FP8_ASM,
                _FP8_CONSTRAINTS,
                (a[i], b[i]) + (x[2 * i], x[2 * i + 1]) + sums,  # noqa: RUF005 (for Triton)
                dtype=(tl.float32,) * 4,
                is_pure=False,
                pack=1,
            )
    return sums


@triton.jit
def zeros(C: tl.constexpr, INT8: tl.constexpr):
    zero = tl.zeros([C], tl.int32 if INT8 else tl.float32)
    return zero, zero, zero, zero


@triton.jit
def diagonal(sums, TENSOR: tl.constexpr):
    """From `times` -> float32 [C] of the row of each half, to be added up."""
    first, second = sums[0].to(tl.float32), sums[2].to(tl.float32)
    if TENSOR:
        first = on_diagonal(first, sums[1].to(tl.float32))
        second = on_diagonal(second, sums[3].to(tl.float32))
    return first, second
