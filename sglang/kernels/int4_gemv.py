"""One token times a matrix of 4-bit weights, and what is around it in a decoder.

As in kernels/gemv.py one kernel does residual addition, RMSNorm, product, bias and SwiGLU, and asks
for its weights before the kernel before it has ended. But here instructions are as scarce as bytes:
an H200 reads 4-bit weights so fast that it can spend three or four instructions on each. A weight
takes two and a half. Its four bits go into the mantissa of a float32 1.0, half an instruction to
shift and one to insert; one multiplies and adds. The ones are taken off each sum of sixteen, like
the zero points. All products and sums are in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.gemv import fused_linear_naive
from sglang.kernels.int4_weight import Int4Weight, dequantize_int4_naive, scale_and_zero
from sglang.kernels.launch import launch_next, pdl, wait_for_previous

MAX_TOKENS = 1
"""With more, tensor cores are quicker."""
CHUNK = 16
"""Bytes of weights that a thread loads at once."""


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
    block_n: int
    """Rows of weights in a tile; if gated, gate and up in turn."""
    tiles: int
    """Of a program, which prepares its inputs once for all of them."""
    num_warps: int


def choose_config(num_rows: int, num_inputs: int) -> Int4GemvConfig:
    """The quickest on an H100 at the shapes of Llama-2-7B, as in int4.py and the 8-bit files."""
    if num_inputs > 8192:
        return Int4GemvConfig(block_n=8, tiles=2, num_warps=8)
    tiles = min(triton.next_power_of_2(max(num_rows // 4096, 1)), 4)
    return Int4GemvConfig(block_n=8, tiles=tiles, num_warps=4)


# A byte's low nibble goes to bits 15..18 of 1.0 and counts 1/256, its high one to bits 19..22 and
# counts 1/16. Four bytes at a time.
_ASM = tl.constexpr("""{
.reg .b32 a, b, c, d, one;
mov.b32 one, 0x3f800000;
shl.b32 a, $8, 15;
shl.b32 b, $8, 7;
shr.u32 c, $8, 1;
shr.u32 d, $8, 9;
lop3.b32 $0, a, 0x00078000, one, 0xea;
lop3.b32 $1, b, 0x00078000, one, 0xea;
lop3.b32 $2, c, 0x00078000, one, 0xea;
lop3.b32 $3, d, 0x00078000, one, 0xea;
lop3.b32 $4, a, 0x00780000, one, 0xea;
lop3.b32 $5, b, 0x00780000, one, 0xea;
lop3.b32 $6, c, 0x00780000, one, 0xea;
lop3.b32 $7, d, 0x00780000, one, 0xea;
}""")
_CONSTRAINTS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r")


@triton.jit
def _unpack(packed, ASM: tl.constexpr):
    """uint8 tile -> (1 + low nibble / 256, 1 + high nibble / 16), float32."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            _ASM, _CONSTRAINTS, [packed], dtype=(tl.int32, tl.int32), is_pure=True, pack=4
        )
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:
        low, high = (packed & 15).to(tl.float32), (packed >> 4).to(tl.float32)
        return 1.0 + low / 256.0, 1.0 + high / 16.0


@triton.jit
def _rows_times(chunks, x_low, x_high, GROUP: tl.constexpr, ASM: tl.constexpr):
    """The chunks of BLOCK_N rows times the inputs of their low and high nibbles, both float32
    [16 C] -> float32 [BLOCK_N]."""
    packed, scale, high_scale = chunks
    C: tl.constexpr = scale.shape[1]
    SHAPE: tl.constexpr = (packed.shape[0], C, 16)
    low, high = _unpack(packed, ASM)
    low_sum = tl.sum(x_low.reshape(C, 16), 1)[None, :]
    high_sum = tl.sum(x_high.reshape(C, 16), 1)[None, :]
    low_dot = tl.sum((low * (x_low * 256.0)[None, :]).reshape(SHAPE), 2) - low_sum * 256.0
    high_dot = tl.sum((high * (x_high * 16.0)[None, :]).reshape(SHAPE), 2) - high_sum * 16.0
    scale, zero = scale_and_zero(scale)
    if GROUP >= 64:
        return tl.sum((low_dot + high_dot - zero * (low_sum + high_sum)) * scale, 1)
    else:
        high_scale, high_zero = scale_and_zero(high_scale)
        low_dot = (low_dot - zero * low_sum) * scale
        return tl.sum(low_dot + (high_dot - high_zero * high_sum) * high_scale, 1)


