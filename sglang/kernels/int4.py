"""Products with 4-bit weights (int4_weight.py): y = x W^T + bias.

One token is multiplied with nibbles as they are (int4_gemv.py). With more, the problem is
transposed (out^T = W x^T) so that the dequantized weights are the tensor cores' register operand
and never pass through shared memory: on Hopper by int4_hopper.py (two to eight tokens by
int4_few.py), elsewhere by the kernel here, and there many tokens have weights dequantized into
scratch memory once, and cuBLAS does the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from sglang.kernels.int4_gemv import MAX_TOKENS, int4_fused_linear_triton
from sglang.kernels.int4_weight import (
    BLOCK,
    Int4Weight,
    dequantize_int4_naive,
    dequantize_words,
    scale_and_zero,
)
from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.linear import linear
from sglang.kernels.quant_split_k import split_k_workspace, sum_splits, tile_of

try:
    from sglang.kernels import int4_few as few
    from sglang.kernels import int4_hopper as hopper
except ImportError:  # Triton without Gluon, or with an older one
    few = hopper = None

DOT_TOKENS = 512
"""With more, it is quicker to dequantize first."""


def int4_linear(x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K] -> [T, N] in x's dtype, accumulated in float32."""
    if not x.is_cuda:
        return int4_linear_naive(x, w, bias)
    if len(x) <= MAX_TOKENS:
        return int4_fused_linear_triton(x, w, bias)[0]
    if can_add(x, w):
        return _on_hopper(x, w, bias)
    if len(x) > DOT_TOKENS:
        return linear(x, dequantize_int4_triton(w, x.dtype), bias)
    return int4_dot_triton(x, w, bias)


def can_add(x: torch.Tensor, w: Int4Weight) -> bool:
    """Whether `int4_added` is for these, as Hopper's kernels are."""
    return len(x) > MAX_TOKENS and hopper is not None and (few.usable(x, w) or hopper.usable(x, w))


def int4_added(
    x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None, added: torch.Tensor
) -> torch.Tensor:
    """added [T, N], contiguous, += x W^T + bias."""
    return _on_hopper(x, w, bias, added)


def _on_hopper(
    x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None, added: torch.Tensor | None = None
) -> torch.Tensor:
    product = few.int4_few_linear if few.usable(x, w) else hopper.int4_hopper_linear
    return product(x, w, bias, added=added)


