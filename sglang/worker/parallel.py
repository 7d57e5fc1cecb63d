"""Tensor parallelism: this process's rank among those that share one model."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from sglang.worker.symmetric_memory import SymmetricMemory

_ENVIRONMENT = {
    # All ranks are on one host: they need no network, and nobody else can reach them.
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # No NVLink multicast.
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
"""What holds unless the user has said otherwise."""


class TensorParallel:
    """With one rank every collective is the identity and nothing is initialised."""

    def __init__(
        self, rank: int = 0, size: int = 1, symmetric_memory: SymmetricMemory | None = None
    ) -> None:
        self.rank = rank
        self.size = size
        self.symmetric = symmetric_memory

    @classmethod
    def join(
        cls,
        rank: int,
        size: int,
        rendezvous: str,
        device: torch.device,
        custom_all_reduce: bool = True,
    ) -> TensorParallel:
        """Waits for all ranks. `rendezvous` is a file in the server's private folder: two servers
        on one host never meet. On GPUs, device is this process's own."""
        if size == 1:
            return cls()
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=size,
            device_id=device if on_gpu else None,
        )
        if on_gpu and custom_all_reduce:
            return cls(rank, size, SymmetricMemory.open(rank, size, device))
        return cls(rank, size)

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """In place: the sum over ranks, or the largest, element by element."""
        if self.size == 1:
            return x
        if self.symmetric is not None and self.symmetric.is_quick(x):
            return self.symmetric.all_reduce(x, largest)
        dist.all_reduce(x, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        return x

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenation over ranks along the last dimension: [n, m] -> [n, size * m]."""
        if self.size == 1:
            return x
        parts = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(parts.unbind()), x.contiguous())
        return parts.movedim(0, -2).flatten(-2)

    def least(self, number: int) -> int:
        """Of the numbers that the ranks give. Waits."""
        if self.size == 1:
            return number
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        return -int(self.all_reduce(torch.tensor([-number], device=device), largest=True))

    def assert_same(self, tokens: torch.Tensor) -> None:
        """Raises RuntimeError, on every rank, if `tokens` [n] are not the same on all. Waits."""
        if self.size > 1:
            of_ranks = self.all_gather(tokens[None])[0].view(self.size, -1)
            if (of_ranks != of_ranks[0]).any():
                raise RuntimeError(f"ranks sampled different tokens: {of_ranks.tolist()}")
