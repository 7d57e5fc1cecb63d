"""Small arrays on their way to the GPU and back, through pinned memory that is used again: to
allocate some for each copy takes longer than the copy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch


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
        self.whole = whole

    def __missing__(self, count: int) -> torch.Tensor:
        self[count] = self.whole[:count]
        return self[count]


class Berth:
    """Memory on the host for one step's inputs and its tokens. Free again when the tokens have been
    read, on whatever thread: before them, the inputs were."""

    def __init__(self, num_tokens: int, pinned: bool, free: deque[Berth]) -> None:
        self._pinned = pinned
        self._inputs: _Buffer | None = None  # there may be no graphs
        self._tokens = _Buffer(num_tokens, pinned)
        self._event = torch.cuda.Event() if pinned else None
        self._free = free

    def send(self, fields: Sequence[Field], to: Heads) -> None:
        """To the beginning of the tensor on the device."""
        if self._inputs is None:
            self._inputs = _Buffer(len(to.whole), self._pinned)
        size = lay_out(fields, self._inputs.array)
        to[size].copy_(self._inputs.heads[size], non_blocking=True)

    def fetch(self, tokens: torch.Tensor) -> Callable[[], np.ndarray]:
        """int32 [n] on the device -> what waits for all that is enqueued so far and gives them. To
        be called once."""
        count = tokens.shape[0]
        self._tokens.heads[count].copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record()
        return partial(self._read, count)

    def _read(self, count: int) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
        tokens = self._tokens.array[:count].copy()
        self._free.append(self)
        return tokens


class Berths:
    """As many as there are steps in flight."""

    def __init__(self, num_tokens: int, pinned: bool) -> None:
        """num_tokens: of a step at most. pinned: for a GPU."""
        self._new = partial(Berth, num_tokens, pinned)
        self._free: deque[Berth] = deque()

    def take(self) -> Berth:
        return self._free.pop() if self._free else self._new(self._free)


class _Buffer:
    """int32 [size]."""

    def __init__(self, size: int, pinned: bool) -> None:
        memory = torch.empty(size, dtype=torch.int32, pin_memory=pinned)
        self.array, self.heads = memory.numpy(), Heads(memory)
