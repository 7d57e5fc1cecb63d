"""One token times a matrix of 8-bit weights, and what is around it in a decoder.

As in kernels/gemv.py one kernel does residual addition, RMSNorm, product, bias and SwiGLU, and asks
for its weights before the kernel before it has ended; this one also rounds the token to 8 bits, by
its own largest value, between norm and product. int8 is multiplied four at a time (dp4a), FP8 as
float32, which holds its products exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.activation import silu_and_mul_naive
from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.norm import rms_norm_naive
from sglang.kernels.quant_tokens import LARGEST, quantize_tokens_naive, round_to
from sglang.kernels.quant_w8a8 import scaled_matmul_naive

MAX_TOKENS = 1
"""With more, tensor cores are quicker."""


def is_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether w8a8_fused_linear is the quick way for the tokens x [T, K]."""
    return x.is_cuda and len(x) <= MAX_TOKENS and weight.shape[1] % 4 == 0


def w8a8_fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """gemv.fused_linear of 8-bit weights: (act(rms_norm(x + residual) W^T + bias), x + residual).

    x         [T, K], quick for T up to MAX_TOKENS
    weight    int8 or float8_e4m3fn [N, K], K a multiple of 4
    scales    float32 [N]
    """
    run = w8a8_fused_linear_triton if x.is_cuda else w8a8_fused_linear_naive
    return run(x, weight, scales, bias, residual, norm, eps, gated)


