"""Building one step's plan: arrays, as they go to the workers."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from sglang.messages import RowSpec, StepPlan, pack
from sglang.router.radix_cache import EMPTY
from sglang.router.request import Request, Rows


@dataclass
class Chunk:
    """New prompt tokens of one row in one step: positions start..end of its request."""

    request: Request
    row: int
    start: int
    end: int
    samples: bool
    """The chunk ends the prompt: its last position yields a token."""


@dataclass
class Flight:
    """A plan that was sent and whose result is not committed."""

    step: int
    rows: np.ndarray
    """int32: every row of the step, in plan order."""
    sampled_rows: np.ndarray
    """int32: the rows that sample, in the order of StepResult.tokens."""
    chunks: list[Chunk]


@dataclass
class PlanBuilder:
    """Collects a step; `build` lays it out as StepPlan's docstring draws it."""

    step: int
    decode_rows: np.ndarray = field(default_factory=lambda: EMPTY)
    decode_slots: np.ndarray = field(default_factory=lambda: EMPTY)
    opened: list[RowSpec] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    _cached_slots: list[np.ndarray] = field(default_factory=list)
    _prefill_slots: list[np.ndarray] = field(default_factory=list)
    _prefill_ids: list[np.ndarray] = field(default_factory=list)

    def open(self, spec: RowSpec, cached_slots: np.ndarray) -> None:
        self.opened.append(spec)
        self._cached_slots.append(cached_slots)

    def prefill(self, chunk: Chunk, tokens: np.ndarray, slots: np.ndarray) -> None:
        self.chunks.append(chunk)
        self._prefill_ids.append(tokens)
        self._prefill_slots.append(slots)

    def is_empty(self) -> bool:
        return not len(self.decode_rows) and not self.chunks

    def build(self, state: Rows) -> tuple[StepPlan, bytes, Flight]:
        rows = self._join([c.row for c in self.chunks])
        sampled_rows = self._join([c.row for c in self.chunks if c.samples])
        q_lens = [c.end - c.start for c in self.chunks]
        samples = [c.samples for c in self.chunks]
        masked, masks = state.masks(sampled_rows)
        lists = (self._prefill_slots, self._cached_slots, self._prefill_ids, masks)
        of_chunks = np.array(q_lens + samples, dtype=np.int32)
        payload = np.concatenate([rows, of_chunks, self.decode_slots, *chain(*lists)])
        plan = StepPlan(
            step=self.step,
            opened=self.opened,
            num_rows=len(rows),
            num_decode=len(self.decode_rows),
            num_prefill_tokens=sum(q_lens),
            masked=masked,
        )
        return plan, pack(payload), Flight(self.step, rows, sampled_rows, self.chunks)

    def _join(self, prefill_rows: list[int]) -> np.ndarray:
        return np.concatenate([self.decode_rows, np.array(prefill_rows, dtype=np.int32)])
