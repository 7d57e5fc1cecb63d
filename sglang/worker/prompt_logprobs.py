"""Logprobs of prompt tokens, for the rows that ask for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from sglang.messages import PromptLogprobs, RowSpec, pack, unpack
from sglang.worker.rows import StepArrays

_BLOCK = 256
"""So many positions' logits exist at a time: a long prompt's take gigabytes."""


@dataclass
class ScoredSpan:
    """n prompt tokens of a row, from position `start` on, with k alternatives."""

    row: int
    start: int
    chosen: torch.Tensor  # float32 [n]
    top_ids: torch.Tensor  # int32 [n, k]
    top: torch.Tensor  # float32 [n, k]

    def map(self, to_host: Callable[[torch.Tensor], torch.Tensor]) -> ScoredSpan:
        return replace(
            self, chosen=to_host(self.chosen), top_ids=to_host(self.top_ids), top=to_host(self.top)
        )

    def message(self) -> PromptLogprobs:
        """Once the tensors are on the host."""
        return PromptLogprobs(
            self.row,
            self.start,
            self.chosen.numpy().tobytes(),
            pack(self.top_ids.numpy()),
            self.top.numpy().tobytes(),
        )


@dataclass
class Span:
    """Prompt tokens that a step's hidden states tell the logprobs of."""

    row: int
    start: int
    ids: np.ndarray  # int32 [n] the tokens at positions start...
    at: int
    """Index into the step's tokens of the one before `start`."""
    num_top: int

    def score(
        self, hidden: torch.Tensor, logits: Callable[[torch.Tensor], torch.Tensor]
    ) -> ScoredSpan:
        """hidden [T, H] of the step."""
        chosen, top_ids, top = [], [], []
        for i in range(0, len(self.ids), _BLOCK):
            ids = torch.tensor(self.ids[i : i + _BLOCK], dtype=torch.int64, device=hidden.device)
            start = self.at + i
            logprobs = logits(hidden[start : start + len(ids)]).float().log_softmax(-1)
            best, best_ids = logprobs.topk(self.num_top, dim=-1)
            chosen.append(logprobs.gather(1, ids[:, None])[:, 0])
            top.append(best)
            top_ids.append(best_ids.int())
        return ScoredSpan(
            self.row, self.start, torch.cat(chosen), torch.cat(top_ids), torch.cat(top)
        )


class PromptScorer:
    """Knows which rows still want logprobs of their prompt."""

    def __init__(self) -> None:
        self._asked: dict[int, RowSpec] = {}

    def open(self, spec: RowSpec) -> None:
        self._asked.pop(spec.row, None)
        if spec.prompt_logprobs_from >= 0:
            self._asked[spec.row] = spec

    def spans(self, step: StepArrays) -> list[Span]:
        """A token is told by the position before it: the last of a prompt's chunk tells the first
        token of the next chunk."""
        if not self._asked:
            return []
        spans = []
        starts = np.cumsum(step.q_lens) - step.q_lens
        for i, row in enumerate(step.rows.tolist()):
            spec = self._asked.get(row)
            if spec is None:
                continue
            end = int(step.kv_lens[i])
            begin = end - int(step.q_lens[i])
            first = max(begin + 1, spec.prompt_logprobs_from)
            last = min(end + 1, spec.prompt_len)
            if first < last:
                ids = unpack(spec.prompt)[first:last]
                at = int(starts[i]) + first - 1 - begin
                spans.append(Span(row, first, ids, at, max(spec.top_logprobs, 0)))
            if last == spec.prompt_len:
                del self._asked[row]
        return spans
