"""Activations to 8 bits, each token by its own largest value (Xiao et al., SmoothQuant, 2023):
alone, or in one kernel with what makes them, RMSNorm or SwiGLU's gate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang.kernels.activation import silu_and_mul_naive
from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.norm import rms_norm_naive

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def quantize_tokens(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] -> (x_q [T, K] in `dtype`, float32 scales [T]), x_q * scale being near x."""
    return (quantize_tokens_triton if x.is_cuda else quantize_tokens_naive)(x, dtype)


def quantize_tokens_naive(
    x: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    x = x.float()
    scales = x.abs().amax(1).clamp_min(1e-10) / LARGEST[dtype]
    return nearest(x, scales, dtype), scales


def nearest(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [T, K] and scales [T], float32 -> the numbers of `dtype` that, scaled, are nearest to x."""
    q = x / scales[:, None]
    q = q.round() if dtype == torch.int8 else q
    return q.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def norm_and_quantize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual [T, K] -> (*quantize_tokens(rms_norm(x + residual)), x + residual)."""
    if not x.is_cuda:
        return norm_and_quantize_naive(x, residual, weight, eps, dtype)
    total = x if residual is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    return *_launch(x, dtype, residual, total, weight, eps), total


def norm_and_quantize_naive(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    return *quantize_tokens_naive(rms_norm_naive(total, weight, eps), dtype), total


def silu_and_quantize(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, 2 K] = (gate | up) -> quantize_tokens(silu(gate) * up)."""
    return _launch(x, dtype, gated=True) if x.is_cuda else silu_and_quantize_naive(x, dtype)


def silu_and_quantize_naive(
    x: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_tokens_naive(silu_and_mul_naive(x), dtype)


def quantize_tokens_triton(
    x: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return _launch(x, dtype)


@triton.jit
def round_to(x, DTYPE: tl.constexpr, LARGEST: tl.constexpr):
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST)
    if tl.int8 == DTYPE:
        # Adding 1.5 * 2^23 leaves no bits for a fraction: rounds half to even, as torch does.
        x = (x + 12582912.0) - 12582912.0
    return x.to(DTYPE)


@triton.jit
def _quantize_kernel(
    x_ptr,  # [T, K], or (gate | up) [T, 2 K] if GATED
    residual_ptr,  # [T, K]
    norm_ptr,
    out_ptr,  # [T, K] contiguous, as is sum_ptr
    scale_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    eps,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    if NORM:
        norm = tl.load(norm_ptr + k, mask=mask, other=0.0).to(tl.float32)
    launch_next(PDL)
    wait_for_previous(PDL)
    x = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
    # What other kernels would have stored between the steps is rounded as they would.
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + k, mask=mask, other=0.0).to(tl.float32)
        total = x.to(DTYPE)
        tl.store(sum_ptr + row * K + k, total, mask=mask)
        x = total.to(tl.float32)
    if NORM:
        x = x * tl.rsqrt(tl.sum(x * x) / K + eps) * norm
        x = x.to(DTYPE).to(tl.float32)
    if GATED:
        up = tl.load(x_ptr + row * x_stride + K + k, mask=mask, other=0.0).to(tl.float32)
        x = (x / (1.0 + tl.exp(-x)) * up).to(DTYPE).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x)), 1e-10) / LARGEST
    tl.store(scale_ptr + row, scale)
    q = round_to(x / scale, out_ptr.dtype.element_ty, LARGEST)
    tl.store(out_ptr + row * K + k, q, mask=mask)


def _launch(
    x: torch.Tensor,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, k = x.shape[0], x.shape[1] // 2 if gated else x.shape[1]
    out = torch.empty(num_tokens, k, dtype=dtype, device=x.device)
    scales = torch.empty(num_tokens, dtype=torch.float32, device=x.device)
    if num_tokens:
        block = triton.next_power_of_2(k)
        _quantize_kernel[(num_tokens,)](
            x, residual, norm, out, scales, total,
            x.stride(0), 0 if residual is None else residual.stride(0), eps,
            K=k,
            LARGEST=LARGEST[dtype],
            ADD=residual is not None,
            NORM=norm is not None,
            GATED=gated,
            BLOCK=block,
            num_warps=min(max(block // 512, 1), 16),
            **pdl(x.device),
        )  # fmt: skip
    return out, scales
