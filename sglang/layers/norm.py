"""RMSNorm, which also carries the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.kernels.norm import add_rms_norm, rms_norm

if TYPE_CHECKING:
    from sglang.models.checkpoint import Checkpoint


class RMSNorm(nn.Module):
    def __init__(
        self, name: str, size: int, eps: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.name = name
        self.eps = eps
        weight = torch.empty(size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.is_plain = False
        """Whether the weight is all ones: x / rms(x) is left."""

    def load(self, checkpoint: Checkpoint) -> None:
        checkpoint.load(self.weight, f"{self.name}.weight")

    def move_weight_into(self, matrix: torch.Tensor) -> None:
        """matrix [N, H]: of the only product that reads what this norm returns."""
        matrix.mul_(self.weight)
        self.weight.fill_(1.0)
        self.is_plain = True

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, H] -> (the norm of x + residual, x + residual); no residual is zero."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, residual, self.weight, self.eps)
