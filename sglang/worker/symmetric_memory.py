"""Symmetric memory: of every rank's GPU the same piece, which all ranks' GPUs can reach. Small
tensors are all-reduced over it."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from sglang.kernels import all_reduce as one_shot

logger = logging.getLogger(__name__)

MAX_BYTES = 4 << 20
"""With two ranks, one shot is quicker than NCCL up to here. With more, each sends more copies."""


class SymmetricMemory:
    def __init__(
        self, rank: int, addresses: tuple[int, ...], memory: torch.Tensor, handle: object
    ) -> None:
        """addresses: of all ranks' memories, as this rank sees them; memory: this rank's own;
        handle: what keeps the others' open."""
        self._rank = rank
        self._addresses = addresses
        self._kept = (memory, handle)
        self._max_bytes = MAX_BYTES // (len(addresses) - 1)
        self._launches = torch.zeros(
            one_shot.MAX_PROGRAMS, dtype=torch.int32, device=memory.device
        )  # fmt: skip

    @classmethod
    def open(cls, rank: int, size: int, device: torch.device) -> SymmetricMemory | None:
        """All ranks together, their process group being there. None, on all of them, where the
        GPUs cannot reach each other's memory."""
        opened = None
        try:
            opened = cls._open(rank, size, device)
        except Exception as error:  # of many kinds: driver and machine have their say
            logger.warning("no symmetric memory, so NCCL does it all: %s", error)
        everywhere = torch.tensor([opened is not None], dtype=torch.int32, device=device)
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return opened if everywhere.item() else None

    @classmethod
    def _open(cls, rank: int, size: int, device: torch.device) -> SymmetricMemory:
        from torch.distributed import _symmetric_memory as torch_symmetric

        memory = torch_symmetric.empty(
            one_shot.memory_bytes(size), dtype=torch.uint8, device=device
        )  # fmt: skip
        memory.zero_()
        handle = torch_symmetric.rendezvous(memory, dist.group.WORLD)
        # It is at the same place in every rank's allocation, though maybe not at its beginning.
        offset = memory.data_ptr() - handle.buffer_ptrs[rank]
        # The zeros are there before anybody writes: `open` goes on to meet the other ranks.
        torch.cuda.synchronize(device)
        addresses = tuple(address + offset for address in handle.buffer_ptrs)
        return cls(rank, addresses, memory, handle)

    def is_quick(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce` can have x and is the quicker way."""
        return x.nbytes <= self._max_bytes and self.holds(x)

    def holds(self, x: torch.Tensor) -> bool:
        """Whether `all_reduce` can have x."""
        return one_shot.takes(x)

    def all_reduce(self, x: torch.Tensor, largest: bool = False) -> torch.Tensor:
        """In place: the sum over ranks, or the largest."""
        return one_shot.all_reduce_triton(
            x, self._addresses, self._launches, self._rank, largest
        )  # fmt: skip
