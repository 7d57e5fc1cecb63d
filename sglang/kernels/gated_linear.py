"""A SwiGLU MLP's first half, from its inputs to what the down projection takes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sglang.kernels.activation import silu_and_mul, silu_and_mul_naive
from sglang.kernels.linear import linear

try:
    from sglang.kernels import wide_linear_hopper as hopper
except ImportError:  # Triton without Gluon, or with an older one
    hopper = None


def gated_linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x [T, K], w [2 I, K] = (gate's rows | up's) -> silu(gate) * up, [T, I], in x's dtype. Gate
    and up are rounded to it first, in all kernels."""
    if hopper is not None and hopper.usable_gated(x, w):
        return hopper.gated_linear_hopper(x, w)
    return silu_and_mul(linear(x, w))


def gated_linear_naive(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return silu_and_mul_naive(F.linear(x, w))
