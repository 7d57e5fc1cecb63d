"""One token times a matrix of 8-bit weights, and what is around it in a decoder.

As in kernels/gemv.py one kernel does residual addition, RMSNorm, product, bias and SwiGLU, and asks
for its weights before the kernel before it has ended; this one also rounds the token to 8 bits, by
its own largest value, between norm and product. As in kernels/int4_gemv.py tensor cores multiply,
and as many programs as the GPU holds at a time share out the tiles of rows: each prepares its
inputs once, and loads the next tile before it adds up the sums of this one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.activation import silu_and_mul_naive
from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.norm import rms_norm_naive
from sglang.kernels.one_token import OneTokenConfig, add_up, store_outputs
from sglang.kernels.quant_tokens import LARGEST, quantize_tokens_naive
from sglang.kernels.quant_w8a8 import scaled_matmul_naive
from sglang.kernels.w8a8_dots import as_stored, diagonal, prepare, times, zeros

MAX_TOKENS = 1
"""With more, tensor cores are quicker that have them all as columns."""
MAX_INPUTS = 32768
"""More do not fit into registers."""
CHUNK = 16
"""Weights of a row that a lane loads at once."""


def is_few(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether w8a8_fused_linear is the quick way for the tokens x [T, K]."""
    k = weight.shape[1]
    return x.is_cuda and len(x) <= MAX_TOKENS and k <= MAX_INPUTS and k % CHUNK == 0


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
    weight    int8 or float8_e4m3fn [N, K], K a multiple of 16
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


