"""Self-attention: everything between the two norms of a layer's first half."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from sglang.kernels.rope import rope_and_write_kv
from sglang.layers.linear import QKVLinear, RowParallelLinear
from sglang.layers.norm import RMSNorm
from sglang.quantization.base import Quantization

if TYPE_CHECKING:
    from sglang.model_config import ModelConfig
    from sglang.worker.batch import Batch
    from sglang.worker.parallel import TensorParallel


class Attention(nn.Module):
    def __init__(
        self,
        name: str,
        layer: int,
        config: ModelConfig,
        quantization: Quantization,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.layer = layer
        self.is_last = layer == config.num_layers - 1
        self.num_heads = heads // tp.size
        self.num_kv_heads = max(1, kv_heads // tp.size)
        self.scale = head_dim**-0.5
        self.window = config.window_of_layer(layer)
        self.eps = config.rms_norm_eps
        where = (tp, dtype, device)
        self.qkv_proj = QKVLinear(
            name, config.hidden_size, heads, kv_heads, head_dim,
            quantization, *where, bias=config.qkv_bias,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            f"{name}.o_proj", heads * head_dim, config.hidden_size,
            quantization, *where, bias=config.o_bias,
        )  # fmt: skip
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(f"{name}.q_norm", head_dim, self.eps, dtype, device)
            self.k_norm = RMSNorm(f"{name}.k_norm", head_dim, self.eps, dtype, device)

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: RMSNorm,
        positions: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: Batch,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x, residual [T, H] -> summands of x + residual + attention of norm(x + residual); the
        tokens' K and V go into batch.kv_cache. In the last layer, the summands of tokens batch.last
        only, if it is given."""
        qkv, residual, scale = self.qkv_proj.unscaled(x, residual, norm)
        k_cache, v_cache = batch.kv_cache.k[self.layer], batch.kv_cache.v[self.layer]
        q, k, v = rope_and_write_kv(
            qkv, positions, batch.slots, cos_sin, k_cache, v_cache,
            self.num_heads, self.num_kv_heads,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            self.eps, scale,
        )  # fmt: skip
        if self.is_last and batch.last is not None:
            q, residual = (x.index_select(0, batch.last) for x in (q, residual))
            batch = batch.of_last_tokens()
            batch.attention.begin(batch)
        out = batch.attention.forward(q, k, v, k_cache, v_cache, batch, self.scale, self.window)
        return self.o_proj.added(out, residual)
