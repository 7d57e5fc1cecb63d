"""Small arrays on their way to the GPU and back, through pinned memory that is used again: to
allocate some for each copy takes longer than the copy."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

_NUM_BUFFERS = 4
"""More than there are steps in flight, so that none is waited for."""


class Field(NamedTuple):
    """int32 [n], or several lines of that, filled up with padding to `length` each."""

    values: np.ndarray  # [n] or [lines, n]
    length: int
    padding: int = 0

    @property
    def size(self) -> int:
        return self.length * (1 if self.values.ndim == 1 else len(self.values))


def lay_out(fields: Sequence[Field], out: np.ndarray) -> int:
    """Writes the fields one after the other; returns how long they are together."""
    end = 0
    for values, length, padding in fields:
        for line in values if values.ndim == 2 else (values,):
            start, end, n = end, end + length, len(line)
            out[start : start + n] = line
            if n < length:
                out[start + n : end] = padding
    return end


class Heads(dict[int, torch.Tensor]):
    """The first elements of a tensor, by their number. To make such a view takes as long as a small
    copy."""

    def __init__(self, whole: torch.Tensor) -> None:
        super().__init__()
        self._whole = whole

    def __missing__(self, count: int) -> torch.Tensor:
        self[count] = self._whole[:count]
        return self[count]


class _Pinned:
    """int32 [size] for one copy at a time."""

    def __init__(self, size: int) -> None:
        memory = torch.empty(size, dtype=torch.int32, pin_memory=True)
        self.array, self.heads, self.copied = memory.numpy(), Heads(memory), torch.cuda.Event()


class Staging:
    """Buffers taken in turn: an earlier one may still be in its copy."""

    def __init__(self, to: torch.Tensor) -> None:
        """to: int32, on the device; fields go to its beginning."""
        self._to = Heads(to)
        self._buffers = itertools.cycle([_Pinned(len(to)) for _ in range(_NUM_BUFFERS)])

    def copy(self, fields: Sequence[Field]) -> None:
        buffer = next(self._buffers)
        buffer.copied.synchronize()
        size = lay_out(fields, buffer.array)
        self._to[size].copy_(buffer.heads[size], non_blocking=True)
        buffer.copied.record()


class Landing:
    """Where sampled tokens come to on the host. A buffer is free again when they have been read, on
    whatever thread; while none is, there will be one more."""

    def __init__(self, size: int) -> None:
        """size: the most tokens of a step."""
        self._size = size
        self._free: deque[_Pinned] = deque()

    def fetch(self, tokens: torch.Tensor) -> Callable[[], np.ndarray]:
        """int32 [n] on the device -> what waits for all that is enqueued so far and gives them. To
        be called once."""
        count = tokens.shape[0]
        buffer = self._free.pop() if self._free else _Pinned(self._size)
        buffer.heads[count].copy_(tokens, non_blocking=True)
        buffer.copied.record()
        return partial(self._read, buffer, count)

    def _read(self, buffer: _Pinned, count: int) -> np.ndarray:
        buffer.copied.synchronize()
        tokens = buffer.array[:count].copy()
        self._free.append(buffer)
        return tokens
