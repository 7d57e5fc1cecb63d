"""Tensor parallelism: this process's rank among those that share one model."""

from __future__ import annotations

import torch
import torch.distributed as dist


class TensorParallel:
    """With one rank every collective is the identity and nothing is initialised."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def join(cls, rank: int, size: int, rendezvous: str, device: torch.device) -> TensorParallel:
        """Waits for all ranks. `rendezvous` is a file in the server's private folder: two servers
        on one host never meet."""
        if size > 1:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                init_method=f"file://{rendezvous}",
                rank=rank,
                world_size=size,
            )
        return cls(rank, size)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """Concatenation over ranks along `dim`."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=dim)

    def assert_same(self, tokens: torch.Tensor) -> None:
        """Raises RuntimeError, on every rank, if `tokens` [n] are not the same on all. Waits."""
        mine = tokens.contiguous()
        if self.size > 1:
            parts = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(parts, mine)
            if any(not torch.equal(part, parts[0]) for part in parts):
                raise RuntimeError(f"ranks sampled different tokens: {[p.tolist() for p in parts]}")
