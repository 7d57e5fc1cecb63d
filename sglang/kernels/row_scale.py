"""RMSNorm behind a product instead of before it.

norm(x) W^T is (x / rms(x)) (W diag(w))^T: with the norm's weight w in W, what is left of the norm
is one number a token, and the outputs may as well be multiplied by it. So the kernel that reads the
outputs does so, and one that would only read and write x is saved.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sglang.kernels.launch import launch_next, pdl, wait_for_previous

FEW_TOKENS, FEW_INPUTS = 512, 2048
"""Up to here each program that needs a token's scale computes it from the token, in the L2."""


class RowScale(NamedTuple):
    """What outputs are still to be multiplied by: 1 / rms of each token."""

    of: torch.Tensor
    """The tokens [T, K], or their scales, float32 [T]."""
    eps: float

    def values(self) -> torch.Tensor:
        """float32 [T]."""
        return self.of if self.of.ndim == 1 else row_scales(self.of, self.eps)

    def times(self, out: torch.Tensor) -> torch.Tensor:
        """out [T, N], in its dtype: the naive twin of what kernels do."""
        return (out.float() * self.values()[:, None]).to(out.dtype)


def row_scale(x: torch.Tensor, eps: float) -> RowScale:
    """Of x [T, K], in whichever form is cheaper."""
    is_small = len(x) <= FEW_TOKENS and x.shape[1] <= FEW_INPUTS
    return RowScale(x if is_small else row_scales(x, eps), eps)


def row_scales(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, K] (rows may be strided) -> 1 / rms(x), float32 [T]."""
    return (row_scales_triton if x.is_cuda else row_scales_naive)(x, eps)


def row_scales_naive(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x.float().square().mean(-1).add_(eps).rsqrt_()


def scale_arguments(scale: RowScale | None) -> tuple[torch.Tensor | None, int, float]:
    """The first, third and fourth argument of load_scale."""
    return (None, 0, 0.0) if scale is None else (scale.of, scale.of.stride(0), scale.eps)


def scale_inputs(scale: RowScale | None) -> int:
    """The last one."""
    return 0 if scale is None or scale.of.ndim == 1 else scale.of.shape[1]


@triton.jit
def load_scale(of_ptr, row, stride, eps, K: tl.constexpr):
    """A token's scale, from the scales if K is 0, else from the token."""
    if K == 0:
        return tl.load(of_ptr + row)
    else:
        BLOCK: tl.constexpr = triton.next_power_of_2(K)
        k = tl.arange(0, BLOCK)
        x = tl.load(of_ptr + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
        return tl.rsqrt(tl.sum(x * x) / K + eps)


@triton.jit(do_not_specialize=["num_rows"])
def _row_scale_kernel(
    x_ptr,
    out_ptr,
    num_rows,
    stride,
    eps,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    launch_next(PDL)
    wait_for_previous(PDL)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * stride + k[None, :]
    mask = (row < num_rows)[:, None] & (k < K)[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.rsqrt(tl.sum(x * x, 1) / K + eps), mask=row < num_rows)


def row_scales_triton(x: torch.Tensor, eps: float) -> torch.Tensor:
    num_rows, inputs = x.shape
    out = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(inputs)
        rows = max(8192 // block, 1)
        # 64 elements a lane: enough bytes under way, and few programs to begin and to end.
        _row_scale_kernel[(triton.cdiv(num_rows, rows),)](
            x, out, num_rows, x.stride(0), eps, K=inputs, ROWS=rows, BLOCK=block,
            num_warps=min(max(rows * block // 2048, 4), 16), **pdl(x.device),
        )  # fmt: skip
    return out
