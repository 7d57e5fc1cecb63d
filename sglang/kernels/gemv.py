"""Products of one token with a weight matrix, and what is around them in a decoder.

With one token a layer's time is that of reading its weights, and of starting its kernels.
So one kernel does residual addition, RMSNorm, product, bias and SwiGLU; and it asks for its weights
before the kernel before it has ended (programmatic dependent launch). Each program holds all of its
weights in registers: there is no loop, all its loads are under way at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sglang.kernels.activation import silu_and_mul_naive
from sglang.kernels.launch import launch_next, pdl, wait_for_previous

MAX_TOKENS = 1
"""Others would read the weights again, which tensor cores multiply with all of them at once."""


def is_few(x: torch.Tensor) -> bool:
    """Whether fused_linear is the quick way for the tokens x [T, K]."""
    return x.is_cuda and x.shape[0] <= MAX_TOKENS and x.dtype.itemsize == 2


def fused_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(act(rms_norm(x + residual) W^T + bias), x + residual), in x's dtype. Without `residual`
    nothing is added, without `norm` nothing is normed; act is SwiGLU if `gated`.

    x         [T, K], quick for T up to MAX_TOKENS
    weight    [N, K] contiguous
    bias      [N]
    residual  [T, K]
    norm      [K], the norm's weight
    gated     the outputs are (gate | up), [T, N] -> silu(gate) * up, [T, N / 2]
    """
    run = fused_linear_triton if x.is_cuda else fused_linear_naive
    return run(x, weight, bias, residual, norm, eps, gated)


def fused_linear_naive(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x if residual is None else x + residual
    normed = total if norm is None else F.rms_norm(total, (total.shape[-1],), norm, eps)
    out = F.linear(normed, weight, bias)
    return silu_and_mul_naive(out) if gated else out, total


@dataclass(frozen=True)
class GemvConfig:
    block_n: int
    """Outputs of a program, of each half if gated."""
    num_warps: int


def gemv_config(num_outputs: int, num_inputs: int, gated: bool) -> GemvConfig:
    block_k = triton.next_power_of_2(num_inputs)
    if block_k >= 4096 and num_outputs >= 4096:
        return GemvConfig(max(1, 16384 // block_k), num_warps=8)
    row = block_k * (2 if gated else 1)
    block_n = max(1, min(8, 65536 // row))
    # 128 weights a thread: 64 registers.
    return GemvConfig(block_n, num_warps=min(max(block_n * row // 4096, 2), 16))


@triton.jit
def _rows_times(w, x):
    """w [BLOCK_N, BLOCK_K], x float32 [BLOCK_K] -> float32 [BLOCK_N]."""
    return tl.sum(w.to(tl.float32) * x[None, :], 1)


@triton.jit(do_not_specialize=["num_tokens"])
def _gemv_kernel(
    x_ptr,  # [T, K]
    residual_ptr,
    norm_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,  # [T, N] contiguous
    sum_ptr,  # [T, K] contiguous
    num_tokens,
    x_stride,
    residual_stride,
    eps,
    N: tl.constexpr,  # of one half if GATED
    K: tl.constexpr,
    T: tl.constexpr,  # at least num_tokens
    ADD: tl.constexpr,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_k = k < K
    in_n = n < N
    mask = in_n[:, None] & in_k[None, :]
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    w = tl.load(weight_ptr + at, mask=mask, other=0.0)
    bias = tl.zeros([BLOCK_N], tl.float32)
    up_bias = bias
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    if GATED:
        w_up = tl.load(weight_ptr + N * K + at, mask=mask, other=0.0)
        if BIAS:
            up_bias = tl.load(bias_ptr + N + n, mask=in_n, other=0.0).to(tl.float32)
    if NORM:
        norm = tl.load(norm_ptr + k, mask=in_k, other=0.0).to(tl.float32)
    # Weights are never written: only what comes next depends on the kernels before.
    launch_next(PDL)
    wait_for_previous(PDL)

    dtype = out_ptr.dtype.element_ty
    for t in tl.static_range(T):
        in_x = k < tl.where(num_tokens > t, K, 0)
        x = tl.load(x_ptr + t * x_stride + k, mask=in_x, other=0.0).to(tl.float32)
        if ADD:
            x += tl.load(residual_ptr + t * residual_stride + k, mask=in_x, other=0.0).to(
                tl.float32
            )
            # The norm sees the sum as it is stored.
            x = x.to(dtype)
            if tl.program_id(0) == 0:
                tl.store(sum_ptr + t * K + k, x, mask=in_x)
            x = x.to(tl.float32)
        scale = 1.0
        if NORM:
            scale = tl.rsqrt(tl.sum(x * x) / K + eps)
            x *= norm
        out = _rows_times(w, x) * scale + bias
        if GATED:
            gate = out.to(dtype).to(tl.float32)
            up = (_rows_times(w_up, x) * scale + up_bias).to(dtype).to(tl.float32)
            out = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(out_ptr + t * N + n, out.to(dtype), mask=n < tl.where(num_tokens > t, N, 0))


def fused_linear_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    config: GemvConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_inputs = x.shape
    num_outputs = weight.shape[0] // 2 if gated else weight.shape[0]
    config = config or gemv_config(num_outputs, num_inputs, gated)
    out = torch.empty(num_tokens, num_outputs, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(x)
    if num_tokens == 0:
        return out, total
    _gemv_kernel[(triton.cdiv(num_outputs, config.block_n),)](
        x, residual, norm, weight, bias, out, total,
        num_tokens, x.stride(0), 0 if residual is None else residual.stride(0), eps,
        N=num_outputs,
        K=num_inputs,
        T=triton.next_power_of_2(num_tokens),
        ADD=residual is not None,
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        BLOCK_N=config.block_n,
        BLOCK_K=triton.next_power_of_2(num_inputs),
        num_warps=config.num_warps,
        **pdl(x.device),
    )  # fmt: skip
    return out, total
