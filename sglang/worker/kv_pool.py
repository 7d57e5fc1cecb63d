"""The KV cache's memory: one slot a token."""

from __future__ import annotations

import torch


class KVPool:
    """k[layer], v[layer]: [num_slots, num_kv_heads, head_dim], this rank's heads.

    Which slot holds what is the router's business; the pool neither allocates nor frees.
    """

    def __init__(
        self,
        num_slots: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_slots = num_slots
        # Zeros, not garbage: masked lanes are multiplied by zero, and 0 * NaN is NaN.
        memory = torch.zeros(
            (2, num_layers, num_slots, num_kv_heads, head_dim), dtype=dtype, device=device
        )
        self.k = list(memory[0].unbind())
        self.v = list(memory[1].unbind())

    @staticmethod
    def bytes_per_slot(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
