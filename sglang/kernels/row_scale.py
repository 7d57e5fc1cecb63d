"""RMSNorm behind a product instead of before it.

norm(x) W^T is (x / rms(x)) (W diag(w))^T: with the norm's weight w in W, what is left of the norm
is one number a token, and the outputs may as well be multiplied by it. So the kernel that reads the
outputs does so, and one that would only read and write x is saved. That is worth it where kernels
are short: with many tokens, the longer reading of x costs as much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MAX_TOKENS = 512
"""With more, it is not worth it."""
MAX_INPUTS = 2048
"""Nor if a token is longer: each program that reads its outputs reads it, too."""


class RowScale(NamedTuple):
    """What outputs are still to be multiplied by: 1 / rms of their token."""

    tokens: torch.Tensor
    """[T, K], rows may be strided."""
    eps: float

    def times(self, out: torch.Tensor) -> torch.Tensor:
        """out [T, N], in its dtype: the naive twin of what kernels do."""
        squares = self.tokens.float().square().mean(-1, keepdim=True)
        return (out.float() * (squares + self.eps).rsqrt()).to(out.dtype)


def row_scale(x: torch.Tensor, eps: float) -> RowScale | None:
    """For the tokens x [T, K], if it is worth it."""
    return RowScale(x, eps) if len(x) <= MAX_TOKENS else None


def scale_arguments(scale: RowScale | None) -> tuple[torch.Tensor | None, int, float]:
    """The first, third and fourth argument of load_scale."""
    if scale is None:
        return None, 0, 0.0
    return scale.tokens, scale.tokens.stride(0), scale.eps


def scale_inputs(scale: RowScale | None) -> int:
    """The last one; 0: there is no scale."""
    return 0 if scale is None else scale.tokens.shape[1]


@triton.jit
def load_scale(tokens_ptr, row, stride, eps, K: tl.constexpr):
    BLOCK: tl.constexpr = triton.next_power_of_2(K)
    k = tl.arange(0, BLOCK)
    x = tl.load(tokens_ptr + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x) / K + eps)