@triton.jit
def _load_chunks(
    packed_ptr,
    scales_ptr,
    row,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    FIRST: tl.constexpr,  # the first chunk, and how many
    C: tl.constexpr,
):
    """(packed uint8 [BLOCK_N, 16 C], scales [BLOCK_N, C] of its low and of its high nibbles)."""
    ROW: tl.constexpr = (K + 63) // 64 * 32  # bytes
    LAST: tl.constexpr = (K - 1) // GROUP
    byte = FIRST * 16 + tl.arange(0, C * 16)
    at = row.to(tl.int64)[:, None] * ROW + byte[None, :]
    packed = tl.load(packed_ptr + at, mask=(byte < ROW)[None, :], other=0)
    k = (FIRST + tl.arange(0, C)) // 2 * 64  # of the block of 64 inputs
    scale = tl.load(scales_ptr + tl.minimum(k // GROUP, LAST)[None, :] * N + row[:, None])
    high_scale = scale
    if GROUP < 64:
        group = tl.minimum((k + 32) // GROUP, LAST)
        high_scale = tl.load(scales_ptr + group[None, :] * N + row[:, None])
    return packed, scale, high_scale


@triton.jit
def _load_tile(
    packed_ptr,
    scales_ptr,
    first,
    N: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """(row numbers, chunks of the head, chunks of the tail)."""
    row = first + tl.arange(0, BLOCK_N)
    row = tl.where(row < N, row, 0)
    if GATED:
        row = row // 2 + row % 2 * (N // 2)
    head = _load_chunks(packed_ptr, scales_ptr, row, N, K, GROUP, 0, HEAD)
    tail = head
    if TAIL:
        tail = _load_chunks(packed_ptr, scales_ptr, row, N, K, GROUP, HEAD, TAIL)
    return row, head, tail


@triton.jit
def _load_inputs(
    x_ptr,
    residual_ptr,
    norm_ptr,
    sum_ptr,
    k,
    K: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
):
    """((x + residual) norm, the sum of squares of x + residual) at k, float32. The first programs
    store x + residual."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    squares = 0.0
    if ADD:
        x += tl.load(residual_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        # The norm sees the sum as it is stored.
        total = x.to(sum_ptr.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(sum_ptr + k, total, mask=k < K)
        x = total.to(tl.float32)
    if NORM:
        squares = tl.sum(x * x)
        x *= tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return x, squares


@triton.jit
def _int4_gemv_kernel(
    x_ptr,  # [T, K]
    residual_ptr,
    norm_ptr,
    packed_ptr,
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
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    HEAD: tl.constexpr,  # chunks of a row, a power of two, and
    TAIL: tl.constexpr,  # another one for the rest, or 0
):
    first = tl.program_id(1) * (BLOCK_N * TILES)
    row, head, tail = _load_tile(
        packed_ptr, scales_ptr, first, N, K, GROUP, GATED, BLOCK_N, HEAD, TAIL
    )
    # Weights are never written: only what comes next depends on the kernels before.
    launch_next(PDL)
    wait_for_previous(PDL)

    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    if ADD:
        residual_ptr += token * residual_stride
        sum_ptr += token * K
    byte = tl.arange(0, HEAD * 16)
    k = byte // 32 * 64 + byte % 32  # of the low nibbles
    low, squares = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k, K, ADD, NORM)
    high, more = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k + 32, K, ADD, NORM)
    squares += more
    if TAIL:
        byte = HEAD * 16 + tl.arange(0, TAIL * 16)
        k = byte // 32 * 64 + byte % 32
        tail_low, more = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k, K, ADD, NORM)
        squares += more
        tail_high, more = _load_inputs(x_ptr, residual_ptr, norm_ptr, sum_ptr, k + 32, K, ADD, NORM)
        squares += more
    norm_scale = 1.0
    if NORM:
        norm_scale = tl.rsqrt(squares / K + eps)

    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    for i in tl.static_range(TILES):
        if i + 1 < TILES:
            next_tile = _load_tile(
                packed_ptr, scales_ptr, first + BLOCK_N, N, K, GROUP, GATED, BLOCK_N, HEAD, TAIL
            )
        out = _rows_times(head, low, high, GROUP, ASM)
        if TAIL:
            out += _rows_times(tail, tail_low, tail_high, GROUP, ASM)
        out *= norm_scale
        if BIAS:
            out += tl.load(bias_ptr + row).to(tl.float32)
        out = out.to(DTYPE)
        if GATED:
            gate, up = tl.split(out.to(tl.float32).reshape(BLOCK_N // 2, 2))
            out = (gate / (1.0 + tl.exp(-gate)) * up).to(DTYPE)
            n = first // 2 + tl.arange(0, BLOCK_N // 2)
            tl.store(out_ptr + token * (N // 2) + n, out, mask=n < N // 2)
        else:
            n = first + tl.arange(0, BLOCK_N)
            tl.store(out_ptr + token * N + n, out, mask=n < N)
        if i + 1 < TILES:
            row, head, tail = next_tile
            first += BLOCK_N


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
    config = config or choose_config(num_rows, num_inputs)
    num_outputs = num_rows // 2 if gated else num_rows
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out, total
    chunks = w.packed.shape[1] // CHUNK
    head = 1 << chunks.bit_length() - 1
    tail = triton.next_power_of_2(chunks - head) if chunks > head else 0
    grid = (num_tokens, triton.cdiv(num_rows, config.block_n * config.tiles))
    _int4_gemv_kernel[grid](
        x, residual, norm, w.packed, w.scales, bias, out, total,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        N=num_rows,
        K=num_inputs,
        GROUP=w.group_size,
        ADD=residual is not None,
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        ASM=not isinstance(_int4_gemv_kernel, InterpretedFunction),
        BLOCK_N=config.block_n,
        TILES=config.tiles,
        HEAD=head,
        TAIL=tail,
        num_warps=config.num_warps,
        **pdl(x.device),
    )  # fmt: skip
    return out, total
