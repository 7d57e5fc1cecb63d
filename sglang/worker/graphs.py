"""CUDA graphs of whole steps: one copy in, one replay, one copy out.

A graph holds everything from the gathering of input ids to the feedback of sampled tokens. There
are four families: steps that only decode, by number of rows; steps that prefill a few rows and do
nothing else, by number of tokens; steps of many tokens in short rows, and all others, again by
tokens. A step runs in the next larger graph of its family, filled up with padding.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from sglang.attention.base import AttentionBackend
from sglang.worker.rows import NUM_PARAMS, RowState, StepArrays
from sglang.worker.staging import Berth, Field, Heads, lay_out

MAX_PREFILL_TOKENS = 9216
PREFILL_ROWS, MIXED_ROWS = 16, 256
"""In a graph of the second family, and of the last: each costs its logits, whether the step has it
or not."""
SHORT_ROW, MANY_TOKENS = 128, 512
"""Of the third family: attention's tiles for long rows would be mostly empty."""


def longest_worthwhile(weights_per_layer: int) -> int:
    """Tokens of the longest steps that are worth a graph: in longer ones the GPU takes twice as
    long (at 600 TFLOP/s) as the launching of a layer's kernels (about a millisecond), and a graph
    gains nothing."""
    return min(int(2 * 1e-3 * 600e12 / (2 * weights_per_layer)), MAX_PREFILL_TOKENS)


@dataclass
class DecodeInputs:
    """int32: sampling parameters [NUM_PARAMS * n], and [n] each: rows, their lengths with the new
    token, its position, its KV slot, and where that goes in the flat slot table."""

    params: torch.Tensor
    rows: torch.Tensor
    kv_lens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    grown_at: torch.Tensor


@dataclass
class PrefillInputs:
    """int32. Of n rows, their sampling parameters. Of T tokens: their ids (-1: the row's last
    token), rows, positions, KV slots and where these go in the flat slot table. Of n rows: as
    above, the last token of each, and, if any may decode, the lengths of those that do (0: it does
    not)."""

    params: torch.Tensor  # [NUM_PARAMS * n]
    ids: torch.Tensor  # [T]
    owners: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    grown_at: torch.Tensor  # [T]
    rows: torch.Tensor  # [n]
    kv_lens: torch.Tensor  # [n]
    last: torch.Tensor  # [n]
    q_starts: torch.Tensor  # [n + 1]
    decode_lens: torch.Tensor | None = None  # [n]


@dataclass
class GraphOutputs:
    """Of all rows, sampled or not."""

    logits: torch.Tensor  # [n, V] of this rank
    tokens: torch.Tensor  # int32 [n]


def decode_sizes(largest: int) -> list[int]:
    """1, 2, 4, 8, then steps of a quarter of the power of two below: little padding."""
    sizes, size = {1, 2, 4, largest}, 8
    while size < largest:
        sizes.add(size)
        size += max(8, 1 << (size.bit_length() - 3))
    return sorted(s for s in sizes if s <= largest)


def prefill_sizes(largest: int, steps: int) -> list[int]:
    """Powers of two from 16 and half-way between them; from 1024 on, so many `steps` from one to
    the next."""
    sizes = {largest} if largest else set()
    for power in (1 << i for i in range(4, 20)):
        each = power // (2 if power < 1024 else steps)
        sizes |= set(range(power, min(2 * power, largest), each))
    return sorted(sizes)


@dataclass
class Family:
    """Graphs of one kind of step, by size."""

    run: Callable[..., GraphOutputs]
    inputs_class: type
    fields: Callable[[StepArrays, int, int], list[Field]]
    """A step's inputs, in their order, padded to so many tokens and rows."""
    sizes: list[int]
    max_rows: int
    graphs: dict[int, tuple[torch.cuda.CUDAGraph, GraphOutputs]] = field(default_factory=dict)

    def holds(self, num_rows: int, size: int) -> bool:
        return bool(self.sizes) and num_rows <= self.max_rows and size <= self.sizes[-1]

    def padded(self, step: StepArrays, size: int) -> list[Field]:
        return self.fields(step, size, min(size, self.max_rows))

    def at_least(self, size: int) -> int:
        return self.sizes[bisect_left(self.sizes, size)]


