"""One token times a matrix of 4-bit weights, and what is around it in a decoder.

As in kernels/gemv.py one kernel does residual addition, RMSNorm, product, bias and SwiGLU, and asks
for its weights before the kernel before it has ended. But here instructions are as scarce as bytes:
an H200 reads 4-bit weights so fast that it can spend three or four instructions on each. So tensor
cores multiply, though there is but one token, and as operands they take registers as loads fill
them. A lane loads a chunk of a row, 16 bytes or 32 weights, and holds the chunk's 32 inputs:

    lane       0 1 2 3 | 4 5 6 7 | ...    mma.m16n8k16 takes a quad of lanes for a row of its left
    chunk      0 1 2 3 | 4 5 6 7 | ...    matrix, and for a column of its right one. So it gets all
    quad          0    |    1    | ...    quads' weights times all quads' inputs, and only the
                                          diagonal, each quad's own, is ever looked at.

A nibble takes no instruction to become a number: in the last bits of a float16 it is the denormal
q 2^-24, or 16 q 2^-24 four bits further up. One AND makes two of them, and their products are exact
in float32. (bfloat16: an AND and OR makes two of 128 + q.) Zero points and scales are for the sums
of a quad, 128 inputs; if groups are smaller each half of it is multiplied by itself, with zeros for
the other one's inputs. A program prepares its inputs once for all of its tiles of rows, and loads
the next tile before it adds up the sums of this one.

All this takes a tensor [C] of chunks to lie in the lanes of its warps one by one. There is no other
sensible layout of so many elements as lanes (of [C, R] there is: Triton 3.6 and 3.9 choose
differently), but nothing promises it, and the interpreter has no lanes and goes another way. The
tests on a GPU would show it: elsewhere the diagonal means nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.gemv import fused_linear_naive
from sglang.kernels.int4_weight import Int4Weight, dequantize_int4_naive, scale_and_zero
from sglang.kernels.launch import launch_next, pdl, wait_for_previous

MAX_TOKENS = 1
"""With more, tensor cores are quicker that have them all as columns."""
CHUNK = 32
"""Weights of a row that a lane loads at once."""


def int4_fused_linear(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gemv.fused_linear of 4-bit weights: (act(rms_norm(x + residual) W^T + bias), x + residual).
    x [T, K], quick for T up to MAX_TOKENS."""
    run = int4_fused_linear_triton if x.is_cuda else int4_fused_linear_naive
    return run(x, w, bias, residual, norm, eps, gated)


