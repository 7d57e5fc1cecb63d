"""The KV cache's memory: one slot a token."""

from __future__ import annotations

import os

import numpy as np
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
        shape = (2, num_layers, num_slots, num_kv_heads, head_dim)
        # Zeros, not garbage: masked lanes are multiplied by zero, and 0 * NaN is NaN.
        if device.type == "cpu":  # NumPy's zeros take no memory before they are written
            num_bytes = num_slots * self.bytes_per_slot(num_layers, num_kv_heads, head_dim, dtype)
            memory = torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)
        else:
            memory = torch.zeros(shape, dtype=dtype, device=device)
        self.k = list(memory[0].unbind())
        self.v = list(memory[1].unbind())

    @staticmethod
    def bytes_per_slot(
        num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize


def num_slots_that_fit(bytes_per_slot: int, device: torch.device, mem_fraction: float) -> int:
    """With the weights loaded: on a GPU, what they leave of `mem_fraction` of its memory; on a CPU,
    half of the memory that is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return max(int(free - (1.0 - mem_fraction) * total), 0) // bytes_per_slot
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // 2 // bytes_per_slot