class StepGraphs:
    """`decode` and `prefill` are whole steps on the device, without a synchronisation; `prefill` is
    told the most tokens that a row may have. To be captured before the first step."""

    def __init__(
        self,
        decode: Callable[[DecodeInputs], GraphOutputs],
        prefill: Callable[..., GraphOutputs],
        attention: AttentionBackend,
        state: RowState,
        max_rows: int,
        max_tokens: int,
    ) -> None:
        self._attention = attention
        self._state = state
        self._pad_at = state.num_rows * state.max_len  # in the flat slot table
        longest = max_tokens if attention.captures_prefill else 0
        coarse, fine = prefill_sizes(longest, steps=2), prefill_sizes(longest, steps=4)
        few, some = min(PREFILL_ROWS, max_rows), min(MIXED_ROWS, max_rows)
        of_any = partial(prefill, max_q_len=longest)
        of_short = partial(prefill, max_q_len=SHORT_ROW)
        many = [size for size in coarse if size >= MANY_TOKENS]
        rows = decode_sizes(max_rows)
        self._decode = Family(decode, DecodeInputs, self._decode_fields, rows, max_rows)
        self._prefill = Family(of_any, PrefillInputs, self._prefill_fields, fine, few)
        self._short = Family(of_short, PrefillInputs, self._mixed_fields, many, max_rows)
        self._mixed = Family(of_any, PrefillInputs, self._mixed_fields, coarse, some)
        device = state.slot_table.device
        size = 5 * max(max_rows, longest) + (5 + NUM_PARAMS) * max_rows + 1
        self._inputs = Heads(torch.zeros(size, dtype=torch.int32, device=device))
        self._pool = None
        # The largest first: the others find their memory in its pool.
        self._all = [
            (family, size)
            for family in (self._prefill, self._mixed, self._short, self._decode)
            for size in family.sizes[::-1]
        ]

    def rehearse(self) -> None:
        """Runs what is to be captured, for `compile_ahead`."""
        for family, size in self._all:
            family.run(self._padding(family, size))
            self._state.last_token.zero_()  # what was drawn is no token

    def capture(self, show_progress: bool) -> None:
        with tqdm(
            self._all,
            desc="Capturing CUDA graphs",
            unit="graph",
            disable=None if show_progress else True,
        ) as progress:
            for family, size in progress:
                family.graphs[size] = self._capture(family.run, self._padding(family, size))

    def _padding(self, family: Family, size: int) -> DecodeInputs | PrefillInputs:
        """The inputs of a graph, where they will always be, and nothing but padding in them."""
        if family is self._decode:
            self._attention.plan_decode(np.empty(0, dtype=np.int32), size)
        fields = family.padded(StepArrays.empty(), size)
        sizes = [field.size for field in fields]
        inputs = self._inputs[sum(sizes)]
        host = torch.empty(sum(sizes), dtype=torch.int32)
        lay_out(fields, host.numpy())
        inputs.copy_(host)
        return family.inputs_class(*inputs.split(sizes))

    def _capture(
        self, run: Callable[..., GraphOutputs], inputs: DecodeInputs | PrefillInputs
    ) -> tuple[torch.cuda.CUDAGraph, GraphOutputs]:
        run(inputs)  # compiles kernels and allocates workspaces, outside the capture
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = run(inputs)
        self._pool = self._pool or graph.pool()
        return graph, outputs

    def replay(self, step: StepArrays, berth: Berth) -> GraphOutputs | None:
        """None: the step is larger than any graph. The outputs' first entries are the step's rows;
        valid until the next replay, in stream order."""
        num_rows, num_tokens = len(step.rows), len(step.positions)
        family = self._mixed
        if step.num_decode == num_rows:
            family = self._decode
        elif step.num_decode == 0 and num_rows <= self._prefill.max_rows:
            family = self._prefill
        elif num_tokens >= MANY_TOKENS and step.q_lens.max() <= SHORT_ROW:
            family = self._short
        if not family.holds(num_rows, num_tokens):
            return None
        size = family.at_least(num_tokens)
        if family is self._decode:
            self._attention.plan_decode(step.kv_lens, size)
        berth.send(family.padded(step, size), self._inputs)
        graph, outputs = family.graphs[size]
        graph.replay()
        return outputs

    def _decode_fields(self, step: StepArrays, size: int, num_rows: int) -> list[Field]:
        """DecodeInputs of `size` rows, a token each; those beyond the step's are padding."""
        return [
            Field(step.params, size),  # padding is greedy
            Field(step.rows, size, self._state.num_rows),
            Field(step.kv_lens, size),
            Field(step.positions, size),
            Field(step.slots, size, -1),
            Field(step.grown_at, size, self._pad_at),
        ]

    def _mixed_fields(self, step: StepArrays, size: int, num_rows: int) -> list[Field]:
        """PrefillInputs of `size` tokens in as many rows as there may be, of which some decode."""
        d = step.num_decode
        ids = np.concatenate((np.full(d, -1, dtype=np.int32), step.prefill_ids))
        decode_lens = Field(step.kv_lens[:d], num_rows)
        return [*self._row_fields(step, ids, size, num_rows), decode_lens]

    def _prefill_fields(self, step: StepArrays, size: int, num_rows: int) -> list[Field]:
        """PrefillInputs of `size` tokens in few rows, none of which decodes."""
        return self._row_fields(step, step.prefill_ids, size, num_rows)

    def _row_fields(
        self, step: StepArrays, ids: np.ndarray, size: int, num_rows: int
    ) -> list[Field]:
        ends = step.q_lens.cumsum(dtype=np.int32)
        starts = np.zeros(len(ends) + 1, dtype=np.int32)
        starts[1:] = ends
        return [
            Field(step.params, num_rows),
            Field(ids, size),
            Field(step.owners, size, self._state.num_rows),
            Field(step.positions, size),
            Field(step.slots, size, -1),
            Field(step.grown_at, size, self._pad_at),
            Field(step.rows, num_rows, self._state.num_rows),
            Field(step.kv_lens, num_rows),
            Field(ends - 1, num_rows),
            Field(starts, num_rows + 1, len(ids)),
        ]