def int4_fused_linear_naive(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    weight = dequantize_int4_naive(w, x.dtype)
    return fused_linear_naive(x, weight, bias, residual, norm, eps, gated)


@dataclass(frozen=True)
class Int4GemvConfig:
    rows: int
    """1, 2 or 4, of each half of a tile. If gated, the halves are gates and their ups."""
    num_warps: int
    per_sm: int
    """Programs on a multiprocessor, which share the tiles."""


def choose_config(num_rows: int, num_inputs: int, group_size: int = 128) -> Int4GemvConfig:
    """Measured on an H200 at the shapes of Llama-2-7B, in a chain as in a decoder, whatever the
    number of rows. Other shapes get what keeps as much under way with as many registers: all of a
    tile has to be in them, and small groups take more."""
    if group_size % 128:
        if num_inputs <= 4096:
            return Int4GemvConfig(rows=4, num_warps=4, per_sm=2)
        rows = 4 if num_inputs <= 8192 else 2 if num_inputs <= 16384 else 1
        return Int4GemvConfig(rows, num_warps=8, per_sm=1)
    if num_inputs <= 8192:
        num_warps = 2 if num_inputs <= 2048 else 4 if num_inputs <= 4096 else 8
        return Int4GemvConfig(4, num_warps, per_sm=16 // num_warps)
    if num_inputs <= 14336:
        return Int4GemvConfig(rows=2, num_warps=4, per_sm=3 if num_inputs < 12288 else 2)
    return Int4GemvConfig(rows=2 if num_inputs <= 32768 else 1, num_warps=8, per_sm=1)


# A word of weights from each half of a tile, times the inputs of its bytes.
#   $0-$3, $4-$7    sums of the low and of the high nibbles: two columns of a row of the first half,
#                   then of the second; $14-$21 are those so far
#   $8, $9          the words
#   $10, $11        inputs of the low nibbles of the bytes 0 2 and 1 3, and
#   $12, $13        of the high ones
_FLOAT16_ASM = tl.constexpr("""{
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
_BFLOAT16_ASM = tl.constexpr("""{
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
_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 8 + ["r"] * 6 + ["f"] * 8))


@triton.jit
def _columns(t):
    """[..., 1, 2 or 4] -> so many tensors [...]."""
    COUNT: tl.constexpr = t.shape[-1]
    if COUNT == 1:
        return (t.reshape(t.shape[:-1]),)
    elif COUNT == 2:
        return tl.split(t)
    else:
        SHAPE: tl.constexpr = t.shape[:-1]
        even, odd = tl.split(t.reshape(SHAPE + [2, 2]))  # noqa: RUF005 (for Triton)
        a, c = tl.split(even)
        b, d = tl.split(odd)
        return a, b, c, d


@triton.jit
def _eight(x):
    """[C, 8] -> eight tensors [C]."""
    first, second = tl.split(x.reshape(x.shape[0], 2, 4).permute(0, 2, 1))
    return _columns(first) + _columns(second)


@triton.jit
def _pairs(x):
    """16-bit [C, 8] -> int32 [C] four times: the inputs 0 2, 1 3, 4 6 and 5 7."""
    bits = x.to(tl.uint16, bitcast=True).to(tl.uint32).reshape(x.shape[0], 2, 2, 2)
    first, second = tl.split(bits.permute(0, 1, 3, 2))
    pairs = (first | second << 16).to(tl.int32, bitcast=True)
    return _columns(pairs.reshape(x.shape[0], 4))


@triton.jit
def _load_inputs(
    x_ptr, residual_ptr, norm_ptr, sum_ptr, k, K: tl.constexpr, ADD: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """((x + residual) times the norm's weight, float32; squares of x + residual [C]) at k [C, 8].
    The first program of a token stores x + residual."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    if ADD:
        total = x.to(tl.float32) + tl.load(residual_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        # The norm sees the sum as it is stored.
        x = total.to(sum_ptr.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(sum_ptr + k, x, mask=k < K)
    x = x.to(tl.float32)
    squares = tl.sum(x * x, 1)
    if NORM:
        x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x, squares


@triton.jit
def _inputs(x, norm_scale, UNIT: tl.constexpr, DTYPE: tl.constexpr, TENSOR: tl.constexpr):
    """Inputs of chunks, from _load_inputs [C, 8] four times -> (sums of those of the low nibbles,
    of the high ones [C], all of them as _dots wants them)."""
    low = 0.0
    high = 0.0
    made = ()
    for i in tl.static_range(4):
        part = x[i] * norm_scale
        if TENSOR:
            part = part.to(DTYPE)
        if i < 2:
            low += tl.sum(part.to(tl.float32), 1)
        else:
            high += tl.sum(part.to(tl.float32), 1)
        made += _pairs(part) if TENSOR else _eight(part)
    return low * UNIT, high * UNIT, made


@triton.jit
def _load_scales(
    scales_ptr, row, in_rows, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    FIRST: tl.constexpr, C: tl.constexpr, AT: tl.constexpr,
):  # fmt: skip
    """int32 [C, R], of the input AT of the quad that a chunk is in."""
    k = (FIRST + tl.arange(0, C)) // 4 * 128 + AT
    group = tl.minimum(k // GROUP, (K - 1) // GROUP)
    return tl.load(scales_ptr + group[:, None] * N + row[None, :], mask=in_rows)


@triton.jit
def _load_chunks(
    words_ptr, scales_ptr, row, in_rows, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    FIRST: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The chunks FIRST and on of the rows [R] -> (words int32 [C, R, 4]; scales of the low nibbles
    of a quad, of its high ones, and the same of its second half)."""
    ROW: tl.constexpr = (K + 63) // 64 * 8  # words
    # Behind a row's end any weights will do: they meet zeros.
    chunk = tl.minimum(FIRST + tl.arange(0, C), ROW // 4 - 1)
    word = chunk[:, None] * 4 + tl.arange(0, 4)[None, :]
    at = (row.to(tl.int64) * ROW)[None, :, None] + word[:, None, :]
    words = tl.load(words_ptr + at, mask=None if in_rows is None else in_rows[:, :, None])
    s = _load_scales(scales_ptr, row, in_rows, N, K, GROUP, FIRST, C, 0)
    scales = (s, s, s, s)
    if GROUP % 128:
        s = _load_scales(scales_ptr, row, in_rows, N, K, GROUP, FIRST, C, 64)
        scales = (scales[0], scales[0], s, s)
    if GROUP % 64:
        h = _load_scales(scales_ptr, row, in_rows, N, K, GROUP, FIRST, C, 32)
        i = _load_scales(scales_ptr, row, in_rows, N, K, GROUP, FIRST, C, 96)
        scales = (scales[0], h, scales[2], i)
    return words, scales


@triton.jit
def _load_tile(
    words_ptr, scales_ptr, tile, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The chunks of a tile's halves in turn, part by part of the inputs."""
    ROW: tl.constexpr = (K + 63) // 64 * 8
    # The second half's rows are counted from its first one, by moving the pointers.
    HALF: tl.constexpr = N // 2 if GATED else R
    row = tile * (R if GATED else 2 * R) + tl.arange(0, R)
    in_rows = None
    in_second = None
    if N % (2 * R):
        in_rows = (row < (HALF if GATED else N))[None, :]
        in_second = (row < (HALF if GATED else N - R))[None, :]
    parts = ()
    for i in tl.static_range(PARTS):
        first = _load_chunks(words_ptr, scales_ptr, row, in_rows, N, K, GROUP, i * C, C)
        second = _load_chunks(
            words_ptr + HALF * ROW, scales_ptr + HALF, row, in_second, N, K, GROUP, i * C, C
        )
        parts += (first, second)
    return parts


@triton.jit
def _rows(chunks):
    """From _load_chunks: (its words, its scales), four tensors [C] each, of each row."""
    words, scales = chunks
    a, b, c, d = _columns(words)
    a, b, c, d = _columns(a), _columns(b), _columns(c), _columns(d)
    s, t = _columns(scales[0]), _columns(scales[1])
    u, v = _columns(scales[2]), _columns(scales[3])
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
        low += (byte & 15).to(tl.float32) * x[i]
        high += (byte >> 4 & 15).to(tl.float32) * x[16 + i]
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
                _FLOAT16_ASM if tl.float16 == DTYPE else _BFLOAT16_ASM,
                _CONSTRAINTS,
                (first[i], second[i]) + low + high + sums,  # noqa: RUF005 (for Triton)
                dtype=(tl.float32,) * 8,
                is_pure=False,
                pack=1,
            )
        # The lane t of the quad g has the columns 2 t and 2 t + 1 of the row g.
        lane = tl.arange(0, zero.shape[0]) % 32
        even = lane // 4 == lane % 4 * 2
        odd = lane // 4 == lane % 4 * 2 + 1
        return (
            tl.where(odd, sums[1], tl.where(even, sums[0], 0.0)),
            tl.where(odd, sums[3], tl.where(even, sums[2], 0.0)),
            tl.where(odd, sums[5], tl.where(even, sums[4], 0.0)),
            tl.where(odd, sums[7], tl.where(even, sums[6], 0.0)),
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
def _times(first, second, inputs, GROUP: tl.constexpr, DTYPE: tl.constexpr, TENSOR: tl.constexpr):
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
def _plus(a, b):
    sums = ()
    for i in tl.static_range(len(a)):
        sums += (a[i] + b[i],)
    return sums


@triton.jit
def _merge(rows, BIT: tl.constexpr):
    """Tensors [C], a power of two of them -> half as many. Lanes without BIT in their number go on
    with the first ones, others with the rest: each with its own and its partner's."""
    LEFT: tl.constexpr = len(rows) // 2
    up = tl.arange(0, rows[0].shape[0]) & BIT != 0
    merged = ()
    for i in tl.static_range(LEFT):
        other = tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;",
            "=f,f,r",
            [tl.where(up, rows[i], rows[i + LEFT]), BIT],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
        merged += (tl.where(up, rows[i + LEFT], rows[i]) + other,)
    return merged


@triton.jit
def _add_up(rows, TENSOR: tl.constexpr):
    """2, 4 or 8 tensors [C] -> [2, 4 or 8], the sum of each."""
    COUNT: tl.constexpr = len(rows)
    C: tl.constexpr = rows[0].shape[0]
    if TENSOR:
        # With each step lanes have half as many rows to add up.
        rows = _merge(rows, 16)
        if COUNT > 2:
            rows = _merge(rows, 8)
        if COUNT > 4:
            rows = _merge(rows, 4)
        return tl.sum(tl.sum(rows[0].reshape(C // 32, COUNT, 32 // COUNT), 2), 0)
    else:
        out = tl.zeros([COUNT], tl.float32)
        for i in tl.static_range(COUNT):
            out = tl.where(tl.arange(0, COUNT) == i, tl.sum(rows[i]), out)
        return out


@triton.jit
def _int4_gemv_kernel(
    x_ptr,  # [T, K]
    residual_ptr,
    norm_ptr,
    words_ptr,  # the packed weights, int32 [N, K / 8]
    scales_ptr,
    bias_ptr,
    out_ptr,  # [T, N], or [T, N / 2] if GATED
    sum_ptr,  # [T, K]
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,  # rows of weights
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    TENSOR: tl.constexpr,  # multiply on tensor cores
    PDL: tl.constexpr,
    R: tl.constexpr,  # rows of a half of a tile
    TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,  # of a token
    C: tl.constexpr,  # chunks in a part of the inputs, one for each lane
    PARTS: tl.constexpr,
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    OUTPUTS: tl.constexpr = N // 2 if GATED else N
    UNIT: tl.constexpr = 2.0**-24 if TENSOR and tl.float16 == DTYPE else 1.0  # of all sums
    tile = tl.program_id(1)
    weights = _load_tile(words_ptr, scales_ptr, tile, N, K, GROUP, GATED, R, C, PARTS)
    # Weights are never written: only what comes next depends on the kernels before.
    launch_next(PDL)
    wait_for_previous(PDL)

    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    if ADD:
        residual_ptr += token * residual_stride
        sum_ptr += token * K
    loaded = ()
    squares = 0.0
    for i in tl.static_range(PARTS):
        chunk = i * C + tl.arange(0, C)
        k = (chunk // 2 * 64 + chunk % 2 * 16)[:, None] + tl.arange(0, 8)[None, :]
        a, q = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k, K, ADD, NORM)
        b, r = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k + 8, K, ADD, NORM)
        c, s = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k + 32, K, ADD, NORM)
        d, t = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k + 40, K, ADD, NORM)
        loaded += ((a, b, c, d),)
        squares += q + r + s + t
    norm_scale = 1.0
    if NORM:
        norm_scale = tl.rsqrt(tl.sum(squares) / K + eps)
    inputs = ()
    for i in tl.static_range(PARTS):
        inputs += (_inputs(loaded[i], norm_scale, UNIT, DTYPE, TENSOR),)

    for tile in tl.range(tl.program_id(1), TILES, PROGRAMS, num_stages=1):
        sums = _times(weights[0], weights[1], inputs[0], GROUP, DTYPE, TENSOR)
        for i in tl.static_range(1, PARTS):
            more = _times(weights[2 * i], weights[2 * i + 1], inputs[i], GROUP, DTYPE, TENSOR)
            sums = _plus(sums, more)
        if PROGRAMS < TILES:  # noqa: SIM102 (a constant)
            if tile + PROGRAMS < TILES:
                weights = _load_tile(
                    words_ptr, scales_ptr, tile + PROGRAMS, N, K, GROUP, GATED, R, C, PARTS
                )
        out = _add_up(sums, TENSOR) * (1.0 / UNIT)
        at = tl.arange(0, 2 * R)
        n = tile * R + at % R if GATED else tile * (2 * R) + at
        if BIAS:
            row = n + at // R * OUTPUTS if GATED else n
            out += tl.load(bias_ptr + row, mask=n < OUTPUTS, other=0.0).to(tl.float32)
        out = out.to(DTYPE)
        if GATED:
            gate, up = tl.split(out.to(tl.float32).reshape(2, R).permute(1, 0))
            out = (gate / (1.0 + tl.exp(-gate)) * up).to(DTYPE)
            n = tile * R + tl.arange(0, R)
        tl.store(out_ptr + token * OUTPUTS + n, out, mask=n < OUTPUTS)


@cache
def _multiprocessors(device: torch.device) -> int:
    """Few on the interpreter, whose programs then have several tiles, too."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def int4_fused_linear_triton(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    config: Int4GemvConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_tokens, num_inputs), num_rows = x.shape, w.packed.shape[0]
    config = config or choose_config(num_rows, num_inputs, w.group_size)
    num_outputs = num_rows // 2 if gated else num_rows
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out, total
    tiles = triton.cdiv(num_rows, 2 * config.rows)
    programs = min(tiles, config.per_sm * _multiprocessors(x.device))
    lanes = 32 * config.num_warps
    interpreted = isinstance(_int4_gemv_kernel, InterpretedFunction)
    _int4_gemv_kernel[(num_tokens, programs)](
        x, residual, norm, w.packed.view(torch.int32), w.scales, bias, out, total,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        N=num_rows,
        K=num_inputs,
        GROUP=w.group_size,
        ADD=residual is not None,
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        TENSOR=x.dtype.itemsize == 2 and not interpreted,
        R=config.rows,
        TILES=tiles,
        PROGRAMS=programs,
        C=lanes,
        PARTS=triton.cdiv(triton.cdiv(num_inputs, CHUNK), lanes),
        num_warps=config.num_warps,
        # All programs of a multiprocessor are to be there at once.
        maxnreg=min(65536 // (lanes * config.per_sm) // 8 * 8, 255),
        **pdl(x.device),
    )  # fmt: skip
    return out, total
