"""Small arrays on their way to the GPU."""

from __future__ import annotations

import itertools

import numpy as np
import torch

_NUM_BUFFERS = 4
"""More than there are steps in flight, so that none is waited for."""


class Staging:
    """Pinned buffers, taken in turn: an earlier one may still be in its copy. (To allocate one for
    each copy takes longer than the copy.)"""

    def __init__(self, size: int) -> None:
        self._buffers = itertools.cycle(
            (torch.empty(size, dtype=torch.int32, pin_memory=True), torch.cuda.Event())
            for _ in range(_NUM_BUFFERS)
        )

    def copy(self, arrays: list[np.ndarray], to: torch.Tensor) -> None:
        """int32 arrays, one after the other, to the beginning of a tensor on the device."""
        host, copied = next(self._buffers)
        copied.synchronize()
        size = sum(map(len, arrays))
        np.concatenate(arrays, out=host.numpy()[:size])
        to[:size].copy_(host[:size], non_blocking=True)
        copied.record()
