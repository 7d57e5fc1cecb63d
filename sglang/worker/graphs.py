"""CUDA graphs of whole steps: one copy in, one replay, one copy out.

A graph holds everything from the gathering of input ids to the feedback of sampled tokens. There
are two families: decode steps, by number of rows, and steps with some prefill in them, by number of
tokens. A step runs in the next larger graph of its family, filled up with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from sglang.attention.base import AttentionBackend
from sglang.worker.rows import RowState, StepArrays

MAX_PREFILL_TOKENS = 9216
"""In longer steps the GPU is slower than the launching of kernels, and a graph gains nothing."""


@dataclass
class DecodeInputs:
    """int32 [n] each: rows, their lengths with the new token, its position, its KV slot, and where
    that goes in the flat slot table."""

    rows: torch.Tensor
    kv_lens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    grown_at: torch.Tensor


@dataclass
class MixedInputs:
    """int32. Of T tokens: their ids (-1: the row's last token), rows, positions, KV slots and where
    these go in the flat slot table. Of n rows: as above, lengths of those that decode (0: it does
    not), and the last token of each."""

    ids: torch.Tensor  # [T]
    owners: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    grown_at: torch.Tensor  # [T]
    rows: torch.Tensor  # [n]
    kv_lens: torch.Tensor  # [n]
    decode_lens: torch.Tensor  # [n]
    last: torch.Tensor  # [n]
    q_starts: torch.Tensor  # [n + 1]


@dataclass
class GraphOutputs:
    """Of all rows, sampled or not."""

    rows: torch.Tensor  # int32 [n]
    kv_lens: torch.Tensor  # int32 [n]
    logits: torch.Tensor  # [n, V] of this rank
    tokens: torch.Tensor  # int32 [n]


def decode_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then steps of a quarter of the power of two below: little padding."""
    sizes, size = {1, 2, 4, largest}, 8
    while size < largest:
        sizes.add(size)
        size += max(8, 1 << (size.bit_length() - 3))
    return sorted(s for s in sizes if s <= largest)


def prefill_sizes(largest: int) -> list[int]:
    """Powers of two from 16 and half-way between them; none if `largest` is 0."""
    if largest == 0:
        return []
    sizes = {s for i in range(4, 20) for s in (1 << i, 3 << (i - 1))}
    return [*sorted(s for s in sizes if s < largest), largest]


class StepGraphs:
    """`decode` and `mixed` are whole steps on the device, without a synchronisation."""

    def __init__(
        self,
        decode: Callable[[DecodeInputs], GraphOutputs],
        mixed: Callable[[MixedInputs], GraphOutputs],
        attention: AttentionBackend,
        state: RowState,
        max_rows: int,
        max_tokens: int,
        show_progress: bool,
    ) -> None:
        self._attention = attention
        self._state = state
        self._max_rows = max_rows
        self._max_tokens = min(max_tokens, MAX_PREFILL_TOKENS) if attention.captures_prefill else 0
        self._decode_sizes = decode_sizes(max_rows)
        self._prefill_sizes = prefill_sizes(self._max_tokens)
        self._inputs = torch.zeros(
            5 * max(max_rows, self._max_tokens) + 5 * max_rows + 1,
            dtype=torch.int32,
            device=state.slot_table.device,
        )
        self._pool = None
        self._decode_graphs: dict[int, tuple[torch.cuda.CUDAGraph, GraphOutputs]] = {}
        self._mixed_graphs: dict[int, tuple[torch.cuda.CUDAGraph, GraphOutputs]] = {}
        with tqdm(
            total=len(self._decode_sizes) + len(self._prefill_sizes),
            desc="Capturing CUDA graphs",
            unit="graph",
            disable=None if show_progress else True,
        ) as progress:
            # The largest first: the others find their memory in its pool.
            for size in self._prefill_sizes[::-1]:
                empty = self._mixed_arrays(None, size)
                self._mixed_graphs[size] = self._capture(mixed, MixedInputs, empty)
                progress.update()
            for size in self._decode_sizes[::-1]:
                empty = self._decode_arrays(None, size)
                attention.plan_decode(np.empty(0, dtype=np.int32), size)
                self._decode_graphs[size] = self._capture(decode, DecodeInputs, empty)
                progress.update()

    def _capture(self, run, inputs_class, arrays: list[np.ndarray]):
        sizes = [len(array) for array in arrays]
        inputs = inputs_class(*self._inputs[: sum(sizes)].split(sizes))
        self._upload(arrays)
        run(inputs)  # compiles kernels and allocates workspaces, outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run(inputs)
        self._pool = self._pool or graph.pool()
        return graph, outputs

    def replay(self, step: StepArrays) -> GraphOutputs | None:
        """None: the step is larger than any graph. The outputs' first entries are the step's rows;
        valid until the next replay, in stream order."""
        num_rows, num_tokens = len(step.rows), len(step.positions)
        if num_rows > self._max_rows:
            return None
        if step.num_decode == num_rows:
            size = _at_least(self._decode_sizes, num_rows)
            arrays, graphs = self._decode_arrays(step, size), self._decode_graphs
            self._attention.plan_decode(step.kv_lens, size)
        elif num_tokens <= self._max_tokens:
            size = _at_least(self._prefill_sizes, num_tokens)
            arrays, graphs = self._mixed_arrays(step, size), self._mixed_graphs
        else:
            return None
        self._upload(arrays)
        graph, outputs = graphs[size]
        graph.replay()
        return outputs

    def _upload(self, arrays: list[np.ndarray]) -> None:
        # A fresh pinned buffer a step: an earlier one may still be in its copy.
        size = sum(len(array) for array in arrays)
        host = torch.empty(size, dtype=torch.int32, pin_memory=True)
        np.concatenate(arrays, out=host.numpy())
        self._inputs[:size].copy_(host, non_blocking=True)

    def _decode_arrays(self, step: StepArrays | None, size: int) -> list[np.ndarray]:
        """DecodeInputs of `size` rows; those beyond the step's are padding."""
        pad, pad_at = self._state.num_rows, self._state.num_rows * self._state.max_len
        if step is None:
            step = StepArrays.empty()
        return [
            _fill(step.rows, size, pad),
            _fill(step.kv_lens, size, 0),
            _fill(step.positions, size, 0),
            _fill(step.slots, size, -1),
            _fill(step.grown_at, size, pad_at),
        ]

    def _mixed_arrays(self, step: StepArrays | None, size: int) -> list[np.ndarray]:
        """MixedInputs of `size` tokens in as many rows as there may be."""
        pad, pad_at = self._state.num_rows, self._state.num_rows * self._state.max_len
        num_rows = min(size, self._max_rows)
        if step is None:
            step = StepArrays.empty()
        ends = np.cumsum(step.q_lens, dtype=np.int32)
        num_tokens = len(step.positions)
        ids = np.zeros(size, dtype=np.int32)
        ids[: step.num_decode] = -1
        ids[step.num_decode : num_tokens] = step.prefill_ids
        starts = np.full(num_rows + 1, num_tokens, dtype=np.int32)
        starts[0] = 0
        starts[1 : len(ends) + 1] = ends
        return [
            ids,
            _fill(np.repeat(step.rows, step.q_lens), size, pad),
            _fill(step.positions, size, 0),
            _fill(step.slots, size, -1),
            _fill(step.grown_at, size, pad_at),
            _fill(step.rows, num_rows, pad),
            _fill(step.kv_lens, num_rows, 0),
            _fill(step.kv_lens[: step.num_decode], num_rows, 0),
            _fill(ends - 1, num_rows, 0),
            starts,
        ]


def _at_least(sizes: list[int], n: int) -> int:
    return sizes[int(np.searchsorted(sizes, n))]


def _fill(values: np.ndarray, size: int, padding: int) -> np.ndarray:
    out = np.full(size, padding, dtype=np.int32)
    out[: len(values)] = values
    return out
