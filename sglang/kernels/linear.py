"""y = x W^T with 16-bit weights: BLAS's, unless a GPU is a Hopper, and tokens are many, or some
dozen and the matrix small."""

from __future__ import annotations

import torch
import torch.nn.functional as F

try:
    from sglang.kernels import linear_hopper as hopper
    from sglang.kernels import wide_linear_hopper as wide
except ImportError:  # Triton without Gluon, or with an older one
    hopper = wide = None

MAX_TOKENS = 64
"""With more, BLAS is quicker."""
MAX_WEIGHTS = 1 << 23
"""Of more, BLAS's kernels are as quick: what is gained is the time between two of them."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N]."""
    if has_own(x, weight):
        return hopper.linear_hopper(x, weight, bias)
    if bias is None and wide is not None and wide.usable(x, weight):
        return wide.wide_linear_hopper(x, weight)
    return F.linear(x, weight, bias)


def add_linear(added: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """added [T, N], contiguous, += x W^T."""
    if has_own(x, weight):
        return hopper.linear_hopper(x, weight, added=added)
    return added.addmm_(x, weight.t())


def has_own(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product is the kernel's for some dozen tokens."""
    is_some = x.is_cuda and 0 < len(x) <= MAX_TOKENS and weight.numel() <= MAX_WEIGHTS
    are_halves = weight.dtype == x.dtype and x.dtype in (torch.float16, torch.bfloat16)
    return is_some and are_halves and hopper is not None and hopper.usable(x, weight)
