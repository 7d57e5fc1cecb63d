"""Which KV slots are free."""

from __future__ import annotations

import numpy as np


class SlotAllocator:
    """A stack of free slots. A slot is the place of one token's K and V in every layer."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_free = num_slots
        self._stack = np.arange(num_slots, dtype=np.int32)[::-1].copy()

    def alloc(self, n: int) -> np.ndarray:
        """int32[n]. The caller has made sure that n are free."""
        assert n <= self.num_free, f"{n} slots wanted, {self.num_free} free"
        self.num_free -= n
        return self._stack[self.num_free : self.num_free + n][::-1].copy()

    def free(self, slots: np.ndarray) -> None:
        end = self.num_free + len(slots)
        assert end <= self.num_slots, "a slot was freed twice"
        self._stack[self.num_free : end] = slots[::-1]
        self.num_free = end