def int4_linear_naive(
    x: torch.Tensor, w: Int4Weight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return F.linear(x, dequantize_int4_naive(w, x.dtype), bias)


# --- more tokens ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class DotConfig:
    block_m: int
    block_n: int
    splits: int
    """Of the inputs, over programs."""
    num_warps: int
    num_stages: int


@triton.jit
def _ended(acc, ASM: tl.constexpr):
    """The same sums, of which an empty instruction makes use. Triton would otherwise leave a
    product in flight while the next weights are dequantized, which ptxas forbids by waiting for
    each single matrix instruction (its note C7515)."""
    if ASM:
        return tl.inline_asm_elementwise("", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return acc


@triton.jit(do_not_specialize=["num_tokens"])
def _dot_kernel(
    x,  # a descriptor of [T, K], tiles of [BLOCK_M, BLOCK_K]
    words_ptr,  # int32 [N, K / 8]
    scales_ptr,
    bias_ptr,
    out_ptr,  # [T, N]
    partial_ptr,  # float32 [SPLITS, T, N]
    arrived_ptr,  # int32, zero
    num_tokens,
    N,
    K,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    ASM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    ROW = (K + 63) // 64 * 8  # words
    steps = (ROW * 8 + BLOCK_K - 1) // BLOCK_K
    each = (steps + SPLITS - 1) // SPLITS
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    tiles_m = (num_tokens + BLOCK_M - 1) // BLOCK_M
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, (N + BLOCK_N - 1) // BLOCK_N)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    # The last tile begins early rather than end late, if it can: rows beyond the last one cost the
    # copy engine more than others, and those that two tiles compute come out the same.
    first_m = tl.minimum(tile_m * BLOCK_M, tl.maximum(num_tokens - BLOCK_M, 0))
    safe_n = tl.where(n < N, n, 0)
    word_ptrs = words_ptr + safe_n.to(tl.int64)[:, None] * ROW + tl.arange(0, BLOCK_K // 8)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(split * each, min(split * each + each, steps), num_stages=NUM_STAGES):
        k0 = step * BLOCK_K
        words = tl.load(word_ptrs + k0 // 8)
        inputs = x.load([first_m, k0])  # zeros behind the last token and the last input
        scales = tl.load(scales_ptr + k0 // GROUP * N + safe_n)
        high_scales = scales
        if GROUP % BLOCK_K:  # a block's low nibbles may be one group's, its high ones the next's
            group = tl.minimum((k0 + 32) // GROUP, (K - 1) // GROUP)
            high_scales = tl.load(scales_ptr + group * N + safe_n)
        weights = dequantize_words(words, scales[:, None], high_scales[:, None], True, DTYPE, ASM)
        acc = _ended(tl.dot(weights, inputs.T, acc), ASM)

    m = first_m + tl.arange(0, BLOCK_M)
    in_m = m < num_tokens
    at = m[None, :] * N + n[:, None]
    mask = in_m[None, :] & (n < N)[:, None]
    if SPLITS > 1:
        acc, is_last = sum_splits(acc, at, mask, partial_ptr, arrived_ptr, num_tokens * N, SPLITS)
        mask = in_m[None, :] & (n < tl.where(is_last, N, 0))[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + safe_n).to(tl.float32)[:, None]
    tl.store(out_ptr + at, acc.to(DTYPE), mask=mask)


def choose_config(num_tokens: int, n: int, k: int) -> DotConfig:
    """The quickest on an H100 and an H200 at the shapes of Llama-2-7B: 64 outputs a program, and so
    many splits that an SM has as many programs as fit."""
    block_m = triton.next_power_of_2(num_tokens)
    if num_tokens > 64 and block_m > num_tokens:
        block_m //= 2
    block_m = min(max(block_m, 16), 128)
    block_n = 128 if block_m == 32 and n > 8192 else 64
    programs = {16: 1024, 32: 512, 64: 400, 128: 300}[block_m]
    tiles = triton.cdiv(n, block_n) * triton.cdiv(num_tokens, block_m)
    splits = min(_power_below(programs // tiles), 16, _power_below(k // 512))
    return DotConfig(block_m, block_n, splits, 4, 4 if block_m in (32, 64) and n <= 8192 else 3)


def _power_below(x: int) -> int:
    """The largest power of two up to x, at least 1."""
    return 1 << max(x, 1).bit_length() - 1


def int4_dot_triton(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    config: DotConfig | None = None,
) -> torch.Tensor:
    num_tokens, n = x.shape[0], w.packed.shape[0]
    out = torch.empty(num_tokens, n, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:  # what descriptors can't
        x = x.clone(memory_format=torch.contiguous_format)
    config = config or choose_config(num_tokens, n, w.num_inputs)
    block_k = 128 if w.group_size % 128 == 0 and w.packed.shape[1] % 64 == 0 else 64
    tiles = triton.cdiv(n, config.block_n) * triton.cdiv(num_tokens, config.block_m)
    partial, arrived = split_k_workspace(config.splits, num_tokens, n, x.device)
    _dot_kernel[(tiles, config.splits)](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [config.block_m, block_k]),
        w.packed.view(torch.int32), w.scales, bias, out, partial, arrived, num_tokens,
        N=n,
        K=w.num_inputs,
        GROUP=w.group_size,
        BIAS=bias is not None,
        ASM=not isinstance(_dot_kernel, InterpretedFunction),
        SPLITS=config.splits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **pdl(x.device),
    )  # fmt: skip
    return out


# --- many tokens ---------------------------------------------------------------------------------


@triton.jit
def _each(scales, COUNT: tl.constexpr):
    """[BLOCK_N, BLOCKS] -> [BLOCK_N, COUNT BLOCKS], each so many times."""
    repeated = tl.broadcast_to(scales[:, :, None], (scales.shape[0], scales.shape[1], COUNT))
    return repeated.reshape(scales.shape[0], scales.shape[1] * COUNT)


@triton.jit
def _dequantize_kernel(
    words_ptr,  # int32 [N, K / 8]
    scales_ptr,
    out_ptr,  # [N, K]
    N,
    K,
    GROUP: tl.constexpr,
    ASM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    ROW = (K + 63) // 64 * 8  # words
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * BLOCKS
    row = n.to(tl.int64)[:, None]
    in_n = n < N
    word = first * 8 + tl.arange(0, BLOCKS * 8)[None, :]
    words = tl.load(words_ptr + row * ROW + word, mask=in_n[:, None] & (word < ROW), other=0)
    half = (first * 64 + tl.arange(0, 2 * BLOCKS) * 32)[None, :]
    group = tl.minimum(half // GROUP, (K - 1) // GROUP)
    scales = tl.load(scales_ptr + group * N + n[:, None], mask=in_n[:, None], other=0)
    low, high = tl.split(scales.reshape(BLOCK_N, BLOCKS, 2))
    exact = dequantize_words(words, _each(low, 8), _each(high, 8), False, DTYPE, ASM)
    weights = exact.to(tl.float32) * _each(scale_and_zero(scales)[0], 32)
    k = first * 64 + tl.arange(0, 64 * BLOCKS)[None, :]
    tl.store(out_ptr + row * K + k, weights.to(DTYPE), mask=in_n[:, None] & (k < K))


def dequantize_int4_triton(
    w: Int4Weight, dtype: torch.dtype, block_n: int = 16, blocks: int = 16, num_warps: int = 4
) -> torch.Tensor:
    n, k = w.packed.shape[0], w.num_inputs
    out = torch.empty(n, k, dtype=dtype, device=w.packed.device)
    grid = (triton.cdiv(n, block_n), triton.cdiv(triton.cdiv(k, BLOCK), blocks))
    _dequantize_kernel[grid](
        w.packed.view(torch.int32), w.scales, out,
        N=n, K=k, GROUP=w.group_size, ASM=not isinstance(_dequantize_kernel, InterpretedFunction),
        BLOCK_N=block_n, BLOCKS=blocks, num_warps=num_warps,
    )  # fmt: skip
    return out
