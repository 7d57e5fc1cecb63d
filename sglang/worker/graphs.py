"""CUDA graphs of the decode step: one copy in, one replay, one copy out.

A graph holds everything from the gathering of input ids to the feedback of sampled tokens, for one
batch size; a step runs in the next larger graph, filled up with padding rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from sglang.worker.rows import RowState, StepArrays

NUM_INPUTS = 5


@dataclass
class DecodeInputs:
    """int32 [n] each: rows, row lengths with the new token, positions, KV slots of the new tokens
    and where these go in the flat slot table."""

    rows: torch.Tensor
    kv_lens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    grown_at: torch.Tensor


@dataclass
class DecodeOutputs:
    logits: torch.Tensor  # [n, V]
    tokens: torch.Tensor  # int32 [n]


def batch_sizes(largest: int) -> list[int]:
    """Powers of two, then steps of a quarter of the power below: padding is at most a fifth."""
    sizes = {1, 2, 4, largest}
    step, size = 8, 8
    while size < largest:
        sizes.add(size)
        step = max(8, 1 << (size.bit_length() - 3))
        size += step
    return sorted(s for s in sizes if s <= largest)


class DecodeGraphs:
    """`decode` is the whole step on the device, without a synchronisation."""

    def __init__(
        self,
        decode: Callable[[DecodeInputs], DecodeOutputs],
        rows: RowState,
        largest: int,
        show_progress: bool,
    ) -> None:
        self.sizes = batch_sizes(largest)
        self._rows = rows
        device = rows.slot_table.device
        self._inputs = torch.zeros(NUM_INPUTS * largest, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, DecodeInputs, DecodeOutputs]] = {}
        pool = None
        progress = tqdm(
            self.sizes[::-1], desc="Capturing CUDA graphs", unit="graph", disable=not show_progress
        )
        for size in progress:  # the largest first: the others find their memory in its pool
            inputs = self._view(size)
            self._inputs[: NUM_INPUTS * size].copy_(torch.from_numpy(self._padded(size, None)))
            decode(inputs)  # compiles kernels and allocates workspaces, outside the capture
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, pool=pool):
                outputs = decode(inputs)
            pool = pool or graph.pool()
            self._graphs[size] = (graph, inputs, outputs)

    def _view(self, size: int) -> DecodeInputs:
        return DecodeInputs(*self._inputs[: NUM_INPUTS * size].view(NUM_INPUTS, size))

    def _padded(self, size: int, step: StepArrays | None) -> np.ndarray:
        """int32 [NUM_INPUTS * size]: the step's rows, then padding that reads and writes no KV."""
        padding = self._rows.num_rows
        inputs = np.zeros((NUM_INPUTS, size), dtype=np.int32)
        n = 0
        if step is not None:
            n = len(step.rows)
            inputs[:, :n] = step.rows, step.kv_lens, step.positions, step.slots, step.grown_at
        inputs[0, n:] = padding
        inputs[3, n:] = -1
        inputs[4, n:] = padding * self._rows.max_len
        return inputs.reshape(-1)

    def fit(self, step: StepArrays) -> bool:
        return step.num_decode == len(step.rows) <= self.sizes[-1]

    def replay(self, step: StepArrays) -> tuple[DecodeInputs, DecodeOutputs]:
        """Valid until the next replay, in stream order; the first n entries are the step's."""
        n = len(step.rows)
        size = self.sizes[int(np.searchsorted(self.sizes, n))]
        graph, inputs, outputs = self._graphs[size]
        # A fresh pinned buffer a step: an earlier one may still be in its copy.
        host = torch.empty(NUM_INPUTS * size, dtype=torch.int32, pin_memory=True)
        host.numpy()[:] = self._padded(size, step)
        self._inputs[: NUM_INPUTS * size].copy_(host, non_blocking=True)
        graph.replay()
        return inputs, outputs
