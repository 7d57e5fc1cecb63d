"""Products with 4-bit weights: y = x W^T + bias, W[n, k] = (q[n, k] - zero[g, n]) scale[g, n].

One layout, whatever the checkpoint's was. A row of W is cut into blocks of 64 inputs; byte j of a
block's 32 holds the nibbles of two inputs that are half a block apart, so a tile of bytes becomes
two tiles of weights, each multiplied with its own inputs, and nothing has to be interleaved:

    inputs   0 1 2 ... 31 | 32 33 ... 63      byte j = q[j] | q[j + 32] << 4

Three ways to multiply, by the number of tokens: with a few, each program dequantizes some rows and
adds up in float32; with more, the problem is transposed (out^T = W x^T) so that the dequantized
weights are the tensor cores' register operand and never pass through shared memory; with many,
weights are dequantized into scratch memory once and cuBLAS does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.quant_split_k import split_k_workspace, sum_splits

BLOCK = 64
"""Inputs that are packed together; a row is filled up to a multiple of it."""
GEMV_TOKENS = 2
"""Up to here no tensor cores."""
DEQUANTIZE_TOKENS = 96
"""From here on, dequantize first."""


@dataclass
class Int4Weight:
    packed: torch.Tensor
    """uint8 [N, K / 2], K a multiple of BLOCK."""
    scales: torch.Tensor
    """float32 [groups, N]: of four bytes each, loads of them can be asynchronous."""
    zeros: torch.Tensor
    """float32 [groups, N], whole numbers."""
    num_inputs: int
    """Before filling up."""
    group_size: int
    """Inputs that share a scale: a multiple of 32."""


def pack_int4(q: torch.Tensor) -> torch.Tensor:
    """Integers 0..15 [N, K] of any dtype -> uint8 [N, K / 2], K filled up with zeros."""
    q = F.pad(q.to(torch.uint8), (0, -q.shape[1] % BLOCK))
    low, high = q.unflatten(1, (-1, 2, BLOCK // 2)).unbind(2)
    return (low | high << 4).flatten(1)


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K / 2] -> uint8 [N, K]."""
    blocks = packed.unflatten(1, (-1, BLOCK // 2))
    return torch.stack((blocks & 15, blocks >> 4), 2).flatten(1)


def int4_linear(x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's dtype, accumulated in float32."""
    if not x.is_cuda:
        return int4_linear_naive(x, w, bias)
    if len(x) >= DEQUANTIZE_TOKENS:
        return F.linear(x, dequantize_int4_triton(w, x.dtype), bias)
    return int4_linear_triton(x, w, bias)


def int4_linear_naive(
    x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return F.linear(x, dequantize_int4_naive(w, x.dtype), bias)


def dequantize_int4_naive(w: Int4Weight, dtype: torch.dtype) -> torch.Tensor:
    """[N, K], computed in float32."""
    q = unpack_int4(w.packed)[:, : w.num_inputs]
    expand = (w.scales, w.zeros)
    scales, zeros = (t.repeat_interleave(w.group_size, 0)[: w.num_inputs].t() for t in expand)
    return ((q.float() - zeros) * scales).to(dtype)


# --- nibbles -> numbers --------------------------------------------------------------------------

# Four bytes at a time. A nibble in the low bits of a float16's mantissa, below the exponent of
# 1024, is the number 1024 + q: one instruction makes two numbers, and one more takes away 1024
# and the zero point. (Kim et al., "Who says elephants can't run", 2022.) bfloat16: 128 + q.
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


@triton.jit
def _unpack(packed, zero_low, zero_high, DTYPE: tl.constexpr, ASM: tl.constexpr):
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


# --- a few tokens --------------------------------------------------------------------------------


@dataclass(frozen=True)
class GemvConfig:
    block_n: int
    block_k: int
    num_warps: int


@triton.jit(do_not_specialize=["num_tokens"])
def _gemv_kernel(
    x_ptr,  # [T, K]
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,  # [T, N]
    num_tokens,
    x_stride,
    N,
    K,
    GROUP: tl.constexpr,
    T: tl.constexpr,  # at least num_tokens
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    ROW = (K + 63) // 64 * 32  # bytes
    BLOCKS: tl.constexpr = BLOCK_K // 64
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    safe_n = tl.where(in_n, n, 0)
    token = tl.arange(0, T)
    j = tl.arange(0, 32)[None, :]
    acc = tl.zeros([BLOCK_N, T], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        block = k0 // 64 + tl.arange(0, BLOCKS)
        in_row = block * 64 < K
        at = safe_n.to(tl.int64)[:, None, None] * ROW + (block[:, None] * 32 + j)[None, :, :]
        packed = tl.load(packed_ptr + at, mask=in_row[None, :, None], other=0)
        group = tl.minimum(block * 64 // GROUP, (K - 1) // GROUP)
        at = group[None, :] * N + safe_n[:, None]
        scale = tl.load(scales_ptr + at).to(tl.float32)  # [BLOCK_N, BLOCKS]
        zero = tl.load(zeros_ptr + at).to(tl.float32)
        high_scale, high_zero = scale, zero
        if GROUP < 64:
            high_group = tl.minimum((block * 64 + 32) // GROUP, (K - 1) // GROUP)
            at = high_group[None, :] * N + safe_n[:, None]
            high_scale = tl.load(scales_ptr + at).to(tl.float32)
            high_zero = tl.load(zeros_ptr + at).to(tl.float32)
        z = tl.broadcast_to(zero[:, :, None], (BLOCK_N, BLOCKS, 32))
        high_z = tl.broadcast_to(high_zero[:, :, None], (BLOCK_N, BLOCKS, 32))
        low, high = _unpack(packed, z, high_z, x_ptr.dtype.element_ty, ASM)
        low, high = low.to(tl.float32), high.to(tl.float32)
        k = block[:, None] * 64 + j  # [BLOCKS, 32]
        for t in tl.static_range(T):
            limit = tl.where(num_tokens > t, K, 0)
            at = t * x_stride + k
            x_low = tl.load(x_ptr + at, mask=k < limit, other=0.0).to(tl.float32)
            x_high = tl.load(x_ptr + at + 32, mask=k + 32 < limit, other=0.0).to(tl.float32)
            if GROUP < 64:
                sums = tl.sum(low * x_low[None, :, :], 2) * scale
                sums += tl.sum(high * x_high[None, :, :], 2) * high_scale
            else:
                sums = tl.sum(low * x_low[None, :, :] + high * x_high[None, :, :], 2) * scale
            acc += tl.where(token[None, :] == t, tl.sum(sums, 1)[:, None], 0.0)
    if BIAS:
        acc += tl.load(bias_ptr + safe_n).to(tl.float32)[:, None]
    mask = in_n[:, None] & (token < num_tokens)[None, :]
    at = token[None, :] * N + n[:, None]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=mask)


# --- more tokens ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DotConfig:
    block_m: int
    block_n: int
    splits: int
    """Of the inputs, over programs."""
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_tokens"])
def _dot_kernel(
    x_ptr,  # [T, K]
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,  # [T, N]
    partial_ptr,  # float32 [SPLITS, T, N]
    arrived_ptr,  # int32, zero
    num_tokens,
    x_stride,
    N,
    K,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    NUM_STAGES: tl.constexpr,
):
    ROW = (K + 63) // 64 * 32  # bytes
    steps = (ROW * 2 + BLOCK_K - 1) // BLOCK_K
    each = (steps + SPLITS - 1) // SPLITS
    ONE_GROUP: tl.constexpr = GROUP % BLOCK_K == 0
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_n = tl.where(n < N, n, 0)
    in_m = m < num_tokens
    j = tl.arange(0, BLOCK_K // 2)
    k = j // 32 * 64 + j % 32  # of the low nibbles
    packed_ptrs = packed_ptr + safe_n.to(tl.int64)[:, None] * ROW + j[None, :]
    x_ptrs = x_ptr + m[None, :] * x_stride + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(split * each, min(split * each + each, steps), num_stages=NUM_STAGES):
        k0 = step * BLOCK_K
        packed = tl.load(packed_ptrs + k0 // 2)
        if EVEN_K:
            x_low = tl.load(x_ptrs + k0, mask=in_m[None, :], other=0.0)
            x_high = tl.load(x_ptrs + k0 + 32, mask=in_m[None, :], other=0.0)
        else:
            mask = in_m[None, :] & (k0 + k < K)[:, None]
            x_low = tl.load(x_ptrs + k0, mask=mask, other=0.0)
            mask = in_m[None, :] & (k0 + k + 32 < K)[:, None]
            x_high = tl.load(x_ptrs + k0 + 32, mask=mask, other=0.0)
        at = k0 // GROUP * N + safe_n
        scale = tl.load(scales_ptr + at).to(tl.float32)
        zero = tl.load(zeros_ptr + at).to(tl.float32)
        z = tl.broadcast_to(zero[:, None], (BLOCK_N, BLOCK_K // 2))
        if ONE_GROUP:
            low, high = _unpack(packed, z, z, DTYPE, ASM)
            part = tl.dot(low, x_low)
            part = tl.dot(high, x_high, part)
            acc += part * scale[:, None]
        else:  # groups of 32: a block's low nibbles are one group's, its high ones the next one's
            at = tl.minimum((k0 + 32) // GROUP, (K - 1) // GROUP) * N + safe_n
            high_scale = tl.load(scales_ptr + at).to(tl.float32)
            high_zero = tl.load(zeros_ptr + at).to(tl.float32)
            high_z = tl.broadcast_to(high_zero[:, None], (BLOCK_N, BLOCK_K // 2))
            low, high = _unpack(packed, z, high_z, DTYPE, ASM)
            acc += tl.dot(low, x_low) * scale[:, None]
            acc += tl.dot(high, x_high) * high_scale[:, None]

    at = m[None, :] * N + n[:, None]
    mask = in_m[None, :] & (n < N)[:, None]
    if SPLITS > 1:
        acc, is_last = sum_splits(acc, at, mask, partial_ptr, arrived_ptr, num_tokens * N, SPLITS)
        mask = in_m[None, :] & (n < tl.where(is_last, N, 0))[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + safe_n).to(tl.float32)[:, None]
    tl.store(out_ptr + at, acc.to(DTYPE), mask=mask)


def choose_config(num_tokens: int, n: int, k: int) -> GemvConfig | DotConfig:
    """The quickest on an H200 at the shapes of Llama-2-7B."""
    if num_tokens <= GEMV_TOKENS:
        return GemvConfig(block_n=8, block_k=min(2048, triton.next_power_of_2(k)), num_warps=4)
    block_m = min(max(triton.next_power_of_2(num_tokens), 16), 64)
    small = block_m <= 32
    block_n = 64 if small else 128
    tiles = triton.cdiv(n, block_n) * triton.cdiv(num_tokens, block_m)
    programs, most = (1024, 8) if small else (256, 4)
    splits = min(triton.next_power_of_2(triton.cdiv(programs, tiles)), most, max(k // 512, 1))
    return DotConfig(block_m, block_n, splits, 4 if small else 8, 3 if small else 4)


def int4_linear_triton(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    config: GemvConfig | DotConfig | None = None,
) -> torch.Tensor:
    num_tokens, n = x.shape[0], w.packed.shape[0]
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    config = config or choose_config(num_tokens, n, w.num_inputs)
    arguments = (x, w.packed, w.scales, w.zeros, bias, out)
    common = dict(
        N=n, K=w.num_inputs, GROUP=w.group_size, BIAS=bias is not None,
        ASM=not isinstance(_gemv_kernel, InterpretedFunction),
    )  # fmt: skip
    if isinstance(config, GemvConfig):
        _gemv_kernel[(triton.cdiv(n, config.block_n),)](
            *arguments, num_tokens, x.stride(0),
            **common,
            T=triton.next_power_of_2(num_tokens),
            BLOCK_N=config.block_n,
            BLOCK_K=config.block_k,
            num_warps=config.num_warps,
        )  # fmt: skip
        return out
    block_k = 128 if w.group_size % 128 == 0 and w.packed.shape[1] % 64 == 0 else 64
    grid = (
        triton.cdiv(n, config.block_n), config.splits, triton.cdiv(num_tokens, config.block_m)
    )  # fmt: skip
    partial, arrived = split_k_workspace(config.splits, num_tokens, n, x.device)
    _dot_kernel[grid](
        *arguments, partial, arrived, num_tokens, x.stride(0),
        **common,
        SPLITS=config.splits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        EVEN_K=w.num_inputs % block_k == 0,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out


# --- many tokens ---------------------------------------------------------------------------------


@triton.jit
def _dequantize_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,  # [N, K]
    N,
    K,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    ROW = (K + 63) // 64 * 32
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    in_n = n < N
    j = tl.arange(0, 32)[None, :]
    k = (block[:, None] * 64 + j)[None, :, :]
    row = n.to(tl.int64)[:, None, None]
    mask = in_n[:, None, None] & (k < K)
    packed = tl.load(packed_ptr + row * ROW + (block[:, None] * 32 + j)[None, :, :], mask=mask)
    low_at = tl.minimum(block * 64 // GROUP, (K - 1) // GROUP)[None, :] * N + n[:, None]
    high_at = tl.minimum((block * 64 + 32) // GROUP, (K - 1) // GROUP)[None, :] * N + n[:, None]
    z = tl.load(zeros_ptr + low_at, mask=in_n[:, None], other=0.0).to(tl.float32)[:, :, None]
    high_z = tl.load(zeros_ptr + high_at, mask=in_n[:, None], other=0.0).to(tl.float32)[:, :, None]
    z = tl.broadcast_to(z, (BLOCK_N, BLOCKS, 32))
    high_z = tl.broadcast_to(high_z, (BLOCK_N, BLOCKS, 32))
    low, high = _unpack(packed, z, high_z, DTYPE, ASM)
    scale = tl.load(scales_ptr + low_at, mask=in_n[:, None], other=0.0)[:, :, None]
    high_scale = tl.load(scales_ptr + high_at, mask=in_n[:, None], other=0.0)[:, :, None]
    low = (low.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
    high = (high.to(tl.float32) * high_scale.to(tl.float32)).to(DTYPE)
    tl.store(out_ptr + row * K + k, low, mask=mask)
    tl.store(out_ptr + row * K + k + 32, high, mask=in_n[:, None, None] & (k + 32 < K))


def dequantize_int4_triton(
    w: Int4Weight, dtype: torch.dtype, block_n: int = 16, blocks: int = 16, num_warps: int = 4
) -> torch.Tensor:
    n, k = w.packed.shape[0], w.num_inputs
    out = torch.empty(n, k, dtype=dtype, device=w.packed.device)
    grid = (triton.cdiv(n, block_n), triton.cdiv(triton.cdiv(k, BLOCK), blocks))
    _dequantize_kernel[grid](
        w.packed, w.scales, w.zeros, out,
        N=n, K=k, GROUP=w.group_size, ASM=not isinstance(_dequantize_kernel, InterpretedFunction),
        BLOCK_N=block_n, BLOCKS=blocks, num_warps=num_warps,
    )  # fmt: skip
    return out
