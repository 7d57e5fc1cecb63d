"""RMSNorm (Zhang & Sennrich, 2019), alone or fused with the residual addition before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang.kernels import cpu
from sglang.kernels.launch import launch_next, pdl, wait_for_previous


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, H] (rows may be strided), weight [H] -> x / rms(x) * weight, [T, H], in x's dtype."""
    if cpu.takes(x):
        return cpu.rms_norm(x, None, weight, eps)[0]
    return (rms_norm_triton if x.is_cuda else rms_norm_naive)(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x, residual [T, H] -> (rms_norm(x + residual), x + residual), both [T, H] in x's dtype."""
    if cpu.takes(x):
        return cpu.rms_norm(x, residual, weight, eps)
    return (add_rms_norm_triton if x.is_cuda else add_rms_norm_naive)(x, residual, weight, eps)


def rms_norm_naive(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm_naive(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual = x + residual
    return F.rms_norm(residual, (x.shape[-1],), weight, eps), residual


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,  # [T, H], read if ADD
    weight_ptr,
    out_ptr,  # [T, H] contiguous, as is sum_ptr
    sum_ptr,
    x_stride,
    residual_stride,
    eps,
    H: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < H
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    wait_for_previous(PDL)  # weights are never written
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0).to(
            tl.float32
        )
        # The norm sees the sum as it is stored, so that later layers and this one agree on it.
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * H + cols, x, mask=mask)
        x = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / H + eps)
    tl.store(out_ptr + row * H + cols, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)


def rms_norm_triton(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, out, None, eps)
    return out


def add_rms_norm_triton(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out, total = torch.empty((2, *x.shape), dtype=x.dtype, device=x.device)
    _launch(x, residual, weight, out, total, eps)
    return out, total


def _launch(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor | None,
    eps: float,
    num_warps: int | None = None,
) -> None:
    num_tokens, hidden = x.shape
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        H=hidden,
        ADD=residual is not None,
        BLOCK=block,
        num_warps=num_warps or _warps(num_tokens, block),
        **pdl(x.device),
    )


def _warps(num_tokens: int, block: int) -> int:
    """16 bytes a lane and load; where rows are many enough to fill the SMs, four such loads, so
    that more bytes are under way and fewer warps wait for each other."""
    return min(max(block // (1024 if num_tokens >= 512 else 256), 1), 16)