def choose_config(num_inputs: int, num_rows: int) -> OneTokenConfig:
    """Measured on an H200 at the shapes of Llama-2-7B, in a chain as in a decoder. Others get what
    keeps as much under way: all of a tile has to be in registers, with the inputs of a row."""
    if num_inputs <= 2048:
        num_warps = 2 if num_inputs <= 1024 else 4
        return OneTokenConfig(4, num_warps, per_sm=16 // num_warps)
    if num_inputs <= 4096 and num_rows > 8192:
        if num_rows > 16384:
            return OneTokenConfig(4, num_warps=8, per_sm=3)
        return OneTokenConfig(4, num_warps=4, per_sm=4)
    if num_inputs <= 8192:
        return OneTokenConfig(4, num_warps=8, per_sm=2)
    if num_inputs <= 12288:
        return OneTokenConfig(2, num_warps=8, per_sm=2)
    return OneTokenConfig(2 if num_inputs <= 16384 else 1, num_warps=16, per_sm=1)


@triton.jit
def _rows_of(tile, i, N: tl.constexpr, GATED: tl.constexpr, R: tl.constexpr):
    """The i-th row of a tile. Behind the last one it is that again."""
    if GATED:
        return tl.minimum(tile * R + i % R, N // 2 - 1) + i // R * (N // 2)
    else:
        return tl.minimum(tile * (2 * R) + i, N - 1)


@triton.jit
def _load_tile(
    weight_ptr, scale_ptr, tile, N: tl.constexpr, WIDTH: tl.constexpr, GATED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """(scales of its rows [2 R], their chunks int32 [C, 4], part by part of the inputs)."""
    scales = tl.load(scale_ptr + _rows_of(tile, tl.arange(0, 2 * R), N, GATED, R))
    chunks = ()
    for i in tl.static_range(2 * R * PARTS):
        row = _rows_of(tile, i % (2 * R), N, GATED, R)
        # Behind a row's end any weights will do: they meet zeros.
        chunk = tl.minimum(i // (2 * R) * C + tl.arange(0, C), WIDTH // 4 - 1)
        word = chunk[:, None] * 4 + tl.arange(0, 4)[None, :]
        chunks += (tl.load(weight_ptr + row.to(tl.int64) * WIDTH + word),)
    return scales, chunks


@triton.jit
def _eight_inputs(i, C: tl.constexpr):
    """[C, 8], where the half i % 2 of each chunk is in the part i // 2."""
    chunk = i // 2 * C + tl.arange(0, C)
    return chunk[:, None] * 16 + (i % 2 * 8 + tl.arange(0, 8))[None, :]


@triton.jit
def _plus_and_maximum(a, b, c, d):
    return a + c, tl.maximum(b, d)


@triton.jit
def _w8a8_gemv_kernel(
    x_ptr,  # [T, K]
    residual_ptr,
    norm_ptr,
    weight_ptr,  # int32 [N, WIDTH]
    scale_ptr,
    bias_ptr,
    out_ptr,  # [T, N], or [T, N / 2] if GATED
    sum_ptr,  # [T, K]
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,  # rows of weights
    WIDTH: tl.constexpr,  # of a row, words of four weights
    FORMAT: tl.constexpr,  # int8 or float8e4nv
    LARGEST: tl.constexpr,
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
    INT8: tl.constexpr = tl.int8 == FORMAT
    K: tl.constexpr = WIDTH * 4
    OUTPUTS: tl.constexpr = N // 2 if GATED else N
    tile = tl.program_id(1)
    scales, chunks = _load_tile(weight_ptr, scale_ptr, tile, N, WIDTH, GATED, R, C, PARTS)
    norms = ()
    if NORM:
        for i in tl.static_range(2 * PARTS):
            k = _eight_inputs(i, C)
            norms += (tl.load(norm_ptr + k, mask=k < K, other=0.0),)
    # Weights are never written: only what comes next depends on the kernels before.
    launch_next(PDL)
    wait_for_previous(PDL)

    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride
    if ADD:
        residual_ptr += token * residual_stride
        sum_ptr += token * K
    loaded = ()
    squares = tl.zeros([C], tl.float32)
    largest = tl.zeros([C], tl.float32)
    for i in tl.static_range(2 * PARTS):
        k = _eight_inputs(i, C)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        if ADD:
            total = x.to(tl.float32)
            total += tl.load(residual_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            # The norm sees the sum as it is stored.
            x = total.to(DTYPE)
            if tl.program_id(1) == 0:
                tl.store(sum_ptr + k, x, mask=k < K)
        x = x.to(tl.float32)
        squares += tl.sum(x * x, 1)
        if NORM:
            x *= norms[i].to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
        loaded += (x,)
    squares, largest = tl.reduce((squares, largest), 0, _plus_and_maximum)
    norm_scale = 1.0
    if NORM:
        norm_scale = tl.rsqrt(squares / K + eps)
        largest = (largest * norm_scale).to(DTYPE).to(tl.float32)
    x_scale = tl.maximum(largest, 1e-10) / LARGEST
    inputs = ()
    for i in tl.static_range(PARTS):
        a, b = loaded[2 * i], loaded[2 * i + 1]
        if NORM:
            a = as_stored(a * norm_scale, DTYPE, TENSOR)
            b = as_stored(b * norm_scale, DTYPE, TENSOR)
        a, b = prepare(a, x_scale, FORMAT, LARGEST), prepare(b, x_scale, FORMAT, LARGEST)
        inputs += (a + b,)

    for tile in tl.range(tl.program_id(1), TILES, PROGRAMS, num_stages=1):
        sums = (zeros(C, INT8),) * R
        for i in tl.static_range(PARTS):
            more = ()
            for r in tl.static_range(R):
                first, second = chunks[2 * R * i + r], chunks[2 * R * i + R + r]
                more += (times(first, second, inputs[i], sums[r], INT8, TENSOR),)
            sums = more
        firsts = ()
        seconds = ()
        for r in tl.static_range(R):
            pair = diagonal(sums[r], TENSOR)
            firsts += (pair[0],)
            seconds += (pair[1],)
        scale = x_scale * scales
        if PROGRAMS < TILES:  # noqa: SIM102 (a constant)
            if tile + PROGRAMS < TILES:
                scales, chunks = _load_tile(
                    weight_ptr, scale_ptr, tile + PROGRAMS, N, WIDTH, GATED, R, C, PARTS
                )
        out = add_up(firsts + seconds, TENSOR) * scale
        store_outputs(out, bias_ptr, out_ptr + token * OUTPUTS, tile, OUTPUTS, BIAS, GATED, R)


def w8a8_fused_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    config: OneTokenConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_tokens, num_inputs), num_rows = x.shape, weight.shape[0]
    if num_inputs % CHUNK:
        raise ValueError(f"{num_inputs} inputs are no multiple of {CHUNK}")
    config = config or choose_config(num_inputs, num_rows)
    num_outputs = num_rows // 2 if gated else num_rows
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out, total
    cut = config.cut(x.device, num_rows, triton.cdiv(num_inputs, CHUNK))
    interpreted = isinstance(_w8a8_gemv_kernel, InterpretedFunction)
    _w8a8_gemv_kernel[(num_tokens, cut["PROGRAMS"])](
        x, residual, norm, weight.view(torch.int32), scales, bias, out, total,
        x.stride(0), 0 if residual is None else residual.stride(0), eps,
        N=num_rows,
        WIDTH=num_inputs // 4,
        FORMAT=tl.int8 if weight.dtype == torch.int8 else tl.float8e4nv,
        LARGEST=LARGEST[weight.dtype],
        ADD=residual is not None,
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        TENSOR=x.dtype.itemsize == 2 and not interpreted,
        **cut,
        **pdl(x.device),
    )  # fmt: skip
    return out, total
