"""8-bit products: y = (x_q W_q^T) x_scale[token] w_scale[output] + bias, all in int8 or all in FP8
(e4m3). Tokens are quantized as in quant_tokens.py. Scales are applied to the sums, so the product
itself is one of the tensor cores' 8-bit ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.quant_split_k import split_k_workspace, sum_splits, tile_of

try:
    from sglang.kernels import linear_hopper as hopper
except ImportError:  # Triton without Gluon, or with an older one
    hopper = None

LIBRARY_TOKENS, HOPPER_LIBRARY_TOKENS = 128, 512
"""From here on torch's product is quicker, where there is one."""


def scaled_matmul(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [T, K], weight [N, K], both int8 or both float8_e4m3fn; x_scales [T], scales [N], float32
    -> (x W^T) x_scales scales + bias, [T, N] in `dtype`."""
    arguments = (x, x_scales, weight, scales, dtype, bias)
    if not x.is_cuda:
        return scaled_matmul_naive(*arguments)
    own, least_tokens = scaled_matmul_triton, LIBRARY_TOKENS
    if hopper is not None and hopper.usable(x, weight):
        own, least_tokens = hopper.w8a8_hopper, HOPPER_LIBRARY_TOKENS
    if len(x) >= least_tokens and _library_can(weight, dtype):
        return scaled_matmul_library(*arguments)
    return own(*arguments)


def _library_can(weight: torch.Tensor, dtype: torch.dtype) -> bool:
    fits = weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0
    return fits and weight.dtype == torch.float8_e4m3fn and dtype == torch.bfloat16


def scaled_matmul_naive(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    # float32 holds products of int8 exactly, and sums of a thousand of them.
    out = F.linear(x.float(), weight.float()) * x_scales[:, None] * scales
    return (out if bias is None else out + bias.float()).to(dtype)


def scaled_matmul_library(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """CUDA, FP8 to bfloat16 only; K and N multiples of 16."""
    return torch._scaled_mm(
        x, weight.t(), x_scales[:, None], scales[None, :], out_dtype=dtype,
        use_fast_accum=True, bias=bias,
    )  # fmt: skip


# --- kernels -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class W8A8Config:
    block_m: int
    block_n: int
    block_k: int
    splits: int
    num_warps: int
    num_stages: int


@triton.jit(do_not_specialize=["num_tokens"])
def _w8a8_kernel(
    x_ptr,  # [T, K] contiguous
    x_scale_ptr,
    weight_ptr,  # [N, K]
    scale_ptr,
    bias_ptr,
    out_ptr,  # [T, N]
    partial_ptr,  # float32 [SPLITS, T, N]
    arrived_ptr,
    num_tokens,
    N,
    K,
    BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    # Transposed, out^T = W x^T: a wide block of outputs is what the tensor cores' 64 rows are for,
    # and Triton multiplies FP8 as FP8 whatever the number of tokens.
    SUM: tl.constexpr = tl.int32 if weight_ptr.dtype.element_ty == tl.int8 else tl.float32
    steps = (K + BLOCK_K - 1) // BLOCK_K
    each = (steps + SPLITS - 1) // SPLITS
    tiles_m = (num_tokens + BLOCK_M - 1) // BLOCK_M
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, (N + BLOCK_N - 1) // BLOCK_N)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_n = tl.where(n < N, n, 0)
    safe_m = tl.where(m < num_tokens, m, 0)
    k = tl.arange(0, BLOCK_K)
    w_ptrs = weight_ptr + safe_n.to(tl.int64)[:, None] * K + k[None, :]
    x_ptrs = x_ptr + safe_m[None, :] * K + k[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_M], SUM)
    for step in tl.range(split * each, min(split * each + each, steps), num_stages=NUM_STAGES):
        k0 = step * BLOCK_K
        if EVEN_K:
            w = tl.load(w_ptrs + k0)
            x = tl.load(x_ptrs + k0)
        else:
            w = tl.load(w_ptrs + k0, mask=(k0 + k < K)[None, :], other=0.0)
            x = tl.load(x_ptrs + k0, mask=(k0 + k < K)[:, None], other=0.0)
        acc = tl.dot(w, x, acc, out_dtype=SUM)

    out = acc.to(tl.float32)
    at = m[None, :] * N + n[:, None]
    in_m = (m < num_tokens)[None, :]
    mask = in_m & (n < N)[:, None]
    if SPLITS > 1:
        out, is_last = sum_splits(out, at, mask, partial_ptr, arrived_ptr, num_tokens * N, SPLITS)
        mask = in_m & (n < tl.where(is_last, N, 0))[:, None]
    out *= tl.load(x_scale_ptr + safe_m)[None, :] * tl.load(scale_ptr + safe_n)[:, None]
    if BIAS:
        out += tl.load(bias_ptr + safe_n).to(tl.float32)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)


def choose_config(num_tokens: int, n: int, k: int) -> W8A8Config:
    """The quickest on an H100 at the shapes of Llama-2-7B."""
    block_m = min(max(triton.next_power_of_2(num_tokens), 16), 128)
    if block_m <= 64:
        splits = 2 if k > 8192 else 1
        return W8A8Config(
            block_m, 64, 256, splits, num_warps=4, num_stages=4 if block_m == 16 else 3
        )
    if triton.cdiv(num_tokens, 256) * triton.cdiv(n, 128) >= 264:  # twice the GPU's SMs
        return W8A8Config(256, 128, 128, 1, num_warps=8, num_stages=3)
    return W8A8Config(128, 64, 128, 1, num_warps=4, num_stages=4)


def scaled_matmul_triton(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    config: W8A8Config | None = None,
) -> torch.Tensor:
    (num_tokens, k), n = x.shape, weight.shape[0]
    out = torch.empty(num_tokens, n, dtype=dtype, device=x.device)
    if num_tokens == 0:
        return out
    config = config or choose_config(num_tokens, n, k)
    partial, arrived = split_k_workspace(config.splits, num_tokens, n, x.device)
    tiles = triton.cdiv(n, config.block_n) * triton.cdiv(num_tokens, config.block_m)
    _w8a8_kernel[(tiles, config.splits)](
        x, x_scales, weight, scales, bias, out, partial, arrived, num_tokens,
        N=n, K=k, BIAS=bias is not None,
        SPLITS=config.splits,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        EVEN_K=k % config.block_k == 0,
        NUM_STAGES=config.num_stages,
        num_warps=config.num_warps,
        **pdl(x.device),
    )  # fmt: skip
    return out
