"""SwiGLU's gate (Shazeer, 2020)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang.kernels import cpu
from sglang.kernels.launch import launch_next, pdl, wait_for_previous
from sglang.kernels.row_scale import RowScale, load_scale, scale_arguments, scale_inputs


def silu_and_mul(x: torch.Tensor, scale: RowScale | None = None) -> torch.Tensor:
    """x [T, 2I] = (gate | up), contiguous -> silu(gate) * up, [T, I], in x's dtype.
    scale: what x is still to be multiplied by."""
    if scale is None and cpu.takes(x, 2 * cpu.LANES):
        return cpu.silu_and_mul(x)
    return (silu_and_mul_triton if x.is_cuda else silu_and_mul_naive)(x, scale)


def silu_and_mul_naive(x: torch.Tensor, scale: RowScale | None = None) -> torch.Tensor:
    gate, up = (x if scale is None else scale.times(x)).chunk(2, -1)
    return F.silu(gate).mul_(up)


@triton.jit
def _silu_and_mul_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    scale_stride,
    eps,
    I: tl.constexpr,  # noqa: E741
    K: tl.constexpr,  # of `load_scale`, or 0
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < I
    gate = tl.load(x_ptr + row * 2 * I + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * I + I + cols, mask=mask, other=0.0).to(tl.float32)
    if K:
        scale = load_scale(scale_ptr, row, scale_stride, eps, K)
        gate *= scale
        up *= scale
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * I + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


def silu_and_mul_triton(
    x: torch.Tensor, scale: RowScale | None = None, block: int = 1024, num_warps: int = 4
) -> torch.Tensor:
    num_tokens, inner = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_tokens, inner, dtype=x.dtype, device=x.device)
    if num_tokens:
        block = min(block, triton.next_power_of_2(inner))
        grid = (num_tokens, triton.cdiv(inner, block))
        _silu_and_mul_kernel[grid](
            x.contiguous(), out, *scale_arguments(scale),
            I=inner, K=scale_inputs(scale), BLOCK=block,
            num_warps=num_warps, **pdl(x.device),
        )  # fmt: skip
    return out