def w8a8_fused_linear_naive(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    normed = total if norm is None else rms_norm_naive(total, norm, eps)
    out = scaled_matmul_naive(
        *quantize_tokens_naive(normed, weight.dtype), weight, scales, x.dtype, bias
    )
    return silu_and_mul_naive(out) if gated else out, total


@dataclass(frozen=True)
class W8GemvConfig:
    block_n: int
    """Rows of weights in a tile; if gated, gate and up in turn."""
    tiles: int
    """Of a program, which prepares its inputs once for all of them."""
    num_warps: int


DEFAULT = W8GemvConfig(block_n=4, tiles=2, num_warps=8)
"""The quickest on an H100 at the shapes of Llama-2-7B, or within a few percent of it."""


@triton.jit
def _multiply(w, x, INT8: tl.constexpr, ASM: tl.constexpr):
    """int8: words of four, int32 -> the sum of their products. FP8: w, x float32 -> w x."""
    if not INT8:
        return w.to(tl.float32) * x
    elif ASM:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [w, x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        products = (w >> 24) * (x >> 24)
        products += (w << 8 >> 24) * (x << 8 >> 24)
        products += (w << 16 >> 24) * (x << 16 >> 24)
        return products + (w << 24 >> 24) * (x << 24 >> 24)


@triton.jit
def _load_tile(
    weight_ptr,
    scale_ptr,
    first,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD: tl.constexpr,
    TAIL: tl.constexpr,
):
    """(row numbers, their scales, the head's weights [BLOCK_N, HEAD], the tail's)."""
    row = first + tl.arange(0, BLOCK_N)
    row = tl.where(row < N, row, 0)
    if GATED:
        row = row // 2 + row % 2 * (N // 2)
    at = row.to(tl.int64)[:, None] * WIDTH + tl.arange(0, HEAD)[None, :]
    head = tl.load(weight_ptr + at)
    tail = head
    if TAIL:
        k = HEAD + tl.arange(0, TAIL)[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + k
        tail = tl.load(weight_ptr + at, mask=k < WIDTH, other=0.0)
    return row, tl.load(scale_ptr + row), head, tail


@triton.jit
def _load_inputs(
    x_ptr, residual_ptr, sum_ptr, k, K: tl.constexpr, ADD: tl.constexpr, DTYPE: tl.constexpr
):
    """(x + residual at k, the sum of its squares), float32. The first programs store it."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        # The norm sees the sum as it is stored.
        total = x.to(DTYPE)
        if tl.program_id(1) == 0:
            tl.store(sum_ptr + k, total, mask=k < K)
        x = total.to(tl.float32)
    return x, tl.sum(x * x)


@triton.jit
def _normed(x, norm_ptr, k, scale, K: tl.constexpr, NORM: tl.constexpr, DTYPE: tl.constexpr):
    """(x scale norm, its largest value)."""
    if NORM:
        norm = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x = (x * scale * norm).to(DTYPE).to(tl.float32)
    return x, tl.max(tl.abs(x))


@triton.jit
def _rounded(x, scale, FORMAT: tl.constexpr, LARGEST: tl.constexpr, WIDTH: tl.constexpr):
    """float32 tile -> as `_multiply` takes it, [WIDTH]."""
    x = round_to(x / scale, FORMAT, LARGEST)
    if tl.int8 == FORMAT:
        shift = tl.arange(0, 4)[None, :] * 8
        return tl.sum((x.to(tl.int32) & 255).reshape(WIDTH, 4) << shift, 1)
    else:
        return x.to(tl.float32)


@triton.jit
def _w8a8_gemv_kernel(
    x_ptr,  # [T, K]
    residual_ptr,
    norm_ptr,
    weight_ptr,  # [N, WIDTH]
    scale_ptr,
    bias_ptr,
    out_ptr,  # [T, N], or [T, N / 2] if GATED
    sum_ptr,  # [T, K]
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,  # rows of weights
    WIDTH: tl.constexpr,  # of a row: int32 words of int8, or FP8 numbers
    LARGEST: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
    HEAD: tl.constexpr,  # a power of two, the first part of a row, and
    TAIL: tl.constexpr,  # another one for the rest, or 0
):
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    INT8: tl.constexpr = weight_ptr.dtype.element_ty == tl.int32
    FORMAT: tl.constexpr = tl.int8 if INT8 else tl.float8e4nv
    PER: tl.constexpr = 4 if INT8 else 1
    K: tl.constexpr = WIDTH * PER

    first = tl.program_id(1) * (BLOCK_N * TILES)
    row, scale, head, tail = _load_tile(
        weight_ptr, scale_ptr, first, N, WIDTH, GATED, BLOCK_N, HEAD, TAIL
    )
    # Weights are never written: only what comes next depends on the kernels before.
    launch_next(PDL)
    wait_for_previous(PDL)

    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    if ADD:
        residual_ptr += token * residual_stride
        sum_ptr += token * K
    k = tl.arange(0, HEAD * PER)
    x, squares = _load_inputs(x_ptr, residual_ptr, sum_ptr, k, K, ADD, DTYPE)
    if TAIL:
        tail_k = HEAD * PER + tl.arange(0, TAIL * PER)
        tail_x, more = _load_inputs(x_ptr, residual_ptr, sum_ptr, tail_k, K, ADD, DTYPE)
        squares += more
    norm_scale = tl.rsqrt(squares / K + eps)
    x, largest = _normed(x, norm_ptr, k, norm_scale, K, NORM, DTYPE)
    if TAIL:
        tail_x, more = _normed(tail_x, norm_ptr, tail_k, norm_scale, K, NORM, DTYPE)
        largest = tl.maximum(largest, more)
    x_scale = tl.maximum(largest, 1e-10) / LARGEST
    x = _rounded(x, x_scale, FORMAT, LARGEST, HEAD)[None, :]
    if TAIL:
        tail_x = _rounded(tail_x, x_scale, FORMAT, LARGEST, TAIL)[None, :]

    for i in tl.static_range(TILES):
        if i + 1 < TILES:
            next_tile = _load_tile(
                weight_ptr, scale_ptr, first + BLOCK_N, N, WIDTH, GATED, BLOCK_N, HEAD, TAIL
            )
        out = tl.sum(_multiply(head, x, INT8, ASM), 1)
        if TAIL:
            out += tl.sum(_multiply(tail, tail_x, INT8, ASM), 1)
        out = out.to(tl.float32) * x_scale * scale
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
            row, scale, head, tail = next_tile
            first += BLOCK_N


def w8a8_fused_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    config: W8GemvConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_rows = x.shape[0], weight.shape[0]
    config = config or DEFAULT
    num_outputs = num_rows // 2 if gated else num_rows
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out, total
    largest = LARGEST[weight.dtype]
    if weight.dtype == torch.int8:
        weight = weight.view(torch.int32)
    width = weight.shape[1]
    head = 1 << width.bit_length() - 1
    tail = triton.next_power_of_2(width - head) if width > head else 0
    grid = (num_tokens, triton.cdiv(num_rows, config.block_n * config.tiles))
    _w8a8_gemv_kernel[grid](
        x, residual, norm, weight, scales, bias, out, total,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        N=num_rows,
        WIDTH=width,
        LARGEST=largest,
        ADD=residual is not None,
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        ASM=not isinstance(_w8a8_gemv_kernel, InterpretedFunction),
        BLOCK_N=config.block_n,
        TILES=config.tiles,
        HEAD=head,
        TAIL=tail,
        num_warps=config.num_warps,
        **pdl(x.device),
    )  # fmt: skip
    return out, total
