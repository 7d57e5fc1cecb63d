"""Embeddings of prompts, for the rows that ask for one: hidden states, not a sampled token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang.messages import Embedding, RowSpec
from sglang.worker.rows import StepArrays


@dataclass
class PooledRow:
    """A row's prompt, as one vector."""

    row: int
    values: torch.Tensor  # float32 [H]

    def map(self, to_host: Callable[[torch.Tensor], torch.Tensor]) -> PooledRow:
        return replace(self, values=to_host(self.values))

    def message(self) -> Embedding:
        """Once the tensor is on the host."""
        return Embedding(self.row, self.values.numpy().tobytes())


@dataclass
class PoolingSpan:
    """Prompt tokens of one row among a step's tokens."""

    spec: RowSpec
    start: int
    end: int
    """Indices into the step's tokens."""
    is_last: bool
    """The prompt ends here."""


class Pooler:
    """Knows which rows want an embedding: the hidden state of the prompt's last token, or the mean
    over all its tokens, whose sum grows chunk by chunk. Not normalized."""

    def __init__(self) -> None:
        self._asked: dict[int, RowSpec] = {}
        self._sums: dict[int, torch.Tensor] = {}

    def open(self, spec: RowSpec) -> None:
        """A preempted row opens again and computes its mean anew: nothing of its prompt was taken
        from the cache."""
        self._asked.pop(spec.row, None)
        self._sums.pop(spec.row, None)
        if spec.pooling is not None:
            self._asked[spec.row] = spec

    def spans(self, step: StepArrays) -> list[PoolingSpan]:
        if not self._asked:
            return []
        spans = []
        ends = np.cumsum(step.q_lens)
        for i, row in enumerate(step.rows.tolist()):
            spec = self._asked.get(row)
            if spec is not None:
                end, is_last = int(ends[i]), int(step.kv_lens[i]) >= spec.prompt_len
                spans.append(PoolingSpan(spec, end - int(step.q_lens[i]), end, is_last))
                if is_last:
                    del self._asked[row]
        return spans

    def pool(self, spans: list[PoolingSpan], hidden: torch.Tensor) -> list[PooledRow]:
        """hidden [T, H] of the step -> the rows whose prompt ends in it."""
        done = []
        for span in spans:
            row = span.spec.row
            if span.spec.pooling == "last":
                vector = hidden[span.end - 1].float()
            else:
                vector = hidden[span.start : span.end].sum(0, dtype=torch.float32)
                if row in self._sums:
                    vector += self._sums.pop(row)
                if span.is_last:
                    vector /= span.spec.prompt_len
                else:
                    self._sums[row] = vector
            if span.is_last:
                done.append(PooledRow(row, vector))
        return done
