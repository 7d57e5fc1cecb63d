"""One token times a matrix of 4-bit weights, and what is around it in a decoder.

As in kernels/gemv.py one kernel does residual addition, RMSNorm, product, bias and SwiGLU, and asks
for its weights before the kernel before it has ended. But here instructions are as scarce as bytes:
an H200 reads 4-bit weights so fast that it can spend three or four instructions on each. So tensor
cores multiply, though there is but one token (int4_dots.py). As many programs as the GPU holds at a
time share out the tiles of rows: each prepares its inputs once, and loads the next tile before it
adds up the sums of this one. They are loaded side by side, whatever chunk they belong to: a load
takes as long as it meets lines of the cache, and all programs of a multiprocessor load all inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from sglang.kernels.gemv import fused_linear_naive
from sglang.kernels.int4_dots import plus, prepare, times
from sglang.kernels.int4_weight import Int4Weight, dequantize_int4_naive
from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.one_token import OneTokenConfig, add_up, store_outputs

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


def choose_config(num_inputs: int, group_size: int) -> OneTokenConfig:
    """Measured on an H200 at the shapes of Llama-2-7B, in a chain as in a decoder, whatever the
    number of rows. Other shapes get what keeps as much under way with as many registers: all of a
    tile has to be in them, and small groups take more."""
    if group_size % 128:
        if num_inputs <= 4096:
            return OneTokenConfig(rows=4, num_warps=4, per_sm=2)
        rows = 4 if num_inputs <= 8192 else 2 if num_inputs <= 16384 else 1
        return OneTokenConfig(rows, num_warps=8, per_sm=1)
    if num_inputs <= 8192:
        num_warps = 2 if num_inputs <= 2048 else 4 if num_inputs <= 4096 else 8
        return OneTokenConfig(4, num_warps, per_sm=16 // num_warps)
    if num_inputs <= 16384:
        return OneTokenConfig(rows=2, num_warps=4 if num_inputs <= 12288 else 8, per_sm=2)
    return OneTokenConfig(rows=2 if num_inputs <= 32768 else 1, num_warps=8, per_sm=1)


@triton.jit
def _load_inputs(
    x_ptr, residual_ptr, sum_ptr, norm, k, K: tl.constexpr, ADD: tl.constexpr, NORM: tl.constexpr
):
    """((x + residual) times the norm's weight, squares of x + residual) at k, float32. The first
    program of a token stores x + residual."""
    x = tl.load(x_ptr + k, mask=k < K, other=0.0)
    if ADD:
        total = x.to(tl.float32) + tl.load(residual_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        # The norm sees the sum as it is stored.
        x = total.to(sum_ptr.dtype.element_ty)
        if tl.program_id(1) == 0:
            tl.store(sum_ptr + k, x, mask=k < K)
    x = x.to(tl.float32)
    squares = x * x
    if NORM:
        x *= norm.to(tl.float32)
    return x, squares


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
    norms = ()
    for i in tl.static_range(PARTS):
        k = i * C * 32 + tl.arange(0, C * 32)
        norms += (tl.load(norm_ptr + k, mask=k < K, other=0.0) if NORM else 1.0,)
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
        k = i * C * 32 + tl.arange(0, C * 32)
        x, q = _load_inputs(x_ptr, residual_ptr, sum_ptr, norms[i], k, K, ADD, NORM)
        loaded += (x,)
        squares += q
    norm_scale = 1.0
    if NORM:
        norm_scale = tl.rsqrt(tl.sum(squares) / K + eps)
    inputs = ()
    for i in tl.static_range(PARTS):
        inputs += (prepare(loaded[i], norm_scale, UNIT, DTYPE, TENSOR),)

    for tile in tl.range(tl.program_id(1), TILES, PROGRAMS, num_stages=1):
        sums = times(weights[0], weights[1], inputs[0], GROUP, DTYPE, TENSOR)
        for i in tl.static_range(1, PARTS):
            more = times(weights[2 * i], weights[2 * i + 1], inputs[i], GROUP, DTYPE, TENSOR)
            sums = plus(sums, more)
        if PROGRAMS < TILES:  # noqa: SIM102 (a constant)
            if tile + PROGRAMS < TILES:
                weights = _load_tile(
                    words_ptr, scales_ptr, tile + PROGRAMS, N, K, GROUP, GATED, R, C, PARTS
                )
        out = add_up(sums, TENSOR) * (1.0 / UNIT)
        store_outputs(out, bias_ptr, out_ptr + token * OUTPUTS, tile, OUTPUTS, BIAS, GATED, R)


def int4_fused_linear_triton(
    x: torch.Tensor,
    w: Int4Weight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    config: OneTokenConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_tokens, num_inputs), num_rows = x.shape, w.packed.shape[0]
    config = config or choose_config(num_inputs, w.group_size)
    num_outputs = num_rows // 2 if gated else num_rows
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_tokens == 0:
        return out, total
    cut = config.cut(x.device, num_rows, triton.cdiv(num_inputs, CHUNK))
    interpreted = isinstance(_int4_gemv_kernel, InterpretedFunction)
    _int4_gemv_kernel[(num_tokens, cut["PROGRAMS"])](
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
        **cut,
        **pdl(x.device),
    )  # fmt: skip
    return out, total
