"""Linear layers, whole or one tensor-parallel rank's share (Shoeybi et al., Megatron-LM, 2019):
column-parallel ones split their outputs over the ranks, row-parallel ones their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.layers.shard import WHOLE, Shard
from sglang.quantization.base import LinearMethod, Quantization

if TYPE_CHECKING:
    from sglang.kernels.row_scale import RowScale
    from sglang.layers.norm import RMSNorm
    from sglang.models.checkpoint import Checkpoint
    from sglang.worker.parallel import TensorParallel


@dataclass(frozen=True)
class Part:
    """One of the layers that a fused layer is made of."""

    name: str
    """In the checkpoint, without ".weight"."""
    out_features: int
    """Of all ranks together."""
    shard: Shard = WHOLE
    """This rank's outputs."""
    padded: bool = False
    """Ranks may have unequal shares, made equal by zeros at the end."""


class Linear(nn.Module):
    """x [T, in] -> [T, sum of the parts' outputs on this rank]."""

    # What the quantization method makes of the weights.
    packed: torch.Tensor | None

    def __init__(
        self,
        parts: Sequence[Part],
        in_features: int,
        method: LinearMethod,
        dtype: torch.dtype,
        device: torch.device,
        bias: bool = False,
        input_shard: Shard = WHOLE,
    ) -> None:
        """in_features: of all ranks together."""
        super().__init__()
        self.parts = list(parts)
        self.in_features = in_features
        self.method = method
        self.dtype = dtype
        self.device = device
        self.input_shard = input_shard
        self.readers: list[Linear] = []  # in a list: no submodule of this one
        """All that read this one's outputs, if it is known: a method may hand them on in a form of
        its own to layers of the same method."""
        self.has_bias = bias
        self.bias: torch.Tensor | None = None

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(self, checkpoint)
        if self.has_bias:
            sizes = [part.shard.length(part.out_features) for part in self.parts]
            bias = torch.empty(sum(sizes), dtype=self.dtype, device=self.device)
            for part, view in zip(self.parts, bias.split(sizes), strict=True):
                checkpoint.load(view, f"{part.name}.bias", 0, part.shard)
            self.bias = nn.Parameter(bias, requires_grad=False)
        self.method.finish(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.method.apply(self, x, self.bias)

    def normed(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm, gated: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x, residual [T, in] -> (this layer of norm(x + residual), x + residual). `gated`: of
        outputs (gate | up), silu(gate) * up."""
        return self.method.apply_normed(self, x, self.bias, norm, residual, gated)

    def unscaled(
        self, x: torch.Tensor, residual: torch.Tensor | None, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor, RowScale | None]:
        """As `normed`, and what this layer's outputs are still to be multiplied by, if anything."""
        return self.method.apply_unscaled(self, x, self.bias, norm, residual)

    def take_norm(self, norm: RMSNorm) -> None:
        """No other layer reads what the norm returns. After both have been loaded."""
        self.method.take_norm(self, norm)


class QKVLinear(Linear):
    """x [T, in] -> [T, (Hq + 2 Hkv) D] of this rank: the heads of q, then of k, then of v.

    With more ranks than KV heads, several ranks hold the same one.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        quantization: Quantization,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        bias: bool = False,
    ) -> None:
        q_shard = Shard(tp.rank, tp.size)
        kv_size = min(tp.size, num_kv_heads)
        kv_shard = Shard(tp.rank * kv_size // tp.size, kv_size)
        parts = [
            Part(f"{name}.q_proj", num_heads * head_dim, q_shard),
            Part(f"{name}.k_proj", num_kv_heads * head_dim, kv_shard),
            Part(f"{name}.v_proj", num_kv_heads * head_dim, kv_shard),
        ]
        method = quantization.fused([part.name for part in parts])
        super().__init__(parts, in_features, method, dtype, device, bias)


class GateUpLinear(Linear):
    """x [T, in] -> [T, 2 I] of this rank: gate, then up."""

    def __init__(
        self,
        name: str,
        in_features: int,
        intermediate_size: int,
        quantization: Quantization,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        bias: bool = False,
    ) -> None:
        shard = Shard(tp.rank, tp.size)
        parts = [
            Part(f"{name}.{each}_proj", intermediate_size, shard) for each in ("gate", "up")
        ]  # fmt: skip
        method = quantization.fused([part.name for part in parts])
        super().__init__(parts, in_features, method, dtype, device, bias)


class RowParallelLinear(Linear):
    """x [T, in of this rank] -> [T, out], the same on all ranks."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        quantization: Quantization,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
        bias: bool = False,
    ) -> None:
        method = quantization.linear(name)
        shard = Shard(tp.rank, tp.size)
        super().__init__(
            [Part(name, out_features)], in_features, method, dtype, device, bias, shard
        )
        self.tp = tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The ranks' results are summed: one of them adds the bias.
        out = self.method.apply(self, x, self.bias if self.tp.rank == 0 else None)
        return self.tp.all_reduce(out)

    def added(
        self, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [T, in], residual [T, out], which may be overwritten -> two summands (or one) of
        residual + this layer of x: what the next norm takes."""
        if self.tp.size > 1:
            return self(x), residual
        return self.method.apply_added(self, x, self.bias, residual)
