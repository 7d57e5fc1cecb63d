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
    """Pinned memory for one step's inputs and its tokens. Free again when the tokens have been
    read, on whatever thread: before them, the inputs were."""

    def __init__(self, num_tokens: int, free: deque[Berth]) -> None:
        self._inputs: tuple[np.ndarray, Heads] | None = None  # there may be no graphs
        self._tokens = _pinned(num_tokens)
        self._event = torch.cuda.Event()
        self._free = free

    def send(self, fields: Sequence[Field], to: Heads) -> None:
        """To the beginning of the tensor on the device."""
        if self._inputs is None:
            self._inputs = _pinned(len(to.whole))
        array, heads = self._inputs
        size = lay_out(fields, array)
        to[size].copy_(heads[size], non_blocking=True)

    def fetch(self, tokens: torch.Tensor) -> Callable[[], np.ndarray]:
        """int32 [n] on the device -> what waits for all that is enqueued so far and gives them. To
        be called once."""
        count = tokens.shape[0]
        self._tokens[1][count].copy_(tokens, non_blocking=True)
        self._event.record()
        return partial(self._read, count)

    def _read(self, count: int) -> np.ndarray:
        self._event.synchronize()
        tokens = self._tokens[0][:count].copy()
        self._free.append(self)
        return tokens


class Berths:
    """As many as there are steps in flight."""

    def __init__(self, num_tokens: int) -> None:
        """num_tokens: of a step at most."""
        self._num_tokens = num_tokens
        self._free: deque[Berth] = deque()

    def take(self) -> Berth:
        return self._free.pop() if self._free else Berth(self._num_tokens, self._free)


def _pinned(size: int) -> tuple[np.ndarray, Heads]:
    memory = torch.empty(size, dtype=torch.int32, pin_memory=True)
    return memory.numpy(), Heads(memory)
